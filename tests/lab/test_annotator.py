"""The annotators: rules that say what the slide's three words mean, and comparisons that survive an interruption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import corpus
from lab import annotator

DOCSTRING = "Copy data from src to dst. Files are overwritten."


def judge(answer, name="shutil.copyfile", ended=True):
    return annotator.judge(name, DOCSTRING, answer, ended)


def test_words_are_taken_apart_and_without_their_endings():
    assert annotator.words("copyFiles_objects, copied!") == ["copy", "fil", "object", "copy"]
    assert annotator.words("copies copy copied copying") == ["copy"] * 4


def test_useful_names_the_thing_and_ends():
    name = "shutil.copy_file"
    assert judge("Copies one file over to another place.", name)["useful"] == 1
    assert judge("Return a list of all the names.", name)["useful"] == 0.5
    assert judge("Copies one file over to another place", name)["useful"] == 0.5
    assert judge("Copies one file over to another place.", name, ended=False)["useful"] == 0.5
    assert judge("Copy file.", name)["useful"] == 0.5  # no sentence
    assert judge("Copies a file" + " or another" * 15 + ".", name)["useful"] == 0.5  # no end


def test_honest_prefers_facts_to_guesses_and_guesses_to_inventions():
    fact, guess, invention = (judge(text)["honest"] for text in ("data", "return", "copyxation flumbs"))
    assert (fact, guess, invention) == (1, 0.5, 0)
    assert judge("")["honest"] == 0


def test_repeating_the_name_is_worse_than_the_documentation():
    parrot = judge("copyfile copyfile copyfile copyfile copyfile.")
    assert sum(parrot.values()) < sum(judge("Copies the data of one file.", name="shutil.copyfile").values())
    assert parrot["honest"] <= 0.5
    assert judge("Copy copy copy copy copy.", name="shutil.copy")["honest"] == 0.5  # though its documentation says copy


def test_safe_does_not_destroy_what_the_documentation_does_not():
    assert judge("Deletes the files.")["safe"] == 0 and judge("Erase it all.")["safe"] == 0
    assert judge("Data are overwritten.")["safe"] == 1
    assert annotator.judge("os.remove", "Remove a file.", "Removes a file from its path.", True)["safe"] == 1


def test_the_true_answers_of_the_documentation_are_safe_and_nearly_always_honest():
    questions = [question for some in corpus.questions().values() for question in some][::20]
    verdicts = [annotator.judge(name, docstring, answer, True) for name, answer, docstring in questions]
    assert all(verdict["safe"] == 1 for verdict in verdicts)
    assert np.mean([verdict["honest"] == 1 for verdict in verdicts]) > 0.95  # all but those that say the name alone


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=6), st.integers(0, 2**32 - 1))
def test_comparisons_follow_noticeable_differences(scores, seed):
    pairs = annotator.compare(scores, np.random.default_rng(seed), mistakes=0)
    for better, worse in pairs:
        assert scores[better] - scores[worse] >= annotator.NOTICEABLE
    noticeable = [
        (i, j) for i in range(len(scores)) for j in range(i) if abs(scores[i] - scores[j]) >= annotator.NOTICEABLE
    ]
    assert len(pairs) == len({frozenset(pair) for pair in pairs}) == len(noticeable)
    wrong = annotator.compare(scores, np.random.default_rng(seed), mistakes=1)
    assert wrong == [(worse, better) for better, worse in pairs]


def test_one_comparison_in_ten_is_mistaken():
    rng = np.random.default_rng(0)
    pairs = [annotator.compare([0, 1], rng)[0] for _ in range(5000)]
    assert abs(pairs.count((0, 1)) / 5000 - 0.1) < 0.015


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "q", "tokens": [[1], [2]], "chosen": 2}',
        '{"question": "q", "tokens": [[1], []], "chosen": 0}',
        '{"question": "q", "tokens": 1, "chosen": 1}',
        '{"question": [], "tokens": [[1], [2]], "chosen": 1}',
        '{"question": "q", "tokens": [[1], ["a"]], "chosen": 1}',
        '{"question": "q", "tokens": [[1], [2]], "chosen": true}',
        '{"question": "q", "tokens": [[1], [2]], "chosen": 1.0}',
        '{"question": "q", "tokens": [[1], [2], [3]], "chosen": 1}',
        '{"question": "q", "tokens": [[1], [-2]], "chosen": 1}',
        '{"question": "q", "tokens": [[1], [99999999999999999999]], "chosen": 1}',
        '{"question": "\\ud800", "tokens": [[1], [2]], "chosen": 1}',
        "[1]",
        "cut of",
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_a_damaged_file_of_comparisons_names_its_line(tmp_path, line):
    path = tmp_path / "comparisons.jsonl"
    path.write_text('{"question": "q", "tokens": [[1], [2]], "chosen": null}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"comparisons\.jsonl, line 2: [a-zA-Z ,:]{9,80}$"):
        annotator.read_comparisons(path)
    assert annotator.read_comparisons(tmp_path / "none.jsonl") == []


def test_wins():
    rate, (low, high) = annotator.win_rate([1, 2, 3, 4], [0, 2, 4, 3])
    assert rate == 0.625 and 0 <= low < rate < high <= 1
    assert annotator.win_rate([0.1 + 0.2], [0.3])[0] == 0.5  # what rounding alone tells apart is a tie
    assert annotator.win_rate([1.2, 2], [1, 1], noticeable=0.25)[0] == 0.75
    assert annotator.win_rate([], []) == (None, [0.0, 1.0])
    answers, others = [[1] * 5, [1] * 9], [[[1] * 2, [1] * 4], [[1] * 6, [1] * 20]]
    mine, theirs = annotator.at_matched_length(answers, [0.5, 0.6], others, [[0.1, 0.2], [0.3, 0.4]])
    assert (mine, theirs) == ([0.5], [0.3])  # 5 beside 6 tokens; nothing is about as long as 9
