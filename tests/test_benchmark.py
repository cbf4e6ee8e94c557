"""The benchmark's variants compute the same step, and its command line says what is wrong in one line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TOLERANCE
from PIL import Image

from flora.benchmark import __main__ as benchmark
from flora.benchmark.experiment import naive_experiment, our_experiment
from flora.benchmark.images import stem_flops
from flora.benchmark.variants import VARIANTS, Setting
from flora.core.errors import UserError
from flora.core.rng import Rng


def setting(model: str, **changes: object) -> Setting:
    values = {
        "model": model, "num_classes": 4, "batch_size": 6, "num_clients": 3, "rank": 2, "tower": "text",
        "num_layers": 0, "targets": "q,v", "objective": "cross_entropy", "device": "cpu",
    }  # fmt: skip
    return Setting(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["cross_entropy", "contrastive"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_every_variant_takes_steps_and_evaluates(tiny_model: str, tower: str, objective: str) -> None:
    sent = set()
    for name, variant in VARIANTS.items():
        step = variant.build(setting(tiny_model, tower=tower, num_layers=1, objective=objective))
        step.run(1)
        step.run(2)
        step.evaluate()
        assert step.num_clients == (3 if name in ("ours", "first", "recorded", "private") else 1)
        if name != "full":
            sent.add(step.sent_bytes)
    assert len(sent) == 1


@pytest.mark.parametrize("objective", ["cross_entropy", "contrastive"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_the_rivals_learn_the_same_adapter(tiny_model: str, tower: str, objective: str) -> None:
    """Naive LoRA and the loop by hand move an adapter to the same place: they differ in cost alone."""
    naive, by_hand = (
        VARIANTS[name]
        .build(setting(tiny_model, tower=tower, num_layers=1, objective=objective, precision="fp64"))
        .run(3)
        for name in ("naive", "by hand")
    )
    assert max(tensor.abs().max() for name, tensor in naive.items() if name.endswith("lora_B")) > 0  # type: ignore[attr-defined]
    for name, tensor in naive.items():  # type: ignore[attr-defined]
        torch.testing.assert_close(by_hand[name], tensor, atol=TOLERANCE, rtol=0)  # type: ignore[index]


def test_unavoidable_operations_by_hand(tiny_model: str) -> None:
    # Airplane, automobile, bird and cat are a token each: five tokens in common, then three of each class.
    tokens, reads = 5 + 4 * 3, 4
    # The first of two blocks, forward and backward, without the gradient for the input of q, k and v; then the last:
    # keys and values of all, and the rest of the four that are read.
    expected = 2 * 32**2 * ((24 - 3) * tokens + 2 * (2 * tokens + 10 * reads))
    assert VARIANTS["ours"].build(setting(tiny_model)).flops == expected
    for changes in ({"tower": "vision"}, {"num_layers": 1}, {"objective": "contrastive"}):
        assert VARIANTS["ours"].build(setting(tiny_model, **changes)).flops is None


def test_the_table_and_the_json(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, alone = benchmark._in_fresh_process, "ours"  # one process is enough to see that they come back
    monkeypatch.setattr(
        benchmark, "_in_fresh_process", lambda order: (fresh if order["variant"] == alone else benchmark._work)(order)
    )
    arguments = ["--model", tiny_model, "--classes", "3", "--clients", "2", "--batch", "4", "--repeats", "1"]
    arguments += ["--seconds", "0.01", "--variants", "by hand,ours", "--json", str(tmp_path / "b.json")]
    assert benchmark.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| variant | ms per step and client | spread | x by hand |")
    assert lines[2].startswith("| the strongest loop by hand |")
    assert lines[3].startswith("| + many clients in a step |")
    assert "GFLOP/s" in lines[-1]
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["results"]["ours"][0]["step_seconds"] > 0


def test_a_variant_that_fails_leaves_the_others_their_rows(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(order: dict[str, Any]) -> Any:
        if order["variant"] == "ours":
            raise UserError("ours: out of memory")
        return benchmark._work(order)

    monkeypatch.setattr(benchmark, "_in_fresh_process", work)
    arguments = ["--model", tiny_model, "--classes", "3", "--clients", "2", "--batch", "4", "--repeats", "2"]
    assert benchmark.main([*arguments, "--seconds", "0.01", "--variants", "ours,by hand"]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2].startswith("| the strongest loop by hand |")
    assert printed.err.strip().endswith("ours: out of memory")


def test_private_gradients_are_measured_only_where_they_are_named(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(setting: Setting, variants: list[str], **options: Any) -> benchmark.Measurements:
        asked.append(variants)
        return benchmark.Measurements({}, [])

    monkeypatch.setattr(benchmark, "run_variants", run)
    assert benchmark.main(["--model", tiny_model]) == 0
    assert benchmark.main(["--model", tiny_model, "--variants", "private"]) == 0
    assert "ours" in asked[0] and "private" not in asked[0]
    assert asked[1] == ["private"]


@pytest.mark.parametrize("objective", ["cross_entropy", "contrastive"])
def test_the_naive_experiment_and_ours_come_to_the_same_adapter(tiny_model: str, objective: str) -> None:
    own = setting(tiny_model, objective=objective, precision="fp64")
    naive, ours = (build(own)() for build in (naive_experiment, our_experiment))
    start = own.lora().attach(own.load()).initial_state(Rng(0))
    assert max((naive[name] - start[name]).abs().max().item() for name in naive) > 1e-4
    for name, tensor in naive.items():
        torch.testing.assert_close(ours[name], tensor, atol=TOLERANCE, rtol=0)


def test_the_whole_experiment_from_the_command_line(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "_in_fresh_process", benchmark._work)
    arguments = ["--whole", "--model", tiny_model, "--clients", "2", "--batch", "3", "--repeats", "1"]
    assert benchmark.main(arguments) == 0
    line = capsys.readouterr().out.strip()
    pattern = r"8 client steps of 3 images in 2 rounds, .*: naive ([\d.]+) s, ours ([\d.]+) s, [\d.]+ x (faster|slower)"
    found = re.fullmatch(pattern, line)
    assert found, line
    if found[1] != found[2]:
        assert (float(found[1]) > float(found[2])) == (found[3] == "faster")


def test_where_a_rounds_time_goes(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw_config))
    assert benchmark.main(["--profile", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = [float(share) for share in re.findall(r"([0-9.]+)%", lines[0])]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert all(0 < share < 100 for share in shares)
    listed = [float(line.split("%")[0]) for line in lines[1:]]
    assert listed == sorted(listed, reverse=True)
    assert sum(listed) <= shares[1] + 0.1
    assert any("engine/training.py: train_block" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "recorded"], "--variants: 'recorded' is not one of full, naive"),
        (["--variants", "fastest"], "--variants: 'fastest' is not one of full, naive"),
        (["--classes", "101"], "--classes: expected 1 to 100, got 101"),
        (["--profile", "nothing.yaml"], "nothing.yaml: No such file or directory"),
        (["--model", "RN50", "--repeats", "1", "--variants", "ours"], "ours: "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_a_table_of_merged_patches(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--model", tiny_model, "--classes", "3", "--seconds", "0.01", "--tokens", "0,1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| merged in a block | patches in the last | images per second, frozen | x 0 |")
    assert "ms per LoRA step of 8 images" in lines[0]
    assert [line.split("|")[1:3] for line in lines[2:]] == [[" 0 ", " 4 "], [" 1 ", " 3 "], [" 2 ", " 2 "]]
    assert benchmark.main(["--model", tiny_model, "--tokens", "0,-1"]) == 2
    assert "--tokens: expected whole numbers from 0 on" in capsys.readouterr().err


def test_a_table_of_the_first_pass(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", tiny_model, "--batch", "2", "--seconds", "0.01", "--images"]
    assert benchmark.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | precision | encode_image, images per second | our stem | x | with decoding |")
    assert [line.split("|")[1:3] for line in lines[2:]] == [[f" {tiny_model} ", f" {p} "] for p in ("fp32", "bf16")]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line.split("|")[3:7])
    Image.new("RGB", (40, 30)).save(tmp_path / "x.jpg")
    assert benchmark.main([*arguments, str(tmp_path), "--precision", "fp64"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split("|")[2] == " fp64 "
    (tmp_path / "x.jpg").write_bytes(b"no image")
    assert benchmark.main([*arguments, str(tmp_path)]) == 2
    assert "x.jpg: can't be read as an image" in capsys.readouterr().err
    (tmp_path / "x.jpg").unlink()
    assert benchmark.main([*arguments, str(tmp_path)]) == 2
    assert "expected a folder with JPEG files below it" in capsys.readouterr().err


def test_operations_of_the_stem_by_hand(tiny_model: str) -> None:
    # Two blocks of width 32 on a class token and four patches of 3 x 8 x 8 numbers, then 16 features. The last block
    # computes keys and values of five tokens, and the rest of one.
    first = 5 * (4 * 32**2 + 2 * 32 * 128) + 2 * 5 * 5 * 32
    last = 5 * 2 * 32**2 + (2 * 32**2 + 2 * 32 * 128) + 2 * 5 * 32
    assert stem_flops(setting(tiny_model).load()) == 2 * (4 * 32 * 3 * 8 * 8 + first + last + 32 * 16)


def test_the_rounds_of_one_process_are_measured_as_those_of_several(
    raw_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in raw_config.items() if key != "rounds"}))
    order = {"processes": str(path), "overrides": ["threads=1", "clients.per_block=2"]}
    assert benchmark.main(["--worker", json.dumps(order)]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["round"] > measured["train"] > measured["busy"] > 0
    assert measured["rest"] > 0 and measured["evaluation"] > 0
    assert measured["bytes"] == 0 and measured["clients_per_block"] == 2


def test_planning_is_compared(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "NUM_CLIENTS", (10, 2000))
    given = {"model": tiny_model, "num_classes": 3, "batch_size": 4, "num_clients": 2, "rank": 2, "tower": "text"}
    setting = Setting(**given, num_layers=0, targets="q,v", objective="cross_entropy", device="cpu")
    monkeypatch.setattr(benchmark, "_in_fresh_process", benchmark._work)
    lines = benchmark.compare_planning(setting)
    assert lines[0].startswith("10 clients, 10 in a round") and lines[1].startswith("2,000 clients, 1,000 in a round")


def test_a_sweep_timed_both_ways(
    tmp_path: Path, raw_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    assert benchmark.main(["--sweep", str(path), "local.learning_rate=0.01,0.02", "rounds=1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["one after another", "together"]
    assert lines[-1] == "2 runs, each of 1 rounds"
    assert "2 runs train together: " in captured.err
    assert not list(tmp_path.rglob("summary.json"))
    assert benchmark.main(["--sweep", str(path), "local.learning_rate=1e30", "rounds=1"]) == 2
    assert "learning_rate" in capsys.readouterr().err.splitlines()[-1]


def test_secure_sums_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--secure-sums", "3,50"]) == 0
    head, _, *rows, _, below = capsys.readouterr().out.splitlines()
    assert head.startswith("| clients | neighbours | pairs of keys | CPU seconds")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [["3", "all", "6"], ["50", "all", "2,447"], ["50", "40", "1,998"]]
    assert below == "16,384 numbers in 32 bits; uploads without a secure sum: 65.5 KB"
    assert benchmark.main(["--secure-sums", "3,x"]) == 2
    assert "--secure-sums: expected whole numbers of clients from 2, got 'x'" in capsys.readouterr().err


def test_a_process_that_was_killed_is_said_to_have_wanted_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="lora, written: its process was killed, most likely for want of memory"):
        benchmark._in_fresh_process({"variant": "lora, written"})


def test_methods_are_timed_as_their_authors_write_them_and_as_here(
    tmp_path: Path, raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name in ("lora", "linear_head"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**raw_config, "adapter": name, "local": {"batch_size": 4}}))
        paths.append(str(path))
    orders = []

    def work(order: dict[str, Any]) -> dict[str, Any]:
        orders.append(order)
        measured = benchmark._work(order)
        assert measured is not None and measured["step_seconds"] > 0
        return {**measured, "step_seconds": 6.0 if "written" in order["variant"] else 0.5}

    monkeypatch.setattr(benchmark, "_in_fresh_process", work)
    assert benchmark.main(["--repeats", "1", "--methods", *paths, "threads=1"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], *row[3:]) for row in rows] == [(name, "6,000", "500.0", "12") for name in ("lora", "linear_head")]
    assert len(orders) == 4
    assert benchmark.main(["--methods", "threads=1"]) == 2
    assert "--methods: expected the YAML files" in capsys.readouterr().err
