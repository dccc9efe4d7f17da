"""Benchmarks: every measure against its definition, and programs that may do no harm."""

import gzip
import itertools
import json
import math
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
import evals
import model
from engine import sandbox, to_numpy, xp

fast = settings(max_examples=30, deadline=None)
seed = st.integers(0, 2**32 - 1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are only run on Linux")


# ---------------------------------------------------------------------------------------------- intervals


@fast
@given(st.integers(1, 200), st.data())
def test_the_wilson_interval_holds_the_p_that_are_within_two_standard_errors(n, data):
    c = data.draw(st.integers(0, n))
    p, low, high = evals.proportion([1.0] * c + [0.0] * (n - c))
    assert p == c / n and 0 <= low <= p <= high <= 1
    for end in {low, high} - {p}:
        assert math.isclose((p - end) ** 2, 1.96**2 * end * (1 - end) / n, rel_tol=1e-6, abs_tol=1e-12)


def test_the_bootstrap_interval_of_a_mean_is_about_two_standard_errors_wide():
    data = np.random.default_rng(0).standard_normal(400)
    low, high = evals.bootstrap(lambda counts: counts @ data / 400, np.ones(400, int), np.random.default_rng(1), 2000)
    assert math.isclose((high - low) / 2, 1.96 * data.std() / 20, rel_tol=0.1)
    assert math.isclose((high + low) / 2, data.mean(), abs_tol=0.02)


# ------------------------------------------------------------------------------------------------ LMArena


def simulated(rng, strengths, n):
    votes = []
    for _ in range(n):
        a, b = rng.choice(len(strengths), 2, replace=False)
        votes.append((f"m{a}", f"m{b}", float(rng.random() < 1 / (1 + math.exp(strengths[b] - strengths[a])))))
    return votes


def test_ratings_hold_the_true_strengths_95_times_in_100():
    rng, inside = np.random.default_rng(0), []
    for _ in range(60):
        true = rng.normal(0, 0.7, 6)
        ratings = evals.bradley_terry(simulated(rng, true, 600), rounds=400, rng=rng)
        expected = 1000 + evals.ELO * (true - true.mean())
        inside += [ratings[f"m{m}"][1] <= expected[m] <= ratings[f"m{m}"][2] for m in range(6)]
    assert 0.91 <= np.mean(inside) <= 0.985, np.mean(inside)


votes_of = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), st.sampled_from((0.0, 0.5, 1.0))).filter(
        lambda vote: vote[0] != vote[1]
    ),
    max_size=30,
).map(lambda votes: [("a", "b", 1.0), ("b", "c", 0.5), ("c", "d", 0.0), *votes])


@fast
@given(votes_of)
def test_at_the_likeliest_ratings_each_model_wins_as_often_as_they_expect(votes):
    ratings = {name: rating[0] for name, rating in evals.bradley_terry(votes, prior=0.1).items()}
    assert math.isclose(np.mean(list(ratings.values())), 1000)
    met = {frozenset(vote[:2]) for vote in votes}
    for name in ratings:
        games = [(a, b, score) for a, b, score in votes] + [(*pair, None) for pair in map(tuple, met)]
        won = expected = 0.0
        for a, b, score in games:
            if name in (a, b):
                other, weight = (b if a == name else a), 1 if score is not None else 0.1
                won += weight * (0.5 if score is None else score if a == name else 1 - score)
                expected += weight / (1 + 10 ** ((ratings[other] - ratings[name]) / 400))
        assert math.isclose(won, expected, abs_tol=1e-5)


@fast
@given(votes_of)
def test_who_is_model_a_changes_no_rating(votes):
    swapped = [(b, a, 1 - score) for a, b, score in votes]
    for rate in evals.elo, lambda v: {name: rating[0] for name, rating in evals.bradley_terry(v).items()}:
        one, other = rate(votes), rate(swapped)
        assert one.keys() == other.keys() and all(math.isclose(one[name], other[name]) for name in one)


def test_two_models_are_as_far_apart_as_the_odds():
    rating = evals.bradley_terry([("a", "b", 1.0)] * 10 + [("a", "b", 0.0)], prior=0, anchor="b")
    assert rating["b"][0] == 1000 and math.isclose(rating["a"][0], 1400)
    assert list(evals.bradley_terry([("a", "b", 0.5)] * 3).values()) == [(1000, 1000, 1000)] * 2


def test_a_model_that_never_lost_has_a_rating_with_a_prior_and_none_without():
    votes = [("a", "b", 1.0)] * 20 + [("b", "c", 0.5)] * 5
    ratings = evals.bradley_terry(votes, rounds=100, rng=np.random.default_rng(0))
    assert 1300 < ratings["a"][0] < 2000 and np.isfinite(list(ratings.values())).all()
    with pytest.raises(ValueError, match="never lost"):
        evals.bradley_terry(votes, prior=0)


def test_groups_that_never_met_are_named():
    with pytest.raises(ValueError, match="a, b.*c, d|c, d.*a, b"):
        evals.bradley_terry([("a", "b", 1.0), ("c", "d", 1.0), ("b", "a", 0.5)])


def test_elo_by_hand_and_its_order():
    first = evals.elo([("a", "b", 1.0)], k=32)
    assert first == {"a": 1016, "b": 984}
    there, back = (evals.elo(v, k=32) for v in ([("a", "b", 1.0), ("a", "b", 0.0)], [("a", "b", 0.0), ("a", "b", 1.0)]))
    assert there["a"] < 1000 < back["a"] and math.isclose(there["a"] + there["b"], 2000)


# ------------------------------------------------------------------------------------------------ ARC-AGI

grids = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1))


words = st.text("abc .,:;()\n", max_size=20)
FORMS = {"lines": evals.grid_text, "JSON": json.dumps}
FORMS |= {f"JSON, {n} blanks": lambda grid, n=n: json.dumps(grid, indent=n) for n in range(5)}
FORMS |= {
    "a list a row": lambda grid: ",\n".join(map(json.dumps, grid)),
    "rows of NumPy": lambda grid: str(np.array(grid)),
    "digits": lambda grid: "\n".join("".join(map(str, row)) for row in grid),
    "a table": lambda grid: "\n".join(f"| {' | '.join(map(str, row))} |" for row in grid),
}


@fast
@given(grids, grids, words, words, words, st.sampled_from([*FORMS]))
def test_the_last_grid_is_found_in_an_answer(earlier, grid, before, between, after, form):
    for write in FORMS.values():
        assert evals.parse_grid(write(grid)) == grid
        answer = f"{before}\n{FORMS[form](earlier)}\n\n{between}\n{write(grid)}\n\n{after}"
        assert evals.parse_grid(answer) == grid


@fast
@given(grids, words, words, st.sampled_from([None, *range(5)]))
def test_a_grid_in_json_may_stand_in_a_sentence(grid, before, after, indent):
    assert evals.parse_grid(f"{before}{json.dumps(grid, indent=indent)}{after}") == grid


@pytest.mark.parametrize(
    "text, grid",
    [
        ("none", None),
        ("", None),
        ("1 2\n3", None),
        ("[[1, 2], [3]]", None),
        ("[[12, 3]]", None),
        ("[[1], []]", None),
        ("[[1]] [[2]]", [[2]]),
        ("[[[1, 2]], [[3, 4]]]", [[3, 4]]),
        ("[[1, 2],\n [3, 4],\n]", [[1, 2], [3, 4]]),
        ("```json\n[[1, 2], [3, 4]]\n```", [[1, 2], [3, 4]]),
        ("1 2\n3 4\n\nas the cells [0, 1], [1, 2], [1, 1] change", [[1, 2], [3, 4]]),
        ("1 2\n3 4\n\nof 2 rows", [[1, 2], [3, 4]]),
    ],
)
def test_what_is_a_grid(text, grid):
    assert evals.parse_grid(text) == grid


def test_a_task_counts_by_its_test_inputs_solved_in_two_attempts():
    task = {"train": [], "test": [{"input": [[1]], "output": [[2]]}, {"input": [[3]], "output": [[4, 4]]}]}
    assert evals.arc_score(task, [[[[1]], [[2]]], [[[4, 4]], None]]) == 1
    assert evals.arc_score(task, [[[[2]]], [None, [[4], [4]]]]) == 0.5
    assert evals.arc_score(task, [[[[0]], None, [[2]]], [[[4]]]]) == 0  # the third attempt is one too many


def test_tasks_are_read_from_a_folder_a_file_and_kaggle_s_two_files(tmp_path):
    tasks = evals.read_arc(f"{evals.SAMPLES}/arc")
    assert len(tasks) == 3 and evals.read_arc(f"{evals.SAMPLES}/arc/mirror.json") == {"mirror": tasks["mirror"]}
    solutions = {name: [pair["output"] for pair in task["test"]] for name, task in tasks.items()}
    asked = {name: task | {"test": [{"input": p["input"]} for p in task["test"]]} for name, task in tasks.items()}
    challenges = tmp_path / "x_challenges.json"
    challenges.write_text(json.dumps(asked))
    with pytest.raises(ValueError, match="task '.*': not an ARC task: test pair 1 has no grid as its output"):
        evals.read_arc(str(challenges))
    (tmp_path / "x_solutions.json").write_text(json.dumps(solutions))
    assert evals.read_arc(str(challenges)) == tasks
    prompt = evals.arc_prompt(tasks["mirror"], [[5, 6]])
    assert "Input 1:\n1 2 0\n0 0 3\n4 0 0\nOutput 1:\n0 2 1" in prompt and prompt.endswith("Input:\n5 6\nOutput:\n")
    right = lambda prompt: ["?", next(evals.grid_text(p["output"]) for t in tasks.values() for p in t["test"]
                                      if prompt.endswith(f"{evals.grid_text(p['input'])}\nOutput:\n"))]  # fmt: skip
    measures, _ = evals.score_arc(tasks, right)
    assert measures["in one attempt"][0] == 0 and measures["in two attempts"][0] == 1


# ----------------------------------------------------------------------------------- Humanity's Last Exam


@fast
@given(seed, st.integers(1, 60), st.integers(1, 20))
def test_calibration_error_is_the_root_mean_square_gap_of_its_bins(seed, n, size):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random(n), rng.integers(0, 2, n)
    pairs = sorted(zip(confidence, correct))
    starts = range(0, max(1, n // size) * size, size)
    bins = [pairs[a : a + size if a + 2 * size <= n else n] for a in starts]
    assert sum(map(len, bins)) == n
    total = sum(len(b) / n * (np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) ** 2 for b in bins)
    assert math.isclose(evals.calibration_error(confidence, correct, size), math.sqrt(total), abs_tol=1e-12)

    total = 0.0
    for b in range(10):
        inside = [(c, r) for c, r in pairs if b / 10 <= c < (b + 1) / 10]
        if inside:
            total += len(inside) / n * abs(np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside]))
    assert math.isclose(evals.expected_calibration_error(confidence, correct), total, abs_tol=1e-12)


def test_who_is_always_sure_and_half_right_is_off_by_a_half():
    assert evals.calibration_error([1.0] * 300, [0, 1] * 150) == 0.5
    assert evals.expected_calibration_error([1.0] * 300, [0, 1] * 150) == 0.5
    assert evals.calibration_error([0.5] * 200, [0, 1] * 100) == 0


@pytest.mark.parametrize(
    "text, answer, confidence",
    [
        ("Explanation: because\n**Answer:** 2,520.\nConfidence: 85%", "2,520.", 0.85),
        ("**Answer: 2,520**\n**Confidence: 85%**", "2,520", 0.85),
        ("Answer: a\nFinal answer: b\nConfidence: 150%", "b", 1.0),
        ("Answer: C*\nConfidence: 85.5 %", "C*", 0.855),
        ("Answer: x**2 + y**2", "x**2 + y**2", 1.0),
        ("Answer: 7\nConfidence: high (see step 3)", "7", 1.0),
        ("Answer:\n42\nConfidence: 0.85", "42", 0.85),
        ("**Answer:**\n\n42\n\n**Confidence:** 85%", "42", 0.85),
        ("Answer:\nConfidence: 85%", "", 0.85),
        ("Answer:\n**Confidence:** 85%", "", 0.85),
        ("Answer: 5\nAnswer:\nConfidence: 85%", "5", 0.85),
        ("Answer: \nExplanation: 42 is even\nConfidence: 85%", "", 0.85),
        ("Explanation: I think the answer is B.\nAnswer: C", "C", 1.0),
        ("the answer is B.", "B.", 1.0),
        ("So the final answer is: **42**", "42", 1.0),
        ("Therefore the answer is:\n42\nConfidence: 85%", "42", 0.85),
        ("So the answer: 42", "42", 1.0),
        ("The answers are many\n42", "42", 1.0),
        ("I say\n42", "42", 1.0),
        ("42\nConfidence: 85%", "42", 0.85),
        ("Confidence: 85%\n", "", 0.85),
        ("", "", 1.0),
    ],
)
def test_an_answer_and_its_confidence_are_read(text, answer, confidence):
    assert evals.parse_answer(text) == (answer, confidence)


@pytest.mark.parametrize(
    "one, other, same",
    [
        (".5", "0.5", True),
        (".5", "5", False),
        ("-.5", "-0.5", True),
        ("-.5", ".5", False),
        ("-5", "5", False),
        ("−5", "-5", True),
        ("+5", "5", True),
        ("5.", "5", True),
        ("5.0", "5", True),
        ("50", "5", False),
        ("$\\boxed{3}$.", "3.0", True),
        ("2,520.", "2520", True),
        ("252", "2520", False),
        ("1,000", "1000", True),
        ("-1,234,567.8", "-1234567.8", True),
        ("1,00", "100", False),
        ("1,2,3", "123", False),
        ("0,125", "125", False),
        ("1e3", "1,000", True),
        ("1e-3", ".001", True),
        ("1e3", "13", False),
        ("1e999", "1e998", False),
        ("9007199254740993", "9007199254740992", False),
        ("0.1", "0.1000000000000000055511151231257827", False),
        ("nan", "nan", True),
        ("nan", "inf", False),
        ("10²", "102", False),
        ("10²", "10^2", True),
        ("10²", "10^{2}", True),
        ("10²", "100", False),  # nothing is computed
        ("10⁻²³", "10^{-23}", True),
        ("10⁻²³", "10-23", False),
        ("x²", "x^2", True),
        ("x²", "x2", False),
        ("x^{2y}", "x^2y", False),
        ("101₂", "101_2", True),
        ("101₂", "1012", False),
        ("½", "1/2", True),
        ("2½", "2 1/2", True),
        ("2½", "21/2", False),
        ("\\frac{1}{2}", "0.5", False),
        ("1/2", "0.5", False),
        ("５", "5", True),
        (" SEVILLE ", "Seville", True),
        ("**Seville**", "Seville.", True),
        ("`x`", "x", True),
        ("Madrid", "Seville", False),
        ("a  b", "A b", True),
        ("C*", "C", False),
        ("2*3*4", "23*4", False),
        ("", "0", False),
    ],
)
def test_answers_are_compared(one, other, same):
    assert evals.same_answer(one, other) == evals.same_answer(other, one) == same


@fast
@given(st.text(), st.sampled_from(["exactMatch", "multipleChoice"]))
def test_an_answer_is_the_same_as_itself(text, answer_type):
    assert evals.same_answer(text, text, answer_type) and evals.same_answer(f" {text} ", text, answer_type)


@fast
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(-9, 9, places=2))
def test_numerals_are_compared_as_numbers(one, other):
    assert evals.same_answer(f"{one:,}", f"{one:.5f}") and evals.same_answer(f"{one:e}", str(one))
    assert evals.same_answer(str(other), str(one)) == (one == other)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("B)", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("**B.** The integers", "B"),
        ("$\\boxed{B}$", "B"),
        ("B.", "B"),
        ("B. The integers", "B"),
        ("B: because A is wrong", "B"),
        ("B, not C", "B"),
        ("B, that is (B)", "B"),
        ("It's not A, it's B", "B"),
        ("It is B", "B"),
        ("I think B", "B"),
        ("I'm sure it is B", "B"),
        ("the answer is B.", "B"),
        ("Option B", "B"),
        ("A", "A"),
        ("(A) cat", "A"),
        ("A. cat", "A"),
        ("A is right", "A"),
        ("A because B is wrong", "A"),
        ("Option A has it", "A"),
        ("I", "I"),
        ("(I)", "I"),
        ("I would say I", "I"),
        ("A cat", None),
        ("It is a cat. A cat is it", None),
        ("I do not know", None),
        ("A or B", None),
        ("B or C", None),
        ("B and C", None),
        ("(B), (C)", None),
        ("B/C", None),
        ("neither B nor C", None),
        ("Because", None),
        ("DNA", None),
        ("C-reactive, B's", None),
        ("", None),
    ],
)
def test_a_multiple_choice_is_the_letter_that_is_named(text, letter):
    assert [x for x in "ABCDI" if evals.same_answer(text, x, "multipleChoice")] == ([letter] if letter else [])


def test_hle_leaves_images_out_and_counts_who_is_not_asked_as_wrong():
    rows, images = evals.read_hle(f"{evals.SAMPLES}/hle.jsonl")
    assert (len(rows), images) == (5, 1)
    answer = lambda prompt: None if "river" in prompt else "Answer: B\nConfidence: 60%"
    measures, _ = evals.score_hle(rows, answer, np.random.default_rng(0))
    assert measures["accuracy"][0] == 1 / 5
    assert math.isclose(measures["calibration error"][0], 0.6 - 1 / 4)


# ---------------------------------------------------------------------------------------------- HumanEval


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_program():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert math.isclose(evals.pass_at_k(n, c, k), np.mean([any(s) for s in subsets]), abs_tol=1e-12)
    exact = 1 - math.comb(9_000, 500) / math.comb(10_000, 500)
    assert math.isclose(evals.pass_at_k(10_000, 1_000, 500), exact)
    for n, c, k in (3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1):
        with pytest.raises(ValueError):
            evals.pass_at_k(n, c, k)


def test_a_completion_ends_where_the_function_does():
    for stop in "\ndef", "\nclass", "\nif", "\nprint", "\n#":
        assert evals.completion(f"    return 1\n{stop} x", "f") == "    return 1\n"
    block = "import math\ndef f(x):\n    return x\nprint(f(2))\n"
    assert evals.completion(f"Here it is:\n```python\n{block}```\nGood.", "f").endswith(block)
    assert evals.completion("```\ndef g(): pass\n```", "f").startswith("```")


@linux
def test_correct_programs_pass_and_wrong_ones_do_not():
    problems = evals.read_humaneval(f"{evals.SAMPLES}/humaneval.jsonl")
    answers = lambda problem: [problem["canonical_solution"], "    return None\n"]
    measures, items = evals.score_humaneval(problems, answers, (1, 2))
    assert [item["right"] for item in items] == [[True, False]] * len(problems)
    assert measures["pass@1"][0] == 0.5 and measures["pass@2"][0] == 1
    chat = f"Sure!\n```python\n{problems[1]['prompt']}{problems[1]['canonical_solution']}```"
    assert evals.passes(problems[1], evals.completion(chat, "vowels"), seconds=20)
    uses = "import math, collections, typing, tempfile\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
    assert sandbox.run_program(uses + "tempfile.TemporaryFile(); collections.namedtuple('P', 'x y')(1, 2)", seconds=20)
    assert sandbox.run_program("import numpy\nassert (numpy.ones((3, 3)) @ numpy.ones(3) == 3).all()", seconds=20)
    assert not sandbox.run_program("import numpy\nassert (numpy.ones((3, 3)) @ numpy.ones(3) == 2).all()", seconds=20)


TRY = """
    if isinstance(y, str): y = y.encode()
    if isinstance(y, bytes) and len(y) == 32:
      for pipe in range(24):
        try: os.write(pipe, y)
        except OSError: pass
os._exit(0)
"""
TOKEN_IN_A_FRAME = f"""
import os, sys
def inside(x, depth=0):  # all that a value holds
    yield x
    if depth < 3:
        parts = [*x, *(x.values() if isinstance(x, dict) else ())] if isinstance(x, (dict, list, tuple)) else []
        for cell in getattr(x, "__closure__", None) or ():
            try: parts.append(cell.cell_contents)
            except ValueError: pass
        for part in parts: yield from inside(part, depth + 1)
frame = sys._getframe()
while frame := frame.f_back:
  for y in inside(dict(frame.f_locals)):
{TRY}"""
HOSTILE = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "fork": "import os; os.fork()",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "start a program": "import subprocess; subprocess.Popen(['touch', '{outside}/new'])",
    "start a shell": "import os; os.system('touch {outside}/new')",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "large file": "open('file', 'wb').write(bytes(1 << 26))",
    "write": "open('{outside}/new', 'w')",
    "write quietly": "try: open('{outside}/new', 'w')\nexcept BaseException: pass",
    "write through a link": "import os; os.symlink('{outside}', 'link'); open('link/new', 'w')",
    "remove": "import os\ntry: os.remove('{outside}/old')\nexcept OSError: pass",
    "rename": "import os\ntry: os.rename('{outside}/old', '{outside}/new')\nexcept OSError: pass",
    "change rights": "import os\ntry: os.chmod('{outside}/old', 0)\nexcept OSError: pass",
    "make a pipe": "import os; os.mkfifo('{outside}/new')",
    "database": "import sqlite3; sqlite3.connect('{outside}/new').execute('create table t (x)')",
    "socket": "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError: pass",
    "call C": "import ctypes; ctypes.CDLL(None).creat(b'{outside}/new', 511)",
    "signal": "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass",
    "signal all": "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass",
    "limit the parent": "import os, resource; resource.prlimit(os.getppid() or 1, resource.RLIMIT_NOFILE, (20, 20))",
    "exit": "exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit",
    "exception": "raise ValueError",
    "syntax": "def (",
    "forged text": "print('passed', flush=True)\nexit(0)",
    "forged proof": "import os\nfor fd in range(20):\n  try: os.write(fd, b'0' * 32)\n  except OSError: pass",
    "flood": "import os\nwhile True:\n  try: os.write(3, bytes(1 << 16))\n  except OSError: pass",
    "forged end": "import sys; sys.audit('sandbox.end'); exit(0)",
    "forged end at exit": "import atexit, sys; atexit.register(sys.audit, 'sandbox.end'); exit(0)",
    "token in a frame": TOKEN_IN_A_FRAME,
    "token among objects": "import gc, os\nfor x in gc.get_objects():\n  for y in gc.get_referents(x):\n" + TRY,
    "token in memory": "file = open('/proc/self/mem', 'rb')",
    "token in memory, by bytes": "file = open(b'/proc/self/mem', 'rb')",
    "crash": "import os; os.abort()",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
}
SLOW = {"loop", "sleep", "fork bomb"}  # they may take all their time
LAYERS = {  # what the system may lack: the change of the runner that takes it away
    "nothing": ("", ""),
    "namespaces": ("libc.unshare(", "(lambda flags: -1)("),
    "Landlock": ("libc.syscall(444, None, 0, 1)", "0"),
    "hook": ("sys.addaudithook(hook)", "pass"),
}


@pytest.fixture
def outside():
    """A folder in which everybody may write, with a file."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        with open(f"{folder}/old", "w") as file:
            file.write("old")
        os.chmod(f"{folder}/old", 0o666)
        yield folder


OURS = f"  # for the tests of process {os.getpid()}"  # others may run programs on this machine too


def processes():
    """The command lines of all processes that run a program of ours."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found += [line for line in [file.read()] if OURS.encode() in line]
        except OSError:
            pass
    return found


def limits():
    return [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]


@linux
@pytest.mark.parametrize("lacking", LAYERS)
def test_hostile_programs_fail_and_leave_nothing_behind(lacking, outside, tmp_path, monkeypatch):
    old, new = LAYERS[lacking]
    source = sandbox._runner()
    assert old in source
    monkeypatch.setattr(sandbox, "_runner", lambda: source.replace(old, new) + OURS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # nobody else's files come and go there
    before = limits(), os.getcwd()
    for name, program in HOSTILE.items():
        if lacking == "hook" and name.startswith("signal"):
            continue  # what stands before signals, if not the hook, not every kernel has
        if lacking != "nothing" and name in SLOW:
            continue  # what stands before them is never lacking
        start = time.perf_counter()
        seconds = 0.7 if name in SLOW else 5.0
        passed = sandbox.run_program(program.replace("{outside}", outside), seconds, unconfined=True)
        if lacking != "hook":  # the kernel refuses, and a program may go on; the hook does not let it
            assert not passed, name
        assert time.perf_counter() - start < 8, name
        with open(f"{outside}/old") as file:
            assert os.listdir(outside) == ["old"] and file.read() == "old", name
        if lacking != "hook" or os.getuid() == 0:
            assert os.stat(f"{outside}/old").st_mode & 0o777 == 0o666, name
    assert not processes()
    assert before == (limits(), os.getcwd()) and not os.listdir(tmp_path)


ESCAPE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # does not die with its parent
os.setsid()  # does not die with its group
open("escaped", "w")
time.sleep(60)
"""


@linux
@pytest.mark.parametrize("namespaces", [True, False])
def test_no_process_outlives_its_run(namespaces, monkeypatch):
    """Nor does one that gets past the hook, clears its death signal and leaves its session."""
    source = sandbox._runner().replace(*LAYERS["hook"])
    source = source if namespaces else source.replace(*LAYERS["namespaces"])
    monkeypatch.setattr(sandbox, "_runner", lambda: source + OURS)
    assert sandbox.run_program(ESCAPE.replace("60", "0"), seconds=20, unconfined=True)
    assert not sandbox.run_program(ESCAPE, seconds=1.5, unconfined=True)
    assert not processes()


@linux
def test_a_program_ends_with_the_process_that_asked_for_it():
    code = f"from engine import sandbox\nsource = sandbox._runner() + {OURS!r}\nsandbox._runner = lambda: source\n"
    code += "sandbox.run_program('import time; time.sleep(60)', seconds=60, unconfined=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(sandbox.__file__))
    ) as process:
        until(lambda: len(processes()) == 3)  # this one, the one that keeps watch and the program
        process.kill()
    until(lambda: not processes())


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@linux
def test_where_the_kernel_does_not_confine_programs_run_only_if_told_to(monkeypatch):
    problems = evals.read_humaneval(f"{evals.SAMPLES}/humaneval.jsonl")
    source, mounts = sandbox._runner(), ("libc.syscall(442,", "(lambda *args: -1)(442,")
    assert mounts[0] in source
    for lacks, missing in {
        (LAYERS["namespaces"],): "namespaces",
        (LAYERS["namespaces"], LAYERS["Landlock"]): "namespaces and read-only mounts and Landlock",
        (mounts, LAYERS["Landlock"]): "read-only mounts and Landlock",
    }.items():
        text = source
        for old, new in lacks:
            text = text.replace(old, new)
        monkeypatch.setattr(sandbox, "_runner", lambda text=text: text)
        for program in "", "1 / 0":  # it is not even begun
            with pytest.raises(ValueError, match=f"without {missing}; --unconfined"):
                sandbox.run_program(program, seconds=20)
        with pytest.raises(ValueError, match="--unconfined"):
            evals.score_humaneval(problems, lambda problem: None)
        assert sandbox.run_program("", seconds=20, unconfined=True)
        evals.score_humaneval(problems, lambda problem: None, unconfined=True)


@linux
def test_no_program_reaches_a_server_beside_it(monkeypatch):
    source = sandbox._runner()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        for old, new in LAYERS.values():
            monkeypatch.setattr(sandbox, "_runner", lambda old=old, new=new: source.replace(old, new))
            assert not sandbox.run_program(program, seconds=5.0, unconfined=True)
            with pytest.raises(TimeoutError):
                server.accept()


# ------------------------------------------------------------------------------- likelihood, without an answer


def test_bits_per_byte_and_perplexity_by_hand():
    assert evals.perplexity([math.log(8)] * 5) == pytest.approx(8)
    assert evals.bits_per_byte([math.log(8)] * 5, 10) == pytest.approx(1.5)
    measures, _ = evals.score_text([(4.0, 2, 8), (6.0, 3, 4)], np.random.default_rng(0))
    assert measures["nats a token"][0] == pytest.approx(2) and measures["perplexity"][0] == pytest.approx(math.e**2)
    assert measures["bits per byte"] == pytest.approx((10 / 12 / math.log(2), 4 / 8 / math.log(2), 6 / 4 / math.log(2)))
    assert evals.score_text([(4.0, 2, 8)], np.random.default_rng(0))[0]["perplexity"][1:] == (None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = bpe.train(evals.read_text(f"{evals.SAMPLES}/text.txt"), 300)
    config = model.Config(
        model_type="llama",
        tie_word_embeddings=True,
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    model.save(str(folder), model.init(config), config)
    tokenizer.save(str(folder))
    return str(folder)


def log_probabilities(folder, text, given):
    """Of the tokens of text after `given`, one by one, from the logits."""
    params, config = model.load(folder)
    tokenizer = bpe.load(f"{folder}/tokenizer.json")
    ids = tokenizer.bos + tokenizer.encode(given) + tokenizer.encode(text)
    logits = to_numpy(model.forward(params, config, xp.asarray([ids]))[0][0]).astype(float)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    start = len(ids) - len(tokenizer.encode(text))
    return [logits[i - 1, ids[i]] for i in range(max(1, start), len(ids))]


def test_the_likelihood_of_a_choice_and_of_a_text_is_that_of_the_logits(folder):
    known, rng = evals.connect(folder), np.random.default_rng(0)
    for given_, text in ("The river", " comes down"), ("Where is it?\nAnswer:", " in the hills"), ("x", "y"):
        direct = sum(log_probabilities(folder, text, given_))
        assert known.loglikelihood(given_, text) == pytest.approx(direct, rel=1e-5)
    assert known.loglikelihood("x " * 200, "y") is None and known.answer("x " * 200, 1, 1, 0.0, rng) is None
    text = evals.read_text(f"{evals.SAMPLES}/text.txt")[:100]
    direct = log_probabilities(folder, text, "")
    measures, _ = evals.score_text(known.windows(text, None), rng)
    tokenizer = bpe.load(f"{folder}/tokenizer.json")
    size = len(tokenizer.decode_bytes(tokenizer.encode(text)[1:]))
    assert measures["bits per byte"][0] == pytest.approx(-sum(direct) / math.log(2) / size, rel=1e-5)
    assert measures["perplexity"][0] == pytest.approx(evals.perplexity(-np.array(direct)), rel=1e-5)
    assert len(known.windows(text * 9, None)) > 1 and len(known.windows(text * 9, 1)) == 1
    assert sum(tokens for _, tokens, _ in known.windows(text * 9, None)) == len(tokenizer.encode(text * 9)) - 1


def test_the_likeliest_choice_in_all_and_per_byte():
    questions = [{"question": "q", "choices": ["a", "a long one"], "answer": answer} for answer in (0, 1)]
    scores = {" a": -3.0, " a long one": -4.0}
    measures, items = evals.score_choice(questions, lambda context, text: scores[text])
    assert [(item["likeliest"], item["per_byte"]) for item in items] == [(0, 1)] * 2
    assert measures["accuracy"][0] == measures["accuracy, per byte"][0] == 0.5
    measures, _ = evals.score_choice(questions[:1], lambda context, text: None if "long" in text else 0.0)
    assert measures["accuracy"][0] == 0


def test_choices_are_read_in_both_forms():
    questions = evals.read_choice(f"{evals.SAMPLES}/choice.jsonl")
    answers = [question["choices"][question["answer"]] for question in questions]
    assert answers == ["honey", "an eagle", "rain", "the Sun", "water", "autumn"]


# ------------------------------------------------------------------------------------------- command line


def run(*options):
    command = [sys.executable, "evals.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(evals.__file__)))


def test_every_task_ends_in_a_table(folder, tmp_path, capsys):
    for task in evals.TASKS:
        out = tmp_path / f"{task}.json"
        evals.main(["--load", folder, "--task", task, "--max-new-tokens", "4", "--limit", "2", "--out", str(out)])
        shown, result = capsys.readouterr().out, json.loads(out.read_text())
        assert shown.startswith(task) and all(name in shown for name in result["measures"])
        assert len(result["items"]) == (3 if task == "arena" else 2)
    evals.main(["--load", folder, "--task", "hle", "--max-new-tokens", "4"])
    assert "do not fit into the context window" in capsys.readouterr().out


def test_the_same_seed_draws_the_same_programs(folder, tmp_path):
    def programs(seed):
        out = tmp_path / "out.json"
        options = ["--task", "humaneval", "--samples", "3", "--max-new-tokens", "5", "--limit", "1"]
        evals.main(["--load", folder, *options, "--seed", str(seed), "--out", str(out)])
        return json.loads(out.read_text())["items"][0]["programs"]

    assert programs(1) == programs(1) != programs(2) and len(programs(1)) == 3


VOTE = '{"model_a": "a", "model_b": "b", "winner": "tie"}\n'


HLE = '{"question": "q", "answer": "a", "answer_type": "exactMatch"}\n'
CHOICE = '{"question": "q", "choices": ["a", "b"], "answer": 0}\n'
GRIDS = '{"input": [[1]], "output": [[2]]}'
BROKEN = [
    ("arena", "f.jsonl", VOTE + "{", "f.jsonl, line 2: not JSON"),
    ("arena", "f.jsonl", VOTE + "[" * 100_000, "f.jsonl, line 2: .*nested too deeply"),
    ("arena", "f.jsonl", VOTE + "9" * 5000, "f.jsonl, line 2: a number that is .*long"),
    ("arena", "f.jsonl", VOTE + VOTE.replace("a", "\\udc80", 1), "f.jsonl, line 2: half of a surrogate pair"),
    ("arena", "f.jsonl", "", "f.jsonl is empty"),
    ("arena", "f.jsonl", " \n", "f.jsonl is empty"),
    ("arena", "f.jsonl", VOTE + VOTE.replace("tie", "c"), "line 2: the winner 'c'"),
    ("arena", "f.jsonl", VOTE + VOTE.replace("tie", "c\\n" * 9999), r"line 2: the winner 'c\\nc"),
    ("arena", "f.jsonl", VOTE.replace("model_b", "model"), "line 1: the field 'model_b'"),
    ("arena", "f.jsonl", VOTE.replace('"b"', "7"), "line 1: the field 'model_b'"),
    ("arena", "f.jsonl", VOTE.replace('"b"', '"a"').replace('"a"', f'"{"a" * 999}"'), "itself"),
    ("arena", "f.jsonl", VOTE + VOTE.replace('"b"', '"c"').replace('"a"', '"d"'), "f.jsonl: .*groups of models"),
    ("arena", "f.jsonl", "".join(VOTE.replace('a"', f'{i}"') for i in range(99)).replace('"b"', '"c"'), "model_a"),
    ("arena", "f.jsonl", "[1]", "f.jsonl, line 1: not an object"),
    ("arena", "f.json", "{}", "f.json: not a list"),
    ("arena", "f.json", "[\n1 2]", "f.json, line 2: not JSON"),
    ("arena", "f.csv", "model_a,model_b\na,b\n", "f.csv, line 2: the field 'winner'"),
    ("arena", "f.csv", 'model_a,model_b,winner\n\na,b,"tie\na,b,tie\n', "f.csv, line 3: not CSV"),
    ("arena", "f.csv", "model_a,model_b,winner\na\0,b,tie\n", "f.csv, line 2: a NUL"),
    ("arena", "f.csv", 'model_a,text,model_b,winner\na,"x\nx",b,tie\na,x,b,none\n', "f.csv, line 4: the winner"),
    ("arena", "f.csv", b"model_a,model_b,winner\na,\xff,tie\n", "f.csv is not UTF-8 text: byte 25 is 0xff, in line 2"),
    ("arena", "f.jsonl.gz", b"x" * 100, "f.jsonl.gz is not packed by gzip"),
    ("arena", "f.jsonl.gz", gzip.compress(VOTE.encode(), mtime=0)[:-9], "f.jsonl.gz is not packed by gzip"),
    ("arc", "f.json", '{"train": [], "test": []}', "f.json, task 'f': not an ARC task: no train pairs"),
    ("arc", "f.json", f'{{"train": [{GRIDS}]}}', "not an ARC task: no test pairs"),
    ("arc", "f.json", f'{{"train": [{GRIDS.replace("2", "10")}], "test": [{GRIDS}]}}', "train pair 1 .*output"),
    ("arc", "f.json", f'{{"train": [{GRIDS}], "test": [{GRIDS.replace("2", "NaN")}]}}', "f.json: a number that is NaN"),
    (
        "arc",
        "f.json",
        f'{{"t": {{"train": [{GRIDS}], "test": [{{"input": [[1]]}}]}}}}',
        "'t': .*test pair 1 .*output",
    ),
    ("arc", "f.json", f'{{"train": [{GRIDS}, {{"output": [[1]]}}], "test": [{GRIDS}]}}', "train pair 2 .*input"),
    ("arc", "f.json", "[]", "not ARC tasks"),
    ("arc", "f.json", "{}", "no ARC tasks"),
    ("arc", "f.json", "[" * 100_000, "f.json: .*nested too deeply"),
    ("hle", "f.jsonl", '{"question": "q", "answer": "a", "answer_type": "essay"}', "line 1: the field 'answer_type'"),
    ("hle", "f.jsonl", HLE + HLE.replace("}", ', "image": NaN}'), "line 2: a number that is NaN"),
    ("hle", "f.jsonl", HLE + HLE.replace('"q"', '"\\ud800"'), "line 2: half of a surrogate pair"),
    ("hle", "f.jsonl", HLE.replace("}", ', "image": "x"}'), "f.jsonl: every question has an image"),
    ("humaneval", "f.jsonl", '{"task_id": "a", "prompt": 3}', "line 1: the field 'prompt'"),
    ("humaneval", "f.jsonl", "{" * 100_000, "line 1: not JSON"),
    ("choice", "f.jsonl", CHOICE + CHOICE.replace("0", '"E"'), "line 2: not a question"),
    ("choice", "f.jsonl", CHOICE.replace("0", "2"), "line 1: not a question"),
    ("choice", "f.jsonl", CHOICE.replace("0", "Infinity"), "line 1: a number that is .*infinite"),
    ("choice", "f.jsonl", CHOICE.replace('["a", "b"]', '{"text": "ab", "label": "ab"}'), "line 1: not a question"),
    ("text", "f.txt", "", "f.txt is empty"),
    ("text", "f.txt", b"a\n\xc3", "f.txt is not UTF-8 text: byte 2 is 0xc3, in line 2"),
    ("text", "f.txt.gz", gzip.compress(b"The river" * 99, mtime=0)[:30], "f.txt.gz is not packed .* cut off"),
]


@pytest.mark.parametrize("task, name, content, said", BROKEN)
def test_bad_input_is_one_sentence(task, name, content, said, folder, tmp_path, capsys):
    path, out = tmp_path / name, tmp_path / "out.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        evals.main(["--load", folder, "--task", task, "--file", str(path), "--out", str(out)])
    assert str(path) in str(error.value) and len(str(error.value)) < 200 + len(str(path))
    assert str(error.value).isprintable() and not capsys.readouterr().out and not out.exists()


def test_solutions_that_do_not_fit_name_both_files(tmp_path):
    tasks, solutions = tmp_path / "x_challenges.json", tmp_path / "x_solutions.json"
    tasks.write_text(f'{{"t": {{"train": [{GRIDS}], "test": [{{"input": [[1]]}}]}}}}')
    for content in "{}", "[]", '{"t": []}', '{"t": [[[1]], [[1]]]}', '{"t": 1}':
        solutions.write_text(content)
        with pytest.raises(ValueError, match="x_solutions.json: not a grid for each test input of .*x_challenges.json"):
            evals.read_arc(str(tasks))
    solutions.write_text('{"t": [7]}')
    with pytest.raises(ValueError, match="task 't': not an ARC task: test pair 1 has no grid as its output"):
        evals.read_arc(str(tasks))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="folder: no ARC tasks"):
        evals.read_arc(str(folder))
    (folder / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="bad.json: not an ARC task"):
        evals.read_arc(str(folder))


def test_a_model_s_name_cannot_break_the_table(tmp_path, capsys):
    (tmp_path / "f.jsonl").write_text(VOTE.replace('"b"', r'"b\n\u001b[2J"'))
    evals.main(["--task", "arena", "--file", str(tmp_path / "f.jsonl")])
    shown = capsys.readouterr().out
    assert r"b\n\x1b[2J" in shown and all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.parametrize("task", evals.TASKS)
def test_a_broken_file_is_one_line_on_standard_error(task, folder, tmp_path):
    """And nothing else: no table, no traceback, and exit status 1; the same for a folder, which ARC's tasks may be."""
    (tmp_path / "broken.json").write_bytes(b"[" * 100_000 + b"\xff")
    for path in tmp_path / "broken.json", tmp_path:
        ended = run("--load", folder, "--task", task, "--file", path)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr[:2000]
        assert ended.stderr.startswith(f"error: {path}") and len(ended.stderr) < 300


def test_the_command_line_ends_without_a_traceback(tmp_path):
    ended = run("--task", "arena", "--file", tmp_path / "none.jsonl")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "none.jsonl: No such file" in ended.stderr
    for options in ["--task", "arc"], ["--task", "arena", "--limit", "0"], ["--seed", "1"]:
        with pytest.raises(ValueError):
            evals.main(options)


def test_rows_come_from_jsonl_json_csv_and_gz(tmp_path):
    row = {"model_a": "a", "model_b": "b", "winner": "tie (bothbad)"}
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "v.json").write_text(json.dumps([row | {"winner": "both_bad"}]))
    (tmp_path / "v.csv").write_text(f"model_b,model_a,text,winner\nb,a,{'x' * 200_000},tie\n")
    (tmp_path / "v.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    for path in tmp_path.iterdir():
        assert evals.read_votes(str(path)) == [("a", "b", 0.5)]
    (tmp_path / "v.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ValueError, match="cut off"):
        evals.read_votes(str(tmp_path / "v.jsonl.gz"))


@linux
def test_a_program_cannot_name_the_process_that_runs_it():
    """With namespaces; the slower and the fewer cores of the evaluator are what no audit hook tells."""
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    for attack in "os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)", "os.sched_setaffinity(os.getppid(), {0})":
        sandbox.run_program(f"import os\ntry: {attack}\nexcept OSError: pass", seconds=10)
        assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before
