"""RLHF: losses against central differences, PPO against the policy gradient, DPO against its closed-form optimum."""

import io
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
import model
import policy
import rlhf
import train
from engine import to_numpy, xp
from layers import IGNORE, softmax
from optim import Optimizer

ROOT = Path(__file__).parents[1]
CONFIG = model.Config(
    model_type="llama",
    vocab_size=12,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=24,
    eos_token_id=0,
)
seeds = st.integers(0, 2**32 - 1)


def random_rows(seed, count=4):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 12, rng.integers(low, high)).tolist()
    return [draw(1, 5) for _ in range(count)], [draw(1, 6) for _ in range(count)]


def with_head(seed, dtype=np.float64):
    params = model.init(CONFIG, seed, dtype)
    return {n: 8 * w if w.ndim == 2 else w for n, w in params.items()} | {
        "score.weight": normal(seed, 1, 8, dtype=dtype)
    }


# --- the losses ---


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), seeds)
def test_the_gradient_of_every_loss(n, seed):
    one, other, third, fourth = (normal(seed + i, n) for i in range(4))
    check(rlhf.bradley_terry, one, other)
    check(lambda c, r: rlhf.dpo_loss(c, r, third, fourth, beta=0.3), one, other)
    check(lambda v: rlhf.value_loss(v, other), one)
    check(lambda log_p: rlhf.kl_loss(log_p, other), one)
    # the clipped loss has corners: where a ratio is near one of them, differences cannot tell its side
    ratio = xp.exp(one - other)
    smooth = (abs(ratio - 0.8) > 1e-3) & (abs(ratio - 1.2) > 1e-3)
    check(lambda log_p: rlhf.ppo_loss(log_p, other[smooth], third[smooth]), one[smooth])


def test_bradley_terry_is_the_likelihood_of_the_choice():
    losses, _ = rlhf.bradley_terry(xp.asarray([2.0, -800.0]), xp.asarray([0.0, 800.0]))
    close(losses, [np.log(1 + np.exp(-2.0)), 1600.0])  # and does not overflow


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), seeds)
def test_ppo_with_one_epoch_and_no_clipping_is_the_policy_gradient(batch, time, seed):
    log_p, advantages = normal(seed, batch, time), normal(seed + 1, batch, time)
    _, backward = rlhf.ppo_loss(log_p, log_p, advantages, clip=np.inf)
    weights = abs(normal(seed + 2, batch, time))
    close(backward(weights), -advantages * weights)  # of -A log π


def test_the_clipped_loss_stops_where_the_ratio_went_far_enough():
    log_p = xp.log(xp.asarray([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = xp.asarray([1.0, -1.0, 1.0, -1.0, 1.0])
    losses, backward = rlhf.ppo_loss(log_p, xp.zeros(5), advantages, clip=0.2)
    close(losses, [-1.2, 1.5, -0.5, 0.8, -1.1])
    close(backward(xp.ones(5)), [0, 1.5, -0.5, 0, -1.1])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), seeds)
def test_the_estimate_of_the_kl_has_the_kl_as_its_mean(n, seed):
    p, q = (softmax(normal(seed + i, n))[0] for i in range(2))
    estimates, _ = rlhf.kl_loss(xp.log(p), xp.log(q))
    assert float(estimates.min()) >= 0
    assert float((p * estimates).sum()) == pytest.approx(float((p * xp.log(p / q)).sum()))


@settings(max_examples=5, deadline=None)
@given(st.integers(3, 5), st.floats(0.3, 2.0), seeds)
def test_dpo_and_bradley_terry_find_the_optimum_of_the_toy(n, beta, seed):
    """All pairs of n answers, with the true probabilities of preferring one: the reward model finds r up to a constant,
    DPO the policy π₀ exp(r / β) / Z, and its implicit reward is that of the reward model.
    """
    reward, before = normal(seed, n), xp.log(softmax(normal(seed + 1, n))[0])
    better, worse = xp.asarray([(i, j) for i in range(n) for j in range(n) if i != j]).T
    preferred = 1 / (1 + xp.exp(reward[worse] - reward[better]))

    def descend(loss_of, x, steps=4000, rate=0.5):
        for _ in range(steps):
            y, y_backward = loss_of(x)
            _, backward = y
            dy = xp.zeros(n)
            for rows, d in zip((better, worse), backward(preferred)):
                xp.add.at(dy, rows, d)
            x = x - rate / n * y_backward(dy)
        return x

    learned = descend(lambda r: (rlhf.bradley_terry(r[better], r[worse]), lambda dr: dr), xp.zeros(n))
    close(learned - learned.mean(), reward - reward.mean(), 1e-4)

    def log_softmax(logits):
        p, _ = softmax(logits)
        return xp.log(p), lambda dlog_p: dlog_p - p * dlog_p.sum()

    def dpo(logits):
        log_p, log_p_backward = log_softmax(logits)
        pairs = log_p[better], log_p[worse], before[better], before[worse]
        return rlhf.dpo_loss(*pairs, beta), log_p_backward

    log_p, _ = log_softmax(descend(dpo, before, rate=0.5 / beta**2))
    optimum, _ = softmax(before + reward / beta)
    close(xp.exp(log_p), optimum, 1e-4)
    implied = beta * (log_p - before)
    close(implied - implied.mean(), learned - learned.mean(), 1e-3)


# --- advantages ---


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1), seeds)
def test_generalised_advantages_are_their_sum(batch, time, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.standard_normal((2, batch, time))
    first = rng.integers(0, time, batch)
    last = np.array([rng.integers(f, time) for f in first])
    answered = (np.arange(time) >= first[:, None]) & (np.arange(time) <= last[:, None])
    found = rlhf.generalised_advantages(rewards, values, answered, gamma, lam)
    for b in range(batch):
        for t in range(time):
            expected, after = 0.0, last[b] + 1
            for s in range(t, after) if answered[b, t] else ():
                following = values[b, s + 1] if s + 1 < after else 0.0
                expected += (gamma * lam) ** (s - t) * (rewards[b, s] + gamma * following - values[b, s])
            assert found[b, t] == pytest.approx(expected)


def test_group_advantages_compare_with_the_others_only():
    found = rlhf.group_advantages(np.array([1.0, 3.0, 7.0, 7.0, -5.0, -9.0]), 2)
    np.testing.assert_allclose(found, [-1, 1, 0, 0, 1, -1], atol=1e-3)


# --- what a model says of an answer ---


@settings(max_examples=5, deadline=None)
@given(seeds)
def test_the_gradients_of_both_heads(seed):
    params = with_head(seed)
    inputs, targets = map(xp.asarray, policy.as_rows(*random_rows(seed)))
    for function in policy.log_likelihoods, policy.rewards, policy.values, policy.policy_and_values:
        check(lambda p, f=function: f(p, CONFIG, inputs, targets), params, coordinates=6, directions=2)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_log_likelihood_and_reward_do_not_depend_on_the_rows_beside(seed):
    params, (prompts, answers) = with_head(seed), random_rows(seed, 7)
    for function in policy.log_likelihoods, policy.rewards:
        whole = policy.evaluate(function, params, CONFIG, *policy.as_rows(prompts, answers))
        for i in range(7):
            alone, _ = function(
                params, CONFIG, *map(xp.asarray, policy.as_rows(prompts[i : i + 1], answers[i : i + 1]))
            )
            assert whole[i] == pytest.approx(float(alone[0]))
        pieces = policy.pieces(*policy.as_rows(prompts, answers), size=3)
        assert sorted(row for rows, *_ in pieces for row in rows) == list(range(7))


def test_the_last_token_counts_for_the_reward():
    params = with_head(0)
    rows = policy.as_rows([[1, 2], [1, 2]], [[3, 4], [3, 5]])
    one, other = policy.evaluate(policy.rewards, params, CONFIG, *rows)
    assert abs(one - other) > 1e-6


def test_the_reward_is_the_mean_value_of_the_answers_tokens():
    params, prompt, answer = with_head(0), [1, 2, 3], [4, 5, 6, 0]
    inputs, targets = map(xp.asarray, policy.as_rows([prompt], [answer]))
    v, _ = policy.values(params, CONFIG, xp.asarray([prompt + answer]), None)
    r, _ = policy.rewards(params, CONFIG, inputs, targets)
    close(r, v[:, len(prompt) :].mean(axis=1))


def test_answers_end_and_do_not_depend_on_the_threads():
    params, prompts = with_head(1, np.float32), [[1 + i % 11] * (1 + i % 3) for i in range(9)]
    draw = lambda parallel_map: policy.sample_answers(
        params, CONFIG, prompts, 8, 1.0, np.random.default_rng(3), parallel_map, size=4
    )
    answers = draw(map)
    with train.thread_pool(2) as pool:
        assert draw(pool.map) == answers
    assert all(0 not in answer[:-1] and (answer[-1] == 0 or len(answer) == 8) for answer in answers)
    assert len({tuple(answer) for answer in answers}) > 1


# --- learning ---


def progress(steps):
    return (i / steps for i in range(steps))


@pytest.mark.parametrize("method", ["ppo", "grpo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_reinforcement_raises_the_reward_within_the_kl(method, seed):
    """The reward is the share of one token in the answer, which at first is one in twelve."""
    params = model.init(CONFIG, seed)
    reward = lambda which, answers: np.array([answer.count(5) / len(answer) for answer in answers])
    sizes = {"ppo": {"batch": 64}, "grpo": {"questions": 8, "group": 8}}[method]
    options = {"lr": 0.01, "max_new_tokens": 6, "seed": seed, "target_kl": 3.0}
    tuned, history = getattr(rlhf, method)(params, CONFIG, [[1], [2, 3]], reward, progress(40), **sizes, **options)
    assert history[0]["reward"] < 0.2 and history[-1]["reward"] > 0.4
    assert history[0]["kl"] == pytest.approx(0, abs=1e-4) and 0.5 < history[-1]["kl"] < 6
    close(params["model.norm.weight"], np.ones(8))  # where it began is left as it was
    assert all(np.isfinite(to_numpy(w)).all() for w in tuned.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_comparisons_teach_a_reward_model_and_a_policy(seed):
    """The better answer is the one with more fives."""
    rng, params = np.random.default_rng(seed), model.init(CONFIG, seed)

    def comparisons(count):
        made = []
        for _ in range(count):
            answers = [rng.integers(1, 12, rng.integers(3, 6)).tolist() + [0] for _ in range(4)]
            fives = [answer.count(5) for answer in answers]
            pairs = [(i, j) for i in range(4) for j in range(4) if fives[i] > fives[j]]
            made.append(([1, 2], answers, pairs))
        return made

    some = comparisons(200)
    rewarding = rlhf.train_reward_model(params, CONFIG, some, progress(60), lr=0.02)
    right, count = rlhf.accuracy_of(rewarding, CONFIG, comparisons(50))
    assert count > 50 and right > 0.9
    tuned = rlhf.dpo(params, CONFIG, some, progress(40), lr=0.02)
    rows = list(map(xp.asarray, policy.as_rows([[1, 2]], [[5, 5, 0]])))
    before, after = (float(policy.log_likelihoods(p, CONFIG, *rows)[0][0]) for p in (params, tuned))
    assert after > before + 1


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_penalty_holds_the_policy_back(method):
    params = model.init(CONFIG, 0)
    reward = lambda which, answers: np.array([answer.count(5) / len(answer) for answer in answers])
    sizes = {"ppo": {"batch": 64}, "grpo": {"questions": 8, "group": 8}}[method]
    kls = []
    for target in None, 0.3:
        options = {"lr": 0.01, "max_new_tokens": 6, "target_kl": target}
        _, history = getattr(rlhf, method)(params, CONFIG, [[1], [2, 3]], reward, progress(40), **sizes, **options)
        kls.append(history[-1]["kl"])
    assert kls[1] < 0.8 < 2 < kls[0]


def test_the_step_on_comparisons_is_along_the_mean_over_all_pairs(monkeypatch):
    params = with_head(0)
    comparisons = [
        ([1, 2], [[3, 0], [4, 5, 0], [6, 0]], [(0, 1), (0, 2), (2, 1)]),
        ([7], [[8, 0], [9, 9]], [(1, 0)]),
    ]
    found = {}

    def descend(part, parts, *_):
        for grads in map(part, parts):
            found.update({name: found.get(name, 0) + g for name, g in grads.items()})

    monkeypatch.setattr(rlhf, "descend", descend)
    loss = lambda chosen, rejected, *_: rlhf.bradley_terry(chosen, rejected)
    questions = [(*comparison, [0.0] * len(comparison[1])) for comparison in comparisons]
    rlhf.learn_from_comparisons(policy.rewards, loss, params, CONFIG, questions, progress(1), 0.1, batch=2)

    expected = {name: 0 for name in params}
    pairs = [(prompt, answers[i], answers[j]) for prompt, answers, pairs in comparisons for i, j in pairs]
    for prompt, better, worse in pairs:
        rows = map(xp.asarray, policy.as_rows([prompt, prompt], [better, worse]))
        r, backward = policy.rewards(params, CONFIG, *rows)
        _, loss_backward = rlhf.bradley_terry(r[:1], r[1:])
        for name, g in backward(xp.concatenate(loss_backward(xp.ones(1) / len(pairs)))).items():
            expected[name] = expected[name] + g
    for name in params:
        close(found[name], expected[name])


# --- the command line ---


def test_a_step_holds_few_gradients_however_many_it_adds():
    class Gradients(dict):  # which, unlike a dict, can be watched
        pass

    existing, most, params = 0, 0, {"w": xp.zeros(2)}

    def gone():
        nonlocal existing
        existing -= 1

    def part(x):
        nonlocal existing, most
        grads = Gradients(w=xp.full(2, float(x)))
        weakref.finalize(grads, gone)
        existing += 1
        most = max(most, existing)
        return grads

    policy.descend(part, range(9), params, Optimizer("adamw", 0.1))
    assert most <= 3 and (params["w"] != 0).all()  # the sum, the last one added, and the next


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlhf") / "base"
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "vocab": 300, "batch": 4, "steps": 3, "context": 160}
    path = folder.parent / "text.txt"
    path.write_text("What does it do? Return the name of the file.\n" * 400)
    train.train(train.Run(train.complete(sizes | {"data": [str(path)]}), str(folder)))
    return folder


def command(*arguments):
    environment = {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "rlhf.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=200)


def test_the_whole_chain_in_seconds(base, tmp_path, capsys):
    rlhf.main(["--init", str(base), "--out", str(tmp_path / "out"), "--minutes", "0.1"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 <= summary["reward_model_accuracy"] <= 1 and 0 <= summary["reward_model_accuracy_noisy"] <= 1
    assert list(summary["methods"]) == ["ppo", "dpo", "grpo"]
    for name, method in summary["methods"].items():
        low, high = method["win_rate_95"]
        assert 0 <= low <= method["win_rate"] <= high <= 1 and method["seconds"] > 0 and method["answer_length"] >= 1
        assert {"win_rate_at_matched_length", "kl"} <= method.keys()
        params, config = model.load(tmp_path / "out" / name)
        assert "score.weight" not in params
    assert (tmp_path / "out" / "overoptimisation.png").stat().st_size > 1000
    assert "talk to one" in capsys.readouterr().out


def test_a_human_is_asked_and_an_interrupted_session_goes_on(base, tmp_path, capsys, monkeypatch):
    def session(keys):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        rlhf.main(["--human", "--init", str(base), "--out", str(tmp_path / "out"), "--minutes", "0.05"])
        return [json.loads(line) for line in path.read_text().splitlines()]

    path = tmp_path / "out" / "comparisons.jsonl"
    made = session("1x2=")  # and the input ends; x is no answer
    assert [c["chosen"] for c in made] == [0, 1, None]
    assert all(len(c["answers"]) == len(c["tokens"]) == 2 for c in made)
    assert "learned from 2 comparisons" in capsys.readouterr().out
    with path.open("a") as file:
        file.write('{"question": "cut off')
    again = session("2q")
    assert again[:3] == made and len(again) == 4 and len({c["question"] for c in again}) == 4
    model.load(tmp_path / "out" / "human")
    assert bpe.load(tmp_path / "out" / "human" / "tokenizer.json").special


@pytest.mark.parametrize("bad", [["--minutes", "0"], ["--init", "nowhere"], ["--threads", "0"], ["--seed", "-1"]])
def test_bad_input_is_one_sentence(bad, tmp_path):
    done = command(*bad, "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(base, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = command("--init", base, "--out", tmp_path)
    assert done.returncode == 1 and "holds something already" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_targets_are_the_answer():
    inputs, targets = policy.as_rows([[1, 2, 3], [4]], [[5, 0], [6, 7, 0]])
    assert inputs.tolist() == [[1, 2, 3, 5], [4, 6, 7, 0]]
    assert targets.tolist() == [[IGNORE, IGNORE, 5, 0], [6, 7, 0, IGNORE]]
