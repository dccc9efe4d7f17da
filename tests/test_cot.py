"""cot.py: problems are right and apart, answers are judged exactly, and a run of seconds writes what it promises."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cot
import model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = [(task, difficulty) for task, (_, difficulties) in cot.TASKS.items() for difficulty in difficulties]
seeds = st.integers(0, 2**32)


def problem_of(task, difficulty, seed):
    return cot.TASKS[task][0](difficulty, np.random.default_rng(seed))


def solved(task, question):
    """The steps' results and the answer, from the text of the question alone and in another way than cot.py's."""
    if task == "addition":
        a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)\?", question).groups())
        return [(a % 10**i + b % 10**i) for i in range(1, len(str(a)) + 1)], str(a + b)
    if task == "permutations":
        row, *moves = question[:-1].split(" ")
        seats, states = list(row), []
        for number, (label, x, y) in enumerate(moves):
            assert label == chr(ord("a") + number)
            i, j = seats.index(x), seats.index(y)
            seats[i], seats[j] = seats[j], seats[i]
            states.append("".join(seats))
        return states, states[-1]
    total, states = int(re.search(r"has (\d+) ", question)[1]), []
    for verb, k in re.findall(r" (finds|loses|doubles|halves) ?(\d*)\.", question):
        total = {"finds": total + int(k or 0), "loses": total - int(k or 0), "doubles": 2 * total, "halves": total / 2}[
            verb
        ]
        assert total == int(total) and 0 <= total <= 20
        states.append(int(total))
    return states, str(states[-1])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TASKS), seeds)
def test_the_steps_of_a_problem_are_right_and_lead_to_its_answer(kind, seed):
    (task, difficulty), problem = kind, problem_of(*kind, seed)
    states, answer = solved(task, problem.question)
    assert problem.answer == answer and len(problem.steps) == len(states) == difficulty
    before = 0
    for step, state in zip(problem.steps, states):
        if task == "permutations":
            said, row = step.split(" ")
            assert row == state and f" {said}" in problem.question
        elif task == "stories":
            left, right = step.split(" ", 1)[1].split("=")
            assert eval(left) == int(right) == state
        else:
            x, y, carry, written = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d+)", step).groups())
            digits = len(step.split("=")[1])
            assert (
                written == state
                and carry == before // 10 ** (digits - 2)
                and x + y + carry == state // 10 ** (digits - 2)
            )
            before = state
    assert len(cot.prompt(problem)) + len(cot.written(problem, "cot")) + 6 <= cot.CONFIG.max_position_embeddings


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
    exam = cot.exam(task, difficulty, 40)
    rng = np.random.default_rng(0)
    trained = {essence(task, cot.practice(task, difficulty, rng).question) for _ in range(3000)}
    asked = {essence(task, problem.question) for problem in exam}
    assert len(asked) == len(exam) >= (40 if harder else 2)
    assert not trained & asked
    assert cot.exam(task, difficulty, 40) == exam  # the same for every model
    if harder:
        share = np.mean([cot.held_out(problem_of(task, difficulty, seed)) for seed in range(3000)])
        assert 0.05 < share < 0.15


def test_what_is_held_out_does_not_depend_on_the_process():
    code = "import cot; print([cot.held_out(cot.Problem('', [], str(i))) for i in range(40)])"
    run = lambda salt: (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    expected = [cot.held_out(cot.Problem("", [], str(i))) for i in range(40)]
    assert run("1") == run("2") == f"{expected}\n" and len(set(expected)) == 2


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TASKS), seeds, st.sampled_from(["direct", "cot"]), st.data())
def test_an_answer_in_the_format_is_right_and_a_changed_one_is_not(kind, seed, way, data):
    problem = problem_of(*kind, seed)
    ids = cot.TOKENIZER.encode(cot.written(problem, way)) + [cot.END]
    assert cot.answer_in(ids) == problem.answer
    assert cot.right([problem], [cot.answer_in(ids)]) == [True]
    assert len(ids) == len(f"\n#{problem.answer}") + 1 + (way == "cot") * sum(len(step) + 1 for step in problem.steps)
    answer = len(ids) - 1 - len(problem.answer)
    place = data.draw(st.integers(answer, len(ids) - 2))
    other = data.draw(st.integers(1, cot.TOKENIZER.vocab_size - 1).filter(lambda i: i != ids[place]))  # never END
    wrong = [
        ids[:-1],
        ids[:-1] + [other],  # no end
        ids[:place] + [other] + ids[place + 1 :],
        ids[:place] + ids[place + 1 :],
        ids[: answer - 1] + ids[answer:],  # no mark
        ids[:-1] + cot.TOKENIZER.encode(f"\n#{problem.answer}") + [cot.END],  # two answers
        [cot.END],
    ]
    for changed in wrong:
        assert cot.right([problem], [cot.answer_in(changed)]) == [False]


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=9))
def test_majority(answers):
    most = cot.majority(answers)
    given = [answer for answer in answers if answer is not None]
    if not given:
        assert most is None
    else:
        assert given.count(most) == max(map(given.count, given))
        tied = [answer for answer in given if given.count(answer) == given.count(most)]
        assert most == tied[0]


def test_chance_is_the_likeliest_answer_by_enumeration():
    ends = Counter()
    for moves in itertools.product(itertools.combinations(range(5), 2), repeat=4):
        row = list(range(5))
        for i, j in moves:
            row[i], row[j] = row[j], row[i]
        ends[tuple(row)] += 1
    assert cot.chance("permutations", 4) == pytest.approx(max(ends.values()) / 10**4)
    assert cot.chance("permutations", 1) == pytest.approx(1 / 10)
    assert cot.chance("permutations", 60) == pytest.approx(
        1 / 60
    )  # an even number of swaps reaches half of the 120 rows
    sums = Counter(a + b for a in range(10, 100) for b in range(10, 100))
    assert cot.chance("addition", 2) == pytest.approx(max(sums.values()) / 90**2)

    def ends_of(total, length):
        if length == 0:
            return Counter({total: 1.0})
        moves, ends = cot.changes(total), Counter()
        for _, after in moves:
            for end, probability in ends_of(after, length - 1).items():
                ends[end] += probability / len(moves)
        return ends

    likeliest = [max(ends_of(start, 3).values()) for start in range(1, 11)]
    assert cot.chance("stories", 3) == pytest.approx(np.mean(likeliest))


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
        assert table["chance"] == [cot.chance(task, difficulty) for difficulty in table["difficulty"]]
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
        cot.main(arguments)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_chat_is_not_asked(outcome):
    with pytest.raises(ValueError, match="chat"):
        cot.main(["--load", str(outcome[0] / "out" / "grpo"), "--question", "Why?"])


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
