"""Aggregation, sampling, bytes and seeds: small cases by hand, and properties."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.communication.options import payload_bytes
from flora.communication.sampling import BySize, Uniform
from flora.core import tree
from flora.core.records import Evaluation
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.evaluation.accuracy import class_accuracy, client_means, spread
from flora.server.aggregators import Mean
from flora.server.optimizers import ServerSgd
from flora.server.strategies.averaging import FedAvg


def update(client: int, num_examples: int, value: float) -> ClientUpdate:
    return ClientUpdate(client, num_examples, {"a": torch.tensor([value, 0.0])}, loss=0.0, num_steps=1)


def test_fedavg_by_hand() -> None:
    updates = [update(0, 1, 4.0), update(1, 3, 8.0)]
    deltas = [each.delta for each in updates]
    mean = Mean().combine(deltas, FedAvg().weights(updates))
    assert mean["a"].tolist() == [7.0, 0.0]
    assert Mean().combine(deltas, FedAvg(weighting="uniform").weights(updates))["a"].tolist() == [6.0, 0.0]
    adapter, state = ServerSgd().step({"a": torch.tensor([1.0, 1.0])}, mean, {})
    assert adapter["a"].tolist() == [8.0, 1.0]
    assert state == {}


@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), weight=st.integers(1, 10**6))
def test_equal_clients_and_single_clients_average_to_themselves(values: list[float], weight: int) -> None:
    delta = {"a": torch.tensor(values)}
    for number in (1, 3):
        mean = tree.weighted_mean([delta] * number, [weight] * number)
        torch.testing.assert_close(mean["a"], delta["a"])


def test_weighted_mean_keeps_types_and_refuses_bad_weights() -> None:
    half = {"a": torch.ones(2, dtype=torch.bfloat16)}
    assert tree.weighted_mean([half, half], [1, 2])["a"].dtype == torch.bfloat16
    for weights in ([0, 0], [1, -1]):
        with pytest.raises(ValueError, match="non-negative weights with a positive sum"):
            tree.weighted_mean([half, half], weights)


def test_tree_arithmetic() -> None:
    left, right = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 5.0])}
    assert tree.add(left, right, 2.0)["a"].tolist() == [7.0, 12.0]
    assert tree.subtract(right, left)["a"].tolist() == [2.0, 3.0]
    stacked = tree.stack([left, right])
    assert [state["a"].tolist() for state in tree.unstack(stacked)] == [[1, 2], [3, 5]]
    assert tree.expand(left, 3)["a"].shape == (3, 2)
    assert tree.count(stacked) == 4
    assert tree.is_finite(left)
    assert not tree.is_finite({"a": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize("sampler", [Uniform(fraction=0.3), BySize(fraction=0.3), Uniform(number=3)])
def test_a_cohort_is_sorted_distinct_and_seeded(sampler) -> None:  # type: ignore[no-untyped-def]
    sizes = np.arange(1, 11)
    cohorts = [
        sampler.sample(sizes, sampler.size_in(1, len(sizes)), Rng(0).child("round", round)) for round in range(50)
    ]
    assert all(len(set(cohort)) == 3 and list(cohort) == sorted(cohort) for cohort in cohorts)
    assert all(cohort.min() >= 0 and cohort.max() < 10 for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 10
    number = sampler.size_in(1, len(sizes))
    again = [sampler.sample(sizes, number, Rng(0).child("round", round)) for round in range(50)]
    assert all(np.array_equal(left, right) for left, right in zip(cohorts, again, strict=True))


def test_by_size_prefers_large_clients() -> None:
    sizes = np.array([1, 1, 1, 97])
    picks = [BySize(number=1).sample(sizes, 1, Rng(0).child(draw))[0] for draw in range(200)]
    assert np.mean(np.array(picks) == 3) > 0.9


def test_cohort_sizes() -> None:
    assert Uniform().cohort_size(7) == 7
    assert Uniform(fraction=0.01).cohort_size(7) == 1
    with pytest.raises(OptionError, match="number: expected at most the number of clients, 7, got 8"):
        Uniform(number=8).cohort_size(7)
    with pytest.raises(OptionError, match="not both"):
        Uniform(number=8, fraction=0.5)


def test_payload_bytes_is_the_length_of_the_file() -> None:
    state = {"text.0.q.lora_A": torch.randn(4, 32), "b": torch.randn(3).bfloat16()}
    assert payload_bytes(state) == len(safetensors.torch.save(state))
    assert payload_bytes(tree.expand(state, 2)) > payload_bytes(state)


def test_seed_tree() -> None:
    rng = Rng(0)
    child = rng.child("round", 3).child("client", 17)
    assert child == rng.child("round", 3, "client", 17)
    others = [
        rng,
        rng.child("round", 3),
        rng.child("client", 17),
        rng.child("round", "3", "client", 17),
        Rng(1).child("round", 3, "client", 17),
    ]
    assert len({other.seed64() for other in [child, *others]}) == 6
    assert torch.equal(torch.rand(3, generator=child.torch()), torch.rand(3, generator=child.torch()))
    # A fixed value: the stream is the same on every machine and in every version.
    assert Rng(0).child("round", 1).seed64() == 15585963793103895897


def test_class_client_and_decile_accuracies() -> None:
    correct = np.array([True, False, True, True])
    evaluation = Evaluation(correct, np.zeros(4), np.zeros(4, dtype=np.int64), np.ones(4), np.zeros(4), np.eye(2))
    assert class_accuracy(evaluation, np.array([0, 0, 1, 1]), ["a", "b", "c"]) == {"a": 0.5, "b": 1.0, "c": None}
    accuracies = client_means(correct, np.array([1, 0, 3]))
    assert accuracies[0] == 1
    assert np.isnan(accuracies[1])
    assert accuracies[2] == pytest.approx(2 / 3)
    found = spread(accuracies)
    assert found is not None
    assert astuple(found) == pytest.approx((5 / 6, 1 / 6, 2 / 3, 1.0))
    found = spread(np.arange(20) / 20)
    assert found is not None
    assert astuple(found) == pytest.approx((0.475, (399 / 4800) ** 0.5, 0.025, 0.925))
    assert spread(np.array([np.nan])) is None
