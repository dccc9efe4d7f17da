"""`xp` is NumPy, or CuPy where there is an NVIDIA GPU: the same code runs on both.

Set the environment variable BACKEND to `numpy` or `cupy` to choose by hand; `cupy` says why there is none.
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
    except Exception:  # no CuPy, no driver, no device, or a CuPy for another CUDA: each has its own exception
        if _name == "cupy":
            raise


# Decorates a formula of operations on single elements, with at most one sum over an axis at its end. On a GPU it is one
# kernel instead of one for each operation. It is called with positional arguments.
fused = (lambda function: function) if xp is np else xp.fuse

# How much is computed at once: on a CPU what stays in the cache, on a GPU what keeps it busy.
LOGITS_AT_ONCE = 2**22 if xp is np else 2**27
TOKENS_AT_ONCE = 1024 if xp is np else 2**16  # of a batch in training
MICRO_BATCHES = 4 if xp is np else 1  # of a batch, at least, for threads to share


def to_numpy(array):
    """The same array in main memory: itself under NumPy, a copy under CuPy."""
    return array if isinstance(array, np.ndarray) else xp.asnumpy(array)


def rows_of(arrays, rows):
    """Those rows of NumPy arrays, where the model computes; for an array that is None, None."""
    return [None if array is None else xp.asarray(array[rows]) for array in arrays]


@fused
def _row_dots(x, y):
    return xp.sum(x * y, axis=-1)


@fused
def _column_dots(x, y):
    return xp.sum(x * y, axis=0)


def row_dots(x, y):
    """The dot products of the rows, the last axis, of x and y: (..., dim) twice -> (...)."""
    return np.einsum("...i,...i->...", x, y) if xp is np else _row_dots(x, y)


def column_dots(x, y):
    """The sum of x ⊙ y over all rows: (..., dim) twice -> (dim,)."""
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return np.einsum("ni,ni->i", x, y) if xp is np else _column_dots(x, y)


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
        # add.at alone sums in an order, and thus with a rounding, that changes from call to call. At the start of each
        # pass rows[i] is the sum of itself and those before it in its run, `reach` of them at most; adding
        # rows[i - reach], if it is of the same run, doubles that. At last each run's last row has it all, and is added.
        reach = 1
        while reach < len(index):
            same = index[reach:] == index[:-reach]
            rows[reach:] += xp.where(same[:, None], rows[:-reach], 0)
            reach *= 2
        last = xp.append(index[1:] != index[:-1], xp.ones(1, bool))
        xp.add.at(target, index, xp.where(last[:, None], rows, 0))
