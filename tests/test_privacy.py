"""Differential privacy of clients: what a round releases, by hand, and what must be true of bounds and noise."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LOCAL, adapt, assert_states_close, federation, fp64, rounds, variant
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.communication.network import DrawnNetwork
from flora.communication.sampling import InTurn, Poisson, Uniform
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.core.tree import State
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.privacy.accounting import Attendance, spent_epsilon, tree_sensitivity
from flora.privacy.banded import Banded
from flora.privacy.bounds import AdaptiveNorm, ClipNorm, bounded, gaussian, summed
from flora.privacy.mechanisms import Central, Local, Privacy, Tree
from flora.privacy.rounds import PrivateRounds
from flora.server.strategies.factors import FfaLora

NUM_CLIENTS = 5


def private(parts: Federation, mechanism: Privacy, number: int = 3) -> Federation:
    attendance = parts.participation.sampler.attendance(NUM_CLIENTS)
    return dataclasses.replace(parts, privacy=PrivateRounds.of(mechanism, attendance, number))


def listening(parts: Federation) -> tuple[Federation, list[ClientUpdate]]:
    """The federation, and a list to which each update is added as the server reads it."""
    heard: list[ClientUpdate] = []

    def note(round: int, update: ClientUpdate) -> ClientUpdate:
        heard.append(update)
        return update

    return variant(parts, hooks=Hooks(update=note)), heard


def drawn(state: State, *names: str | int) -> torch.Tensor:
    """The noise of a node of the seed tree, of deviation 1, as one vector."""
    return torch.randn(tree.count(state), dtype=torch.float64, generator=Rng(7).child(*names).torch())


def test_a_round_by_hand(tiny_model: str) -> None:
    """Bound, sum, noise, divided by the expected cohort; the noise is drawn again here."""
    model = adapt(tiny_model)
    parts, heard = listening(private(federation(model, LOCAL), Central(clip_norm=1.0, noise_multiplier=0.5)))
    (before, after), (result,) = rounds(parts, 1)
    vectors = [tree.flatten(update.delta) for update in heard]
    norms = [float(vector.norm()) for vector in vectors]
    assert len(vectors) == NUM_CLIENTS and min(norms) < 1.0 < max(norms)
    total = sum(vector * min(1.0, 1.0 / norm) for vector, norm in zip(vectors, norms, strict=True))
    noise = 0.5 * drawn(heard[0].delta, "round", 1, "privacy")
    expected = tree.flatten(before.adapter) + (total + noise) / NUM_CLIENTS
    torch.testing.assert_close(tree.flatten(after.adapter), expected, rtol=0, atol=1e-12)
    assert (result.clip_norm, result.clipped_fraction) == (1.0, sum(norm > 1.0 for norm in norms) / NUM_CLIENTS)
    assert result.epsilon == spent_epsilon(0.5, 1, None, 1e-5)


MECHANISMS = [Central(0.02, 0.5), Local(0.02, 0.5), Tree(0.02, 0.5), Banded(0.02, 0.5, bands=2)]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_how_many_clients_share_a_step_changes_nothing(tiny_model: str, mechanism: Privacy) -> None:
    states = []
    for per_block in (1, 5):
        parts = private(federation(adapt(tiny_model), LOCAL, per_block=per_block), mechanism)
        states.append(rounds(parts, 2)[0][-1])
    assert_states_close(states[0].adapter, states[1].adapter)


def test_every_client_counts_the_same_whatever_it_has(tiny_model: str) -> None:
    """Weights by examples would let a client with many of them change the sum by more than the bound."""
    parts = private(federation(adapt(tiny_model), LOCAL), Central(clip_norm=0.02, noise_multiplier=0.5))

    def same(round: int, update: ClientUpdate) -> ClientUpdate:
        return dataclasses.replace(update, num_examples=10**6 if update.client == 0 else 1)

    changed = variant(parts, hooks=Hooks(update=same))
    assert_states_close(rounds(parts, 1)[0][1].adapter, rounds(changed, 1)[0][1].adapter, atol=0)


def states_of(vectors: Sequence[Sequence[float]]) -> list[State]:
    return [fp64({"a": torch.tensor(vector[:1]), "b": torch.tensor(vector[1:])}) for vector in vectors]


VECTORS = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6)


@settings(deadline=None)
@given(vectors=VECTORS, clip_norm=st.floats(1e-6, 1e3))
def test_one_client_more_changes_the_sum_by_at_most_the_bound(vectors: list[list[float]], clip_norm: float) -> None:
    states = [bounded(state, clip_norm)[0] for state in states_of(vectors)]
    like = states[0]
    with_all, without = summed(states, like), summed(states[:-1], like)
    # The sum is rounded; what one client gives is not.
    assert tree.norm(states[-1]) <= clip_norm * (1 + 1e-15 * 4)
    assert tree.norm(tree.subtract(with_all, without)) <= clip_norm * (1 + 1e-9)


def test_the_bound_leaves_smaller_updates_as_they_are_and_directions_too() -> None:
    (small,), (large,) = states_of([[0.3, 0.0, 0.4]]), states_of([[3.0, 0.0, 4.0]])
    same, within = bounded(small, 0.6)
    assert within and same["b"].tolist() == small["b"].tolist()
    scaled, within = bounded(large, 0.5)
    assert not within and tree.flatten(scaled).tolist() == pytest.approx([0.3, 0.0, 0.4])


def test_noise_has_the_deviation_that_it_says() -> None:
    """Of 40,000 numbers the deviation lies within 5 % of it, 14 of its standard errors; and no number is another's."""
    like = {"a": torch.zeros(200, 100), "b": torch.zeros(20_000)}
    noise = gaussian(like, 3.0, Rng(0).child("x"))
    assert noise["a"].shape == (200, 100) and noise["a"].dtype == torch.float64
    for part in noise.values():
        assert float(part.std()) == pytest.approx(3.0, rel=0.05)
        assert abs(float(part.mean())) < 0.15
    assert len(torch.unique(tree.flatten(noise))) == 40_000
    other = gaussian(like, 3.0, Rng(0).child("y"))
    assert abs(float((other["b"] * noise["b"]).mean())) < 0.5


def without_clients(parts: Federation) -> Federation:
    """The federation, with cohorts of nobody."""
    return variant(parts, sampler=Poisson(fraction=1e-12))


@pytest.mark.parametrize("mechanism", [*MECHANISMS[::2], MECHANISMS[3], Central(AdaptiveNorm(), 0.5)])
def test_a_round_of_nobody_releases_noise_all_the_same(tiny_model: str, mechanism: Privacy) -> None:
    parts = without_clients(federation(adapt(tiny_model), LOCAL))
    expected = parts.participation.expected_size(1)
    assert expected == pytest.approx(NUM_CLIENTS * 1e-12)
    (before, after), (result,) = rounds(private(parts, mechanism), 1)
    moved = tree.flatten(tree.subtract(after.adapter, before.adapter)) * expected
    assert result.num_clients == 0 and result.clipped_fraction is None
    assert torch.count_nonzero(moved) == len(moved)
    if isinstance(mechanism, Central):  # one client in a million million is asked
        assert result.epsilon is not None and 0 <= result.epsilon < 1e-3


def test_updates_that_are_all_rejected_leave_noise(tiny_model: str) -> None:
    def spoil(round: int, update: ClientUpdate) -> ClientUpdate:
        return dataclasses.replace(update, delta=tree.scale(update.delta, math.nan))

    parts = private(federation(adapt(tiny_model), LOCAL), Central(clip_norm=0.02, noise_multiplier=0.5))
    (before, after), (result,) = rounds(variant(parts, hooks=Hooks(update=spoil)), 1)
    noise = 0.01 * drawn(before.adapter, "round", 1, "privacy") / NUM_CLIENTS
    moved = tree.flatten(tree.subtract(after.adapter, before.adapter))
    torch.testing.assert_close(moved, noise, rtol=0, atol=1e-12)
    assert len(result.rejected_clients) == NUM_CLIENTS and tree.is_finite(after.adapter)


def test_with_dropouts_the_expected_cohort_divides(tiny_model: str) -> None:
    """All clients drop out but those that a network's draw leaves; the denominator stays that of the sampler."""
    network = DrawnNetwork(dropout=0.5)
    plain = federation(adapt(tiny_model), LOCAL)
    parts = variant(plain, network=network, profiles=network.profiles(NUM_CLIENTS, Rng(0)))
    parts, heard = listening(private(parts, Central(clip_norm=0.02, noise_multiplier=0.5)))
    (before, after), (result,) = rounds(parts, 1)
    assert 0 < result.num_clients < NUM_CLIENTS
    total = sum(tree.flatten(bounded(update.delta, 0.02)[0]) for update in heard)
    noise = 0.01 * drawn(before.adapter, "round", 1, "privacy")
    expected = tree.flatten(before.adapter) + (total + noise) / NUM_CLIENTS
    torch.testing.assert_close(tree.flatten(after.adapter), expected, rtol=0, atol=1e-12)


class TestAdaptiveNorm:
    def test_one_step_by_hand(self) -> None:
        options = AdaptiveNorm(quantile=0.5, learning_rate=0.2)
        # Of 10 expected clients 8 came and 6 lay within: (6 - 2) / 2 + 0.5 = 2.5 more halves than not.
        assert options.after(2.0, 6, 8, 10.0, 0.5) == pytest.approx(2.0 * math.exp(-0.2 * (0.25 + 0.5 - 0.5)))

    def test_it_converges_to_the_quantile_of_fixed_norms(self) -> None:
        norms = np.linspace(1.0, 2.0, 200)
        for quantile in (0.2, 0.5, 0.9):
            options, clip_norm = AdaptiveNorm(quantile=quantile, learning_rate=0.2), 30.0
            generator = np.random.default_rng(0)
            for _ in range(400):
                within = int((norms <= clip_norm).sum())
                clip_norm = options.after(clip_norm, within, 200, 200.0, generator.normal(0, 10))
            assert float((norms <= clip_norm).mean()) == pytest.approx(quantile, abs=0.1)

    @given(multiplier=st.floats(0.1, 20), expected=st.floats(1, 1e4))
    def test_sum_and_count_spend_together_what_the_accountant_is_told(self, multiplier: float, expected: float) -> None:
        """Two Gaussians on the same clients are one with the precisions added up: the count's sensitivity is 1/2."""
        options = AdaptiveNorm()
        of_sum = options.multiplier_of_sum(multiplier, expected)
        of_count = options.deviation(multiplier, expected) / 0.5
        assert (of_sum**-2 + of_count**-2) ** -0.5 == pytest.approx(multiplier)
        assert of_sum > multiplier

    def test_a_count_that_spends_everything_is_refused(self) -> None:
        mechanism = Central(AdaptiveNorm(count_noise=0.5), noise_multiplier=1.0)
        with pytest.raises(OptionError, match="count_noise: expected more than half the noise multiplier, 1"):
            PrivateRounds.of(mechanism, Attendance(), 3)

    def test_a_round_by_hand(self, tiny_model: str) -> None:
        options = AdaptiveNorm(initial=0.02, count_noise=2.0)
        parts, heard = listening(private(federation(adapt(tiny_model), LOCAL), Central(options, 0.5)))
        (before, after), (result,) = rounds(parts, 1)
        deviation = (0.5**-2 - 4.0**-2) ** -0.5 * 0.02
        total = sum(tree.flatten(bounded(update.delta, 0.02)[0]) for update in heard)
        noise = deviation * drawn(before.adapter, "round", 1, "privacy")
        expected = tree.flatten(before.adapter) + (total + noise) / NUM_CLIENTS
        torch.testing.assert_close(tree.flatten(after.adapter), expected, rtol=0, atol=1e-12)
        within = sum(tree.norm(update.delta) <= 0.02 for update in heard)
        noise_of_count = 2.0 * Rng(7).child("round", 1, "privacy", "count").numpy().standard_normal()
        share = (within - NUM_CLIENTS / 2 + noise_of_count) / NUM_CLIENTS + 0.5
        assert float(after.privacy["clip_norm"]) == pytest.approx(0.02 * math.exp(-0.2 * (share - 0.5)))
        _, second = run_round(parts, after)
        assert second.clip_norm == float(after.privacy["clip_norm"]) and result.clip_norm == 0.02

    def test_another_rule_than_the_quantile_has_its_way(self, tiny_model: str) -> None:
        parts = private(federation(adapt(tiny_model), LOCAL), Central(Halving(), 0.5))
        states, results = rounds(parts, 3)
        assert [result.clip_norm for result in results] == [0.08, 0.04, 0.02]
        assert float(states[-1].privacy["clip_norm"]) == 0.01


@dataclasses.dataclass(frozen=True)
class Halving(ClipNorm):
    """Half the bound after each round, whatever lies within it, with all of the noise on the sum."""

    @property
    def first(self) -> float:
        return 0.08

    def deviation(self, noise_multiplier: float, expected: float) -> float:
        return 0.0

    def multiplier_of_sum(self, noise_multiplier: float, expected: float) -> float:
        return noise_multiplier

    def after(self, clip_norm: float, num_within: int, num_updates: int, expected: float, noise: float) -> float:
        return clip_norm / 2


class TestLocal:
    def test_each_client_bounds_and_noises_what_it_sends(self, tiny_model: str) -> None:
        plain, exact = listening(federation(adapt(tiny_model), LOCAL))
        rounds(plain, 1)
        parts, heard = listening(private(federation(adapt(tiny_model), LOCAL), Local(0.02, 0.5)))
        (before, after), (result,) = rounds(parts, 1)
        for update, sent in zip(exact, heard, strict=True):
            noise = 0.01 * drawn(sent.delta, "round", 1, "client", sent.client, "privacy")
            expected = tree.flatten(bounded(update.delta, 0.02)[0]) + noise
            torch.testing.assert_close(tree.flatten(sent.delta), expected, rtol=0, atol=1e-12)
        total = sum(tree.flatten(update.delta) for update in heard)  # bounded by the clients, and by nobody again
        moved = tree.flatten(tree.subtract(after.adapter, before.adapter))
        torch.testing.assert_close(moved, total / NUM_CLIENTS, rtol=0, atol=1e-12)
        assert result.epsilon == spent_epsilon(0.5, 1, None, 1e-5)

    def test_sums_alone_are_protected_by_all_clients_noise(self, tiny_model: str) -> None:
        parts = private(federation(adapt(tiny_model), LOCAL), Local(0.02, 0.5))
        _, results = rounds(parts, 2)
        # Two sums over five clients: as one Gaussian of multiplier 0.5 * sqrt(5 / 2).
        assert results[1].sum_epsilon == pytest.approx(spent_epsilon(0.5 * math.sqrt(5 / 2), 1, None, 1e-5))
        assert results[1].epsilon == pytest.approx(spent_epsilon(0.5, 2, None, 1e-5))


class TestTree:
    def test_the_nodes_cover_each_round_once(self) -> None:
        for restart in (None, 1, 3, 8):
            mechanism = Tree(1.0, 1.0, restart_every=restart)
            for round in range(1, 40):
                covered = [each for last, size in mechanism.nodes(round) for each in range(last - size + 1, last + 1)]
                first = 1 if restart is None else (round - 1) // restart * restart + 1
                assert sorted(covered) == list(range(first, round + 1))
                assert all(
                    size & (size - 1) == 0 and (last - first + 1) % size == 0 for last, size in mechanism.nodes(round)
                )

    @pytest.mark.parametrize("restart", [None, 3])
    def test_the_noise_of_all_rounds_is_that_of_the_nodes(self, restart: int | None) -> None:
        mechanism, like = Tree(1.0, 1.0, restart_every=restart), {"a": torch.zeros(7, dtype=torch.float64)}

        def stream(round: int) -> Rng:
            return Rng(7).child("round", round, "privacy")

        total = torch.zeros(7, dtype=torch.float64)
        for round in range(1, 14):
            total += mechanism.on_sum(like, 2.0, round, stream)["a"]
            nodes = mechanism.nodes(round)
            if restart is not None:  # the trees before it are whole
                for end in range(restart, round - (round - 1) % restart, restart):
                    nodes += mechanism.nodes(end)
            expected = sum(2.0 * drawn(like, "round", last, "privacy", "node", size) for last, size in nodes)
            torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)

    def test_after_many_rounds_less_noise_is_left_than_if_each_had_its_own(self) -> None:
        like, mechanism = {"a": torch.zeros(20_000, dtype=torch.float64)}, Tree(1.0, 1.0)
        total = torch.zeros(20_000, dtype=torch.float64)
        for round in range(1, 65):
            total += mechanism.on_sum(like, 1.0, round, lambda number: Rng(0).child(number))["a"]
        assert float(total.std()) == pytest.approx(1.0, rel=0.05)  # one node; 64 rounds of their own would have 8

    def test_epsilon_counts_the_rounds_in_which_a_client_can_take_part(self) -> None:
        mechanism = Tree(1.0, 1.0)
        in_turn = InTurn(number=10).attendance(100)
        assert mechanism.epsilon(4.0, 20, in_turn) == spent_epsilon(
            4.0 / tree_sensitivity(20, None, 2, 10), 1, None, 1e-5
        )
        assert mechanism.epsilon(4.0, 20, in_turn) < mechanism.epsilon(4.0, 20, Attendance())
        assert mechanism.epsilon(4.0, 0, in_turn) == 0


@given(number=st.integers(1, 12), cohort=st.integers(1, 12), num_rounds=st.integers(1, 30))
def test_in_turn_nobody_takes_part_more_often_than_it_says(number: int, cohort: int, num_rounds: int) -> None:
    sampler = InTurn(number=min(cohort, number))
    sizes, attendance = np.ones(number, np.int64), sampler.attendance(number)
    taken: dict[int, list[int]] = {client: [] for client in range(number)}
    for round in range(1, num_rounds + 1):
        clients = sampler.sample_in(round, sizes, sampler.cohort_size(number), Rng(0))
        assert len(set(clients.tolist())) == sampler.cohort_size(number)
        for client in clients.tolist():
            taken[client].append(round)
    assert max(len(each) for each in taken.values()) == attendance.most(num_rounds)
    apart = [later - earlier for each in taken.values() for earlier, later in itertools.pairwise(each)]
    assert all(distance >= attendance.separation for distance in apart)


def test_poisson_cohorts_vary_around_the_expected_size_and_may_be_empty() -> None:
    sampler, sizes = Poisson(fraction=0.2), np.ones(10, np.int64)
    cohorts = [sampler.sample(sizes, 2, Rng(0).child(round)).tolist() for round in range(2000)]
    assert {len(cohort) for cohort in cohorts} >= {0, 1, 2, 3, 4}
    assert np.mean([len(cohort) for cohort in cohorts]) == pytest.approx(2.0, abs=0.2)
    taken = np.bincount([client for cohort in cohorts for client in cohort], minlength=10) / 2000
    assert np.all(np.abs(taken - 0.2) < 0.05)
    both = np.mean([{0, 1} <= set(cohort) for cohort in cohorts])
    assert both == pytest.approx(0.04, abs=0.02)  # independently
    assert sampler.expected_size(1, 7) == pytest.approx(1.4) and sampler.cohort_size(7) == 1
    with pytest.raises(OptionError, match="fraction: missing"):
        Poisson()


def test_the_accountant_amplifies_by_poisson_samples_alone(tiny_model: str) -> None:
    mechanism = Central(clip_norm=0.02, noise_multiplier=1.0)
    lines = {}
    for sampler in (Uniform(fraction=0.4), Poisson(fraction=0.4), InTurn(number=2)):
        made = PrivateRounds.of(mechanism, sampler.attendance(NUM_CLIENTS), 5)
        lines[type(sampler)] = made.epsilon(5), any("no amplification" in line for line in made.lines())
    assert lines[Uniform] == (spent_epsilon(1.0, 5, None, 1e-5), True)
    assert lines[Poisson] == (spent_epsilon(1.0, 5, 0.4, 1e-5), False)
    assert lines[InTurn] == (spent_epsilon(1.0, 2, None, 1e-5), True)


def test_the_target_is_met_and_the_budget_kept() -> None:
    attendance = Attendance()
    made = PrivateRounds.of(Central(1.0, target_epsilon=2.0), attendance, 10)
    assert 1.9 < made.epsilon(10) <= 2.0 and made.last_round == 10
    limited = PrivateRounds.of(Central(1.0, noise_multiplier=8.0, budget_epsilon=2.0), attendance, 50)
    last = limited.last_round
    assert 0 < last < 50 and limited.epsilon(last) <= 2.0 < limited.epsilon(last + 1)
    with pytest.raises(UserError, match=r"privacy.budget_epsilon: expected at least .*, which round 1 spends, got 0.1"):
        PrivateRounds.of(Central(1.0, noise_multiplier=0.5, budget_epsilon=0.1), attendance, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "noise_multiplier: expected either this or `target_epsilon`"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0}, "noise_multiplier: expected either"),
        ({"noise_multiplier": 0.0}, "noise_multiplier: expected a number above 0, got 0"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "delta: expected a number above 0 and below 1"),
        ({"target_epsilon": 3.0, "budget_epsilon": 2.0}, "budget_epsilon: expected at least target_epsilon, 3"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, "accountant: expected one of pld, rdp"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Central(clip_norm=1.0, **options)


@pytest.mark.parametrize("kind", [Local, Tree])
def test_only_central_noise_adapts_its_bound(kind: type[Privacy]) -> None:
    with pytest.raises(OptionError, match="clip_norm: expected a number"):
        kind(clip_norm=AdaptiveNorm(), noise_multiplier=1.0)


def test_only_what_is_sent_is_released(tiny_model: str) -> None:
    """A strategy that freezes A sends B alone: A gets no noise."""
    parts = private(federation(adapt(tiny_model), LOCAL, strategy=FfaLora()), Central(0.02, 0.5))
    (before, after), _ = rounds(parts, 1)
    moved = {name for name in before.adapter if not torch.equal(before.adapter[name], after.adapter[name])}
    assert moved == {name for name in before.adapter if name.endswith("lora_B")}
