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


def to_numpy(array):
    """The same array in main memory: itself under NumPy, a copy under CuPy."""
    return array if isinstance(array, np.ndarray) else xp.asnumpy(array)


def rows_of(arrays, rows):
    """Those rows of NumPy arrays, where the model computes; for an array that is None, None."""
    return [None if array is None else xp.asarray(array[rows]) for array in arrays]


def scatter_add(target, index, rows):
    """target[index[i]] += rows[i] for every i, where an index may come more than once.

    target: (size, dim), changed in place; index: (n,) integers; rows: (n, dim).
    """
    if xp is not np:
        xp.add.at(target, index, rows)
    elif len(index):
        # np.add.at goes row by row; sorting brings equal indices together, and reduceat sums each run at once
        order = np.argsort(index, kind="stable")
        index = index[order]
        start = np.flatnonzero(np.r_[True, index[1:] != index[:-1]])
        target[index[start]] += np.add.reduceat(rows[order], start, axis=0)
