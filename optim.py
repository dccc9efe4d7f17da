"""Proceso de entrenamiento: the optimisers, from a gradient to new weights.

AdamW divides each weight's gradient by its usual size, so that every weight moves at the learning rate:

    m = β₁m + (1-β₁)g,  v = β₂v + (1-β₂)g²,  w = w - lr (m̂ / (√v̂ + ε) + λw)    (Loshchilov & Hutter 2019)

at step t with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ), as both began at 0. Muon takes a matrix as a whole (Jordan et al.
2024). Of the accumulated gradient's singular value decomposition USVᵀ it keeps the directions, U and V, and makes every
singular value 1, so that no direction is left behind:

    m = μm + g,  USVᵀ = g + μm,  w = w - lr (0.2 √max(rows, cols) · UVᵀ + λw)
"""

import math

from engine import fused, xp


def adamw(w, g, state, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2, whose λ is lr · weight_decay here), in place.

    w, g: the weight and its gradient, of one shape. state: {"m", "v"}, filled at the first step.
    step: counts from 1. lr: the learning rate. weight_decay: w shrinks by lr · weight_decay each step.
    """
    if not state:
        state["m"], state["v"] = xp.zeros_like(w), xp.zeros_like(w)
    rate_m, rate_v = 1 - betas[0], 1 - betas[1]
    correction_m, correction_v = 1 - betas[0] ** step, 1 - betas[1] ** step
    kept = 1 - lr * weight_decay
    adamw_arithmetic(w, g, state["m"], state["v"], rate_m, rate_v, lr / correction_m, correction_v, eps, kept)


@fused
def adamw_arithmetic(w, g, m, v, rate_m, rate_v, corrected_lr, correction_v, eps, kept):
    """The formula above, in a function of its own so that it is one kernel on a GPU."""
    m += rate_m * (g - m)
    v += rate_v * (g * g - v)
    size = xp.sqrt(v / correction_v)
    size += eps
    w *= kept
    w -= corrected_lr * m / size


def orthogonalise(g, steps=5):
    """U Vᵀ of the singular value decomposition g = U S Vᵀ, roughly, by matrix products alone.

    Newton-Schulz: each step puts the singular values s ≤ 1 through 3.4445 s - 4.7750 s³ + 2.0315 s⁵. That
    multiplies small ones by 3.4, so after five steps those that were above 0.002 of the Frobenius norm are near 1,
    between 0.68 and 1.21; a polynomial that met 1 exactly would take many more (Jordan et al. 2024).

    g: (rows, cols). Returns a matrix of that shape.
    """
    if g.shape[0] > g.shape[1]:
        return orthogonalise(g.T, steps).T  # the smaller of g gᵀ and gᵀ g
    x = g / (xp.linalg.norm(g) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x


def muon(w, g, state, lr, momentum=0.95, weight_decay=0.1):
    """One step of Muon with Nesterov momentum, in place (Jordan et al. 2024).

    The entries of UVᵀ have a root mean square of 1 / √max(rows, cols); times 0.2 √max(rows, cols) it is 0.2, about that
    of AdamW's update, so that both share a learning rate and a weight decay (Liu et al. 2025a, equation 4).

    w, g: (rows, cols). state: {"m"}, filled at the first step.
    """
    if not state:
        state["m"] = xp.zeros_like(w)
    m = state["m"]
    m *= momentum
    m += g
    w *= 1 - lr * weight_decay
    w -= (lr * 0.2 * math.sqrt(max(w.shape))) * orthogonalise(g + momentum * m)


def qk_clip(weights, max_logits, threshold=100.0):
    """QK-clip (Kimi K2, Kimi Team 2025, algorithm 1), in place: queries and keys of head h shrink by
    γ = min(1, threshold / max_logits[h]), so that the same tokens would reach just the threshold.

    A softmax over logits in the hundreds has no gradient left, and Muon, whose steps do not shrink with the gradient,
    would let them grow on. In latent attention q^C and k^C take √γ each, q^R takes γ, and k^R, which all heads share,
    is left alone; in grouped-query attention, whose keys are shared, too, the queries take γ. Not for models with
    QK-norm, which would undo it.

    weights: of one layer's attention, by name, as of attention.self_attention or latent_attention. max_logits:
    (heads,), the largest score of each head in the last batch, as flash_attention observes it.
    """
    heads = len(max_logits)
    shrink = threshold / xp.maximum(max_logits, threshold)

    def scale(name, *parts):
        """Multiplies the rows of a projection: parts are pairs (factor of each head, rows of a head)."""
        rows = xp.concatenate([xp.repeat(factor[:, None], n, axis=1) for factor, n in parts], axis=1).ravel()
        for full in f"{name}.weight", f"{name}.bias", f"{name}.lora_B.weight":
            if full in weights:
                columns = weights[full].T  # a view, (in, out) or (out,)
                columns *= rows.astype(columns.dtype)

    query = "q_b_proj" if "q_b_proj.weight" in weights else "q_proj"
    q_rows = weights[f"{query}.weight"].shape[0] // heads
    if "kv_b_proj.weight" in weights:
        v_rows = weights["o_proj.weight"].shape[1] // heads
        nope = weights["kv_b_proj.weight"].shape[0] // heads - v_rows  # rows of a key that RoPE does not turn
        scale(query, (xp.sqrt(shrink), nope), (shrink, q_rows - nope))
        scale("kv_b_proj", (xp.sqrt(shrink), nope), (xp.ones(heads), v_rows))
    else:
        scale(query, (shrink, q_rows))


class Optimizer:
    """AdamW for every weight, or Muon for the matrices inside the layers and AdamW for the rest:
    embeddings and head, which have a row for each token, and norms.

    kind: "adamw" or "muon". state: {weight's name: {array's name: array}} and steps: what a checkpoint
    has to keep.
    """

    def __init__(self, kind, lr, weight_decay=0.1):
        if kind not in ("adamw", "muon"):
            raise ValueError(f"the optimiser must be adamw or muon, not {kind!r}")
        self.kind, self.lr, self.weight_decay = kind, lr, weight_decay
        self.steps = 0
        self.state = {}

    def step(self, params, grads, schedule=1.0, parallel_map=map):
        """Changes in place the params that have a gradient. schedule: a factor of the learning rate. parallel_map: a
        map, such as a pool's, that updates weights in parallel.
        """
        self.steps += 1
        lr = self.lr * schedule

        def update(name):
            w, g, state = params[name], grads[name], self.state.setdefault(name, {})
            if self.kind == "muon" and w.ndim == 2 and ".layers." in name:
                muon(w, g, state, lr, weight_decay=self.weight_decay)
            else:
                # what has one dimension is a norm or a bias, which must not shrink to 0
                adamw(w, g, state, self.steps, lr, weight_decay=self.weight_decay if w.ndim > 1 else 0.0)

        for _ in parallel_map(update, grads):
            pass


def clip(grads, largest=1.0):
    """Gradient clipping by global norm, in place, to at most `largest`. Returns the norm before."""
    norm = math.sqrt(float(sum(xp.vdot(g, g) for g in grads.values())))  # one copy from a GPU, not one a weight
    if norm > largest:
        for g in grads.values():
            g *= largest / norm
    return norm


def descend(gradient, parts, params, optimizer, schedule=1.0, parallel_map=map):
    """One step of the optimiser: sums the dicts gradient(part) of all parts of a batch (gradient accumulation), clips
    the norm of the sum to 1, and steps. Where the loss is a mean, a part's is its sum over the whole batch's count.
    """
    parts = iter(parallel_map(gradient, parts))  # one at a time, as each is as large as the model
    grads = next(parts)
    for further in parts:
        for name, g in further.items():
            grads[name] += g
    clip(grads)
    optimizer.step(params, grads, schedule, parallel_map)


def warm_up_and_decay(progress, warm_up=0.05, decay=0.6):
    """The learning rate's factor at `progress` (0 to 1): up, level, and in a line down to 0 over the last `decay`, a
    fraction of the training (warm-up, stable, decay, after Hu et al. 2024, whose decay is shorter and exponential).
    """
    return max(0.0, min(1.0, progress / warm_up, (1 - progress) / decay))


def cosine(progress, warm_up=0.05, least=0.1):
    """The other usual schedule: up, and along half a cosine down to `least` of the learning rate (Loshchilov & Hutter
    2017, equation 5, without restarts).
    """
    after = min(1.0, max(0.0, (progress - warm_up) / (1 - warm_up)))
    return min(progress / warm_up, least + (1 - least) * (1 + math.cos(math.pi * after)) / 2)
