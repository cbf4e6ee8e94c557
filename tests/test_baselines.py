"""The paper's other methods: each against plain PyTorch, each for K clients at once, each in a whole run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    LABELS,
    PIXELS,
    SIZES,
    TOLERANCE,
    adapt,
    assert_states_close,
    federation,
    load_plain,
    plain_texts,
    random_pixels,
    rounds,
    run,
    start,
    train,
)
from torch import Tensor, nn

from flora.client.local_training import LocalTraining
from flora.client.objectives import Contrastive
from flora.client.optimizers import Sgd
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.deep_prompts import DeepPrompts, Maple, PromptSrc
from flora.clip.adapters.features import AttentionAdapter, ClipAdapter, Norm
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.heads import LinearHead, LpPlusPlus, TaskRes, VisionAndHead
from flora.clip.adapters.lora import Lora
from flora.clip.adapters.multimodal import PFedMma
from flora.clip.adapters.prompts import PromptContext
from flora.communication.options import payload_bytes
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.tree import State
from flora.evaluation.accuracy import evaluate
from flora.export import main as export
from flora.features.features import StoredFeatures
from flora.federated.round import run_round
from flora.simulate import simulate

# Sizes of the tiny model: embed_dim 16, widths 32, three classes; "a photo of a" is four tokens.
METHODS: dict[str, tuple[Adapter, int]] = {
    "linear_head": (LinearHead(), 3 * 16),
    "taskres": (TaskRes(), 3 * 16),
    "lp_plus_plus": (LpPlusPlus(), 3 * 16 + 3),
    "attention_adapter": (AttentionAdapter(), 2 * (16 * 16 + 16)),
    "clip_adapter": (ClipAdapter(), 2 * 16 * 4),
    "prompt_context": (PromptContext(), 4 * 32),
    "random context": (PromptContext(words=None, num_tokens=6), 6 * 32),
    "context of each class": (PromptContext(class_specific=True, position="middle"), 3 * 4 * 32),
    "norm": (Norm(), 2 * 32),
    "maple": (Maple(), 2 * (2 * 32 + 32 * 32 + 32)),
    "prompt_src": (PromptSrc(num_image_tokens=3), 2 * (4 + 3) * 32),
    "pfedmma": (PFedMma(rank=4, scale=0.1), 2 * (2 * (4 * 32 + 4 + 32 * 4 + 32) + 4 * 4 + 4)),
}
SGD = LocalTraining(learning_rate=0.3, batch_size=4, optimizer=Sgd(momentum=0.9, weight_decay=0.01), epochs=2)


def moved(model: Any, number: int, scale: float = 0.3) -> State:
    """K adapters away from where they start."""
    generator = torch.Generator().manual_seed(0)
    initial = model.initial_adapter(Rng(0))
    return {
        name: tensor + scale * torch.randn((number, *tensor.shape), generator=generator, dtype=tensor.dtype)
        for name, tensor in initial.items()
    }


@pytest.mark.parametrize(("method", "count"), METHODS.values(), ids=METHODS.keys())
def test_what_is_trained_and_sent(tiny_model: str, method: Adapter, count: int) -> None:
    state = adapt(tiny_model, method, precision="fp32").initial_adapter(Rng(0))
    assert tree.count(state) == count
    assert 4 * count < payload_bytes(state) < 4 * count + 500 + 100 * len(state)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


@pytest.mark.parametrize("objective", [None, Contrastive()], ids=["cross entropy", "contrastive"])
@pytest.mark.parametrize(("method", "_"), METHODS.values(), ids=METHODS.keys())
def test_the_number_of_clients_per_block_changes_nothing(tiny_model, method, _, objective) -> None:  # type: ignore[no-untyped-def]
    local = SGD if objective is None else LocalTraining(learning_rate=0.1, batch_size=4, objective=objective)
    if isinstance(method, PromptContext | DeepPrompts):  # through norms, short vectors have long gradients
        local = dataclasses.replace(local, learning_rate=1e-3)
    model = adapt(tiny_model, method)
    alone, together = (run(model, local, per_block=number).adapter for number in (1, 3))
    before = start(model).adapter
    assert max((alone[name] - before[name]).abs().max().item() for name in alone) > 1e-4
    assert_states_close(alone, together)


@pytest.mark.parametrize(
    "method", [*(method for method, _ in METHODS.values()), VisionAndHead()], ids=lambda m: type(m).__name__
)
@torch.no_grad()
def test_without_an_adapter_bound_the_model_is_openclips(tiny_model: str, method: Adapter) -> None:
    model, plain = adapt(tiny_model, method, templates=method.templates(("a photo of a {}.",))), load_plain(tiny_model)
    pixels = random_pixels(4)
    tokens = plain.tokenize([method.templates(("a photo of a {}.",))[0].format(name) for name in CLASSES])
    images, texts = plain.model.encode_image(pixels, normalize=True), plain.model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    torch.testing.assert_close(model.image_features(model.vision.stem(pixels), 1)[0], images, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.class_features(1)[0], texts, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "method",
    [LinearHead(), TaskRes(), LpPlusPlus(), PromptContext(), Norm(), VisionAndHead(), Lora(), FullFineTuning()],
    ids=lambda m: type(m).__name__,
)
def test_it_starts_as_the_zero_shot_classifier(tiny_model: str, method: Adapter) -> None:
    model = adapt(tiny_model, method)
    features = StoredFeatures(model.vision.stem(PIXELS), torch.arange(len(LABELS)), LABELS, LABELS.numpy())
    zero_shot = evaluate(model, None, features, batch_size=7)[0]
    first = evaluate(model, tree.expand(model.initial_adapter(Rng(0)), 1), features, batch_size=7)[0]
    torch.testing.assert_close(torch.tensor(first.losses), torch.tensor(zero_shot.losses), atol=TOLERANCE, rtol=0)


def test_a_linear_heads_gradient_is_that_of_softmax_regression(tiny_model: str) -> None:
    """One step of gradient descent by the closed form, for each of five clients, and their mean."""
    model = adapt(tiny_model, LinearHead())
    parts, state = (
        federation(model, LocalTraining(learning_rate=0.5, batch_size=20, optimizer=Sgd()), per_block=5),
        start(model),
    )
    after, _ = run_round(parts, state)
    head = state.adapter["head.weight"]
    scale = model.logit_scale()
    expected = torch.zeros_like(head)
    for client in parts.clients:
        images = F.normalize(model.vision.suffix(model.vision.stem(PIXELS[client.train])), dim=-1).detach()
        errors = (scale * images @ head.T).softmax(dim=-1) - F.one_hot(LABELS[client.train], 3)
        expected += (
            len(client.train) / sum(SIZES) * (head - 0.5 * scale * errors.T @ images / len(client.train)).detach()
        )
    torch.testing.assert_close(after.adapter["head.weight"], expected, atol=TOLERANCE, rtol=0)


def taskres_rows(leaves: State, texts: torch.Tensor) -> torch.Tensor:
    return F.normalize(texts + 0.7 * leaves["head.difference"], dim=-1)


def lp_plus_plus_rows(leaves: State, texts: torch.Tensor) -> torch.Tensor:
    return leaves["head.weight"] + torch.diag(leaves["head.alpha"]) @ texts


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize(
    ("method", "rows"),
    [(TaskRes(alpha=0.7), taskres_rows), (LpPlusPlus(alpha=1.5), lp_plus_plus_rows)],
    ids=["taskres", "lp_plus_plus"],
)
def test_rounds_of_heads_on_frozen_texts_equal_a_plain_loop(
    tiny_model: str, method: Adapter, rows: Callable[[State, torch.Tensor], torch.Tensor], per_block: int
) -> None:
    model = adapt(tiny_model, method)
    local = LocalTraining(learning_rate=0.3, batch_size=20, epochs=3, optimizer=Sgd(momentum=0.9))
    states, _ = rounds(federation(model, local, per_block=per_block), 2)
    texts = model.frozen_class_features()
    server = {name: torch.zeros_like(texts) for name in states[0].adapter if name != "head.alpha"}
    if "head.alpha" in states[0].adapter:
        server["head.alpha"] = torch.full((3,), 1.5, dtype=torch.float64)
    assert_states_close(states[0].adapter, server, atol=0)
    stem = model.vision.suffix(model.vision.stem(PIXELS)).detach()
    images = model.logit_scale() * F.normalize(stem, dim=-1)
    for state in states[1:]:
        ends = []
        for data in federation(model, local).clients:
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in server.items()}
            optimizer = torch.optim.SGD(leaves.values(), lr=0.3, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(images[data.train] @ rows(leaves, texts).T, LABELS[data.train]).backward()
                optimizer.step()
            ends.append({name: leaf.detach() for name, leaf in leaves.items()})
        server = tree.weighted_mean(ends, SIZES)
        assert_states_close(state.adapter, server)


@torch.no_grad()
def test_the_attention_adapter_is_two_layers_and_a_softmax(tiny_model: str) -> None:
    model = adapt(tiny_model, AttentionAdapter())
    stack, stem = moved(model, 2), model.vision.stem(PIXELS[:6])
    with model.adapter.bind(stack):
        found = model.image_features(stem, 2)
    for client in range(2):
        layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softmax(dim=-1)).double()
        names = ("first.weight", "first.bias", "second.weight", "second.bias")
        layers.load_state_dict(dict(zip(layers.state_dict(), (stack[name][client] for name in names), strict=True)))
        features = stem[3 * client : 3 * client + 3]
        torch.testing.assert_close(
            found[client], F.normalize(features * layers(features), dim=-1), atol=TOLERANCE, rtol=0
        )


@torch.no_grad()
def test_the_clip_adapter_is_a_bottleneck_beside_the_feature(tiny_model: str) -> None:
    model = adapt(tiny_model, ClipAdapter(reduction=8, ratio=0.3))
    stack, stem = moved(model, 2), model.vision.stem(PIXELS[:6])
    assert stack["down.weight"].shape == (2, 2, 16)
    with model.adapter.bind(stack):
        found = model.image_features(stem, 2)
    for client in range(2):
        features = stem[3 * client : 3 * client + 3]
        inner = torch.relu(features @ stack["down.weight"][client].T)
        expected = 0.3 * torch.relu(inner @ stack["up.weight"][client].T) + 0.7 * features
        torch.testing.assert_close(found[client], F.normalize(expected, dim=-1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize(
    ("options", "num_before"),
    [
        ({}, 4),
        ({"words": None, "num_tokens": 5}, 5),
        ({"position": "middle"}, 2),
        ({"position": "end", "words": None, "num_tokens": 3}, 0),
    ],
)
@torch.no_grad()
def test_a_prompt_context_replaces_the_words_embeddings(
    tiny_model: str, options: dict[str, Any], num_before: int, class_specific: bool
) -> None:
    method = PromptContext(**options, class_specific=class_specific)
    model, plain = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    stack = moved(model, 2)
    model.release_stems()
    with model.adapter.bind(stack):
        found = model.class_features(2)
    texts = [method.templates(())[0].format(name) for name in CLASSES]
    assert stack["context"].shape[-2:] == (options.get("num_tokens", 4), 32)
    for client in range(2):

        def put(x: Tensor, ends: Tensor, contexts: Tensor = stack["context"][client]) -> None:
            for place, end in enumerate(ends.tolist()):
                context = contexts[place] if class_specific else contexts
                num_behind = len(context) - num_before
                x[place, 1 : 1 + num_before] = context[:num_before]
                x[place, end - 1 - num_behind : end - 1] = context[num_before:]  # then a full stop, then the end

        torch.testing.assert_close(found[client], plain_texts(plain, texts, put), atol=TOLERANCE, rtol=0)


def test_a_context_behind_the_name_needs_room(tiny_model: str) -> None:
    method = PromptContext(position="end")
    with pytest.raises(UserError, match=r"adapter: a class's name leaves no room for the context behind it"):
        adapt(tiny_model, method, templates=method.templates(()), class_names=("very " * 80, "dog"))


@torch.no_grad()
def test_norms_equal_models_with_those_norms(tiny_model: str) -> None:
    model, pixels = adapt(tiny_model, Norm()), random_pixels(6)
    stack, stem = moved(model, 2), model.vision.stem(pixels)
    model.release_stems()
    with model.adapter.bind(stack):
        found = model.image_features(stem, 2)
    for client in range(2):
        plain = load_plain(tiny_model).model
        own = {name: tensor[client] for name, tensor in stack.items()}
        plain.load_state_dict(model.adapter.merged_state_dict(plain.state_dict(), own))
        expected = plain.encode_image(pixels[3 * client : 3 * client + 3], normalize=True)  # type: ignore[operator]
        torch.testing.assert_close(found[client], expected, atol=TOLERANCE, rtol=0)


def test_vision_tower_and_head_equal_plain_pytorch(tiny_model: str) -> None:
    model = adapt(tiny_model, VisionAndHead())
    local = LocalTraining(learning_rate=0.01, batch_size=40, optimizer=Sgd(momentum=0.9), steps=3)
    parts, state = federation(model, local), start(model)
    ours = train(parts, {2: state.adapter}, round=1, rng=Rng(0))[2].adapter
    plain = load_plain(tiny_model).model
    plain.requires_grad_(False)
    visual: Any = plain.visual
    visual.requires_grad_(True).train()
    head = model.class_features(1)[0].clone().requires_grad_()
    optimizer = torch.optim.SGD([head, *visual.parameters()], lr=0.01, momentum=0.9)
    for _ in range(3):
        logits = model.logit_scale() * F.normalize(visual(PIXELS[17:26]), dim=-1) @ head.T
        optimizer.zero_grad()
        F.cross_entropy(logits, LABELS[17:26]).backward()
        optimizer.step()
    torch.testing.assert_close(ours["head.weight"], head.detach(), atol=TOLERANCE, rtol=0)
    for name, parameter in visual.named_parameters():
        torch.testing.assert_close(ours[f"visual.{name}"], parameter.detach(), atol=TOLERANCE, rtol=0)
    assert not any(name.startswith(("transformer", "token")) for name in ours)


@pytest.mark.parametrize(
    "name",
    ["linear_head", "lp_plus_plus", "attention_adapter", "clip_adapter", "prompt_context", "norm", "vision_and_head"],
)
def test_a_whole_run(raw_config: dict[str, Any], name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plain = simulate(parse_config(raw_config), numbered=True)
    result = simulate(parse_config({**raw_config, "adapter": name}), numbered=True)
    if name != "prompt_context":  # its prompts are its own
        assert result.summary.zero_shot_accuracy == plain.summary.zero_shot_accuracy
    assert result.records[-1].train_loss is not None
    status = export([str(result.directory), str(tmp_path / "merged.safetensors")])
    if name == "norm":
        assert status == 0
    else:
        assert status == 2
        assert (
            "its adapter works beside the model, and OpenCLIP's weights have no place for it" in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "clip_adapter", "reduction": 17},
            r"adapter\.reduction: expected at most embed_dim of .*, 16, got 17",
        ),
        ({"name": "prompt_context", "words": "{}"}, r"adapter\.words: expected words without braces, or none"),
        ({"name": "prompt_context", "words": None, "num_tokens": 99}, r"adapter\.num_tokens: .*at most 64"),
    ],
)
def test_options_that_do_not_fit(raw_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((OptionError, UserError), match=message):
        simulate(parse_config({**raw_config, "adapter": options}))
