"""The memory of this machine: how much there is, and how fast it is read."""

import os
import time

from engine.backend import np, to_numpy, xp


def installed():
    """Its bytes; a guess where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33


def bandwidth(size=2**28, times=5):
    """Bytes a second that a product of a matrix of so many bytes and a vector reads, the fastest of so many times. That
    is what generating a token does: it reads each weight once, and hardly computes.
    """
    rows = int((size / 4) ** 0.5)
    matrix, vector, seconds = xp.ones((rows, rows), np.float32), xp.ones(rows, np.float32), []
    for _ in range(times):
        began = time.perf_counter()
        to_numpy(matrix @ vector)
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)
