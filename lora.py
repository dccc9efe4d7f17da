"""Proceso de entrenamiento: fine-tuning by low-rank adapters, LoRA.

What fine-tuning adds to a weight matrix is simple compared with the matrix itself, so it is learned as a product of
two thin ones, of r columns and r rows (Hu et al. 2021, section 4.1):

    W' = W + (α/r) B A        W (out, in) stays as it is;  B (out, r) and A (r, in) are learned

The optimiser then keeps its state for r (in + out) numbers instead of in · out, and the sum W' is a matrix like any
other, so a tuned model is saved and used like the one it came from. Here W' is computed before each forward pass, and
its whole gradient after it: what is saved is the memory of the optimiser's state, not that of gradients.
"""

import numpy as np

from engine import xp

A, B = ".lora_A.weight", ".lora_B.weight"


def init(params, rank, seed=0):
    """Adapters for every matrix of params, the embeddings too, so that new tokens can be learned. A is normal with
    variance 1/in and B is 0, so that training begins at W.

    params: {name.weight: array}. Returns {name.lora_A.weight: (rank, in), name.lora_B.weight: (out, rank)}.
    """
    rng = np.random.default_rng(seed)
    adapters = {}
    for name, w in params.items():
        if w.ndim == 2:
            rows, columns = w.shape
            base = name.removesuffix(".weight")
            adapters[base + A] = xp.asarray((rng.standard_normal((rank, columns)) * columns**-0.5).astype(w.dtype))
            adapters[base + B] = xp.zeros((rows, rank), w.dtype)
    return adapters


def merge(params, alpha=16.0):
    """W + (α/r) B A for every matrix with adapters, and whatever has none as it is. The division by r makes it less
    necessary to tune the learning rate again for another rank (Hu et al. 2021, section 4.1); for large r it is too
    strong, and √r would do (Kalajdzievski 2023).

    params: weights and adapters together, by name. Returns the weights and backward(dweights) -> the gradients of what
    is trained: of the adapters, or of all weights where there are no adapters.
    """
    weights = {name: w for name, w in params.items() if not name.endswith((A, B))}
    adapted = [name.removesuffix(A) for name in params if name.endswith(A)]
    if not adapted:
        return params, lambda dweights: dweights
    scale = {name: alpha / len(params[name + A]) for name in adapted}
    for name in adapted:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale[name] * (params[name + B] @ params[name + A])

    def backward(dweights):
        grads = {}
        for name in adapted:
            dw = scale[name] * dweights[f"{name}.weight"]
            grads[name + A] = params[name + B].T @ dw
            grads[name + B] = dw @ params[name + A].T
        return grads

    return weights, backward
