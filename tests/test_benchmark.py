"""The benchmark's variants compute the same step, and its command line says what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flora import benchmark, benchmark_variants
from flora.benchmark_variants import VARIANTS, Setting


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
        for _ in range(2):
            step.run()
        step.evaluate()
        assert step.num_clients == (3 if name == "ours" else 1)
        if name != "full":
            sent.add(step.sent_bytes)
    assert len(sent) == 1


def test_the_rivals_learn_the_same_adapter(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naive LoRA and the loop by hand move an adapter to the same place: they differ in cost alone."""
    seen: dict[str, list[torch.Tensor]] = {}
    make = benchmark_variants.fresh_adapter

    def remember(attached: object, number: int | None) -> dict[str, torch.Tensor]:
        state = make(attached, number)
        if number == 1:
            seen.setdefault(current, list(state.values()))
        return state

    monkeypatch.setattr(benchmark_variants, "fresh_adapter", remember)
    for current in ("naive", "by hand"):
        step = VARIANTS[current].build(setting(tiny_model))
        for _ in range(3):
            step.run()
    assert max(tensor.abs().max() for tensor in seen["naive"][1::2]) > 0
    for naive, by_hand in zip(seen["naive"], seen["by hand"], strict=True):
        torch.testing.assert_close(naive, by_hand, atol=1e-5, rtol=0)


def test_unavoidable_operations_by_hand(tiny_model: str) -> None:
    step = VARIANTS["ours"].build(setting(tiny_model))
    tokens = step.num_tokens / 3
    # Two blocks, forward and backward, 12 width^2 multiplications and as many additions for each token; no gradient for
    # the input of the first q, k and v.
    expected = 2 * (4 * 12 - 3) * 32**2 * tokens
    assert benchmark_variants.unavoidable_flops(setting(tiny_model), step) == expected
    assert benchmark_variants.unavoidable_flops(setting(tiny_model, tower="vision"), step) is None


def test_the_table_and_the_json(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_whole_experiment_from_the_command_line(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--whole", "--model", tiny_model, "--clients", "2", "--batch", "3", "--repeats", "1"]
    assert benchmark.main(arguments) == 0
    assert "x faster" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "fastest"], "--variants: 'fastest' is not one of full, naive"),
        (["--classes", "101"], "--classes: expected 1 to 100, got 101"),
        (["--model", "RN50", "--repeats", "1", "--variants", "ours"], "ours: "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
