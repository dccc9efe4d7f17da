"""Attention: textbook, whole and in tiles, and a block's; what a token may and may not see; the cache."""

import doctest

import numpy as np
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import causal_window, masks, patterns

import attention as attention_module
import posenc
from attention import KVCache, Options, attention, flash_attention, self_attention, textbook_flash_attention
from engine import xp
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


def test_the_example_is_what_is_printed():
    assert doctest.testmod(attention_module).failed == 0 or xp is not np
