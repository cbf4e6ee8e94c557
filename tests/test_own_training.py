"""What the server trains by itself: distillation and descriptions against plain loops, warm-up, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, PIXELS, adapt, assert_states_close, federation, random_adapters, start

from flora.client.local_training import LocalTraining
from flora.client.objectives import CrossEntropy, MatchTeacher
from flora.client.optimizers import Sgd
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.lora import Lora
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.engine.engine import Engine
from flora.features.features import StoredFeatures
from flora.federated.own_training import OwnExamples, OwnTraining
from flora.federated.round import run_round
from flora.runs.loop import resume
from flora.simulate import simulate

PLAIN = LocalTraining(learning_rate=0.05, batch_size=100, steps=2, optimizer=Sgd())


def examples(model: AdaptedClip, number: int = 9, **local: Any) -> OwnExamples:
    features = StoredFeatures(
        model.vision.stem(PIXELS[:number]), torch.arange(number), LABELS[:number], np.arange(number)
    )
    return OwnExamples(Engine(model, features, 2), dataclasses.replace(PLAIN, **local))


def logits(model: AdaptedClip, adapter: dict[str, torch.Tensor], stem: torch.Tensor) -> torch.Tensor:
    with model.adapter.bind({name: each.unsqueeze(0) for name, each in adapter.items()}):
        return model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T


@pytest.mark.parametrize("adapter", [Lora(rank=2), Lora(rank=2, towers=("text", "vision"))])
def test_distillation_equals_a_plain_loop(tiny_model: str, adapter: Adapter) -> None:
    model = adapt(tiny_model, adapter)
    teachers = tree.unstack(random_adapters(model, 3))
    own = examples(model, objective=MatchTeacher(2.0)).with_teacher(teachers)
    begin = tree.unstack(random_adapters(model, 1, seed=5))[0]
    found, loss = own.train(begin, tuple(begin), Rng(0), setting="server.distillation")
    stem = own.engine.features.take(torch.arange(9), torch.device("cpu"))
    with torch.no_grad():
        mean = torch.stack([logits(model, each, stem) for each in teachers]).mean(dim=0)
    vector, losses = tree.flatten(begin), []
    for _ in range(2):
        leaf = vector.clone().requires_grad_()
        student = (logits(model, tree.unflatten(leaf, begin), stem) / 2).log_softmax(dim=-1)
        step_loss = 4 * F.kl_div(student, (mean / 2).softmax(dim=-1), reduction="batchmean")
        (gradient,) = torch.autograd.grad(step_loss, leaf)
        losses.append(float(step_loss.detach()))
        vector = vector - 0.05 * gradient
    assert_states_close(found, tree.unflatten(vector, begin))
    assert loss == pytest.approx(np.mean(losses), abs=1e-9)


def test_a_cohort_of_one_teaches_the_mean_nothing_new(tiny_model: str) -> None:
    """The mean is its teacher then: the loss is 0, and so is the gradient."""
    model = adapt(tiny_model, Lora(rank=2))
    local = LocalTraining(learning_rate=0.05, batch_size=4, optimizer=Sgd())
    parts = federation(model, local, cohort=1)
    without, _ = run_round(parts, start(model))
    own = OwnTraining(public=examples(model, objective=MatchTeacher(1.0)))
    with_it, result = run_round(dataclasses.replace(parts, own_training=own), start(model))
    assert result.distillation_loss == pytest.approx(0.0, abs=1e-9)
    assert_states_close(without.adapter, with_it.adapter)


def test_a_round_distils_from_the_adapters_that_clients_ended_with(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    local = LocalTraining(learning_rate=0.05, batch_size=4, optimizer=Sgd())
    own = OwnTraining(public=examples(model, objective=MatchTeacher(1.0)))
    after = []
    for per_block in (1, 3):
        parts = federation(model, local, per_block=per_block, own_training=own)
        after.append(run_round(parts, start(model)))
    assert_states_close(after[0][0].adapter, after[1][0].adapter)
    assert after[0][1].distillation_loss > 0
    plain, _ = run_round(federation(model, local), start(model))
    assert (tree.flatten(plain.adapter) - tree.flatten(after[0][0].adapter)).abs().max() > 1e-6


def test_labels_of_public_images_are_not_looked_at(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    teachers, ends = tree.unstack(random_adapters(model, 2)), []
    for labels in (LABELS[:9], torch.zeros(9, dtype=torch.int64)):
        own = examples(model, objective=MatchTeacher(1.0))
        features = dataclasses.replace(own.engine.features, labels=labels)  # type: ignore[type-var]
        own = dataclasses.replace(own, engine=dataclasses.replace(own.engine, features=features))
        begin = tree.unstack(random_adapters(model, 1, seed=5))[0]
        ends.append(own.with_teacher(teachers).train(begin, tuple(begin), Rng(0), setting="")[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_texts_are_trained_every_so_many_rounds(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    texts = dataclasses.replace(examples(model, objective=CrossEntropy()), every=2)
    parts = federation(model, LocalTraining(batch_size=8), own_training=OwnTraining(texts=texts))
    state, losses = start(model), []
    for _ in range(4):
        state, result = run_round(parts, state)
        losses.append(result.text_loss)
    assert [each is None for each in losses] == [True, False, True, False]


def describe(path: Path, number: int = 3) -> str:
    path.write_text(json.dumps({f"thing {i}": [f"number {i} of all", "the {} kind"] for i in range(number)}))
    return str(path)


def test_text_rounds_learn_classes_that_nobody_holds(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Of six classes three are set aside; the server's loss falls, and what is learned is learned of all six."""
    texts = {"descriptions": describe(tmp_path / "d.json", 6), "steps": 30, "learning_rate": 0.01}
    config = {
        **raw_config,
        "data": {"name": "patterns", "num_classes": 6, "num_train": 120},
        "split": "base_to_new",
        "rounds": 3,
        "server": {"text_rounds": texts},
    }
    result = simulate(parse_config(config))
    losses = [each.text_loss for each in result.records[1:]]
    assert losses[2] < losses[0]
    assert "server_data_sha256" in (result.directory / "environment.json").read_text()


@pytest.mark.parametrize("section", ["synthetic", "distillation"])
def test_a_run_with_images_of_the_servers_own_goes_on_where_it_stopped(
    raw_config: dict[str, Any], section: str, tmp_path: Path
) -> None:
    own = {"data": {"name": "patterns", "num_train": 30}, "steps": 5, "num_images": 20}
    config = {**raw_config, "rounds": 3, "server": {section: own}}
    whole = simulate(parse_config({**config, "output": str(tmp_path / "whole")}))
    short = simulate(parse_config({**config, "output": str(tmp_path / "short"), "rounds": 1}))
    later = resume(short.directory, ["rounds=3"])
    assert all(torch.equal(whole.adapter[name], later.adapter[name]) for name in whole.adapter)


def test_what_the_server_trains_on_it_learns(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    own = examples(model, objective=CrossEntropy(), steps=60)
    begin = start(model).adapter
    once, before = dataclasses.replace(own, local=dataclasses.replace(own.local, steps=1)), []
    for adapter in (begin, own.train(begin, tuple(begin), Rng(0), setting="")[0]):
        before.append(once.train(adapter, tuple(begin), Rng(0), setting="")[1])
    assert before[1] < before[0]


def test_synthetic_classes_may_have_other_names(raw_config: dict[str, Any]) -> None:
    """Another order of the same names: a different label for each image, and so another adapter."""
    own = {"data": {"name": "patterns", "num_train": 30}, "steps": 5, "learning_rate": 0.01}
    adapters = []
    for place, names in enumerate((None, ["thing 2", "thing 0", "thing 1"], {"thing 0": "thing 0"})):
        config = {**raw_config, "rounds": 1, "name": f"run-{place}"}
        config["server"] = {"synthetic": {**own, "class_names": names}}
        adapters.append(simulate(parse_config(config)).adapter)
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert all(torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


def test_a_warm_up_says_what_it_did_and_changes_where_clients_start(raw_config: dict[str, Any]) -> None:
    lines: list[str] = []
    own = {"data": {"name": "patterns", "num_train": 60}, "steps": 20, "learning_rate": 0.01}
    config = {**raw_config, "rounds": 1, "local": {"learning_rate": 1e-9}}
    warm = simulate(parse_config({**config, "server": {"synthetic": own}}), echo=lines.append)
    cold = simulate(parse_config({**config, "name": "cold"}))
    assert any("before round 1 the server trained on 60 images of its own" in line for line in lines)
    assert warm.records[0].loss == cold.records[0].loss  # the frozen model
    assert abs(warm.records[1].loss - cold.records[1].loss) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"server": {"synthetic": {"data": {"name": "patterns", "num_classes": 4}}}},
            "server.synthetic.data: class 'thing 3' is none of the run's; did you mean 'thing 2'",
        ),
        (
            {"server": {"synthetic": {"data": "patterns", "class_names": {"thing 9": "thing 0"}}}},
            "server.synthetic.class_names: no class is called 'thing 9'",
        ),
        (
            {"server": {"distillation": {"data": {"name": "patterns", "num_train": 30}, "num_images": 31}}},
            "server.distillation.num_images: expected at most 30, the images there are, got 31",
        ),
        ({"server": {"distillation": {"steps": 3}}}, "server.distillation.data: missing"),
        (
            {"server": {"text_rounds": {"descriptions": "nowhere.json"}}},
            "server.text_rounds.descriptions: nowhere.json: No such file",
        ),
        (
            {"server": {"text_rounds": {"descriptions": "{file}"}}, "adapter": {"towers": ["vision"]}},
            "server.text_rounds: expected none, because adapter lora changes image features",
        ),
        (
            {"server": {"strategy": "fedsa_lora", "distillation": {"data": "patterns"}}},
            "server.strategy: fedsa_lora with adapter lora can't be used where the server trains by itself",
        ),
        (
            {
                "server": {"schedule": {"name": "buffered", "buffer": 2}, "distillation": {"data": "patterns"}},
                "network": "drawn",
            },
            "server.distillation: expected none: updates of a buffered schedule",
        ),
    ],
)
def test_what_can_not_be_is_said_in_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = describe(tmp_path / "d.json")
    written = json.loads(json.dumps(changes).replace("{file}", file))
    config = {**raw_config, **written, "output": str(tmp_path / "runs")}

    def run() -> None:
        simulate(parse_config(config))

    with pytest.raises(UserError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("runs/*"))


def test_a_sentence_for_two_classes_is_refused(raw_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"thing 0": "the same", "thing 1": "the same"}))
    config = parse_config({**raw_config, "server": {"text_rounds": {"descriptions": str(tmp_path / "d.json")}}})
    with pytest.raises(UserError, match="'the same' is there twice"):
        simulate(config)
