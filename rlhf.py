"""Proceso de entrenamiento: Reinforcement Learning with Human Feedback (RLHF).

What makes an answer good cannot be written down as a loss, but people can say which of two answers is better. From
their comparisons a reward model learns a number r(x, y) for answer y to question x (Bradley & Terry 1952):

    P(y is preferred to y') = σ(r(x, y) - r(x, y'))

and the language model π is tuned to answers of high reward, without going far from the model π₀ it began as: far from
it are answers that the reward model has never seen (Ziegler et al. 2019; Ouyang et al. 2022):

    maximise  E[r(x, y)] - β KL(π ‖ π₀)          whose optimum is  π*(y|x) ∝ π₀(y|x) exp(r(x, y) / β)

There are three ways. PPO samples answers, and a value head predicts the reward still to come; a token is credited with
how much it beat that. GRPO samples several answers to a question, and judges each by the mean of all. DPO samples
nothing: solved for r, the optimum says that β log π/π₀ is the reward, up to a constant of the question, which cancels
between two answers, so the comparisons can train π directly.

    python rlhf.py                     the whole chain, from text to an assistant that was tuned in three ways
    python rlhf.py --init runs/1       the same, from a model of train.py
    python rlhf.py --human             compare the answers yourself

Shapes: batch answers, one a row, of at most time tokens.
"""

import json
import math
import os
from time import perf_counter

import numpy as np

import bpe
import chat
import checkpoint
import model
import train
from engine import cli, corpus, xp
from engine.files import replace, write_text
from engine.threads import cores, thread_pool
from lab import annotator
from lab.annotator import LONGEST, Assistant, at_matched_length, win_rate
from layers import IGNORE, sigmoid
from optim import Optimizer
from policy import (
    as_rows,
    clock,
    copied,
    descend,
    evaluate,
    log_likelihoods,
    pieces,
    policy_and_values,
    rewards,
    sample_answers,
    values,
)

# --------------------------------------------------------------------------------------------- the losses


def bradley_terry(chosen, rejected):
    """-log σ(r - r') of each comparison: how unlikely the reward model finds what was chosen.

    chosen, rejected: (pairs,) rewards. Returns losses (pairs,) and backward(dlosses) -> (dchosen, drejected).
    """
    margin = chosen - rejected
    losses = xp.logaddexp(0, -margin)

    def backward(dlosses):
        # d(-log σ(m))/dm = σ(m) - 1: nothing is left to learn from a pair that is far apart already
        dmargin = (sigmoid(margin)[0] - 1) * dlosses
        return dmargin, -dmargin

    return losses, backward


def dpo_loss(chosen, rejected, chosen_before, rejected_before, beta=0.1):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): Bradley-Terry, with the reward that the policy
    itself implies, r = β log π(y|x) / π₀(y|x).

    chosen, rejected: (pairs,) log-likelihoods of the answers under π; ..._before: the same under π₀, constants.
    Returns losses (pairs,) and backward(dlosses) -> (dchosen, drejected).
    """
    losses, bt_backward = bradley_terry(beta * (chosen - chosen_before), beta * (rejected - rejected_before))

    def backward(dlosses):
        dchosen, drejected = bt_backward(dlosses)
        return beta * dchosen, beta * drejected

    return losses, backward


def ppo_loss(log_p, sampled_log_p, advantages, clip=0.2):
    """The clipped surrogate of PPO (Schulman et al. 2017, equation 7), for each token:

        -min(ratio A, clip(ratio, 1 - c, 1 + c) A),   ratio = π(token) / π_sampled(token)

    Where the ratio is 1 its gradient is the policy gradient's, that of -A log π. In further steps with the same
    answers, a token that has become `clip` more, or less, likely, as its advantage asked for, has no gradient any more.

    log_p, sampled_log_p: log-likelihoods now and when the answers were sampled, the latter constants like the
    advantages; all of one shape. Returns losses of that shape and backward(dlosses) -> dlog_p.
    """
    ratio = xp.exp(log_p - sampled_log_p)
    free, bounded = -ratio * advantages, -xp.clip(ratio, 1 - clip, 1 + clip) * advantages

    def backward(dlosses):
        # where the bounded one is larger it is constant; -ratio A is its own derivative by log π
        return xp.where(free >= bounded, free, 0) * dlosses

    return xp.maximum(free, bounded), backward


def value_loss(values, returns):
    """½ (V - R)² of each token; returns are constants. Returns losses and backward(dlosses) -> dvalues."""
    error = values - returns
    return error * error / 2, lambda dlosses: error * dlosses


def kl_loss(log_p, log_p_before):
    """An estimate of KL(π ‖ π₀) from each token drawn from π: e^d - d - 1 with d = log π₀ - log π, which is never
    negative and varies less than -d (Schulman 2020; GRPO, Shao et al. 2024, equation 4). With the tokens held fixed its
    gradient is that of KL(π₀ ‖ π), which pulls towards π₀ as well.

    log_p, log_p_before: of any one shape. Returns the estimates and backward(dkl) -> dlog_p.
    """
    d = log_p_before - log_p
    return xp.expm1(d) - d, lambda dkl: -xp.expm1(d) * dkl


# ------------------------------------------------------------------------------------- advantages: credit


def generalised_advantages(rewards, values, answered, gamma=1.0, lam=0.95):
    """How much better each token did than expected (GAE, Schulman et al. 2016, equation 16):

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γλ A_{t+1}

    λ = 1: all that came afterwards, less V: unbiased and noisy; λ = 0: the next value is believed.
    rewards, values: (batch, time), of each token and of the text before it. answered: booleans, True at the tokens of
    the answer. Returns the advantages, 0 elsewhere; with the values added they are what V should have been.
    """
    advantages, after, value_after = np.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = np.where(answered[:, t], delta + gamma * lam * after, 0.0)
        value_after = np.where(answered[:, t], values[:, t], 0.0)
        advantages[:, t] = after
    return advantages


def group_advantages(rewards, group):
    """GRPO's: how far each answer lies above the mean of the answers to the same question, in standard deviations (Shao
    et al. 2024, section 4.1.2). rewards: (questions · group,), those of a question together. Returns the same shape.
    """
    r = rewards.reshape(-1, group)
    return ((r - r.mean(axis=1, keepdims=True)) / (r.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)


# ------------------------------------------------------------------- learning from comparisons: reward model, DPO


def learn_from_comparisons(value, loss, params, config, comparisons, progress, lr, batch=24, seed=0, parallel_map=map):
    """Trains params, in place, so that the value of the answer that was preferred rises above the other's. The reward
    model and DPO both do this; they differ in what the value of an answer is.

    value: `rewards` or `log_likelihoods`, of an answer. loss(chosen, rejected, chosen_before, rejected_before) gives
    losses and their backward pass. comparisons: a list of questions, (prompt, answers, pairs, before) each: ids, a list
    of ids, pairs (better, worse) of numbers of answers, and a constant for each answer. All answers to a question go
    through the model once, however many pairs they are in (Ouyang et al. 2022, section 3.5). batch: questions a step.
    progress: yields how much of the training is done, 0 to 1, once a step.
    """
    if not comparisons:
        raise ValueError("no two answers differ noticeably, so there is nothing to learn from")
    optimizer, rng, order = Optimizer("muon", lr, 0.0), np.random.default_rng(seed), []
    for done in progress:
        while len(order) < batch:
            order += rng.permutation(len(comparisons)).tolist()
        asked, order = [comparisons[i] for i in order[:batch]], order[batch:]
        total = sum(len(pairs) for _, _, pairs, _ in asked)

        def part(questions):
            prompts, answers, pairs, before = [], [], [], []
            for prompt, some, own_pairs, constants in questions:
                pairs += [(len(answers) + better, len(answers) + worse) for better, worse in own_pairs]
                prompts, answers, before = prompts + [prompt] * len(some), answers + some, before + list(constants)
            v, value_backward = value(params, config, *map(xp.asarray, as_rows(prompts, answers)))
            better, worse = xp.asarray(np.array(pairs).T)
            before = xp.asarray(before, dtype=v.dtype)
            losses, loss_backward = loss(v[better], v[worse], before[better], before[worse])
            dv = xp.zeros_like(v)
            for rows, d in zip((better, worse), loss_backward(xp.full_like(losses, 1 / total))):
                xp.add.at(dv, rows, d)
            return value_backward(dv)

        asked.sort(key=lambda question: len(question[0]))
        descend(part, [asked[k::4] for k in range(min(4, batch))], params, optimizer, 1 - done, parallel_map)


def train_reward_model(params, config, comparisons, progress, lr=3e-3, **options):
    """A reward model: the language model with a scalar head, trained on comparisons, (prompt, answers, pairs) each.
    Returns its params.
    """
    params = copied(params) | {"score.weight": xp.zeros((1, config.hidden_size), np.float32)}
    questions = [(prompt, answers, pairs, [0.0] * len(answers)) for prompt, answers, pairs in comparisons if pairs]
    loss = lambda chosen, rejected, *_: bradley_terry(chosen, rejected)
    learn_from_comparisons(rewards, loss, params, config, questions, progress, lr, **options)
    return params


def dpo(params, config, comparisons, progress, beta=0.1, lr=1e-3, parallel_map=map, **options):
    """Tunes a policy on comparisons, (prompt, answers, pairs) each, directly. Returns its params."""
    comparisons = [question for question in comparisons if question[2]]
    if not comparisons:
        raise ValueError("no two answers differ noticeably, so there is nothing to learn from")
    prompts = [prompt for prompt, answers, _ in comparisons for _ in answers]
    flat = [answer for _, answers, _ in comparisons for answer in answers]
    before = iter(evaluate(log_likelihoods, params, config, *as_rows(prompts, flat), parallel_map).tolist())
    questions = [(prompt, answers, pairs, [next(before) for _ in answers]) for prompt, answers, pairs in comparisons]
    policy, loss = copied(params), lambda *log_p: dpo_loss(*log_p, beta)
    options |= {"parallel_map": parallel_map}
    learn_from_comparisons(log_likelihoods, loss, policy, config, questions, progress, lr, **options)
    return policy


# -------------------------------------------------------------------- learning from own answers: PPO, GRPO


def rounds(policy, config, prompts, reward, progress, questions, group, max_new_tokens, rng, history, parallel_map=map):
    """The loop that PPO and GRPO share: asks, samples answers from the policy, and has them rewarded.

    policy: params, which the caller changes between rounds. reward(which, answers) -> (batch,): which are the numbers
    of the prompts that were answered. history: a list that gets a dict of each round.
    Yields done (0 to 1), inputs and targets (batch, time), and rewards (batch,), with batch = questions · group and
    the answers to a question together.
    """
    order = []
    for done in progress:
        began = perf_counter()
        while len(order) < questions:
            order += rng.permutation(len(prompts)).tolist()
        which, order = np.repeat(order[:questions], group), order[questions:]
        asked = [prompts[i] for i in which]
        answers = sample_answers(policy, config, asked, max_new_tokens, 1.0, rng, parallel_map)
        sampled = perf_counter()
        r = np.asarray(reward(which, answers))
        history.append({"done": done, "reward": r.mean(), "length": np.mean([len(a) for a in answers])})
        history[-1]["answers"] = list(zip(which.tolist(), answers))
        yield done, *as_rows(asked, answers), r
        history[-1] |= {"sampling": sampled - began, "seconds": perf_counter() - began}


def kl_control(kl, target):
    """The weight β of the KL penalty for a policy at that KL from where it began, in nats an answer: 0.1 at the target,
    next to nothing far below, and growing so fast beyond that no reward is worth it.

    A β that is adjusted step by step (Ziegler et al. 2019, section 2.2) comes too late in a run of some dozen rounds.
    """
    return 0.1 * np.exp(4 * (kl / target - 1))


def ppo(
    params,
    config,
    prompts,
    reward,
    progress,
    lr=6e-4,
    target_kl=8.0,
    batch=128,
    epochs=2,
    minibatch=64,
    clip=0.2,
    value_weight=0.1,
    max_new_tokens=40,
    seed=0,
    parallel_map=map,
):
    """Proximal policy optimisation (Schulman et al. 2017; for language models Ziegler et al. 2019).

    Each token is rewarded with -β (log π - log π₀), the last one with the answer's reward too; a value head on the
    policy's own body learns what is still to come, its loss weighing value_weight. In a round, batch answers are
    learned from `epochs` times, minibatch at a time. Further arguments as of `rounds`; target_kl: in nats an answer,
    see kl_control, None for no penalty. Returns the tuned params, the value head among them, and the history.
    """
    policy = copied(params) | {"score.weight": xp.zeros((1, config.hidden_size), np.float32)}
    optimizer, rng, history = Optimizer("adamw", lr, 0.0), np.random.default_rng(seed), []
    options = (batch, 1, max_new_tokens, rng, history, parallel_map)
    for done, inputs, targets, r in rounds(policy, config, prompts, reward, progress, *options):
        answered = targets != IGNORE
        ask = lambda function, weights: evaluate(function, weights, config, inputs, targets, parallel_map)
        before, sampled = ask(model.log_likelihood, params), ask(model.log_likelihood, policy)
        expected = ask(values, policy)
        kl = (sampled - before).sum(axis=1).mean()
        beta = 0.0 if target_kl is None else kl_control(kl, target_kl)
        history[-1] |= {"kl": kl, "beta": beta}

        token_rewards = -beta * (sampled - before)
        last = answered.shape[1] - 1 - answered[:, ::-1].argmax(axis=1)
        token_rewards[np.arange(len(r)), last] += r
        advantages = generalised_advantages(token_rewards, expected, answered)
        returns = advantages + expected
        advantages = (advantages - advantages[answered].mean()) / (advantages[answered].std() + 1e-6)

        for rows in [part for _ in range(epochs) for part in np.split(rng.permutation(batch), batch // minibatch)]:
            weight = 1 / answered[rows].sum()

            def part(piece):
                own, *arguments = piece
                own = rows[own], slice(arguments[0].shape[1])
                (log_p, v), backward = policy_and_values(policy, config, *arguments)
                mask = xp.asarray(answered[own] * weight, dtype=v.dtype)
                _, ppo_backward = ppo_loss(log_p, xp.asarray(sampled[own]), xp.asarray(advantages[own]), clip)
                _, value_backward = value_loss(v, xp.asarray(returns[own]))
                return backward(ppo_backward(mask), value_backward(value_weight * mask))

            descend(part, pieces(inputs[rows], targets[rows]), policy, optimizer, 1 - done, parallel_map)
    return policy, history


def grpo(
    params,
    config,
    prompts,
    reward,
    progress,
    lr=6e-4,
    target_kl=8.0,
    questions=16,
    group=8,
    max_new_tokens=40,
    seed=0,
    parallel_map=map,
):
    """Group relative policy optimisation (Shao et al. 2024, equation 3, with one step for each round of answers): no
    value head, as the other answers to the same question say what was to be expected. Where all of a group are equally
    good there is nothing to learn from them. All tokens weigh the same, as in DAPO (Yu et al. 2025): with 1/length, as
    in equation 3, a bad answer is punished less the longer it is.

    Arguments as of `rounds`, with group answers to each of the questions; target_kl: in nats an answer, see kl_control,
    None for no penalty. Returns the tuned params and the history.
    """
    policy, optimizer, history, beta = copied(params), Optimizer("adamw", lr, 0.0), [], 0.0
    options = (questions, group, max_new_tokens, np.random.default_rng(seed), history, parallel_map)
    for done, inputs, targets, r in rounds(policy, config, prompts, reward, progress, *options):
        answered = targets != IGNORE
        before = evaluate(model.log_likelihood, params, config, inputs, targets, parallel_map)
        advantages, weight, kls = group_advantages(r, group), 1 / answered.sum(), []

        def part(piece):
            rows, *arguments = piece
            log_p, backward = model.log_likelihood(policy, config, *arguments)
            then = xp.asarray(before[rows, : log_p.shape[1]])
            # a single step with these answers: the ratio is 1, and this the policy gradient
            _, ppo_backward = ppo_loss(log_p, log_p.copy(), xp.asarray(advantages[rows, None]))
            _, kl_backward = kl_loss(log_p, then)
            kls.append(float((log_p - then).sum()))  # in any order
            mask = xp.asarray(answered[rows, : log_p.shape[1]] * weight, dtype=log_p.dtype)
            return backward(ppo_backward(mask) + kl_backward(beta * mask))

        descend(part, pieces(inputs, targets), policy, optimizer, 1 - done, parallel_map)
        kl = math.fsum(kls) / len(r)
        history[-1] |= {"kl": kl, "beta": beta}
        beta = 0.0 if target_kl is None else kl_control(kl, target_kl)
    return policy, history


# --------------------------------------------------------------------------------------------- the chain


def accuracy_of(reward_model, config, comparisons, parallel_map=map):
    """The share of comparisons, (prompt, answers, pairs) each, in which the reward model agrees with the annotator,
    and their number.
    """
    prompts, flat = zip(*((prompt, answer) for prompt, answers, _ in comparisons for answer in answers))
    r = iter(evaluate(rewards, reward_model, config, *as_rows(prompts, flat), parallel_map))
    right = []
    for _, answers, pairs in comparisons:
        own = [next(r) for _ in answers]
        right += [own[better] > own[worse] for better, worse in pairs]
    return (float(np.mean(right)) if right else None), len(right)


def prepare(init, folder, minutes, seed, threads):
    """The folder of an instruct model: `init` if it is one, else made of it or, without it, of nothing."""
    if init is not None:
        tokenizer = bpe.load(os.path.join(init, "tokenizer.json"))
        if chat.has_format(tokenizer):
            print(f"{init} has the tokens of a chat, and is taken for an instruct model")
            return init
    common = {"seed": seed, "threads": threads}
    base, instruct = init or os.path.join(folder, "base"), os.path.join(folder, "instruct")
    if init is None:
        print("1. pre-training: a language model", flush=True)
        train.train(train.Run(train.complete(common | {"minutes": 0.2 * minutes}), base))
    print("\n2. fine-tuning: an assistant", flush=True)
    tuning = {"init": base, "finetune": [], "minutes": 0.11 * minutes}
    train.train(train.Run(train.complete(common | tuning), instruct))
    return instruct


def chain(assistant, folder, seconds, seed):
    """Comparisons, reward model, PPO, DPO and GRPO for the same time each, over-optimisation; writes the folder and
    returns the summary.
    """
    a, parallel_map, end = assistant, assistant.parallel_map, perf_counter() + seconds
    left = lambda share: max(2.0, share * (end - perf_counter()))
    few = lambda most, a_second: max(24, min(most, int(a_second * seconds)))  # in a short time, fewer of everything
    a.held_out = a.held_out[: few(1000, 2)]
    print("\n3. comparisons: a noisy annotator prefers one of two answers", flush=True)
    comparisons = a.comparisons(a.training[: few(1600, 6)], annotator.MISTAKES)
    exact = a.comparisons(a.held_out[: few(300, 1)], mistakes=0.0)
    wrong = lambda: a.rng.random() < annotator.MISTAKES
    noisy = [(prompt, some, [pair[::-1] if wrong() else pair for pair in pairs]) for prompt, some, pairs in exact]
    count = sum(len(pairs) for _, _, pairs in comparisons)
    print(f"   {count:,} comparisons of answers to {len(comparisons):,} questions, a tenth of them wrong", flush=True)

    print("\n4. reward model: learns to predict them", flush=True)
    options = {"seed": seed, "parallel_map": parallel_map}
    steps = len(comparisons) // 13  # of 24 questions each: enough, even on a slow machine
    reward_model = train_reward_model(
        a.params, a.config, comparisons, clock("reward model", left(0.42), steps), **options
    )
    accuracies = [accuracy_of(reward_model, a.config, some, parallel_map) for some in (exact, noisy)]
    (right, of), (right_noisy, _) = accuracies
    if right is not None:
        print(
            f"   right about {right:.1%} of {of:,} comparisons on held-out questions ({right_noisy:.1%} of noisy ones)"
        )

    theirs = [a.answers(a.params, a.held_out) for _ in range(4)]
    their_scores = [a.judge(a.held_out, answers) for answers in theirs]
    proxies = a.evaluate(rewards, reward_model, a.held_out, theirs[0])
    # of the instruct model's own answers: rewards are told as so many standard deviations above their mean
    proxy_mean, proxy_deviation = proxies.mean(), proxies.std() + 1e-9
    true_mean, true_deviation = their_scores[0].mean(), their_scores[0].std() + 1e-9

    def reward(which, answers):
        r = a.evaluate(rewards, reward_model, [a.training[i] for i in which], answers)
        return (r - proxy_mean) / proxy_deviation

    def measure(policy, history):
        """Of a tuned policy: what summary.json says of it, from answers to the held-out questions."""
        mine = a.answers(policy, a.held_out)
        scores = a.judge(a.held_out, mine)
        log_p, log_p_before = (a.evaluate(log_likelihoods, p, a.held_out, mine) for p in (policy, a.params))
        proxy = a.evaluate(rewards, reward_model, a.held_out, mine).mean()
        rate, interval = win_rate(scores, their_scores[0])
        noticed, _ = win_rate(scores, their_scores[0], annotator.NOTICEABLE)
        matched = at_matched_length(mine, scores, theirs, their_scores)
        matched_rate, matched_interval = win_rate(*matched)
        result = {
            "win_rate": rate,
            "win_rate_95": interval,
            "win_rate_noticeable": noticed,
            "win_rate_at_matched_length": matched_rate,
            "win_rate_at_matched_length_95": matched_interval,
            "matched_answers": len(matched[0]),
            "kl": float((log_p - log_p_before).mean()),
            "answer_length": float(np.mean([len(answer) for answer in mine])),
            "true_reward": float((scores.mean() - true_mean) / true_deviation),
            "proxy_reward": float((proxy - proxy_mean) / proxy_deviation),
        }
        if history:
            result["sampling_share"] = sum(h["sampling"] for h in history) / sum(h["seconds"] for h in history)
        return result

    print("\n5. tuning the assistant on the reward, or on the comparisons, for the same time each", flush=True)
    summary = {"reward_model_accuracy": right, "reward_model_accuracy_noisy": right_noisy, "methods": {}}
    summary["answer_length"] = float(np.mean([len(answer) for answer in theirs[0]]))
    each, prompts = left(0.18), a.prompts(a.training)
    rollouts = (a.params, a.config, prompts, reward)
    methods = {
        "ppo": lambda: ppo(*rollouts, clock("ppo", each), max_new_tokens=LONGEST, **options),
        "dpo": lambda: (dpo(a.params, a.config, comparisons, clock("dpo", each), **options), []),
        "grpo": lambda: grpo(*rollouts, clock("grpo", each), max_new_tokens=LONGEST, **options),
    }
    for name, tune in methods.items():
        began = perf_counter()
        policy, history = tune()
        seconds_taken = perf_counter() - began
        a.save(os.path.join(folder, name), policy)
        summary["methods"][name] = {"seconds": seconds_taken} | measure(policy, history)

    print("\n6. over-optimisation: no penalty for going far from the instruct model", flush=True)
    free = {"target_kl": None, "lr": 1.5e-3, "max_new_tokens": LONGEST}
    _, history = grpo(*rollouts, clock("no penalty", each), **free, **options)
    summary["over_optimisation"] = []
    for h in history:
        which, answers = zip(*h["answers"])
        true = (a.judge([a.training[i] for i in which], answers).mean() - true_mean) / true_deviation
        point = {"kl": float(h["kl"]), "proxy_reward": float(h["reward"]), "true_reward": float(true)}
        summary["over_optimisation"].append(point)
    draw(summary, os.path.join(folder, "overoptimisation.png"))
    text = json.dumps(summary, indent=2) + "\n"
    replace(os.path.join(folder, "summary.json"), lambda new: write_text(new, text))
    show(a, folder, summary)
    return summary


def show(a, folder, summary):
    """The summary as a table, and what each model says to a few held-out questions."""
    print(f"\non {len(a.held_out)} held-out questions, against the instruct model, by the true annotator:\n")
    print("         wins   95 % interval   at matched length   KL, nats   tokens   reward: true   proxy   sampling")
    for name, m in summary["methods"].items():
        low, high = m["win_rate_95"]
        sampling = f"{m['sampling_share']:8.0%}" if "sampling_share" in m else "    none"
        matched = "none" if m["win_rate_at_matched_length"] is None else f"{m['win_rate_at_matched_length']:.1%}"
        print(f"{name:5}{m['win_rate']:8.1%}   {low:.1%} to {high:.1%}{matched:>14}{m['kl']:14.1f}", end="")
        print(f"{m['answer_length']:9.1f}{m['true_reward']:13.2f}{m['proxy_reward']:9.2f}   {sampling}")
    print(f"\nan answer of the instruct model has {summary['answer_length']:.1f} tokens on average")
    print("rewards are above the instruct model's mean, in its standard deviations")
    models = {"instruct": a.params}
    models |= {name: model.load(os.path.join(folder, name))[0] for name in summary["methods"]}
    for question in a.held_out[:4]:
        print(f"\nWhat does {question[0]} do?")
        for name, params in models.items():
            print(f"  {name:10}{a.text(a.answers(params, [question])[0])}")
    print(f"\nsummary: {os.path.join(folder, 'summary.json')}, figure: {os.path.join(folder, 'overoptimisation.png')}")
    print(f"talk to one: python model.py --load {os.path.join(folder, 'ppo')} --chat")


def draw(summary, path):
    """True and proxy reward against √KL (Gao et al. 2022, figure 1)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curve = summary["over_optimisation"]
    distance = [max(0.0, point["kl"]) ** 0.5 for point in curve]
    for name, label, colour in ("proxy_reward", "reward model", "C1"), ("true_reward", "annotator", "C0"):
        axes.plot(distance, [point[name] for point in curve], color=colour, label=f"{label}, without a KL penalty")
        for (method, m), marker in zip(summary["methods"].items(), "os^"):
            axes.plot(max(0.0, m["kl"]) ** 0.5, m[name], marker, color=colour)
            axes.annotate(method, (max(0.0, m["kl"]) ** 0.5, m[name]), textcoords="offset points", xytext=(6, -4))
    axes.set(xlabel="√KL from the instruct model (nats an answer)", ylabel="reward (standard deviations)")
    axes.set(title="Over-optimisation of a reward model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def learn_from_human(assistant, folder, seconds, seed):
    """Comparisons at the terminal, then DPO on all that were ever made in this folder."""
    a, path = assistant, os.path.join(folder, "comparisons.jsonl")
    judged = {c["question"] for c in annotator.read_comparisons(path)}
    print(f"which answer is better? {len(judged)} comparisons so far, in {path}")

    def pairs():
        for question in a.training:
            asked = corpus.as_conversation(question[0], "")[0]["content"]
            if asked not in judged:
                tokens = a.answers(a.params, [question, question])
                if tokens[0] != tokens[1]:
                    yield asked, [a.text(answer) for answer in tokens], tokens

    annotator.ask(path, pairs())
    print(f"\ngo on comparing with: python rlhf.py --human --out {folder}")
    made = [c for c in annotator.read_comparisons(path) if c["chosen"] is not None]
    if not made:
        return print("no comparisons yet, nothing to learn from")
    comparisons = [
        (
            chat.prompt(a.tokenizer, [{"role": "user", "content": c["question"]}]),
            c["tokens"],
            [(c["chosen"], 1 - c["chosen"])],
        )
        for c in made
    ]
    progress = clock("learning", seconds)
    policy = dpo(a.params, a.config, comparisons, progress, seed=seed, parallel_map=a.parallel_map)
    a.save(os.path.join(folder, "human"), policy)
    print(f"learned from {len(made)} comparisons")
    print(f"talk to it: python model.py --load {os.path.join(folder, 'human')} --chat")


def main(argv=None):
    parser = cli.Parser(description="From a language model to an assistant tuned by feedback: PPO, DPO and GRPO.")
    parser.add_argument("--init", metavar="DIR", help="a model of train.py, fine-tuned or not; a new one if not given")
    parser.add_argument("--out", metavar="DIR", help="folder of all results; a new one under runs/ if not given")
    parser.add_argument("--minutes", type=float, default=7.2, help="time for all of it (default 7.2)")
    parser.add_argument("--human", action="store_true", help="compare answers yourself, and learn from that")
    parser.add_argument("--threads", type=int, help="all cores if not given")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 < args.minutes < float("inf"):
        parser.error("--minutes must be more than 0")
    if args.threads is not None and args.threads < 1 or args.seed < 0:
        parser.error("--threads must be at least 1, and --seed at least 0")
    if args.init is not None:
        checkpoint.existing(args.init)
    began, folder = perf_counter(), args.out or train.new_folder()
    going_on = args.human and os.path.exists(os.path.join(folder, "comparisons.jsonl"))
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)) and not going_on:
        raise ValueError(f"{folder} holds something already: name another --out")
    threads = args.threads or (cores() if xp is np else 1)
    instruct = os.path.join(folder, "instruct")
    if not (going_on and os.path.exists(os.path.join(instruct, "model.safetensors"))):
        if going_on and not args.init:
            raise ValueError(f"{folder} was begun with a model of --init: name it again")
        instruct = prepare(args.init, folder, args.minutes, args.seed, threads)
    os.makedirs(folder, exist_ok=True)
    with thread_pool(threads) as pool:
        assistant = Assistant(instruct, args.seed, pool.map)
        if args.human:
            return learn_from_human(assistant, folder, 0.1 * 60 * args.minutes, args.seed)
        chain(assistant, folder, 60 * args.minutes - (perf_counter() - began), args.seed)


if __name__ == "__main__":
    cli.run(main)
