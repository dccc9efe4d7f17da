"""`xp` is NumPy, or CuPy where there is an NVIDIA GPU: the same code runs on both.

Set the environment variable BACKEND to `numpy` or `cupy` to choose by hand.
"""

import os

import numpy as np

xp, _name = np, os.environ.get("BACKEND", "")
if _name not in ("", "numpy", "cupy"):
    raise ValueError(f"BACKEND must be numpy or cupy, not {_name!r}")
if _name != "numpy":
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        xp = cupy
    except Exception:  # no CuPy, no driver or no device: each has its own exception, and all mean "no GPU"
        if _name == "cupy":
            raise


# Decorates a function that computes element by element, of arrays and numbers given by their places: on a GPU it is one
# kernel instead of one for each of its operations.
fused = (lambda function: function) if xp is np else xp.fuse

# How much is computed at once: logits; tokens of a batch; and the pieces of a batch, at least, for threads to share. On
# a CPU as much as stays in the cache, on a GPU as much as keeps it busy.
LOGITS, TOKENS, PIECES = (2**22, 1024, 4) if xp is np else (2**27, 2**16, 1)


def to_numpy(array):
    """The same array in main memory: itself under NumPy, a copy under CuPy."""
    return array if isinstance(array, np.ndarray) else xp.asnumpy(array)


def rows_of(arrays, rows):
    """Those rows of NumPy arrays, where the model computes; for an array that is None, None."""
    return [None if array is None else xp.asarray(array[rows]) for array in arrays]


@fused
def _sum_of_products(x, y):
    return xp.sum(x * y, axis=-1)


@fused
def _sums_of_columns(x, y):
    return xp.sum(x * y, axis=0)


def row_products(x, y):
    """Σ_i x_i y_i over the last axis, (..., dim) twice -> (...)."""
    return np.einsum("...i,...i->...", x, y) if xp is np else _sum_of_products(x, y)


def column_products(x, y):
    """The same over all other axes, (..., dim) twice -> (dim,)."""
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return np.einsum("ni,ni->i", x, y) if xp is np else _sums_of_columns(x, y)


def scatter_add(target, index, rows):
    """target[index[i]] += rows[i] for every i, where an index may come more than once.

    target: (size, dim), changed in place; index: (n,) integers; rows: (n, dim).
    """
    if not len(index):
        return
    order = xp.argsort(index, kind="stable")  # brings equal indices together, in runs
    index, rows = index[order], rows[order]
    if xp is np:
        start = np.flatnonzero(np.r_[True, index[1:] != index[:-1]])  # of each run; np.add.at would go row by row
        target[index[start]] += np.add.reduceat(rows, start, axis=0)
    else:
        # add.at alone sums in an order, and thus with a rounding, that changes from call to call. Here each row becomes
        # the sum of the last `reach` rows of its run, then of twice as many, until it has all; add.at adds the last row
        # of each run, and zeros.
        reach = 1
        while reach < len(index):
            same = index[reach:] == index[:-reach]
            rows[reach:] += xp.where(same[:, None], rows[:-reach], 0)
            reach *= 2
        last = xp.append(index[1:] != index[:-1], xp.ones(1, bool))
        xp.add.at(target, index, xp.where(last[:, None], rows, 0))
