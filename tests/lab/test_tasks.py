"""The benchmarks' files, prompts and answers in free text."""

import gzip
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sandbox
from lab import tasks

fast = settings(max_examples=30, deadline=None)
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are only run on Linux")
GRIDS = '{"input": [[1]], "output": [[2]]}'


def test_rows_come_from_jsonl_json_csv_and_gz(tmp_path):
    row = {"model_a": "a", "model_b": "b", "winner": "tie (bothbad)"}
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "v.json").write_text(json.dumps([row | {"winner": "both_bad"}]))
    (tmp_path / "v.csv").write_text(f"model_b,model_a,text,winner\nb,a,{'x' * 200_000},tie\n")
    (tmp_path / "v.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    for path in tmp_path.iterdir():
        assert tasks.read_votes(str(path)) == [("a", "b", 0.5)]
    (tmp_path / "v.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ValueError, match="cut off"):
        tasks.read_votes(str(tmp_path / "v.jsonl.gz"))


def test_groups_that_never_met_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="groups of models, so no ratings do: 'a, b' [|] 'c, d'$"):
        tasks.score_arena([("a", "b", 1.0), ("c", "d", 1.0), ("b", "a", 0.5)], None, rng)
    with pytest.raises(ValueError, match="'a, b' [|] 'c, d' [|] [.]{3}$"):
        tasks.score_arena([("a", "b", 1.0), ("f", "e", 1.0), ("c", "d", 1.0)], None, rng)
    with pytest.raises(ValueError, match="the anchor 'e' is in no vote"):
        tasks.score_arena([("a", "b", 1.0)], "e", rng)
    chain = [(f"m{i}", f"m{i + 1}", 0.5) for i in (0, 4, 2, 1, 5, 3)]
    ratings, items = tasks.score_arena(chain, "m3", rng)
    assert len(ratings) == len(items) == 7 and ratings["m3"] == (1000, 1000, 1000)


grids = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1))


words = st.text("abc .,:;()\n", max_size=20)
FORMS = {"lines": tasks.grid_text, "JSON": json.dumps}
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
        assert tasks.parse_grid(write(grid)) == grid
        answer = f"{before}\n{FORMS[form](earlier)}\n\n{between}\n{write(grid)}\n\n{after}"
        assert tasks.parse_grid(answer) == grid


@fast
@given(grids, words, words, st.sampled_from([None, *range(5)]))
def test_a_grid_in_json_may_stand_in_a_sentence(grid, before, after, indent):
    assert tasks.parse_grid(f"{before}{json.dumps(grid, indent=indent)}{after}") == grid


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
    assert tasks.parse_grid(text) == grid


def test_tasks_are_read_from_a_folder_a_file_and_kaggle_s_two_files(tmp_path):
    puzzles = tasks.read_arc(f"{tasks.SAMPLES}/arc")
    (mirror,) = tasks.read_arc(f"{tasks.SAMPLES}/arc/mirror.json")
    assert len(puzzles) == 3 and mirror in puzzles and mirror["id"] == "mirror"
    solutions = {task["id"]: [pair["output"] for pair in task["test"]] for task in puzzles}
    asked = {task["id"]: task | {"test": [{"input": p["input"]} for p in task["test"]]} for task in puzzles}
    challenges = tmp_path / "x_challenges.json"
    challenges.write_text(json.dumps(asked))
    with pytest.raises(ValueError, match="task '.*': not an ARC task: test pair 1 has no grid as its output"):
        tasks.read_arc(str(challenges))
    (tmp_path / "x_solutions.json").write_text(json.dumps(solutions))
    assert tasks.read_arc(str(challenges)) == puzzles
    prompt = tasks.arc_prompt(mirror, [[5, 6]])
    assert "Input 1:\n1 2 0\n0 0 3\n4 0 0\nOutput 1:\n0 2 1" in prompt and prompt.endswith("Input:\n5 6\nOutput:\n")
    right = lambda prompt: ["?", next(tasks.grid_text(p["output"]) for t in puzzles for p in t["test"]
                                      if prompt.endswith(f"{tasks.grid_text(p['input'])}\nOutput:\n"))]  # fmt: skip
    measures, _ = tasks.score_arc(puzzles, right)
    assert measures["in one attempt"][0] == 0 and measures["in two attempts"][0] == 1


def test_solutions_that_do_not_fit_name_both_files(tmp_path):
    challenges, solutions = tmp_path / "x_challenges.json", tmp_path / "x_solutions.json"
    challenges.write_text(f'{{"t": {{"train": [{GRIDS}], "test": [{{"input": [[1]]}}]}}}}')
    for content in "{}", "[]", '{"t": []}', '{"t": [[[1]], [[1]]]}', '{"t": 1}':
        solutions.write_text(content)
        with pytest.raises(ValueError, match="x_solutions.json: not a grid for each test input of .*x_challenges.json"):
            tasks.read_arc(str(challenges))
    solutions.write_text('{"t": [7]}')
    with pytest.raises(ValueError, match="task 't': not an ARC task: test pair 1 has no grid as its output"):
        tasks.read_arc(str(challenges))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="folder: no ARC tasks"):
        tasks.read_arc(str(folder))
    (folder / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="bad.json: not an ARC task"):
        tasks.read_arc(str(folder))


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
    assert tasks.parse_answer(text) == (answer, confidence)


same_answer = lambda given, expected: tasks.is_right(given, expected, "exactMatch")


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
    assert same_answer(one, other) == same_answer(other, one) == same


@fast
@given(st.text(), st.sampled_from(["exactMatch", "multipleChoice"]))
def test_an_answer_is_the_same_as_itself(text, answer_type):
    assert tasks.is_right(text, text, answer_type) and tasks.is_right(f" {text} ", text, answer_type)


@fast
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_thousands_may_have_commas(number):
    assert same_answer(f"{number:,}", f"{number:.5f}")


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
    assert [x for x in "ABCDI" if tasks.is_right(text, x, "multipleChoice")] == ([letter] if letter else [])


def test_hle_leaves_images_out_and_counts_who_is_not_asked_as_wrong():
    rows, images = tasks.read_hle(f"{tasks.SAMPLES}/hle.jsonl")
    assert (len(rows), images) == (5, 1)
    answers = lambda prompt: None if "river" in prompt else ["Answer: B\nConfidence: 60%"]
    measures, _ = tasks.score_hle(rows, answers)
    assert measures["accuracy"][0] == 1 / 5
    assert math.isclose(measures["calibration error"][0], 0.6 - 1 / 4)


def test_a_completion_ends_where_the_function_does():
    for stop in "\ndef", "\nclass", "\nif", "\nprint", "\n#":
        assert tasks.completion(f"    return 1\n{stop} x", "f") == "    return 1\n"
    block = "import math\ndef f(x):\n    return x\nprint(f(2))\n"
    assert tasks.completion(f"Here it is:\n```python\n{block}```\nGood.", "f").endswith(block)
    assert tasks.completion("```\ndef g(): pass\n```", "f").startswith("```")


@linux
def test_correct_programs_pass_and_wrong_ones_do_not():
    problems = tasks.read_humaneval(f"{tasks.SAMPLES}/humaneval.jsonl")
    answers = {p["prompt"]: [p["canonical_solution"], "    return None\n"] for p in problems}.get
    measures, items = tasks.score_humaneval(problems, answers, (1, 2))
    assert [item["right"] for item in items] == [[True, False]] * len(problems)
    assert measures["pass@1"][0] == 0.5 and measures["pass@2"][0] == 1
    chat = f"Sure!\n```python\n{problems[1]['prompt']}{problems[1]['canonical_solution']}```"
    assert tasks.score_humaneval(problems[1:2], lambda prompt: [chat])[0]["pass@1"][0] == 1


@linux
def test_no_model_is_asked_where_programs_cannot_be_run(monkeypatch):
    problems, asked = tasks.read_humaneval(f"{tasks.SAMPLES}/humaneval.jsonl"), []
    source = sandbox._runner().replace("libc.unshare(", "(lambda flags: -1)(")
    monkeypatch.setattr(sandbox, "_runner", lambda: source)
    with pytest.raises(ValueError, match="--unconfined"):
        tasks.score_humaneval(problems, asked.append)
    assert not asked
    measures, items = tasks.score_humaneval(problems, asked.append, unconfined=True)
    assert asked == [problem["prompt"] for problem in problems] and measures["pass@1"][0] == 0
    assert {(item["n"], item["c"]) for item in items} == {(0, 0)}
    monkeypatch.setattr(sandbox, "_runner", lambda: "import nothing")
    with pytest.raises(ValueError, match="not even an empty program"):
        tasks.score_humaneval(problems, asked.append, unconfined=True)


def test_the_likeliest_choice_in_all_and_per_byte():
    questions = [{"question": "q", "choices": ["a", "a long one"], "answer": answer} for answer in (0, 1)]
    scores = {" a": -3.0, " a long one": -4.0}
    measures, items = tasks.score_choice(questions, lambda context, text: scores[text])
    assert [(item["likeliest"], item["per_byte"]) for item in items] == [(0, 1)] * 2
    assert measures["accuracy"][0] == measures["accuracy, per byte"][0] == 0.5
    measures, _ = tasks.score_choice(questions[:1], lambda context, text: None if "long" in text else 0.0)
    assert measures["accuracy"][0] == 0


def test_choices_are_read_in_both_forms():
    questions = tasks.read_choice(f"{tasks.SAMPLES}/choice.jsonl")
    answers = [question["choices"][question["answer"]] for question in questions]
    assert answers == ["honey", "an eagle", "rain", "the Sun", "water", "autumn"]
