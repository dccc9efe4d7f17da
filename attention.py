"""Transformers actuales: variantes de atención.

Every token asks with a query q, is found by its key k and answers with its value v:

    attention(q, k, v) = softmax(q kᵀ / √dim) v                     (Vaswani et al. 2017, equation 1)

The scores q kᵀ / √dim are a (queries, keys) matrix, so time and memory grow with the square of the length n. Remedies:

    sparse attention    a query sees some of the keys only, by a pattern, in a window or at random (masks.py): O(n √n)
                        or O(n)
    flash attention     the same numbers, O(n²) work, but tile by tile: the matrix never exists, so O(n) memory
    grouped-query       several query heads share one key-value head, and there is less to keep of each token
    latent attention    one small vector of each token is kept (latent.py)
    key-value cache     k and v of the tokens already read are kept: generating a token costs one query, not n

    >>> import numpy as np
    >>> from attention import attention, causal
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 8))  # 2 heads of 5 tokens
    >>> y, backward = attention(q, k, v, causal)
    >>> y.shape, [gradient.shape for gradient in backward(np.ones_like(y))]
    ((1, 2, 5, 8), [(1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)])

Shapes: q (batch, heads, queries, dim); k and v (batch, kv_heads, keys, dim). Where there are fewer queries than keys,
the queries are the last of the sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as cache_results

import masks
from engine import flash, xp
from layers import keep_all, project, rms_norm, softmax
from masks import Mask, causal
from posenc import rope as rotate
from posenc import rope_frequencies, rope_tables


def attention(q, k, v, mask=None, bias=None, scale=None):
    """Scaled dot-product attention, the textbook version: the whole score matrix at once.

    mask: a Mask, or booleans that broadcast to (batch, heads, queries, keys), True = may look; None = everywhere.
    A query that may look nowhere gets zeros. bias: a function of the positions, query and key, that gives what is added
    to the scores of each head, such as posenc.alibi; it has no gradient. scale: of the scores, 1/√dim if None.
    Returns y (batch, heads, queries, dim of v) and backward(dy) -> (dq, dk, dv).
    """
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]  # group: heads that share a key-value head
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_all, v_all = xp.repeat(k, group, axis=1), xp.repeat(v, group, axis=1)
    scores = q @ k_all.swapaxes(-1, -2) * scale  # (batch, heads, queries, keys)
    if bias is not None:
        scores = scores + bias(xp.arange(keys - queries, keys)[:, None], xp.arange(keys)[None])
    if isinstance(mask, Mask):
        mask = mask.matrix(queries, keys)
    if mask is not None:
        scores = xp.where(mask, scores, -xp.inf)
    p, softmax_backward = softmax(scores)
    y = p @ v_all

    def backward(dy):
        dscores = softmax_backward(dy @ v_all.swapaxes(-1, -2)) * scale
        dq = dscores @ k_all
        dk = dscores.swapaxes(-1, -2) @ q
        dv = p.swapaxes(-1, -2) @ dy
        # a key-value head's gradient is the sum over the query heads it serves
        sum_groups = lambda d: d.reshape(k.shape[0], k.shape[1], group, *d.shape[2:]).sum(axis=2)
        return dq, sum_groups(dk), sum_groups(dv)

    return y, backward


# ---------------------------------------------------------------------------------------- flash attention


def textbook_flash_attention(q, k, v, mask=causal, block=64):
    """FlashAttention-2 (Dao 2023, algorithms 1 and 2) for one head, by blocks i of queries and j of keys.

    One pass over the blocks of keys, with scores S, keeps for each query the largest score so far m, the sum ℓ of
    exp(S - m), and the output O, which is divided by ℓ only at the end (online softmax: Milakov & Gimelshein 2018). The
    backward pass needs only L = m + log ℓ of each query, from which it recomputes the softmax P. (In the paper its two
    loops stand the other way round.)

    q: (queries, dim); k, v: (keys, dim); mask: a Mask; block: queries and keys of a tile.
    Returns O (queries, dim of v) and backward(dO) -> (dq, dk, dv).
    """
    scale, offset = q.shape[-1] ** -0.5, len(k) - len(q)
    blocks = lambda n: [xp.arange(start, min(start + block, n)) for start in range(0, n, block)]
    scores = lambda i, j: xp.where(mask.sees(offset + i[:, None], j[None]), q[i] @ k[j].T * scale, -xp.inf)
    O, L = xp.zeros((len(q), v.shape[-1]), q.dtype), xp.zeros(len(q), q.dtype)
    for i in blocks(len(q)):
        m, l = xp.full(len(i), -1e30), xp.zeros(len(i))  # finite: -inf - -inf is not a number
        for j in blocks(len(k)):
            S = scores(i, j)
            m_new = xp.maximum(m, S.max(axis=1))
            unscaled, shrink = xp.exp(S - m_new[:, None]), xp.exp(m - m_new)  # P̃ in the paper
            l = shrink * l + unscaled.sum(axis=1)
            O[i] = shrink[:, None] * O[i] + unscaled @ v[j]
            m = m_new
        l = xp.where(l == 0, 1, l)  # a query that sees no key keeps O = 0
        O[i], L[i] = O[i] / l[:, None], m + xp.log(l)

    def backward(dO):
        dq, dk, dv = xp.zeros_like(q), xp.zeros_like(k), xp.zeros_like(v)
        D = (dO * O).sum(axis=1)  # the softmax's Σ_j P_j dP_j: with dP = dO vᵀ it is dO · Σ_j P_j v_j
        for i in blocks(len(q)):
            for j in blocks(len(k)):
                P = xp.exp(scores(i, j) - L[i][:, None])
                dv[j] += P.T @ dO[i]
                dS = P * (dO[i] @ v[j].T - D[i][:, None]) * scale
                dq[i] += dS @ k[j]
                dk[j] += dS.T @ q[i]
        return dq, dk, dv

    return O, backward


def flash_attention(q, k, v, mask=causal, bias=None, scale=None, observe=None):
    """`attention` in tiles, at speed (FlashAttention, Dao et al. 2022): engine/flash.py does what the function above
    does, for all heads, on all cores, and skips the tiles that the mask empties; engine/flash.cu does it on a GPU.

    mask: a Mask, causal if not given (unlike in `attention`), None = everywhere. bias, scale: as of `attention`.
    observe: a dict, or None, in which "max_logits" is set to the largest score of each head, (heads,).
    Returns y (batch, heads, queries, dim of v) and backward(dy) -> (dq, dk, dv).
    """
    return flash.attention(q, k, v, mask, bias, scale, observe)


# ------------------------------------------------------------------------------------------------- the cache


class KVCache:
    """What a layer keeps of the tokens read so far: keys and values, or the latent vectors of latent.py.

    The buffers double when they are full, so that n appended tokens copy O(n) and not O(n²) numbers. With a window,
    what no later query can see is dropped.
    """

    def __init__(self, window=None):
        self.window = window
        self.length = 0  # tokens read
        self.first = self.end = 0  # the part of the buffers that is in use
        self.buffers = []  # (batch, kv_heads, capacity, dim) each

    def kept(self):
        """How many of the tokens read so far the next token can see."""
        return self.length if self.window is None else min(self.length, self.window - 1)

    def append(self, *new):
        """Adds arrays (batch, kv_heads, time, dim), such as k and v, and returns all that is kept of each, as views."""
        time, kept = new[0].shape[2], self.kept()
        self.length += time
        self.first = self.end - kept
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


# ------------------------------------------------------------------------------------------------- the layer


@dataclass
class Options:
    """What a layer needs in a forward pass besides its weights and x."""

    mask: Mask | None = causal
    rope: tuple | None = None  # cos, sin of posenc.rope_tables at the tokens' positions; None: no positions
    cache: KVCache | None = None  # is appended to; no gradient flows to cached tokens
    observe: dict | None = None  # is filled with statistics to watch, such as the largest score of each head
    real: xp.ndarray | None = None  # (batch, time), False for padding, which no expert computes; None: all real
    balance: float = 0.0  # weight of the load-balancing loss, see moe.py
    dropout: Callable = keep_all  # x -> y, backward; of what attention and feed-forward add to the residual stream


def split_heads(x, heads):
    """(batch, time, heads · dim) -> (batch, heads, time, dim)"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(x):
    """(batch, heads, time, dim) -> (batch, time, heads · dim)"""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def query_or_key(x, weights, name, heads, options, eps):
    """Of "q" or "k": project, split the heads, normalise them (where the model does), rotate them.

    Returns y (batch, heads, time, dim) and backward(dy) -> (dx, dweights).
    """
    y, project_backward = project(x, weights, f"{name}_proj")
    y, norm_name = split_heads(y, heads), f"{name}_norm.weight"
    if norm_name in weights:
        y, norm_backward = rms_norm(y, weights[norm_name], eps)
    if options.rope is not None:
        y, rotate_backward = rotate(y, *options.rope)

    def backward(dy):
        dweights = {}
        if options.rope is not None:
            dy = rotate_backward(dy)
        if norm_name in weights:
            dy, dweights[norm_name] = norm_backward(dy)
        dx, dproject = project_backward(join_heads(dy))
        return dx, dproject | dweights

    return y, backward


def self_attention(x, weights, heads, kv_heads, options=None, eps=1e-6):
    """The attention of a block: project, normalise, rotate, attend, join the heads, project.

    Each key-value head serves heads / kv_heads neighbouring query heads:

        kv_heads = heads    multi-head attention    each query head has keys of its own    Vaswani et al. 2017
        1 < kv_heads        grouped-query           a group of query heads shares them     Ainslie et al. 2023
        kv_heads = 1        multi-query             all share one                          Shazeer 2019

    x: (batch, time, hidden). weights: q_proj.weight (heads · dim, hidden), {k,v}_proj.weight (kv_heads · dim, hidden)
    and o_proj.weight (hidden, heads · dim), with .bias where the model has them, and {q,k}_norm.weight (dim,) where it
    normalises the queries and keys of each head (QK-norm, after Henry et al. 2020), with eps. options: an Options.
    Returns y, shaped like x, and backward(dy) -> (dx, dweights).
    """
    options, time = options or Options(), x.shape[1]
    q, q_backward = query_or_key(x, weights, "q", heads, options, eps)
    k, k_backward = query_or_key(x, weights, "k", kv_heads, options, eps)
    v, v_backward = project(x, weights, "v_proj")
    v = split_heads(v, kv_heads)
    if options.cache is not None:
        k, v = options.cache.append(k, v)
    y, flash_backward = flash_attention(q, k, v, options.mask, observe=options.observe)
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


def layer_options(
    config, tokens, dtype, start=0, cache=None, real=None, documents=None, observe=None, balance=0.0, dropout=keep_all
):
    """A list: an Options for each layer and, without a cache, one for the layer of multi-token prediction (mtp.py).

    config: an architectures.Config. tokens: (batch, time), of which the shape counts; dtype: of the weights. start: the
    position of the first token. cache: a KVCache for each layer, or None. real: (batch, earlier and new tokens)
    booleans, False where a row is left-padded. documents: (batch, time), the number of the text that a token belongs
    to, from 1 on, where a row holds several that must not see each other, and 0 for padding; positions run on from one
    text to the next, as RoPE knows differences only. observe: a dict, or None, in which observe[layer] becomes what the
    layer observed: "max_logits" of its heads, the "load" of its experts and "balance", their load-balancing loss.
    balance: the weight of that loss. dropout: as of Options, in training.
    """
    time = tokens.shape[1]
    positions, new = xp.arange(start, start + time), None if documents is None else documents > 0
    if real is not None:  # a row's first real token is at position 0
        new, positions = real[:, start:], (xp.cumsum(real, axis=1) - 1).clip(0)[:, None, start:]  # (batch, 1, time)
    stretching = config.rope_theta, config.rope_scaling, config.max_position_embeddings
    rope = rope_tables(positions, *rope_frequencies(config.head_dim, *stretching), dtype)
    text = None if documents is None else masks.same_document(documents)
    observe = {} if observe is None and balance else observe

    @cache_results
    def mask(window, pattern, keys):  # layers with the same mask share it, and the plan of its tiles
        real_keys = None if real is None else masks.padding(real[:, -keys:])
        parts = causal if config.causal else None, text, window and masks.window(window), pattern, real_keys
        return masks.all_of(*[part for part in parts if part is not None])

    options = []
    for i in range(config.num_hidden_layers + (0 if cache else config.num_nextn_predict_layers or 0)):
        own_cache, own_rope = cache[i] if cache else None, rope if config.uses_rope(i) else None
        own_mask = mask(config.window(i), config.pattern(i), (own_cache.kept() if cache else 0) + time)
        observed = None if observe is None else observe.setdefault(i, {})
        options.append(Options(own_mask, own_rope, own_cache, observed, new, balance, dropout))
    return options
