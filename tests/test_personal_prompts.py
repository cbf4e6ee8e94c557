"""Contexts of which a part stays with its client, against one client at a time on plain OpenCLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LABELS,
    PIXELS,
    TOLERANCE,
    adapt,
    assert_equal_to_a_plain_loop,
    assert_states_close,
    federation,
    load_plain,
    plain_classes,
    train,
)
from helpers import rounds as several_rounds
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.clip.adapters.personal_prompts import DpFpl, FedPgp, PromptFolio
from flora.clip.adapters.prompts import PromptContext
from flora.core.rng import Rng
from flora.core.tree import State
from flora.privacy.examples import ExamplePrivacy

PGP = FedPgp(bottleneck=2, contrast=0.7, temperature=0.4)
FOLIO = PromptFolio(share=0.3)
FPL = DpFpl(words="a photo of a")


def pgp_loss(leaves: State, encode: Callable[[Tensor | None], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    own = encode(leaves["context"] + leaves["local_U"] @ leaves["local_V"])
    shared, frozen = encode(leaves["context"]), encode(None)
    near, far = ((shared * each).sum(dim=-1).div(0.4).exp() for each in (frozen, own))
    contrast = -(near / (near + far)).log().mean()
    return F.cross_entropy(images @ own.T, labels) + 0.7 * contrast


def folio_loss(leaves: State, encode: Callable[[Tensor | None], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    mixed = 0.7 * encode(leaves["context"]) + 0.3 * encode(leaves["local_context"])
    return F.cross_entropy(images @ mixed.T, labels)  # as it is: its norm is below 1


@pytest.mark.parametrize(("method", "loss_of"), [(PGP, pgp_loss), (FOLIO, folio_loss)], ids=["fedpgp", "promptfolio"])
def test_rounds_equal_a_plain_loop(tiny_model: str, method: PromptContext, loss_of: Callable[..., Tensor]) -> None:
    model, whole = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    whole.model.requires_grad_(False)
    images = model.logit_scale() * model.image_features(model.vision.stem(PIXELS), 1)[0].detach()

    def loss(state: State, examples: np.ndarray) -> Tensor:
        return loss_of(state, partial(plain_classes, whole), images[examples], LABELS[examples])

    first, _ = assert_equal_to_a_plain_loop(model, loss, epochs=3, stays=lambda name: name.startswith("local_"))
    assert {name for name in first if not name.startswith("local_")} == {"context"}


@pytest.mark.parametrize("changes", [{}, {"class_specific": True, "position": "middle"}], ids=["one", "of each class"])
@pytest.mark.parametrize("method", [PGP, FOLIO, FPL], ids=["fedpgp", "promptfolio", "dp_fpl"])
def test_the_servers_model_has_the_shared_context_alone(
    tiny_model: str, method: PromptContext, changes: dict[str, Any]
) -> None:
    method = dataclasses.replace(method, **changes)
    model = adapt(tiny_model, method, templates=method.templates(()))
    shared = PromptContext(class_specific=method.class_specific, position=method.position)
    plain = adapt(tiny_model, shared, templates=shared.templates(()))
    generator = torch.Generator().manual_seed(0)
    stack = {
        name: tensor + 0.1 * torch.randn((2, *tensor.shape), generator=generator, dtype=tensor.dtype)
        for name, tensor in model.initial_adapter(Rng(0)).items()
    }
    server, own = model.adapter.models(stack)
    with torch.no_grad():
        with plain.adapter.bind({"context": stack["context"]}):
            expected = plain.class_features(2)
        with model.adapter.bind(server):
            features = model.comparison.means(model.class_features(2))
            torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)
        with model.adapter.bind(own):
            assert (model.comparison.means(model.class_features(2)) - expected).abs().max() > 1e-4


# DP-FPL


def factors(own: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One power iteration: u `(n, r)` with orthonormal columns and v `(r, width)` with orthonormal rows."""
    start = torch.empty(own.shape[1], min(rank, len(own))).normal_(generator=generator).double()
    u = gram_schmidt(own @ start)
    return u, gram_schmidt(own.T @ u).T


def gram_schmidt(matrix: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for column in matrix.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize(("rank", "words"), [(2, None), (9, "a photo of a")], ids=["low rank", "all of it"])
def test_dp_fpl_equals_a_plain_loop(tiny_model: str, rank: int, words: str | None, per_block: int) -> None:
    """The gradients by u and v, by autograd, and what they come to for the context that they are factors of."""
    method = DpFpl(words=words, num_tokens=4, rank=rank)
    model, whole = adapt(tiny_model, method, templates=method.templates(())), load_plain(tiny_model)
    whole.model.requires_grad_(False)
    local = LocalTraining(learning_rate=1e-3, batch_size=100, epochs=3, optimizer=Sgd(momentum=0.9))
    parts, begin = federation(model, local, per_block=per_block), model.initial_adapter(Rng(1))
    results = train(parts, dict.fromkeys(range(5), begin), round=1, rng=Rng(0))
    scale = whole.model.logit_scale.exp()  # type: ignore[operator]
    for client, data in enumerate(parts.clients):
        stream = parts.task(client, begin, parts.setup(1, tuple(begin)), Rng(0)).rng
        now = {name: tensor.clone() for name, tensor in begin.items()}
        momentum = {name: torch.zeros_like(tensor) for name, tensor in begin.items()}
        stem = parts.engine.features.take(torch.from_numpy(data.train), torch.device("cpu"))
        images = scale * model.image_features(stem, 1)[0].detach()
        for step in range(3):
            u, v = factors(now["local_context"], rank, stream.child("projection", step).torch())
            leaves = [each.clone().requires_grad_() for each in (now["context"], u, v)]
            rest = now["local_context"] - u @ v
            texts = plain_classes(whole, leaves[0] + leaves[1] @ leaves[2] + rest)
            loss = F.cross_entropy(images @ texts.T, LABELS[data.train])
            by_context, by_u, by_v = torch.autograd.grad(loss, leaves)
            gradients = {"context": by_context, "local_context": by_u @ v + u @ by_v - u @ u.T @ by_u @ v}
            for name, gradient in gradients.items():
                momentum[name] = 0.9 * momentum[name] + gradient
                now[name] = now[name] - 1e-3 * momentum[name]
        assert_states_close(results[client].adapter, now)


def test_in_dp_fpl_one_context_stays(tiny_model: str) -> None:
    method, alone = DpFpl(num_tokens=4), PromptContext(words=None, num_tokens=4)
    local = LocalTraining(learning_rate=1e-3, batch_size=100, optimizer=Sgd())
    model, plain = (adapt(tiny_model, each, templates=each.templates(())) for each in (method, alone))
    states, results = several_rounds(federation(model, local), 2)
    assert results[0].uplink_bytes == several_rounds(federation(plain, local), 1)[1][0].uplink_bytes
    assert torch.equal(states[2].adapter["local_context"], states[0].adapter["local_context"])
    owns = [states[2].clients[client].own for client in range(5)]
    assert all(own.keys() == {"local_context"} for own in owns)
    assert not torch.equal(owns[0]["local_context"], owns[1]["local_context"])


@pytest.mark.parametrize("class_specific", [False, True])
def test_noise_reaches_no_more_than_the_low_rank_part(tiny_model: str, class_specific: bool) -> None:
    """With privacy, a step is what remains of that without factors: of the gradients and of their noise."""
    privacy = ExamplePrivacy(clip_norm=0.5, noise_multiplier=3.0, accountant="rdp")
    local = LocalTraining(learning_rate=0.1, batch_size=4, steps=1, optimizer=Sgd(), privacy=privacy)
    moves: dict[int, list[State]] = {}
    for rank in (2, 6):  # of six vectors, so that the second one is the whole gradient
        method = DpFpl(num_tokens=6, rank=rank, class_specific=class_specific)
        model = adapt(tiny_model, method, templates=method.templates(()))
        parts, begin = federation(model, local, per_block=5), model.initial_adapter(Rng(1))
        found = train(parts, dict.fromkeys(range(5), begin), round=1, rng=Rng(0))
        moves[rank] = [
            {name: found[client].adapter[name] - tensor for name, tensor in begin.items()} for client in range(5)
        ]
    for client in range(5):
        stream = parts.task(client, begin, parts.setup(1, tuple(begin)), Rng(0)).rng
        low, whole = moves[2][client], moves[6][client]
        torch.testing.assert_close(low["context"], whole["context"], atol=TOLERANCE, rtol=0)
        owns = begin["local_context"].reshape(-1, 6, 32)
        steps = (each["local_context"].reshape(-1, 6, 32) for each in (low, whole))
        for own, found_step, full in zip(owns, *steps, strict=True):
            u, v = factors(own, 2, stream.child("projection", 0).torch())
            left = (torch.eye(6, dtype=torch.float64) - u @ u.T) @ full @ (torch.eye(32, dtype=torch.float64) - v.T @ v)
            torch.testing.assert_close(found_step, full - left, atol=TOLERANCE, rtol=0)
            assert left.norm() > 0.1 * full.norm()
