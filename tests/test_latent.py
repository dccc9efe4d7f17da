"""Multi-head latent attention: gradients, the keys and values it stands for, and the cache of latents."""

import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import fast, maybe_window, rope_tables, seed
from test_masks import causal_window

import latent
import posenc
from attention import KVCache, Options, attention
from engine import xp
from latent import absorbed_attention, expanded_attention, latent_attention
from masks import causal


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
    options = Options(rope=rope_tables(5, 2 * half))
    function = lambda x, weights: latent_attention(x, weights, heads, v_dim, options, interleaved, absorb=absorb)
    check(function, normal(seed, 2, 5, 6), weights, seed=seed, tolerance=1e-5, coordinates=8)


@fast
@given(latent_sizes, st.integers(1, 6), st.integers(0, 5), maybe_window, seed)
def test_absorbed_is_expanded(sizes, queries, before, size, seed):
    heads, rank, nope, half, v_dim = sizes
    q = normal(seed, 2, heads, queries, nope + 2 * half)
    latent, w_u = (
        normal(seed + 1, 2, 1, before + queries, rank + 2 * half),
        normal(seed + 2, heads, nope + v_dim, rank),
    )
    options = Options(causal_window(size))
    y, backward = expanded_attention(q, latent, w_u, v_dim, 0.7, options)
    other, other_backward = absorbed_attention(q, latent, w_u, v_dim, 0.7, options)
    close(other, y)
    for ours, theirs in zip(other_backward(y), backward(y), strict=True):
        close(ours, theirs)


@fast
@given(latent_sizes, st.integers(1, 2), st.integers(1, 6), seed)
def test_latent_attention_is_multi_head_attention_with_the_keys_and_values_it_stands_for(sizes, batch, time, seed):
    heads, rank, nope, half, v_dim = sizes
    weights, x = latent_weights(seed, 6, heads, rank, nope, 2 * half, v_dim), normal(seed, batch, time, 6)
    (cos, sin), dim = rope_tables(time, 2 * half), nope + 2 * half
    y, _ = latent_attention(x, weights, heads, v_dim, Options(rope=(cos, sin)))
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
        head, _ = attention(q, k, (c @ w[nope:].T)[:, None], causal)
        expected = expected + head[:, 0] @ weights["o_proj.weight"][:, i * v_dim : (i + 1) * v_dim].T
    close(y, expected)


@fast
@given(latent_sizes, st.lists(st.integers(1, 40), min_size=1, max_size=5), seed)
def test_cached_latents_are_uncached_attention(sizes, steps, seed):
    heads, rank, nope, half, v_dim = sizes
    weights, time = latent_weights(seed, 6, heads, rank, nope, 2 * half, v_dim, q_rank=3), sum(steps)
    x, (cos, sin) = normal(seed, 2, time, 6), rope_tables(time, 2 * half)
    whole, _ = latent_attention(x, weights, heads, v_dim, Options(rope=(cos, sin)))
    for absorb in None, True, False:
        cache, start = KVCache(), 0
        for step in steps:
            now = slice(start, start + step)
            options = Options(rope=(cos[now], sin[now]), cache=cache)
            part, _ = latent_attention(x[:, now], weights, heads, v_dim, options, absorb=absorb)
            close(part, whole[:, now])
            start += step
        assert [buffer.shape[1] * buffer.shape[3] for buffer in cache.buffers] == [rank + 2 * half]


@fast
@given(latent_sizes, st.booleans(), seed)
def test_rows_may_have_positions_of_their_own(sizes, interleaved, seed):
    """As left-padded ones have: a row of a batch is what it is alone."""
    heads, rank, nope, half, v_dim = sizes
    weights, x = latent_weights(seed, 6, heads, rank, nope, 2 * half, v_dim, q_rank=4), normal(seed, 2, 5, 6)
    tables = posenc.rope_tables(
        xp.asarray([[[0, 0, 1, 2, 3]], [[0, 1, 2, 3, 4]]]), posenc.pair_frequencies(2 * half), dtype=xp.float64
    )
    y, backward = latent_attention(x, weights, heads, v_dim, Options(rope=tables), interleaved)
    dx, _ = backward(y)
    for row in range(2):
        options = Options(rope=tuple(table[row, 0] for table in tables))
        alone, alone_backward = latent_attention(x[row : row + 1], weights, heads, v_dim, options, interleaved)
        close(y[row : row + 1], alone)
        close(dx[row : row + 1], alone_backward(alone)[0])


# --- which of the two runs ---


def which_runs(sizes, queries, before, absorb=None, cached=True):
    """Says whether latent_attention chose "absorbed" or "expanded" for so many queries after so many cached tokens."""
    heads, rank, nope, half, v_dim = sizes
    ran, x = [], xp.ones((1, before + queries, 2))
    weights, (cos, sin) = (
        latent_weights(0, 2, heads, rank, nope, 2 * half, v_dim),
        rope_tables(before + queries, 2 * half),
    )
    cache = KVCache() if cached else None
    recorder = lambda name, attend: lambda *arguments: (ran.append(name), attend(*arguments))[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, attend in ("absorbed", absorbed_attention), ("expanded", expanded_attention):
            patch.setattr(latent, f"{name}_attention", recorder(name, attend))
        for part in (slice(before), slice(before, before + queries)) if before else (slice(queries),):
            options = Options(rope=(cos[part], sin[part]), cache=cache)
            latent_attention(x[:, part], weights, heads, v_dim, options, absorb=absorb)
    return ran[-1]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 10),
    st.integers(1, 20),
    st.integers(1, 40),
)
def test_a_cache_chooses_what_multiplies_less(heads, rank, nope, half, v_dim, queries):
    """Of each key and head: its score and its part of the output for each query, once as a latent vector of
    [c^KV ; k^R] and c^KV, once as a key [k^C ; k^R] and a value, which have to be made of c^KV first."""
    score, output = rank + 2 * half, rank
    absorbed = queries * score + queries * output
    score, output, make_key, make_value = nope + 2 * half, v_dim, nope * rank, v_dim * rank
    expanded = make_key + make_value + queries * score + queries * output
    if absorbed != expanded:
        cheaper = "absorbed" if absorbed < expanded else "expanded"
        assert which_runs((heads, rank, nope, half, v_dim), queries, 3) == cheaper


def test_deepseek_v3_absorbs_up_to_170_queries():
    sizes = 1, 512, 128, 32, 128  # of each head
    assert [which_runs(sizes, queries, 4) for queries in (1, 170, 171)] == ["absorbed", "absorbed", "expanded"]


def test_without_a_cache_keys_are_made_and_who_asks_for_one_way_gets_it():
    sizes = 2, 30, 20, 1, 20
    assert which_runs(sizes, 1, 0) == "absorbed" and which_runs(sizes, 1, 0, cached=False) == "expanded"
    assert which_runs(sizes, 1, 0, absorb=False) == "expanded"
    assert which_runs(sizes, 1, 0, absorb=True, cached=False) == "absorbed"
