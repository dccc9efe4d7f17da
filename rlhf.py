"""Proceso de entrenamiento: Reinforcement Learning with Human Feedback (RLHF).

What makes an answer useful, honest and safe cannot be written down as a loss, but people can say which of two is
better. From their comparisons a reward model learns a number r(x, y) for answer y to question x, and the language
model, now called the policy π, is tuned to answers of high reward. It must not go far from the model π₀ it began as,
the reference policy: far from it are answers that the reward model has never seen (Ziegler et al. 2019; Ouyang et al.
2022).

    P(y is preferred to y') = σ(r(x, y) - r(x, y'))                               (Bradley & Terry 1952)
    maximise  E[r(x, y)] - β KL(π ‖ π₀)

PPO samples answers, and credits each token with how much it beat what a value head expected. GRPO samples several
answers to a question, and judges each by the mean of all. DPO samples nothing: comparisons train π directly.

    python rlhf.py                                        the whole chain, with a program in the human's place
    python rlhf.py --human                                compare the answers yourself
    python rlhf.py --init DIR --comparisons FILE.jsonl    a chat model, and preferences of your own, by DPO

Shapes: batch answers, one a row, of at most time tokens with their questions. Losses are not averaged: one number for
each token, answer or pair. Only log_p, values and r get gradients; other arguments are constants.
"""

import model
from engine import np, scatter_add, to_numpy, xp
from engine.batches import as_rows, comparison_batches, copied, evaluate, flat, pieces, sampled, shuffled
from layers import IGNORE, linear, linear_log_likelihood, sigmoid
from optim import Optimizer, descend


# ---------------------------------------------------------------------------------- comparisons, and the reward model
def bradley_terry(r, better, worse):
    """-log σ(r - r') of each comparison: how unlikely the reward model finds what was preferred. r: (batch,) rewards;
    better, worse: (pairs,) rows of r. Returns losses (pairs,) and backward(dlosses) -> dr.
    """
    margin = r[better] - r[worse]

    def backward(dlosses):
        # next to nothing for a pair that is far apart the right way already
        dmargin = (sigmoid(margin)[0] - 1) * dlosses
        dr = xp.zeros_like(r)[:, None]
        scatter_add(dr, better, dmargin[:, None])  # an answer may be in several pairs
        scatter_add(dr, worse, -dmargin[:, None])
        return dr[:, 0]

    return xp.logaddexp(0, -margin), backward


# A reward model is the language model with a second head, which says a number instead of a token. PPO's value head is
# the same, read one place earlier. A question of two tokens and an answer of three:
#     token      What    is      Sorts   it      .
#     input      What    is      Sorts   it              what a language model reads ...
#     target     -       Sorts   it      .               ... and has to say next; "-": IGNORE
#     log_p      0       log π(Sorts | What is), log π(it | What is Sorts), ...
#     value              V       V       V               PPO: expected before Sorts, it and . are written
#     reward                                     r       reward model: known when the last one has been read


def policy_and_values(params, config, inputs, targets):
    """(log_p, values), (batch, time) each, and backward(dlog_p, dvalues) -> grads. score.weight: (1, hidden_size)."""
    hidden, body_backward = model.transformer(params, config, inputs)
    head = model.head_name(config)
    log_p, lm_backward = linear_log_likelihood(hidden, params[head], targets)
    values, score_backward = linear(hidden, params["score.weight"])

    def backward(dlog_p, dvalues):
        (dhidden, dlm), (dhidden_too, dscore) = lm_backward(dlog_p), score_backward(dvalues[..., None])
        return model.added(params, body_backward(dhidden + dhidden_too), {head: dlm, "score.weight": dscore})

    return (log_p, values[..., 0]), backward


def rewards(params, config, inputs, targets):
    """r(x, y): what the second head says at an answer's last token, (batch,), and backward(dr) -> grads."""
    rows, last = xp.arange(len(inputs)), (targets != IGNORE).cumsum(axis=1).argmax(axis=1)
    tokens = xp.pad(inputs, ((0, 0), (0, 1)))
    tokens[rows, last + 1] = targets[rows, last]  # the last token, which is no input of a language model
    (_, values), backward = policy_and_values(params, config, tokens, xp.full_like(tokens, IGNORE))  # no log π

    def reward_backward(dr):
        dvalues = xp.zeros_like(values)
        dvalues[rows, last + 1] = dr
        return backward(xp.zeros_like(values), dvalues)

    return values[rows, last + 1], reward_backward


def train_reward_model(params, config, comparisons, progress, lr=3e-3, batch=24, seed=0, parallel_map=map):
    """Returns the params of a reward model, made of a language model's. comparisons: of each question (prompt, answers,
    pairs): ids, a list of ids, and pairs (better, worse) of answers. progress: yields what part is done, once a step.
    """
    params = copied(params) | {"score.weight": xp.zeros((1, config.hidden_size), np.float32)}
    optimizer, rng = Optimizer("muon", lr, 0.0), np.random.default_rng(seed)
    for done, parts in zip(progress, comparison_batches(comparisons, batch, rng)):

        def gradient(part):
            _, inputs, targets, better, worse, weight = part
            r, backward = rewards(params, config, inputs, targets)
            losses, loss_backward = bradley_terry(r, better, worse)
            return backward(loss_backward(xp.full_like(losses, weight)))

        descend(gradient, parts, params, optimizer, 1 - done, parallel_map)
    return params


# ------------------------------------------------------------------------------------ the policy gradient: REINFORCE
def sample_answers(params, config, prompts, max_new_tokens, temperature=1.0, rng=None, parallel_map=map, size=64):
    """Answers y ~ π(·|x): a list of lists of ids, each up to a token that ends it, or to max_new_tokens."""

    def generate(some, rng):
        return model.generate_batch(params, config, some, max_new_tokens, temperature=temperature, rng=rng)

    return sampled(generate, prompts, rng, parallel_map, size)


def log_likelihoods(params, config, inputs, targets):
    """log π(y|x): (batch,), the sum over the answer's tokens, and backward(dlog_p) -> grads."""
    log_p, backward = model.log_likelihood(params, config, inputs, targets)
    return log_p.sum(axis=1), lambda d: backward(xp.broadcast_to(d[:, None], log_p.shape))


# A reward is not differentiable in the policy's weights, but the probability of the answer is. As ∇π = π ∇log π,
#
#     ∇ E[r] = Σ r(x, y) ∇π(y|x) = Σ π(y|x) r(x, y) ∇log π(y|x) = E[r ∇log π]        (REINFORCE, Williams 1992)
#
# and the mean of r ∇log π over answers that were drawn estimates it. A baseline b that does not depend on y is free:
#
#     E[b ∇log π] = b Σ π(y|x) ∇log π(y|x) = b ∇ Σ π(y|x) = b ∇1 = 0
#
# With the advantage A = r - b, A ∇log π has the same expectation as r ∇log π, and less noise where b is near the reward
# that was to be expected. The action is
#     an answer     with one advantage for all of its tokens; b: the mean reward of several, see group_advantages (GRPO)
#     or a token    as log π(y|x) = Σ log π(y_t | x, y_<t), with an advantage for each: it is credited with the
#                   rewards from it on, and b is the value V(x, y_<t) of the text before it                        (PPO)


def policy_gradient_loss(log_p, rewards, baseline=0.0):
    """-(r - b) log π: its gradient is REINFORCE's. rewards: r, or advantages, in which a baseline is already. Returns
    losses and backward(dlosses) -> dlog_p.
    """
    advantages = rewards - baseline
    return -advantages * log_p, lambda dlosses: -advantages * dlosses


def masked_sum(x, mask):
    """The sum of x where mask is True, a number."""
    return (x * mask).sum()


def masked_mean(x, mask):
    """The mean of x where mask is True, a number."""
    return masked_sum(x, mask) / mask.sum()


def entropy(logits):
    """H(π) = -Σ p log p, in nats, of logits (..., vocab): how undecided a policy is. Returns (...,) and
    backward(dentropy) -> dlogits. The mean of -log π(y_t) over tokens drawn from π estimates it.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    p = xp.exp(log_p)
    h = -(p * log_p).sum(axis=-1)
    return h, lambda dentropy: -dentropy[..., None] * p * (log_p + h[..., None])


# ------------------------------------------------------------------------- PPO: a value head, and several steps a round
def generalised_advantages(rewards, values, answered, gamma=1.0, lam=0.95):
    """How much better each token did than expected (GAE, Schulman et al. 2016, equation 16):

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γλ A_{t+1}

    λ = 1: all that came afterwards, less V: unbiased and noisy; λ = 0: the next value is believed. All are (batch,
    time); answered: True at the tokens of the answer. Advantages are 0 elsewhere.
    """
    advantages, after, value_after = np.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        advantages[:, t] = after = answered[:, t] * (delta + gamma * lam * after)
        value_after = answered[:, t] * values[:, t]
    return advantages


def ppo_loss(log_p, old_log_p, advantages, clip=0.2):
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7):

        -min(ratio A, clip(ratio, 1 - c, 1 + c) A),   ratio = π(token) / π_old(token)

    After the first step π is no longer the policy π_old that drew the answers. The ratio corrects for that, and the
    clip takes the gradient away once it is more than c past 1 in the direction that pays. Where the ratio is 1 the
    gradient is that of -A log π. Returns losses and backward(dlosses) -> dlog_p.
    """
    ratio = xp.exp(log_p - old_log_p)
    free, bounded = -ratio * advantages, -xp.clip(ratio, 1 - clip, 1 + clip) * advantages
    # where the bounded one is larger it is constant; -ratio A is its own derivative by log π
    return xp.maximum(free, bounded), lambda dlosses: xp.where(free >= bounded, free, 0) * dlosses


def value_loss(values, returns):
    """½ (V - R)² of each token. Returns losses and backward(dlosses) -> dvalues."""
    error = values - returns
    return error * error / 2, lambda dlosses: error * dlosses


def ppo(params, config, prompts, reward, progress, beta, lr, batch=128, max_new_tokens=40, seed=0, parallel_map=map):
    """Proximal policy optimisation (Schulman et al. 2017; for language models Ziegler et al. 2019). reward(which,
    answers) -> (batch,): of answers to prompts[i] for i in which. beta(kl): the penalty's weight, given the present KL
    from π₀ in nats an answer, in the place of Ziegler et al.'s controller; `lambda kl: 0.05` is a fixed one.
    KL is paid for in the rewards, token by token. Advantages are normalised in a round; each answer is learned from
    twice, 64 at a time, with the mean over all of their tokens as the loss; the value loss weighs 0.1.
    Returns the tuned params, with the value head, and a dict of each round: reward, kl, entropy, which, answers.
    """
    policy = copied(params) | {"score.weight": xp.zeros((1, config.hidden_size), np.float32)}
    optimizer, rng, history = Optimizer("adamw", lr, 0.0), np.random.default_rng(seed), []
    for done, which in zip(progress, shuffled(len(prompts), batch, rng)):
        # sample
        asked = [prompts[i] for i in which]
        answers = sample_answers(policy, config, asked, max_new_tokens, 1.0, rng, parallel_map)
        r, (inputs, targets) = np.asarray(reward(which, answers)), as_rows(asked, answers)
        ref_log_p = evaluate(model.log_likelihood, params, config, inputs, targets, parallel_map)
        old_log_p, values = evaluate(policy_and_values, policy, config, inputs, targets, parallel_map)
        # reward: each token pays for going away from π₀, and the last one gets what the answer is worth
        answered, kl = targets != IGNORE, (old_log_p - ref_log_p).sum(axis=1).mean()
        token_rewards = -beta(kl) * (old_log_p - ref_log_p)
        token_rewards[np.arange(batch), answered.cumsum(axis=1).argmax(axis=1)] += r
        # advantage
        advantages = generalised_advantages(token_rewards, values, answered)
        returns = advantages + values
        mean = masked_mean(advantages, answered)
        advantages = (advantages - mean) / (masked_mean((advantages - mean) ** 2, answered) ** 0.5 + 1e-6)
        # step: twice with each answer, 64 of them at a time
        minibatches = lambda: np.array_split(rng.permutation(batch), max(1, batch // 64))
        for rows in [*minibatches(), *minibatches()]:
            mask = (answered[rows] / answered[rows].sum()).astype(values.dtype)

            def gradient(piece):
                _, inputs, targets, old_log_p, advantages, returns, mask = piece
                (log_p, values), backward = policy_and_values(policy, config, inputs, targets)
                _, policy_backward = ppo_loss(log_p, old_log_p, advantages)
                _, value_backward = value_loss(values, returns)
                return backward(policy_backward(mask), value_backward(0.1 * mask))

            parts = pieces(*(x[rows] for x in (inputs, targets, old_log_p, advantages, returns)), mask)
            descend(gradient, parts, policy, optimizer, 1 - done, parallel_map)
        told = {"reward": r.mean(), "kl": kl, "entropy": -masked_mean(old_log_p, answered)}
        history.append(told | {"which": which, "answers": answers})
    return policy, history


# ------------------------------------------------------------- GRPO: several answers to a question, no value head
def group_advantages(rewards, group, deviation=True):
    """How far each of `group` answers to a question, which stand together, lies above their mean, in standard
    deviations or, if not `deviation`, as it is. That mean has the answer's own reward in it: not divided, the expected
    gradient is 1 - 1/group of REINFORCE's. Both (batch,).
    """
    r = rewards.reshape(-1, group)
    above = r - r.mean(axis=1, keepdims=True)
    return (above / (r.std(axis=1, keepdims=True) + 1e-4) if deviation else above).ravel()


def kl_loss(log_p, ref_log_p):
    """An estimate of KL(π ‖ π₀) from each token drawn from π: e^d - d - 1 with d = log π₀ - log π, never negative and
    less noisy than -d near π₀ (Schulman 2020; Shao et al. 2024, equation 4). With the tokens held fixed its gradient is
    that of KL(π₀ ‖ π), which pulls towards π₀ as well. Returns losses and backward(dlosses) -> dlog_p.
    """
    d = ref_log_p - log_p
    return xp.expm1(d) - d, lambda dlosses: -xp.expm1(d) * dlosses


# As published GRPO divides twice, and both favour what should not matter (Liu et al. 2025b, section 3.1):
#     by an answer's length: a token of a long bad answer is punished less, so that bad answers grow longer;
#     by the deviation of the group: questions that nearly all answers, or nearly none, get right count more.
# Dr. GRPO ("done right") divides by neither, but by one number of tokens for all.


def grpo(params, config, prompts, reward, progress, beta, lr, batch=128, group=8, max_new_tokens=40, seed=0,
         parallel_map=map, done_right=False):  # fmt: skip
    """Group relative policy optimisation (Shao et al. 2024, equation 3), with one step a round, so that PPO's ratio is
    1; or, if `done_right`, Dr. GRPO, with the KL penalty that the paper leaves out. Arguments as of `ppo`; the batch
    has `group` answers to each of its questions. β follows from the KL of the round before, and is 0 in the first.
    """
    policy, optimizer, rng = copied(params), Optimizer("adamw", lr, 0.0), np.random.default_rng(seed)
    history, penalty = [], 0.0
    for done, which in zip(progress, shuffled(len(prompts), batch // group, rng)):
        # sample
        which = [i for i in which for _ in range(group)]
        asked = [prompts[i] for i in which]
        answers = sample_answers(policy, config, asked, max_new_tokens, 1.0, rng, parallel_map)
        r, (inputs, targets) = np.asarray(reward(which, answers), np.float32), as_rows(asked, answers)
        ref_log_p = evaluate(model.log_likelihood, params, config, inputs, targets, parallel_map)
        # advantage
        advantages, answered = group_advantages(r, group, not done_right), targets != IGNORE
        tokens = max_new_tokens if done_right else answered.sum(axis=1, keepdims=True)
        # step
        mask = (answered / (batch * tokens)).astype(np.float32)
        drawn_log_p = np.zeros_like(ref_log_p)  # of this round's tokens, for kl and entropy: `gradient` fills it in

        def gradient(piece):
            rows, inputs, targets, ref_log_p, advantages, mask = piece
            log_p, backward = model.log_likelihood(policy, config, inputs, targets)
            drawn_log_p[rows, : log_p.shape[1]] = to_numpy(log_p)
            _, policy_backward = policy_gradient_loss(log_p, advantages)
            _, kl_backward = kl_loss(log_p, ref_log_p)
            return backward(policy_backward(mask) + kl_backward(penalty * mask))

        parts = pieces(inputs, targets, ref_log_p, advantages[:, None], mask)
        descend(gradient, parts, policy, optimizer, 1 - done, parallel_map)
        kl = masked_sum(drawn_log_p - ref_log_p, answered) / batch
        penalty = beta(kl)  # of the next round
        told = {"reward": r.mean(), "kl": kl, "entropy": -masked_mean(drawn_log_p, answered)}
        history.append(told | {"which": which, "answers": answers})
    return policy, history


# ----------------------------------------------------------------------------- DPO: the optimum, solved for the reward
# E[r] - β KL(π ‖ π₀) = β log Z(x) - β KL(π ‖ π*), where Z(x) = Σ π₀(y|x) exp(r(x, y) / β) and the optimum is
#
#     π*(y|x) = π₀(y|x) exp(r(x, y) / β) / Z(x)
#     r(x, y) = β log(π*(y|x) / π₀(y|x)) + β log Z(x)
#     r(x, y) - r(x, y') = β log(π*(y|x) / π₀(y|x)) - β log(π*(y'|x) / π₀(y'|x))
#
# Comparisons ask for that difference alone, in which Z(x), a sum over all answers, cancels: they can train π itself.


def dpo_loss(log_p, ref_log_p, better, worse, beta=0.1):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): Bradley-Terry, with r = β log(π / π₀).
    log_p, ref_log_p: (batch,), of answers, under π and π₀. Returns losses (pairs,) and backward(dlosses) -> dlog_p.
    """
    losses, backward = bradley_terry(beta * (log_p - ref_log_p), better, worse)
    return losses, lambda dlosses: beta * backward(dlosses)


def dpo(params, config, comparisons, progress, beta=0.1, lr=1e-3, batch=24, seed=0, parallel_map=map):
    """Tunes a policy on comparisons. Arguments as of `train_reward_model`. Returns the tuned params."""
    policy, optimizer, rng = copied(params), Optimizer("muon", lr, 0.0), np.random.default_rng(seed)
    ref_log_p = evaluate(log_likelihoods, params, config, *flat(comparisons)[:2], parallel_map)
    for done, parts in zip(progress, comparison_batches(comparisons, batch, rng)):

        def gradient(part):
            rows, inputs, targets, better, worse, weight = part
            log_p, backward = log_likelihoods(policy, config, inputs, targets)
            losses, loss_backward = dpo_loss(log_p, xp.asarray(ref_log_p[rows]), better, worse, beta)
            return backward(loss_backward(xp.full_like(losses, weight)))

        descend(gradient, parts, policy, optimizer, 1 - done, parallel_map)
    return policy


if __name__ == "__main__":
    from engine.cli import run
    from lab.feedback import main

    run(main)
