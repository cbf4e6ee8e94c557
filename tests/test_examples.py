"""Private gradients of single examples: exact against a loop over examples, bounded, noisy, and counted."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import several
import torch
import torch.nn.functional as F
import yaml
from helpers import SIZES, TOLERANCE, adapt, assert_states_close, comparable, federation, rounds, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flora.client.corrections import FedProx
from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.client.penalties import Anchor, Distillation, NoPenalty, Penalty
from flora.client.personalization import Ditto, FineTuning
from flora.client.sampling import LocalExamples, Poisson
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.deep_prompts import Maple, PromptSrc
from flora.clip.adapters.dual_lora import DualLora
from flora.clip.adapters.features import AttentionAdapter, ClipAdapter, Norm
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.generated import CoCoOp, FedTpg
from flora.clip.adapters.heads import LinearHead, LpPlusPlus, TaskRes, VisionAndHead
from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.adapters.multimodal import PFedMma
from flora.clip.adapters.personal_prompts import DpFpl, FedPgp, PromptFolio
from flora.clip.adapters.prompt_distribution import ProDa
from flora.clip.adapters.prompts import PromptContext
from flora.clip.adapters.transport import FedOtp, Plot
from flora.clip.adapters.visual_prompts import VisualPrompt
from flora.clip.loss_terms import StepView, divergence
from flora.clip.towers.towers import AdaptedClip
from flora.communication.network import CohortOutcome
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import components, name_of
from flora.core.rng import Rng
from flora.core.states import ClientState, ClientUpdate
from flora.core.tree import State
from flora.data.batching import BatchSizes
from flora.engine import capacity, examples
from flora.engine.batch import Batch
from flora.engine.capacity import examples_at_once
from flora.engine.examples import bounded_gradient_function
from flora.engine.gradients import FlatStack, Loss
from flora.evaluation.local_only import train_local_only
from flora.federated.exposure import count_releases, exposures
from flora.federated.federation import Federation
from flora.privacy.accounting import spent_epsilon
from flora.privacy.examples import ExamplePrivacy, Exposure
from flora.simulate import main, simulate

ADAPTERS: dict[str, Adapter] = {
    "text": Lora(rank=2),
    "vision": Lora(rank=2, towers=("vision",)),
    "both": Lora(rank=2, towers=("text", "vision"), targets=TARGETS),
    "two adapters": DualLora(rank=2, local_rank=3, towers=("text", "vision")),
    "prompts": PromptContext(),
    "prompts of classes": PromptContext(class_specific=True, position="middle"),
    "a change that stays": FedPgp(bottleneck=2),
    "prompts that stay": PromptFolio(),
    "prompts that move by low ranks": DpFpl(num_tokens=4),
    "transport": Plot(num_prompts=2),
    "transport that stays": FedOtp(),
    "generated prompts": FedTpg(names="all"),
    "prompts of images": CoCoOp(reduction=4),
    "a distribution of prompts": ProDa(),
    "visual prompts": VisualPrompt(num_tokens=2, depth=2),
    "deep prompts, coupled": Maple(),
    "deep prompts, held": PromptSrc(num_tokens=2, num_image_tokens=3),
    "bottlenecks": PFedMma(rank=3, scale=0.1),
    "head": LinearHead(),
    "residual of texts": TaskRes(),
    "head beside texts": LpPlusPlus(),
    "feature adapter": ClipAdapter(),
    "attention": AttentionAdapter(),
    "norm": Norm(),
    "full": FullFineTuning(),
    "vision and head": VisionAndHead(),
}
LARGE = ("full", "vision and head")
PRIVATE = ExamplePrivacy(clip_norm=0.7, noise_multiplier=0.8, accountant="rdp")
LOCAL = LocalTraining(learning_rate=0.1, batch_size=4, optimizer=Sgd(), privacy=PRIVATE)


def test_every_adapter_is_among_these() -> None:
    shipped = {each for each in components(Adapter).values() if each.__module__.startswith("flora.")}
    assert {type(adapter) for adapter in ADAPTERS.values()} == shipped


def random_stack(model: AdaptedClip, number: int) -> State:
    """Adapters `(K, ...)` that are no longer what they began as."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: tensor + 0.3 * torch.randn((number, *tensor.shape), generator=generator).to(tensor.dtype)
        for name, tensor in model.initial_adapter(Rng(0)).items()
    }


def batch_of(model: AdaptedClip, mask: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(5)
    number, size = mask.shape
    pixels = torch.randn(number * size, 3, 16, 16, generator=generator).double()
    labels = torch.randint(3, (number, size), generator=generator)
    return Batch({"stem": model.vision.stem(pixels), "labels": labels, "example_mask": mask})


def plain_gradient(model: AdaptedClip, state: State, stem: Tensor, label: int) -> Tensor:
    """The gradient `(P,)` of one example's loss, by plain autograd: the loss written out."""
    leaves = {name: tensor.detach().clone().unsqueeze(0).requires_grad_() for name, tensor in state.items()}
    target, logits = torch.tensor([label]), []
    for bound in model.adapter.models_of_step(leaves):
        with model.adapter.bind(bound):
            images, classes = model.image_features(stem.unsqueeze(0), 1), model.class_features(1)
            logits.append((model.logits(stem.unsqueeze(0), classes)[0], classes[0]))
    loss = sum(F.cross_entropy(each, target) for each, _ in logits[model.adapter.first_loss_model :])
    if model.adapter.first_loss_model:  # FedPGP: towards the frozen classes, away from the client's own
        (_, shared), (_, own) = logits
        to_frozen, to_own = (shared * model.frozen_class_features()).sum(dim=1), (shared * own).sum(dim=1)
        loss = loss + F.softplus((to_own - to_frozen) / 0.5).mean()
    elif model.adapter.comparison.reads_prompts:  # ProDA: its bound, and cosines of prompts without names
        batch = {"labels": target.unsqueeze(0), "example_mask": torch.ones(1, 1, dtype=torch.bool)}
        view = StepView(images, classes, model.logit_scale(), batch, comparison=model.adapter.comparison)
        loss = loss + sum(term.loss(view).sum() for term in model.adapter.loss_terms)
    elif len(logits) == 2:  # both learn from the other's probabilities
        for (own, _), (other, _) in (logits, logits[::-1]):
            loss = loss + divergence(own.unsqueeze(0), other.detach().unsqueeze(0), 1.0).sum()
    if model.adapter.frozen_templates is not None:  # PromptSRC: near the frozen features and probabilities
        with torch.no_grad():
            frozen_image, frozen = model.image_features(stem.unsqueeze(0), 1)[0], model.frozen_class_features()
            target = (model.logit_scale() * frozen_image @ frozen.T).softmax(dim=-1)
        loss = loss + 25 * (classes - frozen).abs().mean() + 10 * (images - frozen_image).abs().mean()
        loss = loss + (target * (target.log() - logits[0][0].log_softmax(dim=-1))).mean()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


def plain_sum(model: AdaptedClip, state: State, stems: Sequence[Tensor], labels: Sequence[int]) -> Tensor:
    """The sum of bounded gradients `(P,)`, by a loop over single examples."""
    total = torch.zeros(tree.count(state), dtype=torch.float64)
    for stem, label in zip(stems, labels, strict=True):
        gradient = plain_gradient(model, state, stem, label)
        total += gradient * min(1.0, PRIVATE.clip_norm / float(gradient.norm()))
    return total


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_bounded_gradients_are_those_of_a_loop_over_examples(
    tiny_model: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of clients, and however the examples are cut into parts."""
    model = adapt(tiny_model, ADAPTERS[adapter], templates=ADAPTERS[adapter].templates(("a photo of a {}.",)))
    number = 1 if adapter in LARGE else 5
    mask = torch.tensor(
        [[True, True, True], [True, False, False], [False, False, False], [True, True, False], [True] * 3]
    )
    stack, batch = random_stack(model, number), batch_of(model, mask[:number])
    stems, labels = batch.tensors["stem"].unflatten(0, (number, 3)), batch.tensors["labels"]
    expected = []
    for row, state in enumerate(tree.unstack(stack)):
        chosen = mask[row]
        expected.append(plain_sum(model, state, list(stems[row, chosen]), labels[row, chosen].tolist()))
    loss = Loss.of(LOCAL, model.adapter)
    for clients in (1, 2, 5)[: 1 if adapter in LARGE else 3]:
        for at_once in (1, 2, 6, 100)[: 1 if adapter in LARGE else 4]:
            monkeypatch.setattr(examples, "examples_at_once", lambda model, num_trained, at_once=at_once: at_once)
            some = {name: tensor[:clients] for name, tensor in stack.items()}
            flat = FlatStack(some, model.device)
            compute = bounded_gradient_function(model, loss, flat, PRIVATE, {})
            losses, sums = compute(flat.matrix, batch.of_clients(0, clients))
            torch.testing.assert_close(sums, torch.stack(expected[:clients]), atol=TOLERANCE, rtol=0)
            assert torch.isfinite(losses).all()


@pytest.mark.parametrize("draws", [False, True], ids=["all prompts", "drawn ones"])
@pytest.mark.parametrize("adapter", ["head", "feature adapter", "attention"])
def test_heads_and_feature_adapters_make_no_gradient_of_an_example(
    tiny_model: str, adapter: str, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their closed form is what the gradients give, whichever of the tensors are trained."""
    model = adapt(tiny_model, ADAPTERS[adapter], templates=("a photo of a {}.", "the {}."))
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    stack, batch, loss = random_stack(model, 3), batch_of(model, mask), Loss.of(LOCAL, model.adapter)
    if draws:
        batch = dataclasses.replace(batch, drawn=model.draw_places(Rng(client) for client in range(3)))
    assert loss.from_logits
    for trained in (None, *((name,) for name in stack)):
        flat = FlatStack(stack, model.device, trained)
        by_gradients = bounded_gradient_function(
            model, dataclasses.replace(loss, from_logits=False), flat, PRIVATE, {}
        )(flat.matrix, batch)
        with monkeypatch.context() as patch:
            patch.setattr(ExamplePrivacy, "clipped_sums", lambda *tensors: pytest.fail("it made gradients of examples"))
            found = bounded_gradient_function(model, loss, flat, PRIVATE, {})(flat.matrix, batch)
        for one, other in zip(found, by_gradients, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)
        assert found[1].shape == (3, flat.num_trained) and not found[1][2].any()


@pytest.mark.parametrize("penalty", [Anchor(weight=0.5), Distillation(weight=0.5)], ids=name_of)
def test_with_a_penalty_they_do(tiny_model: str, penalty: Penalty) -> None:
    model = adapt(tiny_model, LinearHead())
    assert not Loss.of(dataclasses.replace(LOCAL, penalty=penalty), model.adapter).from_logits


def test_as_many_examples_go_in_at_once_as_caches_and_memory_are_good_for(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, full = adapt(tiny_model, Lora(towers=("vision",))), adapt(tiny_model, FullFineTuning())
    assert examples_at_once(full, num_trained=10**6) == 1
    # Five tokens of width 32 are an example's residual stream; 20 numbers of each are kept in two blocks, 8 bytes each.
    monkeypatch.setattr(capacity, "MAX_STREAM_ON_CPU", 7 * 5 * 32 + 1)
    assert examples_at_once(vision, num_trained=1) == 7
    activations, gradient = 8 * 20 * 2 * 5 * 32, 8 * 4 * 1000
    monkeypatch.setattr(capacity, "MAX_EXAMPLE_BYTES_ON_CPU", 3 * (activations + gradient) + 1)
    assert examples_at_once(vision, num_trained=1000) == 3
    monkeypatch.setattr(capacity, "MAX_EXAMPLE_BYTES_ON_CPU", 0)
    assert examples_at_once(vision, num_trained=1000) == 1


@given(
    clip_norm=st.floats(1e-3, 1e3),
    scales=st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_an_example_adds_no_more_than_the_bound(clip_norm: float, scales: list[float], seed: int) -> None:
    """With and without any one example, sums are at most the bound apart; short gradients stay as they are."""
    privacy = dataclasses.replace(PRIVATE, clip_norm=clip_norm)
    directions = torch.randn(1, len(scales), 7, generator=torch.Generator().manual_seed(seed)).double()
    gradients = directions * torch.tensor(scales, dtype=torch.float64)[:, None]
    mask = torch.ones(1, len(scales), dtype=torch.bool)
    whole = privacy.clipped_sums(gradients, mask)
    for place in range(len(scales)):
        without = mask.clone()
        without[0, place] = False
        broken = gradients.clone()
        broken[0, place] = torch.nan  # what is masked counts nothing, whatever it is
        difference = whole - privacy.clipped_sums(broken, without)
        assert float(difference.norm()) <= clip_norm * (1 + 1e-9) + 1e-9 * float(whole.norm())
    short = gradients[0].norm(dim=1) <= clip_norm
    torch.testing.assert_close(
        privacy.clipped_sums(gradients, short.unsqueeze(0))[0], gradients[0, short].sum(dim=0), atol=1e-9, rtol=1e-9
    )


# Local training


def plain_training(model: AdaptedClip, local: LocalTraining, state: State, client: int, rng: Rng) -> State:
    """DP-SGD of one client by the book: its batches drawn again, a loop over examples, noise from its stream."""
    assert local.privacy is not None
    parts = federation(model, local)
    places, features = parts.clients[client].train, parts.engine.features
    number = len(places)
    sizes = BatchSizes(local.batch_size, min(local.batch_size, max(SIZES)), local.num_steps(number))
    draws = local.drawing.draw(LocalExamples(places, features.labels[places].numpy()), sizes, rng)
    start = torch.cat([tensor.flatten() for tensor in state.values()])
    vector = start.clone()
    for step in range(sizes.num_steps):
        chosen = torch.from_numpy(draws.places[step][draws.mask[step]])
        now = FlatStack(tree.expand(state, 1), model.device).state(vector.unsqueeze(0))
        one = {name: tensor[0] for name, tensor in now.items()}
        stems = list(features.take(chosen, model.device))
        total = plain_sum(model, one, stems, features.labels[chosen].tolist())
        noise = torch.empty(len(vector)).normal_(0, 1, generator=rng.child("privacy", step).torch()).double()
        scale = local.privacy.clip_norm * local.privacy.noise_multiplier
        gradient = (total + scale * noise) / min(local.batch_size, number)
        if isinstance(local.correction, FedProx):
            gradient = gradient + local.correction.mu * (vector - start)
        vector = vector - local.learning_rate * gradient
    return {
        name: tensor[0] for name, tensor in FlatStack(tree.expand(state, 1), model.device).state(vector[None]).items()
    }


@pytest.mark.parametrize(
    ("adapter", "sampling"), [("text", "poisson"), ("both", "shuffled"), ("feature adapter", "poisson")]
)
def test_local_training_is_dp_sgd(tiny_model: str, adapter: str, sampling: str) -> None:
    """Any number of clients in a block come to the adapters of the loop over examples, noise included."""
    privacy = dataclasses.replace(PRIVATE, sampling=sampling)
    local = dataclasses.replace(LOCAL, privacy=privacy, epochs=2, correction=FedProx(mu=0.3))
    model = adapt(tiny_model, ADAPTERS[adapter])
    state, rng = model.initial_adapter(Rng(1)), Rng(11)
    expected = {
        client: plain_training(model, local, state, client, rng.child("client", client)) for client in range(len(SIZES))
    }
    for per_block in (1, 2, 5):
        found = train(federation(model, local, per_block=per_block), dict.fromkeys(expected, state), round=1, rng=rng)
        for client, result in found.items():
            for name, tensor in result.adapter.items():
                # The noise is in single precision, in both.
                torch.testing.assert_close(tensor, expected[client][name], atol=1e-6 if False else TOLERANCE, rtol=0)


@pytest.mark.parametrize(("penalty", "prompts"), [(Anchor(), "ensemble"), (Distillation(weight=0.5), "random")])
def test_the_number_of_clients_in_a_step_changes_nothing(tiny_model: str, penalty: Penalty, prompts: str) -> None:
    """With penalties, which are bounded with the loss, and with prompts that are drawn."""
    local = dataclasses.replace(LOCAL, penalty=penalty, prompts=prompts)
    ends = []
    for per_block in (1, 2, 5):
        model = adapt(tiny_model, Lora(rank=2, layers=(-1,)), templates=("a {}", "the {}"))
        ends.append(rounds(federation(model, local, per_block=per_block), 1)[0][-1].adapter)
    plain = rounds(federation(model, dataclasses.replace(local, penalty=NoPenalty())), 1)[0][-1].adapter
    assert_states_close(ends[0], ends[1])
    assert_states_close(ends[0], ends[2])
    assert not all(torch.equal(ends[0][name], plain[name]) for name in plain)


def test_without_noise_and_bound_it_is_plain_training(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    hardly = ExamplePrivacy(clip_norm=1e3, noise_multiplier=1e-15, sampling="shuffled")
    local = dataclasses.replace(LOCAL, privacy=hardly, batch_size=13, steps=3)  # no batch is short
    starts = dict.fromkeys(range(5), model.initial_adapter(Rng(1)))
    private, plain = (
        train(federation(model, each, per_block=2), starts, round=1, rng=Rng(2)) for each in (local, local.alone)
    )
    for client, result in private.items():
        assert_states_close(result.adapter, plain[client].adapter)
        assert result.loss == pytest.approx(plain[client].loss, abs=TOLERANCE)


def test_runs_that_differ_in_their_noise_share_steps(tiny_model: str) -> None:
    """Clients of a sweep's runs in one block have the noise of their own run."""
    model = adapt(tiny_model, Lora(rank=2))
    local = [dataclasses.replace(LOCAL, privacy=dataclasses.replace(PRIVATE, noise_multiplier=z)) for z in (0.5, 2.0)]
    assert len({each.step_key for each in local}) == 1
    parts, state = federation(model, LOCAL, per_block=4), model.initial_adapter(Rng(1))
    trained = parts.roles.trained(state, 1)
    tasks = [parts.task(client, state, parts.setup(1, trained, each), Rng(3)) for each in local for client in (0, 1)]
    together = list(parts.engine.train([dataclasses.replace(task, client=row) for row, task in enumerate(tasks)]))
    for row, task in enumerate(tasks):
        (alone,) = parts.engine.train([task])
        (mine,) = (result for result in together if result.client == row)
        assert_states_close(mine.adapter, alone.adapter)


@given(num_examples=st.integers(1, 60), batch_size=st.integers(1, 40), seed=st.integers(0, 100))
def test_poisson_batches_are_packed_samples_without_repetition(num_examples: int, batch_size: int, seed: int) -> None:
    places = np.arange(num_examples) * 3
    draws = Poisson().draw(LocalExamples(places, places), BatchSizes(batch_size, 1, 5), Rng(seed))
    assert draws.places.shape == draws.mask.shape and draws.weights is None
    assert np.isin(draws.places, places).all()
    for step_places, step_mask in zip(draws.places, draws.mask, strict=True):
        count = step_mask.sum()
        assert step_mask[:count].all()
        assert len(set(step_places[step_mask])) == count
        assert count == num_examples or batch_size < num_examples


def test_each_example_is_drawn_by_itself() -> None:
    """As often as its probability says, and two of them together as often as the product says."""
    places, steps = np.arange(20), 20_000
    draws = Poisson().draw(LocalExamples(places, places), BatchSizes(5, 5, steps), Rng(1))
    seen = np.zeros((steps, 20), bool)
    rows = np.repeat(np.arange(steps), draws.mask.sum(axis=1))
    seen[rows, draws.places[draws.mask]] = True
    assert np.abs(seen.mean(axis=0) - 0.25).max() < 0.02
    together = (seen[:, :-1] & seen[:, 1:]).mean(axis=0)
    assert np.abs(together - 0.0625).max() < 0.012
    assert draws.mask.sum(axis=1).max() > 8


def test_noise_is_of_the_client_the_round_and_the_step() -> None:
    streams = [Rng(0).child(*path) for path in (("a", 0), ("a", 1), ("b", 0))]
    like = torch.empty(5000, dtype=torch.float64)
    first, *others = (PRIVATE.noise(like, stream) for stream in streams)
    assert torch.equal(first, PRIVATE.noise(like, streams[0]))
    assert not any(torch.equal(first, other) for other in others)
    assert abs(float(first.std()) / (PRIVATE.clip_norm * PRIVATE.noise_multiplier) - 1) < 0.05


# What has been spent


def test_releases_are_counted_by_client(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    parts = federation(model, dataclasses.replace(LOCAL, epochs=2), cohort=3)
    states, results = rounds(parts, 3)
    taken = {client: sum(client in result.cohort for result in results) for client in range(5)}
    steps = [2 * -(-size // 4) for size in SIZES]
    expected = {
        client: Exposure(taken[client] * steps[client], min(4 / SIZES[client], 1.0))
        for client in range(5)
        if taken[client]
    }
    assert exposures(parts, states[-1].clients) == expected
    spent = [spent_epsilon(0.8, each.num_releases, each.sampling_fraction, 1e-5, "rdp") for each in expected.values()]
    assert results[-1].example_epsilon == max(spent)
    assert [result.example_epsilon for result in results] == sorted(result.example_epsilon or 0 for result in results)


def test_shuffled_batches_release_each_example_once_an_epoch(tiny_model: str) -> None:
    privacy = dataclasses.replace(PRIVATE, sampling="shuffled")
    parts = federation(adapt(tiny_model, LinearHead()), dataclasses.replace(LOCAL, privacy=privacy, epochs=2))
    states, results = rounds(parts, 2)
    assert set(exposures(parts, states[-1].clients).values()) == {Exposure(4, None)}
    assert results[-1].example_epsilon == spent_epsilon(0.8, 4, None, 1e-5, "rdp")
    assert privacy.num_releases(13, 4, 7) == 2  # four steps an epoch: three steps of a second one
    assert privacy.num_releases(13, 4, 9) == 3


def test_what_the_server_leaves_out_has_been_sent_all_the_same(tiny_model: str) -> None:
    """So has what came too late; who dropped out sent nothing."""

    def broken(round: int, update: ClientUpdate) -> ClientUpdate:
        return dataclasses.replace(update, delta=tree.scale(update.delta, torch.nan))

    parts = federation(adapt(tiny_model, LinearHead()), LOCAL, hooks=Hooks(update=broken))
    states, results = rounds(parts, 2)
    steps = [-(-size // 4) for size in SIZES]
    assert len(results[0].rejected_clients) == 5
    assert _counts(parts, states[-1].clients) == {client: 2 * number for client, number in enumerate(steps)}
    plan = parts.schedule.plan(parts, states[0])
    outcome = CohortOutcome(np.array([0, 1]), late=np.array([3]), dropped=np.array([4]))
    plan = dataclasses.replace(plan, tasks=plan.tasks[:2], outcome=outcome)
    assert _counts(parts, count_releases(parts, plan, {})) == {client: steps[client] for client in (0, 1, 3)}


def _counts(parts: Federation, clients: Mapping[int, ClientState]) -> dict[int, int]:
    return {client: each.num_releases for client, each in exposures(parts, clients).items()}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([None, 0.05, 0.3, 1.0])), max_size=5))
def test_the_largest_epsilon_is_that_of_all(exposed: list[tuple[int, float | None]]) -> None:
    all_of_them = [Exposure(number, fraction) for number, fraction in exposed]
    for accountant in ("rdp", "pld"):
        privacy = dataclasses.replace(PRIVATE, accountant=accountant)
        expected = max((privacy.epsilon(each) for each in all_of_them), default=0.0)
        assert privacy.largest_epsilon(all_of_them) == expected


@pytest.mark.parametrize("personal", [Ditto(), FineTuning()])
def test_what_stays_at_a_client_has_no_noise(tiny_model: str, personal: Any) -> None:
    local = dataclasses.replace(LOCAL, privacy=PRIVATE)
    for own in (personal.in_round(local), personal.at_end(local)):
        assert own is None or own.privacy is None
    parts = federation(adapt(tiny_model, LinearHead()), local)
    plain = federation(adapt(tiny_model, LinearHead()), dataclasses.replace(local, privacy=None))
    alone, expected = (
        train_local_only(each, each.engine.model.initial_adapter(Rng(1)), np.arange(2), advance=lambda number: None)
        for each in (parts, plain)
    )
    assert_states_close(alone, expected, atol=0)


# Whole runs

SECTION = {"clip_norm": 0.5, "noise_multiplier": 0.7, "accountant": "rdp"}
WHOLE: dict[str, Any] = {
    "threads": 1,
    "rounds": 3,
    "adapter": {"name": "lora", "rank": 2, "towers": ["text", "vision"]},
    "clients": {"number": 5, "cohort": {"name": "uniform", "number": 4}, "per_block": 2},
    "local": {"batch_size": 4, "privacy": SECTION},
    "server": {"stragglers": {"over_selection": 1.5}},
    "network": {"name": "drawn", "dropout": 0.2},
}


def test_a_run_says_what_was_spent_and_goes_on_exactly(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw = {**raw_config, **WHOLE}
    whole = simulate(parse_config({**raw, "output": str(tmp_path / "whole")}))
    assert whole.directory is not None
    last = whole.records[-1].metrics["example_epsilon"]
    assert json.loads((whole.directory / "summary.json").read_text())["example_epsilon"] == last > 0
    with (whole.directory / "clients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(float(row["example_epsilon"]) for row in rows) == pytest.approx(last, abs=1e-6)
    parts = tmp_path / "parts"
    path = parts / "mine.yaml"
    parts.mkdir()
    path.write_text(yaml.safe_dump({**raw, "output": str(parts)}))
    for number in (1, 2, 3):
        arguments = [str(path), "rounds=1"] if number == 1 else ["--resume", str(parts / "test"), f"rounds={number}"]
        assert main(arguments) == 0
    mine, theirs = comparable(parts / "test"), comparable(whole.directory)
    assert mine["adapter.safetensors"] == theirs["adapter.safetensors"]
    assert mine["clients.csv"] == theirs["clients.csv"]


def test_several_processes_leave_the_same_bytes(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw = {**raw_config, **WHOLE, "rounds": 2, "output": str(tmp_path)}
    one = simulate(parse_config({**raw, "name": "one", "cache": {"folder": None}}))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**raw, "name": "two"}))
    ends = several.run(2, [str(path)], tmp_path, None)
    assert [each.status for each in ends] == [0, 0], ends
    assert one.directory is not None
    mine, theirs = comparable(one.directory), comparable(tmp_path / "two")
    for name in ("adapter.safetensors", "clients.csv", "rounds.jsonl"):
        assert mine[name] == theirs[name]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"local": {"objective": "contrastive"}}, "local.objective: expected cross_entropy with local.privacy"),
    ({"local": {"objective": "multi_positive"}}, "local.objective: expected cross_entropy with local.privacy"),
    ({"local": {"penalty": "reciprocal_consistency"}}, "local.penalty: expected none, anchor or distillation"),
    ({"local": {"sampling": "class_balanced"}}, "local.sampling: expected shuffled with local.privacy: with class_bal"),
    ({"local": {"sampling": "by_loss"}}, "local.sampling: expected shuffled with local.privacy: with by_loss"),
    ({"adapter": {"name": "lora", "dropout": 0.1}}, "adapter.dropout: expected 0 with local.privacy"),
    (
        {"clients": {"ranks": {"name": "drawn", "values": [1, 2]}}, "server": {"strategy": "hetlora"}},
        "clients.ranks: expected none with local.privacy",
    ),
    (
        {"clients": {"labelled_fraction": 0.5}, "local": {"self_training": {}}},
        "local.self_training: expected none with local.privacy",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_no_bound_is_refused(raw_config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    raw = {**raw_config, **changes, "local": {**changes.get("local", {}), "privacy": {}}}
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config(raw))
    assert str(caught.value).startswith(message)
    del raw["local"]["privacy"]
    check_experiment(parse_config(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("local.privacy.clip_norm=0", "local.privacy.clip_norm: expected a number above 0"),
        ("local.privacy.noise_multiplier=0", "local.privacy.noise_multiplier: expected a number above 0"),
        ("local.privacy.delta=1", "local.privacy.delta: expected a number above 0 and below 1"),
        ("local.privacy.sampling=all", "local.privacy.sampling: expected one of poisson, shuffled"),
        ("local.privacy.accountant=moments", "local.privacy.accountant: expected one of pld, rdp"),
        ("local.privacy.noise=1", "local.privacy.noise: unknown key"),
    ],
)
def test_bad_input_is_one_line(
    raw_config: dict[str, Any], tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    assert main([str(path), change]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
