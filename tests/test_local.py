"""K clients in one step train exactly as each would alone, and as plain PyTorch on plain OpenCLIP would train it."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LABELS,
    PIXELS,
    SIZES,
    TEXTS,
    TOLERANCE,
    adapt,
    assert_states_close,
    federation,
    load_plain,
    run,
    start,
    train,
)

from flora.client.local_training import LocalTraining
from flora.client.objectives import Contrastive, CrossEntropy, MultiPositive, Objective
from flora.client.optimizers import Adam, AdamW, Cosine, Sgd
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.core.tree import State
from flora.data.batching import BatchSizes, client_batches
from flora.engine.gradients import FlatStack
from flora.evaluation.local_only import train_local_only
from flora.federated.round import run_round

LOCALS = {
    "sgd, momentum, decay, clipping": LocalTraining(
        learning_rate=0.5, batch_size=4, epochs=2, clip_norm=0.05, optimizer=Sgd(momentum=0.9, weight_decay=0.1)
    ),
    "adamw, kept, cosine": LocalTraining(
        batch_size=4, optimizer=AdamW(weight_decay=0.2, eps=1e-4), optimizer_state="kept", schedule=Cosine()
    ),
    "adam, steps, contrastive": LocalTraining(
        batch_size=4, steps=3, optimizer=Adam(eps=1e-4, weight_decay=0.1), objective=Contrastive()
    ),
    "sgd, kept though there is nothing to keep": LocalTraining(
        batch_size=5, optimizer=Sgd(), optimizer_state="kept", learning_rate=0.1
    ),
    "multi-positive": LocalTraining(batch_size=5, learning_rate=0.1, optimizer=Sgd(), objective=MultiPositive()),
}


@cache
def one_after_another(model_path: str, towers: tuple[str, ...], local: LocalTraining) -> ServerState:
    return run(model_of(model_path, towers), local, per_block=1)


def model_of(path: str, towers: tuple[str, ...]) -> AdaptedClip:
    return adapt(path, Lora(towers=towers, targets=TARGETS, dropout=0.1))


@pytest.mark.parametrize("per_block", [2, 3, 5])
@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS.keys())
@pytest.mark.parametrize("towers", [("text",), ("vision",), ("text", "vision")], ids="-".join)
def test_the_number_of_clients_per_block_changes_nothing(tiny_model, towers, local, per_block: int) -> None:  # type: ignore[no-untyped-def]
    model, alone = model_of(tiny_model, towers), one_after_another(tiny_model, towers, local)
    together = run(model, local, per_block=per_block)
    moved = max((alone.adapter[name] - tensor).abs().max().item() for name, tensor in start(model).adapter.items())
    assert moved > 1e-3
    assert_states_close(alone.adapter, together.adapter)
    assert alone.clients.keys() == together.clients.keys()
    for client in alone.clients:
        assert_states_close(alone.clients[client].optimizer, together.clients[client].optimizer)


ANIMALS = tuple(
    f"{size} {animal}" for size in ("small", "rather large") for animal in ("cat", "dog", "tree frog", "ox")
)
ALL_OFF = SpeedOptions(cut_prompts=False, share_prefixes=False, trim_last_block=False, batch_classes=False)


@cache
def rounds_with(model_path: str, speed: SpeedOptions, towers: tuple[str, ...], objective: Objective) -> State:
    """The adapter after two rounds, with these of the cuts."""
    local = LocalTraining(batch_size=5, learning_rate=0.1, optimizer=Sgd(), objective=objective)
    model = adapt(
        model_path,
        Lora(towers=towers, targets=TARGETS),
        class_names=ANIMALS,
        templates=("a photo of a {}.", "{}"),
        speed=speed,
    )
    return run(model, local, per_block=3).adapter


@pytest.mark.parametrize("objective", [CrossEntropy(), Contrastive(), MultiPositive()])
@pytest.mark.parametrize("towers", [("text",), ("vision",), ("text", "vision")], ids="-".join)
@pytest.mark.parametrize("switch", ["all on", *(field.name for field in dataclasses.fields(SpeedOptions))])
def test_every_cut_gives_the_same_adapter(tiny_model, switch, towers, objective) -> None:  # type: ignore[no-untyped-def]
    speed = SpeedOptions() if switch == "all on" else SpeedOptions(**{switch: False})
    plain, found = (rounds_with(tiny_model, each, towers, objective) for each in (ALL_OFF, speed))
    begin = start(adapt(tiny_model, Lora(towers=towers, targets=TARGETS))).adapter
    assert max((plain[name] - tensor).abs().max().item() for name, tensor in begin.items()) > 1e-3
    assert_states_close(plain, found)


def test_the_same_seed_twice_is_the_same_bit_for_bit(tiny_model: str) -> None:
    local = LOCALS["adamw, kept, cosine"]
    states = [run(adapt(tiny_model, Lora(dropout=0.2)), local, per_block=3, cohort=4) for _ in range(2)]
    assert all(torch.equal(states[0].adapter[name], states[1].adapter[name]) for name in states[0].adapter)


@pytest.mark.parametrize("towers", [("text",), ("vision",)], ids="-".join)
def test_a_round_equals_plain_pytorch_on_a_plain_openclip_model(tiny_model: str, towers: tuple[str, ...]) -> None:
    """The oracle merges W + s B A by autograd into plain OpenCLIP, pads prompts to 77 tokens, runs both towers."""
    lora = Lora(towers=towers, targets=("q", "v", "proj"), rank=3, alpha=6)
    model = adapt(tiny_model, lora)
    local = LocalTraining(
        learning_rate=0.3, batch_size=4, clip_norm=0.5, optimizer=Sgd(momentum=0.9, weight_decay=0.01)
    )
    parts, state = federation(model, local, per_block=5), start(model)
    ours, _ = run_round(parts, state)

    plain = load_plain(tiny_model)
    frozen = {name: tensor.detach() for name, tensor in plain.model.named_parameters()}
    tokens = plain.tokenize(TEXTS)

    def plain_loss(adapter: tree.State, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights = dict(frozen)
        for name in {key.rpartition(".")[0] for key in adapter}:
            tower, block, target = name.split(".")
            prefix = ("visual." if tower == "vision" else "") + f"transformer.resblocks.{block}."
            key = prefix + ("mlp.c_proj.weight" if target == "proj" else "attn.in_proj_weight")
            delta = 2.0 * adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]
            zero = torch.zeros(32, 32)
            if target != "proj":
                delta = torch.cat([delta, zero, zero] if target == "q" else [zero, zero, delta])
            weights[key] = weights[key] + delta
        images, texts, scale = torch.func.functional_call(plain.model, weights, (pixels, tokens))
        return F.cross_entropy(scale * images @ texts.T, labels)

    plain.model.train()  # OpenCLIP has no dropout here; its evaluation fast path has no gradient
    deltas = []
    for client, data in enumerate(parts.clients):
        adapter = {name: tensor.clone().requires_grad_() for name, tensor in state.adapter.items()}
        optimizer = torch.optim.SGD(adapter.values(), lr=0.3, momentum=0.9, weight_decay=0.01)
        rng = parts.rng.child("round", 1).child("client", client)
        steps = -(-len(data.train) // 4)
        indices, mask = client_batches(data.train, rng, BatchSizes(4, 4, steps))
        for batch, real in zip(indices, mask, strict=True):
            optimizer.zero_grad()
            plain_loss(adapter, PIXELS[batch[real]], LABELS[batch[real]]).backward()
            torch.nn.utils.clip_grad_norm_(list(adapter.values()), 0.5)
            optimizer.step()
        deltas.append({name: (tensor - state.adapter[name]).detach() for name, tensor in adapter.items()})
    total = sum(SIZES)
    for name, before in state.adapter.items():
        expected = before + sum(size / total * delta[name] for size, delta in zip(SIZES, deltas, strict=True))
        assert (expected - before).abs().max() > 1e-4
        torch.testing.assert_close(ours.adapter[name], expected, atol=TOLERANCE, rtol=0)


def test_full_fine_tuning_equals_plain_pytorch(tiny_model: str) -> None:
    model = adapt(tiny_model, FullFineTuning())
    frozen_before = {name: tensor.clone() for name, tensor in model.clip.model.state_dict().items()}
    local = LocalTraining(learning_rate=1e-3, batch_size=40, optimizer=AdamW(weight_decay=0.1, eps=1e-4), steps=2)
    state = start(model)
    alone = train_local_only(federation(model, local), state.adapter, np.array([2]), advance=lambda done: None)
    plain = load_plain(tiny_model)
    for parameter in plain.model.parameters():
        parameter.requires_grad_(True)
    plain.model.train()
    tokens, rows = plain.tokenize(TEXTS), slice(17, 26)  # client 2 holds one batch of nine examples
    for _ in range(3):  # rounds; the optimiser starts fresh in each
        optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-4)
        for _ in range(2):
            images, texts, scale = plain.model(PIXELS[rows], tokens)
            optimizer.zero_grad()
            F.cross_entropy(scale * images @ texts.T, LABELS[rows]).backward()
            optimizer.step()
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(
            alone[name][0], parameter.detach(), atol=TOLERANCE, rtol=0, msg=lambda text, name=name: name + text
        )
    for name, tensor in model.clip.model.state_dict().items():
        assert torch.equal(tensor, frozen_before[name])


@pytest.mark.parametrize("adapter", [Lora(towers=("text", "vision"), targets=TARGETS), FullFineTuning()])
def test_training_never_writes_to_a_frozen_weight(tiny_model: str, adapter) -> None:  # type: ignore[no-untyped-def]
    model = adapt(tiny_model, adapter)
    before = {name: tensor.clone() for name, tensor in model.clip.model.state_dict().items()}
    run(model, LocalTraining(learning_rate=0.1, batch_size=4, optimizer=Sgd()))
    after = model.clip.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_client_alone_ends_where_a_federation_of_one_does(tiny_model: str) -> None:
    model = adapt(tiny_model)
    local = LocalTraining(learning_rate=0.1, batch_size=8, optimizer=Sgd(momentum=0.5), steps=2)
    parts = federation(model, local)
    alone = train_local_only(parts, start(model).adapter, np.array([4]), advance=lambda done: None)
    # All six examples make one batch, so the order of examples, which has its own stream, doesn't matter.
    adapter = start(model).adapter
    for round in range(1, 4):
        rng = Rng(99).child(round)
        adapter = train(parts, {4: adapter}, round=round, rng=rng)[4].adapter
    assert_states_close(tree.unstack(alone)[0], adapter)


def test_flat_stack_shares_memory_with_its_leaves() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0).view(2, 1, 2), "c": torch.tensor([1.0, 2.0])}
    flat = FlatStack(state, torch.device("cpu"))
    assert flat.matrix.shape == (2, 6)
    adapter, leaves = flat.leaves(flat.matrix[:1])
    flat.matrix.zero_()
    assert all(tensor.count_nonzero() == 0 and tensor.requires_grad for tensor in adapter.values())
    assert all(leaf is tensor for leaf, tensor in zip(leaves, adapter.values(), strict=True))
    assert {name: tuple(tensor.shape) for name, tensor in adapter.items()} == {"a": (1, 3), "b": (1, 1, 2), "c": (1,)}
    assert state["a"][1, 2] == 5  # the input is left alone


def test_flat_stack_puts_what_is_trained_first() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0).view(2, 2), "c": torch.tensor([1.0, 2.0])}
    flat = FlatStack(state, torch.device("cpu"), trained={"c", "b"})
    assert flat.num_trained == 3
    assert flat.matrix.tolist() == [[0, 1, 1, 0, 1, 2], [2, 3, 2, 3, 4, 5]]
    rows = flat.trained_rows(flat.matrix)
    assert [{name: tensor.tolist() for name, tensor in row.items()} for row in rows] == [
        {"b": [0, 1], "c": 1}, {"b": [2, 3], "c": 2}
    ]  # fmt: skip
    adapter, leaves = flat.leaves(flat.matrix)
    assert all(torch.equal(adapter[name], state[name]) for name in state)
    assert [adapter[name].requires_grad for name in ("a", "b", "c")] == [False, True, True] and len(leaves) == 2


def test_divergence_is_noticed_at_its_step(tiny_model: str) -> None:
    local = LocalTraining(learning_rate=1e200, batch_size=4, optimizer=Sgd(), epochs=3)
    parts = federation(adapt(tiny_model), local, per_block=5)
    state, result = run_round(parts, start(parts.engine.model))
    # The first step goes too far; the gradient of the second is the first that is not finite.
    assert [(each.client, each.step, each.reason) for each in result.rejected_clients] == [
        (client, 1, "not finite") for client in range(5)
    ]
    assert result.train_loss is None
    assert_states_close(state.adapter, start(parts.engine.model).adapter, atol=0)


def test_cross_entropy_is_what_the_oracle_uses() -> None:
    assert LocalTraining().objective == CrossEntropy()
