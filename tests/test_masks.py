"""Masks: what each lets see, pair by pair, and what it says of tiles."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import masks as masks_module
from engine import to_numpy, xp
from masks import PATTERNS, all_of, causal, padding, same_document, sparse, window

seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=60, deadline=None)


def causal_window(size):
    return causal if size is None else causal & window(size)


@st.composite
def patterns(draw):
    kind, stride = draw(st.sampled_from(sorted(PATTERNS))), draw(st.integers(1, 4))
    options = {"block": draw(st.integers(1, 5))}
    if kind == "bigbird":
        options |= {name: draw(st.integers(0, 2)) for name in ("global_blocks", "random_blocks", "seed")}
    return sparse(kind, stride, **options)


@st.composite
def masks(draw, batch, keys):
    """Any combination of masks for rows of at most so many keys, with at least one of them."""
    rng = np.random.default_rng(draw(seed))
    parts = [causal] if draw(st.booleans()) else []
    parts += [window(draw(st.integers(1, 12)))] if draw(st.booleans()) else []
    parts += [draw(patterns())] if draw(st.booleans()) else []
    parts += [padding(xp.asarray(rng.random((batch, keys)) < 0.7))] if draw(st.booleans()) else []
    if draw(st.booleans()) or not parts:
        ids = rng.integers(draw(st.integers(0, 1)), 4, (batch, keys))  # side by side, padding last, or in any order
        parts.append(same_document(xp.asarray(np.sort(ids, axis=1) if draw(st.booleans()) else ids)))
    return all_of(*parts)


@fast
@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 9), st.data())
def test_a_tile_is_what_its_pairs_are(batch, queries, before, data):
    keys = before + queries
    mask = data.draw(masks(batch, keys))
    pairs = np.broadcast_to(to_numpy(mask.matrix(queries, keys)), (batch, 1, queries, keys))
    cuts = [data.draw(st.integers(0, keys - 1)) for _ in range(2)]
    k0, k1 = (x // mask.grain * mask.grain for x in sorted(cuts))
    k1 = min(k1 + mask.grain, keys) - 1
    q0, q1 = sorted(data.draw(st.integers(before, keys - 1)) for _ in range(2))
    some, every = (bool(np.all(x)) for x in mask.tile(*(np.array([[x]]) for x in (q0, q1, k0, k1))))
    tile = pairs[:, :, q0 - before : q1 + 1 - before, k0 : k1 + 1]
    assert some or not tile.any()
    assert not every or tile.all()


@fast
@given(st.integers(2, 12), st.data())
def test_a_grid_of_tiles_is_answered_as_each_tile_alone(cells, data):
    rows, columns = 2, 4
    mask = data.draw(masks(3, cells * rows * columns))
    height, width = (-(-cells * n // mask.grain) * mask.grain for n in (columns, rows))
    keys = cells * rows * columns
    edges = [(start, min(start + height, keys) - 1) for start in range(0, keys, height)][:rows]
    sides = [(start, min(start + width, keys) - 1) for start in range(0, keys, width)][:columns]
    q, k = np.array(edges).T[:, :, None], np.array(sides).T[:, None, :]
    some, every = (np.broadcast_to(x, (len(edges), len(sides))) for x in mask.tile(*q, *k))
    pairs = np.broadcast_to(to_numpy(mask.matrix(keys, keys)), (3, 1, keys, keys))
    for i, j in np.ndindex(some.shape):
        alone = mask.tile(*(np.array([[x]]) for x in (*edges[i], *sides[j])))
        assert [some[i, j], every[i, j]] == [bool(x[0, 0]) for x in alone]
        tile = pairs[:, :, edges[i][0] : edges[i][1] + 1, sides[j][0] : sides[j][1] + 1]
        assert (some[i, j] or not tile.any()) and (not every[i, j] or tile.all())


@fast
@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 9))
def test_causal_and_window_are_what_they_say(queries, before, size):
    keys = before + queries
    query, key = np.arange(before, keys)[:, None], np.arange(keys)
    assert (to_numpy(causal.matrix(queries, keys)) == (key <= query)).all()
    assert (to_numpy(window(size).matrix(queries, keys)) == (abs(query - key) < size)).all()
    both_of_them = to_numpy((causal & window(size)).matrix(queries, keys))
    assert (
        (both_of_them == ((key <= query) & (query - key < size))).all()
        and all_of() is None
        and all_of(causal) is causal
    )


@fast
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 4), seed)
def test_padding_and_documents_are_what_they_say(batch, queries, before, seed):
    rng, keys = np.random.default_rng(seed), before + queries
    real, ids = rng.random((batch, keys)) < 0.5, rng.integers(0, 3, (batch, keys))
    seen = to_numpy(padding(xp.asarray(real)).matrix(queries, keys))
    assert (seen == np.broadcast_to(real[:, None, None], seen.shape)).all()
    seen = to_numpy(same_document(xp.asarray(ids)).matrix(queries, keys))
    assert (seen == (ids[:, None, before:, None] == ids[:, None, None])).all()


def test_what_is_certain_of_a_tile_is_said():
    """Where a mask erred towards (True, False) everywhere, nothing would be skipped, and the results be the same."""
    tile = lambda mask, *corners: tuple(bool(np.all(x)) for x in mask.tile(*(np.array([[c]]) for c in corners)))
    assert tile(causal, 4, 7, 8, 11) == (False, False) and tile(causal, 8, 11, 4, 8) == (True, True)
    assert tile(causal, 4, 7, 7, 9) == (True, False)
    assert tile(window(3), 10, 11, 0, 7) == (False, False) and tile(window(3), 10, 11, 0, 8) == (True, False)
    assert tile(window(3), 10, 11, 9, 12) == (True, True) and tile(window(3), 10, 11, 8, 9) == (True, False)
    assert tile(window(3), 0, 1, 4, 9) == (False, False) and tile(window(3), 0, 1, 3, 9) == (True, False)
    real = padding(xp.asarray(np.array([[False, False, True, True], [False, True, True, True]])))
    assert [tile(real, 0, 3, *keys) for keys in ((0, 0), (0, 1), (2, 3), (1, 3))] == [
        (False, False), (True, False), (True, True), (True, False)
    ]  # fmt: skip
    text = same_document(xp.asarray(np.array([[1, 1, 2, 2, 0, 0]])))
    assert tile(text, 0, 1, 2, 5) == (False, False) and tile(text, 2, 3, 2, 3) == (True, True)
    assert tile(text, 1, 2, 0, 1) == (True, False) and tile(text, 4, 5, 4, 5) == (True, True)
    assert tile(text, 4, 5, 0, 3) == (False, False) and tile(text, 2, 3, 4, 5) == (False, False)
    fixed = sparse("fixed", 2, 4)
    assert tile(fixed, 8, 11, 0, 3) == (False, False) and tile(fixed, 8, 11, 4, 7) == (True, True)
    assert tile(fixed, 8, 11, 0, 7) == (True, False)


@fast
@given(st.sampled_from(sorted(PATTERNS)), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.integers(0, 2),
       st.integers(1, 30))  # fmt: skip
def test_the_patterns_are_those_of_the_papers(kind, s, block, global_blocks, random_blocks, n):
    options = {"global_blocks": global_blocks, "random_blocks": random_blocks} if kind == "bigbird" else {}
    mask = to_numpy((causal & sparse(kind, s, block, **options)).matrix(n, n))
    for query in range(n):
        for key in range(query + 1):
            i, j = query // block, key // block
            expected = {
                "window": i - j < s,
                "strided": i - j < s or (i - j) % s == 0,
                "fixed": i // s == j // s or j % s == s - 1,
                "bigbird": i - j < s or min(i, j) < global_blocks,
            }[kind]
            assert mask[query, key] >= expected
            assert kind == "bigbird" and random_blocks or mask[query, key] == expected
        assert not mask[query, query + 1 :].any()
    if kind == "bigbird":
        blocks = mask[::block, ::block].sum(axis=1)
        assert (blocks[global_blocks:] <= s + global_blocks + random_blocks).all()


def test_bigbird_draws_from_the_blocks_so_far_and_anew_for_another_seed():
    draws = [to_numpy(sparse("bigbird", 1, 1, global_blocks=0, random_blocks=3, seed=s).matrix(40, 40)) for s in (0, 1)]
    assert not np.triu(draws[0], 1).any() and (draws[0] != draws[1]).any()
    assert (draws[0].sum(axis=1) > 1).mean() > 0.8


def test_a_sparse_mask_has_blocks_of_64_tokens_and_bigbird_a_global_and_two_random_ones():
    mask = sparse("bigbird")
    assert mask.grain == 64 and causal.grain == window(3).grain == (causal & window(3)).grain == 1
    given_all = sparse("bigbird", stride=4, block=64, global_blocks=1, random_blocks=2, seed=0)
    blocks = np.arange(0, 64 * 200, 64)
    seen = to_numpy(mask.sees(xp.asarray(blocks)[:, None], xp.asarray(blocks)[None]))
    assert (seen == to_numpy(given_all.sees(xp.asarray(blocks)[:, None], xp.asarray(blocks)[None]))).all()
    number = np.arange(200)
    local = abs(number[:, None] - number) < 4
    assert seen[local].all() and seen[0].all() and seen[:, 0].all() and not seen[1].all()
    at_random = (seen & ~local)[20:, 1:].sum(axis=1)  # beside the neighbours and the global block
    assert at_random.max() == 2 and at_random.mean() > 1.5
    near = sparse("window").sees(xp.asarray([[0]]), xp.asarray([[255, 256]]))  # the first four blocks of 64
    assert to_numpy(near).tolist() == [[True, False]]


def test_a_pattern_that_is_not_there_is_refused():
    with pytest.raises(KeyError):
        sparse("spiral").matrix(2, 2)


def test_the_example_is_what_is_printed():
    failed, attempted = doctest.testmod(masks_module)
    assert attempted and (not failed or xp is not np)
