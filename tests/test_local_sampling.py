"""Which examples a client sees: chances in closed form, unbiased gradients, and rounds against a plain loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, TOLERANCE, adapt, assert_states_close, federation, mean, random_adapters, start
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.client.sampling import ByLoss, ClassBalanced, EffectiveNumber, LocalExamples, LocalSampling, Shuffled
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.dual_lora import DualLora
from flora.clip.adapters.lora import Lora
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.data.batching import BatchSizes
from flora.engine.losses import example_losses
from flora.federated.planning import server_tasks
from flora.federated.round import run_round

LONG = LocalExamples(np.array([3, 5, 8, 9, 20]), np.array([0, 0, 0, 2, 2]), np.array([4.0, 1.0, 1.0, 2.0, 0.0]))
EVERY = [Shuffled(), ClassBalanced(), EffectiveNumber(beta=0.5), ByLoss(temperature=0.5)]


@pytest.mark.parametrize("sampling", EVERY)
@settings(deadline=None, max_examples=30)
@given(number=st.integers(1, 9), batch_size=st.integers(1, 5), epochs=st.integers(1, 3))
def test_steps_are_as_many_and_as_large_as_ever(
    sampling: LocalSampling, number: int, batch_size: int, epochs: int
) -> None:
    examples = LocalExamples(np.arange(10, 10 + number), np.arange(number) % 3, np.arange(number) + 0.5)
    sizes = BatchSizes(batch_size, min(batch_size, number), epochs * -(-number // batch_size))
    draws = sampling.draw(examples, sizes, Rng(1))
    assert np.isin(draws.places, examples.places).all()
    assert draws.mask.sum() == epochs * number
    assert np.array_equal(draws.mask, Shuffled().draw(examples, sizes, Rng(1)).mask)
    assert draws.weights is None or (draws.weights.shape == draws.places.shape and (draws.weights > 0).all())


@pytest.mark.parametrize("sampling", EVERY)
def test_what_a_client_sees_does_not_depend_on_how_much_its_neighbours_have(sampling: LocalSampling) -> None:
    """The places of a batch are as many as the client with most examples needs."""
    alone, beside = (sampling.draw(LONG, BatchSizes(8, width, 3), Rng(4)) for width in (5, 8))
    assert np.array_equal(alone.places[alone.mask], beside.places[beside.mask])
    assert not beside.mask[:, 5:].any()
    if alone.weights is not None and beside.weights is not None:
        assert np.array_equal(alone.weights[alone.mask], beside.weights[beside.mask])


def test_balanced_draws_see_each_class_as_often() -> None:
    draws = ClassBalanced().draw(LONG, BatchSizes(100, 5, 4000), Rng(0))
    seen = draws.places[draws.mask]
    share = [np.mean(np.isin(seen, LONG.places[LONG.labels == label])) for label in (0, 2)]
    assert share == pytest.approx([0.5, 0.5], abs=0.02)  # 20,000 draws: five standard deviations
    assert np.mean(seen == 20) == pytest.approx(0.25, abs=0.02)


def test_effective_numbers_by_hand() -> None:
    """Three examples and two: (1 - 1/2) / (1 - 1/8) = 4/7 and (1/2) / (3/4) = 2/3, scaled to add up to 2."""
    draws = EffectiveNumber(beta=0.5).draw(LONG, BatchSizes(2, 2, 3), Rng(0))
    assert draws.weights is not None
    common, rare = 2 * (4 / 7) / (4 / 7 + 2 / 3), 2 * (2 / 3) / (4 / 7 + 2 / 3)
    for place, weight in zip(draws.places.flatten(), draws.weights.flatten(), strict=True):
        assert weight == pytest.approx(common if place in (3, 5, 8) else rare)


def test_effective_numbers_with_beta_0_count_all_alike() -> None:
    draws = EffectiveNumber(beta=0.0).draw(LONG, BatchSizes(2, 2, 3), Rng(0))
    assert draws.weights is not None and (draws.weights == 1.0).all()


def test_chances_by_loss_by_hand() -> None:
    assert ByLoss(temperature=1.0, uniform_share=0.2).chances(LONG).tolist() == pytest.approx(
        [0.8 * each / 8 + 0.04 for each in (4, 1, 1, 2, 0)]
    )
    assert ByLoss(temperature=0.0).chances(LONG).tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("losses", [[0.0] * 5, [np.nan, 1, 1, 1, 1], [np.inf, 1, 1, 1, 1]])
def test_losses_that_say_nothing_leave_all_alike(losses: list[float]) -> None:
    examples = LocalExamples(LONG.places, LONG.labels, np.array(losses))
    assert ByLoss().chances(examples).tolist() == pytest.approx([0.2] * 5)


@settings(deadline=None, max_examples=50)
@given(
    losses=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    temperature=st.floats(0, 4),
    uniform_share=st.floats(0.05, 1),
)
def test_weighted_by_loss_the_expected_gradient_is_the_mean(
    losses: list[float], temperature: float, uniform_share: float
) -> None:
    """An example's chance times its weight is 1 / n, so any gradients' expectation is their mean."""
    number = len(losses)
    examples = LocalExamples(np.arange(number), np.zeros(number, np.int64), np.array(losses))
    sampling = ByLoss(temperature=temperature, uniform_share=uniform_share)
    chances = sampling.chances(examples)
    draws = sampling.draw(examples, BatchSizes(64, number, 200), Rng(0))
    assert chances.sum() == pytest.approx(1.0)
    assert draws.weights is not None and draws.weights.max() <= 1 / uniform_share + 1e-9
    for place, weight in zip(draws.places.flat, draws.weights.flat, strict=True):
        assert weight * chances[place] == pytest.approx(1 / number)


def test_by_loss_is_unbiased_through_the_engine(tiny_model: str) -> None:
    """Monte Carlo: the mean of many one-step rounds is the step along the gradient of all examples."""
    model = adapt(tiny_model, Lora(rank=2))
    state = start(model)
    all_at_once = LocalTraining(learning_rate=1.0, batch_size=100, steps=1, optimizer=Sgd())
    drawing = dataclasses.replace(all_at_once, batch_size=8, sampling=ByLoss(temperature=2.0))
    (exact,) = _steps(federation(model, all_at_once), state, 1)
    steps = torch.stack(_steps(federation(model, drawing), state, 400))
    error = steps.std(dim=0) / len(steps) ** 0.5
    assert exact.abs().max() > 0
    assert ((steps.mean(dim=0) - exact).abs() <= 5 * error + 1e-12).all()


def _steps(parts: Any, state: Any, number: int) -> list[torch.Tensor]:
    """By how much client 0's adapter moves in so many rounds, each drawn anew."""
    found = []
    for draw in range(number):
        (task,) = server_tasks(parts, state, [0], Rng(draw))
        (result,) = parts.engine.train([task])
        found.append(tree.flatten({name: result.adapter[name] - task.adapter[name] for name in result.adapter}))
    return found


@pytest.mark.parametrize("sampling", EVERY)
@pytest.mark.parametrize("adapter", [Lora(rank=2), Lora(rank=2, towers=("text", "vision")), DualLora(rank=2)])
def test_the_number_of_clients_in_a_step_changes_nothing(
    tiny_model: str, sampling: LocalSampling, adapter: Adapter
) -> None:
    local = LocalTraining(learning_rate=0.05, batch_size=3, epochs=2, optimizer=Sgd(), sampling=sampling)
    after = []
    for per_block in (1, 2, 5):
        model = adapt(tiny_model, adapter)
        state, _ = run_round(federation(model, local, per_block=per_block), start(model))
        after.append(state.adapter)
    assert_states_close(after[0], after[1])
    assert_states_close(after[0], after[2])


def test_losses_before_a_round_are_those_of_a_plain_loop(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    parts = federation(model, LocalTraining(), per_block=3)
    adapters = random_adapters(model, 5)
    setup = parts.setup(1, adapters)
    tasks = [
        parts.task(client, {name: each[client] for name, each in adapters.items()}, setup, Rng(0))
        for client in range(5)
    ]
    found = example_losses(model, parts.engine.features, tasks, batch_size=4)
    for task in tasks:
        stem = parts.engine.features.take(torch.from_numpy(task.examples), torch.device("cpu"))
        with model.adapter.bind({name: each.unsqueeze(0) for name, each in task.adapter.items()}), torch.no_grad():
            logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
        plain = F.cross_entropy(logits, LABELS[task.examples], reduction="none")
        assert found[task.client].tolist() == pytest.approx(plain.tolist(), abs=TOLERANCE)


def test_a_weighted_round_equals_a_plain_loop(tiny_model: str) -> None:
    sampling = EffectiveNumber(beta=0.9)
    local = LocalTraining(learning_rate=0.05, batch_size=100, epochs=2, optimizer=Sgd(), sampling=sampling)
    model = adapt(tiny_model, Lora(rank=2))
    parts, state = federation(model, local, per_block=3), start(model)
    after, _ = run_round(parts, state)
    ends = []
    for client in parts.clients:
        labels = LABELS[client.train]
        counts = torch.bincount(labels, minlength=3).double()
        of_class = torch.where(counts > 0, 0.1 / (1 - 0.9 ** counts.clamp(min=1)), 0.0)
        weights = (of_class * (counts > 0).sum() / of_class.sum())[labels]
        stem = parts.engine.features.take(torch.from_numpy(client.train), torch.device("cpu"))
        vector = tree.flatten(state.adapter)
        for _ in range(2):
            leaf = vector.clone().requires_grad_()
            own = {name: each.unsqueeze(0) for name, each in tree.unflatten(leaf, state.adapter).items()}
            with model.adapter.bind(own):
                logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
                loss = (F.cross_entropy(logits, labels, reduction="none") * weights).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
            vector = vector - 0.05 * gradient
        ends.append(vector)
    assert_states_close(after.adapter, tree.unflatten(mean(parts, ends), state.adapter))


@pytest.mark.parametrize("sampling", ["by_loss", "effective_number"])
def test_an_objective_that_looks_at_a_batch_takes_no_weights(raw_config: dict[str, Any], sampling: str) -> None:
    config = parse_config({**raw_config, "local": {"sampling": sampling, "objective": "contrastive"}})
    with pytest.raises(UserError, match=f"local.sampling: {sampling} weighs examples: expected local.objective"):
        check_experiment(config)
