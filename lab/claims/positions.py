"""Codificación posicional: sinusoidal, learned, RoPE and ALiBi, in numbers and as pictures."""

import math

from engine import np, to_numpy, xp
from engine.figure import figure
from lab.claims import Finding
from lab.claims.language import next_tokens_loss
from posenc import alibi, alibi_slopes, pair_frequencies, rope, rope_frequencies, rope_tables, sinusoidal


def counting_grows_and_sinusoidal_does_not(seed=0, length=512):
    """1, 2, 3, … N grows far beyond embeddings, whose components are about 1; sinusoids stay within -1 and 1."""
    dim = 2 * int(np.random.default_rng(seed).integers(32, 256))
    positions = xp.arange(length)
    pe = sinusoidal(positions, dim, dtype=xp.float64)
    largest, lines = float(abs(pe).max()), []
    for name, values in (("1, 2, 3, … N", positions + 1.0), ("sinusoidal", pe)):
        size = math.sqrt(float((values**2).mean()))
        lines.append(f"{name:14}  root mean square {size:6.2f}, largest {float(abs(values).max()):5.1f}")

    def picture(path):
        with figure(path, size=(7, 3.6)) as axes:
            image = axes.imshow(to_numpy(sinusoidal(xp.arange(100), 128)), cmap="RdBu_r", aspect="auto")
            axes.figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], label="PE[p, i]")
            axes.set(title="Sinusoidal: each position p has its own row, and no value leaves -1 … 1")
            axes.set(xlabel="component i of the embedding", ylabel="position p of the token")

    says = f"largest value {largest:.0f}, against {length} when counted"
    return Finding(largest, says, most=1, picture=picture, lines=lines)


def a_shift_is_one_linear_map(seed=0, length=512):
    """One linear map, a rotation, takes PE[p] to PE[p + k] for every p: so relative positions can be learned."""
    rng = np.random.default_rng(seed)
    dim, shift = 2 * int(rng.integers(16, 128)), int(rng.integers(1, 100))
    pe = sinusoidal(xp.arange(length), dim, dtype=xp.float64)
    cos, sin = rope_tables([shift], pair_frequencies(dim), dtype=xp.float64)
    turned, _ = rope(pe[None, None], cos, -sin, interleaved=True)  # -sin: the pairs are (sin, cos)
    error = float(abs(turned[0, 0, :-shift] - pe[shift:]).max())

    def picture(path):
        distance = np.arange(-60, 61)
        with figure(path, size=(7.5, 3)) as axes:
            for dim in (32, 128, 512):
                pe = to_numpy(sinusoidal(distance + 60, dim))
                axes.plot(distance, pe @ pe[60] / (dim / 2), label=f"dim {dim}")
            axes.set(title="PE[p] · PE[p + k] depends on k only, and is largest for neighbours")
            axes.set(xlabel="k", ylabel="cosine of the two")

    return Finding(error, f"largest error {error:.0e} for k = {shift}, dim = {dim}", most=1e-10, picture=picture)


def fixed_positions_are_no_parameters(seed=0, length=2048, dim=512):
    """Fewer parameters to learn: a learned table has a row for each position, a formula has none."""
    table = length * dim
    says = f"{table:,} for {length:,} learned positions of dim {dim}; sinusoidal, RoPE and ALiBi 0"
    return Finding(table, says, least=1)


def rope_scores_depend_on_the_distance_only(seed=0, length=256, dim=64):
    """RoPE turns q and k by their positions, so that their score depends on the distance between them only."""
    q, k = xp.random.default_rng(seed).standard_normal((2, 1, 1, length, dim)).astype(xp.float32)
    here, there = (rope_tables(xp.arange(length) + start, pair_frequencies(dim)) for start in (0, 10_000))
    scores, moved = (rope(q, *t)[0] @ rope(k, *t)[0].swapaxes(-1, -2) / dim**0.5 for t in (here, there))
    error = float(abs(scores - moved).max())
    norms = float(abs(xp.linalg.norm(rope(q, *there)[0], axis=-1) / xp.linalg.norm(q, axis=-1) - 1).max())
    says = f"scores from position 0 and from 10,000 on differ by {error:.0e}"
    lines = (f"the norm of every q is kept; largest relative error {norms:.0e}",)
    return Finding(max(error, norms), says, most=1e-3, picture=turning_arrows, lines=lines)


def turning_arrows(path):
    """q and k as arrows, each turned by its position: both move on, and the angle between them stays."""
    q, k, speed = 0.9 * np.exp(0.4j), 0.7 * np.exp(1.1j), math.pi / 8
    with figure(path, 1, 4, (11, 3.2)) as axes:
        for axis, (m, n) in zip(axes, ((0, 0), (0, 3), (3, 6), (8, 11))):
            for name, arrow, at, colour in (("q", q, m, "C0"), ("k", k, n, "C1")):
                turned = arrow * np.exp(1j * at * speed)
                axis.annotate("", (arrow.real, arrow.imag), (0, 0), arrowprops={"arrowstyle": "->", "alpha": 0.25})
                arrowprops = {"arrowstyle": "-|>", "color": colour, "lw": 2, "ls": "-" if name == "q" else "--"}
                axis.annotate("", (turned.real, turned.imag), (0, 0), arrowprops=arrowprops)
                axis.text(1.2 * turned.real, 1.2 * turned.imag, name, color=colour, ha="center", va="center")
            score = (q * np.exp(1j * m * speed) * np.conj(k * np.exp(1j * n * speed))).real
            axis.text(0, -1.25, f"q at {m}, k at {n}: score {score:+.2f}", ha="center")
            axis.set(xlim=(-1.2, 1.2), ylim=(-1.3, 1.2), aspect="equal")
            axis.set_axis_off()
        axes[0].figure.suptitle("RoPE: the same distance, the same score (grey: before turning)", fontsize="medium")


def alibi_is_a_straight_line(seed=0):
    """ALiBi has no encoding of positions: it lowers each score in proportion to the distance, by a slope per head."""
    heads = int(2 ** np.random.default_rng(seed).integers(1, 5))
    bias = to_numpy(alibi(heads, xp.float64)(xp.array([[999]]), xp.arange(1000)[None]))[:, 0]
    error = float(abs(np.diff(bias, n=2, axis=1)).max())
    lines = [
        f"slopes of {n:2} heads: " + " ".join(f"{slope:.2g}" for slope in alibi_slopes(n).tolist()) for n in (8, 12)
    ]

    def picture(path):
        with figure(path, size=(7.5, 3.2)) as axes:
            for head, line in enumerate(to_numpy(alibi(8)(xp.array([[4999]]), xp.arange(5000)[None]))[:, 0, ::-1]):
                axes.semilogx(
                    range(1, 5001), math.e**line, "-", color=str(head / 10), label=f"slope 2$^{{-{head + 1}}}$"
                )
            axes.set(title="ALiBi: each of 8 heads sees as far as its slope lets it", xlim=(1, 5000))
            axes.set(xlabel="distance", ylabel="attention is multiplied by")

    says = f"the biases of {heads} heads are straight to {error:.0e}"
    return Finding(error, says, most=1e-12, picture=picture, lines=lines)


def alibi_goes_on_where_learned_positions_fail(seed=0, trained=32, steps=300):
    """Beyond the trained length ALiBi goes on as before; learned positions fail, as no row was trained for them."""
    losses = {kind: next_tokens_loss(kind, trained, 4 * trained, steps, seed) for kind in ("learned", "ALiBi")}
    beyond = {kind: float(loss[trained + 8 :].mean()) for kind, loss in losses.items()}
    ratio = beyond["learned"] - beyond["ALiBi"]
    inside = ", ".join(f"{kind} {loss[8:trained].mean():.2f}" for kind, loss in losses.items())

    def picture(path):
        with figure(path, size=(8, 3.2)) as axes:
            for kind, loss in losses.items():
                axes.plot(loss, label=kind)
            axes.axvline(trained, color="grey", linewidth=0.8)
            axes.set(title=f"Trained on {trained} tokens: behind them learned positions fail, ALiBi goes on")
            axes.set(xlabel="position", ylabel="loss, nats a token", ylim=(0, None))

    says = f"beyond: learned {beyond['learned']:.2f}, ALiBi {beyond['ALiBi']:.2f} nats a token"
    return Finding(ratio, says, least=0.3, picture=picture, lines=(f"within the trained length: {inside}",))


def rope_is_stretched_at_its_slow_pairs(seed=0):
    """To read 32 times as far, the published scalings slow down the pairs that turn slowly, and leave the fast ones."""
    scaling = {"factor": 32, "low_freq_factor": 1, "high_freq_factor": 4}
    scaling["original_max_position_embeddings"] = 8192
    pairs, kinds = [0, 8, 12, 14, 15, 16, 17, 18, 31], ("default", "linear", "llama3", "yarn")
    speeds = {kind: rope_frequencies(64, 500_000.0, {"rope_type": kind, **scaling}) for kind in kinds}
    slower = {kind: to_numpy(speeds["default"][0] / speed) for kind, (speed, _) in speeds.items()}
    error = max(abs(slower[kind][[0, -1]] - [1, 32]).max() for kind in ("llama3", "yarn"))
    lines = [
        "wavelengths, in tokens, of pairs of a Llama 3.2 1B head",
        f"pair      {''.join(f'{j:11}' for j in pairs)}",
    ]
    for kind, (speed, _) in speeds.items():
        lines.append(f"{kind:10}" + "".join(f"{2 * math.pi / float(speed[j]):11,.0f}" for j in pairs))
    lines.append(f"yarn also multiplies cos and sin by {speeds['yarn'][1]:.3f}")

    def picture(path):
        with figure(path, size=(7.5, 3)) as axes:
            for kind, values in slower.items():
                axes.semilogy(values, label={"default": "as trained"}.get(kind, kind))
            axes.set(title="Stretched 32 times: fast pairs stay, slow pairs turn 32 times as slowly")
            axes.set(xlabel="pair, from fast to slow", ylabel="times as slow")

    says = (
        f"the fastest pair {slower['llama3'][0]:.0f} and the slowest {slower['llama3'][-1]:.0f} times as slow (llama3)"
    )
    return Finding(float(error), says, most=1e-6, picture=picture, lines=lines)
