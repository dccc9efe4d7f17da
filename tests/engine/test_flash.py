"""Flash attention in tiles is the textbook attention: values and gradients, for every mask and size."""

import tracemalloc

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import fast, qkv, seed, sizes
from test_masks import masks, patterns

import posenc
from attention import attention
from engine import flash, to_numpy, xp
from masks import causal, padding, same_document, sparse, window


def same(flash_result, result, dy, tolerance=1e-10):
    """Raises AssertionError where values or gradients differ."""
    (flash_y, flash_backward), (y, backward) = flash_result, result
    close(flash_y, y, tolerance)
    for ours, textbook in zip(flash_backward(dy), backward(dy), strict=True):
        close(ours, textbook, tolerance)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(0, 20), st.data(), st.integers(1, 6) | st.none(), seed)
def test_flash_is_the_textbook_attention(sizes, more, data, block, seed):
    batch, kv_heads, group, queries, before, dim, v_dim = sizes
    q, k, v = qkv((batch, kv_heads, group, queries + more, before, dim, v_dim), seed)
    mask = data.draw(st.none() | masks(batch, k.shape[2]))
    y = attention(q, k, v, mask, scale=0.7)
    same(flash.tiled(q, k, v, mask, scale=0.7, block=block), y, y[0])


@fast
@given(sizes, st.data(), seed)
def test_one_query_is_the_textbook_attention(sizes, data, seed):
    batch, kv_heads, group, _, before, dim, v_dim = sizes
    q, k, v = qkv((batch, kv_heads, group, 1, before, dim, v_dim), seed)
    mask = data.draw(st.none() | st.just(causal) | masks(batch, k.shape[2]))
    y = attention(q, k, v, mask, scale=0.7)
    same(flash.attention(q, k, v, mask, scale=0.7), y, y[0])
    close(flash.attention(q, k, v, mask)[0], attention(q, k, v, mask)[0])
    large = flash.attention(1e4 * q, k, v, None)[0]
    close(large, attention(1e4 * q, k, v, None)[0])  # no overflow


@fast
@given(sizes, st.integers(1, 6), seed)
def test_a_bias_is_added_to_the_scores(sizes, block, seed):
    q, k, v = qkv(sizes, seed)
    heads, queries, keys, group = *q.shape[1:3], k.shape[2], q.shape[1] // k.shape[1]
    alibi = posenc.alibi(heads, xp.float64)
    y, backward = attention(q, k, v, causal, alibi, 1)
    same(flash.tiled(q, k, v, causal, alibi, 1, block=block), (y, backward), y)
    # a bias on the scores is a further dimension of q and k
    bias = alibi(xp.arange(keys - queries, keys)[:, None], xp.arange(keys)[None])
    onehot = xp.broadcast_to(xp.eye(keys), (len(k), heads, keys, keys))
    wide_q = xp.concatenate([q, xp.broadcast_to(bias, (len(q), *bias.shape))], axis=-1)
    wide_k = xp.concatenate([xp.repeat(k, group, axis=1), onehot], axis=-1)
    y, backward = attention(wide_q, wide_k, xp.repeat(v, group, axis=1), causal, scale=1)
    by_group = lambda d: d.reshape(k.shape[0], k.shape[1], group, keys, -1).sum(axis=2)
    dq, dk, dv = backward(y)
    expected = dq[..., : q.shape[-1]], by_group(dk[..., : k.shape[-1]]), by_group(dv)
    same(flash.tiled(q, k, v, causal, alibi, 1, block=block), (y, lambda dy: expected), y)


@fast
@given(sizes, st.integers(1, 6), st.data(), seed)
def test_gradients(sizes, block, data, seed):
    q, k, v = qkv(sizes, seed)
    mask = data.draw(masks(len(q), k.shape[2]))
    check(lambda q, k, v: flash.tiled(q, k, v, mask, block=block), q, k, v, seed=seed)


@fast
@given(st.integers(1, 40), st.integers(0, 9), st.data(), st.integers(1, 9))
def test_no_tile_is_empty_none_is_missing_and_full_ones_are_full(queries, before, data, size):
    keys = before + queries
    mask = data.draw(masks(1, keys) | patterns())
    pairs = np.broadcast_to(to_numpy(mask.matrix(queries, keys)), (1, 1, queries, keys))[0, 0]
    covered = np.zeros((queries, keys), bool)
    for rows, columns in flash.plan(mask, queries, keys, size, size, size):
        for cols, full in columns:
            cols = cols if isinstance(cols, slice) else to_numpy(cols)
            assert not covered[rows, cols].any() and (not full or pairs[rows, cols].all())
            covered[rows, cols] = True
    assert not (pairs & ~covered).any()


@pytest.mark.parametrize("mask, share", [(causal, 0.55), (causal & window(64), 0.1), (None, 1.0)])
def test_what_nobody_sees_is_in_no_tile(mask, share):
    tiles = flash.plan(mask, 2048, 2048, 64, 1024, 64)
    assert (
        sum((rows.stop - rows.start) * flash.length(c) for rows, columns in tiles for c, _ in columns)
        <= share * 2048**2
    )


@pytest.mark.parametrize("kind, exponent", [("window", 1.0), ("strided", 1.5), ("fixed", 1.5), ("bigbird", 1.0)])
def test_the_work_of_a_pattern_grows_as_it_says(kind, exponent):
    work = []
    for n in 4096, 65536:
        mask = causal & sparse(kind, 4 if exponent == 1 else int((n / 64) ** 0.5))
        plan = flash.plan(mask, n, n, 64, 512, 64)
        work.append(sum(flash.length(cols) for _, columns in plan for cols, _ in columns))
    assert np.log(work[1] / work[0]) / np.log(16) < exponent + 0.05


def test_long_sequences_with_documents_and_padding_are_the_textbook_attention():
    """Heads and rows of a long sequence are computed apart, each with the mask of its own row."""
    q, k, v = (normal(i, 2, heads, 1200, 4) for i, heads in enumerate((2, 1, 1)))
    ids = xp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, 1200)), axis=1))
    real = xp.asarray(np.arange(1200) >= np.array([[0], [700]]))
    for mask in causal & same_document(ids), causal & padding(real):
        same(flash.attention(q, k, v, mask), attention(q, k, v, mask), q)


@pytest.mark.parametrize("mask", [causal, causal & sparse("strided", 5, 128), None])
def test_long_sequences_on_all_cores_are_the_textbook_attention(mask):
    q, k, v = qkv((1, 2, 2, 2100, 3, 8, 8), 0, np.float32)
    observed = {}
    same(flash.attention(q, k, v, mask, observe=observed), attention(q, k, v, mask), v[:, [0, 0, 1, 1], 3:], 1e-4)
    assert observed["max_logits"].shape == (4,)


@fast
@given(sizes, st.data(), st.integers(1, 6), seed)
def test_the_largest_score_of_each_head_is_observed(sizes, data, block, seed):
    q, k, v = qkv(sizes, seed)
    mask, observed = causal if data.draw(st.booleans()) else causal & window(data.draw(st.integers(1, 12))), {}
    flash.tiled(q, k, v, mask, block=block, observe=observed)
    scores = q @ xp.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2) / q.shape[-1] ** 0.5
    seen = xp.where(mask.matrix(q.shape[2], k.shape[2]), scores, -xp.inf)
    close(observed["max_logits"], seen.max(axis=(0, 2, 3)))


@fast
@given(sizes, seed)
def test_scores_far_from_zero_stay_finite(sizes, seed):
    q, k, v = qkv(sizes, seed, np.float32)
    y, backward = flash.tiled(q * 1e3, k * 1e3, v, causal, block=4)
    close(y, attention(q * 1e3, k * 1e3, v, causal)[0], 1e-4)
    assert all(xp.isfinite(d).all() for d in backward(y))


def test_a_query_that_may_look_nowhere_gets_zeros():
    q, k, v = qkv((2, 1, 2, 5, 0, 4, 4), 0)
    real = xp.asarray(np.array([[True] * 5, [False] * 5]))
    for y, backward in flash.attention(q, k, v, padding(real)), attention(q, k, v, real[:, None, None]):
        assert not y[1].any() and xp.isfinite(y).all()
        assert all(not d[1].any() and xp.isfinite(d).all() for d in backward(xp.ones_like(y)))


def test_padding_in_half_precision_leaves_no_nan():
    q, k, v = (3 * part for part in qkv((1, 1, 2, 8, 0, 64, 64), 0, np.float16))
    y, backward = flash.attention(q, k, v, causal & padding(xp.asarray(np.arange(8) >= 3)[None]))
    assert all(xp.isfinite(d).all() for d in (y, *backward(y)))


def test_memory_is_linear_in_the_length():
    if xp is not np:
        pytest.skip("tracemalloc sees main memory only")
    peaks = []
    for time in 8192, 16384:
        q, k, v = qkv((1, 1, 1, time, 0, 16, 16), 0, np.float32)
        tracemalloc.start()
        y, backward = flash.attention(q, k, v, causal)
        backward(y)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 16384 * 16384 * 4 / 32
