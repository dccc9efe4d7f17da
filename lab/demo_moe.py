"""Mixture of Experts, in numbers: the load of the experts before and after balancing, and what a token costs."""

import os
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from engine import to_numpy, xp
from engine.weights import flatten
from layers import swiglu
from moe import adjust_bias, mixture_of_experts
from optim import Optimizer


def demo(steps=400, counts=(2, 4, 8, 16, 32)):
    """What the slide claims, in numbers: the load of the experts before and after balancing, and what a token costs."""
    # tokens of 16 topics, some common and some rare, each of which wants another linear map
    rng, dim, experts, k = xp.random.default_rng(0), 16, 8, 2
    topics, maps = rng.standard_normal((16, dim)), rng.standard_normal((16, dim, dim)) / dim**0.5
    offset = 2 * rng.standard_normal(dim)  # that all tokens share, so that a new router prefers some experts
    common = xp.asarray([1 / (i + 1) for i in range(16)])

    def train(aux_weight=0.0, update_speed=None):
        """Trains a layer. Returns its error and its loads over the last 20 steps, and the busiest load of each."""
        rng = xp.random.default_rng(1)
        weights = {"gate.weight": 0.5 * rng.standard_normal((experts, dim))}
        for i in range(experts):
            for name in "gate", "up", "down":
                weights[f"experts.{i}.{name}_proj.weight"] = rng.standard_normal((dim, dim)) / dim**0.5
        if update_speed is not None:
            weights["gate.e_score_correction_bias"] = xp.zeros(experts)
        optimizer, busiest, loads, errors = Optimizer("adamw", 0.01, weight_decay=0.0), [], [], []
        for step in range(steps):
            topic = xp.searchsorted(xp.cumsum(common / common.sum()), rng.random(512)).clip(0, 15)
            x = topics[topic] + 0.3 * rng.standard_normal((512, dim))
            wanted = (x[:, None, :] @ maps[topic])[:, 0]
            observed = {}
            y, backward = mixture_of_experts((x + offset)[None], weights, k, observe=observed, balance=aux_weight)
            error = y - wanted
            _, grads = backward(2 * error / len(x))
            optimizer.step(weights, grads, 1 - step / steps)
            if update_speed is not None:
                adjust_bias(weights["gate.e_score_correction_bias"], observed["load"], update_speed)
            loads.append(observed["load"] / observed["load"].mean())
            busiest.append(float(loads[-1].max()))
            errors.append(float((error * error).sum() / len(x)))
        return sum(errors[-20:]) / 20, sum(loads[-20:]) / 20, busiest

    ways = {"nothing": {}, "auxiliary loss": {"aux_weight": 1.0}, "bias": {"update_speed": 0.01}}
    results = {way: train(**options) for way, options in ways.items()}
    print(f"Load of {experts} experts, a token sent to {k}, after {steps} steps: 1 is an even share")
    for way, (error, loads, _) in results.items():
        cells = " ".join(f"{float(load):5.2f}" for load in -xp.sort(-loads))
        print(f"  balanced by {way:15} {cells}   squared error {error:.2f}")

    print("\nTime per token, forward and backward, beside a dense layer of as many parameters")
    dim, intermediate, tokens, times = 256, 128, 2048, []
    x = rng.standard_normal((1, tokens, dim)).astype(xp.float32)

    def expert(size):
        sizes = {"gate": (size, dim), "up": (size, dim), "down": (dim, size)}
        return {f"{n}_proj.weight": (rng.standard_normal(s) / 16).astype(xp.float32) for n, s in sizes.items()}

    def seconds(function, *arguments):
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            y, backward = function(*arguments)
            backward(y)
            best = min(best, time.perf_counter() - began)
        return best

    for n in counts:
        weights = flatten({f"experts.{i}": expert(intermediate) for i in range(n)})
        weights["gate.weight"] = (rng.standard_normal((n, dim)) / 16).astype(xp.float32)
        dense = expert(n * intermediate)
        times.append([seconds(mixture_of_experts, x, weights, k), seconds(swiglu, x, dense)])
        sparse, full = (1e6 * t / tokens for t in times[-1])
        parameters = sum(w.size for w in dense.values())
        print(
            f"  {parameters:9,} parameters: {n:2} experts {sparse:6.2f} µs, dense {full:6.2f} µs ({full / sparse:.1f}x)"
        )

    figure, (bars, lines, cost) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for i, (way, (_, loads, busiest)) in enumerate(results.items()):
        bars.bar([e + 0.27 * (i - 1) for e in range(experts)], to_numpy(-xp.sort(-loads)), 0.25, label=way)
        lines.plot(busiest, label=way, linewidth=0.8)
    bars.axhline(1, color="grey", linewidth=0.8)
    bars.set(title="Load of the experts, even = 1", xlabel="expert, busiest first", ylabel="tokens / even share")
    lines.set(title="The busiest expert", xlabel="training step", ylabel="tokens / even share")
    for i, name in enumerate([f"{k} experts a token", "dense"]):
        cost.loglog(counts, [1e6 * row[i] / tokens for row in times], "o-", label=name)
    cost.set(
        title="Time a token, at equal parameters", xlabel="experts in the layer", ylabel="µs, forward and backward"
    )
    cost.set_xticks(counts, counts)
    cost.minorticks_off()
    for axes in bars, lines, cost:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    os.makedirs("figures", exist_ok=True)
    figure.savefig("figures/moe.png", dpi=120)
    print("\nfigures/moe.png")
