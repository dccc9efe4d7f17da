"""Command lines: one sentence for what the user can mend, and quiet ends."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine import cli

ROOT = Path(__file__).parents[2]
hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*arguments, stdout=subprocess.PIPE, **environment):
    """A process that hears Ctrl-C and whose output waits in its buffer, whatever the tests themselves run under."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environment
    pipes = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, preexec_fn=hear, **pipes)


def test_a_slide_that_there_is_not_is_one_sentence():
    process = command("lecture.py", "nofile.txt")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not out
    assert err.startswith(b"error: ") and b"nofile.txt" in err and err.count(b"\n") == 1


# --- options from a dataclass ---


@dataclass(frozen=True)
class Options:
    word: str = cli.option("a", "one of three", choices=["a", "b", "c"])
    size_of_it: int | None = cli.option(None, "how many", least=2, most=9)
    rate: float = cli.option(0.5, "how fast", above=0)
    files: list | None = cli.option(None, "texts", nargs="+", metavar="FILE", convert=sorted)
    loud: bool = cli.option(False, "say it")


def test_a_dataclass_is_a_command_line(capsys):
    assert cli.given([], "", Options) == {} and cli.settings(Options, [], "") == Options()
    words = "--word b --size-of-it 3 --rate 2 --files y x --loud".split()
    given = {"word": "b", "size_of_it": 3, "rate": 2.0, "files": ["x", "y"], "loud": True}
    assert cli.given(words, "", Options) == given and cli.settings(Options, words, "") == Options(**given)
    with pytest.raises(SystemExit):
        cli.given(["--help"], "What it does.", Options)
    said = " ".join(capsys.readouterr().out.split())
    assert "What it does." in said and "--rate N how fast (default 0.5)" in said and "--loud say it" in said
    assert "--word {a,b,c} one of three (default a)" in said and "--size-of-it N how many --rate" in said
    assert "--files FILE [FILE ...]" in said


def test_an_option_may_stand_without_its_name():
    @dataclass(frozen=True)
    class Named:
        folder: str | None = cli.option(None, "where", metavar="DIR", positional=True)
        loud: bool = cli.option(False, "say it")

    assert cli.given(["--loud", "here"], "", Named) == {"folder": "here", "loud": True}
    for words, what in ([], "DIR"), (["a", "b"], "b"):
        with pytest.raises(ValueError, match=what):
            cli.given(words, "", Named)


def test_the_options_of_two_dataclasses_stand_beside_each_other():
    @dataclass
    class More:
        more: int | None = cli.option(None, "another", nargs="?", const=7)

    assert cli.given(["--more", "--word", "c"], "", Options, More) == {"more": 7, "word": "c"}


@pytest.mark.parametrize(
    "words, what",
    [
        ("--word d", "--word: invalid choice: 'd'"),
        ("--size-of-it 1", "--size-of-it must be at least 2"),
        ("--size-of-it 10", "--size-of-it must be at most 9"),
        ("--size-of-it x", "--size-of-it: invalid int value: 'x'"),
        ("--rate 0", "--rate must be more than 0"),
        ("--rate nan", "--rate must be more than 0"),
        ("--rate inf", "--rate must be finite"),
        ("--none", "--none"),
        ("word", "word"),
    ],
)
def test_what_is_out_of_its_range_is_one_sentence(words, what):
    with pytest.raises(ValueError, match=f"^[^\n]*{what}[^\n]*$"):
        cli.settings(Options, words.split(), "")


WRONG = {"word": [None, "d", 1, [], {}], "size_of_it": [1, 2.0, "3", True, [3]], "files": ["x", [1], [None], {}]}
WRONG |= {"rate": [None, True, "1", [], float("inf"), -1], "loud": [None, 0, "yes"]}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_no_command_line_could_give_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} (cannot|must) be .{{1,60}}$"):
        cli.check(replace(Options(), **{name: value}))


def test_every_value_that_an_option_may_have_is_let_through():
    for given in {"size_of_it": None}, {"size_of_it": 2}, {"size_of_it": 9}, {"rate": 1}, {"files": []}, {"loud": True}:
        cli.check(replace(Options(), **given))


# --- how a command line ends ---

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
