"""`xp` is NumPy, or CuPy where there is an NVIDIA GPU: the same code runs on both.

Set the environment variable BACKEND to `numpy` or `cupy` to choose by hand.
"""

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np


def _choose():
    name = os.environ.get("BACKEND", "")
    if name not in ("", "numpy", "cupy"):
        raise ValueError(f"BACKEND must be numpy or cupy, not {name!r}")
    if name == "numpy":
        return np
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        return cupy
    except Exception:  # no CuPy, no driver or no device: each has its own exception, and all mean "no GPU"
        if name == "cupy":
            raise
        return np


xp = _choose()


def to_numpy(array):
    """The same array in main memory: itself under NumPy, a copy under CuPy."""
    return array if isinstance(array, np.ndarray) else xp.asnumpy(array)


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


# --- the cores of a CPU ---

_worker = threading.local()
_blas = None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextmanager
def thread_pool(threads):
    """Threads for pieces of work that do not depend on each other; the matrix products inside keep to the thread
    they are in. NumPy releases the interpreter's lock while it computes, and whole pieces on separate cores wait for
    each other far less often than the halves of every single matrix product do.

    Yields a Pool. Ctrl-C does not wait for the pieces that are being computed; any other end does.
    """
    from threadpoolctl import ThreadpoolController

    global _blas
    _blas = _blas or ThreadpoolController()
    begin = lambda: setattr(_worker, "busy", True)
    executor, wait = ThreadPoolExecutor(threads, initializer=begin), True
    with _blas.limit(limits=1, user_api="blas"):
        try:
            yield Pool(executor, threads)
        except KeyboardInterrupt:
            wait = False
            raise
        finally:
            executor.shutdown(wait, cancel_futures=True)


class Pool:
    """The threads of a ThreadPoolExecutor, with a `map` for results as large as a model."""

    def __init__(self, executor, threads):
        self.executor, self.threads = executor, threads

    def map(self, function, *iterables):
        """The built-in `map`, ahead of whoever iterates: results come in order, and at most threads + 1 of them are
        being computed or wait to be taken. Nothing runs before the first is asked for; an exception, or an end of
        the asking, cancels what has not begun.
        """
        ahead = deque()
        try:
            for job in zip(*iterables):
                ahead.append(self.executor.submit(function, *job))
                if len(ahead) > self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def in_parallel(function, pieces):
    """[function(share), ...] for the shares of pieces that each core takes, at once; in a thread of a pool, or on a
    GPU, it is [function(pieces)]. Pieces may grow along the list: of every two rounds, the second is dealt backwards.
    """
    threads = 1 if xp is not np or getattr(_worker, "busy", False) else min(cores(), len(pieces))
    if threads <= 1:
        return [function(pieces)]
    rounds = 2 * threads
    shares = [pieces[i::rounds] + pieces[rounds - 1 - i :: rounds] for i in range(threads)]
    with thread_pool(threads) as pool:
        return list(pool.map(function, shares))
