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

import masks
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


@pytest.mark.parametrize("name", ["attention", "train_step"])
def test_the_gpu_benchmark_says_that_there_is_no_gpu(name):
    done = run(name, "--gpu", "--quick")
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
    def sides(side, names, folder, count, batch):
        yield {name: lambda question: ([1, 2, 3], 1.0) for name in names}

    monkeypatch.setattr(module, "sides", sides)
    monkeypatch.setattr(module, "installed", lambda *names: False)
    module.tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(SystemExit, match="times say nothing"):
        module.measure(tmp_path / "tiny", Namespace(prompt="What", tokens=3, batch=1, context=[0], turns=1))


# --- the kernels' benchmark, with the kernels on the CPU ---


@pytest.mark.skipif(xp is not np or not shutil.which("g++"), reason="needs NumPy's arrays and g++")
def test_the_gpu_benchmark_computes_what_it_times(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent / "engine")
    from test_flash_cuda import launchers_on_the_cpu

    module, kernels = script("attention"), launch.flash_attention
    monkeypatch.setattr(launch, "launchers", lambda half, dim: launchers_on_the_cpu(half, dim, tmp_path))
    monkeypatch.setattr(module, "HEADS", 2)
    module.check(np.float32, 32)
    q, k, v, dy = module.random(np.float32, *[(1, 2, 40, 32)] * 4)
    for causal in False, True:
        flash = functools.partial(kernels, mask=masks.causal if causal else None)
        named = module.sides(flash, q, k, v, dy, causal, textbook=True)
        ours, exact = (module.passes(attend, dy) for attend in named.values())
        for one, other in zip(ours, exact, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    module.case(np.float32, 32, True, 40, Namespace(tokens=80, turns=2), False, lambda f: f() and 2e-5)
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
        peak = lambda name: ask[name](turns.PEAK_MEMORY)[0]
        before = peak("one")
        answer, seconds = ask["one"](200)
        assert answer == 200 and 0 < seconds < 60
        assert 200 < peak("one") and peak("one") - before > 150
        assert 5 < peak("other") < 300
    assert held.nbytes > 2**28


def test_a_side_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="other"):
        with turns.sides(a_side, ["one", "other"]) as ask:
            assert ask["one"](1)[0] == 1
            ask["other"]("no number")


def test_sides_take_turns():
    order = []
    times, ratios = turns.compare({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert "".join(order) == "abbaab" and times == {"a": 4, "b": 3} and ratios == {"b": 6 / 5}
    taken = {"ours": iter([1, 2, 4]), "other": iter([2, 2, 2]), "third": iter([3, 3, 3])}
    times, ratios = turns.compare({name: lambda side=side: next(side) for name, side in taken.items()}, 3)
    assert times == {"ours": 2, "other": 2, "third": 3} and ratios == {"other": 1, "third": 1.5}


def test_a_row_has_speeds_ratios_and_memory():
    times, ratios = {"ours": 0.5, "one": 1.0, "two": 20.0}, {"one": 2.0, "two": 39.987}
    ask = dict(zip(times, (lambda question, peak=peak: (peak, 0.1) for peak in (1e4, 20.4, 30.6))))
    heads, cells = turns.speeds(1000, times, ratios, ask)
    assert heads == (
        *("ours, tokens/s", "one", "times as fast", "two", "times as fast"),
        *("peak MB of ours", "peak MB of one", "peak MB of two"),
    )
    assert cells == (*("2,000", "1,000", "2.00", "50.0", "39.99"), *("10,000", "20", "31"))


def test_options_have_the_type_of_their_defaults_and_become_small(monkeypatch):
    defaults, quick = {"sizes": [1, 2], "share": 0.5, "some_name": "x", "more": False}, {"sizes": [0], "share": 0.1}

    def parsed(*words):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        found = vars(turns.options("What.", defaults, quick, files="*"))
        return {name: found[name] for name in [*defaults, "files"]}

    assert parsed() == defaults | {"files": []}
    assert parsed("--quick") == defaults | quick | {"files": []}
    given = parsed("a", "b", "--sizes", "7", "8", "--share", "2", "--some-name", "y", "--more", "--quick")
    assert given == {"sizes": [7, 8], "share": 2.0, "some_name": "y", "more": True, "files": ["a", "b"]}
