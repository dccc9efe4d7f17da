"""Mixture of Experts: the load of the experts before and after balancing, and what a token costs."""

from functools import lru_cache

from engine import np, to_numpy, xp
from engine.figure import figure
from engine.weights import flatten
from lab.claims import Finding
from lab.measure import both_passes, seconds
from layers import swiglu
from moe import adjust_bias, mixture_of_experts
from optim import Optimizer

EXPERTS, CHOSEN = 8, 2
WAYS = {"nothing": {}, "auxiliary loss": {"aux_weight": 1.0}, "bias": {"update_speed": 0.01}}


def expert(rng, dim, size, deviation):
    shapes = {"gate": (size, dim), "up": (size, dim), "down": (dim, size)}
    return {f"{name}_proj.weight": deviation * rng.standard_normal(shape) for name, shape in shapes.items()}


def layer(rng, dim, size, count, gate_deviation, deviation):
    """The weights of a layer of `count` experts."""
    weights = {"gate.weight": gate_deviation * rng.standard_normal((count, dim))}
    return weights | flatten({f"experts.{i}": expert(rng, dim, size, deviation) for i in range(count)})


@lru_cache
def trained(way, seed=0, steps=400):
    """Trains a layer on tokens of 16 topics, some common and some rare, each of which wants another linear map.

    Returns its error and its loads over the last 20 steps, the busiest expert first, and the busiest load of each step.
    """
    options, rng, dim = WAYS[way], xp.random.default_rng(seed), 16
    topics, maps = rng.standard_normal((16, dim)), rng.standard_normal((16, dim, dim)) / dim**0.5
    offset = 2 * rng.standard_normal(dim)  # that all tokens share, so that a new router prefers some experts
    common = xp.cumsum(1 / xp.arange(1.0, 17))
    weights, optimizer = layer(rng, dim, dim, EXPERTS, 0.5, dim**-0.5), Optimizer("adamw", 0.01, weight_decay=0.0)
    if "update_speed" in options:
        weights["gate.e_score_correction_bias"] = xp.zeros(EXPERTS)
    loads, errors = [], []
    for step in range(steps):
        topic, observed = xp.searchsorted(common / common[-1], rng.random(512)).clip(0, 15), {}
        x = topics[topic] + 0.3 * rng.standard_normal((512, dim))
        balance = options.get("aux_weight", 0.0)
        y, backward = mixture_of_experts((x + offset)[None], weights, CHOSEN, observe=observed, balance=balance)
        error = y - (x[:, None, :] @ maps[topic])[:, 0]
        _, grads = backward(2 * error / len(x))
        optimizer.step(weights, grads, 1 - step / steps)
        if "update_speed" in options:
            adjust_bias(weights["gate.e_score_correction_bias"], observed["load"], options["update_speed"])
        loads.append(observed["load"] / observed["load"].mean())
        errors.append(float((error * error).sum() / len(x)))
    return sum(errors[-20:]) / 20, to_numpy(-xp.sort(-sum(loads[-20:]) / 20)), [float(load.max()) for load in loads]


def a_router_left_alone_prefers_some_experts(seed=0):
    """Left alone, the router sends most tokens to a few experts, while others learn nothing."""
    _, loads, _ = trained("nothing", seed)
    return Finding(float(loads[0]), f"the busiest expert has {loads[0]:.1f} times an even share", least=1.8)


def balancing_spreads_the_load(seed=0):
    """The auxiliary loss, or a bias in the router's choice, spreads the tokens evenly over the experts."""
    results = {way: trained(way, seed) for way in WAYS}
    busiest = max(float(results[way][1][0]) for way in ("auxiliary loss", "bias"))
    lines = [f"load of {EXPERTS} experts, a token sent to {CHOSEN}, 1 is an even share"]
    for way, (error, loads, _) in results.items():
        cells = " ".join(f"{load:5.2f}" for load in loads)
        lines.append(f"balanced by {way:15} {cells}   squared error {error:.2f}")

    def picture(path):
        with figure(path, 1, 2, (12, 3.4)) as (bars, lines):
            for i, (way, (_, loads, busiest)) in enumerate(results.items()):
                places = np.arange(EXPERTS) + 1 + 0.27 * (i - 1)
                bars.bar(places, loads, 0.25, label=f"balanced by\n{way}", hatch=("", "//", "..")[i], edgecolor="white")
                lines.plot(busiest, linewidth=0.9)
            bars.axhline(1, color="grey", linewidth=0.8)
            bars.set(title="Load of the experts: balanced, each gets about the same")
            bars.set(xlabel="expert, busiest first", ylabel="tokens / even share")
            lines.set(title="The busiest expert, in training", xlabel="step", ylabel="tokens / even share")

    return Finding(
        busiest, f"the busiest has {busiest:.2f} times an even share", most=1.7, picture=picture, lines=lines
    )


def more_experts_cost_a_token_no_more(seed=0, counts=(2, 4, 8, 16, 32), times=3):
    """A larger layer of experts costs a token no more, as only a few compute it; a dense layer costs its size."""
    rng, dim, size, tokens, rows = xp.random.default_rng(seed), 256, 128, 1024, []
    single = lambda weights: {name: w.astype(xp.float32) for name, w in weights.items()}
    x = rng.standard_normal((1, tokens, dim)).astype(xp.float32)
    for n in counts:
        weights, dense = single(layer(rng, dim, size, n, 1 / 16, 1 / 16)), single(expert(rng, dim, n * size, 1 / 16))
        calls = (mixture_of_experts, x, weights, CHOSEN), (swiglu, x, dense)
        whole = sum(w.size for w in dense.values())
        work = 6 * (whole // n * CHOSEN + n * dim), 6 * whole  # operations, forward and backward; the router's too
        rows.append((whole, *work, *(1e6 * seconds(both_passes, *call, times=times) / tokens for call in calls)))
    saved = rows[-1][2] / rows[-1][1]
    lines = [f"operations and time of a token, forward and backward; {CHOSEN} experts a token, and a dense layer"]
    for n, (whole, sparse, full, fast, slow) in zip(counts, rows):
        lines.append(
            f"{whole:9,} parameters, {n:2} experts: {sparse / 1e3:5.0f} and {full / 1e3:5.0f} thousand, "
            f"{fast:6.2f} and {slow:6.2f} µs ({slow / fast:.1f}x)"
        )

    def picture(path):
        with figure(path, size=(7, 3.2)) as axes:
            for name, column in (f"{CHOSEN} experts a token", 1), ("dense", 2):
                axes.semilogx(counts, [row[column] / 1e6 for row in rows], marker="o", label=name)
            axes.set_xticks(counts, counts)
            axes.minorticks_off()
            axes.set(title="More experts: a larger model, and the same cost of a token")
            axes.set(xlabel="experts in the layer (a dense layer as large)", ylabel="million operations a token")

    faster = rows[-1][4] / rows[-1][3]
    says = f"{saved:.0f} times fewer operations, {faster:.1f} times as fast, at {counts[-1]} experts"
    return Finding(saved, says, least=10, picture=picture, lines=lines)
