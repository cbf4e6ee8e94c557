"""Each optimiser equals torch.optim's of the same name, row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import TOLERANCE

from flora.client import optimizers
from flora.client.optimizers import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    ExponentialDecay,
    Optimizer,
    Sgd,
    StepDecay,
    clip_rows,
)
from flora.core.registry import OptionError

CASES = [
    (Sgd(), torch.optim.SGD, {}),
    (Sgd(momentum=0.9, weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (Sgd(momentum=0.8, nesterov=True), torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    (Adam(weight_decay=0.2), torch.optim.Adam, {"weight_decay": 0.2}),
    (Adam(beta1=0.8, beta2=0.98, eps=1e-6), torch.optim.Adam, {"betas": (0.8, 0.98), "eps": 1e-6}),
    (AdamW(weight_decay=0.3), torch.optim.AdamW, {"weight_decay": 0.3}),
]


def test_bands_of_columns_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 50, generator=generator), torch.randn(4, 3, 50, generator=generator)

    def train(numbers: int) -> torch.Tensor:
        monkeypatch.setattr(optimizers, "CACHED_NUMBERS", numbers)
        parameters = start.clone()
        state = AdamW(weight_decay=0.1).init(parameters)
        for gradient in gradients:
            AdamW(weight_decay=0.1).step(parameters, gradient, state, 0.05)
        return parameters

    whole = train(10**6)
    for numbers in (1, 7, 21, 150):
        assert torch.equal(train(numbers), whole)


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_equals_torch_though_rows_take_different_numbers_of_steps(ours: Optimizer, theirs, options) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 7, generator=generator).double()
    gradients = torch.randn(6, 3, 7, generator=generator).double()
    num_steps = (6, 4, 1)  # longest first, as in a block
    parameters = start.clone()
    state = ours.init(parameters)
    for step in range(6):
        active = sum(step < own for own in num_steps)
        rows = {name: tensor[:active] for name, tensor in state.items()}
        ours.step(parameters[:active], gradients[step, :active], rows, 0.05)
    for row, own in enumerate(num_steps):
        parameter = torch.nn.Parameter(start[row].clone())
        optimizer = theirs([parameter], lr=0.05, **options)
        for step in range(own):
            parameter.grad = gradients[step, row]
            optimizer.step()
        torch.testing.assert_close(parameters[row], parameter.detach(), atol=TOLERANCE, rtol=0)


def test_clip_rows_equals_torch() -> None:
    gradients = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1], [5], [100]])
    clipped = clip_rows(gradients, 1.5)
    for row, expected in enumerate(gradients.clone()):
        parameter = torch.nn.Parameter(torch.zeros(10))
        parameter.grad = expected.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 1.5)
        torch.testing.assert_close(clipped[row], parameter.grad)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(OptionError, match="nesterov: needs a momentum above 0"):
        Sgd(nesterov=True)


def test_schedules() -> None:
    assert [Constant().factor(round, 3) for round in (1, 2, 3)] == [1, 1, 1]
    assert [Constant(warmup_rounds=3).factor(round, 9) for round in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]
    cosine = Cosine(final_fraction=0.2)
    assert cosine.factor(1, 10) == 1
    assert cosine.factor(6, 10) == pytest.approx(0.6)  # half-way
    assert cosine.factor(10, 10) == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.9 * math.pi)))
    warm = Cosine(warmup_rounds=2)
    factors = [warm.factor(round, 12) for round in range(1, 13)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[2:]))
    step = StepDecay(every=2, gamma=0.5, warmup_rounds=1)
    assert [step.factor(round, 9) for round in range(1, 8)] == [0.5, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [ExponentialDecay(gamma=0.5).factor(round, 9) for round in (1, 2, 3, 4)] == [1, 0.5, 0.25, 0.125]
