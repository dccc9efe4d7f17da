"""RLHF: losses against central differences, the policy gradient against every answer there is, PPO against the policy
gradient, DPO against its closed-form optimum.
"""

import inspect
import itertools

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import rlhf
from engine import to_numpy, xp
from engine.batches import as_rows, evaluate, flat
from engine.threads import thread_pool
from layers import softmax

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
@given(st.integers(2, 6), seeds)
def test_the_gradient_of_every_loss(n, seed):
    one, other, third = (normal(seed + i, n) for i in range(3))
    better, worse = xp.asarray(np.random.default_rng(seed).integers(0, n, (2, 7)))  # some answers in several pairs
    check(lambda r: rlhf.bradley_terry(r, better, worse), one)
    check(lambda log_p: rlhf.dpo_loss(log_p, other, better, worse, beta=0.3), one)
    check(lambda log_p: rlhf.policy_gradient_loss(log_p, other), one)
    check(lambda log_p: rlhf.policy_gradient_loss(log_p, other, third), one)
    check(rlhf.entropy, 3 * normal(seed, 2, n))
    check(lambda v: rlhf.value_loss(v, other), one)
    check(lambda log_p: rlhf.kl_loss(log_p, other), one)
    # the clipped loss has corners: where a ratio is near one of them, differences cannot tell its side
    ratio = xp.exp(one - other)
    smooth = (abs(ratio - 0.8) > 1e-3) & (abs(ratio - 1.2) > 1e-3)
    check(lambda log_p: rlhf.ppo_loss(log_p, other[smooth], third[smooth]), one[smooth])


def test_the_entropy_is_that_of_the_probabilities():
    close(rlhf.entropy(xp.zeros((2, 8)))[0], np.full(2, np.log(8)))
    close(rlhf.entropy(xp.asarray([[1000.0, 0.0]]))[0], [0.0])
    p = np.array([0.5, 0.2, 0.3])
    close(rlhf.entropy(xp.log(xp.asarray(p)) + 7)[0], -(p * np.log(p)).sum())


def test_a_masked_mean_is_that_of_what_is_not_masked():
    x, mask = np.array([[1.0, 2.0], [4.0, np.pi]]), np.array([[True, False], [True, False]])
    assert rlhf.masked_sum(x, mask) == 5 and rlhf.masked_mean(x, mask) == 2.5


def test_a_baseline_is_taken_from_the_reward():
    losses, backward = rlhf.policy_gradient_loss(xp.asarray([-1.0, -2.0]), xp.asarray([3.0, 1.0]), 2.0)
    close(losses, [1.0, -2.0])
    close(backward(xp.ones(2)), [-1.0, 1.0])


def test_bradley_terry_is_the_likelihood_of_the_choice():
    r, better, worse = xp.asarray([2.0, 0.0, -800.0, 800.0]), xp.asarray([0, 2]), xp.asarray([1, 3])
    losses, _ = rlhf.bradley_terry(r, better, worse)
    close(losses, [np.log(1 + np.exp(-2.0)), 1600.0])  # and does not overflow


def test_the_value_loss_is_half_the_square():
    losses, _ = rlhf.value_loss(xp.asarray([3.0, 1.0]), xp.asarray([1.0, 1.0]))
    close(losses, [2.0, 0.0])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), seeds)
def test_where_the_ratio_is_1_ppo_is_the_policy_gradient(batch, time, seed):
    log_p, advantages = normal(seed, batch, time), normal(seed + 1, batch, time)
    weights = abs(normal(seed + 2, batch, time))
    _, ppo = rlhf.ppo_loss(log_p, log_p, advantages)
    losses, reinforce = rlhf.policy_gradient_loss(log_p, advantages)
    close(losses, -advantages * log_p)
    close(reinforce(weights), -advantages * weights)
    close(ppo(weights), reinforce(weights))


def test_the_clipped_loss_stops_where_the_ratio_went_far_enough():
    log_p = xp.log(xp.asarray([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = xp.asarray([1.0, -1.0, 1.0, -1.0, 1.0])
    losses, backward = rlhf.ppo_loss(log_p, xp.zeros(5), advantages)
    close(losses, [-1.2, 1.5, -0.5, 0.8, -1.1])
    close(backward(xp.ones(5)), [0, 1.5, -0.5, 0, -1.1])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), seeds)
def test_the_estimate_of_the_kl_has_the_kl_as_its_mean(n, seed):
    p, q = (softmax(normal(seed + i, n))[0] for i in range(2))
    estimates, _ = rlhf.kl_loss(xp.log(p), xp.log(q))
    assert float(estimates.min()) >= 0
    assert float((p * estimates).sum()) == pytest.approx(float((p * xp.log(p / q)).sum()))


# --- the policy gradient: all answers of two tokens to two questions, with their probabilities ---


QUESTIONS = [[1, 2], [3]]
ANSWERS = [list(answer) for answer in itertools.product(range(12), repeat=2)]


def expected_gradient(params, advantages):
    """Of the policy gradient's loss; advantages: (questions, answers, tokens), or what broadcasts to it."""
    prompts = [question for question in QUESTIONS for _ in ANSWERS]
    inputs, targets = map(xp.asarray, as_rows(prompts, ANSWERS * len(QUESTIONS)))
    log_p, backward = model.log_likelihood(params, CONFIG, inputs, targets)
    of_a_token = xp.zeros(log_p.shape)
    of_a_token[targets >= 0] = xp.broadcast_to(xp.asarray(advantages), (2, 144, 2)).ravel()
    _, dlog_p = rlhf.policy_gradient_loss(log_p, of_a_token)
    return backward(dlog_p(xp.broadcast_to(xp.exp(log_p.sum(axis=1))[:, None], log_p.shape)))


@settings(max_examples=5, deadline=None)
@given(seeds)
def test_reinforce_is_the_gradient_of_the_expected_reward(seed):
    rewards = normal(seed + 1, 2, 144)
    prompts = [question for question in QUESTIONS for _ in ANSWERS]
    inputs, targets = map(xp.asarray, as_rows(prompts, ANSWERS * 2))

    def loss(params):
        log_p, log_p_backward = rlhf.log_likelihoods(params, CONFIG, inputs, targets)
        p = xp.exp(log_p)
        return -(p * rewards.ravel()).sum(), lambda: log_p_backward(-p * rewards.ravel())

    params = with_head(seed)
    del params["score.weight"]
    check(loss, params, coordinates=4, directions=1)
    _, backward = loss(params)
    found = expected_gradient(params, rewards[..., None])
    for name, g in backward().items():
        close(found[name], g)


@settings(max_examples=5, deadline=None)
@given(seeds)
def test_a_baseline_is_free(seed):
    """Whatever is added to the reward that depends on the question only, and to a token's on what stands before it."""
    params, rewards = with_head(seed), normal(seed + 1, 2, 144, 1)
    plain = expected_gradient(params, rewards)
    of_the_question = normal(seed + 2, 2, 1, 1)
    before_each_token = xp.zeros((2, 12, 12, 2))
    before_each_token[..., 0] = normal(seed + 3, 2, 1, 1)
    before_each_token[..., 1] = normal(seed + 4, 2, 12, 1)
    of_the_answer = normal(seed + 5, 2, 144, 1)
    for baseline in of_the_question, before_each_token.reshape(2, 144, 2):
        found = expected_gradient(params, rewards - baseline)
        for name, g in plain.items():
            close(found[name], g, 1e-9)
    name = "model.embed_tokens.weight"
    assert float(abs(expected_gradient(params, rewards - of_the_answer)[name] - plain[name]).max()) > 1e-4


def test_group_advantages_compare_with_the_others_only():
    found = rlhf.group_advantages(np.array([1.0, 3.0, 7.0, 7.0, -5.0, -9.0]), 2)
    np.testing.assert_allclose(found, [-1, 1, 0, 0, 1, -1], atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(2, 3), seeds)
def test_a_mean_with_the_answer_in_it_shrinks_the_gradient_by_1_in_the_group(n, group, seed):
    """Over all groups of n answers: what the mean of a group gives as the gradient of each one's first answer."""
    p, r = to_numpy(softmax(normal(seed, n))[0]), np.random.default_rng(seed).standard_normal(n)
    expected, found = p * (r - (p * r).sum()), 0  # of E[r], by the logits
    for drawn in itertools.product(range(n), repeat=group):
        chosen = list(drawn)
        advantages = rlhf.group_advantages(r[chosen], group) * (r[chosen].std() + 1e-4)
        found += p[chosen].prod() * advantages[0] * (np.eye(n)[chosen[0]] - p)
    np.testing.assert_allclose(found, (1 - 1 / group) * expected, atol=1e-12)


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


def test_by_default_nothing_is_discounted_and_the_values_are_nearly_not_believed():
    rewards, values, answered = np.array([[0.0, 1.0]]), np.array([[0.5, 0.25]]), np.ones((1, 2), bool)
    found = rlhf.generalised_advantages(rewards, values, answered)
    np.testing.assert_allclose(found, [[-0.25 + 0.95 * 0.75, 0.75]])


# --- DPO ---


@settings(max_examples=2, deadline=None)
@given(st.integers(3, 5), st.floats(0.3, 2.0), seeds)
def test_dpo_and_bradley_terry_find_the_optimum_of_the_toy(n, beta, seed):
    """All pairs of n answers, with the true probabilities of preferring one: the reward model finds r up to a constant,
    DPO the policy π₀ exp(r / β) / Z, and its implicit reward is that of the reward model.
    """
    reward, ref_log_p = normal(seed, n), xp.log(softmax(normal(seed + 1, n))[0])
    better, worse = xp.asarray([(i, j) for i in range(n) for j in range(n) if i != j]).T
    preferred = 1 / (1 + xp.exp(reward[worse] - reward[better]))

    def descend(gradient, x, steps=4000, rate=0.5):
        for _ in range(steps):
            x = x - rate / n * gradient(x)
        return x

    learned = descend(lambda r: rlhf.bradley_terry(r, better, worse)[1](preferred), xp.zeros(n))
    close(learned - learned.mean(), reward - reward.mean(), 1e-4)

    def dpo(logits):
        p, _ = softmax(logits)
        _, backward = rlhf.dpo_loss(xp.log(p), ref_log_p, better, worse, beta)
        dlog_p = backward(preferred)
        return dlog_p - p * dlog_p.sum()

    p, _ = softmax(descend(dpo, ref_log_p, rate=0.5 / beta**2))
    optimum, _ = softmax(ref_log_p + reward / beta)
    close(p, optimum, 1e-4)
    implied = beta * (xp.log(p) - ref_log_p)
    close(implied - implied.mean(), learned - learned.mean(), 1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.floats(0.1, 2.0), seeds)
def test_the_optimum_is_the_best_and_its_implied_reward_is_the_reward(n, beta, seed):
    """E[r] - β KL(π ‖ π₀) = β log Z - β KL(π ‖ π*), for any π; and DPO's loss at π* is the true reward's."""
    r, ref_p, p = normal(seed, n), *(softmax(normal(seed + i, n))[0] for i in (1, 2))
    optimum = ref_p * xp.exp(r / beta)
    z = optimum.sum()
    optimum = optimum / z
    value = lambda p: float((p * r).sum() - beta * (p * xp.log(p / ref_p)).sum())
    assert value(optimum) == pytest.approx(beta * float(xp.log(z)))
    assert value(p) == pytest.approx(value(optimum) - beta * float((p * xp.log(p / optimum)).sum()))
    better, worse = xp.asarray([(i, j) for i in range(n) for j in range(n)]).T
    of_the_policy, _ = rlhf.dpo_loss(xp.log(optimum), xp.log(ref_p), better, worse, beta)
    close(of_the_policy, rlhf.bradley_terry(r, better, worse)[0])


# --- what a model says of an answer ---


@settings(max_examples=5, deadline=None)
@given(seeds)
def test_the_gradients_of_both_heads(seed):
    params = with_head(seed)
    inputs, targets = map(xp.asarray, as_rows(*random_rows(seed)))
    for function in rlhf.rewards, rlhf.policy_and_values:
        check(lambda p, f=function: f(p, CONFIG, inputs, targets), params, coordinates=2, directions=1)
    del params["score.weight"]
    check(lambda p: rlhf.log_likelihoods(p, CONFIG, inputs, targets), params, coordinates=2, directions=1)


def test_the_first_head_is_the_language_models():
    params = with_head(0)
    inputs, targets = map(xp.asarray, as_rows(*random_rows(0)))
    (log_p, _), _ = rlhf.policy_and_values(params, CONFIG, inputs, targets)
    close(log_p, model.log_likelihood(params, CONFIG, inputs, targets)[0])
    close(log_p.sum(axis=1), rlhf.log_likelihoods(params, CONFIG, inputs, targets)[0])


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_log_likelihood_and_reward_do_not_depend_on_the_rows_beside(seed):
    params, (prompts, answers) = with_head(seed), random_rows(seed, 7)
    for function in rlhf.log_likelihoods, rlhf.rewards:
        whole = evaluate(function, params, CONFIG, *as_rows(prompts, answers))
        for i in range(7):
            rows = map(xp.asarray, as_rows(prompts[i : i + 1], answers[i : i + 1]))
            assert whole[i] == pytest.approx(float(function(params, CONFIG, *rows)[0][0]))


def test_the_last_token_counts_for_the_reward():
    params = with_head(0)
    one, other = evaluate(rlhf.rewards, params, CONFIG, *as_rows([[1, 2], [1, 2]], [[3, 4], [3, 5]]))
    assert abs(one - other) > 1e-6


def test_the_reward_is_read_where_the_answers_last_token_has_been_read():
    params, prompt, answer = with_head(0), [1, 2, 3], [4, 5, 6, 0]
    inputs, targets = map(xp.asarray, as_rows([prompt], [answer]))
    text = xp.asarray([prompt + answer])
    (_, v), _ = rlhf.policy_and_values(params, CONFIG, text, text)
    r, _ = rlhf.rewards(params, CONFIG, inputs, targets)
    close(r, v[:, -1])
    (_, values), _ = rlhf.policy_and_values(params, CONFIG, inputs, targets)  # and PPO's values one place earlier
    close(values[targets >= 0], v[0, len(prompt) - 1 : -1])


def test_answers_end_and_do_not_depend_on_the_threads():
    params, prompts = with_head(1, np.float32), [[1 + i % 11] * (1 + i % 3) for i in range(9)]
    draw = lambda parallel_map: rlhf.sample_answers(
        params, CONFIG, prompts, 8, 1.0, np.random.default_rng(3), parallel_map, size=4
    )
    answers = draw(map)
    with thread_pool(2) as pool:
        assert draw(pool.map) == answers
    assert all(0 not in answer[:-1] and (answer[-1] == 0 or len(answer) == 8) for answer in answers)
    assert len({tuple(answer) for answer in answers}) > 1
    likeliest = rlhf.sample_answers(params, CONFIG, prompts, 8, 0.0)
    assert likeliest == rlhf.sample_answers(params, CONFIG, prompts, 8, 0.0, np.random.default_rng(5))


# --- learning ---


PROMPTS = [[1], [2, 3]]


def progress(steps):
    return (i / steps for i in range(steps))


def fives(which, answers):
    """A reward: the share of one token in the answer, which at first is one in twelve."""
    return np.array([answer.count(5) / len(answer) for answer in answers], np.float32)


def tuned(method, beta, seed=0, parallel_map=map, steps=40, **more):
    params = model.init(CONFIG, seed)
    options = {"batch": 64, "max_new_tokens": 6, "seed": seed, "parallel_map": parallel_map} | more
    policy, history = getattr(rlhf, method)(params, CONFIG, PROMPTS, fives, progress(steps), beta, 0.01, **options)
    close(params["model.norm.weight"], np.ones(8))  # where it began is left as it was
    return policy, history


@pytest.mark.parametrize("method", ["ppo", "grpo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_reinforcement_raises_the_reward_within_the_kl(method, seed):
    policy, history = tuned(method, lambda kl: 0.1 * np.exp(4 * (kl / 3 - 1)), seed)
    assert history[0]["reward"] < 0.2 and history[-1]["reward"] > 0.4
    assert history[0]["kl"] == pytest.approx(0, abs=1e-4) and 0.5 < history[-1]["kl"] < 6
    assert all(np.isfinite(to_numpy(w)).all() for w in policy.values())
    assert ("score.weight" in policy) == (method == "ppo")


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_penalty_holds_the_policy_back(method):
    _, free = tuned(method, lambda kl: 0.0)
    _, bound = tuned(method, lambda kl: 0.1 * np.exp(4 * (kl / 0.3 - 1)))
    assert bound[-1]["kl"] < 0.8 < 2 < free[-1]["kl"]


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_history_tells_of_every_round_and_threads_change_nothing(method):
    policy, history = tuned(method, lambda kl: kl, steps=3)
    assert len(history) == 3
    for line in history:
        assert len(line["which"]) == len(line["answers"]) == 64 and set(line["which"]) == {0, 1}
        assert line["reward"] == pytest.approx(fives(line["which"], line["answers"]).mean())
        assert 0 < line["entropy"] < 1.1 * np.log(12)  # an estimate, of an undecided policy
    with thread_pool(2) as pool:
        same, again = tuned(method, lambda kl: kl, parallel_map=pool.map, steps=3)
    assert [line["kl"] for line in again] == [line["kl"] for line in history]
    assert all((same[name] == w).all() for name, w in policy.items())


def test_a_group_answers_one_question():
    _, history = tuned("grpo", lambda kl: 0.0, steps=1)
    groups = np.array(history[0]["which"]).reshape(-1, 8)
    assert (groups == groups[:, :1]).all()


def watched(monkeypatch):
    """A list that gets (params, gradient, schedule) of every step, which are not taken."""
    steps = []

    def descend(gradient, parts, params, optimizer, schedule, parallel_map):
        total = {}
        for grads in map(gradient, parts):
            total = {name: total.get(name, 0) + g for name, g in grads.items()}
        steps.append((params, total, schedule))

    monkeypatch.setattr(rlhf, "descend", descend)
    return steps


def test_the_learning_rate_falls_in_a_line(monkeypatch):
    steps, some = watched(monkeypatch), comparisons(9, np.random.default_rng(0))
    for method in rlhf.train_reward_model, rlhf.dpo:
        method(model.init(CONFIG, 0), CONFIG, some, progress(4))
    tuned("grpo", lambda kl: 0.0, steps=4)
    assert [schedule for _, _, schedule in steps] == 3 * [1, 0.75, 0.5, 0.25]
    steps.clear()
    tuned("ppo", lambda kl: 0.0, steps=2)
    assert [schedule for _, _, schedule in steps] == [1, 1, 0.5, 0.5]  # each answer is learned from twice


@pytest.mark.parametrize("method", ["ppo", "grpo", "dr_grpo"])
def test_the_first_step_weighs_tokens_as_the_papers_do(method, monkeypatch):
    steps = watched(monkeypatch)
    options = {"done_right": True} if method == "dr_grpo" else {}
    _, history = tuned(method.removeprefix("dr_"), lambda kl: 0.0, steps=1, **options)
    policy, found, _ = steps[0]
    which, answers = history[0]["which"], history[0]["answers"]
    inputs, targets = as_rows([PROMPTS[i] for i in which], answers)
    answered, rewards = targets >= 0, fives(which, answers)
    if method == "ppo":  # the value head has not learned anything yet
        ends = np.zeros(targets.shape, np.float32)
        ends[np.arange(64), [len(PROMPTS[i]) + len(a) - 2 for i, a in zip(which, answers)]] = rewards
        returns = rlhf.generalised_advantages(ends, np.zeros_like(ends), answered)
        advantages = (returns - returns[answered].mean()) / returns[answered].std()
    else:
        advantages = rlhf.group_advantages(rewards, 8, deviation=method == "grpo")[:, None]
    lengths = answered.sum(axis=1, keepdims=True)
    share = {"ppo": answered / answered.sum(), "grpo": answered / (64 * lengths), "dr_grpo": answered / (64 * 6)}[
        method
    ]
    share = share.astype(np.float32)
    rows = xp.asarray(inputs), xp.asarray(targets)
    if method == "ppo":
        _, backward = rlhf.policy_and_values(policy, CONFIG, *rows)
        expected = backward(xp.asarray(-advantages * share), xp.asarray(-0.1 * returns * share))
    else:
        expected = model.log_likelihood(policy, CONFIG, *rows)[1](xp.asarray(-advantages * share))
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        close(found[name], g, 1e-5 * float(abs(g).max()) + 1e-9)


def comparisons(count, rng):
    """The better answer is the one with more fives."""
    made = []
    for _ in range(count):
        answers = [rng.integers(1, 12, rng.integers(3, 6)).tolist() + [0] for _ in range(4)]
        found = [answer.count(5) for answer in answers]
        pairs = [(i, j) for i in range(4) for j in range(4) if found[i] > found[j]]
        made.append(([1, 2], answers, pairs))
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_comparisons_teach_a_reward_model_and_a_policy(seed):
    rng, params = np.random.default_rng(seed), model.init(CONFIG, seed)
    some = comparisons(200, rng)
    assert any(not pairs for _, _, pairs in some)  # which are passed over
    reward_model = rlhf.train_reward_model(params, CONFIG, some, progress(60), lr=0.02)
    inputs, targets, better, worse = flat(comparisons(50, rng))
    r = evaluate(rlhf.rewards, reward_model, CONFIG, inputs, targets)
    assert len(better) > 50 and (r[better] > r[worse]).mean() > 0.9
    policy = rlhf.dpo(params, CONFIG, some, progress(40), lr=0.02)
    rows = list(map(xp.asarray, as_rows([[1, 2]], [[5, 5, 0]])))
    before, after = (float(rlhf.log_likelihoods(p, CONFIG, *rows)[0][0]) for p in (params, policy))
    assert after > before + 1
    close(params["model.norm.weight"], np.ones(8))


@pytest.mark.parametrize("method", ["train_reward_model", "dpo"])
def test_the_step_on_comparisons_is_along_the_mean_over_all_pairs(method, monkeypatch):
    params = with_head(0)
    asked = [
        ([1, 2], [[3, 0], [4, 5, 0], [6, 0]], [(0, 1), (0, 2), (2, 1)]),
        ([7], [[8, 0], [9, 9]], [(1, 0)]),
    ]
    steps = watched(monkeypatch)
    getattr(rlhf, method)(params, CONFIG, asked, progress(1), batch=2)
    ((policy, found, _),) = steps

    expected = {}
    pairs = [(prompt, answers[i], answers[j]) for prompt, answers, pairs in asked for i, j in pairs]
    for prompt, better, worse in pairs:
        rows = list(map(xp.asarray, as_rows([prompt, prompt], [better, worse])))
        first, second = xp.asarray([0]), xp.asarray([1])
        if method == "dpo":
            v, backward = rlhf.log_likelihoods(policy, CONFIG, *rows)
            _, loss_backward = rlhf.dpo_loss(v, v, first, second)  # as the step is the first
        else:
            v, backward = rlhf.rewards(policy, CONFIG, *rows)
            _, loss_backward = rlhf.bradley_terry(v, first, second)
        for name, g in backward(loss_backward(xp.ones(1) / len(pairs))).items():
            expected[name] = expected.get(name, 0) + g
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        close(found[name], g)


def test_the_defaults_are_those_of_the_papers_and_of_the_readme():
    """GAE's λ of 0.95 and PPO's clip of 0.2 (Schulman et al. 2016, 2017), DPO's β of 0.1 (Rafailov et al. 2023)."""
    of = lambda function: {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name != "parallel_map"
    }
    assert of(rlhf.generalised_advantages) == {"gamma": 1.0, "lam": 0.95} and of(rlhf.ppo_loss) == {"clip": 0.2}
    assert of(rlhf.train_reward_model) == {"lr": 3e-3, "batch": 24, "seed": 0}
    assert of(rlhf.dpo) == {"beta": 0.1, "lr": 1e-3, "batch": 24, "seed": 0} and of(rlhf.dpo_loss) == {"beta": 0.1}
    assert of(rlhf.ppo) == {"batch": 128, "max_new_tokens": 40, "seed": 0}
    assert of(rlhf.grpo) == of(rlhf.ppo) | {"group": 8, "done_right": False}
    assert of(rlhf.sample_answers) == {"temperature": 1.0, "rng": None, "size": 64}


def test_advantages_of_a_group_that_agrees_are_none_and_others_have_mean_0_and_deviation_1():
    advantages = rlhf.group_advantages(np.array([1.0, 1.0, 1.0, 0.0, 2.0, 4.0, 1.0, 0.0, 0.0]), 3)
    assert not advantages[:3].any()
    close(advantages[3:6], np.array([-(1.5**0.5), 0, 1.5**0.5]), 1e-3)
    close(advantages[6:].sum(), 0)


def test_without_the_deviation_advantages_are_in_the_rewards_unit():
    advantages = rlhf.group_advantages(np.array([1.0, 1.0, 1.0, 0.0, 2.0, 4.0]), 3, deviation=False)
    close(advantages, [0, 0, 0, -2, 0, 2])
