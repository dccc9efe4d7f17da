"""The cores of a CPU: threads that share pieces of work, and the matrix products inside them kept to one thread."""

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

from engine.backend import np, xp

_worker = threading.local()
_blas = cache(ThreadpoolController)  # made once, as it looks through all libraries


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextmanager
def thread_pool(threads):
    """Threads for pieces of work that do not depend on each other; the matrix products inside keep to the thread
    they are in. NumPy releases the interpreter's lock while it computes, and whole pieces on separate cores wait for
    each other far less often than the halves of every single matrix product do.

    Yields a Pool. Ctrl-C does not wait for the pieces that are being computed; any other end does.
    """
    pool, wait = Pool(threads), True
    with _blas().limit(limits=1, user_api="blas"):
        try:
            yield pool
        except KeyboardInterrupt:
            wait = False
            raise
        finally:
            pool.shutdown(wait, cancel_futures=True)


class Pool(ThreadPoolExecutor):
    """Threads with a `map` for results as large as a model."""

    def __init__(self, threads):
        super().__init__(threads, initializer=lambda: setattr(_worker, "busy", True))
        self.threads = threads

    def map(self, function, *iterables):
        """The built-in `map`, ahead of whoever iterates: results come in order, and at most threads + 1 of them are
        being computed or wait to be taken. Nothing runs before the first is asked for; an exception, or an end of
        the asking, cancels what has not begun.
        """
        ahead = deque()
        try:
            for job in zip(*iterables):
                ahead.append(self.submit(function, *job))
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
