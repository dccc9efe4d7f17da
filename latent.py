"""Variantes de atención: multi-head latent attention (DeepSeek V2, DeepSeek-AI 2024a, section 2.1; V3, Kimi K2).

The key-value cache of a long context can be as large as the model. Here the keys and values of all heads are made of
one latent vector c^KV per token, and only that is cached, with one key for the positions. In the paper's names, where
[a ; b] joins a and b:

    c^KV = norm(W^DKV x)                down to `rank` numbers, far fewer than heads · dim
    k^Cᵢ = W^UKᵢ c^KV, vᵢ = W^UVᵢ c^KV  up again, to the key, without a position, and the value of head i
    k^R = RoPE(W^KR x)                  a key with the position, the same for all heads
    q^Cᵢ = W^UQᵢ c^Q, q^Rᵢ = RoPE(W^QRᵢ c^Q)     of c^Q = norm(W^DQ x), or of x itself
    oᵢ = attention([q^Cᵢ ; q^Rᵢ], [k^Cᵢ ; k^R], vᵢ), with scores / √(nope_dim + rope_dim)
    y = W^O [o₁ ; ... ; o_heads]

Why the position has a part of its own: if k^C were rotated, a rotation would stand between q^C and W^UK, so that W^UK
could not be moved to the query (`absorbed_attention`), and all earlier keys had to be made again at every step.

Shapes: x (batch, time, hidden); c^KV and k^R beside each other are what is cached, (batch, 1, time, rank + rope_dim);
q (batch, heads, time, nope_dim + rope_dim); k^C and q^C have nope_dim numbers, k^R and q^R rope_dim, v v_dim.
"""

from attention import Options, flash_attention, join_heads, split_heads
from engine import xp
from layers import project, rms_norm
from posenc import rope as rotate


def latent_attention(x, weights, heads, v_dim, options, interleaved=True, scale=None, absorb=None):
    """Multi-head latent attention of a block.

    weights, by name: kv_a_proj_with_mqa.weight, W^DKV stacked on W^KR (rank + rope_dim, hidden), and
    kv_a_layernorm.weight (rank,), which normalises c^KV; kv_b_proj.weight, W^UK on W^UV for each head (heads ·
    (nope_dim + v_dim), rank); q_proj.weight (heads · (nope_dim + rope_dim), hidden) or, through c^Q, q_a_proj (q_rank,
    hidden), q_a_layernorm and q_b_proj (heads · (nope_dim + rope_dim), q_rank); o_proj.weight (hidden, heads · v_dim).
    options: an attention.Options, whose cache keeps the latents and whose rope is for rope_dim. interleaved: as of
    posenc.rope; scale: as of flash_attention.
    absorb: attend over the latents themselves, or make keys and values of them. None: without a cache the latter, with
    one whatever costs less.
    Returns y, shaped like x, and backward(dy) -> (dx, dweights); earlier tokens of a cache are constants.
    """
    time, rank, rope_dim = x.shape[1], weights["kv_a_layernorm.weight"].shape[0], 2 * options.rope[0].shape[-1]
    q, q_backward = latent_queries(x, weights, heads, options.rope, interleaved)
    nope_dim = q.shape[-1] - rope_dim

    down, down_backward = project(x, weights, "kv_a_proj_with_mqa")
    c_kv, norm_backward = rms_norm(down[..., :rank], weights["kv_a_layernorm.weight"])
    k_r, rotate_backward = rotate(down[:, None, :, rank:], *options.rope, interleaved)
    latent = xp.concatenate([c_kv[:, None], k_r], axis=-1)
    if options.cache is not None:
        (latent,) = options.cache.append(latent)

    w_u = weights["kv_b_proj.weight"].reshape(heads, nope_dim + v_dim, rank)  # W^UK stacked on W^UV
    if absorb is None:
        # Multiplications per key and head, those of q and y apart. Expanding a key is done once for all queries: with
        # as many of them as keys, and both many, it pays where rank > (nope_dim + v_dim) / 2, as in published models.
        absorbed = time * (2 * rank + rope_dim)
        expanded = time * (nope_dim + rope_dim + v_dim) + rank * (nope_dim + v_dim)
        absorb = options.cache is not None and absorbed < expanded
    attend = absorbed_attention if absorb else expanded_attention
    y, attend_backward = attend(q, latent, w_u, v_dim, scale or q.shape[-1] ** -0.5, options)
    y, o_backward = project(join_heads(y), weights, "o_proj")

    def backward(dy):
        dy, dweights = o_backward(dy)
        dq, dlatent, dw_u = attend_backward(split_heads(dy, heads))
        dweights["kv_b_proj.weight"] = dw_u.reshape(-1, rank)
        dlatent = dlatent[:, :, -time:]
        dc_kv, dweights["kv_a_layernorm.weight"] = norm_backward(dlatent[:, 0, :, :rank])
        ddown = xp.concatenate([dc_kv, rotate_backward(dlatent[..., rank:])[:, 0]], axis=-1)
        dx, ddown_weights = down_backward(ddown)
        dx_q, dq_weights = q_backward(dq)
        dx += dx_q
        return dx, dweights | ddown_weights | dq_weights

    return y, backward


def latent_queries(x, weights, heads, rope, interleaved):
    """q = [q^C ; q^R], through c^Q where the model has a low rank for the queries, too.

    Returns q (batch, heads, time, nope_dim + rope_dim) and backward(dq) -> (dx, dweights).
    """
    low_rank = "q_a_proj.weight" in weights
    if low_rank:  # both norms have the eps of 1e-6 of the published code, whatever the config gives the others
        c_q, down_backward = project(x, weights, "q_a_proj")
        c_q, norm_backward = rms_norm(c_q, weights["q_a_layernorm.weight"])
    q, up_backward = project(c_q, weights, "q_b_proj") if low_rank else project(x, weights, "q_proj")
    q = split_heads(q, heads)
    nope_dim = q.shape[-1] - 2 * rope[0].shape[-1]
    q_r, rotate_backward = rotate(q[..., nope_dim:], *rope, interleaved)

    def backward(dq):
        dq = xp.concatenate([dq[..., :nope_dim], rotate_backward(dq[..., nope_dim:])], axis=-1)
        dx, dweights = up_backward(join_heads(dq))
        if low_rank:
            dc_q, dweights["q_a_layernorm.weight"] = norm_backward(dx)
            dx, ddown = down_backward(dc_q)
            dweights |= ddown
        return dx, dweights

    return xp.concatenate([q[..., :nope_dim], q_r], axis=-1), backward


def expanded_attention(q, latent, w_u, v_dim, scale, options=None):
    """Makes each head's keys and values of the latents, and attends as ever: for many queries at once.

    w_u: (heads, nope_dim + v_dim, rank). options: an attention.Options, or None. Returns y (batch, heads, queries,
    v_dim) and backward(dy) -> (dq, dlatent, dw_u).
    """
    options, rank = options or Options(), w_u.shape[-1]
    nope_dim = w_u.shape[1] - v_dim
    c_kv, k_r = latent[..., :rank], latent[..., rank:]
    up = c_kv @ w_u.swapaxes(-1, -2)  # [k^C ; v]: (batch, heads, keys, nope_dim + v_dim)
    k = xp.empty((*up.shape[:3], q.shape[-1]), up.dtype)
    k[..., :nope_dim], k[..., nope_dim:] = up[..., :nope_dim], k_r
    y, attend_backward = flash_attention(q, k, up[..., nope_dim:], options.mask, scale=scale, observe=options.observe)

    def backward(dy):
        dq, dk, dv = attend_backward(dy)
        dup = xp.concatenate([dk[..., :nope_dim], dv], axis=-1)
        dc_kv = (dup @ w_u).sum(axis=1, keepdims=True)
        dw_u = (dup.swapaxes(-1, -2) @ c_kv).sum(axis=0)
        return dq, xp.concatenate([dc_kv, dk[..., nope_dim:].sum(axis=1, keepdims=True)], axis=-1), dw_u

    return y, backward


def absorbed_attention(q, latent, w_u, v_dim, scale, options=None):
    """The same without ever making a key or a value: for a few queries and many cached latents.

    As q^Cᵀ (W^UK c) = (W^UKᵀ q^C)ᵀ c, the query takes W^UK upon itself, and as Σ p (W^UV c) = W^UV Σ p c, the output
    takes W^UV. What is left is multi-query attention: one key, [c^KV ; k^R], and one value, c^KV, for all heads.
    Arguments and result as of `expanded_attention`.
    """
    options, rank = options or Options(), w_u.shape[-1]
    nope_dim = w_u.shape[1] - v_dim
    w_uk, w_uv = w_u[:, :nope_dim], w_u[:, nope_dim:]
    q_long = xp.concatenate([q[..., :nope_dim] @ w_uk, q[..., nope_dim:]], axis=-1)  # (..., rank + rope_dim)
    c_kv = latent[..., :rank]
    c_sum, attend_backward = flash_attention(q_long, latent, c_kv, options.mask, scale=scale, observe=options.observe)
    y = c_sum @ w_uv.swapaxes(-1, -2)

    def backward(dy):
        dq_long, dlatent, dc_kv = attend_backward(dy @ w_uv)
        dlatent[..., :rank] += dc_kv
        dq = xp.concatenate([dq_long[..., :rank] @ w_uk.swapaxes(-1, -2), dq_long[..., rank:]], axis=-1)
        dw_uk = (q[..., :nope_dim].swapaxes(-1, -2) @ dq_long[..., :rank]).sum(axis=0)
        dw_uv = (dy.swapaxes(-1, -2) @ c_sum).sum(axis=0)
        return dq, dlatent, xp.concatenate([dw_uk, dw_uv], axis=1)

    return y, backward
