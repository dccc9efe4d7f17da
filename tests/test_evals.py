"""The measures of the benchmarks, each against its definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evals

fast = settings(max_examples=30, deadline=None)
seed = st.integers(0, 2**32 - 1)


@fast
@given(st.integers(1, 200), st.data())
def test_the_wilson_interval_holds_the_p_that_are_within_two_standard_errors(n, data):
    c = data.draw(st.integers(0, n))
    p, low, high = evals.proportion([1.0] * c + [0.0] * (n - c))
    assert p == c / n and 0 <= low <= p <= high <= 1
    assert (low < p or c == 0) and (p < high or c == n)
    for end in {low, high} - {p}:
        assert math.isclose((p - end) ** 2, 1.96**2 * end * (1 - end) / n, rel_tol=1e-6, abs_tol=1e-12)


def test_the_bootstrap_interval_of_a_mean_is_about_two_standard_errors_to_each_side():
    data = np.random.default_rng(0).standard_normal(400)
    low, high = evals.bootstrap(lambda counts: counts @ data / 400, np.ones(400, int), np.random.default_rng(1), 10000)
    assert np.allclose([data.mean() - low, high - data.mean()], 1.96 * data.std() / 20, rtol=0.05)


def simulated(rng, strengths, n):
    votes = []
    for _ in range(n):
        a, b = rng.choice(len(strengths), 2, replace=False)
        votes.append((f"m{a}", f"m{b}", float(rng.random() < 1 / (1 + math.exp(strengths[b] - strengths[a])))))
    return votes


def test_ratings_hold_the_true_strengths_95_times_in_100():
    rng, inside = np.random.default_rng(0), []
    for _ in range(60):
        true = rng.normal(0, 0.7, 6)
        ratings = evals.bradley_terry(simulated(rng, true, 600), rounds=400, rng=rng)
        expected = 1000 + evals.ELO * (true - true.mean())
        inside += [ratings[f"m{m}"][1] <= expected[m] <= ratings[f"m{m}"][2] for m in range(6)]
    assert 0.91 <= np.mean(inside) <= 0.985, np.mean(inside)


votes_of = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), st.sampled_from((0.0, 0.5, 1.0))).filter(
        lambda vote: vote[0] != vote[1]
    ),
    max_size=30,
).map(lambda votes: [("a", "b", 1.0), ("b", "c", 0.5), ("c", "d", 0.0), *votes])


@fast
@given(votes_of)
def test_at_the_likeliest_ratings_each_model_wins_as_often_as_they_expect(votes):
    ratings = {name: rating[0] for name, rating in evals.bradley_terry(votes, prior=0.1).items()}
    assert math.isclose(np.mean(list(ratings.values())), 1000)
    met = {frozenset(vote[:2]) for vote in votes}
    for name in ratings:
        games = [(a, b, score) for a, b, score in votes] + [(*pair, None) for pair in map(tuple, met)]
        won = expected = 0.0
        for a, b, score in games:
            if name in (a, b):
                other, weight = (b if a == name else a), 1 if score is not None else 0.1
                won += weight * (0.5 if score is None else score if a == name else 1 - score)
                expected += weight / (1 + 10 ** ((ratings[other] - ratings[name]) / 400))
        assert math.isclose(won, expected, abs_tol=1e-5)


@fast
@given(votes_of)
def test_who_is_model_a_changes_no_rating(votes):
    swapped = [(b, a, 1 - score) for a, b, score in votes]
    for rate in evals.elo, lambda v: {name: rating[0] for name, rating in evals.bradley_terry(v).items()}:
        one, other = rate(votes), rate(swapped)
        assert one.keys() == other.keys() and all(math.isclose(one[name], other[name]) for name in one)


def test_two_models_are_as_far_apart_as_the_odds():
    rating = evals.bradley_terry([("a", "b", 1.0)] * 10 + [("a", "b", 0.0)], prior=0, anchor="b")
    assert rating["b"][0] == 1000 and math.isclose(rating["a"][0], 1400)
    assert list(evals.bradley_terry([("a", "b", 0.5)] * 3).values()) == [(1000, 1000, 1000)] * 2


def test_a_model_that_never_lost_has_a_rating_with_a_prior_and_none_without():
    votes = [("a", "b", 1.0)] * 20 + [("b", "c", 0.5)] * 5
    ratings = evals.bradley_terry(votes, rounds=100, rng=np.random.default_rng(0))
    (a, *_), (b, *_) = evals.bradley_terry([("a", "b", 1.0)]).values()
    assert a - b == pytest.approx(400 * math.log10((1 + 0.05) / 0.05))  # a tenth of a tie is added
    assert 1300 < ratings["a"][0] < 2000 and np.isfinite(list(ratings.values())).all()
    with pytest.raises(ValueError, match="never lost"):
        evals.bradley_terry(votes, prior=0)


def test_elo_by_hand_and_its_order():
    first = evals.elo([("a", "b", 1.0)], k=32)
    assert first == {"a": 1016, "b": 984}
    expected = 1 / (1 + 10 ** (-32 / 400))  # of who is 32 points ahead
    assert evals.elo([("a", "b", 1.0)] * 2, k=32)["a"] == pytest.approx(1016 + 32 * (1 - expected))
    assert evals.elo([("a", "b", 1.0)]) == {"a": 1002, "b": 998}
    there, back = (evals.elo(v, k=32) for v in ([("a", "b", 1.0), ("a", "b", 0.0)], [("a", "b", 0.0), ("a", "b", 1.0)]))
    assert there["a"] < 1000 < back["a"] and math.isclose(there["a"] + there["b"], 2000)


def test_bradley_terry_is_logistic_regression_on_who_played_whom():
    """Newton's method on the rows (x, y) themselves, as a textbook has it; least squares takes the step of mean 0."""
    rng = np.random.default_rng(0)
    votes = simulated(rng, [0.5, 0.0, -0.3, 1.0], 200)
    x = np.zeros((200, 4))
    for row, (a, b, _) in zip(x, votes):
        row[int(a[1])], row[int(b[1])] = 1, -1
    y, s, wins = np.array([vote[2] for vote in votes]), np.zeros(4), np.zeros((4, 4))
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ s))
        s += np.linalg.lstsq(x.T * (p * (1 - p)) @ x, x.T @ (y - p), rcond=None)[0]
    for a, b, score in votes:
        winner, loser = (a, b) if score else (b, a)
        wins[int(winner[1]), int(loser[1])] += 1
    assert np.allclose(evals.strengths(wins), s)
    ratings = evals.bradley_terry(votes, prior=0)
    assert np.allclose([ratings[f"m{m}"][0] for m in range(4)], 1000 + evals.ELO * s)


def test_a_task_counts_by_its_test_inputs_solved_in_two_attempts():
    outputs = [[[2]], [[4, 4]]]
    assert evals.arc_score(outputs, [[[[1]], [[2]]], [[[4, 4]], None]]) == 1
    assert evals.arc_score(outputs, [[[[2]]], [None, [[4], [4]]]]) == 0.5
    assert evals.arc_score(outputs, [[[[0]], None, [[2]]], [[[4]]]]) == 0  # the third attempt is one too many


@fast
@given(seed, st.integers(1, 60), st.integers(1, 20))
def test_calibration_error_is_the_root_mean_square_gap_of_its_bins(seed, n, size):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random(n), rng.integers(0, 2, n)
    pairs = sorted(zip(confidence, correct))
    starts = range(0, max(1, n // size) * size, size)
    bins = [pairs[a : a + size if a + 2 * size <= n else n] for a in starts]
    assert sum(map(len, bins)) == n
    total = sum(len(b) / n * (np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) ** 2 for b in bins)
    assert math.isclose(evals.calibration_error(confidence, correct, size), math.sqrt(total), abs_tol=1e-12)

    total = 0.0
    for b in range(10):
        inside = [(c, r) for c, r in pairs if b / 10 <= c < (b + 1) / 10]
        if inside:
            total += len(inside) / n * abs(np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside]))
    assert math.isclose(evals.expected_calibration_error(confidence, correct), total, abs_tol=1e-12)


def test_who_is_always_sure_and_half_right_is_off_by_a_half():
    assert evals.calibration_error([1.0] * 300, [0, 1] * 150) == 0.5
    assert evals.expected_calibration_error([1.0] * 300, [0, 1] * 150) == 0.5
    assert evals.calibration_error([0.5] * 200, [0, 1] * 100) == 0
    assert evals.expected_calibration_error([1.0, 0.95], [0, 1]) == pytest.approx(0.475)  # both in the last bin


@pytest.mark.parametrize(
    "one, other, same",
    [
        (".5", "0.5", True),
        (".5", "5", False),
        ("-.5", "-0.5", True),
        ("-.5", ".5", False),
        ("-5", "5", False),
        ("+5", "5", True),
        ("5.", "5", True),
        ("5.0", "5", True),
        ("50", "5", False),
        ("1e3", "1000", True),
        ("1E3", "1000", True),
        ("1e-3", ".001", True),
        ("1e999", "1e998", False),
        ("1e1000000", "1e1000000.", True),
        ("9007199254740993", "9007199254740992", False),
        ("101_2", "1012", False),
        ("nan", "nan", True),
        ("nan", "inf", False),
        ("10^2", "100", False),  # nothing is computed
        ("1/2", "0.5", False),
        (" SEVILLE. ", "Seville", True),
        ("a  b", "A b", True),
        ("Madrid", "Seville", False),
        ("", "0", False),
    ],
)
def test_answers_are_the_same_but_for_case_blanks_and_how_a_number_is_written(one, other, same):
    assert evals.same_answer(one, other) == evals.same_answer(other, one) == same


@fast
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(-9, 9, places=2))
def test_numerals_are_compared_as_numbers(one, other):
    assert evals.same_answer(str(one), f"{one:.5f}") and evals.same_answer(f"{one:e}", str(one))
    assert evals.same_answer(str(other), str(one)) == (one == other)


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_program():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert math.isclose(evals.pass_at_k(n, c, k), np.mean([any(s) for s in subsets]), abs_tol=1e-12)
    exact = 1 - math.comb(9_000, 500) / math.comb(10_000, 500)
    assert math.isclose(evals.pass_at_k(10_000, 1_000, 500), exact)
    for n, c, k in (3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1):
        with pytest.raises(ValueError):
            evals.pass_at_k(n, c, k)


def test_bits_per_byte_and_perplexity_by_hand():
    assert evals.perplexity(5 * math.log(8), 5) == pytest.approx(8)
    assert evals.bits_per_byte(5 * math.log(8), 10) == pytest.approx(1.5)


def test_the_likeliest_choice_in_all_and_per_byte():
    assert evals.likeliest([-3.0, -4.0, -9.0], ["a", "a long one", "b"]) == (0, 1)
    assert evals.likeliest([-3.0, -2.9], ["ñ", "n"]) == (1, 0)  # two bytes


def test_strengths_are_found_for_many_tables_at_once():
    """As the bootstrap does: the first axis is of tables."""
    wins = np.random.default_rng(0).integers(1, 9, (4, 3, 3)).astype(float)
    wins *= 1 - np.eye(3)
    np.testing.assert_allclose(evals.strengths(wins), [evals.strengths(table) for table in wins], atol=1e-8)
