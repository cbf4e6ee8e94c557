"""Attacks on finished runs: an overfitted run gives itself away, one buried in noise does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE

from flora.audit.__main__ import main
from flora.audit.references import train_client_references, train_references
from flora.audit.subject import Subject, audited, confidences
from flora.audit.updates import sent_updates
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageArrays, ImageData, Split
from flora.evaluate import main as evaluate_main
from flora.evaluation.accuracy import evaluate
from flora.federated.round import run_round
from flora.report.audits import audits, canary_line
from flora.report.reading import read_files
from flora.runs.run_directory import RunDirectory
from flora.simulate import simulate

Capture = pytest.CaptureFixture[str]


@register("coin_labels")
@dataclass(frozen=True)
class CoinLabels(Dataset):
    """Images of four colours each, 16 px, with labels at random: what is known of one was learned from it alone."""

    num_train: int = option("training images", 72, at_least=1)

    def load(self, rng: Rng) -> ImageData:
        generator = rng.numpy()

        def split(size: int) -> Split:
            pixels = generator.integers(0, 256, (size, 2, 2, 3)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
            return Split(ImageArrays(pixels, "noise"), np.arange(size), generator.integers(0, 4, size))

        return ImageData(split(self.num_train), split(16), tuple(f"thing {index}" for index in range(4)))


def run_of(model: str, output: Path, **changes: Any) -> Path:
    """A finished run in which few images are seen very often."""
    raw = {
        "name": "overfitted",
        "output": str(output),
        "rounds": 6,
        "backbone": {"model": model, "weights": "random"},
        "adapter": {"name": "lora", "rank": 8, "towers": ["vision"], "targets": ["q", "v", "fc", "proj"]},
        "data": "coin_labels",
        "partition": "iid",
        "clients": {"number": 2, "holdout_fraction": 0.5},
        "local": {"learning_rate": 0.005, "batch_size": 18, "epochs": 25},
        **changes,
    }
    return simulate(parse_config(raw)).directory


QUICK: dict[str, Any] = {
    "rounds": 2,
    "local": {"learning_rate": 0.01, "batch_size": 18},
    "adapter": {"name": "lora", "rank": 2},
}


@pytest.fixture(scope="module")
def overfitted(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tiny_model, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def quick(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tiny_model, tmp_path_factory.mktemp("runs"), name="quick", **{**QUICK, "rounds": 3})


def subject_of(run: Path, overrides: Sequence[str] = ()) -> Subject:
    return audited(run, overrides, progress=lambda title, total: lambda number: None, log=lambda line: None)


def audit_of(run: Path, *arguments: str) -> dict[str, Any]:
    before = set((run / "audits").glob("*"))
    assert main([str(run), *arguments]) == 0
    (path,) = set((run / "audits").glob("*")) - before
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def areas(content: dict[str, Any], round: int) -> dict[str, float]:
    return {each["attack"]: each["auc"] for each in content["membership"]["attacks"] if each["round"] == round}


def test_an_overfitted_run_gives_its_examples_away(overfitted: Path, capsys: Capture) -> None:
    content = audit_of(overfitted, "--only", "membership", "--references", "4", "--rounds", "6")
    found = areas(content, 6)
    assert min(found.values()) > 0.7 and list(found) == ["loss", "likelihood ratio", "offline likelihood ratio"]
    (loss, *_) = content["membership"]["attacks"]
    assert loss["interval"][0] > 0.6 and loss["advantage"] > 0.2
    assert set(loss["by_client"]) == {"0", "1"} and all(each["auc"] > 0.6 for each in loss["by_client"].values())
    assert loss["num_members"] == loss["num_others"] == 36
    assert content["guarantee"] == {"client": None, "example": None}
    shown = capsys.readouterr().out
    assert "guarantee for a client: none" in shown and f"{found['loss']:.3f}" in shown


def test_a_run_buried_in_noise_does_not(overfitted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(overfitted, tmp_path / "noisy"))
    shutil.rmtree(run / "checkpoints")
    subject = subject_of(run)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor + 3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in subject.run.adapter.items()
    }
    directory = RunDirectory(run)
    directory.write_adapter(noisy, subject.run.config)
    directory.close()
    loss = audit_of(run, "--only", "membership", "--references", "0")["membership"]["attacks"][0]
    assert loss["auc"] < 0.65 and loss["interval"][0] < 0.5


def test_a_secure_sum_hides_single_updates(tiny_model: str, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("cryptography")
    run = run_of(tiny_model, tmp_path, **{**QUICK, "server": {"secure_sum": {"name": "pairwise_masks", "range": 1.0}}})
    content = audit_of(run, "--only", "membership,updates", "--references", "0")
    assert "updates" not in content and content["membership"]["attacks"]
    assert "not attacked, because with server.secure_sum nobody sees them" in capsys.readouterr().err


def test_confidences_are_those_of_the_losses(quick: Path) -> None:
    subject = subject_of(quick)
    engine = subject.experiment.federation.engine
    some = engine.features.subset(np.arange(20))
    adapter = subject.states[3].adapter
    found = confidences(engine.model, adapter, some, batch_size=7)
    stack = {name: tensor.unsqueeze(0) for name, tensor in adapter.items()}
    (evaluation,) = evaluate(engine.model, stack, some, batch_size=512)
    np.testing.assert_allclose(np.logaddexp(0, -found), evaluation.losses, atol=1e-4)


def test_references_that_share_steps_equal_those_run_one_at_a_time(tiny_model: str, tmp_path: Path) -> None:
    precise = {"backbone": {"model": tiny_model, "weights": "random", "precision": "fp64"}, **QUICK}
    subject = subject_of(run_of(tiny_model, tmp_path, **precise))
    options: dict[str, Any] = {"rounds": [1, 2], "spared": np.array([0, 1]), "rng": Rng(3)}
    engine = subject.experiment.federation.engine
    engine.clients_per_block = 16
    together = train_references(subject.experiment, 4, **options)
    engine.clients_per_block = 1
    alone = train_references(subject.experiment, 4, **options)
    for one, other in zip(together, alone, strict=True):
        for round in (1, 2):
            assert one.adapters[round].keys() == other.adapters[round].keys()
            for name, tensor in one.adapters[round].items():
                torch.testing.assert_close(tensor, other.adapters[round][name], rtol=0, atol=TOLERANCE)
    first, second = (each.adapters[2] for each in together[:2])
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_each_example_is_in_half_of_the_references_and_some_are_spared(quick: Path) -> None:
    experiment = subject_of(quick).experiment
    spared = experiment.federation.clients[0].train[:3]
    references = train_references(experiment, 4, rounds=[1], spared=spared, rng=Rng(0))
    counts = np.zeros(len(experiment.federation.engine.features), int)
    for each in references:
        counts[each.trained_on] += 1
    expected = np.zeros_like(counts)
    for client in experiment.federation.clients:
        expected[np.concatenate([client.train, client.held_out])] = 2
    expected[spared] = 4
    np.testing.assert_array_equal(counts, expected)


def test_updates_are_repeated_as_the_run_had_them(quick: Path) -> None:
    subject = subject_of(quick)
    state, after = subject.states[2], subject.states[3]
    updates = sent_updates(subject.experiment.federation, state)
    total = sum(update.num_examples for _, update in updates)
    for name, tensor in after.adapter.items():
        if name in updates[0][1].delta:
            mean = sum(update.delta[name] * (update.num_examples / total) for _, update in updates)
            torch.testing.assert_close(state.adapter[name] + mean, tensor, rtol=0, atol=1e-6)


def test_updates_show_the_classes_that_clients_hold(tiny_model: str, tmp_path: Path) -> None:
    run = run_of(
        tiny_model,
        tmp_path,
        data={"name": "patterns", "num_train": 120, "num_classes": 6},
        partition={"name": "shards", "shards_per_client": 2},
        clients={"number": 6, "holdout_fraction": 0.2},
        **QUICK,
    )
    content = audit_of(run, "--only", "updates")["updates"]["rounds"]
    assert [each["round"] for each in content] == [1, 2]
    assert all(each["auc"] > 0.8 and each["num_clients"] == 6 for each in content)


def test_clients_that_never_took_part_are_told_from_those_that_did(
    tiny_model: str, tmp_path: Path, capsys: Capture
) -> None:
    run = run_of(
        tiny_model,
        tmp_path,
        rounds=1,
        adapter="linear_head",
        data={"name": "patterns", "num_train": 120, "num_classes": 12},
        partition={"name": "shards", "shards_per_client": 1},
        clients={"number": 12, "holdout_fraction": 0.2, "cohort": {"name": "uniform", "number": 6}},
    )
    content = audit_of(run, "--only", "clients", "--references", "4")["clients"]
    assert content["num_in"] == content["num_out"] == 6
    assert content["auc"] > 0.8 and min(each["auc"] for each in content["ratios"].values()) > 0.8
    assert list(content["ratios"]) == ["likelihood ratio", "offline likelihood ratio"]
    assert "who took part, likelihood ratio" in capsys.readouterr().out
    subject = subject_of(run)
    assert len(subject.participants) == content["num_in"]
    without = audit_of(run, "--only", "clients", "--references", "0")["clients"]
    assert without == {name: value for name, value in content.items() if name != "ratios"}


def test_references_of_clients_are_the_run_with_half_of_them(tiny_model: str, tmp_path: Path) -> None:
    """As a federation that never had the others, and each has as often a turn as in the run."""
    run = run_of(
        tiny_model,
        tmp_path,
        backbone={"model": tiny_model, "weights": "random", "precision": "fp64"},
        clients={"number": 8, "holdout_fraction": 0.2, "cohort": {"name": "uniform", "number": 4}},
        privacy={"name": "central", "clip_norm": 0.1, "noise_multiplier": 0.1, "accountant": "rdp", "publish": False},
        **QUICK,
    )
    experiment, ids = subject_of(run).experiment, np.arange(1, 7)
    references = train_client_references(experiment, 4, ids, rounds=2, rng=Rng(1))
    for pair in (references[:2], references[2:]):
        halves = [set(each.took_part.tolist()) for each in pair]
        assert not halves[0] & halves[1] and halves[0] | halves[1] <= set(ids.tolist()) and all(halves)
    half = np.sort(Rng(1).child("halves", 0).numpy().permutation(ids)[::2])
    federation = experiment.federation
    assert federation.privacy is not None
    alone = dataclasses.replace(
        federation,
        clients=[federation.clients[index] for index in half],
        participation=Participation(Uniform(number=2), federation.participation.sizes[half]),
        rng=Rng(1).child("reference", 0),
    )
    state, cohorts = alone.initial_state(experiment.initial_adapter), set()
    for round in (1, 2):
        cohorts |= set(Uniform(number=2).sample(half, 2, alone.rng.child("round", round, "cohort")).tolist())
        state, _ = run_round(alone, state)
    for name, tensor in state.adapter.items():
        torch.testing.assert_close(tensor, references[0].adapter[name], rtol=0, atol=TOLERANCE)
    assert references[0].took_part.tolist() == sorted(half[list(cohorts)].tolist())


@pytest.mark.parametrize(("name", "least"), [("directions", 1.0), ("examples", 0.4)])
def test_canaries_bound_epsilon_of_a_run_without_noise(
    tiny_model: str, tmp_path: Path, name: str, least: float, capsys: Capture
) -> None:
    changes: dict[str, Any] = {"canaries": {"name": name, "number": 30}}
    if name == "examples":
        changes |= {"clients": {"number": 1, "holdout_fraction": 0}, "data": {"name": "coin_labels", "num_train": 36}}
        changes |= {"local": {"learning_rate": 0.005, "batch_size": 18, "epochs": 60}, "rounds": 1}
    else:
        changes |= {"clients": {"number": 36, "holdout_fraction": 0}, **QUICK}
    found = audit_of(run_of(tiny_model, tmp_path, **changes), "--only", "canaries")["canaries"]
    assert found["epsilon_lower_bound"] > least and found["auc"] > 0.8
    assert found["unit"] == ("client" if name == "directions" else "example")
    assert f"at least {found['epsilon_lower_bound']:.3g} (delta 1e-05, 95 % sure)" in capsys.readouterr().out


PRIVATE: dict[str, Any] = {
    "clients": {"number": 40, "holdout_fraction": 0.5, "cohort": {"name": "poisson", "fraction": 0.5}},
    "data": {"name": "coin_labels", "num_train": 160},
    "privacy": {"name": "central", "clip_norm": 0.1, "noise_multiplier": 0.8, "publish": False},
    "canaries": {"name": "directions", "number": 30, "norm": 0.1},
    **QUICK,
}


def test_a_private_run_gives_less_away_than_its_guarantee_allows(
    tiny_model: str, tmp_path: Path, capsys: Capture
) -> None:
    private = run_of(tiny_model, tmp_path, **PRIVATE)
    content = audit_of(private, "--references", "2", "--rounds", "2")
    records = [json.loads(line) for line in (private / "rounds.jsonl").read_text().splitlines()]
    assert content["guarantee"] == {"client": records[-1]["epsilon"], "example": None}
    found = content["canaries"]
    assert found["epsilon_lower_bound"] <= records[-1]["epsilon"] and found["delta"] == 1e-5
    assert found["auc"] < 0.9 and "MORE than" not in capsys.readouterr().out
    assert all(each["interval"][0] < 0.55 for each in content["membership"]["attacks"])
    # The same without noise says what the noise hides.
    open_run = run_of(tiny_model, tmp_path, name="open", **{**PRIVATE, "privacy": None})
    assert audit_of(open_run, "--only", "canaries")["canaries"]["auc"] > 0.9 > found["auc"]


def test_a_bound_above_the_guarantee_is_pointed_out() -> None:
    canaries = {"num_right": 9, "num_guesses": 9, "epsilon_lower_bound": 2.0, "unit": "client"}
    said = {**canaries, "delta": 1e-5, "confidence": 0.95}
    assert "MORE than the 1.5 that the run states" in canary_line(said, {"client": 1.5, "example": None})
    assert "MORE" not in canary_line(said, {"client": 2.5, "example": None})


def test_the_page_of_a_run_shows_its_audits(quick: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick, tmp_path / "shown", ignore=shutil.ignore_patterns("audits")))
    assert not audits(read_files(run))
    assert main([str(run), "--only", "updates", "--name", "mine"]) == 0
    (run / "audits" / "damaged.json").write_text('{"guarantee": 3}')
    shown = audits(read_files(run))
    assert "<h3>mine</h3>" in shown and "classes that a client holds" in shown
    assert "guarantee for a client: none" in shown and "damaged" not in shown


def test_who_took_part_is_known_where_records_of_rounds_are_lost(tiny_model: str, tmp_path: Path) -> None:
    cohort = {"name": "uniform", "number": 2}
    clients = {"number": 8, "holdout_fraction": 0.2, "cohort": cohort}
    run = run_of(tiny_model, tmp_path, clients=clients, **{**QUICK, "rounds": 3})
    whole = subject_of(run).participants
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join([lines[0], lines[-1]]))
    assert subject_of(run).participants.tolist() == whole.tolist() and len(whole) > 2


def test_a_record_that_cannot_be_written_is_shown(quick: Path, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(quick, tmp_path / "run", ignore=shutil.ignore_patterns("audits", "evaluations")))
    for program, arguments, name, shown in (
        (main, ["--only", "updates"], "audits", "guarantee for a client: none"),
        (evaluate_main, [], "evaluations", "zero-shot "),
    ):
        (run / name).write_text("in the way")
        capsys.readouterr()
        assert program([str(run), *arguments]) == 2
        captured = capsys.readouterr()
        assert shown in captured.out and "can't be written" in captured.err.splitlines()[-1]


def test_records_are_never_written_over(quick: Path, capsys: Capture) -> None:
    arguments = [str(quick), "--only", "clients,canaries"]
    assert main(arguments) == main(arguments) == main([*arguments, "--name", "mine"]) == 0
    assert {"audit.json", "audit-2.json", "mine.json"} <= {path.name for path in (quick / "audits").iterdir()}
    capsys.readouterr()
    assert main([*arguments, "--name", "mine"]) == 2
    assert "exists already" in capsys.readouterr().err
    content = json.loads((quick / "audits" / "audit.json").read_text())
    assert content["canaries"] is None and content["clients"]["auc"] is None


def test_what_cannot_be_audited_is_refused_in_a_line(
    tiny_model: str, quick: Path, tmp_path: Path, capsys: Capture
) -> None:
    none_held_out = run_of(tiny_model, tmp_path, clients={"number": 2, "holdout_fraction": 0}, **QUICK)
    no_rounds = run_of(tiny_model, tmp_path, name="none", **{**QUICK, "rounds": 0})
    others = Path(shutil.copytree(quick, tmp_path / "others"))
    config = (others / "config.yaml").read_text()
    (others / "config.yaml").write_text(config.replace("num_train: 72", "num_train: 71"))
    stopped = Path(shutil.copytree(quick, tmp_path / "stopped"))
    (stopped / "adapter.safetensors").unlink()
    unrecorded = Path(shutil.copytree(quick, tmp_path / "unrecorded"))
    (unrecorded / "rounds.jsonl").unlink()
    emptied = Path(shutil.copytree(quick, tmp_path / "emptied"))
    (emptied / "rounds.jsonl").write_text("")
    unsummed = Path(shutil.copytree(quick, tmp_path / "unsummed"))
    (unsummed / "summary.json").write_text("{}")
    cases: list[tuple[list[str], str]] = [
        ([str(none_held_out)], "no client has held-out images (clients.holdout_fraction)"),
        ([str(no_rounds)], "this run has no rounds"),
        ([str(others)], "not what the run was made with (SHA-256): data"),
        ([str(stopped)], "this run is not finished"),
        ([str(unrecorded)], "rounds.jsonl: missing or damaged"),
        ([str(emptied)], "rounds.jsonl: missing or damaged"),
        ([str(unsummed)], "summary.json: missing or damaged"),
        ([str(tmp_path / "nowhere")], "there is no such run directory"),
        ([str(quick), "--rounds", "1"], "of round 1 there is no adapter any more, only of 2, 3; checkpoints.keep=3"),
        ([str(quick), "local.epochs=3"], "local.epochs: a finished run stays what it is"),
        ([str(quick), "--name", "../x"], "expected a plain file name"),
        ([str(quick), "--references", "3"], "expected an even number"),
        ([str(quick), "--only", "loss"], "expected some of membership, clients, updates, canaries"),
        ([str(quick), "--only", "canaries"], "--only canaries: this run has none"),
        ([str(quick), "--delta", "1"], "expected a number at least 0 and below 1"),
    ]
    for arguments, message in cases:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        shown = capsys.readouterr().err
        assert message in shown and "Traceback" not in shown
        assert sorted(tmp_path.rglob("*")) == before
