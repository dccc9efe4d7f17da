"""Transformers actuales: Mixture of Experts (MoE).

The feed-forward layer becomes many small ones, the experts, and for each token a router (gating network) decides
which k of them compute it and how much each counts:

    s = softmax(W x)                                      a score per expert (in DeepSeek V3, a sigmoid)
    T = the k experts of largest s + b                    b: a bias for the choice only, or 0
    g_i = scale · s_i / Σ_{j in T} s_j                    the gate, how much expert i counts
    y = Σ_{i in T} g_i expert_i(x) + shared(x)            Shazeer et al. 2017; shared experts: Dai et al. 2024

A model of a hundred experts has the memory of a large model and the cost of a small one. The price is that the
router must not send every token to the same few experts, while the others learn nothing. Two remedies are here: an
auxiliary loss, which lowers the scores of experts with much to do (Switch, Fedus et al. 2022; GShard, Lepikhin et
al. 2021), and the bias b, which rises for experts with little to do (DeepSeek V3). No expert is ever full and no
token is dropped, unlike in Switch and GShard, whose experts have a capacity.

The sum is computed expert by expert and not token by token: the tokens are sorted by expert, and each expert is one
matrix product over all of its tokens. So Python's work is per expert, however many tokens there are.

Shapes: x (tokens, dim); scores (tokens, experts); chosen, the indices of each token's experts, and gates (tokens, k).
"""

from engine import to_numpy, xp
from engine.weights import flatten, nest
from layers import linear, sigmoid, softmax, swiglu


def every_expert(x, gates, experts):
    """y = Σ_i g_i expert_i(x), the textbook version: every expert computes every token, most of them for nothing.

    gates: (tokens, experts), 0 where an expert does not count. experts: a list of weights of layers.swiglu.
    Returns y, shaped like x, and backward(dy) -> (dx, dgates, dexperts).
    """
    outputs, backwards = zip(*(swiglu(x, weights) for weights in experts), strict=True)
    y = sum(gates[:, i, None] * output for i, output in enumerate(outputs))

    def backward(dy):
        dgates = xp.stack([(dy * output).sum(axis=1) for output in outputs], axis=1)
        dxs, dexperts = zip(*(b(gates[:, i, None] * dy) for i, b in enumerate(backwards)), strict=True)
        return sum(dxs), dgates, list(dexperts)

    return y, backward


def chosen_experts(x, chosen, gates, experts):
    """The sum of `every_expert` over the chosen experts only.

    chosen, gates: (tokens, k); the index len(experts) stands for none, for padding. experts: as of `every_expert`.
    Returns y, shaped like x, and backward(dy) -> (dx, dgates, dexperts).
    """
    tokens, k = chosen.shape
    # entry j of the flat `chosen` belongs to token j // k; sorted by expert, each expert's tokens are neighbours
    order = xp.argsort(chosen.ravel(), kind="stable")
    rows = x[order // k]  # (tokens · k, dim)
    ends = to_numpy(xp.cumsum(loads(chosen, len(experts)))).tolist()
    # experts without tokens are skipped: when text is generated token by token, nearly all have none
    parts = {i: slice(start, end) for i, (start, end) in enumerate(zip([0] + ends, ends)) if start < end}

    sorted_outputs, backwards = xp.zeros_like(rows), {}
    for i, part in parts.items():
        sorted_outputs[part], backwards[i] = swiglu(rows[part], experts[i])
    outputs = xp.empty_like(rows)
    outputs[order] = sorted_outputs
    outputs = outputs.reshape(tokens, k, -1)
    y = xp.einsum("tk,tkd->td", gates, outputs)

    def backward(dy):
        dgates = xp.einsum("td,tkd->tk", dy, outputs)
        doutputs = (gates[:, :, None] * dy[:, None, :]).reshape(tokens * k, -1)[order]
        dexperts = [{name: xp.zeros_like(w) for name, w in weights.items()} for weights in experts]
        dsorted, drows = xp.zeros_like(rows), xp.empty_like(rows)
        for i, part in parts.items():
            dsorted[part], dexperts[i] = backwards[i](doutputs[part])
        drows[order] = dsorted
        return drows.reshape(tokens, k, -1).sum(axis=1), dgates, dexperts

    return y, backward


def loads(chosen, experts):
    """How many tokens each expert was sent, (experts,)."""
    return xp.bincount(chosen.ravel(), minlength=experts + 1)[:experts]


def choose(scores, k, n_group=1, topk_group=1):
    """The k largest scores of each row: their indices, (tokens, k).

    Node-limited routing (DeepSeek V3, DeepSeek-AI 2024b, section 2.1.2): the experts are in n_group groups of at
    least two, and a token keeps to the topk_group groups whose two best scores have the largest sum (in the paper the
    k / topk_group best, which is two in V3). With one group per machine, a token travels to few machines.
    """
    if n_group > 1:
        grouped = scores.reshape(len(scores), n_group, -1)
        best_two = -xp.partition(-grouped, 1, axis=2)[..., :2].sum(axis=2)  # (tokens, groups)
        kept = choose(best_two, topk_group)
        mask = (kept[:, :, None] == xp.arange(n_group)).any(axis=1)  # (tokens, groups)
        scores = xp.where(mask[:, :, None], grouped, -xp.inf).reshape(scores.shape)
    return xp.argpartition(-scores, k - 1, axis=1)[:, :k]


def divided_by_sum(a):
    """y = a / Σa over the last axis. Returns y and backward(dy) -> da."""
    total = a.sum(axis=-1, keepdims=True) + 1e-20
    y = a / total
    return y, lambda dy: (dy - (dy * y).sum(axis=-1, keepdims=True)) / total


def route(x, weight, k, bias=None, n_group=1, topk_group=1, normalise=True, scale=1.0):
    """The router: to which k experts a token goes, and how much each of them counts.

    As in the published models, a router without a bias has scores of a softmax (Qwen3), and one with a bias those of
    sigmoids (DeepSeek V3, equations 12 to 16); the bias takes part in the choice alone, so that it has no gradient. A
    normalised gate is always 1 where k = 1 and teaches the router nothing, which is why Switch, with k = 1, does not
    normalise.

    weight: (experts, dim). bias: (experts,) or None. n_group, topk_group: as in `choose`. normalise: the k scores
    are divided by their sum. scale: multiplies the gates.
    Returns (chosen, gates, p), where p (tokens, experts) are all scores divided by their sum, and
    backward(dgates, dp=None) -> (dx, dweight).
    """
    logits, linear_backward = linear(x, weight)
    scores, scores_backward = (softmax if bias is None else sigmoid)(logits)
    p, p_backward = divided_by_sum(scores)
    chosen = choose(scores if bias is None else scores + bias, k, n_group, topk_group)
    row = xp.arange(len(chosen))[:, None]
    gates, gates_backward = divided_by_sum(scores[row, chosen]) if normalise else (scores[row, chosen], lambda dy: dy)

    def backward(dgates, dp=None):
        dscores = xp.zeros_like(scores) if dp is None else p_backward(dp)
        dscores[row, chosen] += gates_backward(dgates * scale)
        return linear_backward(scores_backward(dscores))

    return (chosen, gates * scale, p), backward


def load_balancing_loss(p, chosen, real=None):
    """The auxiliary loss experts · Σ_i f_i P_i, of each sequence, averaged over the sequences (Fedus et al. 2022,
    equations 4 to 6; by sequence: DeepSeek-AI 2024b, equations 17 to 20).

    f_i, the share of the choices that fell on expert i, has no gradient; P_i, the mean of p_i, has. So the loss
    pushes down the scores of each expert in proportion to its load. It is 1 where either is even. By sequence, and
    not by batch as in Switch, the loss of a batch is the mean over its parts, however it is cut into micro-batches.
    DeepSeek's f_i counts the k largest scores (equation 18); this one counts the choice itself, bias and all.

    p: (batch, time, experts); chosen: (batch, time, k). real: (batch, time) booleans, False for padding, which does not
    count, or None. Returns the loss, a float, and backward(dloss=1) -> dp.
    """
    batch, time, experts = p.shape
    real = xp.ones((batch, time), bool) if real is None else real
    share = (real / xp.maximum(real.sum(axis=1, keepdims=True), 1)).astype(p.dtype)  # of each token in its sequence
    bins = chosen + experts * xp.arange(batch)[:, None, None]  # one for each expert of each sequence
    weights = xp.broadcast_to(share[:, :, None] / chosen.shape[2], chosen.shape)
    f = xp.bincount(bins.ravel(), weights.ravel(), batch * experts).reshape(batch, experts).astype(p.dtype)
    loss = float((f * (share[:, :, None] * p).sum(axis=1)).sum()) * experts / batch

    def backward(dloss=1.0):
        return share[:, :, None] * f[:, None] * (dloss * experts / batch)

    return loss, backward


def adjust_bias(bias, load, update_speed=0.001):
    """Load balance without a loss, in place: b_i += update_speed · sign(mean load - load_i) (Wang et al. 2024;
    DeepSeek-AI 2024b, section 2.1.2).

    bias, load: (experts,), the load being the number of tokens that each expert was sent.
    """
    bias += update_speed * xp.sign(load.mean() - load).astype(bias.dtype)


def mixture_of_experts(x, weights, k, real=None, observe=None, balance=0.0, **routing):
    """The layer: route, sum over the chosen experts, and add the shared ones, which compute every token.

    x: (batch, time, dim). weights, by name: gate.weight (experts, dim); gate.e_score_correction_bias (experts,)
    where the router has one; experts.{i}.{gate,up,down}_proj.weight, and the same of shared_experts where there are
    some, as one SwiGLU. real: (batch, time) booleans, False for padding, which is sent to no expert, or None.
    observe: a dict, or None, in which "load" is set to the number of tokens that each expert was sent, (experts,), and
    "balance" to the load-balancing loss. balance: the weight of that loss. It is no part of y, so its gradient joins
    that of y on the way back. routing: n_group, topk_group, normalise and scale of `route`.
    Returns y, like x, and backward(dy) -> (dx, dweights).
    """
    shape, parts = x.shape, nest(weights)
    by_index = nest(parts["experts"])
    experts = [by_index[str(i)] for i in range(len(by_index))]
    gate, shared = parts["gate"], parts.get("shared_experts")
    x = x.reshape(-1, shape[-1])
    (chosen, gates, p), route_backward = route(x, gate["weight"], k, gate.get("e_score_correction_bias"), **routing)
    if balance or observe is not None:
        by_sequence = lambda a: a.reshape(*shape[:2], -1)
        balance_loss, balance_backward = load_balancing_loss(by_sequence(p), by_sequence(chosen), real)
    if real is not None:
        chosen = xp.where(real.reshape(-1, 1), chosen, len(experts))
    y, experts_backward = chosen_experts(x, chosen, gates, experts)
    if shared:
        shared_y, shared_backward = swiglu(x, shared)
        y += shared_y
    if observe is not None:
        observe |= {"load": loads(chosen, len(experts)), "balance": balance_loss}

    def backward(dy):
        dy = dy.reshape(x.shape)
        dx, dgates, dexperts = experts_backward(dy)
        dx_route, dgate = route_backward(dgates, balance_backward(balance).reshape(p.shape) if balance else None)
        dx += dx_route
        dparts = {"experts": flatten(dict(enumerate(dexperts)))}
        dparts["gate"] = {name: dgate if name == "weight" else xp.zeros_like(w) for name, w in gate.items()}
        if shared:
            dx_shared, dparts["shared_experts"] = shared_backward(dy)
            dx += dx_shared
        return dx.reshape(shape), flatten(dparts)

    return y.reshape(shape), backward
