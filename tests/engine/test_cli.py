"""Command lines: one sentence for what the user can mend, and quiet ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*arguments, stdout=subprocess.PIPE, **environment):
    """A process that hears Ctrl-C and whose output waits in its buffer, whatever the tests themselves run under."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environment
    pipes = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, preexec_fn=hear, **pipes)


@pytest.mark.parametrize("demo", ["bpe", "posenc", "attention", "moe", "chat", "evals"])
def test_a_demo_takes_no_arguments(demo):
    process = command(f"{demo}.py", "nofile.txt")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not out
    assert err.startswith(b"error: ") and b"nofile.txt" in err and err.count(b"\n") == 1


BUSY = r"""
import os
import time
from engine.threads import thread_pool
from engine.cli import run_demo

def demo():
    with thread_pool(2) as pool:
        print("in the buffer")
        os.write(1, b"begun\n")
        list(pool.map(time.sleep, [60, 60]))

run_demo(demo)
"""


def test_ctrl_c_ends_at_once_and_quietly():
    process = command("-c", BUSY)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"in the buffer\n", b"")


@pytest.mark.parametrize("options", [[], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(options):
    gone, output = os.pipe()
    os.close(gone)
    process = command("model.py", *options, stdout=output)
    os.close(output)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE and err == b""


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_what_a_terminal_cannot_show_is_replaced(environment):
    show = r"from engine.cli import run; run(lambda: print('10\u2079'))"
    process = command("-c", show, PYTHONCOERCECLOCALE="0", **environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split(), err) == (0, [b"10?"], b"")


def test_what_a_terminal_sends_and_is_no_utf_8_is_replaced():
    echo = command("-c", "from engine.cli import run; run(lambda: print(input()))", PYTHONIOENCODING="utf-8")
    out, err = echo.communicate(b"a\xff\n", timeout=60)
    assert (echo.returncode, out.decode().split(), err) == (0, ["a\ufffd"], b"")
