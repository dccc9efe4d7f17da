"""Transformers actuales: variantes de atención.

Every token asks with a query q, is found by its key k and answers with its value v:

    attention(q, k, v) = softmax(q kᵀ / √dim) v                     (Vaswani et al. 2017, equation 1)

The scores q kᵀ are a (queries, keys) matrix, so time and memory grow with the square of the length n.
Flash attention computes the same numbers tile by tile and never holds that matrix. Sparse attention lets a
query see a subset of the keys only, in fixed patterns, windows or at random, and tiles that hold nothing are
skipped: O(n √n) for strided and fixed patterns whose stride grows as √n, O(n) for a window and for BigBird. The
key-value cache keeps
k and v of the tokens already read, so that generating a token costs one query instead of n. Latent attention
makes that cache small: it keeps one short vector per token, of which the keys and values of all heads are made.

Shapes: q (batch, heads, queries, dim), k and v (batch, kv_heads, keys, dim). Where kv_heads < heads, each
key head serves heads / kv_heads consecutive query heads: all of them in multi-query attention (Shazeer
2019), some in grouped-query attention (Ainslie et al. 2023), one in multi-head attention. Where there are
fewer queries than keys, the queries are the last of the sequence.
"""

from dataclasses import dataclass

import numpy as np

from engine import flash_cuda, to_numpy, xp
from engine.threads import in_parallel
from layers import project, rms_norm, softmax
from posenc import rope as rotate


def attention(q, k, v, mask=None, scale=None):
    """Scaled dot-product attention, the textbook version: the whole score matrix at once.

    mask: booleans that broadcast to (batch, heads, queries, keys), True = may look; None = everywhere.
    A query that may look nowhere gets zeros. scale: of the scores, 1/√dim if None.
    Returns y (batch, heads, queries, dim of v) and backward(dy) -> (dq, dk, dv).
    """
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_all, v_all = xp.repeat(k, group, axis=1), xp.repeat(v, group, axis=1)
    scores = q @ k_all.swapaxes(-1, -2) * scale  # (batch, heads, queries, keys)
    if mask is not None:
        scores = xp.where(mask, scores, -xp.inf)
    p, softmax_backward = softmax(scores)
    y = p @ v_all

    def backward(dy):
        dscores = softmax_backward(dy @ v_all.swapaxes(-1, -2)) * scale
        dq = dscores @ k_all
        dk = dscores.swapaxes(-1, -2) @ q
        dv = p.swapaxes(-1, -2) @ dy
        # a key head's gradient is the sum over the query heads it serves
        sum_groups = lambda d: d.reshape(k.shape[0], k.shape[1], group, *d.shape[2:]).sum(axis=2)
        return dq, sum_groups(dk), sum_groups(dv)

    return y, backward


def look(queries, keys, causal=True, window=None):
    """The mask as a matrix: (queries, keys) booleans, True = may look.

    causal: a query sees itself and what came before. window: it sees only keys less than `window`
    places away, itself included.
    """
    return _look(xp.arange(keys - queries, keys)[:, None], xp.arange(keys), causal, window)


def _look(query, key, causal, window):
    """The same for any positions that broadcast."""
    distance = query - key
    seen = distance >= 0 if causal else xp.ones(distance.shape, bool)
    return seen if window is None else seen & (abs(distance) < window)


PATTERNS = "window", "strided", "fixed", "bigbird"


@dataclass(frozen=True)
class Pattern:
    """Which blocks of keys a block of queries sees, in sparse attention. i and j number the blocks of `block` tokens.

    window    neighbours only, |i - j| < stride: O(n)
    strided   neighbours, and every stride-th block                                           Child et al. 2019
    fixed     its own span of `stride` blocks, and the last block of every span               Child et al. 2019
    bigbird   neighbours, the first `global_blocks` (which see all, too) and `random_blocks` draws from those up to
              i, some of which may coincide: O(n)                                             Zaheer et al. 2020
              without the random ones, Longformer                                             Beltagy et al. 2020

    A block sees O(stride) blocks nearby and, in the strided and fixed patterns, O(blocks / stride) far away: together
    O(n √n) for a stride of √blocks, and O(n²) for one that does not grow with n.
    """

    kind: str
    stride: int = 4
    block: int = 64
    global_blocks: int = 1
    random_blocks: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.kind not in PATTERNS:
            raise ValueError(f"the pattern {self.kind!r} is none of {', '.join(PATTERNS)}")
        if min(self.stride, self.block) < 1 or min(self.global_blocks, self.random_blocks, self.seed) < 0:
            raise ValueError("a pattern's stride and block are at least 1, and nothing in it is negative")

    def sees(self, i, j):
        """i: the number of a block of queries; j: those of blocks of keys, an array. Booleans, shaped like j."""
        near = abs(i - j) < self.stride
        if self.kind == "window":
            return near
        if self.kind == "strided":
            return near | ((i - j) % self.stride == 0)
        if self.kind == "fixed":
            return (i // self.stride == j // self.stride) | (j % self.stride == self.stride - 1)
        drawn = np.random.default_rng((self.seed, i)).integers(0, i + 1, self.random_blocks)
        return near | (j < self.global_blocks) | (i < self.global_blocks) | np.isin(j, drawn)

    def mask(self, queries, keys, causal=True, window=None):
        """The same for every token, as `look`: (queries, keys) booleans."""
        j = np.arange(keys) // self.block
        blocks = np.arange(j[-1] + 1)
        seen = np.stack([self.sees(i, blocks) for i in blocks])  # (blocks, blocks)
        return xp.asarray(seen[j[keys - queries :, None], j]) & look(queries, keys, causal, window)


def tiles(queries, keys, causal, window, pattern, block, width):
    """The work of sparse and flash attention: [(rows, [cols, ...]), ...], for each block of queries the keys that any
    of them may look at, `width` of them at a time. What nobody looks at is in no tile.

    rows: a slice of the queries. cols: a slice of the keys, or an array of their indices where they lie apart.
    """
    offset = keys - queries  # the first query's position among the keys
    if pattern is not None:
        block = pattern.block
    shift = offset % block if pattern is not None else 0  # a pattern's blocks begin at the first key
    plan = []
    for start in range(-shift, queries, block):
        rows = slice(max(0, start), min(start + block, queries))
        first, last = 0, keys
        if window is not None:
            first, last = max(0, offset + rows.start - window + 1), min(keys, offset + rows.stop + window - 1)
        if causal:
            last = min(last, offset + rows.stop)
        if pattern is None:
            # a cut where the causal mask begins, so that only the keys beside the queries need it
            cut = min(max(first, offset + rows.start), last) if causal and queries > block else last
            parts = [
                (c, min(c + width, end)) for begin, end in ((first, cut), (cut, last)) for c in range(begin, end, width)
            ]
            plan.append((rows, [slice(*part) for part in parts]))
            continue
        j = np.arange(first // block, -(-last // block))
        seen = j[pattern.sees((offset + start) // block, j)]
        indices = (seen[:, None] * block + np.arange(block)).reshape(-1)
        indices = indices[(first <= indices) & (indices < last)]
        parts = [indices[c : c + width] for c in range(0, len(indices), width)]
        together = lambda part: part[-1] - part[0] == len(part) - 1
        plan.append((rows, [slice(p[0], p[-1] + 1) if together(p) else xp.asarray(p) for p in parts]))
    return plan


def _length(cols):
    return cols.stop - cols.start if isinstance(cols, slice) else len(cols)


def flash_attention(
    q,
    k,
    v,
    causal=True,
    window=None,
    padding=None,
    slopes=None,
    scale=None,
    pattern=None,
    block=None,
    observed=None,
    segments=None,
):
    """The same attention in tiles of some keys by some queries (FlashAttention, Dao et al. 2022; Dao 2023;
    the running softmax: Milakov & Gimelshein 2018).

    The arithmetic stays O(n²); what is saved is memory and the way to it, as a tile fits into the fast one
    (a GPU's shared memory, a CPU's cache). For each block of queries the softmax runs along the keys, with
    the largest score so far m, the sum l of exp(s - m) and the output o, not yet divided by l:

        for each block of keys:  s = q kᵀ / √dim,  m' = max(m, max_j s_j),  p = exp(s - m')
                                 l = l exp(m - m') + Σ_j p_j,  o = o exp(m - m') + p v,  m = m'
        y = o / l

    Tiles that the mask empties are never computed, so a window costs O(n · window), and a sparse pattern what it
    sees. The backward pass needs only log Σ exp(s) = m + log l of each query, from which it computes each tile's
    probabilities again. Long sequences use all cores of a CPU. On a GPU, flash.cu does this for heads of 32, 64
    or 128 in float32 or float16 whose mask is causal, a window, padding on the left or none; all else, latent
    attention too, is computed there by the array operations below.

    causal, window: as in `look`. padding: (batch, keys) booleans, True = a real token, or None; of more than keys
    the last count. slopes: (heads,) of ALiBi, which adds -slope · |distance| to the scores, or None. pattern: a
    Pattern, or None, whose blocks are the queries of a tile. block: queries and keys of a tile, or None for what is
    fastest. segments: (batch, keys) integers, or None: a query sees only the tokens of its own segment, so that several
    texts in one row do not see each other; the queries are the last keys.
    observed: a dict, or None, in which "max_logits" is set to the largest score of each head, (heads,).
    Returns y (batch, heads, queries, dim of v) and backward(dy) -> (dq, dk, dv). ValueError for a window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window has at least one token, not {window}")
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group, v_dim = heads // kv_heads, v.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    offset = keys - queries
    padding = None if padding is None else padding[:, -keys:]  # a cache with a window keeps the last ones
    segments = None if segments is None else segments[:, -keys:]
    if xp is not np and all(option is None for option in (slopes, pattern, block, observed, segments)):
        first_key = None if padding is None else xp.where(padding.any(axis=1), padding.argmax(axis=1), keys)
        on_the_left = padding is None or bool((padding == (xp.arange(keys) >= first_key[:, None])).all())
        if on_the_left and flash_cuda.usable(q, v):
            return flash_cuda.flash_attention(q, k, v, causal, window, first_key, scale)
    # The heads that share a key are more rows of one product. In long sequences a tile is large and holds one head,
    # in short ones it is small and holds all of them, and few queries take more keys, so that Python has little to do.
    long = queries > 1024
    rows_of_a_tile = block or (max(64, 256 // group) if long else 64)
    keys_of_a_tile = max(block or (1024 if long or pattern else 64), rows_of_a_tile * 64 // max(1, queries))
    plan = tiles(queries, keys, causal, window, pattern, rows_of_a_tile, keys_of_a_tile)
    every = [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(kv_heads)]
    jobs = [
        (*which, rows, columns) for which in (every if long else [(slice(None), slice(None))]) for rows, columns in plan
    ]
    work = batch * heads * sum((rows.stop - rows.start) * _length(c) for rows, columns in plan for c in columns)
    spread = in_parallel if work >= 2**23 else lambda function, jobs: [function(jobs)]

    def split_groups(x):
        """(batch, heads, ...) -> (batch, kv_heads, group, ...): a view, as one axis is split."""
        return x.reshape(batch, kv_heads, group, *x.shape[2:])

    def fold(x, b, h, rows):
        part = split_groups(x)[b, h, :, rows]
        return part.reshape(*part.shape[:2], -1, part.shape[-1])  # (batch, kv_heads, group · rows, dim)

    def tile_bias(b, h, rows, cols):
        """What a tile adds to its scores, 0 or -inf or ALiBi's slope; None where that is 0 throughout."""
        ends = (cols.start, cols.stop - 1) if isinstance(cols, slice) else (int(cols[0]), int(cols[-1]))
        nearest, farthest = offset + rows.start - ends[1], offset + rows.stop - 1 - ends[0]
        inside = (not causal or nearest >= 0) and (window is None or max(farthest, -nearest) < window)
        if inside and padding is None and slopes is None and segments is None:
            return None
        query = xp.arange(offset + rows.start, offset + rows.stop)
        key = (xp.arange(cols.start, cols.stop) if isinstance(cols, slice) else cols)[:, None, None]
        seen = _look(query, key, causal, window)  # (cols, 1, rows)
        if padding is not None:
            seen = seen & padding[b, None, cols, None, None]  # (batch, 1, cols, 1, rows)
        if segments is not None:
            own = segments[b, None, None, None, offset + rows.start : offset + rows.stop]
            seen = seen & (segments[b, None, cols, None, None] == own)
        bias = xp.where(seen, xp.zeros((), q.dtype), -xp.inf)
        if slopes is not None:  # (kv_heads, cols, group, rows)
            slope = slopes.reshape(kv_heads, 1, group, 1)[h].astype(q.dtype)
            bias = bias - slope * abs(query - key).astype(q.dtype)
        return bias

    # a tile of scores is (keys, queries): NumPy finds the largest down a column three times as fast as along a row
    def tile_scores(k, q_tile, b, h, rows, cols):
        scores = k[b, h, cols] @ q_tile.swapaxes(-1, -2)  # (batch, kv_heads, cols, group · rows)
        bias = tile_bias(b, h, rows, cols)
        if bias is not None:
            by_head = scores.reshape(*scores.shape[:3], group, -1)  # a view
            by_head += bias
        return scores

    y = xp.empty_like(q, shape=(batch, heads, queries, v_dim))
    log_sum, top = (xp.empty((batch, kv_heads, group, queries), q.dtype) for _ in range(2))  # top: the final m

    def forward(jobs):
        for b, h, rows, columns in jobs:
            q_tile = fold(q, b, h, rows) * scale
            m = xp.full(q_tile.shape[:-1], xp.finfo(q.dtype).min / 2, q.dtype)  # finite: -inf - -inf is not a number
            l = xp.zeros_like(m)
            o = xp.zeros((*m.shape, v_dim), q.dtype)
            for cols in columns:
                p = tile_scores(k, q_tile, b, h, rows, cols)
                larger = xp.maximum(m, p.max(axis=-2))
                p -= larger[..., None, :]
                xp.exp(p, out=p)
                shrink = xp.exp(m - larger)
                l = l * shrink + p.sum(axis=-2)
                o *= shrink[..., None]
                o += p.swapaxes(-1, -2) @ v[b, h, cols]
                m = larger
            l = xp.where(l == 0, 1, l)  # a query that sees no key keeps o = 0
            o /= l[..., None]
            shape = (*m.shape[:2], group, -1)
            split_groups(y)[b, h, :, rows] = o.reshape(*shape, v_dim)
            log_sum[b, h, :, rows] = (m + xp.log(l)).reshape(shape)
            top[b, h, :, rows] = m.reshape(shape)

    spread(forward, jobs)
    if observed is not None:
        observed["max_logits"] = top.max(axis=(0, 3)).reshape(heads)

    def backward(dy):
        # the softmax's Σ_j dp_j p_j, with dp = dy vᵀ, is dy · (Σ_j p_j v_j) = dy · y
        along = split_groups(xp.einsum("bhnd,bhnd->bhn", dy, y))
        # [q, -log_sum] · [k, 1] = q·k - log_sum: a column of ones lets the product of a tile subtract; so with dy and v
        k_one, v_one = (xp.concatenate([x, xp.ones((*x.shape[:3], 1), x.dtype)], axis=-1) for x in (k, v))
        dq = xp.empty_like(q)

        def part(jobs):
            dk, dv = xp.zeros_like(k), xp.zeros_like(v)
            for b, h, rows, columns in jobs:
                q_tile, dy_tile = fold(q, b, h, rows) * scale, fold(dy, b, h, rows)
                minus = [-x[b, h, :, rows].reshape(*q_tile.shape[:3], 1) for x in (log_sum, along)]
                q_minus, dy_minus = (xp.concatenate(pair, axis=-1) for pair in zip((q_tile, dy_tile), minus))
                dq_tile = xp.zeros_like(q_tile)
                for cols in columns:
                    p = tile_scores(k_one, q_minus, b, h, rows, cols)
                    xp.exp(p, out=p)
                    dv[b, h, cols] += p @ dy_tile
                    dscores = v_one[b, h, cols] @ dy_minus.swapaxes(-1, -2)
                    dscores *= p
                    dq_tile += dscores.swapaxes(-1, -2) @ k[b, h, cols]
                    dk[b, h, cols] += dscores @ q_tile
                dq_tile *= scale
                split_groups(dq)[b, h, :, rows] = dq_tile.reshape(*dq_tile.shape[:2], group, -1, dim)
            return dk, dv

        (dk, dv), *others = spread(part, jobs)
        for dk_other, dv_other in others:
            dk += dk_other
            dv += dv_other
        return dq, dk, dv

    return y, backward


class KVCache:
    """What a layer keeps of the tokens read so far: keys and values, or the latent vectors of latent_attention.

    The buffers double when they are full, so that n appended tokens copy O(n) and not O(n²) numbers. With a
    window, what no later query can see is dropped.
    """

    def __init__(self, window=None):
        self.window = window
        self.length = 0  # tokens read
        self.first = self.end = 0  # the part of the buffers that is in use
        self.buffers = []  # (batch, kv_heads, capacity, dim) each

    def append(self, *new):
        """Adds arrays (batch, kv_heads, time, dim), such as k and v, and returns all that is kept of each, as views."""
        time = new[0].shape[2]
        self.length += time
        if self.window is not None:
            self.first = max(self.first, self.end - self.window + 1)
        kept = self.end - self.first
        capacity = self.buffers[0].shape[2] if self.buffers else 0
        if self.end + time > capacity or capacity > 64 + 4 * (kept + time):  # full, or far too large
            old = [buffer[:, :, self.first : self.end] for buffer in self.buffers]
            shape = lambda array: (*array.shape[:2], max(64, 2 * (kept + time)), array.shape[3])
            self.buffers = [xp.empty(shape(array), array.dtype) for array in new]
            self.first, self.end = 0, kept
            for buffer, before in zip(self.buffers, old):
                buffer[:, :, :kept] = before
        for buffer, array in zip(self.buffers, new):
            buffer[:, :, self.end : self.end + time] = array
        self.end += time
        return [buffer[:, :, self.first : self.end] for buffer in self.buffers]


def split_heads(x, heads):
    """(batch, time, heads · dim) -> (batch, heads, time, dim)"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(x):
    """(batch, heads, time, dim) -> (batch, time, heads · dim)"""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def self_attention(x, weights, heads, kv_heads, rope=None, eps=1e-6, cache=None, **options):
    """Grouped-query attention of a block: project, normalise, rotate, attend, join the heads, project.

    x: (batch, time, hidden). weights: q_proj.weight (heads · dim, hidden), {k,v}_proj.weight (kv_heads · dim, hidden)
    and o_proj.weight (hidden, heads · dim), with .bias where the model has them, and {q,k}_norm.weight (dim,) where it
    normalises the queries and keys of each head (QK-norm, after Henry et al. 2020), with eps.
    rope: (cos, sin) of posenc.rope_tables at these tokens' positions, or None for no position. cache: a KVCache, which
    is appended to.
    options: causal, window, padding, slopes, pattern, observed and segments of flash_attention.
    Returns y, shaped like x, and backward(dy) -> (dx, dweights); earlier tokens of a cache are constants.
    """
    time = x.shape[1]

    def query_or_key(name, heads):
        y, project_backward = project(x, weights, f"{name}_proj")
        y, norm_name = split_heads(y, heads), f"{name}_norm.weight"
        if norm_name in weights:
            y, norm_backward = rms_norm(y, weights[norm_name], eps)
        if rope is not None:
            y, rotate_backward = rotate(y, *rope)

        def backward(dy):
            dweights = {}
            if rope is not None:
                dy = rotate_backward(dy)
            if norm_name in weights:
                dy, dweights[norm_name] = norm_backward(dy)
            dx, dproject = project_backward(join_heads(dy))
            return dx, dproject | dweights

        return y, backward

    q, q_backward = query_or_key("q", heads)
    k, k_backward = query_or_key("k", kv_heads)
    v, v_backward = project(x, weights, "v_proj")
    v = split_heads(v, kv_heads)
    if cache is not None:
        k, v = cache.append(k, v)
    y, flash_backward = flash_attention(q, k, v, **options)
    y, o_backward = project(join_heads(y), weights, "o_proj")

    def backward(dy):
        dy, o_weights = o_backward(dy)
        dq, dk, dv = flash_backward(split_heads(dy, heads))
        dx, q_weights = q_backward(dq)
        dx_k, k_weights = k_backward(dk[:, :, -time:])
        dx_v, v_weights = v_backward(join_heads(dv[:, :, -time:]))
        dx += dx_k
        dx += dx_v
        return dx, q_weights | k_weights | v_weights | o_weights

    return y, backward


# --- multi-head latent attention ---


def latent_attention(x, weights, heads, v_dim, rope, interleaved=True, scale=None, cache=None, absorb=None, **options):
    """Multi-head latent attention (DeepSeek V2, DeepSeek-AI 2024a, section 2.1): the keys and values of all heads
    are made of one latent vector c per token, and only c is kept in the cache, with one key for the positions.

        [c' ; r] = W_a x,   c = norm(c')           rank and rope_dim numbers, far fewer than heads · dim
        [nᵢ ; vᵢ] = W_bᵢ c                         of head i: a key without position, nope_dim, and the value, v_dim
        kᵢ = [nᵢ ; R(p) r]                         the key: RoPE turns a part of its own, the same for all heads,
        qᵢ = [mᵢ ; R(p) sᵢ],  [mᵢ ; sᵢ] = W_qᵢ x   as between mᵢ and nᵢ it would stand in the way of `absorb`

    x: (batch, time, hidden). weights, by name: W_a is kv_a_proj_with_mqa.weight (rank + rope_dim, hidden), its norm
    kv_a_layernorm.weight (rank,), W_b kv_b_proj.weight (heads · (nope_dim + v_dim), rank); W_q is q_proj.weight
    (heads · (nope_dim + rope_dim), hidden) or, through a low rank too, q_a_proj (q_rank, hidden), q_a_layernorm and
    q_b_proj (heads · (nope_dim + rope_dim), q_rank); and o_proj.weight (hidden, heads · v_dim). rope: (cos, sin) for
    rope_dim at these tokens' positions. interleaved, scale: of posenc.rope and of
    flash_attention. cache: a KVCache, to which the latents are appended. absorb: attend over the latents themselves
    (`absorbed_attention`), or make keys and values of them (`expanded_attention`); None takes what costs less.
    options: causal, window, padding, pattern, observed and segments of flash_attention.
    Returns y, shaped like x, and backward(dy) -> (dx, dweights); earlier tokens of a cache are constants.
    """
    time, rank, rope_dim = x.shape[1], weights["kv_a_layernorm.weight"].shape[0], 2 * rope[0].shape[-1]

    low_rank = "q_a_proj.weight" in weights
    if low_rank:  # both norms have the eps of 1e-6 of the published code, whatever the config gives the others
        low, q_a_backward = project(x, weights, "q_a_proj")
        low, q_norm_backward = rms_norm(low, weights["q_a_layernorm.weight"])
        q, q_backward = project(low, weights, "q_b_proj")
    else:
        q, q_backward = project(x, weights, "q_proj")
    q = split_heads(q, heads)  # (batch, heads, time, nope_dim + rope_dim)
    nope_dim = q.shape[-1] - rope_dim
    rotated, rotate_q_backward = rotate(q[..., nope_dim:], *rope, interleaved)
    q = xp.concatenate([q[..., :nope_dim], rotated], axis=-1)

    down, down_backward = project(x, weights, "kv_a_proj_with_mqa")
    c, norm_backward = rms_norm(down[..., :rank], weights["kv_a_layernorm.weight"])
    rotated, rotate_k_backward = rotate(down[:, None, :, rank:], *rope, interleaved)
    latent = xp.concatenate([c[:, None], rotated], axis=-1)  # (batch, 1, time, rank + rope_dim)
    if cache is not None:
        (latent,) = cache.append(latent)

    w_b = weights["kv_b_proj.weight"].reshape(heads, nope_dim + v_dim, rank)
    if absorb is None:
        # Multiplications per key and head. Expanding a key is done once for all queries, and in training, with as many
        # queries as keys, it pays where rank > (nope_dim + v_dim) / 2, as in the published models.
        absorbed = time * (2 * rank + rope_dim)
        expanded = time * (nope_dim + rope_dim + v_dim) + rank * (nope_dim + v_dim)
        absorb = cache is not None and absorbed < expanded
    attend = absorbed_attention if absorb else expanded_attention
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, attend_backward = attend(q, latent, w_b, v_dim, scale=scale, **options)
    y, o_backward = project(join_heads(y), weights, "o_proj")

    def backward(dy):
        dy, dweights = o_backward(dy)
        dq, dlatent, dw_b = attend_backward(split_heads(dy, heads))
        dweights["kv_b_proj.weight"] = dw_b.reshape(-1, rank)

        dlatent = dlatent[:, :, -time:]
        dc, dweights["kv_a_layernorm.weight"] = norm_backward(dlatent[:, 0, :, :rank])
        ddown = xp.concatenate([dc, rotate_k_backward(dlatent[..., rank:])[:, 0]], axis=-1)
        dx, ddown_weights = down_backward(ddown)

        dq = xp.concatenate([dq[..., :nope_dim], rotate_q_backward(dq[..., nope_dim:])], axis=-1)
        dlow, dq_weights = q_backward(join_heads(dq))
        if low_rank:
            dlow, dweights["q_a_layernorm.weight"] = q_norm_backward(dlow)
            dlow, dq_a_weights = q_a_backward(dlow)
            dq_weights |= dq_a_weights
        dx += dlow
        return dx, dweights | ddown_weights | dq_weights

    return y, backward


def expanded_attention(q, latent, w_b, v_dim, **options):
    """Makes each head's keys and values of the latents, and attends as ever: for many queries at once.

    q: (batch, heads, queries, nope_dim + rope_dim). latent: (batch, 1, keys, rank + rope_dim), c and the
    rotated r beside each other. w_b: (heads, nope_dim + v_dim, rank). options: of flash_attention.
    Returns y (batch, heads, queries, v_dim) and backward(dy) -> (dq, dlatent, dw_b).
    """
    rank = w_b.shape[-1]
    nope_dim = w_b.shape[1] - v_dim
    c = latent[..., :rank]
    kv = c @ w_b.swapaxes(-1, -2)  # (batch, heads, keys, nope_dim + v_dim)
    k = xp.empty((*kv.shape[:3], q.shape[-1]), kv.dtype)
    k[..., :nope_dim], k[..., nope_dim:] = kv[..., :nope_dim], latent[..., rank:]
    y, attend_backward = flash_attention(q, k, kv[..., nope_dim:], **options)

    def backward(dy):
        dq, dk, dv = attend_backward(dy)
        dkv = xp.concatenate([dk[..., :nope_dim], dv], axis=-1)
        dc = (dkv @ w_b).sum(axis=1, keepdims=True)
        dw_b = (dkv.swapaxes(-1, -2) @ c).sum(axis=0)
        return dq, xp.concatenate([dc, dk[..., nope_dim:].sum(axis=1, keepdims=True)], axis=-1), dw_b

    return y, backward


def absorbed_attention(q, latent, w_b, v_dim, **options):
    """The same without ever making a key or a value: for a few queries and many cached latents.

    With W_b = [W_n ; W_v]: as mᵀ (W_n c) = (W_nᵀ m)ᵀ c, the query takes W_n upon itself, and as Σ p (W_v c) =
    W_v Σ p c, the output takes W_v. What is left is multi-query attention: one key [c ; R(p) r] and one value c for
    all heads.
    Arguments and result as of `expanded_attention`.
    """
    rank = w_b.shape[-1]
    nope_dim = w_b.shape[1] - v_dim
    w_n, w_v = w_b[:, :nope_dim], w_b[:, nope_dim:]
    # (batch, heads, queries, rank + rope_dim)
    q_long = xp.concatenate([q[..., :nope_dim] @ w_n, q[..., nope_dim:]], axis=-1)
    c_sum, attend_backward = flash_attention(q_long, latent, latent[..., :rank], **options)
    y = c_sum @ w_v.swapaxes(-1, -2)

    def backward(dy):
        dq_long, dlatent, dc = attend_backward(dy @ w_v)
        dlatent[..., :rank] += dc
        dq = xp.concatenate([dq_long[..., :rank] @ w_n.swapaxes(-1, -2), dq_long[..., rank:]], axis=-1)
        dw_n = (q[..., :nope_dim].swapaxes(-1, -2) @ dq_long[..., :rank]).sum(axis=0)
        dw_v = (dy.swapaxes(-1, -2) @ c_sum).sum(axis=0)
        return dq, dlatent, xp.concatenate([dw_n, dw_v], axis=1)

    return y, backward


def demo(sizes=(1024, 2048, 4096, 8192, 16384)):
    """What the slide claims, in numbers: the same result, the growth with the length, and what a cache saves."""
    import os
    import time
    import tracemalloc

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if xp is not np:
        raise SystemExit("this measures time and memory of a CPU: set BACKEND=numpy; for a GPU see benchmarks/")
    rng = xp.random.default_rng(0)

    def qkv(heads, kv_heads, n, dim=32):
        return [rng.standard_normal((1, h, n, dim), dtype=xp.float32) for h in (heads, kv_heads, kv_heads)]

    def full(q, k, v):
        return attention(q, k, v, look(q.shape[2], k.shape[2]))

    def sparse(kind):
        """Strided and fixed patterns with a stride of √blocks."""

        def attend(q, k, v):
            stride = round((q.shape[2] / 64) ** 0.5) if kind in ("strided", "fixed") else 4
            return flash_attention(q, k, v, pattern=Pattern(kind, stride))

        return attend

    def cost(function, *arguments):
        """Seconds, the least of three, and bytes of a forward and a backward pass."""
        seconds = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            y, backward = function(*arguments)
            backward(y)
            seconds = min(seconds, time.perf_counter() - began)
        tracemalloc.start()
        y, backward = function(*arguments)
        backward(y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seconds, peak

    q, k, v = qkv(4, 2, 777)
    (y, backward), (flash_y, flash_backward) = full(q, k, v), flash_attention(q, k, v)
    worst = max(float(abs(a - b).max()) for a, b in zip((y, *backward(y)), (flash_y, *flash_backward(y))))
    print(f"flash attention against the textbook, values and gradients: largest difference {worst:.1e}")

    ways = {"full": full, "flash": flash_attention, "strided": sparse("strided"), "fixed": sparse("fixed")}
    ways |= {"bigbird": sparse("bigbird"), "window": lambda q, k, v: flash_attention(q, k, v, window=256)}
    lengths, costs = {name: sizes[: 3 if name == "full" else 5] for name in ways}, {}
    print("\nforward and backward of a head of 32, in ms and in MB, and the exponent of n that fits")
    print("  tokens   " + "".join(f"{n:>15,}" for n in lengths["flash"]))
    for name, function in ways.items():
        costs[name] = np.array([cost(function, *qkv(1, 1, n)) for n in lengths[name]])
        cells = "".join(f"{1e3 * t:8.0f}{m / 2**20:7.1f}" for t, m in costs[name])
        slopes = [np.polyfit(np.log(lengths[name]), np.log(c), 1)[0] for c in costs[name].T]
        print(f"  {name:9}{cells:75}  time n^{slopes[0]:.2f}, memory n^{slopes[1]:.2f}")

    print("\nkey-value cache, bytes per token and layer in float32, 8 heads of 64:")
    for name, kv_heads in ("multi-head", 8), ("grouped-query", 2), ("multi-query", 1):
        print(f"  {name:14} {kv_heads} key heads {2 * kv_heads * 64 * 4:6,}")
    print(f"  latent         rank {4 * 64} + 32{(4 * 64 + 32) * 4:6,}   (keys and values of their own for all 8 heads)")
    q, k, v = qkv(4, 4, 1024)
    cache, times = KVCache(), [time.perf_counter()]
    for i in range(1024):
        now = slice(i, i + 1)
        flash_attention(q[:, :, now], *cache.append(k[:, :, now], v[:, :, now]))
    times.append(time.perf_counter())
    for i in range(0, 1024, 16):  # a sixteenth of the work of going without
        flash_attention(q[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
    times.append(time.perf_counter())
    cached, uncached = times[1] - times[0], 16 * (times[2] - times[1])
    print(f"1024 tokens one by one: {cached:.2f} s with the cache, {uncached:.1f} s without ({uncached / cached:.0f}x)")

    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    masks = {"full": look(64, 64), "sliding window, of 16 tokens": look(64, 64, window=16)}
    masks |= {f"{kind}, blocks of 4": Pattern(kind, 4 - (kind == "window"), 4).mask(64, 64) for kind in PATTERNS}
    for axis, (name, mask) in zip(axes.flat, masks.items()):
        axis.imshow(to_numpy(mask), cmap="Blues", vmin=0, vmax=1.4)
        axis.set(title=name, xlabel="key", ylabel="query")
    for axis, what, unit in (axes[1, 2], 0, 1e3), (axes[1, 3], 1, 2**-20):
        for name, rows in costs.items():
            axis.loglog(lengths[name], rows[:, what] * unit, "o-", label=name)
        axis.set(xlabel="tokens", title=["time, ms", "memory, MB"][what])
        axis.set_xticks(lengths["flash"], lengths["flash"])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    os.makedirs("figures", exist_ok=True)
    figure.savefig("figures/attention.png", dpi=120)
    print("figures/attention.png")


if __name__ == "__main__":
    from engine.cli import run_demo

    run_demo(demo)
