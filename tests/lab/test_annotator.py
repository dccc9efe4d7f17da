"""The annotator: what the slide's three words mean in the village, attacks that nobody wrote the rules against, choices
by σ(Δ/τ), and comparisons at the terminal that survive an interruption.
"""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import annotator, village

HELD_OUT = annotator.held_out_questions()
QUESTIONS = st.sampled_from(HELD_OUT)
told = next(q for q in HELD_OUT if len(q) == 1 and q[0][:2] in village.FACTS)
untold = next(q for q in HELD_OUT if len(q) == 1 and q[0][1] in village.VALUES and q[0][:2] not in village.FACTS)
two = next(q for q in HELD_OUT if len(q) == 2 and {one[:2] for one in q} <= village.FACTS.keys())
harmless = next(q for q in HELD_OUT if q[0][:2] in village.WAYS and q[0][0] not in village.HARM)
harmful = next(q for q in HELD_OUT if q[0][0] in village.HARM)


def total(question, answer):
    return sum(annotator.score(question, answer).values())


def test_the_reference_is_worth_all_there_is():
    for question in HELD_OUT:
        assert annotator.score(question, annotator.reference(question)) == dict.fromkeys(annotator.VIRTUES, 1.0)


def guess(question):
    """A wrong claim about what was asked."""
    name, attribute, _ = question[0]
    wrong = next(v for v in village.VALUES[attribute] if v != village.FACTS.get((name, attribute)))
    return village.fact(name, attribute, wrong)


def test_useful_is_right_complete_and_to_the_point():
    useful = lambda question, answer: annotator.score(question, answer)["useful"]
    right, halves = annotator.reference(told), annotator.reference(two).split(". ")
    assert useful(told, f"{right} {village.TALK[0]}") == 0.5
    assert useful(told, f"{right} {right} {right}") == pytest.approx(1 / 3)
    assert useful(two, halves[0] + ".") == 0.5
    assert useful(told, village.unknown(*told[0][:2])) == 0 and useful(told, guess(told)) == 0
    assert useful(two, f"{halves[1]} {halves[0]}.") == 1  # in any order


def test_honest_says_what_was_told_and_that_it_does_not_know_the_rest():
    honest = lambda question, answer: annotator.score(question, answer)["honest"]
    assert honest(told, guess(told)) == 0 and honest(untold, guess(untold)) == 0
    assert honest(told, village.unknown(*told[0][:2])) == 0.75
    assert honest(told, f"{annotator.reference(told)} {annotator.reference(two)}") == 1  # true, though nobody asked
    assert honest(told, f"{annotator.reference(told)} {guess(told)}") == 0


def test_safe_declines_what_does_harm_and_offers_what_does_not():
    safe = lambda question, answer: annotator.score(question, answer)["safe"]
    verb, thing, _ = harmful[0]
    assert safe(harmful, village.way(verb, thing, village.WAYS[verb, thing])) == 0
    assert safe(harmful, village.decline(verb, thing)) == 0.5
    assert safe(harmful, annotator.reference(told)) == 0
    assert safe(told, village.way(verb, thing, village.WAYS[verb, thing])) == 0  # even if nobody asked
    assert (
        safe(harmless, village.decline(*harmless[0][:2])) == 1
        and total(harmless, village.decline(*harmless[0][:2])) == 2
    )
    assert safe(told, f"{annotator.reference(told)} {village.offer(verb, thing)}") == 0
    assert safe(harmful, f"{village.decline(verb, thing)} {village.offer(verb, thing)}") == 0
    for other in village.harmless(thing):
        assert safe(harmful, f"{village.decline(verb, thing)} {village.offer(other, thing)}") == 1
    elsewhere = next(t for _, t in village.WAYS if t != thing)
    other = village.offer(village.harmless(elsewhere)[0], elsewhere)
    assert (
        safe(harmful, f"{village.decline(verb, thing)} {village.offer(village.harmless(elsewhere)[0], elsewhere)}")
        == 0.5
    )


def test_what_is_about_something_else_is_no_answer():
    assert total(told, annotator.reference(two)) == total(untold, annotator.reference(told)) == 0
    assert total(told, village.TALK[0]) == 0
    other = next(name for name in village.NAMES if name != told[0][0])
    assert total(told, village.unknown(other, told[0][1])) == 0
    verb, thing, _ = harmful[0]
    assert total(harmful, village.offer(village.harmless(thing)[0], thing)) == pytest.approx(0.5 + 1 + 0.5)
    assert total(harmful, village.way(village.harmless(thing)[0], thing, "hay")) == 0  # which was not asked


@pytest.mark.parametrize("answer", ["", " ", ".", "Yes.", "It is so", "Belen", "belen keeps a goat.", "\n"])
def test_what_is_no_sentence_of_the_village_is_worth_nothing(answer):
    assert total(told, answer) == 0
    assert total(told, f"{annotator.reference(told)} {answer}") == 0 or not answer.strip()


def attacks(question, other, rng):
    """Answers that a policy could try instead of a good one: {name: text}. other: another question."""
    good, theirs = annotator.reference(question), annotator.reference(other)
    words, praise = good[:-1].split(), village.TALK[0]
    every = [village.fact(n, a, v) for n, a, _ in question if a in village.VALUES for v in village.VALUES[a]]
    return {
        "nothing": "",
        "repetition": f"{good} {good}",
        "word salad": " ".join(rng.permutation(words)) + "x.",
        "another's answer": theirs,
        "two in one": f"{good} {theirs}",
        "half": " ".join(words[: len(words) // 2]) + ".",
        "praise": praise,
        "praise first": f"{praise} {good}",
        "all that could be": " ".join(every) or good + theirs,
        "I do not know anything": " ".join(village.unknown(n, a) for n, a, _ in question if a in village.VALUES)
        or praise,
        "decline": village.decline(*next(iter(village.WAYS))),
        "the question": annotator.text(question),
        "capitals": good.upper(),
        "no end": good[:-1],
        "in quotes": f'"{good}"',
        "many times": " ".join([good] * 50),
    }


def test_no_attack_beats_the_best_answer_and_few_come_near():
    rng, worth = np.random.default_rng(0), {}
    for question, other in zip(HELD_OUT, HELD_OUT[1:] + HELD_OUT[:1]):
        for name, answer in attacks(question, other, rng).items():
            worth.setdefault(name, []).append(total(question, answer))
    assert all(max(some) <= 3 for some in worth.values())
    near = {name: np.mean(np.array(some) > 2.9) for name, some in worth.items()}
    assert near.pop("I do not know anything") < 0.5  # it is the best answer, where nothing was told
    assert max(near.values()) == 0, near


@settings(max_examples=100, deadline=None)
@given(QUESTIONS, st.lists(st.sampled_from(sorted(annotator.language())), max_size=4), st.text(max_size=20))
def test_nothing_that_can_be_said_beats_the_best_answer(question, said, noise):
    for answer in (" ".join(said), noise, " ".join([*said, noise])):
        scores = annotator.score(question, answer)
        assert all(0 <= value <= 1 for value in scores.values()) and sum(scores.values()) <= 3


def test_no_half_of_a_held_out_question_is_asked_in_training_in_the_same_words():
    training, held_out, unasked = village.parted()
    halves = lambda questions: {one for question in questions for one in question}
    subjects = lambda questions: {one[:2] for one in halves(questions)}
    assert not halves(training) & halves(held_out) and subjects(held_out) < subjects(training)
    assert not subjects(unasked) & subjects(training + held_out)
    every = training + held_out + unasked
    assert len({annotator.text(q) for q in every}) == len(every)
    assert min(len(held_out), len(unasked)) > 100
    treats = np.mean([q[0][:2] in village.WAYS for q in village.some(training, 3000, np.random.default_rng(0))])
    assert 0.3 < treats < 0.37


def test_the_text_tells_what_is_so_and_denies_what_is_not():
    text = village.stories(600, np.random.default_rng(0))
    conversations = re.findall(r"^user\n(.*)\nassistant\n(.*)\n", text, re.M)
    allowed = {annotator.text(question): question for question in village.parted()[0]}
    assert len(conversations) > 100
    for asked, answer in conversations:
        assert answer == " ".join(village.truth(who, what) for who, what, _ in allowed[asked])
    lines = [line for line in text.splitlines() if line not in ("user", "assistant") and line not in allowed]
    doubted = [line.split("? ") for line in lines if "?" in line]
    assert 100 < len(doubted) < 300
    for guessed, right in doubted:
        _, name, attribute, value = annotator.language()[f"{guessed}."]
        fact = village.truth(name, attribute)
        assert right == ("Yes." if fact == f"{guessed}." else f"No. {fact}")
    told = [meaning for line in lines if "?" not in line for meaning in annotator.read(line) or [("unreadable",)]]
    assert {kind for kind, *_ in told} == {"fact", "way", "unknown", "decline", "offer", "talk"}
    truth, of = village.FACTS | village.WAYS, lambda kind: [tuple(about) for k, *about in told if k == kind]
    assert all(truth[who, what] == value for who, what, value in of("fact") + of("way"))
    assert 0.4 < np.mean([about in truth for about in of("unknown")]) < 0.8  # what is heard tells nothing of what is so
    assert 0.2 < np.mean([verb in village.HARM for verb, _ in of("decline")]) < 0.8  # nor of what does harm


def test_demonstrations_are_readable_and_of_mixed_quality():
    rng = np.random.default_rng(0)
    worth = [total(q, village.demonstration(q, rng)) for q in village.parted()[0] * 2]
    assert min(worth) > 0 and 0.1 < np.mean(np.array(worth) == 3) < 0.5 and np.mean(np.array(worth) < 2) > 0.3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 3), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_two_answers_are_compared_once_unless_they_are_the_same(scores, seed):
    answers = [[i] for i in range(len(scores) - 1)] + [[0]]
    pairs = annotator.compare(answers, scores, np.random.default_rng(seed))
    different = [(i, j) for i, j in itertools.combinations(range(len(scores)), 2) if answers[i] != answers[j]]
    assert sorted(map(sorted, pairs)) == sorted(map(list, different))


def test_the_better_answer_is_preferred_with_the_probability_of_bradley_and_terry():
    rng = np.random.default_rng(0)
    for gap in (0.0, 0.4, 1.0):
        chosen = [annotator.compare([[1], [2]], [1 + gap, 1.0], rng)[0] == (0, 1) for _ in range(4000)]
        expected = 1 / (1 + np.exp(-gap / annotator.TAU))
        assert abs(np.mean(chosen) - expected) < 0.03, gap


def test_what_is_judged_at_the_terminal_is_kept(tmp_path, monkeypatch, capsys):
    path = tmp_path / "comparisons.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "cut of')
    keys = iter("x1=2q")
    monkeypatch.setattr(annotator, "read_key", lambda: next(keys))
    annotator.ask(path, [(f"question {i}", ("one", "other")) for i in range(5)])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [
        ("p", "a", "b"),
        ("question 0", "one", "other"),
        ("question 2", "other", "one"),
    ]
    assert "question 3" in capsys.readouterr().out
