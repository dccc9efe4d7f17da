"""The threads of a CPU: a map that is the built-in one, ahead by a few results and no more."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.threads import thread_pool


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers()), st.lists(st.integers()))
def test_a_pool_maps_as_the_built_in_map_does(threads, a, b):
    with thread_pool(threads) as pool:
        assert list(pool.map(lambda x, y: (x, y), a, iter(b))) == list(zip(a, b))


@pytest.mark.parametrize("threads", [1, 3])
def test_at_most_one_result_more_than_threads_exists_before_it_is_taken(threads):
    lock, existing, most = threading.Lock(), 0, 0

    def change(by):
        nonlocal existing, most
        with lock:
            existing += by
            most = max(most, existing)

    with thread_pool(threads) as pool:
        for _ in pool.map(lambda _: change(1), range(30)):
            change(-1)
            time.sleep(0.005)  # slower than the threads
    assert existing == 0 and most <= threads + 1


def test_nothing_begins_before_it_is_asked_for_or_after_the_asking_ends():
    begun = []
    with thread_pool(2) as pool:
        pool.map(begun.append, range(100))
        results = pool.map(begun.append, range(100))
        assert not begun
        next(results)
        results.close()
    assert len(begun) <= 3


def test_an_exception_comes_in_its_turn_and_ends_the_rest():
    begun, taken = [], []

    def reciprocal(x):
        begun.append(x)
        return 1 / x

    with pytest.raises(ZeroDivisionError), thread_pool(2) as pool:
        taken.extend(pool.map(reciprocal, [1, 2, 0, *range(1, 100)]))
    assert taken == [1, 0.5] and len(begun) <= 6


def test_an_interrupt_does_not_wait_for_what_is_being_computed():
    release, ended = threading.Event(), threading.Event()

    def wait():
        release.wait(60)
        ended.set()

    try:
        with pytest.raises(KeyboardInterrupt), thread_pool(1) as pool:
            pool.submit(wait)
            raise KeyboardInterrupt
        assert not ended.is_set()
    finally:
        release.set()
    with pytest.raises(ValueError), thread_pool(1) as pool:  # anything else does
        done = pool.submit(time.sleep, 0.1)
        raise ValueError
    assert done.done()
