"""Batches: rows, pieces of about one length and their values, comparisons in parts."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import batches, to_numpy, xp
from layers import IGNORE

ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)
asked = st.lists(st.tuples(ids, ids), min_size=1, max_size=9)


def test_targets_are_the_answer():
    inputs, targets = batches.as_rows([[1, 2, 3], [4]], [[5, 0], [6, 7, 0]])
    assert inputs.tolist() == [[1, 2, 3, 5], [4, 6, 7, 0]]
    assert targets.tolist() == [[IGNORE, IGNORE, 5, 0], [6, 7, 0, IGNORE]]


@settings(max_examples=30, deadline=None)
@given(asked, st.integers(1, 4))
def test_pieces_are_all_rows_once_and_lose_no_target(rows, size):
    inputs, targets = batches.as_rows(*zip(*rows))
    numbers, column, seen, lengths = np.arange(inputs.size).reshape(inputs.shape), np.arange(len(rows))[:, None], [], []
    for own, *piece in batches.pieces(inputs, targets, numbers, column, size=size):
        own_inputs, own_targets, own_numbers, own_column = map(to_numpy, piece)
        time = own_inputs.shape[1]
        assert len(own) <= size and (own_column[:, 0] == own).all()
        assert (own_inputs == inputs[own, :time]).all() and (own_numbers == numbers[own, :time]).all()
        assert (own_targets == targets[own, :time]).all() and (targets[own, time:] == IGNORE).all()
        assert (own_targets[:, -1] != IGNORE).any()  # and no column is without any
        seen += own.tolist()
        lengths.append(time)
    assert sorted(seen) == list(range(len(rows))) and lengths == sorted(lengths)


@settings(max_examples=20, deadline=None)
@given(asked)
def test_values_come_in_the_order_of_the_rows(rows):
    inputs, targets = batches.as_rows(*zip(*rows))
    answered = targets != IGNORE
    by_token = lambda params, config, inputs, targets: (inputs * params + config, None)
    by_row = lambda params, config, inputs, targets: ((targets != IGNORE).sum(axis=1), None)
    both = lambda *arguments: ((by_token(*arguments)[0], by_row(*arguments)[0]), None)
    whole = batches.evaluate(by_token, 3, 1, inputs, targets)
    assert (whole[answered] == (3 * inputs + 1)[answered]).all()
    assert (batches.evaluate(by_row, 3, 1, inputs, targets) == [len(answer) for _, answer in rows]).all()
    first, second = batches.evaluate(both, 3, 1, inputs, targets)
    assert (first == whole).all() and (second == answered.sum(axis=1)).all()


COMPARISONS = [  # the second question has no pair
    ([1, 2], [[3], [4, 5], [6]], [(0, 1), (2, 1)]),
    ([1], [[9], [9]], []),
    ([7], [[8], [9, 9]], [(1, 0)]),
    ([4, 4, 4], [[1], [2]], [(0, 1)]),
]


def test_comparisons_are_rows_of_those_questions_that_have_a_pair():
    inputs, targets, better, worse = batches.flat(COMPARISONS)
    answers = [[3], [4, 5], [6], [8], [9, 9], [1], [2]]
    assert [[i for i in row if i != IGNORE] for row in targets.tolist()] == answers
    assert better.tolist() == [0, 2, 4, 5] and worse.tolist() == [1, 1, 3, 6]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_batch_of_comparisons_is_so_many_questions_with_all_their_answers(batch, seed):
    inputs, targets, *_ = batches.flat(COMPARISONS)
    generator = batches.comparison_batches(COMPARISONS, batch, np.random.default_rng(seed))
    drawn = []
    for _, parts in zip(range(3), generator):
        count, begins, weights = 0, [], []
        for rows, own_inputs, own_targets, better, worse, weight in parts:
            own_inputs, own_targets, better, worse = map(to_numpy, (own_inputs, own_targets, better, worse))
            time = own_targets.shape[1]
            assert (own_inputs == inputs[rows, :time]).all() and (own_targets == targets[rows, :time]).all()
            assert (targets[rows, time:] == IGNORE).all()
            weights.append(weight)
            pairs = list(zip(rows[better].tolist(), rows[worse].tolist()))
            assert set(pairs) <= {(0, 1), (2, 1), (4, 3), (5, 6)}
            count += len(pairs)
            begins += [{0: 0, 3: 1, 5: 2}[row] for row in rows.tolist() if row in (0, 3, 5)]
        assert len(begins) == batch and weights == [1 / count] * min(4, batch)
        drawn += begins
    counts = [drawn.count(question) for question in range(3)]
    assert max(counts) - min(counts) <= 1  # each comes once before any comes again


def test_shuffled_numbers_come_once_before_any_comes_again():
    generator = batches.shuffled(5, 3, np.random.default_rng(0))
    drawn = [i for _, some in zip(range(10), generator) for i in some]
    assert len(drawn) == 30 and all(sorted(drawn[start : start + 5]) == list(range(5)) for start in range(0, 30, 5))
    assert drawn[:5] != drawn[5:10]


def test_copies_are_apart():
    params = {"w": xp.ones((2, 3)).T}
    copy = batches.copied(params)
    copy["w"] += 1
    assert (params["w"] == 1).all() and copy["w"].flags.c_contiguous


def test_sampled_answers_are_cut_where_they_ended():
    def generate(prompts, rng):
        yield np.array([prompt[0] for prompt in prompts])
        yield np.where([prompt[0] > 2 for prompt in prompts], -1, 7)

    prompts = [[1], [2], [3], [4], [5]]
    for size in 1, 2, 64:
        assert batches.sampled(generate, prompts, size=size) == [[1, 7], [2, 7], [3], [4], [5]]
