"""Processes that share work: a map that is the built-in one, and which leaves nobody behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import ROOT

from engine.processes import process_map


def square(x):
    return x * x


def refused(x):
    if x == 2:
        raise ValueError(f"{x} is not good")


def ended(x):
    if x == 2:
        os.kill(os.getpid(), signal.SIGKILL)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(), max_size=9))
def test_processes_map_as_the_built_in_map_does(processes, items):
    assert list(process_map(square, items, processes)) == [*map(square, items)]
    assert not multiprocessing.active_children()


def test_where_processes_begin_anew_they_map_too(monkeypatch):
    monkeypatch.setattr(sys, "platform", "another")
    assert list(process_map(square, [1, 2, 3], 2)) == [1, 4, 9]


@pytest.mark.parametrize("function, what", [(refused, "^2 is not good$"), (ended, "ended from outside")])
@pytest.mark.parametrize("items", [[2, 1], [1, 2], [1, 3, 2]])
def test_what_goes_wrong_in_a_process_goes_wrong_here(function, what, items):
    with pytest.raises(ValueError, match=what):
        list(process_map(function, items, 2))
    assert not multiprocessing.active_children()


def test_all_end_where_the_asking_ends():
    results = process_map(square, range(10**6), 2)
    assert next(results) == 0 and len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a program has to begin with a condition")
def test_a_program_that_is_killed_leaves_no_process_behind():
    """And one that does not stand under `if __name__ == "__main__"` works."""
    program = "import sys, os; from engine.processes import process_map\n"
    program += "for i in process_map(lambda i: os.getpid(), range(10**6), 3):\n    print(i, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    children = {int(process.stdout.readline()) for _ in range(6)}
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(children) == 3
    deadline = time.monotonic() + 20
    while any(map(lives, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
