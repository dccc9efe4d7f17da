"""cot.py: problems are right and apart, answers are judged exactly, and what is learned from chains is what it says."""

import dataclasses
import doctest
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cot
import model
from engine import to_numpy, xp

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


def test_every_number_and_every_move_may_come_up():
    drawn = [problem_of("addition", 2, seed).question[:-1].split("+") for seed in range(1000)]
    assert {int(a) for a, _ in drawn} == {int(b) for _, b in drawn} == set(range(10, 100))
    found = {(words, signs): after for (words, signs), after in cot.changes(10)}
    assert found == {
        **{(f"finds {k}", f"+{k}"): 10 + k for k in (1, 2, 3, 4, 5)},
        **{(f"loses {k}", f"-{k}"): 10 - k for k in (1, 2, 3, 4, 5)},
        ("doubles", "*2"): 20,
        ("halves", "/2"): 5,
    }
    assert [after for _, after in cot.changes(0)] == [1, 2, 3, 4, 5, 0, 0]
    assert max(after for _, after in cot.changes(17)) == 20 and "halves" not in str(cot.changes(17))
    assert {move for move, _ in cot.swaps("CAB")} == {"AB", "BA", "AC", "CA", "BC", "CB"}


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
    assert cot.reward(problem, ids) == 1
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
        assert cot.reward(problem, changed) == 0


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


# --- learning ---

SMALL = dataclasses.replace(cot.CONFIG, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8)


def texts(*answers):
    """The ids of chains that end with these answers, None for one without an end."""
    return [cot.TOKENIZER.encode(f"\n1\n#{answer}") + [cot.END] if answer else [5, 6] for answer in answers]


def log_p(params, problem, ids):
    """log π of a chain, token by token."""
    whole = cot.prompt(problem) + ids
    logits = to_numpy(model.forward(params, cot.CONFIG, xp.asarray([whole[:-1]]))[0][0]).astype(np.float64)
    every = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return every[np.arange(len(whole) - 1), whole[1:]][-len(ids) :].sum()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cot, "CONFIG", SMALL)
    return model.init(SMALL, 0)


def test_the_model_has_so_many_parameters():
    layer = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 32  # attention, SwiGLU, two norms, and those of query and key
    assert sum(w.size for w in model.init(cot.CONFIG, 0).values()) == 257 * 64 + 3 * layer + 64


@pytest.mark.parametrize("task", cot.TASKS)
def test_what_is_practised_is_never_held_out(task):
    rng = np.random.default_rng(0)
    assert not any(cot.held_out(cot.practice(task, 2, rng)) for _ in range(200))


@pytest.mark.parametrize("largest, hardest", [(None, 7), (3, 3)])
def test_training_grows_harder_and_stays_mostly_easy(small, monkeypatch, largest, hardest):
    drawn, practice = [], cot.practice
    monkeypatch.setattr(cot, "practice", lambda task, n, rng: drawn.append(n) or practice(task, n, rng))
    before = {name: xp.array(w) for name, w in small.items()}
    progress = [0.0, 0.05] + 30 * [0.39] + 30 * [0.41, 0.9]
    cot.train(small, "addition", "direct", progress, np.random.default_rng(0), largest)
    rounds = [drawn[i : i + 12] for i in range(0, len(drawn), 12)]
    assert len(drawn) == 12 * len(progress) and min(drawn) == 1
    assert max(rounds[0] + rounds[1]) == 2 and max(drawn) == hardest
    ends = np.array(sum(rounds[32:], []))  # P(difficulty ≤ n) = (n / hardest)^⅔: the easier, the more frequent
    for n in range(1, hardest + 1):
        assert np.mean(ends <= n) == pytest.approx((n / hardest) ** (2 / 3), abs=0.05)
    assert all(float(abs(small[name] - w).max()) > 0 for name, w in before.items())


@pytest.mark.parametrize("way", ["direct", "cot"])
def test_what_is_trained_becomes_likelier(small, way):
    problem = problem_of("addition", 1, 1)
    ids = cot.TOKENIZER.encode(cot.written(problem, way)) + [cot.END]
    before = log_p(small, problem, ids)
    cot.train(small, "addition", way, np.linspace(0, 0.5, 20, endpoint=False), np.random.default_rng(0), 1)
    assert log_p(small, problem, ids) > before + 10


def test_samples_are_as_many_as_asked_for_and_greedy_ones_the_likeliest(small):
    problems = [problem_of("addition", n, 0) for n in (1, 2, 3)]
    for way in "direct", "cot":
        longest = 5 + max(len(cot.written(problem, way)) for problem in problems)
        drawn = cot.sample(small, problems, way, 1.0, 4, np.random.default_rng(0))
        assert [len(own) for own in drawn] == [4, 4, 4] and len(set(map(str, sum(drawn, [])))) == 12
        assert all(len(ids) == longest or ids[-1] == cot.END for own in drawn for ids in own)
        for problem, (ids,) in zip(problems, cot.sample(small, problems, way)):
            text = cot.prompt(problem)
            for chosen in ids:
                logits = to_numpy(model.forward(small, SMALL, xp.asarray([text]))[0][0, -1])
                assert logits[chosen] >= logits.max() - 1e-4
                text = [*text, chosen]


def test_the_best_of_several_chains_is_the_one_the_verifier_finds_likeliest(small):
    problems = [problem_of("addition", n, seed) for n, seed in [(1, 0), (3, 0), (2, 1)]]
    chains = [texts("11", "2", "333"), texts("4", None, "50"), texts("61", "7", "8")]
    chosen = cot.best_of(small, problems, chains)
    for problem, own, answer in zip(problems, chains, chosen):
        likely = [log_p(small, problem, ids) for ids in own]
        assert answer == cot.answer_in(own[int(np.argmax(likely))])


def test_every_right_chain_is_compared_with_every_wrong_one(small, monkeypatch):
    def sample(params, problems, way, temperature, n, rng, parallel_map):
        assert params is small and way == "cot" and temperature == cot.TEMPERATURE
        return [texts("x", problem.answer, None, problem.answer)[:n] for problem in problems]

    monkeypatch.setattr(cot, "sample", sample)
    comparisons = cot.marked_chains(small, "addition", [0.0, 0.5], np.random.default_rng(0))
    assert len(comparisons) == 2 * 64  # of 256 chains each
    assert all(pairs == [(1, 0), (1, 2), (3, 0), (3, 2)] for _, _, pairs in comparisons)
    lengths = {len(prompt) for prompt, _, _ in comparisons}
    assert lengths == {len("12+34?") + 2 * more for more in range(5)}  # none of the easiest, where little goes wrong
    assert len(cot.marked_chains(small, "addition", [0.0], np.random.default_rng(0), n=2)) == 128


def test_a_verifier_learns_which_chains_are_right(small):
    problems = [problem_of("addition", 1, seed) for seed in range(4)]
    comparisons = [(cot.prompt(problem), texts("x", "y"), [(0, 1)]) for problem in problems]
    verifier = cot.train_verifier(small, comparisons, np.linspace(0, 1, 10, endpoint=False), 0)
    margin = lambda params, problem: np.subtract(*(log_p(params, problem, ids) for ids in texts("x", "y")))
    for problem in problems:
        assert margin(verifier, problem) > margin(small, problem) + 0.5
    equal = [(prompt, chains, []) for prompt, chains, _ in comparisons]
    assert cot.train_verifier(small, equal, [0.0], 0) is small  # nothing to learn from


def test_the_gradient_of_reinforcement_is_that_of_its_loss(small, monkeypatch):
    """-Σ A log π / tokens, with the advantages of Shao et al., by central differences along the gradient."""
    asked, steps = [], []
    marked = lambda problem, last: texts(problem.answer, "x", None, last)

    def sample(params, problems, way, temperature, n, rng, parallel_map):
        assert way == "cot" and temperature == 1 and (len(problems), n) == (3, 4)
        asked.extend(problems)
        return list(map(marked, problems, [problems[0].answer, "y", None]))

    def descend(part, parts, params, optimizer, schedule, parallel_map):
        grads = [part(piece) for piece in parts]
        steps.append({name: sum(g[name] for g in grads) for name in grads[0]})
        assert params is not small and optimizer.kind == "adamw" and schedule == 0.75
        assert optimizer.lr == 0.01 and optimizer.weight_decay == 0

    monkeypatch.setattr(cot, "sample", sample)
    monkeypatch.setattr(cot, "descend", descend)
    cot.reinforce(small, "addition", [1, 3], [0.25], np.random.default_rng(0), 0.01, questions=3, group=4)
    assert {len(problem.steps) for problem in asked} <= {1, 3}
    chains = cot.sample(small, asked, "cot", 1.0, 4, None, map)

    def loss(params):
        total, tokens = 0.0, 0
        for problem, own in zip(asked, chains):
            rewards = np.array([cot.reward(problem, ids) for ids in own])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            total -= sum(a * log_p(params, problem, ids) for a, ids in zip(advantages, own))
            tokens += sum(map(len, own))
        return total / tokens

    (grads,) = steps
    size = np.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    moved = lambda far: {name: w + xp.asarray(far / size, w.dtype) * grads[name] for name, w in small.items()}
    assert (loss(moved(0.01)) - loss(moved(-0.01))) / 0.02 == pytest.approx(size, rel=0.01)


def test_reinforcement_makes_right_chains_likelier(small, monkeypatch):
    draw = lambda params, problems, *_: [texts(*([p.answer] + 7 * ["x"])) for p in problems]
    monkeypatch.setattr(cot, "sample", draw)
    monkeypatch.setitem(cot.TASKS, "addition", (lambda n, rng: cot.addition(1, np.random.default_rng(1)), [1]))
    tuned = cot.reinforce(small, "addition", [1], np.linspace(0, 1, 10, endpoint=False), np.random.default_rng(0), 0.01)
    problem = cot.practice("addition", 1, None)
    right, wrong = texts(problem.answer, "x")
    assert log_p(tuned, problem, right) > log_p(small, problem, right) + 1
    assert log_p(tuned, problem, wrong) < log_p(small, problem, wrong) + 1


def test_the_example_is_what_is_printed():
    failed, attempted = doctest.testmod(cot)
    assert attempted and (not failed)


def test_the_difficulties_are_those_of_the_readme():
    assert {task: difficulties for task, (_, difficulties) in cot.TASKS.items()} == {
        "addition": [1, 2, 3, 4, 5, 6],
        "permutations": [1, 2, 3, 4, 6, 8, 10],
        "stories": [1, 2, 3, 4, 5, 6],
    }
