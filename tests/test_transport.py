"""Optimal transport between patches and prompts: its plans by hand, and adapters against plain loops on OpenCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    LABELS,
    PIXELS,
    SIZES,
    TOLERANCE,
    assert_states_close,
    federation,
    load_clip,
    load_plain,
    plain_classes,
)
from helpers import adapt as adapt_with
from helpers import rounds as several_rounds
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.clip.adapters.prompts import PromptContext
from flora.clip.adapters.transport import FedOtp, Plot, Stop, TransportedContexts, balanced_plan, partial_plan
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.evaluation.accuracy import evaluate
from flora.features.features import StoredFeatures

EXACT = Stop(max_iterations=1000, threshold=1e-13)
PLOT = Plot(num_prompts=3)
OTP = FedOtp(mass=0.7)
PROMPTS = [f"a photo of a {name}." for name in CLASSES]


def adapt(path: str, method: TransportedContexts, names: tuple[str, ...] = CLASSES) -> AdaptedClip:
    return adapt_with(path, method, class_names=names, templates=method.templates(()))


# Plans


def test_a_balanced_plan_of_two_by_two_is_that_by_hand() -> None:
    """Scaling rows and columns keeps T11 T22 / (T12 T21), here 1 / (x y): with halves on all sides T11 follows."""
    x, y = 0.3, 0.04
    first = 0.5 / (1 + (x * y) ** 0.5)
    plan = balanced_plan(torch.tensor([[1, x], [y, 1]], dtype=torch.float64), EXACT)
    expected = torch.tensor([[first, 0.5 - first], [0.5 - first, first]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, atol=TOLERANCE, rtol=0)


def test_a_partial_plan_of_one_prompt_is_that_by_hand() -> None:
    """0.8 between two patches as 10 to 1 would be 0.73 and 0.07; the first takes its half, the other one the rest."""
    kernel = torch.tensor([[1.0], [0.1]], dtype=torch.float64)
    expected = torch.tensor([[0.5], [0.3]], dtype=torch.float64)
    torch.testing.assert_close(partial_plan(kernel, 0.8, EXACT), expected, atol=TOLERANCE, rtol=0)
    free = torch.tensor([[0.4 / 1.1], [0.04 / 1.1]], dtype=torch.float64)
    torch.testing.assert_close(partial_plan(kernel, 0.4, EXACT), free, atol=TOLERANCE, rtol=0)


def random_kernel(seed: int, *shape: int) -> Tensor:
    cosines = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return ((cosines - 1) / 0.3).exp()


@pytest.mark.parametrize("mass", [0.2, 0.8])
@pytest.mark.parametrize(("num_patches", "num_prompts"), [(1, 1), (1, 3), (4, 1), (6, 4), (2, 5)])
def test_marginals(num_patches: int, num_prompts: int, mass: float) -> None:
    kernel = random_kernel(num_patches, 20, num_patches, num_prompts)
    plan = balanced_plan(kernel, EXACT)
    rows, columns = (torch.full((20, n), 1 / n, dtype=torch.float64) for n in (num_patches, num_prompts))
    torch.testing.assert_close(plan.sum(dim=2), rows, atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(dim=1), columns, atol=TOLERANCE, rtol=0)
    part = partial_plan(kernel, mass, EXACT)
    assert (part.sum(dim=2) <= 1 / num_patches + 1e-6).all()
    torch.testing.assert_close(part.sum(dim=1), mass * columns, atol=TOLERANCE, rtol=0)


def plain_plan(kernel: Tensor, mass: float | None) -> Tensor:
    """One plan `(M, N)` of one kernel: at most 100 iterations, to 1e-3; balanced without a mass."""
    num_rows, num_columns = kernel.shape
    u, v = torch.ones(num_rows).double(), torch.ones(num_columns).double()
    for _ in range(100):
        before = u, v
        u = (1 / num_rows) / (kernel @ v)
        if mass is not None:
            u = torch.minimum(u, torch.ones(num_rows).double())
        v = (1 if mass is None else mass) / num_columns / (kernel.T @ u)
        moved = u - before[0] if mass is None else v - before[1]
        if moved.abs().mean() < 1e-3:
            break
    return torch.diag(u) @ kernel @ torch.diag(v)


@pytest.mark.parametrize("mass", [None, 0.7])
def test_each_plan_stops_by_itself(mass: float | None) -> None:
    """Of kernels that need few and many iterations none is moved by those that are computed with it."""
    sharp, flat = random_kernel(0, 5, 4, 2) ** 4, random_kernel(1, 5, 4, 2) ** 0.05
    kernels = torch.cat([sharp, flat])
    found = balanced_plan(kernels, Stop()) if mass is None else partial_plan(kernels, mass, Stop())
    for kernel, plan in zip(kernels, found, strict=True):
        torch.testing.assert_close(plan, plain_plan(kernel, mass), atol=TOLERANCE, rtol=0)
    exact = balanced_plan(kernels, EXACT) if mass is None else partial_plan(kernels, mass, EXACT)
    assert (found - exact).abs().amax(dim=(1, 2)).max() > TOLERANCE  # some did stop


# Adapters


def plain_patches(whole: Any, pixels: Tensor) -> Tensor:
    """Unit features `(B, M, d)` of the patches, through plain OpenCLIP."""
    whole.model.visual.output_tokens = True
    _, tokens = whole.model.visual(pixels)
    return F.normalize(tokens @ whole.model.visual.proj, dim=-1)  # behind the last norm already


def plain_logits(whole: Any, contexts: Tensor, patches: Tensor, mass: float | None) -> Tensor:
    """The logits `(B, C)`, one image and class at a time."""
    prompts = torch.stack([plain_classes(whole, context) for context in contexts])
    rows = []
    for image in patches:
        row = []
        for place in range(len(CLASSES)):
            cosines = image @ prompts[:, place].T
            plan = plain_plan(((cosines.detach() - 1) / 0.1).exp(), mass)
            row.append((plan * cosines).sum())
        rows.append(torch.stack(row))
    return whole.model.logit_scale.exp() * torch.stack(rows)


def own_contexts(adapter: StateLike) -> Tensor:
    """The contexts `(N, 4, width)` of one client's model."""
    if "local_context" in adapter:
        return torch.stack([adapter["context"], adapter["local_context"]])
    return adapter["context"]


LOCAL = LocalTraining(learning_rate=1e-3, batch_size=100, epochs=2, optimizer=Sgd(momentum=0.9))
Rounds = list[tuple[State, dict[int, State]]]


def plain_rounds(path: str, clients: Sequence[np.ndarray], server: State, mass: float | None) -> Rounds:
    """Two rounds, a client at a time: what the server has after each, and what stays with each client."""
    whole = load_plain(path)
    whole.model.requires_grad_(False)
    patches, found = plain_patches(whole, PIXELS), []
    kept: dict[int, State] = {client: {} for client in range(len(clients))}
    for _ in range(2):
        ends = []
        for client, examples in enumerate(clients):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in {**server, **kept[client]}.items()}
            optimizer = torch.optim.SGD(leaves.values(), lr=1e-3, momentum=0.9)
            for _ in range(2):
                optimizer.zero_grad()
                logits = plain_logits(whole, own_contexts(leaves), patches[examples], mass)
                F.cross_entropy(logits, LABELS[examples]).backward()
                optimizer.step()
            ends.append({name: leaf.detach() for name, leaf in leaves.items()})
            kept[client] = {name: tensor for name, tensor in ends[-1].items() if name.startswith("local_")}
        mean = tree.weighted_mean(ends, SIZES)
        server = {name: tensor if name.startswith("local_") else mean[name] for name, tensor in server.items()}
        found.append((server, dict(kept)))
    return found


@pytest.mark.parametrize(("method", "mass"), [(PLOT, None), (OTP, 0.7)], ids=["plot", "fedotp"])
def test_rounds_equal_a_plain_loop(tiny_model: str, method: TransportedContexts, mass: float | None) -> None:
    """With one, two and five clients in a step, some of which have padding; what stays never travels."""
    expected: Rounds = []
    for per_block in (1, 2, 5):
        parts = federation(adapt(tiny_model, method), LOCAL, per_block=per_block)
        states, results = several_rounds(parts, 2)
        expected = expected or plain_rounds(
            tiny_model, [client.train for client in parts.clients], states[0].adapter, mass
        )
        for state, (server, kept) in zip(states[1:], expected, strict=True):
            assert_states_close(state.adapter, server)
            for client, own in kept.items():
                assert_states_close(state.clients[client].own if own else {}, own)
        sent = 8 * (method.prompts_of_class if method is PLOT else 1) * 4 * 32
        assert sent < results[0].uplink_bytes / len(SIZES) == results[0].downlink_bytes / len(SIZES) < sent + 200


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize(("method", "mass"), [(PLOT, None), (OTP, 0.7)], ids=["plot", "fedotp"])
def test_evaluation_equals_a_plain_loop(
    tiny_model: str, method: TransportedContexts, mass: float | None, batch_size: int
) -> None:
    """However many images go in at once. The server's model of `fedotp` has the context that travels, twice."""
    model, whole = adapt(tiny_model, method), load_plain(tiny_model)
    labels, pixels = torch.arange(7) % 3, PIXELS[:7]
    features = StoredFeatures(model.vision.stem(pixels), torch.arange(7), labels, np.arange(7))
    generator = torch.Generator().manual_seed(0)
    adapter = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in model.initial_adapter(Rng(0)).items()
    }
    models = model.adapter.models(tree.expand(adapter, 1))
    expected = [own_contexts(adapter)]
    if method is OTP:
        expected.insert(0, adapter["context"].expand(2, -1, -1))
    assert len(models) == len(expected)
    with torch.no_grad():
        patches = plain_patches(whole, pixels)
        for bound, contexts in zip(models, expected, strict=True):
            logits = plain_logits(whole, contexts, patches, mass)
            (found,) = evaluate(model, bound, features, batch_size=batch_size)
            np.testing.assert_allclose(found.losses, F.cross_entropy(logits, labels, reduction="none"), atol=TOLERANCE)
        frozen: Any = whole.model
        encoded = frozen.encode_image(pixels)[0], frozen.encode_text(whole.tokenize(PROMPTS))
        images, texts = (F.normalize(each, dim=-1) for each in encoded)
        (zero_shot,) = evaluate(model, None, features, batch_size=batch_size)
        logits = frozen.logit_scale.exp() * images @ texts.T
        np.testing.assert_allclose(zero_shot.losses, F.cross_entropy(logits, labels, reduction="none"), atol=TOLERANCE)


def test_prompts_that_start_from_words_differ(tiny_model: str) -> None:
    """Alike, they would get the same gradients for ever. The first is the words; random ones differ anyway."""
    words = adapt(tiny_model, PLOT).initial_adapter(Rng(0))["context"]
    clip = load_clip(tiny_model)
    plain = PromptContext().attach(clip).initial_state(Rng(0))["context"]
    assert words.shape == (3, *plain.shape)
    assert torch.equal(words[0], plain)
    distances = [float((words[one] - words[other]).abs().mean()) for one, other in ((0, 1), (0, 2), (1, 2))]
    assert all(0.001 < distance < 0.03 for distance in distances)
    random = adapt(tiny_model, Plot(words=None, num_tokens=2)).initial_adapter(Rng(0))["context"]
    assert random.shape == (4, 2, 32) and len({float(each.sum()) for each in random}) == 4
    own = adapt(tiny_model, Plot(class_specific=True)).initial_adapter(Rng(0))["context"]
    assert own.shape == (3, 4, 4, 32)


@pytest.mark.parametrize("method", [Plot(class_specific=True, num_prompts=2), FedOtp(class_specific=True)])
def test_contexts_of_each_class_are_those_of_its_prompts(tiny_model: str, method: TransportedContexts) -> None:
    """With the same context for all classes a model with contexts of each class says what one with one context does."""
    names = {"words": "a photo of a", "class_specific": False}
    one = adapt(tiny_model, Plot(num_prompts=2, **names) if isinstance(method, Plot) else FedOtp(**names))  # type: ignore[arg-type]
    each, stem = adapt(tiny_model, method), one.vision.stem(PIXELS[:4])
    state = {name: tensor + 0.1 for name, tensor in one.initial_adapter(Rng(0)).items()}
    repeated = {name: tensor.expand(3, *tensor.shape) for name, tensor in state.items()}
    found = []
    for model, adapter in ((one, state), (each, repeated)):
        with torch.no_grad(), model.adapter.bind(model.adapter.models(tree.expand(adapter, 1))[-1]):
            found.append(model.logits(stem, model.class_features(1)))
    torch.testing.assert_close(found[0], found[1], atol=TOLERANCE, rtol=0)


def test_new_classes_are_told_apart_by_the_same_contexts(tiny_model: str) -> None:
    known, other = adapt(tiny_model, PLOT), adapt(tiny_model, PLOT, names=("dog", *CLASSES))
    state, stem = tree.expand(known.initial_adapter(Rng(0)), 1), known.vision.stem(PIXELS[:4])
    found = []
    for model in (known, other):
        with torch.no_grad(), model.adapter.bind(state):
            found.append(model.logits(stem, model.class_features(1)))
    torch.testing.assert_close(found[1][..., 1:], found[0], atol=TOLERANCE, rtol=0)


# Rules


@pytest.mark.parametrize("adapter", ["plot", "fedotp"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"objective": "contrastive"}}, "local.objective: expected cross_entropy or multi_positive: contra"),
        (
            {"local": {"penalty": "anchor"}},
            "local.penalty: expected none, distillation, ",
        ),
        ({"evaluation": {"patches": {}}}, "evaluation.patches: expected none, because {} compares images and classes"),
        ({"backbone": {"tokens": "merge"}}, "backbone.tokens: expected all, because {} compares the patches"),
        ({"evaluation": {"templates": ["a {}"]}}, "evaluation.templates: expected none, because {} does not read"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_it_cannot_be_combined_with(
    raw_config: dict[str, Any], adapter: str, changes: dict[str, Any], message: str
) -> None:
    raw = raw_config | {"adapter": adapter}
    raw |= {key: {**raw.get(key, {}), **value} for key, value in changes.items()}
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config(raw))
    assert str(caught.value).startswith(message.format(adapter))
