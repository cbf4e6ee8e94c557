"""The mathematics of audits: ROC figures, likelihood ratios, intervals, and the bound on epsilon that one run gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from flora.core.rng import Rng
from flora.privacy.attacks import (
    advantage,
    auc,
    likelihood_ratios,
    offline_scores,
    success,
    true_positive_rate,
)
from flora.privacy.binomial import clopper_pearson, upper_tail
from flora.privacy.one_run import (
    GUESSED_SHARES,
    Guesses,
    epsilon_lower_bound,
    guesses,
    lower_bound,
    p_value,
)


@pytest.mark.parametrize("seed", range(5))
def test_areas_and_rates_are_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Rounded, so that many scores are equal.
    members, others = generator.normal(0.5, 1, 150).round(1), generator.normal(0, 1, 230).round(1)
    truth, scores = np.repeat([1, 0], [150, 230]), np.concatenate([members, others])
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    for rate in (0.01, 0.1, 0.5):
        assert true_positive_rate(members, others, rate) == pytest.approx(true[false <= rate].max(), abs=1e-12)


def test_figures_of_a_case_worked_by_hand() -> None:
    members, others = np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])
    # Pairs won: 2 of 3, 1.5 of 2, 1 of 1: (2 + 1.5 + 1) / 6.
    assert auc(members, others) == pytest.approx(4.5 / 6)
    assert true_positive_rate(members, others, 0.0) == pytest.approx(1 / 3)
    assert true_positive_rate(members, others, 0.5) == 1
    assert advantage(np.array([0.1, 0.2, 0.9]), np.array([0.3, 0.5])) == pytest.approx(2 / 3 - 1 / 2)
    assert success(members, np.empty(0), Rng(0)) is None


def test_a_success_says_only_what_so_few_can_show() -> None:
    generator = np.random.default_rng(0)
    few = success(generator.normal(1, 1, 60), generator.normal(0, 1, 99), Rng(0))
    many = success(generator.normal(1, 1, 60), generator.normal(0, 1, 1000), Rng(0))
    assert few is not None and not few.tpr
    assert many is not None and list(many.tpr) == [0.01, 0.001]
    single = success(generator.normal(1, 1, 60), np.zeros(1), Rng(0))
    assert single is not None and tuple(single.interval) == (0.0, 1.0)
    for each in (few, many):
        assert each.interval.low < each.auc < each.interval.high
    rate, interval = many.tpr[0.01]
    assert interval.low < rate < interval.high


def test_the_interval_of_the_area_covers_it_about_as_often_as_it_says() -> None:
    generator, truth = np.random.default_rng(1), stats.norm.cdf(1 / math.sqrt(2))
    covered = 0
    for index in range(50):
        found = success(generator.normal(1, 1, 80), generator.normal(0, 1, 80), Rng(index))
        assert found is not None
        covered += found.interval.low <= truth <= found.interval.high
    assert covered >= 43  # 47.5 expected


@pytest.mark.parametrize(("successes", "number"), [(0, 10), (3, 10), (10, 10), (50, 1000), (1, 1)])
def test_intervals_of_shares_are_the_exact_ones(successes: int, number: int) -> None:
    expected = stats.binomtest(successes, number).proportion_ci(0.95, "exact")
    assert clopper_pearson(successes, number) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert upper_tail(number, 0.3, successes) == pytest.approx(stats.binom.sf(successes - 1, number, 0.3), abs=1e-12)


def test_likelihood_ratios_equal_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    observed, references = generator.normal(size=7), generator.normal(size=(8, 7))
    was_in = np.stack([generator.permutation(8) < 4 for _ in range(7)], axis=1)
    inside, outside, squares = [], [], {True: 0.0, False: 0.0}
    for place in range(7):
        for side, means in ((True, inside), (False, outside)):
            values = references[was_in[:, place] == side, place]
            means.append(sum(values) / 4)
            squares[side] += sum((value - means[-1]) ** 2 for value in values)
    deviation = {side: math.sqrt(total / (7 * 3)) for side, total in squares.items()}
    expected = [
        stats.norm.logpdf(value, into, deviation[True]) - stats.norm.logpdf(value, out, deviation[False])
        for value, into, out in zip(observed, inside, outside, strict=True)
    ]
    np.testing.assert_allclose(likelihood_ratios(observed, references, was_in), expected, atol=1e-12)
    offline = [(value - out) / deviation[False] for value, out in zip(observed, outside, strict=True)]
    np.testing.assert_allclose(offline_scores(observed, references, was_in), offline, atol=1e-12)


def test_the_likelihood_ratio_sees_through_hard_examples_where_the_loss_does_not() -> None:
    generator, number = np.random.default_rng(0), 2000
    hardness = generator.normal(0, 5, number)
    is_member = np.arange(number) < number // 2
    was_in = np.stack([generator.permutation(8) < 4 for _ in range(number)], axis=1)
    references = hardness + was_in + generator.normal(0, 0.5, (8, number))
    observed = hardness + is_member + generator.normal(0, 0.5, number)
    ratios = likelihood_ratios(observed, references, was_in)
    assert auc(observed[is_member], observed[~is_member]) < 0.6
    assert auc(ratios[is_member], ratios[~is_member]) > 0.85


def slow_p_value(made: Guesses, epsilon: float, delta: float) -> float:
    """The same by SciPy's binomial, one count after another."""
    number, right = made.num_guesses, made.num_right
    share = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = sum(stats.binom.pmf(count, number, share) for count in range(right, number + 1))
    worst = max(
        (sum(stats.binom.pmf(count, number, share) for count in range(right - i, right)) / i)
        for i in range(1, right + 1)
    )
    return float(min(1, tail + 2 * made.num_canaries * delta * worst))


@pytest.mark.parametrize("made", [Guesses(30, 20, 15), Guesses(50, 50, 31), Guesses(40, 10, 10)])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2])
def test_p_values_equal_a_slow_evaluation_and_never_fall(made: Guesses, delta: float) -> None:
    epsilons = np.linspace(0, 6, 13)
    found = [p_value(made, epsilon, delta) for epsilon in epsilons]
    np.testing.assert_allclose(found, [slow_p_value(made, each, delta) for each in epsilons], atol=1e-11)
    assert (np.diff(found) >= -1e-12).all()


def test_bounds_are_those_that_the_paper_prints() -> None:
    # arXiv:2305.08846, appendix D: 0.673; section 7: 2.675.
    assert epsilon_lower_bound(Guesses(1000, 100, 75), 1e-4, 0.95) == pytest.approx(0.673, abs=5e-4)
    assert epsilon_lower_bound(Guesses(100_000, 1510, 1439), 1e-5, 0.95) == pytest.approx(2.675, abs=1e-3)
    # All of n guesses right, without delta: q^n = 0.05 at q = 0.05^(1 / n).
    share = 0.05 ** (1 / 20)
    assert epsilon_lower_bound(Guesses(20, 20, 20), 0.0, 0.95) == pytest.approx(math.log(share / (1 - share)), abs=1e-9)
    assert epsilon_lower_bound(Guesses(100, 100, 50), 1e-5, 0.95) == 0


def test_guesses_are_the_extremes_and_the_rest_is_left_open() -> None:
    scores, was_in = np.array([5.0, 1.0, 3.0, 2.0, 4.0]), np.array([True, True, False, False, True])
    assert guesses(scores, was_in, 2) == Guesses(5, 2, 1)
    assert guesses(scores, was_in, 4) == Guesses(5, 4, 3)
    assert lower_bound(scores[:1], was_in[:1], delta=0.0).epsilon == 0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_stays_below_the_epsilon_of_randomised_response(epsilon: float) -> None:
    """Each coin is told truly with probability e^epsilon / (1 + e^epsilon): exactly (epsilon, 0)-DP."""
    generator, found = np.random.default_rng(0), []
    for _ in range(60):
        was_in = generator.integers(2, size=200) == 1
        told = was_in ^ (generator.random(200) > 1 / (1 + math.exp(-epsilon)))
        found.append(lower_bound(told + generator.random(200) / 2, was_in, delta=0.0).epsilon)
    assert np.mean(np.array(found) > epsilon) <= 0.05
    assert np.median(found) > 0.2 * epsilon  # and says something


def test_the_bound_stays_below_the_epsilon_of_the_gaussian_mechanism() -> None:
    """Canaries in dimensions of their own, noise of deviation 1: delta(epsilon) is known in closed form."""
    delta, epsilon = 1e-5, 4.377
    exact = stats.norm.cdf(0.5 - epsilon) - math.exp(epsilon) * stats.norm.cdf(-0.5 - epsilon)
    assert exact <= delta * 1.001  # arXiv:1805.06530, theorem 5, at sensitivity 1
    generator = np.random.default_rng(0)
    for _ in range(20):
        was_in = generator.integers(2, size=1000) == 1
        found = lower_bound(was_in + generator.normal(size=1000), was_in, delta=delta)
        assert 0.2 < found.epsilon < epsilon


def test_one_bound_of_several_pays_for_the_choice() -> None:
    scores, was_in = np.arange(40.0), np.arange(40) >= 20
    alone = epsilon_lower_bound(Guesses(40, 40, 40), 0.0, 0.95)
    shared = epsilon_lower_bound(Guesses(40, 40, 40), 0.0, 1 - 0.05 / len(GUESSED_SHARES))
    assert lower_bound(scores, was_in, delta=0.0).epsilon == shared < alone
