"""APFL: each client's model lies between a copy that travels and one that stays."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    LABELS,
    LOCAL,
    SIZES,
    TOLERANCE,
    assert_states_close,
    federation,
    load_clip,
    rounds,
    variant,
)

from flora.client.personalization import Apfl
from flora.clip.adapters.base import Adapter, AttachedAdapter
from flora.clip.adapters.deep_prompts import Maple
from flora.clip.adapters.features import Norm
from flora.clip.adapters.generated import CoCoOp, FedTpg
from flora.clip.adapters.interpolated import OWN, SHARE, Interpolated
from flora.clip.adapters.lora import Lora
from flora.clip.adapters.prompts import PromptContext
from flora.clip.adapters.transport import Plot
from flora.clip.adapters.wrapper import AdapterWrapper
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.core.tree import State
from flora.data.batching import BatchSizes, client_batches
from flora.evaluation.local_only import own_adapters
from flora.export import merged_model
from flora.federated.federation import Federation
from flora.simulate import resume, simulate

LOCAL_SGD = dataclasses.replace(LOCAL, learning_rate=0.05)


def interpolated(path: str, personal: Apfl | None, adapter: Adapter) -> AdaptedClip:
    """The tiny model with an adapter, in two copies if there is a `personal`."""
    clip = dataclasses.replace(load_clip(path), reads_patches=adapter.comparison.reads_patches)
    attached = adapter.attach(clip)
    if personal is not None:
        attached = personal.added_to(attached)
    templates = adapter.templates(("a photo of a {}.",))
    return AdaptedClip(clip, attached, class_names=CLASSES, templates=templates)


def gradients(parts: Federation, model: AdaptedClip, at: State, batch: torch.Tensor) -> tuple[State, float]:
    """The gradient of one client's loss of a batch at an adapter, and the loss."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in at.items()}
    stem = parts.engine.features.take(batch, torch.device("cpu"))
    with model.adapter.bind({name: leaf.unsqueeze(0) for name, leaf in leaves.items()}):
        logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
    loss = F.cross_entropy(logits, LABELS[batch])
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), loss.item()


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize(
    ("personal", "adapter"),
    [(Apfl(alpha=0.3), Lora(rank=2)), (Apfl(alpha=0.6, adaptive=False), Norm()), (Apfl(alpha=0.98), PromptContext())],
    ids=["adaptive", "fixed", "at its bound"],
)
def test_apfl_as_the_paper_has_it(tiny_model: str, personal: Apfl, adapter: Adapter, per_block: int) -> None:
    """Algorithm 1 written out, one client at a time, on the plain adapter."""
    parts = federation(interpolated(tiny_model, personal, adapter), LOCAL_SGD, cohort=3, per_block=per_block)
    plain = interpolated(tiny_model, None, adapter)
    states, results = rounds(parts, 3)
    server = {name: tensor for name, tensor in states[0].adapter.items() if not parts.roles.stays(name)}
    begun = dict(server)
    kept: dict[int, tuple[State, float]] = {}
    for round in (1, 2, 3):
        rng = parts.rng.child("round", round)
        cohort = parts.participation.sampler.sample(parts.participation.sizes, 3, rng.child("cohort")).tolist()
        ends, losses = [], []
        for client in cohort:
            w, (v, alpha), total = server, kept.get(client, (begun, personal.alpha)), 0.0
            examples, num_steps = parts.clients[client].train, -(-SIZES[client] // 4)
            sizes = BatchSizes(4, 4, num_steps)
            for batch, real in zip(*client_batches(examples, rng.child("client", client), sizes), strict=True):
                by_w, loss = gradients(parts, plain, w, batch[real])
                mixture = {name: alpha * v[name] + (1 - alpha) * w[name] for name in w}
                at_mixture, own_loss = gradients(parts, plain, mixture, batch[real])
                by_alpha = sum(float(((v[name] - w[name]) * at_mixture[name]).sum()) for name in w)
                v = {name: v[name] - 0.05 * alpha * at_mixture[name] for name in v}
                w = {name: w[name] - 0.05 * by_w[name] for name in w}
                if personal.adaptive:
                    alpha = min(max(alpha - 0.05 * by_alpha, 0.0), 1.0)
                total += loss + own_loss
            kept[client] = v, alpha
            ends.append(w)
            losses.append(total / num_steps)
        weights = [SIZES[client] for client in cohort]
        server = tree.weighted_mean(ends, weights)
        assert_states_close({name: states[round].adapter[name] for name in server}, server)
        assert set(states[round].clients) == set(kept)
        for client, (v, alpha) in kept.items():
            own = states[round].clients[client].own
            assert_states_close({name: own[name + OWN] for name in v}, v)
            assert own.keys() - {name + OWN for name in v} == ({SHARE} if personal.adaptive else set())
            if personal.adaptive:
                assert float(own[SHARE]) == pytest.approx(alpha, abs=TOLERANCE)
        mean_loss = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert results[round - 1].train_loss == pytest.approx(mean_loss, abs=TOLERANCE)
    if personal.adaptive:
        assert any(alpha != personal.alpha for _, alpha in kept.values())
    for (client,), stack in own_adapters(variant(parts, clients_per_block=1), states[-1], np.array(sorted(kept))):
        v, alpha = kept[client]
        mixture = {name: alpha * v[name] + (1 - alpha) * server[name] for name in server}
        assert_states_close({name: tensor[0] for name, tensor in stack.items()}, mixture)


@pytest.mark.parametrize("adapter", [Lora(rank=2), CoCoOp(), FedTpg(), Plot(), Maple(depth=2)], ids=name_of)
def test_the_server_and_what_travels_are_as_without(tiny_model: str, adapter: Adapter) -> None:
    """Whatever stays and however the adapter works; what stays is never sent, and not counted."""
    seen: set[str] = set()

    def watch(round: int, update: ClientUpdate) -> ClientUpdate:
        seen.update(update.delta)
        return update

    local = dataclasses.replace(LOCAL_SGD, learning_rate=0.01)
    model, plain = interpolated(tiny_model, Apfl(), adapter), interpolated(tiny_model, None, adapter)
    ours, without = federation(model, local, hooks=Hooks(update=watch)), federation(plain, local)
    (*_, state), results = rounds(ours, 2)
    (*_, other_state), others = rounds(without, 2)
    assert_states_close({name: state.adapter[name] for name in other_state.adapter}, other_state.adapter)
    assert seen == set(other_state.adapter)
    for client, stack in ((each, own_adapters(ours, state, np.array([each]))) for each in range(5)):
        ((_, mixture),) = stack
        own = state.clients[client].own
        share = own[SHARE]
        for name, tensor in mixture.items():
            assert not torch.equal(own[name + OWN], state.adapter[name])
            torch.testing.assert_close(
                tensor[0], share * own[name + OWN] + (1 - share) * state.adapter[name], atol=TOLERANCE, rtol=0
            )
    for result, other in zip(results, others, strict=True):
        assert (result.uplink_bytes, result.downlink_bytes) == (other.uplink_bytes, other.downlink_bytes)
        if result.aggregation_error is not None:
            assert result.aggregation_error == pytest.approx(other.aggregation_error, abs=TOLERANCE)
    initial = ours.initial_state(ours.engine.model.initial_adapter(Rng(1))).adapter
    assert all(torch.equal(state.adapter[name], initial[name]) for name in initial if ours.roles.stays(name))


def test_a_wrapper_hands_on_all_that_adapters_have() -> None:
    """Every name of their base class, one that is added to it as well."""
    inner = Mock()
    wrapper = AdapterWrapper(inner)
    for name in vars(AttachedAdapter).keys() | AttachedAdapter.__annotations__.keys():
        if name.startswith("_"):
            continue
        method, given = inspect.getattr_static(AttachedAdapter, name, None), getattr(inner, name)
        if not inspect.isfunction(method):
            assert getattr(wrapper, name) is given, name
            continue
        arguments = [object() for _ in list(inspect.signature(method).parameters)[1:]]
        assert getattr(wrapper, name)(*arguments) is given.return_value, name
        given.assert_called_once_with(*arguments)


def halve(stack: tree.StateLike, learning_rate: float | torch.Tensor) -> None:
    for tensor in stack.values():
        tensor.mul_(0.5)


def test_what_an_adapter_does_after_steps_is_done_with_both_copies(tiny_model: str) -> None:
    inner = Lora(rank=2).attach(load_clip(tiny_model))
    inner.after_step = halve
    attached = Interpolated(inner, 0.5, learns_share=True)
    stack = tree.expand(attached.initial_state(Rng(0)), 2)
    stack = {name: tensor.clone() for name, tensor in stack.items()}
    before = {name: tensor.clone() for name, tensor in stack.items()}
    stack[SHARE][:] = torch.tensor([-0.1, 1.2], dtype=torch.float64)
    assert attached.after_step is not None
    attached.after_step(stack, 0.1)
    assert stack[SHARE].tolist() == [0.0, 1.0]
    assert all(torch.equal(stack[name], 0.5 * before[name]) for name in stack if name != SHARE)


@pytest.mark.parametrize(
    "changes", [{}, {"adapter": "vision_and_head", "personal": {"name": "apfl", "adaptive": False}}]
)
def test_a_run_goes_on_and_can_be_merged(raw_config: dict[str, Any], changes: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 4, "personal": "apfl",
           "clients": {"number": 4, "cohort": {"number": 2}, "holdout_fraction": 0.5}, **changes}  # fmt: skip
    whole = simulate(parse_config({**raw, "name": "whole"}))
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=4"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    assert (rest.directory / "clients.csv").read_bytes() == (whole.directory / "clients.csv").read_bytes()
    assert rest.summary.personal_accuracy_mean == whole.summary.personal_accuracy_mean is not None
    if not changes:
        own, server = (merged_model(rest.directory, client=client).weights for client in ("0", None))
        assert own.keys() == server.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"strategy": "plora"}},
         "personal: apfl can't be used, because some of the adapter's tensors stay with their clients anyway"),
        ({"adapter": "promptfolio"},
         "personal: apfl can't be used, because some of the adapter's tensors stay with their clients anyway"),
        ({"local": {"clip_norm": 1.0}}, "personal: apfl can't be used with local.clip_norm, local.privacy or "
         "local.correction, which would make the step of what travels depend on what stays"),
        ({"server": {"strategy": "hetlora"}, "clients": {"ranks": {"name": "drawn", "values": [1, 2]}}},
         "clients.ranks: expected none, because the copies of apfl have all ranks"),
        ({"adapter": {"name": "lora", "start": "somewhere"}},
         "adapter.start: expected none, because the copies of apfl begin where an adapter without a file does"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_copies_is_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, "personal": "apfl", **changes}))
    assert str(caught.value) == message
