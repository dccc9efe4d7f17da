"""Ranks: shares add up to the whole, however many they are, in threads that stand for processes, and with MPI."""

import json
import operator
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gradcheck import close
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import ROOT, SMALL, finished, wait_for_step

import finetune
import model
from engine import ranks, to_numpy, xp
from engine.threads import thread_pool
from lab import pretrain

# --- threads for ranks ---


class Threads:
    """What ranks use of MPI's communicator, between threads; everything is pickled on its way, as between processes."""

    def __init__(self, size):
        self.size, self.own, self.meeting = size, threading.local(), threading.Barrier(size, timeout=60)
        self.brought = [None] * size

    rank = property(lambda self: self.own.rank)
    Test = lambda self: True  # as a request, it is done

    def allgather(self, value):
        self.brought[self.rank] = pickle.dumps(value)
        self.meeting.wait()
        found = [pickle.loads(some) for some in self.brought]
        self.meeting.wait()
        return found

    def bcast(self, value):
        first = self.allgather(value)[0]
        return first if self.rank else value

    def gather(self, value):
        found = self.allgather(value)
        return None if self.rank else found

    def Ibarrier(self):
        self.meeting.wait()
        return self

    def Iallreduce(self, mine, summed):
        summed[...] = sum(self.allgather(mine))
        return self

    def Iallgatherv(self, mine, whole):
        array, sizes = whole
        brought = self.allgather(mine)
        assert [len(some) for some in brought] == sizes
        array[...] = np.concatenate(brought)
        return self


def everywhere(size, function):
    """[function(rank) on each of so many ranks]; an error of one ends all."""
    world = Threads(size)

    def one(rank):
        world.own.rank = rank
        try:
            return function(rank)
        except BaseException:
            world.meeting.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, thread_pool(1), ThreadPoolExecutor(size) as pool:
        patch.setattr(ranks, "world", world)
        others = [pool.submit(one, rank) for rank in range(1, size)]
        first = one(0)  # in the main thread, the only one that may ask for signals
        return [first, *(other.result() for other in others)]


def led(size, main):
    """main() on rank 0 of so many, which the others follow."""

    def lead():
        try:
            return main()
        finally:
            ranks.tell()

    return everywhere(size, lambda rank: ranks.follow() if rank else lead())[0]


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_every_row_is_in_one_piece_of_one_rank(rows, size, count):
    shares = []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "world", type("World", (), {"size": count, "rank": rank}))
            pieces = ranks.pieces(rows, size)
        assert all(0 < piece.stop - piece.start <= size for piece in pieces)
        shares.append([row for piece in pieces for row in range(rows)[piece]])
    assert sum(shares, []) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


SHAPES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2).map(tuple), max_size=6)


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 4), st.sampled_from([np.float32, np.float64]))
def test_what_ranks_add_up_and_hand_round(shapes, count, dtype):
    made = lambda rank: {
        f"w{i}": xp.full(shape, rank + 10 * i, dtype if i else np.float32) for i, shape in enumerate(shapes)
    }

    def meet(rank):
        arrays, own = made(rank), ranks.own(made(rank))
        sums = ranks.total(made(rank)) if shapes else {}
        if shapes:
            ranks.exchange(arrays)
        return own, sums, arrays, ranks.combined([rank], operator.add)

    found = everywhere(count, meet)
    owner = {name: rank for rank, (own, *_) in enumerate(found) for name in own}
    assert sorted(sum((own for own, *_ in found), [])) == sorted(made(0))
    assert [values for *_, values in found] == [list(range(count)), *([rank] for rank in range(1, count))]
    for _, sums, arrays, _ in found:
        for i, (name, array) in enumerate(made(0).items()):
            assert arrays[name].dtype == array.dtype and sums[name].dtype == array.dtype
            assert (to_numpy(arrays[name]) == owner[name] + 10 * i).all()
            assert (to_numpy(sums[name]) == sum(rank + 10 * i for rank in range(count))).all()


def test_cores_are_shared_where_ranks_may_use_the_same(monkeypatch):
    usable = {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}, 2: {4}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable[ranks.rank()], raising=False)
    assert everywhere(3, lambda rank: ranks.own_cores()) == ([2, 2, 1] if xp is np else [1, 1, 1])


TINY = {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 1, "context": 16, "vocab": 270, "batch": 5, "threads": 1}


def held_out(folder):
    """The lines of metrics.jsonl, without what depends on the time and on where a run was interrupted."""
    steady = lambda line: {name: value for name, value in line.items() if name[:3] in ("ste", "val", "tes")}
    return [steady(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_run(one, other):
    assert len(held_out(one)) == len(held_out(other)) > 0
    for line, like in zip(held_out(one), held_out(other)):
        assert line == pytest.approx(like, abs=1e-4)


@pytest.mark.parametrize("count, arch, optimizer", [(2, "qwen3", "adamw"), (3, "kimi-k2", "muon")])
def test_any_number_of_ranks_gives_the_losses_of_one(count, arch, optimizer, text, tmp_path):
    """Also where the batch is not a multiple of it."""
    new = TINY | {"data": [str(text)], "steps": 12, "arch": arch, "optimizer": optimizer, "mtp": 0.3}
    new |= {"qk_clip": 0.01} if arch == "kimi-k2" else {}
    for size in 1, count:
        led(size, lambda: pretrain.pretrain(new | {"out": str(tmp_path / str(size))}))
    same_run(tmp_path / "1", tmp_path / str(count))
    one, several = (model.load(tmp_path / str(size))[0] for size in (1, count))
    for name in one:
        close(several[name], one[name], 1e-3)


def test_a_run_goes_on_with_another_number_of_ranks(text, tmp_path):
    for name, sizes in ("alone", (1, 1, 1)), ("together", (3, 2, 1)):
        given = TINY | {"data": [str(text)], "out": str(tmp_path / name)}
        for size, steps in zip(sizes, (5, 10, 15)):
            led(size, lambda: pretrain.pretrain(given | {"steps": steps}))
            given = {"resume": str(tmp_path / name), "threads": 1}
    same_run(tmp_path / "alone", tmp_path / "together")


@pytest.mark.parametrize("lora", [None, 2])
def test_fine_tuning_on_three_ranks_is_that_on_one(lora, base, tmp_path):
    words = "the cat sat on a mat".split()
    turn = lambda role, content: {"role": role, "content": content}
    talks = [{"messages": [turn("user", f"{a}?"), turn("assistant", b)]} for a in words for b in words]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    tune = {"data": [str(tmp_path / "chats.jsonl")], "init": str(base), "steps": 5, "context": 32, "batch": 4}
    for size in 1, 3:  # of which one has no row to validate on
        led(size, lambda: finetune.finetune(tune | {"lora": lora, "out": str(tmp_path / str(size))}))
    same_run(tmp_path / "1", tmp_path / "3")


def test_fewer_rows_than_ranks_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="--batch 5 is too small for 6 processes"):
        led(6, lambda: pretrain.pretrain(TINY | {"data": [str(text)], "steps": 1, "out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size, rank", list(ranks.LAUNCHERS.items()))
def test_without_mpi_the_first_of_several_processes_says_so(size, rank, monkeypatch):
    for name in {*ranks.LAUNCHERS, *ranks.LAUNCHERS.values()}:
        monkeypatch.delenv(name, raising=False)
    assert ranks.lead(lambda: "alone") == "alone"
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv(size, "2")
    monkeypatch.setenv(rank, "1")
    assert ranks.lead(pytest.fail) is None
    monkeypatch.setenv(rank, "0")
    with pytest.raises(ValueError, match="pip install mpi4py"):
        ranks.lead(pytest.fail)


# --- MPI's processes ---

MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")


def together(count, *arguments, script="train.py"):
    """So many processes of a script, started by mpiexec."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    if not MPIEXEC:
        pytest.skip("there is no mpiexec")
    asroot = {f"{name}_ALLOW_RUN_AS_ROOT{also}": "1" for name in ("OMPI", "PRTE") for also in ("", "_CONFIRM")}
    crowd = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    environment = {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"} | asroot | crowd
    program = [MPIEXEC, "-n", str(count), sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, env=environment, **pipes)


def test_processes_end_where_one_is_killed_and_others_go_on(run, text, tmp_path):
    folder = tmp_path / "run"
    process = together(3, "--data", text, "--steps", 60, "--save-seconds", 0, "--out", folder, *SMALL)
    wait_for_step(process, folder, 10)
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
    words = [line.split() for line in listed.splitlines() if f" --out {folder}" in line]
    pids = [int(pid) for pid, program, *_ in words if program == sys.executable]
    assert len(pids) == 3
    os.kill(pids[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode
    process = together(2, "--resume", folder)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    same_run(folder, run[0])


def test_an_interrupt_of_several_processes_saves_and_says_how_to_go_on(run, text, tmp_path):
    folder = tmp_path / "run"
    process = together(2, "--data", text, "--steps", 60, "--save-seconds", 1000, "--out", folder, *SMALL)
    wait_for_step(process, folder, 10)
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=True).stdout
    stop = signal.SIGUSR1 if "Open MPI" in version else signal.SIGTERM  # after which Open MPI kills in no time
    process.send_signal(stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + stop and out.count(f"--resume {folder}") == 1, err
    assert "Traceback" not in err
    code, _, err = finished("--resume", folder)
    assert code == 0, err
    same_run(folder, run[0])


def test_several_processes_say_once_what_is_wrong_or_asked_for():
    for arguments, code, what in (["--frobnicate"], 1, "--frobnicate"), (["--help"], 0, "usage: "):
        process = together(2, *arguments, script="finetune.py")
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and (out + err).count(what) == 1


@pytest.mark.parametrize("who, what", [(0, "error: this"), (1, "error: rank 1: this")])
def test_an_error_of_one_process_is_one_sentence_and_ends_all(who, what, tmp_path):
    (tmp_path / "fails.py").write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from engine import cli, ranks\n"
        "class Fails:\n"
        "    def __init__(self, parallel_map): pass\n"
        "    def work(self):\n"
        f"        if ranks.rank() == {who}: raise ValueError('this is wrong')\n"
        "        ranks.arrive()\n"
        "def main():\n"
        "    with ranks.everywhere(Fails, 1) as them: them.work()\n"
        "cli.run(lambda: ranks.lead(main))\n"
    )
    process = together(2, script=tmp_path / "fails.py")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count(what) == 1 and "Traceback" not in err
