"""Codificación posicional.

Attention without a mask sees a set: permute the tokens and every output moves with its token, unchanged. Order has to
be put in. Written as 1, 2, 3, ... N it would drown embeddings of size about one, so a position p becomes angles p·θⱼ
with θⱼ = base^(-2j/dim): a clock whose dim/2 hands turn at different speeds. Encodings differ in what they use, these
angles, a trained table or a straight line, and in where it enters the model:

    added to the embedding  sinusoidal  PE[p, 2j] = sin(p θⱼ), PE[p, 2j+1] = cos(p θⱼ)   Vaswani et al. 2017
                            learned     a trained row for each position                  Devlin et al. 2019
    multiplying q and k     rope        R(p) turns pair j of q and k by p θⱼ, so that    Su et al. 2021
                                        ⟨R(m) q, R(n) k⟩ = ⟨q, R(n-m) k⟩
    added to the scores     alibi       -slope · |distance|, one slope for each head     Press et al. 2022
    nowhere                 none        under a causal mask the n-th token averages      Haviv et al. 2022;
                                        over n of them, which tells it apart ("NoPE")    Kazemnejad et al. 2023

The last needs no function. The models here use rope, or none on every fourth layer of SmolLM3; the others are here to
compare. What stretches RoPE to a context longer than the one trained on comes last.

The slide abbreviates the exponent of the sinusoidal to i/embDim. In the paper components 2j and 2j+1 share one
frequency, exponent 2j/embDim. Only then does a shift by k rotate each pair (cos, sin), by k θⱼ: one linear map for
every p, which is how a model can learn relative patterns.

Shapes: `dim` is the size of an embedding in `sinusoidal` and `learned`, of one attention head in `rope`.
"""

import math

from engine import rotate, scatter_add, xp

# ---------------------------------------------------------------------------------- added to the embedding


def sinusoidal(positions, dim, base=10000.0, dtype=xp.float32):
    """The fixed encoding of "Attention is all you need" (Vaswani et al. 2017, section 3.5).

    positions: (..., time); dim: even. Returns (..., time, dim): sines in the even components, cosines in the odd ones.
    """
    angles = xp.asarray(positions, dtype=xp.float64)[..., None] * pair_frequencies(dim, base)
    pe = xp.empty((*angles.shape[:-1], dim), dtype)
    pe[..., 0::2] = xp.sin(angles)
    pe[..., 1::2] = xp.cos(angles)
    return pe


def learned(positions, table):
    """A trained row for each position (BERT, Devlin et al. 2019; GPT-2).

    positions: (..., time) integers; table: (length, dim). Returns y (..., time, dim) and
    backward(dy) -> dtable. ValueError for a position outside the table, for which nothing was trained.
    """
    positions = xp.asarray(positions)
    length, dim = table.shape
    if positions.size and not 0 <= positions.min() <= positions.max() < length:
        span = f"{positions.min()} to {positions.max()}"
        raise ValueError(f"positions {span} do not fit a learned table of {length} positions")

    def backward(dy):
        dtable = xp.zeros_like(table)
        scatter_add(dtable, positions.ravel(), dy.reshape(-1, dim))
        return dtable

    return table[positions], backward


# ------------------------------------------------------------------------------ multiplying queries and keys


def pair_frequencies(dim, base=10000.0):
    """θⱼ = base^(-2j/dim) radians per position, (dim/2,) in float64."""
    return base ** (-xp.arange(0, dim, 2, dtype=xp.float64) / dim)


def rope_tables(positions, frequencies, attention_factor=1.0, dtype=xp.float32):
    """cos and sin of each position's angles p θⱼ, each (..., time, dim/2), for positions (..., time) and frequencies
    (dim/2,).

    The angles are float64: float32 would be off by up to 0.007 radians near position 100 000. attention_factor: what
    cos and sin are multiplied by, more than 1 in a context that YaRN stretches (below).
    """
    angles = xp.asarray(positions, dtype=xp.float64)[..., None] * frequencies
    return tuple((attention_factor * f(angles)).astype(dtype) for f in (xp.cos, xp.sin))


def textbook_rope(x, cos, sin):
    """Rotary position embedding (Su et al. 2021): each pair (x₁, x₂), as a point in the plane, turned by its angle.

    x: (..., time, dim); cos, sin: (time, dim/2). Pair j is (j, j + dim/2), as in Llama's published weights.
    """
    n = cos.shape[-1]
    x1, x2 = x[..., :n], x[..., n:]
    return xp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def rope(x, cos, sin, interleaved=False):
    """The same at speed (engine/rotation.py), with its backward pass.

    x: (batch, heads, time, dim); cos, sin: (time, n) or what broadcasts, such as (batch, 1, time, n), of x's dtype;
    n = dim/2, or less, and then only the first 2n components turn (partial rotary). interleaved: pair j is (2j, 2j+1),
    as in the paper and DeepSeek. Returns y, shaped like x, and backward(dy) -> dx.
    """
    n = cos.shape[-1]
    pairs = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))

    def backward(dy):
        return rotate(dy, cos, -sin, *pairs)  # the transpose of a rotation is the rotation by minus the angle

    return rotate(x, cos, sin, *pairs), backward


# ------------------------------------------------------------------------------------- added to the scores


def alibi_slopes(heads, dtype=xp.float32):
    """A slope for each head, (heads,): 2^(-8/heads), 2^(-16/heads), ... 2^-8 (Press et al. 2022, section 3).

    For a number of heads that is no power of two, as in the authors' code: the slopes of the power below,
    then every other one of the power above.
    """
    below = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / below * xp.arange(1, below + 1))
    between = 2.0 ** (-4 / below * xp.arange(1, 2 * (heads - below), 2))
    return xp.concatenate([slopes, between]).astype(dtype)


def alibi(heads, dtype=xp.float32):
    """Attention with linear biases: what is added to the scores, -slope · |distance|, as a function of the positions.

    The paper's bias is -slope · (i - j) for keys j ≤ i. Here it is -slope · |i - j|, which is the same under a causal
    mask and serves bidirectional attention, too.
    Returns bias(query, key) -> (heads, queries, keys) for positions (queries, 1) and (1, keys).
    """
    slopes = alibi_slopes(heads, dtype)[:, None, None]
    return lambda query, key: -slopes * abs(query - key).astype(dtype)


# -------------------------------------------------------------------- stretching RoPE beyond the trained context


def rope_frequencies(dim, base=10000.0, scaling=None, max_position_embeddings=None):
    """The frequencies of RoPE's pairs, with the context extension that a published config.json asks for.

    dim: size of a head. scaling: the dict `rope_scaling` or `rope_parameters`, or None; its rope_theta is not read
    (pass it as base), its partial_rotary_factor is (only that part of dim gets frequencies). max_position_embeddings:
    the model's, for dicts that leave out what can be told from it.
    Returns frequencies (dim/2,), or half of the part that turns, in radians per position, float64, and
    attention_factor, which multiplies cos and sin. Any type but these is read as linear: engine/published.py refuses
    others first.

    In a context longer than the one trained on, slow pairs reach angles they never met. Each type makes θⱼ
    slower, keep[j] θⱼ + (1 - keep[j]) θⱼ / factor, and they differ in keep[j], from 0 to 1:

    linear  keep = 0: position p is read as p/factor (Chen et al. 2023), which blurs neighbours too.
    llama3  by how often a pair turned in the original context: up to low_freq_factor, keep = 0; from high_freq_factor
            on, keep = 1; a straight line between (Llama 3.1, Grattafiori et al. 2024).
    yarn    "NTK-by-parts" (Peng et al. 2023, section 3.2): pairs that turned over beta_fast times have seen all their
            angles and tell neighbours apart, keep = 1; those under beta_slow turns would meet new ones, keep = 0;
            a straight line in j between.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    frequencies = pair_frequencies(int(dim * (scaling.get("partial_rotary_factor") or 1)), base)
    if kind == "default":
        return frequencies, 1.0
    original = scaling.get("original_max_position_embeddings") or max_position_embeddings
    factor = scaling.get("factor") or max_position_embeddings / original
    keep, attention_factor = 0.0, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)
        keep = xp.clip((turns - low) / (high - low), 0, 1)
    if kind == "yarn":
        keep, attention_factor = _yarn(scaling, len(frequencies), base, original, factor)
    return frequencies * (keep + (1 - keep) / factor), attention_factor


def _yarn(scaling, pairs, base, original, factor):
    """YaRN's keep (pairs,) and attention_factor, with the options that DeepSeek and gpt-oss added.

    keep is a straight line in j, as in the authors' code (in the paper it is straight in the number of turns).
    """

    def pair_turning(times):  # the j for which original · base^(-j/pairs) = 2π · times
        return pairs * math.log(original / (2 * math.pi * times)) / math.log(base)

    low, high = pair_turning(scaling.get("beta_fast") or 32), pair_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)  # dim, not pairs: so it is in the published models
    keep = 1 - xp.clip((xp.arange(pairs) - low) / ((high - low) or 0.001), 0, 1)

    attention_factor, mscale, all_dim = map(scaling.get, ("attention_factor", "mscale", "mscale_all_dim"))
    if not attention_factor:
        # DeepSeek's softmax scale already holds the one of mscale_all_dim, so here goes only what is left over
        wanted, already = yarn_mscale(factor, mscale), yarn_mscale(factor, all_dim)
        attention_factor = wanted / already if mscale and all_dim else yarn_mscale(factor)
    return keep, float(attention_factor)


def yarn_mscale(factor, mscale=1.0):
    """YaRN's √(1/t), 0.1 · mscale · ln(factor) + 1 in a context `factor` times as long: q and k are multiplied by it
    each, the scores thus by 1/t, as the softmax over more keys is flatter (Peng et al. 2023, section 3.4).
    """
    return 0.1 * (mscale or 0) * math.log(factor) + 1 if factor > 1 else 1.0
