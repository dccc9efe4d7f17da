"""Transformers actuales: the layers every block is made of.

Each function returns its value and its own backward pass: `y, backward = f(x, weight)`, then
`dx, dweight = backward(dy)`. A backward pass multiplies by the transposed Jacobian of the forward pass;
the algebra stands right under each formula. ⊙ is the product element by element.

Shapes: `...` any leading axes, usually (batch, time); linear weights are (out, in). `hidden` is the width of the
model, `intermediate` that inside a feed-forward layer.
"""

from engine import column_dots, fused, np, row_dots, scatter_add, xp
from engine.backend import LOGITS_AT_ONCE

IGNORE = -100  # a target that takes no part in the loss: padding, a prompt, a token that was not masked


def linear(x, weight, bias=None):
    """y = x Wᵀ + b.

    x: (..., in); weight: (out, in); bias: (out,) or None. Returns y (..., out) and
    backward(dy) -> (dx, dweight), and dbias third where there is a bias.
    """
    rows = x.reshape(-1, x.shape[-1])  # one large product instead of one a sequence
    y = rows @ weight.T
    if bias is not None:
        y += bias

    def backward(dy):
        dy = dy.reshape(-1, weight.shape[0])
        dx = (dy @ weight).reshape(x.shape)
        dweight = dy.T @ rows
        return (dx, dweight) if bias is None else (dx, dweight, dy.sum(axis=0))

    return y.reshape(*x.shape[:-1], weight.shape[0]), backward


def project(x, weights, name):
    """`linear` with weights by their published names: weights[name.weight], and weights[name.bias] where there is one.

    Returns y and backward(dy) -> (dx, {name.weight: gradient, ...}).
    """
    names = [f"{name}.weight", f"{name}.bias"]
    y, linear_backward = linear(x, weights[names[0]], weights.get(names[1]))

    def backward(dy):
        dx, *dweights = linear_backward(dy)
        return dx, dict(zip(names, dweights, strict=False))

    return y, backward


def embedding(tokens, weight):
    """Row `token` of the table for each token: a linear layer on one-hot vectors, without the zeros.

    tokens: (...) integers; weight: (vocab, dim). Returns y (..., dim) and backward(dy) -> dweight.
    """

    def backward(dy):
        dweight = xp.zeros_like(weight)
        scatter_add(dweight, tokens.ravel(), dy.reshape(-1, weight.shape[1]))
        return dweight

    return weight[tokens], backward


def rms_norm(x, weight, eps=1e-6):
    """Root-mean-square normalisation, y = w ⊙ x / √(mean(x²) + eps) (Zhang & Sennrich 2019).

    x: (..., dim); weight: (dim,). Returns y, shaped like x, and backward(dy) -> (dx, dweight).
    """
    dim = x.shape[-1]
    scale = (row_dots(x, x)[..., None] / dim + eps) ** -0.5  # 1 / √(mean(x²) + eps)
    normed = x * scale
    y = normed * weight

    def backward(dy):
        dnormed = dy * weight
        # ∂s/∂x_j = -s³ x_j / dim for s = scale, so ∂normed_i/∂x_j = s (δ_ij - normed_i normed_j / dim)
        dnormed -= normed * (row_dots(dnormed, normed)[..., None] / dim)
        dx = xp.multiply(dnormed, scale, out=dnormed)
        return dx, column_dots(dy, normed)

    return y, backward


def layer_norm(x, weight, bias, eps=1e-5):
    """Layer normalisation, y = w ⊙ (x - mean) / √(var + eps) + b (Ba et al. 2016): RMSNorm of what is
    left of x after its mean.

    x: (..., dim); weight, bias: (dim,). Returns y and backward(dy) -> (dx, dweight, dbias).
    """
    y, norm_backward = rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)

    def backward(dy):
        dcentred, dweight = norm_backward(dy)
        dx = dcentred - dcentred.mean(axis=-1, keepdims=True)
        return dx, dweight, dy.reshape(-1, x.shape[-1]).sum(axis=0)

    return y + bias, backward


@fused
def logistic(x):
    """σ(x) = 1 / (1 + exp(-x)), as (1 + tanh(x/2)) / 2, which cannot overflow; in float32 right to about 1e-7."""
    y = xp.tanh(x * 0.5)
    y += 1
    y *= 0.5
    return y


def sigmoid(x):
    """Returns σ(x) and backward(dy) -> dx, both shaped like x."""
    y = logistic(x)

    def backward(dy):
        return dy * y * (1 - y)

    return y, backward


def silu(x):
    """silu(x) = x σ(x), also called swish (Hendrycks & Gimpel 2016; Ramachandran et al. 2017).

    Returns y and backward(dy) -> dx, both shaped like x.
    """
    s = logistic(x)
    y = x * s

    def backward(dy):
        return silu_gradient(dy, s, y)

    return y, backward


@fused
def silu_gradient(dy, s, y):
    """dy · silu'(x), where silu' = σ + xσ(1 - σ) = σ + y - yσ."""
    dx = s + y
    dx -= y * s
    dx *= dy
    return dx


def swiglu(x, weights):
    """The gated feed-forward layer, W_down (silu(W_gate x) ⊙ W_up x) (Shazeer 2020).

    x: (..., hidden); weights: {gate,up}_proj.weight (intermediate, hidden) and down_proj.weight (hidden,
    intermediate), with .bias where the model has them. Returns y, shaped like x, and backward(dy) -> (dx, dweights).
    """
    gate, gate_backward = project(x, weights, "gate_proj")
    active, active_backward = silu(gate)
    up, up_backward = project(x, weights, "up_proj")
    y, down_backward = project(active * up, weights, "down_proj")

    def backward(dy):
        dproduct, ddown = down_backward(dy)
        dx, dup = up_backward(dproduct * active)
        dproduct *= up
        dx_gate, dgate = gate_backward(active_backward(dproduct))
        dx += dx_gate
        return dx, dgate | dup | ddown

    return y, backward


def keep_all(x):
    """No dropout: x, and backward(dy) -> dy."""
    return x, lambda dy: dy


def dropout(x, rate, rngs):
    """Dropout (Srivastava et al. 2014): each number becomes 0 with probability `rate`, and 1 / (1 - rate) times itself
    otherwise, so that its mean stays. It keeps a model from learning by heart a text that it reads many times.

    x: (batch, ...). rngs: a numpy Generator for each row, so that what a row loses does not depend on those beside it.
    Returns y and backward(dy) -> dx, both shaped like x.
    """
    kept = xp.asarray(np.stack([rng.random(x.shape[1:], np.float32) for rng in rngs]) >= rate).astype(x.dtype)
    kept /= 1 - rate
    return x * kept, lambda dy: dy * kept


def softmax(x):
    """p_i = exp(x_i) / Σ_j exp(x_j) over the last axis; a row of -inf alone, with nothing to choose, gives zeros.

    Returns p, shaped like x, and backward(dp) -> dx.
    """
    largest = x.max(axis=-1, keepdims=True)
    p = xp.exp(x - xp.where(largest == -xp.inf, 0, largest))
    total = p.sum(axis=-1, keepdims=True)
    p /= xp.where(total == 0, 1, total)

    def backward(dp):
        # ∂p_i/∂x_j = p_i (δ_ij - p_j)
        return p * (dp - (dp * p).sum(axis=-1, keepdims=True))

    return p, backward


def cross_entropy(logits, targets):
    """Mean over the tokens of -log softmax(logits)[target], in nats. The textbook version.

    logits: (..., vocab); targets: (...) integers, IGNORE (-100) where a token does not count.
    Returns the loss, a float, and backward(dloss=1) -> dlogits. Without any target the loss is 0.
    """
    counted = targets != IGNORE
    count = max(1, int(counted.sum()))
    target = xp.where(counted, targets, 0)[..., None]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    loss = -float((xp.take_along_axis(log_p, target, axis=-1)[..., 0] * counted).sum()) / count

    def backward(dloss=1.0):
        # ∂(-log p_t)/∂logits = p - onehot(t)
        onehot = xp.arange(logits.shape[-1]) == target
        return (xp.exp(log_p) - onehot) * (counted * (dloss / count))[..., None].astype(logits.dtype)

    return loss, backward


def linear_log_likelihood(x, weight, targets, chunk=None):
    """The language-model head and the log-likelihood of the targets in one: log p_t = z_t - log Σ_i exp(z_i) of the
    logits z = x Wᵀ.

    With a vocabulary of 128,000 the logits are by far the largest array of a training step, so they exist for `chunk`
    tokens at a time only, and their memory grows neither with the batch nor with the context. The backward pass
    computes a chunk's softmax again, except the last one's, which is kept: where all tokens fit into one chunk, nothing
    is done twice.

    x: (..., dim); weight: (vocab, dim); targets: (...) integers or IGNORE, whose log-likelihood is given as 0.
    Returns log_p (...), in nats, and backward(dlog_p) -> (dx, dweight).
    """
    vocab, dim = weight.shape
    chunk = chunk or max(128, LOGITS_AT_ONCE // vocab)  # on a CPU 16 MiB of float32; more beyond 32,768 tokens
    counted = xp.flatnonzero(targets.ravel() != IGNORE)
    rows, wanted = x.reshape(-1, dim)[counted], targets.ravel()[counted]
    parts = [slice(start, start + chunk) for start in range(0, len(rows), chunk)]

    def softmax_of(part):
        logits = rows[part] @ weight.T
        logits -= logits.max(axis=1, keepdims=True)
        p = xp.exp(logits)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        return p, (xp.take_along_axis(logits, wanted[part, None], axis=1) - xp.log(total))[:, 0]

    log_p, kept = xp.zeros(targets.shape, x.dtype), None
    for part in parts:
        kept, log_p.ravel()[counted[part]] = softmax_of(part)

    def backward(dlog_p):
        drows, dweight = xp.empty_like(rows), xp.zeros_like(weight)
        dlog_p = dlog_p.ravel()[counted]
        for part in parts:
            dlogits = -kept if part is parts[-1] else -softmax_of(part)[0]
            dlogits[xp.arange(len(dlogits)), wanted[part]] += 1  # d log p_t / dlogits = onehot(t) - p
            dlogits *= dlog_p[part, None]
            drows[part] = dlogits @ weight
            dweight += dlogits.T @ rows[part]
        dx = xp.zeros(x.shape, x.dtype)
        dx.reshape(-1, dim)[counted] = drows
        return dx, dweight

    return log_p, backward


def linear_cross_entropy(x, weight, targets, count=None, chunk=None):
    """cross_entropy(linear(x, weight), targets) without holding the logits: minus the mean log-likelihood.

    count: divide by this many targets, instead of those in `targets`, where these rows are a part of a batch. Further
    arguments as of linear_log_likelihood.
    Returns the loss in nats, a float, and backward(dloss=1) -> (dx, dweight).
    """
    log_p, log_p_backward = linear_log_likelihood(x, weight, targets, chunk)
    count = count or max(1, int((targets != IGNORE).sum()))

    def backward(dloss=1.0):
        return log_p_backward(xp.full(targets.shape, -dloss / count, x.dtype))

    return -float(log_p.sum()) / count, backward
