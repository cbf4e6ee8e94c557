"""Sentences of a file join the templates; a step may draw one of a class's prompts; other templates are evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL_ON,
    CLASSES,
    LABELS,
    TOLERANCE,
    assert_states_close,
    federation,
    load_clip,
    load_plain,
    random_adapters,
    random_pixels,
    run,
    start,
    write_model,
)
from safetensors.torch import load_file
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.objectives import Contrastive, CrossEntropy, Objective
from flora.client.optimizers import Sgd
from flora.client.penalties import Anchor, Distillation, Penalty
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.features import ClipAdapter
from flora.clip.adapters.lora import Lora
from flora.clip.frozen import FrozenClip
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip
from flora.config.descriptions import check_known, read_descriptions
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.data.datasets.class_names import EUROSAT, FASHION_MNIST
from flora.engine.batch import Batch
from flora.engine.gradients import FlatStack, Loss, gradient_function
from flora.evaluation.accuracy import evaluate
from flora.evaluation.summary import lines
from flora.experiment.build import Experiment, build_experiment
from flora.simulate import resume, simulate

SHIPPED = Path(__file__).parents[1] / "experiments" / "descriptions"
TEMPLATES = ("a photo of a {}.", "{}")
SENTENCES = {CLASSES[0]: ("soft fur and whiskers", "a {} on a sofa"), CLASSES[2]: ("a green {}",)}
TEXTS_OF = [[text.format(name) for text in (*TEMPLATES, *SENTENCES.get(name, ()))] for name in CLASSES]
LORA = Lora(towers=("text",), targets=("q", "v", "proj"), rank=3, alpha=6)
SPEEDS = {
    "packed": SpeedOptions(),
    "cut": SpeedOptions(share_prefixes=False),
    "padded": SpeedOptions(cut_prompts=False),
}


def described(
    path: str,
    adapter: Adapter = LORA,
    *,
    templates: Sequence[str] = TEMPLATES,
    sentences: Mapping[str, Sequence[str]] | None = SENTENCES,
    speed: SpeedOptions = ALL_ON,
) -> AdaptedClip:
    clip = load_clip(path)
    return AdaptedClip(
        clip, adapter.attach(clip), class_names=CLASSES, templates=templates, speed=speed, descriptions=sentences
    )


def plain_weights(plain: FrozenClip, adapter: tree.State, prefix: str = "") -> dict[str, Tensor]:
    """The plain model's weights W + s B A, with a gradient to the factors of LORA."""
    weights = {name: tensor.detach() for name, tensor in plain.model.named_parameters()}
    for name in {key.rpartition(".")[0] for key in adapter}:
        _, block, target = name.split(".")
        end = "mlp.c_proj.weight" if target == "proj" else "attn.in_proj_weight"
        key = f"{prefix}transformer.resblocks.{block}.{end}"
        delta = 2.0 * adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]
        if target != "proj":
            zero = torch.zeros_like(delta)
            delta = torch.cat([delta, zero, zero] if target == "q" else [zero, zero, delta])
        weights[key] = weights[key] + delta
    return weights


class TextsOnly(torch.nn.Module):
    """What `functional_call` needs to call `encode_text` of a plain model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=True)  # type: ignore[operator,no-any-return]


def plain_features(plain: FrozenClip, weights: Mapping[str, Tensor], text: str) -> Tensor:
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    features: Tensor = torch.func.functional_call(TextsOnly(plain.model), named, (plain.tokenize([text]),))
    return features[0]


# The ensemble


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS.keys())
@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}], ids=["causal", "not causal"])
@torch.no_grad()
def test_a_class_is_the_mean_of_its_templates_and_sentences(
    tmp_path: Path, text: dict[str, Any], speed: SpeedOptions
) -> None:
    path = write_model(tmp_path / "model.json", text=text, custom_text=True)
    model, plain = described(path, speed=speed), load_plain(path)
    adapters = random_adapters(model, 2)
    with model.adapter.bind(adapters):
        found = model.class_features(2)
        some = model.class_features(2, torch.tensor([[2, 1], [0, 2]]))
    for client, adapter in enumerate(tree.unstack(adapters)):
        weights = plain_weights(plain, adapter, "text.")
        for place, texts in enumerate(TEXTS_OF):
            mean = torch.stack([plain_features(plain, weights, text) for text in texts]).mean(dim=0)
            torch.testing.assert_close(found[client, place], F.normalize(mean, dim=0), atol=TOLERANCE, rtol=0)
    expected = torch.stack([found[0, [2, 1]], found[1, [0, 2]]])
    torch.testing.assert_close(some, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_without_descriptions_it_is_the_plain_mean_bit_for_bit(tiny_model: str) -> None:
    for sentences in (None, {}):
        model = described(tiny_model, sentences=sentences)
        with model.adapter.bind(random_adapters(model, 2)):
            layout = model.prompts.for_clients(2)
            every = F.normalize(model.text.suffix(model.text.stem(model.prompts), layout), dim=-1)
            expected = F.normalize(every.unflatten(0, (2, -1, 2)).mean(dim=2), dim=-1)
            assert torch.equal(model.class_features(2), expected)


@torch.no_grad()
def test_a_sentence_of_every_class_is_a_template(tiny_model: str) -> None:
    both = described(tiny_model, sentences=None)
    model = described(tiny_model, templates=TEMPLATES[:1], sentences=dict.fromkeys(CLASSES, TEMPLATES[1:]))
    adapters = random_adapters(model, 2)
    with model.adapter.bind(adapters), both.adapter.bind(adapters):
        assert torch.equal(model.class_features(2), both.class_features(2))


def test_classes_with_the_same_prompts_are_refused_in_spite_of_others(tiny_model: str) -> None:
    clip = load_clip(tiny_model)
    names, adapter = ("One", "two", "one"), LORA.attach(clip)
    with pytest.raises(UserError, match="classes 'One' and 'one' have the same prompts"):
        AdaptedClip(clip, adapter, class_names=names, templates=("a {}",), descriptions={"two": ("b",)})
    AdaptedClip(clip, adapter, class_names=names, templates=("a {}",), descriptions={"One": ("b",)})


def test_what_is_cut_off_is_said_of_the_file(tiny_model: str) -> None:
    long = "cat " * 80
    with pytest.raises(UserError, match=r"^prompts.descriptions: nothing of class 'cat' is left in 'cat cat"):
        described(tiny_model, sentences={CLASSES[0]: (long + "{}",)})
    (line,) = described(tiny_model, sentences={CLASSES[0]: (long,)}).text.cut_prompts
    assert line.endswith("shorten prompts.class_names or prompts.templates or prompts.descriptions")


# Drawn prompts


def stages(path: str) -> list[AdaptedClip]:
    """One frozen model whose text tower is cut before its blocks, before its head, and behind it."""
    models = []
    for stage in (1, 3, 4):
        clip = load_clip(path)
        attached = Lora(towers=("vision",)).attach(clip)
        attached.trained_from = {**attached.trained_from, "text": stage}
        models.append(AdaptedClip(clip, attached, class_names=CLASSES, templates=TEMPLATES, descriptions=SENTENCES))
    return models


@torch.no_grad()
def test_a_drawn_feature_is_one_of_its_classs_wherever_the_tower_is_cut(tiny_model: str) -> None:
    plain = load_plain(tiny_model)
    weights = dict(plain.model.named_parameters())
    expected = [[plain_features(plain, weights, text) for text in texts] for texts in TEXTS_OF]
    for model in stages(tiny_model):
        places = model.draw_places(Rng(0).child(client) for client in range(4))
        assert places is not None and places.shape == (4, 3)
        found = model.drawn_class_features(places)
        for client, own in enumerate(places.tolist()):
            for place, (drawn, of_class) in enumerate(zip(own, expected, strict=True)):
                torch.testing.assert_close(found[client, place], of_class[drawn], atol=TOLERANCE, rtol=0)


def test_each_of_a_classs_prompts_is_drawn_and_no_other(tiny_model: str) -> None:
    model = described(tiny_model)
    places = model.draw_places(Rng(0).child(client) for client in range(200))
    assert places is not None
    for column, texts in zip(places.T, TEXTS_OF, strict=True):
        assert set(column.tolist()) == set(range(len(texts)))
    again = model.draw_places([Rng(0).child(7)])
    assert again is not None and torch.equal(again[0], places[7])
    assert described(tiny_model, templates=("{}",), sentences=None).draw_places([Rng(0)]) is None


def test_a_step_encodes_no_more_than_what_is_drawn(tiny_model: str) -> None:
    model = described(tiny_model, speed=SpeedOptions(share_prefixes=False))
    assert len(model.prompts.layout.positions) == sum(map(len, TEXTS_OF))
    assert len(model.prompts.of_places(torch.tensor([[0, 0, 0], [3, 1, 2]])).positions) == 2 * 3


def test_the_gradient_through_drawn_prompts_is_that_of_a_plain_loop(tiny_model: str) -> None:
    model, plain = described(tiny_model), load_plain(tiny_model)
    plain.model.train()  # OpenCLIP has no dropout here; its evaluation fast path has no gradient
    flat = FlatStack(random_adapters(model, 2), model.device)
    pixels, labels = random_pixels(8), torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]])
    places = torch.tensor([[3, 1, 0], [2, 0, 2]])
    tensors = {
        "stem": model.vision.stem(pixels),
        "labels": labels,
        "example_mask": torch.ones(2, 4, dtype=torch.bool),
    }
    loss = Loss((("local.objective", CrossEntropy()),))
    compute = gradient_function(model, loss, flat, None, batch_size=4)
    losses, found = compute(flat.matrix, Batch(tensors, drawn=places))
    with torch.no_grad():
        images = plain.model.encode_image(pixels, normalize=True).unflatten(0, (2, 4))  # type: ignore[operator]
    for client, adapter in enumerate(tree.unstack(flat.state(flat.matrix))):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
        weights = plain_weights(plain, leaves)
        texts = [
            plain_features(plain, weights, texts[place])
            for texts, place in zip(TEXTS_OF, places[client].tolist(), strict=True)
        ]
        own = F.cross_entropy(model.logit_scale() * images[client] @ torch.stack(texts).T, labels[client])
        expected = torch.cat([each.flatten() for each in torch.autograd.grad(own, list(leaves.values()))])
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(losses[client], own.detach(), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found[client], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("penalty", [Anchor(), Distillation()], ids=["anchor", "distillation"])
@pytest.mark.parametrize("adapter", [LORA, Lora(towers=("vision",))], ids=["text", "vision"])
def test_a_penalty_compares_a_drawn_prompt_with_the_frozen_models_of_it(
    tiny_model: str, adapter: Adapter, penalty: Penalty
) -> None:
    model = described(tiny_model, adapter)
    flat = FlatStack(tree.expand(start(model).adapter, 2), model.device)  # which changes nothing yet
    tensors = {
        "stem": model.vision.stem(random_pixels(8)),
        "labels": torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]]),
        "example_mask": torch.ones(2, 4, dtype=torch.bool),
    }
    batch = Batch(tensors, drawn=torch.tensor([[3, 1, 0], [2, 0, 2]]))
    terms = (("local.objective", CrossEntropy()), ("local.penalty", penalty))
    without, found = (
        gradient_function(model, Loss(some), flat, None, batch_size=4)(flat.matrix, batch)
        for some in (terms[:1], terms)
    )
    for expected, each in zip(without, found, strict=True):
        torch.testing.assert_close(each, expected, atol=TOLERANCE, rtol=0)


def local_of(prompts: str, objective: Objective | None = None) -> LocalTraining:
    return LocalTraining(
        learning_rate=0.1, batch_size=4, optimizer=Sgd(), prompts=prompts, objective=objective or CrossEntropy()
    )


@pytest.mark.parametrize("objective", [CrossEntropy(), Contrastive()])
@pytest.mark.parametrize(
    "adapter",
    [LORA, Lora(towers=("text", "vision"), dropout=0.1), Lora(towers=("vision",)), ClipAdapter()],
    ids=["text", "dropout", "vision", "beside"],
)
def test_how_clients_are_grouped_changes_nothing(tiny_model: str, adapter: Adapter, objective: Objective) -> None:
    model = described(tiny_model, adapter)
    one, three, ensemble = (
        run(model, local_of(prompts, objective), per_block=per_block).adapter
        for prompts, per_block in (("random", 1), ("random", 3), ("ensemble", 3))
    )
    assert_states_close(one, three)
    assert max((one[name] - tensor).abs().max() for name, tensor in start(model).adapter.items()) > 1e-4
    assert max((one[name] - ensemble[name]).abs().max() for name in one) > 1e-6


@pytest.mark.parametrize("adapter", [LORA, Lora(towers=("vision",))], ids=["text", "vision"])
def test_draws_among_equal_prompts_are_their_ensemble(tiny_model: str, adapter: Adapter) -> None:
    repeated = described(tiny_model, adapter, templates=("{}",), sentences={CLASSES[1]: ("{}",), CLASSES[2]: ("{}",)})
    alone = described(tiny_model, adapter, templates=("{}",), sentences=None)
    expected = run(alone, local_of("ensemble"), per_block=3).adapter
    for model, prompts in ((repeated, "random"), (repeated, "ensemble"), (alone, "random")):
        assert_states_close(run(model, local_of(prompts), per_block=3).adapter, expected)


def test_drawn_steps_are_not_recorded_and_parts_have_their_own_draws(tiny_model: str) -> None:
    places = torch.tensor([[3, 1, 0], [2, 0, 2]])
    batch = Batch({"labels": LABELS[:8].view(2, 4)}, drawn=places)
    assert not batch.is_plain and Batch(batch.tensors).is_plain
    part = batch.of_clients(1, 2).drawn
    assert part is not None and torch.equal(part, places[1:])


def test_a_client_draws_the_same_alone_as_among_others(tiny_model: str) -> None:
    model = described(tiny_model)
    parts = federation(model, local_of("random"), per_block=5)
    adapter = start(model).adapter
    setup = parts.setup(1, parts.roles.trained(adapter, 1), None)
    tasks = [parts.task(client, adapter, setup, Rng(3)) for client in range(5)]
    together = {result.client: result.adapter for result in parts.engine.train(tasks)}
    (alone,) = parts.engine.train(tasks[2:3])
    assert_states_close(together[2], alone.adapter)


# The file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"expected a mapping of class names to sentences, got \['a'\]"),
        ("", "expected a mapping of class names to sentences, got null"),
        ("a: [b\n", "not valid YAML: while parsing"),
        ("a: b\na: c\n", "not valid YAML: key 'a' is given twice in line 2"),
        ("cat: []\n", "class 'cat' has an empty list: leave it out, or give it a sentence"),
        ("cat: ['  ']\n", "class 'cat': expected a sentence, got '  '"),
        ("cat: [3]\n", "class 'cat': expected a sentence, got 3"),
        ("cat: {a: b}\n", "class 'cat': expected a sentence or a list of sentences, got {'a': 'b'}"),
        ("cat:\n", "class 'cat': expected a sentence or a list of sentences, got null"),
        ("cat: 'a {} and a {}'\n", "class 'cat': expected at most one {} for the class name and no other braces"),
        ("cat: 'a {name}'\n", "class 'cat': expected at most one {} for the class name and no other braces"),
        (b"\xff\xfe", "not valid YAML: 'utf-8' codec can't decode"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^prompts.descriptions: {path}: {message}") as caught:
        read_descriptions(str(path))
    assert "\n" not in str(caught.value)


def test_a_bad_json_file_and_none_are_one_line(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "not valid JSON: "),
        ('{"a": "b", "a": "c"}', "not valid JSON: key 'a' is given twice"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^prompts.descriptions: {path}: {message}"):
            read_descriptions(str(path))
    for missing, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        config = parse_config({**raw_config, "prompts": {"descriptions": str(missing)}})
        with pytest.raises(UserError, match=rf"^prompts.descriptions: {missing}: {reason}$"):
            check_experiment(config)


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    content = {"a": ["one {}", "zwei ä"], "b": "three"}
    (tmp_path / "x.json").write_text(json.dumps(content))
    (tmp_path / "x.yaml").write_text("a:\n  - one {}\n  - zwei ä\nb: three\n", encoding="utf-8")
    found = [read_descriptions(str(tmp_path / name)) for name in ("x.json", "x.yaml")]
    assert found[0] == found[1] == {"a": ("one {}", "zwei ä"), "b": ("three",)}


def test_a_class_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^prompts.descriptions: x: no class is called 'caat'; did you mean 'cat'\?$"):
        check_known("x", {"caat": ("a",)}, ("cat", "dog"))


@pytest.mark.parametrize(
    ("name", "class_names"), [("eurosat", EUROSAT.values()), ("fashion_mnist", FASHION_MNIST.values())]
)
def test_the_shipped_files_have_the_data_sets_classes(name: str, class_names: Sequence[str]) -> None:
    found = read_descriptions(str(SHIPPED / f"{name}.yaml"))
    assert sorted(found) == sorted(class_names)
    assert all(5 <= len(set(sentences)) == len(sentences) <= 6 for sentences in found.values())
    every = [sentence for sentences in found.values() for sentence in sentences if "{}" not in sentence]
    assert len(set(every)) == len(every)


# Runs


@pytest.fixture
def things(tmp_path: Path) -> Path:
    path = tmp_path / "things.yaml"
    shutil.copy(Path(__file__).with_name("things.json"), path)
    return path


def built(raw: dict[str, Any]) -> Experiment:
    return build_experiment(parse_config(raw))


def test_what_is_written_down_has_the_sentences(raw_config: dict[str, Any], things: Path) -> None:
    raw = {**raw_config, "prompts": {"descriptions": str(things), "class_names": {"thing 2": "bird"}}}
    directory = simulate(parse_config(raw)).directory
    classes = json.loads((directory / "prompts.json").read_text())["classes"]
    assert [each["prompts"] for each in classes] == [
        ["a photo of a thing 0.", "a soft thing 0 with blurred edges"],
        ["a photo of a thing 1."],
        ["a photo of a bird.", "something bright", "a bird of many colours"],
    ]
    assert "descriptions_sha256" in json.loads((directory / "environment.json").read_text())
    without = simulate(parse_config({**raw_config, "name": "without"})).directory
    assert "descriptions_sha256" not in json.loads((without / "environment.json").read_text())


def test_a_run_refuses_a_class_that_the_data_do_not_have(raw_config: dict[str, Any], things: Path) -> None:
    things.write_text("thing 7: a sentence\n")
    with pytest.raises(UserError, match=r"things.yaml: no class is called 'thing 7'; did you mean 'thing"):
        built({**raw_config, "prompts": {"descriptions": str(things)}})


def test_classes_that_are_set_aside_have_their_sentences(raw_config: dict[str, Any], things: Path) -> None:
    experiment = built(
        {
            **raw_config,
            "data": {"name": "patterns", "num_classes": 4},
            "split": "base_to_new",
            "prompts": {"descriptions": str(things)},
        }
    )
    assert list(experiment.federation.engine.model.descriptions) == ["thing 0"]
    assert experiment.new is not None
    assert experiment.new.model.descriptions == {"thing 2": ("something bright", "a {} of many colours")}


class Stop(Exception):
    """Raised in the middle of a run."""


def test_another_content_is_refused_at_resume_and_another_place_is_not(
    raw_config: dict[str, Any], things: Path, tmp_path: Path
) -> None:
    def stop(round: int, clients: tuple[int, ...]) -> None:
        if round == 2:
            raise Stop

    raw = {**raw_config, "rounds": 3, "prompts": {"descriptions": str(things)}, "local": {"prompts": "random"}}
    with pytest.raises(Stop):
        simulate(parse_config(raw), hooks=Hooks(before_block=stop))
    directory = Path(raw["output"]) / raw["name"]
    original = things.read_text()
    things.write_text(original.replace("bright", "dark"))
    with pytest.raises(UserError, match=r": the descriptions are not what this run began with \(SHA-256\)$"):
        resume(directory)
    with pytest.raises(UserError, match=r"local.prompts: expected ensemble: .* there is nothing to draw"):
        resume(directory, ["prompts.descriptions=null"])
    things.unlink()
    moved = tmp_path / "moved.json"
    moved.write_text(original)
    resumed = resume(directory, [f"prompts.descriptions={moved}"])
    moved.rename(things)
    whole = simulate(parse_config({**raw, "name": "whole"}))
    first, second = (load_file(each.directory / "adapter.safetensors") for each in (resumed, whole))
    assert resumed.summary.last_accuracy == whole.summary.last_accuracy
    assert all(torch.equal(first[name], second[name]) for name in first)


# Other templates


OTHERS = ["{}", "a drawing of the {} by a child.", "something like a {}"]


@pytest.mark.parametrize("adapter", ["lora", "clip_adapter"])
def test_another_templates_accuracy_is_that_of_prompts_of_that_template(
    raw_config: dict[str, Any], adapter: str
) -> None:
    backbone = {**raw_config["backbone"], "precision": "fp64"}
    raw = {**raw_config, "backbone": backbone, "adapter": adapter, "local": {"learning_rate": 0.05}}
    result = simulate(parse_config({**raw, "evaluation": {"templates": OTHERS}}))
    plain = simulate(parse_config({**raw, "name": "plain"}))
    adapter_of = {
        name: tensor.unsqueeze(0) for name, tensor in load_file(result.directory / "adapter.safetensors").items()
    }
    expected = {}
    for template in OTHERS:
        other = built({**raw, "prompts": {"templates": [template]}})
        model = other.federation.engine.model
        expected[template] = evaluate(model, adapter_of, other.test, batch_size=512)[0].accuracy
    last = result.records[-1]
    assert last.metrics["template_accuracy"] == expected
    values = list(expected.values())
    assert last.metrics["template_accuracy_mean"] == float(np.mean(values))
    assert last.metrics["template_accuracy_std"] == float(np.std(values))
    assert result.records[0].metrics["template_accuracy"].keys() == expected.keys()
    assert result.summary.figures["template_accuracy_mean"] == float(np.mean(values))
    assert any(line.strip().startswith("other templates") for line in lines(result.summary, parse_config(raw)))
    assert [record.accuracy for record in result.records] == [record.accuracy for record in plain.records]
    assert plain.records[-1].metrics["template_accuracy"] is None
    assert not any("other templates" in line for line in lines(plain.summary, parse_config(raw)))


def test_templates_to_evaluate_with_are_checked() -> None:
    base = {"data": "patterns", "partition": "iid"}
    for templates, message in (
        (["a"], r"^evaluation.templates: expected one {} for the class name and no other braces, got 'a'"),
        (["{}", "{}"], r"^evaluation.templates: expected each template once"),
    ):
        with pytest.raises(OptionError, match=message):
            parse_config({**base, "evaluation": {"templates": templates}})


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        ("prompt_context", {"prompts": {"descriptions": "x"}}, "prompts.descriptions: expected none, because prompt_"),
        ("prompt_context", {"local": {"prompts": "random"}}, "local.prompts: expected ensemble, because prompt_"),
        ("linear_head", {"local": {"prompts": "random"}}, "local.prompts: expected ensemble, because linear_head"),
        ("linear_head", {"evaluation": {"templates": ["{}"]}}, "evaluation.templates: expected none, because linear"),
    ],
)
def test_adapters_that_read_no_prompts_refuse_what_is_about_them(
    raw_config: dict[str, Any], adapter: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_experiment(parse_config({**raw_config, "adapter": adapter, **changes}))


def test_other_templates_stand_alone_without_sentences(raw_config: dict[str, Any], things: Path) -> None:
    template = "{} from far away"
    raw = {**raw_config, "evaluation": {"templates": [template]}}
    alone = built(raw).by_template[template]
    beside = built({**raw, "prompts": {"descriptions": str(things)}}).by_template[template]
    assert not beside.descriptions and beside.templates == (template,)
    assert torch.equal(alone.class_features(1), beside.class_features(1))
