"""What a function costs: seconds, and bytes."""

import time
import tracemalloc


def both_passes(function, *arguments):
    """A forward and a backward pass."""
    y, backward = function(*arguments)
    backward(y)


def seconds(function, *arguments, times=1):
    """The least of so many times."""
    least = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        function(*arguments)
        least = min(least, time.perf_counter() - began)
    return least


def peak_bytes(function, *arguments):
    """The most that Python and NumPy hold at a time while it runs, beyond what there was before."""
    tracemalloc.start()
    function(*arguments)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most
