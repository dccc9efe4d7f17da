"""Attention: textbook, whole and in tiles, and a block's; what a token may and may not see; the cache."""

import dataclasses
import doctest

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import causal_window, masks, patterns

import attention as attention_module
import posenc
from architectures import ARCHITECTURES, Config
from attention import (
    KVCache,
    Options,
    attention,
    flash_attention,
    layer_options,
    self_attention,
    textbook_flash_attention,
)
from engine import to_numpy, xp
from masks import causal

seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=40, deadline=None)
maybe_window = st.none() | st.integers(1, 12)
# batch, kv_heads, heads a key head serves, queries, keys before the first query, dim, dim of v
sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 11), st.integers(0, 5),
    st.integers(1, 4), st.integers(1, 4),
)  # fmt: skip


def qkv(sizes, seed, dtype=np.float64):
    batch, kv_heads, group, queries, before, dim, v_dim = sizes
    q = normal(seed, batch, kv_heads * group, queries, dim, dtype=dtype)
    k = normal(seed + 1, batch, kv_heads, before + queries, dim, dtype=dtype)
    return q, k, normal(seed + 2, batch, kv_heads, before + queries, v_dim, dtype=dtype)


@fast
@given(sizes, st.booleans(), seed)
def test_textbook_gradients(sizes, has_mask, seed):
    q, k, v = qkv(sizes, seed)
    shape = (*q.shape[:3], k.shape[2])
    mask = xp.asarray(np.random.default_rng(seed).random(shape) < 0.5) if has_mask else None
    check(lambda q, k, v: attention(q, k, v, mask), q, k, v, seed=seed)


@fast
@given(
    st.integers(1, 11), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), masks(1, 16), st.integers(1, 6), seed
)
def test_flash_attention_of_the_textbook_is_attention(queries, before, dim, v_dim, mask, block, seed):
    q, k, v = qkv((1, 1, 1, queries, before, dim, v_dim), seed)
    y, backward = attention(q, k, v, mask)
    by_hand, by_hand_backward = textbook_flash_attention(q[0, 0], k[0, 0], v[0, 0], one_row(mask), block)
    close(by_hand, y[0, 0])
    for ours, textbook in zip(by_hand_backward(y[0, 0]), backward(y), strict=True):
        close(ours, textbook[0, 0])


def one_row(mask):
    """Of a mask whose rows differ, the first: (queries, keys)."""
    sees = lambda query, key: mask.sees(query, key).reshape(xp.broadcast_shapes(query.shape, key.shape))
    return type(mask)(sees, mask.tile, mask.grain)


def test_flash_attention_of_the_textbook_looks_at_tiles_of_64():
    q, k, v = (normal(i, 70, 2) for i in range(3))
    shapes = []
    recording = type(causal)(lambda i, j: (shapes.append((i.size, j.size)), causal.sees(i, j))[1], causal.tile)
    textbook_flash_attention(q, k, v, recording)
    assert shapes == [(64, 64), (64, 6), (6, 64), (6, 6)]


@fast
@given(sizes, seed)
def test_a_bias_is_added_to_the_scores_by_position(sizes, seed):
    q, k, v = qkv(sizes, seed)
    bias, before, group = posenc.alibi(q.shape[1], xp.float64), k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    slopes = posenc.alibi_slopes(q.shape[1], xp.float64)
    for function in attention, flash_attention:
        y, _ = function(q, k, v, None, bias, 0.3)
        for head in range(q.shape[1]):
            scores = 0.3 * q[:, head] @ k[:, head // group].swapaxes(1, 2)
            for i, j in np.ndindex(*scores.shape[1:]):
                scores[:, i, j] -= slopes[head] * abs(before + i - j)
            p = xp.exp(scores)
            close(y[:, head], p / p.sum(axis=-1, keepdims=True) @ v[:, head // group])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_scores_do_not_overflow(dtype):
    q, k, v = (1e3 * normal(i, 1, 1, 9, 4, dtype=dtype) for i in range(3))
    with np.errstate(over="raise", invalid="raise"):
        y, _ = attention(q, k, v, causal)
        flash, _ = flash_attention(q, k, v)
        by_hand, _ = textbook_flash_attention(q[0, 0], k[0, 0], v[0, 0])
    best = xp.where(causal.matrix(9, 9), (q @ k.swapaxes(-1, -2))[0, 0], -xp.inf).argmax(axis=1)
    for other in y[0, 0], flash[0, 0], by_hand:
        close(other, v[0, 0, best], 1e-3)  # softmax is all but a maximum


def test_flash_attention_of_the_textbook_has_the_gradients_that_it_says():
    q, k, v = (normal(i, 7, 3) for i in range(3))
    check(lambda q, k, v: textbook_flash_attention(q, k, v, causal, 3), q, k, v)


@fast
@given(sizes, seed)
def test_keys_have_no_order(sizes, seed):
    q, k, v = qkv(sizes, seed)
    order = np.random.default_rng(seed).permutation(k.shape[2])
    for function in attention, flash_attention:
        close(function(q, k[:, :, order], v[:, :, order], None)[0], attention(q, k, v)[0])


@fast
@given(sizes, seed)
def test_attention_stays_between_the_values(sizes, seed):
    q, k, v = qkv(sizes, seed)
    y, _ = flash_attention(q, k, xp.ones_like(v))
    close(y, xp.ones_like(y))


# --- a block's attention ---


def block_weights(seed, hidden, heads, kv_heads, dim, qk_norm=True, bias=True):
    out = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
    weights = {f"{n}_proj.weight": normal(seed + i, out[n], hidden) for i, n in enumerate("qkv")}
    weights["o_proj.weight"] = normal(seed + 3, hidden, heads * dim)
    if bias:
        weights |= {f"{n}_proj.bias": normal(seed + i, out.get(n, hidden)) for i, n in enumerate("qkvo")}
    if qk_norm:
        weights |= {f"{n}_norm.weight": 1 + 0.1 * normal(seed, dim) for n in "qk"}
    return weights


def rope_tables(time, dim):
    return posenc.rope_tables(xp.arange(time), posenc.rope_frequencies(dim)[0], dtype=xp.float64)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), seed)
def test_self_attention_gradients(kv_heads, group, qk_norm, bias, has_rope, seed):
    weights = block_weights(seed, 6, kv_heads * group, kv_heads, 4, qk_norm, bias)
    options = Options(rope=rope_tables(5, 4) if has_rope else None)
    function = lambda x, weights: self_attention(x, weights, kv_heads * group, kv_heads, options)
    check(function, normal(seed, 2, 5, 6), weights, seed=seed, tolerance=1e-5)


@fast
@given(st.integers(2, 9), st.integers(1, 8), maybe_window, seed)
def test_a_later_token_changes_no_earlier_output_and_rows_do_not_see_each_other(time, cut, size, seed):
    cut = min(cut, time - 1)
    weights, x = block_weights(seed, 6, 4, 2, 4), normal(seed, 2, time, 6)
    other = x.copy()
    other[0, cut:] += 1.0
    options = Options(causal_window(size), rope_tables(time, 4))
    y, changed = (self_attention(v, weights, 4, 2, options)[0] for v in (x, other))
    close(changed[0, :cut], y[0, :cut])
    close(changed[1], y[1])
    assert abs(changed[0, cut:] - y[0, cut:]).max() > 1e-9


@fast
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), maybe_window, seed)
def test_cached_is_uncached(steps, size, seed):
    time = sum(steps)
    weights, x = block_weights(seed, 6, 4, 2, 4), normal(seed, 2, time, 6)
    cos, sin = rope_tables(time, 4)
    whole, _ = self_attention(x, weights, 4, 2, Options(causal_window(size), (cos, sin)))
    for cache in KVCache(), KVCache(size):
        start = 0
        for step in steps:
            now = slice(start, start + step)
            kept = cache.kept()
            options = Options(causal_window(size), (cos[now], sin[now]), cache)
            part, _ = self_attention(x[:, now], weights, 4, 2, options)
            assert kept == start if cache.window is None else kept == min(start, size - 1)
            close(part, whole[:, now])
            start += step
        assert cache.length == time


@fast
@given(patterns(), st.lists(st.integers(1, 40), min_size=1, max_size=5), seed)
def test_cached_patterns_are_uncached(pattern, steps, seed):
    weights, x, cache, start = block_weights(seed, 6, 4, 2, 4), normal(seed, 2, sum(steps), 6), KVCache(), 0
    whole, _ = self_attention(x, weights, 4, 2, Options(causal & pattern))
    for step in steps:
        now = slice(start, start + step)
        part, _ = self_attention(x[:, now], weights, 4, 2, Options(causal & pattern, cache=cache))
        close(part, whole[:, now])
        start += step


def test_a_cache_with_a_window_keeps_the_window():
    cache = KVCache(window=100)
    kept = cache.append(xp.zeros((1, 1, 5000, 2)))[0].shape[2]
    assert kept == 5000  # which the queries of this very step see
    for i in range(1000):
        (keys,) = cache.append(xp.full((1, 1, 1, 2), i))
        assert keys.shape[2] == 100 and cache.buffers[0].shape[2] <= 500
    assert keys[0, 0, :, 0].tolist() == list(range(900, 1000)) and cache.length == 6000


def test_the_cache_copies_a_constant_number_of_times():
    cache, copied = KVCache(), 0
    for _ in range(5000):
        capacity = cache.buffers[0].shape[2] if cache.buffers else 0
        cache.append(xp.zeros((1, 1, 1, 2)), xp.zeros((1, 1, 1, 3)))
        copied += cache.length if cache.buffers[0].shape[2] != capacity else 0
    assert cache.length == 5000 and copied < 2 * 5000


def test_the_buffers_double_when_full_and_shrink_when_far_too_large():
    cache, one = KVCache(), xp.zeros((1, 1, 1, 2))
    capacities = []
    for _ in range(131):
        cache.append(one)
        capacities.append(cache.buffers[0].shape[2])
    assert capacities == [64] * 64 + [2 * 65] * (130 - 64) + [2 * 131]
    for read, capacity in (232, 464), (233, 200):  # of 100 in use: up to 64 + 4 · 100 are kept
        cache = KVCache(window=100)
        cache.append(xp.zeros((1, 1, read, 2)))
        cache.append(one)
        assert cache.buffers[0].shape[2] == capacity


def test_a_layer_is_causal_without_balance_and_with_the_usual_eps_by_default():
    assert Options() == Options(causal, None, None, None, None, 0.0)
    weights, x = block_weights(0, 6, 4, 2, 4, bias=False), 1e-3 * normal(1, 1, 5, 6)
    y, _ = self_attention(x, weights, 4, 2)
    close(y, self_attention(x, weights, 4, 2, Options(), 1e-6)[0], 0)
    assert abs(y - self_attention(x, weights, 4, 2, eps=1e-5)[0]).max() > 1e-6


@fast
@given(st.integers(1, 2), st.integers(1, 3), seed)
def test_grouped_query_attention_is_multi_head_attention_with_repeated_keys(kv_heads, group, seed):
    heads, x = kv_heads * group, normal(seed, 2, 5, 6)
    weights = block_weights(seed, 6, heads, kv_heads, 4)
    repeated = dict(weights)
    for name in "k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias":
        w = weights[name]
        repeated[name] = xp.repeat(w.reshape(kv_heads, 4, -1), group, axis=0).reshape(heads * 4, *w.shape[1:])
    close(self_attention(x, weights, heads, kv_heads)[0], self_attention(x, repeated, heads, heads)[0])


# --- what each layer of a model is given ---

TWO_LAYERS = Config(
    "llama", 13, 6, 8, 2, 4, 2, 4, 64,
    layer_types=("sliding_attention", "full_attention"), sliding_window=3,
)  # fmt: skip


def rope_at(positions, config=TWO_LAYERS):
    return posenc.rope_tables(positions, posenc.rope_frequencies(config.head_dim)[0], dtype=xp.float64)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("further", [None, 0, 1])
def test_the_plain_case_starts_at_position_zero_and_watches_nothing(layers, further):
    config = dataclasses.replace(
        TWO_LAYERS, num_hidden_layers=layers, layer_types=None, num_nextn_predict_layers=further
    )
    options = layer_options(config, xp.zeros((2, 5), int), np.float64)
    assert len(options) == layers + (further or 0)  # one more for the token after the next
    for one in options:
        assert one.mask is causal and one.cache is one.observe is one.real is None and one.balance == 0
        for table, expected in zip(one.rope, rope_at(xp.arange(5)), strict=True):
            close(table, expected, 0)
    cached = layer_options(config, xp.zeros((2, 5), int), np.float64, 7, [KVCache() for _ in range(layers)])
    assert len(cached) == layers  # text is generated without it
    close(cached[0].rope[0], rope_at(xp.arange(7, 12))[0], 0)


def test_layers_differ_in_window_positions_pattern_and_cache():
    config = dataclasses.replace(TWO_LAYERS, no_rope_layers=(1, 0))
    tokens, caches = xp.zeros((1, 6), int), [KVCache(3), KVCache()]
    windowed, full = layer_options(config, tokens, np.float64, cache=caches, balance=0.5)
    assert windowed.rope is not None and full.rope is None and [windowed.cache, full.cache] == caches
    assert (windowed.mask.matrix(6, 6) == causal_window(3).matrix(6, 6)).all() and full.mask is causal
    assert windowed.balance == full.balance == 0.5 and windowed.observe == {} and windowed.observe is not full.observe
    both_ways = dataclasses.replace(TWO_LAYERS, causal=False)
    windowed, full = layer_options(both_ways, tokens, np.float64)
    assert full.mask is None and windowed.mask.matrix(6, 6)[0].tolist() == [True] * 3 + [False] * 3
    pattern = dataclasses.replace(
        TWO_LAYERS, layer_types=("strided_attention",) * 2, sparse_attention={"block": 2, "stride": 1}
    )
    first, second = layer_options(pattern, tokens, np.float64)
    assert first.mask is second.mask and first.mask.grain == 2  # layers with the same mask share it
    observed = {}
    assert [o.observe for o in layer_options(config, tokens, np.float64, observe=observed)] == [
        observed[0],
        observed[1],
    ]


def test_the_context_is_stretched_as_the_config_says():
    llama = ARCHITECTURES["llama3.2"]
    (cos, sin) = layer_options(llama, xp.zeros((1, 9), int), np.float64)[0].rope
    stretching = llama.rope_theta, llama.rope_scaling, llama.max_position_embeddings
    expected = posenc.rope_tables(xp.arange(9), *posenc.rope_frequencies(llama.head_dim, *stretching), np.float64)
    close(cos, expected[0], 0)
    close(sin, expected[1], 0)


def test_documents_say_who_sees_whom_and_what_is_padding():
    documents = xp.asarray([[1, 1, 2, 2, 2, 0]])
    for options in layer_options(TWO_LAYERS, documents, np.float64, documents=documents):
        assert options.real.tolist() == [[True] * 5 + [False]]
        assert options.mask.matrix(6, 6)[0, 0, 3].tolist() == [False, False, True, True, False, False]


@fast
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.lists(st.integers(1, 4), max_size=5), seed)
def test_left_padded_rows_with_caches_are_rows_alone(lengths, steps, seed):
    """A layer with a window and one without: positions, masks, and what is real, of each step."""
    longest, time = max(lengths), max(lengths) + sum(steps)
    weights, x = block_weights(seed, 6, 4, 2, 4), normal(seed, len(lengths), time, 6)
    starts = [longest - n for n in lengths]
    real = np.arange(time) >= np.array(starts)[:, None]
    caches, start = [KVCache(TWO_LAYERS.window(i)) for i in range(2)], 0
    for step in [longest, *steps]:
        end = start + step
        options = layer_options(TWO_LAYERS, x[:, start:end, 0], np.float64, start, caches, xp.asarray(real[:, :end]))
        for i in range(2):
            assert (to_numpy(options[i].real) == real[:, start:end]).all()
            positions = np.maximum(np.arange(start, end) - np.array(starts)[:, None], 0)
            close(options[i].rope[0], rope_at(xp.asarray(positions[:, None]))[0], 0)
            kept = caches[i].kept() + step
            seen = np.broadcast_to(to_numpy(options[i].mask.matrix(step, kept)), (len(lengths), 1, step, kept))
            query, key = np.arange(start, end)[:, None], np.arange(end - kept, end)
            within = (key <= query) & (query - key < (3 if i == 0 else time))
            assert (seen[:, 0] == within & real[:, None, end - kept : end]).all()
            y, _ = self_attention(x[:, start:end], weights, 4, 2, options[i])
            for row, first in enumerate(starts):
                alone = layer_options(TWO_LAYERS, x[:1, first:end, 0], np.float64)[i]
                expected, _ = self_attention(x[row : row + 1, first:end], weights, 4, 2, alone)
                shown = min(step, end - first)
                close(y[row, -shown:], expected[0, -shown:])
        start = end


def test_the_example_is_what_is_printed():
    failed, attempted = doctest.testmod(attention_module)
    assert attempted and (not failed or xp is not np)
