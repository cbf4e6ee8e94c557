"""Half of the classes is trained on, the other half is new: what a run reports is each half among its own classes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Patterns, load_plain

from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.data.splits import BaseToNew, Sample, Validation
from flora.evaluation.accuracy import harmonic_mean
from flora.simulate import simulate


@pytest.mark.parametrize(("number", "base"), [(4, 2), (5, 3), (7, 4)])
def test_the_first_half_is_base(number: int, base: int) -> None:
    data = Patterns(num_classes=number).load(Rng(0))
    split = BaseToNew().split(data, Rng(1))
    assert split.class_names == data.class_names[:base] and split.new_class_names == data.class_names[base:]
    assert set(split.train.labels) == set(split.test.labels) == set(range(base))
    assert split.new is not None and set(split.new.labels) == set(range(number - base))
    assert len(split.test) + len(split.new) == len(data.test)
    assert np.array_equal(split.new.source_indices, data.test.source_indices[data.test.labels >= base])
    assert np.array_equal(split.new.labels + base, data.test.labels[data.test.labels >= base])


def test_too_few_classes_and_wrong_nesting() -> None:
    with pytest.raises(UserError, match="split: base_to_new needs at least four classes, the data have 3"):
        BaseToNew().split(Patterns().load(Rng(0)), Rng(0))
    for outer in (Sample, Validation):
        with pytest.raises(OptionError, match="of: base_to_new takes other splits inside"):
            outer(of=BaseToNew())
    sampled = BaseToNew(of=Sample(num_train=20, num_test=8)).split(Patterns(num_classes=4).load(Rng(0)), Rng(0))
    assert sampled.new is not None and (len(sampled.train), len(sampled.test), len(sampled.new)) == (10, 4, 4)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 1.0) == 0.0


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_reports_base_new_and_their_harmonic_mean(raw_config: dict[str, Any], cached: bool) -> None:
    raw = {**raw_config, "data": {"name": "patterns", "num_classes": 5}, "split": "base_to_new", "seed": 3,
           "cache": {"enabled": cached}}  # fmt: skip
    config = parse_config(raw)
    result = simulate(config)
    plain = load_plain(config.backbone.model, "fp32")
    data = dataclasses.replace(config.data).load(Rng(3).child("data"))
    pixels = torch.stack([plain.preprocess(data.test.open(index)) for index in range(len(data.test))])
    with torch.no_grad():
        images, texts, _ = plain.model(pixels, plain.tokenize([f"a photo of a {name}." for name in data.class_names]))
    for classes, found in ((range(3), result.records[0].accuracy), (range(3, 5), result.records[0].new_accuracy)):
        chosen = np.isin(data.test.labels, list(classes))
        predicted = (images[chosen] @ texts[list(classes)].T).argmax(dim=1).numpy() + classes[0]
        assert found == pytest.approx(np.mean(predicted == data.test.labels[chosen]))
    last = result.records[-1]
    assert last.accuracy is not None and last.new_accuracy is not None
    assert last.harmonic_mean == harmonic_mean(last.accuracy, last.new_accuracy)
    summary = json.loads((result.directory / "summary.json").read_text())
    assert (summary["new_accuracy"], summary["harmonic_mean"]) == (last.new_accuracy, last.harmonic_mean)
    assert summary["zero_shot_new_accuracy"] == result.records[0].new_accuracy
    log = (result.directory / "log.txt").read_text()
    assert "of 2 new classes" in log and "classes set aside" in log
    partition = json.loads((result.directory / "partition.json").read_text())
    assert partition["class_names"] == ["thing 0", "thing 1", "thing 2"]


def test_training_does_not_depend_on_what_the_new_classes_are_called(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "data": {"name": "patterns", "num_classes": 4}, "split": "base_to_new"}
    one = simulate(parse_config({**raw, "name": "one"}))
    other = simulate(parse_config({**raw, "name": "other", "prompts": {"class_names": {"thing 3": "elephant"}}}))
    assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)
    assert one.records[-1].accuracy == other.records[-1].accuracy


@pytest.mark.parametrize("adapter", ["linear_head", "vision_and_head", "taskres", "lp_plus_plus"])
def test_heads_know_no_new_classes(raw_config: dict[str, Any], adapter: str) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, "adapter": adapter, "split": "base_to_new"}))
    assert str(caught.value) == f"split: base_to_new needs an adapter without weights for each class, got {adapter}"


@pytest.mark.parametrize(
    "adapter", ["full", "clip_adapter", "prompt_context", "norm", "attention_adapter", "fedtpg", "proda", "cocoop"]
)
def test_other_adapters_do(raw_config: dict[str, Any], adapter: str) -> None:
    raw = {**raw_config, "data": {"name": "patterns", "num_classes": 4}, "split": "base_to_new", "rounds": 1}
    assert simulate(parse_config({**raw, "adapter": adapter})).summary.new_accuracy is not None
