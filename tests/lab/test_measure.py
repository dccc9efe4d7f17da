"""Costs: the least time of several, and the most memory at a time."""

import time

from engine import np
from lab import measure


def test_seconds_are_the_least_of_so_many_times():
    waits, called = iter([0.05, 0.01, 0.03, 0.0]), []
    least = measure.seconds(lambda label: called.append(label) or time.sleep(next(waits)), "x", times=3)
    assert called == ["x"] * 3 and 0.01 <= least < 0.03


def test_peak_bytes_are_what_is_held_at_a_time():
    held = np.ones(2**20)  # before
    one_by_one = measure.peak_bytes(lambda n: [float(np.ones(n).sum()) for _ in range(3)], 2**20)
    together = measure.peak_bytes(lambda n: [np.ones(n) for _ in range(3)], 2**20)
    assert held.nbytes <= one_by_one < 1.2 * held.nbytes < 2.9 * held.nbytes < together < 3.2 * held.nbytes


def test_both_passes_give_the_backward_what_the_forward_gave():
    given = []
    measure.both_passes(lambda a, b: (a + b, given.append), 1, 2)
    assert given == [3]
