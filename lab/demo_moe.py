"""Mixture of Experts, in numbers: the load of the experts before and after balancing, and what a token costs."""

from engine import to_numpy, xp
from engine.figure import figure
from engine.weights import flatten
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


def train(steps, aux_weight=0.0, update_speed=None):
    """Trains a layer on tokens of 16 topics, some common and some rare, each of which wants another linear map.

    Returns its error and its loads over the last 20 steps, and the busiest load of each step.
    """
    rng, dim = xp.random.default_rng(0), 16
    topics, maps = rng.standard_normal((16, dim)), rng.standard_normal((16, dim, dim)) / dim**0.5
    offset = 2 * rng.standard_normal(dim)  # that all tokens share, so that a new router prefers some experts
    common = xp.cumsum(1 / xp.arange(1.0, 17))
    rng = xp.random.default_rng(1)
    weights, optimizer = layer(rng, dim, dim, EXPERTS, 0.5, dim**-0.5), Optimizer("adamw", 0.01, weight_decay=0.0)
    if update_speed is not None:
        weights["gate.e_score_correction_bias"] = xp.zeros(EXPERTS)
    loads, errors = [], []
    for step in range(steps):
        topic, observed = xp.searchsorted(common / common[-1], rng.random(512)).clip(0, 15), {}
        x = topics[topic] + 0.3 * rng.standard_normal((512, dim))
        y, backward = mixture_of_experts((x + offset)[None], weights, CHOSEN, observe=observed, balance=aux_weight)
        error = y - (x[:, None, :] @ maps[topic])[:, 0]
        _, grads = backward(2 * error / len(x))
        optimizer.step(weights, grads, 1 - step / steps)
        if update_speed is not None:
            adjust_bias(weights["gate.e_score_correction_bias"], observed["load"], update_speed)
        loads.append(observed["load"] / observed["load"].mean())
        errors.append(float((error * error).sum() / len(x)))
    return sum(errors[-20:]) / 20, -xp.sort(-sum(loads[-20:]) / 20), [float(load.max()) for load in loads]


def demo(steps=400, counts=(2, 4, 8, 16, 32)):
    """What the slide claims, in numbers: the load of the experts before and after balancing, and what a token costs."""
    results = {way: train(steps, **options) for way, options in WAYS.items()}
    print(f"Load of {EXPERTS} experts, a token sent to {CHOSEN}, after {steps} steps: 1 is an even share")
    for way, (error, loads, _) in results.items():
        cells = " ".join(f"{float(load):5.2f}" for load in loads)
        print(f"  balanced by {way:15} {cells}   squared error {error:.2f}")

    print("\nTime per token, forward and backward, beside a dense layer of as many parameters")
    rng, dim, size, tokens, times = xp.random.default_rng(0), 256, 128, 2048, []
    single = lambda weights: {name: w.astype(xp.float32) for name, w in weights.items()}
    x = rng.standard_normal((1, tokens, dim)).astype(xp.float32)
    for n in counts:
        weights, dense = single(layer(rng, dim, size, n, 1 / 16, 1 / 16)), single(expert(rng, dim, n * size, 1 / 16))
        calls = (mixture_of_experts, x, weights, CHOSEN), (swiglu, x, dense)
        times.append([1e6 * seconds(both_passes, *call, times=5) / tokens for call in calls])
        sparse, full = times[-1]
        parameters = f"  {sum(w.size for w in dense.values()):9,} parameters: {n:2} experts"
        print(f"{parameters} {sparse:6.2f} µs, dense {full:6.2f} µs ({full / sparse:.1f}x)")

    with figure("figures/moe.png", 1, 3, (14, 4)) as (bars, lines, cost):
        for i, (way, (_, loads, busiest)) in enumerate(results.items()):
            bars.bar([e + 0.27 * (i - 1) for e in range(EXPERTS)], to_numpy(loads), 0.25, label=way)
            lines.plot(busiest, label=way, linewidth=0.8)
        bars.axhline(1, color="grey", linewidth=0.8)
        bars.set(title="Load of the experts, even = 1", xlabel="expert, busiest first", ylabel="tokens / even share")
        lines.set(title="The busiest expert", xlabel="training step", ylabel="tokens / even share")
        for name, values in zip((f"{CHOSEN} experts a token", "dense"), zip(*times)):
            cost.loglog(counts, values, "o-", label=name)
        cost.set(title="Time a token, at equal parameters", xlabel="experts in the layer")
        cost.set_ylabel("µs, forward and backward")
        cost.set_xticks(counts, counts)
        cost.minorticks_off()
    print("\nfigures/moe.png")
