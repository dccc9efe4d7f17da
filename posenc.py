"""Codificación posicional.

Attention by itself sees a set: permute the tokens and every output moves with its token, unchanged. Order has
to be put in. Written as 1, 2, 3, ... N it would drown embeddings of size about one, so a position p becomes
angles p·θⱼ with θⱼ = base^(-2j/dim): a clock whose dim/2 hands turn at different speeds. The encodings differ
in where those angles, or a trained table or a straight line in their place, enter the model:

    added to the embedding  sinusoidal  PE[p, 2j] = sin(p θⱼ), PE[p, 2j+1] = cos(p θⱼ)   Vaswani et al. 2017
                            learned     a trained row for each position                  Devlin et al. 2019
    multiplying q and k     rope        R(p) turns pair j of q and k by p θⱼ, so that    Su et al. 2021
                                        ⟨R(m) q, R(n) k⟩ = ⟨q, R(n-m) k⟩
    added to the scores     alibi       -slope · |distance|, one slope for each head     Press et al. 2022
    nowhere                 none        under a causal mask the n-th token averages      Haviv et al. 2022;
                                        over n of them, which tells it apart ("NoPE")    Kazemnejad et al. 2023

The last needs no function: the model skips `rope`, as SmolLM3 does on every fourth layer.

The slide abbreviates the exponent of the sinusoidal to i/embDim. In the paper components 2j and 2j+1 share
one frequency, exponent 2⌊i/2⌋/embDim. Only then does a shift by k rotate each (sin, cos) pair, by k θⱼ: one
linear map for every p, which is how a model can learn relative patterns.

Shapes: `dim` is the size of an embedding in `sinusoidal` and `learned`, of one attention head in `rope`.
"""

import math

from engine import scatter_add, to_numpy, xp

# --- added to the embedding ---


def sinusoidal(positions, dim, base=10000.0, dtype=xp.float32):
    """The fixed encoding of "Attention is all you need" (Vaswani et al. 2017, section 3.5).

    positions: (..., time). Returns (..., time, dim): sines in the even components, cosines in the odd ones,
    pair j turning base^(-2j/dim) radians per position. ValueError if dim is odd.
    """
    cos, sin = rope_tables(positions, pair_frequencies(dim, base), dtype=dtype)
    return xp.stack([sin, cos], axis=-1).reshape(*sin.shape[:-1], dim)


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


# --- multiplying queries and keys ---


def pair_frequencies(dim, base=10000.0):
    """θⱼ = base^(-2j/dim) radians per position, (dim/2,) in float64. ValueError if dim is odd."""
    if dim % 2:
        raise ValueError(f"sines and cosines come in pairs, so dim must be even, not {dim}")
    return base ** (-xp.arange(0, dim, 2, dtype=xp.float64) / dim)


def rope_frequencies(dim, base=10000.0, scaling=None, max_position_embeddings=None):
    """The speed of each of RoPE's pairs, with the context extension that a published config.json asks for.

    dim: size of a head. scaling: the dict `rope_scaling` or `rope_parameters`, or None; its rope_theta is not
    read (pass it as base), its partial_rotary_factor is (only that part of dim gets frequencies).
    max_position_embeddings: the model's, for dicts that leave out what can be told from it.
    Returns frequencies (dim/2,) in radians per position, float64, and attention_factor, which multiplies cos
    and sin. ValueError for a type that is not here, or a key that is missing.

    In a context longer than the one trained on, slow pairs reach angles they never met. Each type divides the
    frequency of pair j by `factor`, except for a share keep[j] in [0, 1] that stays as it was:

    linear  keep = 0: position p is read as p/factor (Chen et al. 2023), which blurs neighbours too.
    llama3  by how often a pair turned in the original context: up to low_freq_factor, keep = 0; from
            high_freq_factor on, keep = 1; a straight line between (Llama 3.1, Grattafiori et al. 2024).
    yarn    "NTK-by-parts" (Peng et al. 2023, section 3.2): pairs that turned over beta_fast times have seen
            all their angles and tell neighbours apart, keep = 1; those under beta_slow turns would meet new
            ones, keep = 0; between, a straight line in j, as in the authors' code (in the paper it is straight in
            the number of turns). And since softmax flattens over more keys, q and k are multiplied by
            √(1/t) = 0.1 ln(factor) + 1 (section 3.4).
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not 1 < base < 1e30:
        raise ValueError(f"rope_theta must be more than 1, not {base}")
    speed = pair_frequencies(int(dim * (scaling.get("partial_rotary_factor") or 1)), base)
    if kind == "default":
        return speed, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"RoPE scaling {kind!r:.40} is none of default, linear, llama3 and yarn")

    def need(key, otherwise=None):
        value = otherwise if scaling.get(key) is None else scaling[key]
        if value is None:
            raise ValueError(f"RoPE scaling {kind!r} needs {key!r}")
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise ValueError(f"RoPE scaling {kind!r} cannot have {key} = {value!r:.40}")
        return value

    names = "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"
    options = {key: need(key) for key in names if scaling.get(key)} | {"truncate": scaling.get("truncate", True)}
    if kind == "linear":
        return speed / need("factor"), 1.0
    original = need("original_max_position_embeddings", max_position_embeddings)
    factor = need("factor", max_position_embeddings and max_position_embeddings / original)
    if kind == "llama3":
        low, high = need("low_freq_factor"), need("high_freq_factor")
        if not low < high:
            raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
        turns = original * speed / (2 * math.pi)
        keep, attention_factor = xp.clip((turns - low) / (high - low), 0, 1), 1.0
    else:
        keep, attention_factor = _yarn(options, len(speed), base, original, factor)
    return speed * (keep + (1 - keep) / factor), attention_factor


def _yarn(options, pairs, base, original, factor):
    """YaRN's keep (pairs,) and attention_factor, with the options that DeepSeek and gpt-oss added."""

    def pair_turning(times):  # the j for which original · base^(-j/pairs) = 2π · times
        return pairs * math.log(original / (2 * math.pi * times)) / math.log(base)

    first, last = pair_turning(options.get("beta_fast", 32)), pair_turning(options.get("beta_slow", 1))
    if options["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # dim, not pairs: so it is in the published models
    keep = 1 - xp.clip((xp.arange(pairs) - first) / ((last - first) or 0.001), 0, 1)

    attention_factor, mscale, all_dim = map(options.get, ("attention_factor", "mscale", "mscale_all_dim"))
    if attention_factor is None:
        # DeepSeek's softmax scale already holds the one of mscale_all_dim, so here goes only what is left over
        sharp, already = sharpening(factor, mscale), sharpening(factor, all_dim)
        attention_factor = sharp / already if mscale and all_dim else sharpening(factor)
    return keep, float(attention_factor)


def sharpening(factor, strength=1.0):
    """What q and k are multiplied by in a context `factor` times as long, 0.1 · strength · ln(factor) + 1, as the
    softmax over more keys is flatter (YaRN, Peng et al. 2023, section 3.4).
    """
    return 0.1 * (strength or 0) * math.log(factor) + 1 if factor > 1 else 1.0


def rope_tables(positions, frequencies, attention_factor=1.0, dtype=xp.float32):
    """cos and sin of each position's angles, each (..., time, dim/2), for positions (..., time).

    The angles are float64: float32 would round them by up to 0.004 radians at position 100 000.
    """
    angles = xp.asarray(positions, dtype=xp.float64)[..., None] * frequencies
    return tuple((attention_factor * f(angles)).astype(dtype) for f in (xp.cos, xp.sin))


def rope(x, cos, sin, interleaved=False):
    """Rotary position embedding: each pair of components, as a point in the plane, turned (Su et al. 2021).

    x: (batch, heads, time, dim); cos, sin: (time, n) or what broadcasts, such as (batch, 1, time, n), of x's
    dtype; n = dim/2, or less, and then only the first 2n components turn (partial rotary). Pair j is
    (j, j + n), as in Llama's published weights, or interleaved (2j, 2j + 1), as in the paper and DeepSeek.
    Returns y, shaped like x, and backward(dy) -> dx.
    """
    n = cos.shape[-1]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))

    # (x₁ cos - x₂ sin, x₂ cos + x₁ sin) = (x₁, x₂)·(cos, cos) + (x₂, x₁)·(-sin, sin): whole vectors, because
    # the four products of halves have rows too short for NumPy and take twice as long.
    cos_both = xp.empty((*cos.shape[:-1], 2 * n), cos.dtype)
    sin_both = xp.empty_like(cos_both)
    cos_both[..., first], cos_both[..., second] = cos, cos
    sin_both[..., first], sin_both[..., second] = -sin, sin

    def rotate(x, sin_both):
        y = xp.empty_like(x)
        y[..., first], y[..., second], y[..., 2 * n :] = x[..., second], x[..., first], x[..., 2 * n :]
        turned = y[..., : 2 * n]
        turned *= sin_both
        turned += x[..., : 2 * n] * cos_both
        return y

    def backward(dy):
        return rotate(dy, -sin_both)  # the transpose of a rotation is the rotation by minus the angle

    return rotate(x, sin_both), backward


# --- added to the scores ---


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

    The distance has no sign, for bidirectional attention too; a causal mask leaves the paper's bias.
    Returns bias(query, key) -> (heads, queries, keys) for positions (queries, 1) and (1, keys).
    """
    slopes = alibi_slopes(heads, dtype)[:, None, None]
    return lambda query, key: -slopes * abs(query - key).astype(dtype)


# --- demo ---


def demo():
    """Prints what the slide claims as numbers and saves figures/posenc.png."""
    length, dim = 512, 128
    positions = xp.arange(length)
    pe = sinusoidal(positions, dim, dtype=xp.float64)
    print(f"Beside embeddings with components of size 1, over {length} positions")
    for name, values in (("1, 2, 3, ... N", positions + 1.0), ("sinusoidal", pe)):
        size = math.sqrt(float((values**2).mean()))
        print(f"  {name:14}  root mean square {size:6.2f}, largest {float(abs(values).max()):5.1f}")

    print("\nOnly relative positions count")
    (cos, sin), shift = rope_tables([37], pair_frequencies(dim), dtype=xp.float64), 37
    turned, _ = rope(pe[None, None], cos, -sin, interleaved=True)  # -sin: the pairs are (sin, cos)
    error = abs(turned[0, 0, :-shift] - pe[shift:]).max()
    print(f"  sinusoidal  one rotation takes PE[p] to PE[p + {shift}] for every p; largest error {error:.0e}")
    q, k = xp.random.default_rng(0).standard_normal((2, 1, 1, length, 64)).astype(xp.float32)
    here, there = (rope_tables(positions + start, pair_frequencies(64)) for start in (0, 10_000))
    scores, moved = (rope(q, *t)[0] @ rope(k, *t)[0].swapaxes(-1, -2) / 8 for t in (here, there))
    error = abs(scores - moved).max()
    print(f"  RoPE        scores are equal from position 0 and from 10 000 on; largest error {error:.0e}")
    error = abs(xp.linalg.norm(rope(q, *there)[0], axis=-1) / xp.linalg.norm(q, axis=-1) - 1).max()
    print(f"  RoPE        the norm of every q is kept; largest relative error {error:.0e}")
    for heads in (8, 12):
        slopes = " ".join(f"{slope:.2g}" for slope in alibi_slopes(heads).tolist())
        print(f"  ALiBi       slopes of {heads:2} heads {slopes}")

    print(f"\nParameters for 2048 positions of dim 512: learned {2048 * 512:,}; sinusoidal, RoPE and ALiBi 0")

    print("\nFrom 8192 to 32 times as many positions: wavelengths (tokens) of pairs of a Llama 3.2 1B head")
    scaling = {"factor": 32, "low_freq_factor": 1, "high_freq_factor": 4}
    scaling["original_max_position_embeddings"] = 8192
    pairs = [0, 8, 12, 14, 15, 16, 17, 18, 31]
    print("  pair     ", *(f"{j:10}" for j in pairs))
    for kind in ("default", "linear", "llama3", "yarn"):
        speed, attention_factor = rope_frequencies(64, 500_000.0, {"rope_type": kind, **scaling})
        print(f"  {kind:9}", *(f"{2 * math.pi / float(speed[j]):10,.0f}" for j in pairs))
    print(f"  yarn also multiplies cos and sin by {attention_factor:.3f}")
    print(f"\nFigure: {_figure()}")


def _figure(path="figures/posenc.png"):
    from pathlib import Path

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((heat, dot), (score, bias)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    image = heat.imshow(to_numpy(sinusoidal(xp.arange(100), 128)), cmap="RdBu_r", aspect="auto")
    figure.colorbar(image, ax=heat, ticks=[-1, 0, 1])
    heat.set(title="Sinusoidal", xlabel="component i", ylabel="position p")

    distance = xp.arange(-60, 61)
    for dim in (32, 128, 512):
        pe = sinusoidal(distance + 60, dim)
        dot.plot(to_numpy(distance), to_numpy(pe @ pe[60]) / (dim / 2), label=f"dim {dim}")
    dot.set(title="Sinusoidal: PE[p] · PE[p + k], the same for every p", xlabel="k", ylabel="cosine")

    q, k = (xp.tile(v, (1, 1, len(distance), 1)) for v in xp.random.default_rng(3).standard_normal((2, 64)))
    for start, style, every in ((0, "-", 1), (1000, "o", 6), (100_000, "x", 5)):
        turned_q, _ = rope(q, *rope_tables([start], pair_frequencies(64)))
        turned_k, _ = rope(k, *rope_tables(start + distance, pair_frequencies(64)))
        values = to_numpy((turned_q * turned_k).sum(axis=-1).ravel() / 8)
        score.plot(to_numpy(distance)[::every], values[::every], style, label=f"q at {start:,}")
    score.set(title="RoPE: score of one q and one k", xlabel="position of k - position of q", ylabel="score")

    colors = plt.cm.viridis([i / 8 for i in range(8)])
    for head, line in enumerate(to_numpy(alibi(8)(xp.array([[4999]]), xp.arange(5000)[None]))[:, 0, ::-1]):
        bias.semilogx(range(5000), math.e**line, color=colors[head], label=f"2$^{{-{head + 1}}}$")
    bias.set(title="ALiBi: what each head's bias multiplies attention by", xlim=(1, 5000))
    bias.set(xlabel="distance", ylabel="exp(bias)")

    for axes in (dot, score, bias):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    Path(path).parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    from engine.cli import run_demo

    run_demo(demo)
