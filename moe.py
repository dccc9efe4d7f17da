"""Transformers actuales: Mixture of Experts (MoE).

The feed-forward layer becomes many small ones, the experts, and for each token a router (gating network) decides
which k of them process it and how much each counts:

    y = Σ_{i chosen} g_i expert_i(x),    g = router(x)                   (Shazeer et al. 2017; Fedus et al. 2022)

A model of a hundred experts has the memory of a large model and the cost of a small one. The price is that the
router must not send every token to the same few, who would learn ever more while the others learn nothing. Two
remedies are here: a loss that is smallest where the load is even (Switch, GShard), and a bias that lifts the
scores of experts with too little to do, in the choice only (DeepSeek V3).

The sum over i is computed expert by expert and not token by token: the tokens are sorted by expert, so that each
expert multiplies one matrix, and Python runs once an expert, however many tokens there are.

Shapes: x (tokens, dim); scores (tokens, experts); chosen, the numbers of a token's experts, and gates, how much
they count, (tokens, k).
"""

from backend import to_numpy, xp
from layers import flatten, linear, nest, softmax, swiglu


def every_expert(x, gates, experts):
    """y = Σ_i g_i expert_i(x), the textbook version: every expert computes every token, most of them for nothing.

    gates: (tokens, experts), 0 where an expert does not count. experts: a list of weights of layers.swiglu.
    Returns y, shaped like x, and backward(dy) -> (dx, dgates, dexperts).
    """
    outputs, backwards = zip(*(swiglu(x, weights) for weights in experts), strict=True)
    y = sum(gates[:, i, None] * output for i, output in enumerate(outputs))

    def backward(dy):
        dgates = xp.stack([(dy * output).sum(axis=-1) for output in outputs], axis=-1)
        dxs, dexperts = zip(*(b(gates[:, i, None] * dy) for i, b in enumerate(backwards)), strict=True)
        return sum(dxs), dgates, list(dexperts)

    return y, backward


def chosen_experts(x, chosen, gates, experts):
    """The same sum over the chosen experts only.

    chosen, gates: (tokens, k). experts: a list of weights of layers.swiglu.
    Returns y, shaped like x, and backward(dy) -> (dx, dgates, dexperts).
    """
    tokens, k = chosen.shape
    order = xp.argsort(chosen.reshape(-1), kind="stable")  # the tokens of expert 0, those of expert 1, ...
    rows = x[order // k]  # a token comes k times
    ends = to_numpy(xp.cumsum(xp.bincount(chosen.reshape(-1), minlength=len(experts)))).tolist()
    parts = [slice(start, end) for start, end in zip([0] + ends, ends)]

    sorted_outputs, backwards = xp.empty_like(rows), {}
    for i, part in enumerate(parts):
        if part.start < part.stop:
            sorted_outputs[part], backwards[i] = swiglu(rows[part], experts[i])
    outputs = xp.empty_like(rows)
    outputs[order] = sorted_outputs
    outputs = outputs.reshape(tokens, k, -1)
    y = (gates[:, None, :] @ outputs)[:, 0]

    def backward(dy):
        dgates = (outputs @ dy[:, :, None])[:, :, 0]
        doutputs = (gates[:, :, None] * dy[:, None, :]).reshape(tokens * k, -1)[order]
        dsorted, dexperts = xp.empty_like(rows), []
        for i, part in enumerate(parts):
            if i in backwards:
                dsorted[part], dweights = backwards[i](doutputs[part])
            else:
                dweights = {name: xp.zeros_like(w) for name, w in experts[i].items()}
            dexperts.append(dweights)
        drows = xp.empty_like(rows)
        drows[order] = dsorted
        return drows.reshape(tokens, k, -1).sum(axis=1), dgates, dexperts

    return y, backward


def choose(scores, k, groups=1, used_groups=1):
    """The k largest scores of each row: (tokens, k) integers.

    Group-limited (DeepSeek V3, DeepSeek-AI 2024, section 2.1.2): the experts are in `groups` groups, one a
    machine, and only the `used_groups` groups whose two best scores have the largest sum take part, so that a
    token travels to few machines.
    """
    if groups > 1:
        grouped = scores.reshape(len(scores), groups, -1)
        best_two = -xp.partition(-grouped, 1, axis=-1)[..., :2].sum(axis=-1)  # (tokens, groups)
        kept = choose(best_two, used_groups)
        mask = (kept[:, :, None] == xp.arange(groups)).any(axis=1)  # (tokens, groups)
        scores = xp.where(mask[:, :, None], grouped, -xp.inf).reshape(scores.shape)
    if k == scores.shape[-1]:
        return xp.broadcast_to(xp.arange(k), scores.shape)
    return xp.argpartition(-scores, k - 1, axis=-1)[:, :k]


def route(x, weight, k, bias=None, groups=1, used_groups=1, normalise=True, scale=1.0):
    """The router: to which k experts a token goes, and how much each of them counts.

    Without a bias, scores = softmax(W x), as in Qwen3. With it, scores = sigmoid(W x), as in DeepSeek V3
    (equations 12 to 16), and the bias is added for the choice alone: what an expert counts stays its score, and
    the bias has no gradient.

    weight: (experts, dim). bias: (experts,) or None. groups, used_groups: as in `choose`. normalise: the k
    scores are divided by their sum. scale: multiplies them then.
    Returns (chosen, gates, p), where p (tokens, experts) are all scores, made to add up to 1, and
    backward(dgates, dp=None) -> (dx, dweight).
    """
    logits, linear_backward = linear(x, weight)
    if bias is None:
        scores, scores_backward = softmax(logits)
        p = scores
    else:
        scores = (xp.tanh(logits * 0.5) + 1) * 0.5
        scores_backward = lambda dscores: dscores * scores * (1 - scores)
        total = scores.sum(axis=-1, keepdims=True)
        p = scores / total
    chosen = choose(scores if bias is None else scores + bias, k, groups, used_groups)
    row = xp.arange(len(chosen))[:, None]
    picked = scores[row, chosen]
    if normalise:
        picked_total = picked.sum(axis=-1, keepdims=True) + 1e-20
        gates = picked / picked_total * scale
    else:
        gates = picked * scale

    def backward(dgates, dp=None):
        dpicked = dgates * scale
        if normalise:  # the derivative of a/Σa, here and below
            dpicked = (dpicked - (dgates * gates).sum(axis=-1, keepdims=True)) / picked_total
        dscores = xp.zeros_like(scores)
        dscores[row, chosen] = dpicked
        if dp is not None:
            dscores += dp if bias is None else (dp - (dp * p).sum(axis=-1, keepdims=True)) / total
        return linear_backward(scores_backward(dscores))

    return (chosen, gates, p), backward


def load_balance(p, chosen):
    """The auxiliary loss, mean over the sequences of experts · Σ_i f_i P_i: 1 where the load is even, more where
    it is not (Switch: Fedus et al. 2022, equations 4 to 6; by sequence: DeepSeek-AI 2024, equations 17 to 20).

    f_i, the share of a sequence's choices that fell on expert i, has no gradient; P_i, the mean of its p, does,
    and is pushed down where f_i is large.

    p: (batch, time, experts); chosen: (batch, time, k). Returns the loss, a float, and backward(dloss=1) -> dp.
    """
    batch, time, experts = p.shape
    numbers = chosen.reshape(batch, -1) + experts * xp.arange(batch)[:, None]
    count = xp.bincount(numbers.reshape(-1), minlength=batch * experts).reshape(batch, experts)
    f = (count / numbers.shape[1]).astype(p.dtype)
    loss = float((f * p.mean(axis=1)).sum()) * experts / batch

    def backward(dloss=1.0):
        return xp.broadcast_to(f[:, None] * (dloss * experts / (batch * time)), p.shape)

    return loss, backward


def adjust_bias(bias, load, speed=0.001):
    """Load balance without a loss: a step up for the experts with less than the mean load, a step down for those
    with more, in place (DeepSeek-AI 2024, section 2.1.2; Wang et al. 2024).

    bias, load: (experts,), the load being the number of tokens that each was sent. speed: the step.
    """
    bias += speed * xp.sign(load.mean() - load).astype(bias.dtype)


def mixture_of_experts(x, weights, k, observed=None, **routing):
    """The layer: route, sum over the chosen experts, and add the shared ones, which compute every token.

    x: (batch, time, dim). weights: gate.weight, gate.e_score_correction_bias where the router has a bias,
    experts.{i}.{gate,up,down}_proj.weight, and shared_experts.* where there are some. routing: groups,
    used_groups, normalise and scale of `route`. observed: a dict, or None, in which "load" is set to the number
    of tokens each expert was sent, (experts,).
    Returns (y, balance), shaped like x and the loss of `load_balance`, and backward(dy, dbalance=0) ->
    (dx, dweights).
    """
    shape, parts = x.shape, nest(weights)
    experts = [expert for _, expert in sorted(nest(parts["experts"]).items(), key=lambda item: int(item[0]))]
    gate, shared = parts["gate"], parts.get("shared_experts")
    x = x.reshape(-1, shape[-1])
    (chosen, gates, p), route_backward = route(x, gate["weight"], k, gate.get("e_score_correction_bias"), **routing)
    y, experts_backward = chosen_experts(x, chosen, gates, experts)
    if shared:
        shared_y, shared_backward = swiglu(x, shared)
        y += shared_y
    balance, balance_backward = load_balance(p.reshape(*shape[:2], -1), chosen.reshape(*shape[:2], -1))
    if observed is not None:
        observed["load"] = xp.bincount(chosen.reshape(-1), minlength=len(experts))

    def backward(dy, dbalance=0.0):
        dy = dy.reshape(x.shape)
        dx, dgates, dexperts = experts_backward(dy)
        dparts = {"experts": flatten(dict(enumerate(dexperts)))}
        dx_route, dweight = route_backward(dgates, balance_backward(dbalance).reshape(p.shape) if dbalance else None)
        dx += dx_route
        dparts["gate"] = {name: dweight if name == "weight" else xp.zeros_like(w) for name, w in gate.items()}
        if shared:
            dx_shared, dparts["shared_experts"] = shared_backward(dy)
            dx += dx_shared
        return dx.reshape(shape), flatten(dparts)

    return (y.reshape(shape), balance), backward


def demo():
    """What the slide claims, in numbers: the load of the experts before and after balancing, and what a token costs."""
    import os
    import time

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from optim import Optimizer

    # tokens of 16 topics, some common and some rare, each of which wants another linear map
    rng, dim, experts, k = xp.random.default_rng(0), 16, 8, 2
    topics, maps = rng.standard_normal((16, dim)), rng.standard_normal((16, dim, dim)) / dim**0.5
    common = xp.asarray([1 / (i + 1) for i in range(16)])

    def batch(tokens=512):
        topic = xp.searchsorted(xp.cumsum(common / common.sum()), rng.random(tokens)).clip(0, 15)
        x = topics[topic] + 0.3 * rng.standard_normal((tokens, dim))
        return x, (x[:, None, :] @ maps[topic])[:, 0]

    def train(balance=0.0, speed=None):
        """Trains a layer. Returns its last loss, the last loads, and the busiest expert's load at each step."""
        weights = {"gate.weight": 0.1 * rng.standard_normal((experts, dim))}
        if speed is not None:
            weights["gate.e_score_correction_bias"] = xp.zeros(experts)
        for i in range(experts):
            for name in "gate", "up", "down":
                weights[f"experts.{i}.{name}_proj.weight"] = rng.standard_normal((dim, dim)) / dim**0.5
        optimizer, busiest, loads = Optimizer("adamw", 0.01, weight_decay=0.0), [], xp.zeros(experts)
        for step in range(400):
            x, wanted = batch()
            observed = {}
            (y, _), backward = mixture_of_experts(x[None], weights, k, observed)
            error = y[0] - wanted
            _, grads = backward(2 * error[None] / len(x), balance)
            optimizer.step(weights, grads, 1 - step / 400)
            if speed is not None:
                adjust_bias(weights["gate.e_score_correction_bias"], observed["load"], speed)
            busiest.append(float(observed["load"].max() / observed["load"].mean()))
            loads += observed["load"] if step >= 380 else 0
        return float((error * error).sum() / len(x)), loads / loads.sum() * experts, busiest

    ways = {"nothing": {}, "auxiliary loss": {"balance": 1.0}, "bias": {"speed": 0.01}}
    results = {way: train(**options) for way, options in ways.items()}
    print(f"Load of {experts} experts, a token sent to {k}, after 400 steps: 1 is an even share")
    for way, (loss, loads, _) in results.items():
        cells = " ".join(f"{float(load):5.2f}" for load in -xp.sort(-loads))
        print(f"  balanced by {way:15} {cells}   squared error {loss:.2f}")

    print("\nTime a token needs, forward and backward, beside a dense layer with as many parameters")
    dim, inside, tokens, counts, times = 256, 128, 2048, [2, 4, 8, 16, 32], []
    x = rng.standard_normal((1, tokens, dim)).astype(xp.float32)

    def expert(inside):
        sizes = {"gate": (inside, dim), "up": (inside, dim), "down": (dim, inside)}
        return {f"{n}_proj.weight": (rng.standard_normal(s) / 16).astype(xp.float32) for n, s in sizes.items()}

    def seconds(function, *arguments):
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            y, backward = function(*arguments)
            backward(y[0] if isinstance(y, tuple) else y)
            best = min(best, time.perf_counter() - began)
        return best

    for n in counts:
        weights = flatten({f"experts.{i}": expert(inside) for i in range(n)})
        weights["gate.weight"] = (rng.standard_normal((n, dim)) / 16).astype(xp.float32)
        dense = expert(n * inside)
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


if __name__ == "__main__":
    demo()
