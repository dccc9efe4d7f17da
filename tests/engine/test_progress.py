"""Progress by steps or by the clock: fractions that grow, and a bar for people only."""

import time

from engine.progress import clock, counted


def test_a_progress_bar_is_drawn_on_a_terminal_only(capsys):
    assert list(clock("learning", 0.3))[0] == 0
    assert capsys.readouterr() == ("", "")


def test_it_ends_when_the_time_is_over_and_the_least_steps_are_made():
    began = time.perf_counter()
    done = list(clock(None, 0.05))
    assert time.perf_counter() - began >= 0.05 and done == sorted(done) and 0 <= done[0] and done[-1] < 1
    assert list(clock(None, 1e-9, steps=4)) == [0, 0.25, 0.5, 0.75]


def test_the_time_runs_from_when_it_was_asked_for():
    progress = clock(None, 0.05, steps=1)
    time.sleep(0.06)
    assert len(list(progress)) == 1  # the least


def test_steps_are_counted(capsys):
    assert list(counted("learning", 4)) == list(counted(None, 4)) == [0, 0.25, 0.5, 0.75]
    assert list(counted(None, 0)) == [] and capsys.readouterr() == ("", "")
