"""lab/reasoning.py: what is tested on is new and the same for all, and a run of seconds writes what it promises."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import cot
import model
from lab import reasoning

ROOT = str(Path(__file__).parents[2])


def essence(task, question):
    """What a question asks to compute, from its text alone, without names and the order of summands or of who swaps."""
    if task == "addition":
        return tuple(sorted(question[:-1].split("+")))
    if task == "permutations":
        row, *moves = question[:-1].split(" ")
        return row, *("".join(sorted(move)) for move in moves)
    return tuple(re.findall(r"has (\d+)|(finds \d+|loses \d+|doubles|halves)", question))


@pytest.mark.parametrize("task", cot.TASKS)
@pytest.mark.parametrize("harder", [0, 1])
def test_no_computation_is_for_training_and_for_tests(task, harder):
    difficulty = cot.TASKS[task][1][harder]
    exam = reasoning.exam(task, difficulty, 40)
    rng = np.random.default_rng(0)
    trained = {essence(task, cot.practice(task, difficulty, rng).question) for _ in range(3000)}
    asked = {essence(task, problem.question) for problem in exam}
    assert len(asked) == len(exam) >= (40 if harder else 2)
    assert not trained & asked
    assert reasoning.exam(task, difficulty, 40) == exam  # the same for every model
    if harder:
        draws = [cot.TASKS[task][0](difficulty, np.random.default_rng(seed)) for seed in range(3000)]
        share = np.mean(list(map(cot.held_out, draws)))
        assert 0.05 < share < 0.15


def test_chance_is_the_likeliest_answer_by_enumeration():
    ends = Counter()
    for moves in itertools.product(itertools.combinations(range(5), 2), repeat=4):
        row = list(range(5))
        for i, j in moves:
            row[i], row[j] = row[j], row[i]
        ends[tuple(row)] += 1
    assert reasoning.chance("permutations", 4) == pytest.approx(max(ends.values()) / 10**4)
    assert reasoning.chance("permutations", 1) == pytest.approx(1 / 10)
    # an even number of swaps reaches half of the 120 rows
    assert reasoning.chance("permutations", 60) == pytest.approx(1 / 60)
    sums = Counter(a + b for a in range(10, 100) for b in range(10, 100))
    assert reasoning.chance("addition", 2) == pytest.approx(max(sums.values()) / 90**2)

    def ends_of(total, length):
        if length == 0:
            return Counter({total: 1.0})
        moves, ends = cot.changes(total), Counter()
        for _, after in moves:
            for end, probability in ends_of(after, length - 1).items():
                ends[end] += probability / len(moves)
        return ends

    likeliest = [max(ends_of(start, 3).values()) for start in range(1, 11)]
    assert reasoning.chance("stories", 3) == pytest.approx(np.mean(likeliest))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cot")
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "cot.py"), "--minutes", "0.05", "--out", str(folder / "out")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_an_experiment_of_seconds_writes_what_it_promises(outcome):
    folder, printed = outcome
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert list(summary["tasks"]) == ["addition", "permutations", "stories"]
    for task, table in summary["tasks"].items():
        assert table["difficulty"] == cot.TASKS[task][1] and task in printed
        assert table["chance"] == [reasoning.chance(task, difficulty) for difficulty in table["difficulty"]]
        assert all(tokens > 0 for tokens in table["tokens_cot"] + table["tokens_direct"])
        for way in "direct", "cot", "sampled", "self_consistency", "best_of_n":
            assert len(table[way]) == len(table[f"{way}_95"]) == len(table["difficulty"])
            assert all(low <= value <= high for value, (low, high) in zip(table[way], table[f"{way}_95"]))
    for name in "before", "after":
        low, high = summary["grpo"][f"{name}_95"]
        assert 0 <= low <= summary["grpo"][name] <= high <= 1
    assert (folder / "figures" / "cot.png").stat().st_size > 10_000


def test_the_models_of_an_experiment_can_be_asked(outcome):
    folder, _ = outcome
    for name in ["grpo", *(f"{task}-{way}" for task in cot.TASKS for way in ("direct", "cot"))]:
        params, config = model.load(folder / "out" / name)
        assert config.eos_token_id == cot.END and sum(w.size for w in params.values()) > 1000
    command = [sys.executable, os.path.join(ROOT, "model.py"), "--load", str(folder / "out" / "addition-cot")]
    done = subprocess.run([*command, "--prompt", "27+58?"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("27+58?")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--load", "somewhere"], "--load and --question go together"),
        (["--question", "Why?"], "--load and --question go together"),
        (["--load", "nowhere", "--question", "Why?"], "nowhere"),
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--minutes", "nan"], "--minutes must be more than 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)) as error:
        reasoning.main(arguments)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_chat_is_not_asked(outcome):
    with pytest.raises(ValueError, match="chat"):
        reasoning.main(["--load", str(outcome[0] / "out" / "grpo"), "--question", "Why?"])


def test_ctrl_c_is_heard_in_the_middle_of_a_phase(tmp_path):
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # even if the tests themselves do not
    arguments = [os.path.join(ROOT, "cot.py"), "--minutes", "30", "--out", str(tmp_path / "out")]  # phases of minutes
    process = subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=hear)
    try:
        while not (tmp_path / "out").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)  # both threads are training by now
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and err == b""
