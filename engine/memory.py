"""The memory of this machine: how much there is, and how fast it is read."""

import os
import time
from itertools import cycle

from engine.backend import np, to_numpy, xp


def installed():
    """Its bytes; a guess where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33


def bandwidth(shapes, size=2**28, times=5):
    """Bytes a second that are read when vectors are multiplied by matrices, the fastest of so many times. That is what
    generating a token does: it reads each weight once, and hardly computes.

    shapes: (out, in) of the matrices, which follow each other until they have `size` bytes.
    """
    products, total, seconds = [], 0, []
    for rows, columns in cycle(shapes):
        matrix = xp.ones((min(rows, columns), max(rows, columns)), np.float32)  # the longer side contiguous
        vector = xp.ones(columns, np.float32)
        products.append((vector, matrix) if rows >= columns else (matrix, vector))
        total += matrix.nbytes
        if total >= size:
            break
    for _ in range(times):
        began = time.perf_counter()
        for left, right in products:
            last = left @ right
        to_numpy(last)
        seconds.append(time.perf_counter() - began)
    return total / min(seconds)
