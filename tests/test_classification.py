"""Figures of merit are those of scikit-learn, and the tables of the last round say the same as its record."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from flora.config.parse import parse_config
from flora.evaluation.classification import NUM_BINS, confusion, macro_auroc, macro_f1, reliability, top_accuracy
from flora.evaluation.summary import lines
from flora.simulate import RunResult, resume, simulate


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels `(N,)`, probabilities `(N, C)` and predictions `(N,)`; some probabilities are equal."""
    number, classes = draw(st.integers(1, 40)), draw(st.integers(2, 9))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = generator.integers(1, draw(st.sampled_from([4, 1000])), (number, classes)).astype(np.float64)
    labels = generator.integers(0, draw(st.integers(1, classes)), number)
    return labels, scores / scores.sum(axis=1, keepdims=True), scores.argmax(axis=1)


@given(answers())
@settings(max_examples=60, deadline=None)
def test_what_scikit_learn_says(answers: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, probabilities, predicted = answers
    num_classes = probabilities.shape[1]
    every = np.arange(num_classes)
    assert np.array_equal(
        confusion(labels, predicted, num_classes), metrics.confusion_matrix(labels, predicted, labels=every)
    )
    f1 = metrics.f1_score(labels, predicted, average="macro")
    assert macro_f1(labels, predicted, num_classes) == pytest.approx(f1, abs=1e-12)
    known = np.unique(labels)
    areas = [metrics.roc_auc_score(labels == label, probabilities[:, label]) for label in known if len(known) > 1]
    found = macro_auroc(labels, probabilities)
    assert found is None if not areas else found == pytest.approx(np.mean(areas), abs=1e-12)


@given(st.integers(6, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_top_five_is_that_of_scikit_learn(num_classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, labels = generator.normal(size=(25, num_classes)), generator.integers(0, num_classes, 25)
    ranks = (scores > scores[np.arange(25), labels][:, None]).sum(axis=1)
    theirs = metrics.top_k_accuracy_score(labels, scores, k=5, labels=np.arange(num_classes))
    assert top_accuracy(ranks, 5, num_classes) == pytest.approx(theirs, abs=1e-12)
    assert top_accuracy(ranks, num_classes, num_classes) is None


@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_is_that_of_its_definition(pairs: list[tuple[float, bool]]) -> None:
    found = reliability(np.array([each for each, _ in pairs]), np.array([right for _, right in pairs]))
    error = 0.0
    for place in range(NUM_BINS):
        own = [pair for pair in pairs if np.ceil(pair[0] * NUM_BINS) == place + 1]
        assert found.counts[place] == len(own)
        if own:
            error += abs(sum(right for _, right in own) - sum(each for each, _ in own)) / len(pairs)
    assert found.error == pytest.approx(error, abs=1e-12)


def test_nothing_is_known_of_nothing() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert macro_f1(none, none, 3) is None and macro_auroc(none, np.zeros((0, 3))) is None
    assert top_accuracy(none, 1, 3) is None and reliability(np.zeros(0), np.zeros(0)).error is None


@pytest.fixture
def raw(raw_config: dict[str, Any]) -> dict[str, Any]:
    """Seven classes, base and new ones, domains, and all that can be asked for."""
    return {
        **raw_config,
        "data": {"name": "patterns", "num_classes": 7, "num_train": 84, "num_test": 49},
        "partition": "iid",
        "evaluation": {"auroc": True, "predictions": 2},
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_tables_fit(result: RunResult) -> None:
    record = result.records[-1]
    confused = rows_of(result.directory / "confusion.csv")
    names = [row.pop("label") for row in confused]
    counts = np.array([[int(row[name]) for name in names] for row in confused])
    assert counts.trace() / counts.sum() == pytest.approx(record.accuracy)
    assert dict(zip(names, counts.diagonal() / counts.sum(axis=1), strict=True)) == record.class_accuracy
    bins = rows_of(result.directory / "reliability.csv")
    gaps = [
        int(row["num_images"]) * abs(float(row["confidence"]) - float(row["accuracy"]))
        for row in bins
        if row["confidence"]
    ]
    assert sum(gaps) / counts.sum() == pytest.approx(record.calibration_error, abs=1e-5)
    assert sum(int(row["num_images"]) for row in bins) == counts.sum()


def test_a_runs_tables(raw: dict[str, Any]) -> None:
    result = simulate(parse_config(raw))
    assert_tables_fit(result)
    record, summary = result.records[-1], json.loads((result.directory / "summary.json").read_text())
    for name in ("macro_f1", "top5_accuracy", "auroc", "calibration_error"):
        assert 0 <= record.metrics[name] <= 1 and summary[name] == record.metrics[name]
    predictions = rows_of(result.directory / "predictions.csv")
    examples = [row for row in rows_of(result.directory / "examples.csv") if row["split"] in ("held_out", "test")]
    assert [(row["image"], row["split"], row["client"], row["label"]) for row in predictions] == [
        (row["image"], row["split"], row["client"], row["class"]) for row in examples
    ]
    assert Counter(row["split"] for row in predictions)["test"] == 49
    assert all(1 >= float(row["probability"]) >= float(row["probability_2"]) >= 0 for row in predictions)

    def accuracy(split: str, client: str) -> float:
        own = [row for row in predictions if (row["split"], row["client"]) == (split, client)]
        return sum(row["label"] == row["predicted"] for row in own) / len(own)

    assert accuracy("test", "") == pytest.approx(record.accuracy)
    for row in rows_of(result.directory / "clients.csv"):
        assert accuracy("held_out", row["client"]) == pytest.approx(float(row["accuracy"]), abs=1e-6)
    confidences = [float(row["probability"]) for row in predictions if row["split"] == "test"]
    right = [row["predicted"] == row["label"] for row in predictions if row["split"] == "test"]
    again = reliability(np.array(confidences), np.array(right)).error
    assert again == pytest.approx(record.calibration_error, abs=1e-5)
    assert any(line.startswith("  AUROC ") for line in lines(result.summary, parse_config(raw)))


def test_what_is_not_asked_for_is_not_there(raw: dict[str, Any]) -> None:
    result = simulate(parse_config({**raw, "evaluation": {}}))
    assert result.records[-1].auroc is None and not (result.directory / "predictions.csv").exists()
    few = {**raw, "data": {"name": "patterns", "num_classes": 3}, "name": "few"}
    assert simulate(parse_config(few)).records[-1].top5_accuracy is None


def test_classes_set_aside_and_more_probable_classes_than_there_are(raw: dict[str, Any]) -> None:
    raw = {**raw, "split": "base_to_new", "evaluation": {"predictions": 5, "every": 2}}
    result = simulate(parse_config(raw))
    new = [row for row in rows_of(result.directory / "predictions.csv") if row["split"] == "new"]
    assert np.mean([row["predicted"] == row["label"] for row in new]) == pytest.approx(result.summary.new_accuracy)
    assert {row["class_5"] for row in new} == {""} and "" not in {row["class_3"] for row in new}


def test_a_run_that_was_stopped_behind_its_last_round_has_the_same_tables(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = simulate(parse_config({**raw, "name": "whole"}))

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flora.runs.loop.last_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            simulate(parse_config({**raw, "name": "stopped"}))
    stopped = Path(raw["output"]) / "stopped"
    assert not (stopped / "confusion.csv").exists()
    resume(stopped)
    for name in ("confusion.csv", "reliability.csv", "predictions.csv", "clients.csv"):
        assert (stopped / name).read_bytes() == (whole.directory / name).read_bytes()


def test_domains(raw_config: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for client, kind, number in [(c, k, n) for c in ("a", "b") for k in ("x", "y") for n in range(6)]:
        path = tmp_path / "images" / client / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    data = {"name": "image_folder", "root": str(tmp_path / "images"), "groups": "folder", "test_fraction": 0.5}
    result = simulate(
        parse_config({**raw_config, "data": data, "partition": "natural", "clients": {"number": None}, "rounds": 1})
    )
    rows = rows_of(result.directory / "domains.csv")
    assert {row["domain"]: float(row["accuracy"]) for row in rows} == pytest.approx(
        result.records[-1].domain_accuracy, abs=1e-6
    )
    assert sum(int(row["num_images"]) for row in rows) == 12
