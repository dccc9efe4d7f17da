"""Codificación posicional, in numbers and as pictures."""

import math

from engine import to_numpy, xp
from engine.figure import figure
from posenc import alibi, alibi_slopes, pair_frequencies, rope, rope_frequencies, rope_tables, sinusoidal


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
    draw()
    print("\nFigure: figures/posenc.png")


def draw():
    """What the encodings make of positions and of their differences."""
    distance = xp.arange(-60, 61)
    with figure("figures/posenc.png", 2, 2, (12, 8)) as ((heat, products), (scores, biases)):
        image = heat.imshow(to_numpy(sinusoidal(xp.arange(100), 128)), cmap="RdBu_r", aspect="auto")
        heat.figure.colorbar(image, ax=heat, ticks=[-1, 0, 1])
        heat.set(title="Sinusoidal", xlabel="component i", ylabel="position p")

        for dim in (32, 128, 512):
            pe = sinusoidal(distance + 60, dim)
            products.plot(to_numpy(distance), to_numpy(pe @ pe[60]) / (dim / 2), label=f"dim {dim}")
        products.set(title="Sinusoidal: PE[p] · PE[p + k], the same for every p", xlabel="k", ylabel="cosine")

        q, k = (xp.tile(v, (1, 1, len(distance), 1)) for v in xp.random.default_rng(3).standard_normal((2, 64)))
        for start, style, every in ((0, "-", 1), (1000, "o", 6), (100_000, "x", 5)):
            turned_q, _ = rope(q, *rope_tables([start], pair_frequencies(64)))
            turned_k, _ = rope(k, *rope_tables(start + distance, pair_frequencies(64)))
            values = to_numpy((turned_q * turned_k).sum(axis=-1).ravel() / 8)
            scores.plot(to_numpy(distance)[::every], values[::every], style, label=f"q at {start:,}")
        scores.set(title="RoPE: score of one q and one k", xlabel="position of k - position of q", ylabel="score")

        for head, line in enumerate(to_numpy(alibi(8)(xp.array([[4999]]), xp.arange(5000)[None]))[:, 0, ::-1]):
            biases.semilogx(range(5000), math.e**line, color=(0.1, head / 8, 0.5), label=f"2$^{{-{head + 1}}}$")
        biases.set(title="ALiBi: what each head's bias multiplies attention by", xlim=(1, 5000))
        biases.set(xlabel="distance", ylabel="exp(bias)")
