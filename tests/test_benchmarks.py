"""The benchmarks: each runs at its small size, with or without its peer, and refuses to time a wrong result."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engine import flash_cuda as launch
from engine import xp

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))  # behind the project, which has an attention.py too
import turns  # noqa: E402

PEERS = {"train_step": ["torch"], "decode": ["torch", "transformers"], "attention": ["torch"]}
PEERS |= {"tokenizer": ["tokenizers", "tiktoken"]}
ROWS = {"train_step": [1], "decode": [1], "attention": [6, 3], "tokenizer": [2]}  # of each table


@functools.cache
def script(name):
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKEND", os.environ.get("BACKEND", ""))  # the scripts set it, for processes of their own
        spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    environment = {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def tables(printed):
    """The Markdown tables in what was printed: a list of lists of rows, each a list of cells; the headers first."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in printed.splitlines() if line[:1] == "|"]
    starts = [i - 1 for i, cells in enumerate(rows) if set(cells) == {"---"}]
    return [[rows[a], *rows[a + 2 : b]] for a, b in zip(starts, [*starts[1:], len(rows)])]


@pytest.mark.parametrize("name", PEERS)
def test_every_benchmark_runs_at_its_small_size(name):
    done = run(name, "--quick")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for peer in PEERS[name]:
        there = importlib.util.find_spec(peer) is not None
        assert re.search(rf"\b{peer}\b.* not installed", done.stdout) is None if there else f"{peer}" in done.stdout
    found = tables(done.stdout)
    assert [len(table) - 1 for table in found] == ROWS[name]
    for table in found:
        heads, *rows = table
        assert all(len(cells) == len(heads) for cells in rows)
        numbers = [float(cell.replace(",", "")) for cells in rows for cell in cells[1:] if cell]
        assert numbers and min(numbers) >= 0 and np.isfinite(numbers).all()
    if name in ("train_step", "decode"):
        heads, cells = found[0]
        assert float(cells[heads.index("peak MB of ours")]) > 10


def test_the_gpu_benchmark_says_that_there_is_no_gpu():
    done = run("gpu_attention", "--quick")
    assert done.returncode == 0 and done.stderr == "" and "no GPU" in done.stdout


def test_a_checkpoint_that_is_not_there_is_one_sentence():
    for arguments, what in ((), "--quick"), (("nowhere",), "nowhere"):
        done = run("decode", *arguments)
        assert done.returncode != 0 and what in done.stderr and "Traceback" not in done.stderr


# --- what is wrong is not timed ---


@pytest.mark.skipif(xp is not np, reason="measures a CPU")
def test_attention_that_is_wrong_is_not_timed(monkeypatch, capsys):
    module, right = script("attention"), script("attention").flash_attention
    for part in range(4):  # y, dq, dk, dv
        for wrong in (lambda x: 1.01 * x), (lambda x: x * np.nan):

            def broken(*arrays, part=part, wrong=wrong):
                y, backward = right(*arrays)
                if part == 0:
                    return wrong(y), backward
                return y, lambda dy: [wrong(g) if i == part else g for i, g in enumerate(backward(dy), 1)]

            monkeypatch.setattr(module, "flash_attention", broken)
            monkeypatch.setattr(sys, "argv", ["attention.py", "--quick"])
            with pytest.raises(SystemExit, match="times say nothing"):
                module.main()


def test_merges_and_ids_that_are_wrong_are_not_timed(monkeypatch):
    module = script("tokenizer")
    text = module.standard_library(0.01)
    trained, *_ = module.training(text, 270, "gpt2", 1, peer=False)
    monkeypatch.setattr(module.bpe.Tokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(SystemExit, match="times say nothing"):
        module.encoding(text, trained, "gpt2", 1, peer=False)


def test_the_largest_difference_is_that_of_the_worst_gradient_or_the_loss():
    module, one = script("train_step"), (2.0, {"a": np.array([1.0, -4.0]), "b": np.array([8.0])})
    assert module.largest_difference(one, one) == 0
    others = (2.0, {"a": np.array([2.0, -4.0]), "b": np.array([8.0])}), (1.6, one[1])
    assert [module.largest_difference(one, other) for other in others] == pytest.approx([0.25, 0.25])
    for lost in (np.nan, one[1]), (2.0, one[1] | {"a": np.array([1.0, np.nan])}):
        assert np.isnan(module.largest_difference(lost, one))


def test_tokens_that_are_wrong_are_not_timed(monkeypatch, tmp_path):
    module = script("decode")

    @contextmanager
    def sides(side, names, folder, count):
        yield {name: lambda question: ([1, 2, 3], 1.0) for name in names}

    monkeypatch.setattr(module, "sides", sides)
    monkeypatch.setattr(module, "installed", lambda *names: False)
    module.tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(SystemExit, match="times say nothing"):
        module.compare(tmp_path / "tiny", Namespace(prompt="What", tokens=3, turns=1))


# --- the kernels' benchmark, with the kernels on the CPU ---


@pytest.mark.skipif(xp is not np or not shutil.which("g++"), reason="needs NumPy's arrays and g++")
def test_the_gpu_benchmark_computes_what_it_times(tmp_path, monkeypatch, capsys):
    from test_flash_cuda import launchers_on_the_cpu

    module = script("gpu_attention")
    monkeypatch.setattr(launch, "xp", np)
    monkeypatch.setattr(launch, "launchers", lambda half, dim: launchers_on_the_cpu(half, dim, tmp_path))
    monkeypatch.setattr(module, "HEADS", 2)
    module.check(np.float32, 32)
    for causal in False, True:
        (ours, ours_both), (exact, exact_both) = module.sides(np.float32, 32, 40, causal, 1, peer=False).values()
        for one, other in zip((ours()[0], *ours_both()), (exact()[0], *exact_both()), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    module.compare(np.float32, 32, True, 40, Namespace(tokens=80, turns=2), False, lambda f: f() and 2e-5)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert [(cells[4], cells[7], cells[8]) for cells in rows] == [
        ("forward", "textbook", "1.00"),
        ("forward + backward", "textbook", "1.00"),
    ]
    # 2 rows, 2 heads, half of 40 × 40 pairs, two products of 32, two operations each, in 20 ns
    assert float(rows[0][6]) == round(2 * 2 * 40 * 40 / 2 * 2 * 32 * 2 / 2e-8 / 1e12, 1)

    for wrong in [1e-3, 0, 0, 0], [0, 0, np.nan, 0]:
        monkeypatch.setattr(module, "largest_errors", lambda dtype, dim: wrong)
        with pytest.raises(SystemExit, match="times say nothing"):
            module.check(np.float32, 32)


# --- what they share ---


@contextmanager
def a_side(name):
    def answer(megabytes):
        return float(np.ones(megabytes * 2**17).sum()) / 2**17

    yield answer


def test_the_memory_of_a_side_is_its_own():
    held = np.ones(300 * 2**17)  # by this process, when the sides begin
    with turns.sides(a_side, ["one", "other"]) as ask:
        before = ask["one"](turns.PEAK_MEMORY)
        assert ask["one"](200) == 200
        assert 200 < ask["one"](turns.PEAK_MEMORY) and ask["one"](turns.PEAK_MEMORY) - before > 150
        assert 5 < ask["other"](turns.PEAK_MEMORY) < 300
    assert held.nbytes > 2**28


def test_a_side_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="other"):
        with turns.sides(a_side, ["one", "other"]) as ask:
            assert ask["one"](1) == 1
            ask["other"]("no number")


def test_sides_take_turns():
    order = []
    given = turns.alternate({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert "".join(order) == "abbaab" and given == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert turns.times_as_fast([1, 2, 4], [2, 2, 2]) == 1
