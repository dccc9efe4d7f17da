"""Attention: flash = textbook for every mask, gradients, and what a token may and may not see."""

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from attention import (
    KVCache,
    Pattern,
    _length,
    absorbed_attention,
    attention,
    expanded_attention,
    flash_attention,
    latent_attention,
    look,
    self_attention,
    tiles,
)
from engine import to_numpy, xp

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
@given(sizes, st.booleans(), maybe_window, st.booleans(), st.booleans(), st.integers(1, 6), seed)
def test_flash_is_the_textbook_attention(sizes, causal, window, has_padding, has_slopes, block, seed):
    q, k, v = qkv(sizes, seed)
    queries, keys = q.shape[2], k.shape[2]
    mask, padding, slopes = look(queries, keys, causal, window), None, None
    if has_padding:
        padding = xp.asarray(np.random.default_rng(seed).random((len(q), keys)) < 0.7)
        mask = mask & padding[:, None, None, :]
    if has_slopes:  # a bias on the scores is a further dimension of q and k, where dim hides it in scale 1
        slopes = posenc.alibi_slopes(q.shape[1], xp.float64)
        bias = posenc.alibi_bias(q.shape[1], queries, keys, xp.float64)
        onehot = xp.broadcast_to(xp.eye(keys), (len(k), q.shape[1], keys, keys))
        wide_q = xp.concatenate([q, xp.broadcast_to(bias, (len(q), *bias.shape))], axis=-1)
        group = q.shape[1] // k.shape[1]
        wide_k = xp.concatenate([xp.repeat(k, group, axis=1), onehot], axis=-1)
        y, backward = attention(wide_q, wide_k, xp.repeat(v, group, axis=1), mask, scale=1)
        by_group = lambda d: d.reshape(k.shape[0], k.shape[1], group, keys, -1).sum(axis=2)
        dq, dk, dv = backward(y)
        expected = dq[..., : q.shape[-1]], by_group(dk[..., : k.shape[-1]]), by_group(dv)
    else:
        y, backward = attention(q, k, v, mask, scale=1)
        expected = backward(y)
    options = {"causal": causal, "window": window, "padding": padding, "slopes": slopes}
    flash_y, flash_backward = flash_attention(q, k, v, scale=1, block=block, **options)
    close(flash_y, y)
    for ours, textbook in zip(flash_backward(y), expected, strict=True):
        close(ours, textbook)


@fast
@given(sizes, st.booleans(), maybe_window, st.integers(1, 6), seed)
def test_flash_gradients(sizes, causal, window, block, seed):
    q, k, v = qkv(sizes, seed)
    check(lambda q, k, v: flash_attention(q, k, v, causal, window, block=block), q, k, v, seed=seed)


@settings(max_examples=100, deadline=None)
@given(
    sizes,
    st.integers(1, 4),
    st.booleans(),
    maybe_window,
    st.booleans(),
    st.integers(1, 6) | st.none(),
    st.integers(0, 3),
    seed,
)
def test_segments_are_the_block_diagonal_mask(sizes, count, causal, window, has_padding, block, more, seed):
    q, k, v = qkv(sizes, seed)
    batch, queries, keys = len(q), q.shape[2], k.shape[2]
    rng = np.random.default_rng(seed)
    # side by side as packed texts are, or in any order; those of more than keys are of a longer past
    segments = rng.integers(0, count, (batch, more + keys))
    segments = xp.asarray(np.sort(segments, axis=1) if seed % 2 else segments)
    own = segments[:, more:]
    mask = look(queries, keys, causal, window) & (own[:, None, -queries:, None] == own[:, None, None, :])
    padding = None
    if has_padding:
        padding = xp.asarray(rng.random((batch, keys)) < 0.7)
        mask = mask & padding[:, None, None, :]
    y, backward = attention(q, k, v, mask)
    options = {"causal": causal, "window": window, "padding": padding, "block": block}
    flash_y, flash_backward = flash_attention(q, k, v, segments=segments, **options)
    close(flash_y, y)
    for ours, textbook in zip(flash_backward(y), backward(y), strict=True):
        close(ours, textbook)


@fast
@given(sizes, st.integers(1, 3), seed)
def test_gradients_with_segments(sizes, count, seed):
    q, k, v = qkv(sizes, seed)
    segments = xp.asarray(np.random.default_rng(seed).integers(0, count, (len(q), k.shape[2])))
    check(lambda q, k, v: flash_attention(q, k, v, block=3, segments=segments), q, k, v, seed=seed)


# --- sparse patterns ---

patterns = st.builds(
    Pattern,
    st.sampled_from(["window", "strided", "fixed", "bigbird"]),
    stride=st.integers(1, 4),
    block=st.integers(1, 5),
    global_blocks=st.integers(0, 2),
    random_blocks=st.integers(0, 2),
    seed=st.integers(0, 9),
)


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(0, 20), patterns, st.booleans(), maybe_window, st.booleans(), seed)
def test_a_pattern_is_full_attention_with_its_mask(sizes, more, pattern, causal, window, has_padding, seed):
    batch, kv_heads, group, queries, before, dim, v_dim = sizes
    q, k, v = qkv((batch, kv_heads, group, queries + more, before, dim, v_dim), seed)
    queries, keys = q.shape[2], k.shape[2]
    mask, padding = pattern.mask(queries, keys, causal, window), None
    if has_padding:
        padding = xp.asarray(np.random.default_rng(seed).random((batch, keys)) < 0.7)
        mask = mask & padding[:, None, None, :]
    y, backward = attention(q, k, v, mask)
    sparse, sparse_backward = flash_attention(q, k, v, causal, window, padding, pattern=pattern)
    close(sparse, y)
    for ours, textbook in zip(sparse_backward(y), backward(y), strict=True):
        close(ours, textbook)


@fast
@given(st.integers(1, 40), st.integers(0, 9), patterns | st.none(), st.booleans(), maybe_window, st.integers(1, 9))
def test_no_tile_is_empty_and_none_is_missing(queries, before, pattern, causal, window, size):
    keys = before + queries
    mask = np.asarray((pattern.mask if pattern else look)(queries, keys, causal, window).tolist())
    covered = np.zeros((queries, keys), bool)
    for rows, columns in tiles(queries, keys, causal, window, pattern, size, size):
        for cols in columns:
            cols = cols if isinstance(cols, slice) else to_numpy(cols)
            assert not covered[rows, cols].any()
            covered[rows, cols] = True
            assert mask[rows][:, np.arange(keys)[cols]].any(axis=0).all()  # somebody looks at each of its keys
    assert not (mask & ~covered).any()


@fast
@given(patterns, st.integers(1, 30))
def test_the_patterns_are_those_of_the_papers(pattern, n):
    mask = np.asarray(pattern.mask(n, n).tolist())
    for query in range(n):
        for key in range(query + 1):
            i, j, s = query // pattern.block, key // pattern.block, pattern.stride
            expected = {
                "window": i - j < s,
                "strided": i - j < s or (i - j) % s == 0,
                "fixed": i // s == j // s or j % s == s - 1,
                "bigbird": i - j < s or min(i, j) < pattern.global_blocks,
            }[pattern.kind]
            assert mask[query, key] >= expected
            assert pattern.kind == "bigbird" and pattern.random_blocks or mask[query, key] == expected
        assert not mask[query, query + 1 :].any()
    if pattern.kind == "bigbird":
        blocks = mask[:: pattern.block, :: pattern.block].sum(axis=1)
        others = pattern.stride + pattern.global_blocks + pattern.random_blocks
        assert (blocks[pattern.global_blocks :] <= others).all()


@pytest.mark.parametrize("kind, exponent", [("window", 1.0), ("strided", 1.5), ("fixed", 1.5), ("bigbird", 1.0)])
def test_the_work_of_a_pattern_grows_as_it_says(kind, exponent):
    work = []
    for n in 4096, 65536:
        stride = 4 if exponent == 1 else int((n / 64) ** 0.5)
        plan = tiles(n, n, True, None, Pattern(kind, stride), 64, 512)
        work.append(sum(_length(cols) for _, columns in plan for cols in columns))
    assert np.log(work[1] / work[0]) / np.log(16) < exponent + 0.05


def test_a_pattern_that_is_not_there_is_refused():
    for wrong in {"kind": "spiral"}, {"kind": "window", "stride": 0}, {"kind": "bigbird", "random_blocks": -1}:
        with pytest.raises(ValueError, match="pattern"):
            Pattern(**wrong)


def test_long_sequences_with_segments_are_the_textbook_attention():
    """Heads and rows of a long sequence are computed apart, each with the segments of its own row."""
    q, k, v = (normal(i, 2, heads, 1200, 4) for i, heads in enumerate((2, 1, 1)))
    segments = xp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, 1200)), axis=1))
    y, backward = attention(q, k, v, look(1200, 1200) & (segments[:, None, :, None] == segments[:, None, None, :]))
    flash_y, flash_backward = flash_attention(q, k, v, segments=segments)
    close(flash_y, y)
    for ours, textbook in zip(flash_backward(y), backward(y), strict=True):
        close(ours, textbook)


@pytest.mark.parametrize("pattern", [None, Pattern("strided", 5, 128)])
def test_long_sequences_on_all_cores_are_the_textbook_attention(pattern):
    q, k, v = qkv((1, 2, 2, 2100, 3, 8, 8), 0, np.float32)
    mask = (pattern.mask if pattern else look)(2100, 2103)
    y, backward = attention(q, k, v, mask)
    observed = {}
    flash_y, flash_backward = flash_attention(q, k, v, pattern=pattern, observed=observed)
    for ours, textbook in zip(
        (flash_y, *flash_backward(v[:, [0, 0, 1, 1], 3:])), (y, *backward(v[:, [0, 0, 1, 1], 3:]))
    ):
        close(ours, textbook, 1e-4)
    assert observed["max_logits"].shape == (4,)


@fast
@given(sizes, seed)
def test_scores_far_from_zero_stay_finite(sizes, seed):
    q, k, v = qkv(sizes, seed, np.float32)
    y, backward = flash_attention(q * 1e3, k * 1e3, v, block=4)
    close(y, attention(q * 1e3, k * 1e3, v, look(q.shape[2], k.shape[2]))[0], 1e-4)
    assert all(xp.isfinite(d).all() for d in backward(y))


def test_a_query_that_may_look_nowhere_gets_zeros():
    q, k, v = qkv((2, 1, 2, 5, 0, 4, 4), 0)
    padding = xp.asarray(np.array([[True] * 5, [False] * 5]))
    for y, backward in flash_attention(q, k, v, padding=padding), attention(q, k, v, padding[:, None, None]):
        assert not y[1].any() and xp.isfinite(y).all()
        assert all(not d[1].any() and xp.isfinite(d).all() for d in backward(xp.ones_like(y)))


def test_padding_in_half_precision_leaves_no_nan():
    q, k, v = (3 * part for part in qkv((1, 1, 2, 8, 0, 64, 64), 0, np.float16))
    padding = xp.asarray(np.arange(8) >= 3)[None]
    y, backward = flash_attention(q, k, v, padding=padding)
    assert all(xp.isfinite(d).all() for d in (y, *backward(y)))
    with pytest.raises(ValueError, match="window"):
        flash_attention(q, k, v, window=0)


@fast
@given(sizes, seed)
def test_keys_have_no_order(sizes, seed):
    q, k, v = qkv(sizes, seed)
    order = np.random.default_rng(seed).permutation(k.shape[2])
    close(attention(q, k[:, :, order], v[:, :, order])[0], attention(q, k, v)[0])
    close(flash_attention(q, k[:, :, order], v[:, :, order], causal=False, block=3)[0], attention(q, k, v)[0])


@fast
@given(sizes, seed)
def test_attention_stays_between_the_values(sizes, seed):
    q, k, v = qkv(sizes, seed)
    y, _ = flash_attention(q, k, xp.ones_like(v), block=4)
    close(y, xp.ones_like(y))


def test_flash_memory_is_linear_in_the_length():
    import tracemalloc

    if xp is not np:
        pytest.skip("tracemalloc sees main memory only")
    peaks = []
    for time in 8192, 16384:
        q, k, v = qkv((1, 1, 1, time, 0, 16, 16), 0, np.float32)
        tracemalloc.start()
        y, backward = flash_attention(q, k, v)
        backward(y)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 16384 * 16384 * 4 / 32


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
    rope = rope_tables(5, 4) if has_rope else None
    function = lambda x, weights: self_attention(x, weights, kv_heads * group, kv_heads, rope)
    check(function, normal(seed, 2, 5, 6), weights, seed=seed, tolerance=1e-5)


@fast
@given(st.integers(2, 9), st.integers(1, 8), maybe_window, seed)
def test_a_later_token_changes_no_earlier_output_and_rows_do_not_see_each_other(time, cut, window, seed):
    cut = min(cut, time - 1)
    weights, x = block_weights(seed, 6, 4, 2, 4), normal(seed, 2, time, 6)
    other = x.copy()
    other[0, cut:] += 1.0
    y, changed = (self_attention(v, weights, 4, 2, rope_tables(time, 4), window=window)[0] for v in (x, other))
    close(changed[0, :cut], y[0, :cut])
    close(changed[1], y[1])
    assert abs(changed[0, cut:] - y[0, cut:]).max() > 1e-9


@fast
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), maybe_window, seed)
def test_cached_is_uncached(steps, window, seed):
    time = sum(steps)
    weights, x = block_weights(seed, 6, 4, 2, 4), normal(seed, 2, time, 6)
    cos, sin = rope_tables(time, 4)
    whole, _ = self_attention(x, weights, 4, 2, (cos, sin), window=window)
    for cache in KVCache(), KVCache(window):
        start = 0
        for step in steps:
            now = slice(start, start + step)
            part, _ = self_attention(x[:, now], weights, 4, 2, (cos[now], sin[now]), cache=cache, window=window)
            close(part, whole[:, now])
            start += step
        assert cache.length == time


@fast
@given(patterns, st.lists(st.integers(1, 40), min_size=1, max_size=5), seed)
def test_cached_patterns_are_uncached(pattern, steps, seed):
    weights, x, cache, start = block_weights(seed, 6, 4, 2, 4), normal(seed, 2, sum(steps), 6), KVCache(), 0
    whole, _ = self_attention(x, weights, 4, 2, pattern=pattern)
    for step in steps:
        now = slice(start, start + step)
        part, _ = self_attention(x[:, now], weights, 4, 2, cache=cache, pattern=pattern)
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


# --- multi-head latent attention ---


def latent_weights(seed, hidden, heads, rank, nope, turning, v_dim, q_rank=None, bias=False):
    shapes = {"kv_a_proj_with_mqa": (rank + turning, hidden), "kv_b_proj": (heads * (nope + v_dim), rank)}
    shapes["o_proj"] = (hidden, heads * v_dim)
    if q_rank is None:
        shapes["q_proj"] = (heads * (nope + turning), hidden)
    else:
        shapes |= {"q_a_proj": (q_rank, hidden), "q_b_proj": (heads * (nope + turning), q_rank)}
    weights = {f"{name}.weight": normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    if bias:
        for name in {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"} & shapes.keys():
            weights[f"{name}.bias"] = normal(seed + 7, shapes[name][0])
    weights["kv_a_layernorm.weight"] = 1 + 0.1 * normal(seed + 8, rank)
    if q_rank is not None:
        weights["q_a_layernorm.weight"] = 1 + 0.1 * normal(seed + 9, q_rank)
    return weights


# heads, rank, part without position, half the part with it, size of a value
latent_sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2), st.integers(1, 4)
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(latent_sizes, st.none() | st.integers(4, 6), st.booleans(), st.booleans(), st.booleans(), seed)
def test_latent_attention_gradients(sizes, q_rank, interleaved, absorb, bias, seed):
    heads, rank, nope, half, v_dim = sizes
    rank += 3  # the norm of one or two numbers bends too sharply for central differences
    weights = latent_weights(seed, 6, heads, rank, nope, 2 * half, v_dim, q_rank, bias)
    rope = rope_tables(5, 2 * half)
    function = lambda x, weights: latent_attention(x, weights, heads, v_dim, rope, interleaved, absorb=absorb)
    check(function, normal(seed, 2, 5, 6), weights, seed=seed, tolerance=1e-5, coordinates=8)


@fast
@given(latent_sizes, st.integers(1, 6), st.integers(0, 5), maybe_window, seed)
def test_absorbed_is_expanded(sizes, queries, before, window, seed):
    heads, rank, nope, half, v_dim = sizes
    q = normal(seed, 2, heads, queries, nope + 2 * half)
    latent, w_kv = (
        normal(seed + 1, 2, 1, before + queries, rank + 2 * half),
        normal(seed + 2, heads, nope + v_dim, rank),
    )
    options = {"scale": 0.7, "window": window}
    y, backward = expanded_attention(q, latent, w_kv, v_dim, **options)
    other, other_backward = absorbed_attention(q, latent, w_kv, v_dim, **options)
    close(other, y)
    for ours, theirs in zip(other_backward(y), backward(y), strict=True):
        close(ours, theirs)


@fast
@given(latent_sizes, st.integers(1, 2), st.integers(1, 6), seed)
def test_latent_attention_is_multi_head_attention_with_the_keys_and_values_it_stands_for(sizes, batch, time, seed):
    heads, rank, nope, half, v_dim = sizes
    weights, x = latent_weights(seed, 6, heads, rank, nope, 2 * half, v_dim), normal(seed, batch, time, 6)
    (cos, sin), dim = rope_tables(time, 2 * half), nope + 2 * half
    y, _ = latent_attention(x, weights, heads, v_dim, (cos, sin))
    down = x @ weights["kv_a_proj_with_mqa.weight"].T
    c = down[..., :rank] / xp.sqrt((down[..., :rank] ** 2).mean(axis=-1, keepdims=True) + 1e-6)
    c = c * weights["kv_a_layernorm.weight"]
    expected = 0.0
    for i in range(heads):
        q = x @ weights["q_proj.weight"][i * dim : (i + 1) * dim].T
        w = weights["kv_b_proj.weight"][i * (nope + v_dim) : (i + 1) * (nope + v_dim)]
        turn = lambda part: posenc.rope(part[:, None], cos, sin, interleaved=True)[0]
        q = xp.concatenate([q[:, None, :, :nope], turn(q[..., nope:])], axis=-1)
        k = xp.concatenate([(c @ w[:nope].T)[:, None], turn(down[..., rank:])], axis=-1)
        head, _ = attention(q, k, (c @ w[nope:].T)[:, None], look(time, time))
        expected = expected + head[:, 0] @ weights["o_proj.weight"][:, i * v_dim : (i + 1) * v_dim].T
    close(y, expected)


@fast
@given(latent_sizes, st.lists(st.integers(1, 40), min_size=1, max_size=5), seed)
def test_cached_latents_are_uncached_attention(sizes, steps, seed):
    heads, rank, nope, half, v_dim = sizes
    weights, time = latent_weights(seed, 6, heads, rank, nope, 2 * half, v_dim, q_rank=3), sum(steps)
    x, (cos, sin) = normal(seed, 2, time, 6), rope_tables(time, 2 * half)
    whole, _ = latent_attention(x, weights, heads, v_dim, (cos, sin))
    for absorb in None, True, False:
        cache, start = KVCache(), 0
        for step in steps:
            now = slice(start, start + step)
            part, _ = latent_attention(
                x[:, now], weights, heads, v_dim, (cos[now], sin[now]), cache=cache, absorb=absorb
            )
            close(part, whole[:, now])
            start += step
        assert [buffer.shape[1] * buffer.shape[3] for buffer in cache.buffers] == [rank + 2 * half]


@fast
@given(sizes, st.booleans(), maybe_window, st.integers(1, 6), seed)
def test_the_largest_score_of_each_head_is_observed(sizes, causal, window, block, seed):
    q, k, v = qkv(sizes, seed)
    observed = {}
    flash_attention(q, k, v, causal, window, block=block, observed=observed)
    scores = q @ xp.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2) / q.shape[-1] ** 0.5
    seen = xp.where(look(q.shape[2], k.shape[2], causal, window), scores, -xp.inf)
    close(observed["max_logits"], seen.max(axis=(0, 2, 3)))
