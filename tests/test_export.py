"""An exported file is plain OpenCLIP weights that give the run's last accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from helpers import Patterns, load_plain

from flora import export
from flora.config import parse_config
from flora.rng import Rng
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
    assert "load it as backbone.weights" in capsys.readouterr().out
    plain = load_plain(config.backbone.model)
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
        ((run, str(file)), "merged.safetensors: File exists"),
        ((run, str(tmp_path / "merged.pt")), "expected a name that ends in .safetensors"),
        ((str(tmp_path), str(tmp_path / "b.safetensors")), "config.yaml: No such file"),
        ((str(foreign), str(tmp_path / "b.safetensors")), "not an adapter of this program"),
        ((str(other), str(tmp_path / "b.safetensors")), "doesn't fit the adapter that config.yaml describes"),
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
    raw = {**raw_config, "clients": {"number": 4, "holdout_fraction": 0.5}, **changes}
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
    assert server.read_bytes() != own.read_bytes()
