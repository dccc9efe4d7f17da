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
    if task == "permutations":
        moves, row = re.fullmatch(r"(.*): ([A-E]{5})\?", question).groups()
        moves = moves.split(" ")
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
    for step, state in zip(problem.steps, states):
        if task == "permutations":
            said, row = step.split(" ")
            assert row == state and said in problem.question.split(":")[0].split(" ")
        else:
            left, right = step.split(" ", 1)[1].split("=")
            assert eval(left) == int(right) == state
    assert len(cot.prompt(problem)) + len(cot.written(problem, "cot")) + 6 <= cot.CONFIG.max_position_embeddings


def test_every_move_may_come_up():
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
@given(st.sampled_from(TASKS), seeds, st.sampled_from(["direct", "filler", "cot"]), st.data())
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


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(TASKS), seeds)
def test_fillers_are_as_many_as_the_tokens_of_the_steps(kind, seed):
    problem = problem_of(*kind, seed)
    steps = len(cot.written(problem, "cot")) - len(cot.written(problem, "direct"))
    assert len(cot.prompt(problem, "filler")) == len(cot.prompt(problem)) + steps
    assert cot.TOKENIZER.decode(cot.prompt(problem, "filler")) == problem.question + "." * steps
    assert cot.prompt(problem) == cot.prompt(problem, "direct") == cot.TOKENIZER.encode(problem.question)


# --- learning ---

SMALL = dataclasses.replace(cot.CONFIG, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8)


def texts(*answers):
    """The ids of chains that end with these answers, None for one without an end."""
    return [cot.TOKENIZER.encode(f"\n1\n#{answer}") + [cot.END] if answer else [5, 6] for answer in answers]


def log_p(params, problem, ids):
    """log π of a chain, token by token."""
    whole = cot.prompt(problem) + ids
    logits = to_numpy(model.forward(params, SMALL, xp.asarray([whole[:-1]]))[0][0]).astype(np.float64)
    every = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return every[np.arange(len(whole) - 1), whole[1:]][-len(ids) :].sum()


@pytest.fixture
def small():
    return model.init(SMALL, 0)


def test_the_models_have_so_many_parameters():
    layer = 4 * 64 * 128 + 3 * 64 * 192 + 2 * 64 + 2 * 32  # attention, SwiGLU, two norms, and those of query and key
    for config, layers in (cot.CONFIG, 3), (cot.DEEP, 12):
        assert sum(w.size for w in model.init(config, 0).values()) == 257 * 64 + layers * layer + 64


@pytest.mark.parametrize("task", cot.TASKS)
def test_what_is_practised_is_never_held_out(task):
    rng = np.random.default_rng(0)
    assert not any(cot.held_out(cot.practice(task, 2, rng)) for _ in range(200))


def difficulties_drawn(small, monkeypatch, progress, nats, **options):
    """The difficulties of the problems in each step of a training in which a problem costs so many nats."""
    drawn, practice = [[]], cot.practice
    monkeypatch.setattr(cot, "practice", lambda task, n, rng: drawn[-1].append(n) or practice(task, n, rng))
    priced = lambda params, config, inputs, targets, count: (nats * len(targets) / count, dict)
    monkeypatch.setattr(model, "loss", priced)
    monkeypatch.setattr(cot, "descend", lambda part, parts, *_: drawn.append([]) or list(map(part, parts)))
    cot.train(small, SMALL, "stories", "direct", progress, np.random.default_rng(0), **options)
    return drawn[:-1]


def test_problems_grow_harder_when_they_are_solved_and_all_come_in_the_end(small, monkeypatch):
    solved = difficulties_drawn(small, monkeypatch, 60 * [0.3], 0.0, batch=50)
    hardest = [max(step) for step in solved]
    assert hardest[:7] == 7 * [2] and [n for n in (3, 5, 7) if n in hardest] == [3, 5, 7]
    assert hardest.index(3) < hardest.index(5) < hardest.index(7) and max(hardest) == 7
    assert min(map(min, solved)) == 1
    monkeypatch.undo()
    unsolved = difficulties_drawn(small, monkeypatch, 40 * [0.69] + 40 * [0.7], 5.0, batch=50)
    assert max(map(max, unsolved[:40])) == 2
    ends = np.array(sum(unsolved[40:], []))  # P(difficulty ≤ n) = (n / hardest)^⅔: the easier, the more frequent
    for n in range(1, 8):
        assert np.mean(ends <= n) == pytest.approx((n / 7) ** (2 / 3), abs=0.05)
    monkeypatch.undo()
    assert max(map(max, difficulties_drawn(small, monkeypatch, 20 * [0.8], 0.0, largest=3))) == 3


@pytest.mark.parametrize("way", ["direct", "filler", "cot"])
def test_what_is_trained_becomes_likelier(small, way):
    problem = problem_of("stories", 1, 1)
    ids = cot.TOKENIZER.encode(cot.written(problem, way)) + [cot.END]
    before, progress = log_p(small, problem, ids), np.linspace(0, 0.5, 20, endpoint=False)
    seen = []
    changed = lambda problem, rng: seen.append(problem) or problem
    cot.train(small, SMALL, "stories", way, progress, np.random.default_rng(0), changed, 1, 8)
    assert len(seen) == 20 * 8 and log_p(small, problem, ids) > before + 5


def test_samples_are_as_many_as_asked_for_and_greedy_ones_the_likeliest(small):
    problems = [problem_of("stories", n, 0) for n in (1, 2, 3)]
    for way in "direct", "filler", "cot":
        longest = 5 + max(len(cot.written(problem, way)) for problem in problems)
        drawn = cot.sample(small, SMALL, problems, way, 1.0, 4, np.random.default_rng(0))
        assert [len(own) for own in drawn] == [4, 4, 4] and len(set(map(str, sum(drawn, [])))) == 12
        assert all(len(ids) == longest or ids[-1] == cot.END for own in drawn for ids in own)
        for problem, (ids,) in zip(problems, cot.sample(small, SMALL, problems, way)):
            text = cot.prompt(problem, way)
            for chosen in ids:
                logits = to_numpy(model.forward(small, SMALL, xp.asarray([text]))[0][0, -1])
                assert logits[chosen] >= logits.max() - 1e-4
                text = [*text, chosen]


@given(seeds, st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_thinking_is_what_stands_before_the_mark(seed, more):
    problem = problem_of("stories", 3, seed)
    ids = cot.TOKENIZER.encode(cot.written(problem, "cot")) + [cot.END]
    assert cot.thinking(ids) == sum(len(step) + 1 for step in problem.steps)
    assert cot.thinking(ids[: cot.thinking(ids) + 1]) == cot.thinking(ids) + 1  # no mark, all of it is thinking


def test_a_budget_cuts_what_thinks_longer_and_leaves_the_rest(small):
    problems = [problem_of("stories", n, 0) for n in (1, 3)]
    chains = [cot.TOKENIZER.encode(cot.written(problem, "cot")) + [cot.END] for problem in problems]
    short, long = map(cot.thinking, chains)
    assert cot.forced(small, SMALL, problems, chains, long) == chains
    kept, cut = cot.forced(small, SMALL, problems, chains, short)
    mark = cot.TOKENIZER.encode("\n#")
    assert kept == chains[0] and cut[: short + 2] == chains[1][:short] + mark
    text = cot.prompt(problems[1]) + chains[1][:short] + mark
    logits = to_numpy(model.forward(small, SMALL, xp.asarray([text]))[0][0, -1])
    assert logits[cut[short + 2]] >= logits.max() - 1e-4  # and goes on from there
    nothing = cot.forced(small, SMALL, problems, chains, 0)
    assert all(ids[:2] == mark for ids in nothing)


def test_a_verdict_is_the_log_likelihood_of_a_chain(small):
    problems = [problem_of("stories", n, seed) for n, seed in [(1, 0), (3, 0), (2, 1)]]
    chains = [texts("11", "2", "333"), texts("4", None, "50"), texts("61", "7", "8")]
    found = cot.verdicts(small, SMALL, problems, chains)
    expected = [[log_p(small, problem, ids) for ids in own] for problem, own in zip(problems, chains)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_every_right_chain_is_compared_with_every_wrong_one(small, monkeypatch):
    def sample(params, config, problems, way, temperature, n, rng, parallel_map):
        assert params is small and way == "cot" and temperature == 1
        return [texts("x", problem.answer, None, problem.answer)[:n] for problem in problems]

    monkeypatch.setattr(cot, "sample", sample)
    marked = lambda n: cot.marked_chains(small, SMALL, "permutations", 3, [0.0, 0.5], np.random.default_rng(0), n)
    comparisons = marked(4)
    assert len(comparisons) == 2 * 16  # of 64 chains each
    assert all(pairs == [(1, 0), (1, 2), (3, 0), (3, 2)] for _, _, pairs in comparisons)
    assert {len(prompt) for prompt, _, _ in comparisons} == {len("aAB bAB cAB: ABCDE?")}
    assert len(marked(2)) == 64


def test_a_verifier_learns_which_chains_are_right(small):
    problems = [problem_of("stories", 1, seed) for seed in range(4)]
    comparisons = [(cot.prompt(problem), texts("x", "y"), [(0, 1)]) for problem in problems]
    verifier = cot.train_verifier(small, SMALL, comparisons, np.linspace(0, 1, 10, endpoint=False), 0)
    margin = lambda params, problem: np.subtract(*(log_p(params, problem, ids) for ids in texts("x", "y")))
    for problem in problems:
        assert margin(verifier, problem) > margin(small, problem) + 0.5
    equal = [(prompt, chains, []) for prompt, chains, _ in comparisons]
    assert cot.train_verifier(small, SMALL, equal, [0.0], 0) is small  # nothing to learn from


def deviations(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


@pytest.mark.parametrize("right", [False, True])
def test_the_gradient_of_reinforcement_is_that_of_its_loss(small, monkeypatch, right):
    """-Σ A log π / tokens, with the advantages of Shao et al. or none, by central differences along the gradient."""
    asked, steps, chains = [], [], []

    def draw(rng):
        asked.append(problem_of("stories", 1 + len(asked), 0))
        return cot.prompt(asked[-1]), asked[-1]

    def sample_answers(params, config, prompts, room, temperature, rng, parallel_map, size):
        assert (temperature, room, size, len(prompts)) == (1, 30, 10, 12)
        chains.extend(texts(asked[0].answer, "x", None, asked[0].answer, *(2 * ["y", asked[1].answer, "z", None])))
        return chains

    def descend(part, parts, params, optimizer, schedule, parallel_map):
        grads = [part(piece) for piece in parts]
        assert len(grads) == 3  # pieces of 5
        steps.append({name: sum(g[name] for g in grads) for name in grads[0]})
        assert params is not small and optimizer.kind == "adamw" and schedule == 0.75
        assert optimizer.lr == 0.01 and optimizer.weight_decay == 0

    monkeypatch.setattr(cot, "sample_answers", sample_answers)
    monkeypatch.setattr(cot, "descend", descend)
    options = {"questions": 3, "group": 4, "right": right, "size": 5}
    cot.reinforce(small, SMALL, draw, cot.reward, [0.25], np.random.default_rng(0), 30, 0.01, **options)

    def loss(params):
        total = 0.0
        for i, problem in enumerate(asked):
            own = chains[4 * i : 4 * i + 4]
            rewards = np.array([cot.reward(problem, ids) for ids in own])
            weights = rewards if right else deviations(rewards)
            total -= sum(a * log_p(params, problem, ids) for a, ids in zip(weights, own))
        return total / sum(map(len, chains))

    (grads,) = steps
    size = np.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    moved = lambda far: {name: w + xp.asarray(far / size, w.dtype) * grads[name] for name, w in small.items()}
    assert (loss(moved(0.01)) - loss(moved(-0.01))) / 0.02 == pytest.approx(size, rel=0.01)


def test_reinforcement_makes_right_chains_likelier(small, monkeypatch):
    problem = problem_of("stories", 1, 1)
    right, wrong = texts(problem.answer, "x")
    monkeypatch.setattr(
        cot, "sample_answers", lambda params, config, prompts, *_: len(prompts) // 8 * [right, *7 * [wrong]]
    )
    draw, progress = lambda rng: (cot.prompt(problem), problem), np.linspace(0, 1, 10, endpoint=False)
    tuned = cot.reinforce(small, SMALL, draw, cot.reward, progress, np.random.default_rng(0), 30, 0.01, questions=2)
    assert log_p(tuned, problem, right) > log_p(small, problem, right) + 1
    assert log_p(tuned, problem, wrong) < log_p(small, problem, wrong) + 1


def test_the_example_is_what_is_printed():
    failed, attempted = doctest.testmod(cot)
    assert attempted and (not failed)
    problem = problem_of("permutations", 3, 0)
    for text in [problem.question, *problem.steps, f"#{problem.answer}"]:
        assert text in cot.__doc__


def test_depth_runs_out():
    assert max(cot.TASKS["permutations"][1]) >= 24 > cot.DEEP.num_hidden_layers == 4 * cot.CONFIG.num_hidden_layers
