"""What the server trains by itself: distillation and descriptions against plain loops, warm-up, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, PIXELS, adapt, assert_states_close, federation, random_adapters, start
from PIL import Image

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
from flora.experiment.build import build_experiment
from flora.features.features import StoredFeatures
from flora.federated.round import run_round
from flora.federated.server_training import ServerExamples, ServerTraining
from flora.runs.loop import resume
from flora.simulate import simulate

PLAIN = LocalTraining(learning_rate=0.05, batch_size=100, steps=2, optimizer=Sgd())


def examples(model: AdaptedClip, number: int = 9, **local: Any) -> ServerExamples:
    features = StoredFeatures(
        model.vision.stem(PIXELS[:number]), torch.arange(number), LABELS[:number], np.arange(number)
    )
    return ServerExamples("server.distillation", Engine(model, features, 2), dataclasses.replace(PLAIN, **local))


def logits(model: AdaptedClip, adapter: dict[str, torch.Tensor], stem: torch.Tensor) -> torch.Tensor:
    with model.adapter.bind({name: each.unsqueeze(0) for name, each in adapter.items()}):
        return model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T


@pytest.mark.parametrize("adapter", [Lora(rank=2), Lora(rank=2, towers=("text", "vision"))])
def test_distillation_equals_a_plain_loop(tiny_model: str, adapter: Adapter) -> None:
    model = adapt(tiny_model, adapter)
    teachers = tree.unstack(random_adapters(model, 3))
    own = examples(model, objective=MatchTeacher(2.0)).with_teacher(teachers)
    begin = tree.unstack(random_adapters(model, 1, seed=5))[0]
    after = own.train(begin, tuple(begin), Rng(0))
    found, loss = after.adapter, after.loss
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
    own = ServerTraining(public=examples(model, objective=MatchTeacher(1.0)))
    with_it, result = run_round(dataclasses.replace(parts, server_training=own), start(model))
    assert result.distillation_loss == pytest.approx(0.0, abs=1e-9)
    assert_states_close(without.adapter, with_it.adapter)


def test_a_round_distils_from_the_adapters_that_clients_ended_with(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    local = LocalTraining(learning_rate=0.05, batch_size=4, optimizer=Sgd())
    own = ServerTraining(public=examples(model, objective=MatchTeacher(1.0)))
    after = []
    for per_block in (1, 3):
        parts = federation(model, local, per_block=per_block, server_training=own)
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
        ends.append(own.with_teacher(teachers).train(begin, tuple(begin), Rng(0)).adapter)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_texts_are_trained_every_so_many_rounds(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    texts = dataclasses.replace(examples(model, objective=CrossEntropy()), every=2)
    parts = federation(model, LocalTraining(batch_size=8), server_training=ServerTraining(texts=texts))
    state, losses = start(model), []
    for _ in range(4):
        state, result = run_round(parts, state)
        losses.append(result.text_loss)
    assert [each is None for each in losses] == [True, False, True, False]


def describe(path: Path, number: int = 3) -> str:
    path.write_text(json.dumps({f"thing {i}": [f"number {i} of all", "the {} kind"] for i in range(number)}))
    return str(path)


def six(raw_config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Six classes, three of which no client has."""
    data = {"name": "patterns", "num_classes": 6, "num_train": 120}
    return {**raw_config, "data": data, "split": "base_to_new", "rounds": 2, **changes}


def test_text_rounds_learn_classes_that_nobody_holds(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Sentences of the classes set aside alone: what the server learns then makes these recognise their sentences."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps({f"thing {i}": [f"number {i} of all", f"{i} it is"] for i in range(6)}))
    texts = {"descriptions": str(path), "steps": 40, "learning_rate": 0.02}
    config = six(raw_config, server={"text_rounds": texts}, local={"learning_rate": 1e-9})
    experiment = build_experiment(parse_config(config))
    own = experiment.federation.server_training.texts
    assert own is not None
    examples, model = own.engine.features, own.engine.model
    assert model.class_names == (*experiment.class_names, *experiment.new.model.class_names)  # type: ignore[union-attr]
    assert torch.bincount(examples.labels).tolist() == [2] * 6
    after = own.train(experiment.initial_adapter, tuple(experiment.initial_adapter), Rng(0)).adapter
    stem = examples.take(torch.arange(len(examples)), torch.device("cpu"))
    right = []
    for adapter in (None, after):
        bound = {} if adapter is None else {name: each.unsqueeze(0) for name, each in adapter.items()}
        with model.adapter.bind(bound) if bound else nullcontext(), torch.no_grad():
            found = (model.image_features(stem, 1)[0] @ model.class_features(1)[0].T).argmax(dim=-1)
        right.append(int((found == examples.labels).sum()))
    assert right[1] > right[0] and right[1] >= 10


def test_sentences_are_those_of_the_file_and_with_the_descriptions_of_classes(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """The model that the server trains has every class's prompts, its descriptions included."""
    path = describe(tmp_path / "d.json", 6)
    config = six(raw_config, server={"text_rounds": {"descriptions": path}}, prompts={"descriptions": path})
    experiment = build_experiment(parse_config(config))
    own = experiment.federation.server_training.texts
    assert own is not None and len(own.engine.features) == 12
    assert set(own.engine.model.descriptions) == {f"thing {i}" for i in range(6)}


def test_what_a_strategy_does_not_train_the_server_leaves_alone(raw_config: dict[str, Any]) -> None:
    own = {"data": {"name": "patterns", "num_train": 30}, "steps": 5, "learning_rate": 0.01}
    config = {**raw_config, "rounds": 2, "server": {"strategy": "ffa_lora", "synthetic": own, "distillation": own}}
    experiment = build_experiment(parse_config(config))
    cold = experiment.federation.engine.model.initial_adapter(Rng(0).child("adapter"))
    result = simulate(parse_config(config))
    for name, tensor in result.adapter.items():
        assert torch.equal(tensor, cold[name]) == name.endswith("lora_A")


def test_other_data_of_the_servers_are_refused_when_a_run_goes_on(raw_config: dict[str, Any], tmp_path: Path) -> None:
    path = describe(tmp_path / "d.json")
    short = simulate(parse_config({**raw_config, "rounds": 1, "server": {"text_rounds": {"descriptions": path}}}))
    moved = tmp_path / "elsewhere.json"
    moved.write_text(Path(path).read_text())
    resume(short.directory, ["rounds=2", f"server.text_rounds.descriptions={moved}"])
    moved.write_text(json.dumps({"thing 0": "something else"}))
    with pytest.raises(UserError, match="the server_text_rounds are not what this run began with"):
        resume(short.directory, ["rounds=3", f"server.text_rounds.descriptions={moved}"])


def test_what_the_servers_own_images_bring_is_measured_before_round_1(raw_config: dict[str, Any]) -> None:
    own = {"data": {"name": "patterns", "num_train": 30}, "steps": 5, "learning_rate": 0.01}
    config = {**raw_config, "rounds": 1, "local": {"learning_rate": 1e-12}, "server": {"synthetic": own}}
    result = simulate(parse_config(config))
    assert result.summary.warm_up_accuracy == result.summary.last_accuracy
    assert result.records[1].warm_up_accuracy is None


def test_unreadable_images_of_the_servers_are_left_out_if_that_is_wanted(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("thing 0", "thing 1", "thing 2"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (40 * number, 90, 200)).save(tmp_path / "few" / name / f"{number}.png")
    (tmp_path / "few" / "thing 0" / "bad.png").write_bytes(b"no image")
    data = {"name": "image_folder", "root": str(tmp_path / "few")}
    config = {**raw_config, "rounds": 1, "server": {"synthetic": {"data": data, "steps": 2}}}
    with pytest.raises(UserError, match=r"bad.png.*; set server.synthetic.data.unreadable=skip"):
        simulate(parse_config(config))
    data["unreadable"] = "skip"
    lines: list[str] = []
    simulate(parse_config(config), echo=lines.append)
    assert any("server.synthetic.data: left out: 1 images" in line for line in lines)


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
    for adapter in (begin, own.train(begin, tuple(begin), Rng(0)).adapter):
        before.append(once.train(adapter, tuple(begin), Rng(0)).loss)
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
            {"server": {"distillation": {"data": {"name": "image_folder", "root": "/nowhere/at/all"}}}},
            "^server.distillation.data.root: /nowhere/at/all",
        ),
        (
            {"server": {"synthetic": {"data": {"name": "fashion_mnist", "root": "/nowhere/at/all"}}}},
            "^server.synthetic.data.root: .*; set server.synthetic.data.download=true",
        ),
        ({"server": {"synthetic": {"data": "patterns"}}, "rounds": 0}, "rounds: expected at least 1 with server.synth"),
        (
            {"server": {"distillation": {"data": "patterns"}, "aggregator": "median"}},
            "server.distillation: expected none, because median leaves some clients out",
        ),
        (
            {"server": {"text_rounds": {"descriptions": "{file}", "every": 7}}, "rounds": 3},
            "server.text_rounds.every: expected at most the number of rounds",
        ),
        ({"server": {"distillation": {"steps": 3}}}, "server.distillation.data: missing"),
        (
            {"server": {"text_rounds": {"descriptions": "nowhere.json"}}},
            "server.text_rounds.descriptions: nowhere.json: No such file",
        ),
        (
            {"server": {"text_rounds": {"descriptions": "{file}"}}, "adapter": {"towers": ["vision"]}},
            "server.text_rounds: expected none, because adapter lora changes the features of images",
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
    with pytest.raises(UserError, match="'the same' describes both 'thing 0' and 'thing 1'"):
        simulate(config)
