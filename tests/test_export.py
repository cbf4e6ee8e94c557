"""An exported file is plain OpenCLIP weights that give the run's last accuracy."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from helpers import Patterns, load_plain

from flora import export
from flora.config.parse import load_config, parse_config
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.tree import state_digest
from flora.simulate import simulate


@pytest.mark.parametrize("adapter", [{"name": "lora", "towers": ["text", "vision"]}, {"name": "full"}])
def test_plain_openclip_reaches_the_runs_accuracy(
    raw_config: dict[str, Any], tmp_path: Path, adapter: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config({**raw_config, "adapter": adapter, "seed": 5})
    result = simulate(config)
    assert result.summary.last_accuracy > result.summary.zero_shot_accuracy
    file = tmp_path / "merged.safetensors"
    assert export.main([str(result.directory), str(file)]) == 0
    assert "as a run's backbone: backbone.model=" in capsys.readouterr().out
    plain = load_plain(config.backbone.model, "fp32")
    open_clip.load_checkpoint(plain.model, str(file))
    data = Patterns().load(Rng(5).child("data"))
    pixels = torch.stack([plain.preprocess(data.test.open(index)) for index in range(len(data.test))])
    tokens = plain.tokenize([f"a photo of a {name}." for name in data.class_names])
    with torch.no_grad():
        images, texts, _ = plain.model(pixels, tokens)
    predicted = (images @ texts.T).argmax(dim=1).numpy()
    assert np.mean(predicted == data.test.labels) == pytest.approx(result.summary.last_accuracy)


def test_half_precision_and_what_is_refused(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(simulate(parse_config({**raw_config, "rounds": 1})).directory)
    file = tmp_path / "merged.safetensors"
    assert export.main([run, str(file), "--dtype", "fp16"]) == 0
    assert {tensor.dtype for tensor in safetensors.torch.load_file(file).values()} == {torch.float16}
    capsys.readouterr()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text(Path(run, "config.yaml").read_text())
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign / "adapter.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(Path(run, "config.yaml").read_text().replace("rank: 2", "rank: 3"))
    (other / "adapter.safetensors").write_bytes(Path(run, "adapter.safetensors").read_bytes())
    for arguments, message in [
        ((run, str(file)), "merged.safetensors: exists already"),
        ((run, str(tmp_path / "no" / "b.safetensors")), "b.safetensors: can't be written: No such file"),
        ((run, str(tmp_path / "no" / "b")), "b: can't be written: No such file"),
        ((str(tmp_path), str(tmp_path / "b.safetensors")), "not a run directory: it has no adapter.safetensors"),
        ((str(foreign), str(tmp_path / "b.safetensors")), "not an adapter of this program"),
        ((str(other), str(tmp_path / "b.safetensors")), "`adapter` in config.yaml is not what its adapter was trained"),
        (
            (run, str(tmp_path / "b.safetensors"), "adapter.rank=3"),
            "doesn't fit the adapter that config.yaml describes",
        ),
    ]:
        assert export.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"server": {"strategy": "fedsa_lora"}},
        {"personal": "ditto"},
        {"adapter": {"name": "dual_lora", "rank": 2, "local_rank": 5}},
        {"server": {"strategy": "fedex_lora"}},
    ],
)
def test_a_clients_own_adapter(
    raw_config: dict[str, Any], tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {
        **raw_config,
        "clients": {"number": 4, "holdout_fraction": 0.5},
        "evaluation": {"num_local_only": 4},
        **changes,
    }
    result = simulate(parse_config(raw))
    server, own = tmp_path / "server.safetensors", tmp_path / "own.safetensors"
    assert export.main([str(result.directory), str(server)]) == 0
    if "fedex" in str(changes):
        assert export.main([str(result.directory), str(own), "--client", "1"]) == 2
        assert capsys.readouterr().err == f"{result.directory}: client 1 has kept no adapter of its own in this run\n"
        return
    assert export.main([str(result.directory), str(own), "--client", "1"]) == 0
    assert export.main([str(result.directory), str(tmp_path / "x.safetensors"), "--client", "4"]) == 2
    assert capsys.readouterr().err == f"{result.directory}: there is no client '4'; expected one of 0, 1, 2, 3\n"
    # The exported weights, as a frozen model of no rounds, are as accurate on the client's examples as the run says.
    weights = {"model": raw["backbone"]["model"], "weights": str(own)}
    zero = simulate(parse_config({**raw, "adapter": "lora", "server": {}, "personal": "none", "name": "zero",
                                  "backbone": weights, "rounds": 0}))  # fmt: skip
    rows = [
        dict(zip(*(line.split(",") for line in (head, line)), strict=True))
        for head, line in (
            ((run.directory / "clients.csv").read_text().splitlines()[0],
             (run.directory / "clients.csv").read_text().splitlines()[2])
            for run in (result, zero)
        )
    ]  # fmt: skip
    assert rows[0]["personal_accuracy"] == rows[1]["accuracy"] != ""
    assert rows[0]["personal_test_accuracy"] == rows[1]["test_accuracy"] != ""
    assert server.read_bytes() != own.read_bytes()


@pytest.fixture
def run(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    """A finished run whose backbone has a mean, a deviation and weights of its own."""
    config = json.loads(Path(raw_config["backbone"]["model"]).read_text())
    folder = tmp_path / "backbone"
    folder.mkdir()
    own = {"mean": [0.2, 0.3, 0.4], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": own}))
    plain = load_plain(raw_config["backbone"]["model"], "fp32").model
    safetensors.torch.save_file(dict(plain.state_dict()), folder / "open_clip_model.safetensors")
    raw = {**raw_config, "backbone": {"model": str(folder)}, "adapter": {"name": "lora", "towers": ["text", "vision"]}}
    return simulate(parse_config(raw)).directory


def test_what_is_printed_loads_the_model_with_its_preprocessing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint alone, run as Python, gives the run's last accuracy; the other one gives it as a run of no rounds."""
    assert export.main([str(run), str(tmp_path / "adapted")]) == 0
    counted, in_python, as_backbone = capsys.readouterr().out.splitlines()
    assert counted.startswith(f"{tmp_path / 'adapted'}: ") and counted.endswith(" tensors")
    made: dict[str, Any] = {}
    exec(in_python.partition(": ")[2], made)
    model, preprocess = made["model"].eval(), made["preprocess"]
    found = model.visual.preprocess_cfg
    assert list(found["mean"]) == [0.2, 0.3, 0.4] and found["resize_mode"] == "squash"
    summary = json.loads((run / "summary.json").read_text())
    data = Patterns().load(Rng(0).child("data"))
    pixels = torch.stack([preprocess(data.test.open(index)) for index in range(len(data.test))])
    names = [f"a photo of a {name}." for name in data.class_names]
    with torch.no_grad():
        images, texts, _ = model(pixels, open_clip.get_tokenizer(f"local-dir:{tmp_path / 'adapted'}")(names))
    assert np.mean((images @ texts.T).argmax(dim=1).numpy() == data.test.labels) == summary["last_accuracy"]
    config = load_config(run / "config.yaml", [as_backbone.partition(": ")[2], "rounds=0", "name=again"])
    assert simulate(config).summary.zero_shot_accuracy == summary["last_accuracy"]


def test_a_single_file_knows_its_model_and_preprocessing(
    run: Path, raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapted.safetensors"
    assert export.main([str(run), str(file)]) == 0
    hint = shlex.split(capsys.readouterr().out.splitlines()[1].partition(": ")[2])
    last = json.loads((run / "summary.json").read_text())["last_accuracy"]
    again = load_config(run / "config.yaml", [*hint, "rounds=0", "name=again"])
    assert simulate(again).summary.zero_shot_accuracy == last
    other = {
        **raw_config,
        "backbone": {"model": raw_config["backbone"]["model"], "weights": str(file)},
        "name": "other",
    }
    with pytest.raises(UserError, match=r"adapted\.safetensors was exported from a model with mean \[0\.2, 0\.3"):
        simulate(parse_config(other))


def test_a_run_that_was_moved_with_its_backbone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "backbone").rename(tmp_path / "elsewhere")
    assert export.main([str(run), str(tmp_path / "a")]) == 2
    capsys.readouterr()
    assert export.main([str(run), f"backbone.model={tmp_path / 'elsewhere'}", str(tmp_path / "a")]) == 2
    assert export.main([str(run), str(tmp_path / "a"), f"backbone.model={tmp_path / 'elsewhere'}"]) == 0
    assert not (tmp_path / "a.part").exists()


def test_a_damaged_adapter_is_never_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, generator = run / "adapter.safetensors", np.random.default_rng(0)
    whole = path.read_bytes()
    for place in generator.integers(0, len(whole), 60).tolist() + list(range(8)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(damaged))
        assert export.main([str(run), str(tmp_path / "out")]) == 2, place
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.yaml", "alpha: 16.0", "alpha: 17.0", "`adapter` in config.yaml is not what"),
        ("config.yaml", "scaling: alpha/r", "scaling: alpha", "`adapter` in config.yaml is not what"),
        ("environment.json", '"backbone_sha256": "', '"backbone_sha256": "0', "the backbone's weights are not those"),
        ("environment.json", "{", "", "environment.json: missing or damaged"),
    ],
)
def test_what_does_not_belong_together_is_never_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, message: str
) -> None:
    text = (run / file).read_text()
    assert old in text
    (run / file).write_text(text.replace(old, new, 1))
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_other_weights_of_the_same_shapes_and_numbers_that_are_not_finite(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "backbone" / "open_clip_model.safetensors"
    whole, tensors = weights.read_bytes(), safetensors.torch.load_file(weights)
    tensors["logit_scale"] += 1
    safetensors.torch.save_file(tensors, weights)
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "the backbone's weights are not those that the run was made with" in capsys.readouterr().err
    weights.write_bytes(whole)
    path = run / "adapter.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["flora"])
        adapter = {name: torch.full_like(file.get_tensor(name), torch.nan) for name in file.keys()}  # noqa: SIM118
    description["sha256"] = state_digest(adapter)
    safetensors.torch.save_file(adapter, path, metadata={"flora": json.dumps(description)})
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flora.core.files.os.fsync", full)
    for name in ("out", "out.safetensors"):
        assert export.main([str(run), str(tmp_path / name)]) == 2
        assert not list(tmp_path.glob("out*"))
