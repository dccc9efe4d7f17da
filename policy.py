"""Proceso de entrenamiento: a language model as a policy, the view that RLHF takes of it.

A question is the state, an answer the action, and π(y|x), the product of the probabilities of the answer's tokens, is
how likely the model finds it. Here is what a policy needs: answers drawn from it, their log-likelihood with its
gradient, and a second head on the same body that gives a number instead of a token: the reward of an answer, or the
value of an answer so far.

Shapes: batch answers, one a row, of at most time tokens with their prompts.
"""

import itertools
from time import perf_counter

import numpy as np

import model
from engine import to_numpy, xp
from layers import IGNORE, linear, linear_log_likelihood
from optim import clip


def sample_answers(params, config, prompts, max_new_tokens, temperature=1.0, rng=None, parallel_map=map, size=64):
    """Answers to prompts, drawn with the KV cache, `size` at a time: a list of lists of ids, each up to a token that
    ends it, or to max_new_tokens.
    """
    rng = rng or np.random.default_rng(0)
    parts = [(prompts[start : start + size], rng.integers(2**63)) for start in range(0, len(prompts), size)]

    def part(job):
        asked, seed = job
        drawing = {"temperature": temperature, "rng": np.random.default_rng(seed)}
        steps = np.stack(list(model.generate_batch(params, config, asked, max_new_tokens, **drawing)), axis=1)
        return [row[row >= 0].tolist() for row in steps]

    return [answer for answers in parallel_map(part, parts) for answer in answers]


def as_rows(prompts, answers):
    """Prompts and answers, lists of lists of ids, as inputs and targets (batch, time): the answers are the targets."""
    time = max(len(p) + len(a) for p, a in zip(prompts, answers)) - 1
    inputs, targets = np.zeros((len(prompts), time), np.int64), np.full((len(prompts), time), IGNORE)
    for row, target, p, a in zip(inputs, targets, prompts, answers):
        row[: len(p) + len(a) - 1] = (p + a)[:-1]
        target[len(p) - 1 : len(p) + len(a) - 1] = a
    return inputs, targets


def log_likelihoods(params, config, inputs, targets):
    """log π(answer | prompt): (batch,), the sum over the answer's tokens, and backward(dlog_p) -> grads."""
    log_p, log_p_backward = model.log_likelihood(params, config, inputs, targets)
    return log_p.sum(axis=1), lambda d: log_p_backward(xp.broadcast_to(d[:, None], log_p.shape))


def values(params, config, inputs, targets):
    """The scalar head: one number for the text up to each token, (batch, time), and backward(dvalues) -> grads.

    params: of a language model, and score.weight (1, hidden_size).
    """
    hidden, body_backward = model.transformer(params, config, inputs)
    y, head_backward = linear(hidden, params["score.weight"])

    def backward(dvalues):
        dhidden, dhead = head_backward(dvalues[..., None])
        return model.added(params, body_backward(dhidden), {"score.weight": dhead})

    return y[..., 0], backward


def answer_values(params, config, inputs, targets):
    """The scalar head where each token of an answer has been read: (batch, time), 0 where there is no answer, and
    backward(dv) -> grads. The last token is no input of the language model, so all are read one place later.
    """
    answered = targets != IGNORE
    whole = xp.concatenate([inputs, xp.zeros_like(inputs[:, :1])], axis=1)
    whole[:, 1:][answered] = targets[answered]
    v, values_backward = values(params, config, whole, None)

    def backward(dv):
        dwhole = xp.zeros_like(v)
        dwhole[:, 1:] = dv * answered
        return values_backward(dwhole)

    return v[:, 1:] * answered, backward


def rewards(params, config, inputs, targets):
    """The reward model: the mean of the scalar head over an answer's tokens, (batch,), and backward(dr) -> grads.

    Ouyang et al. (2022) read the last token only, which has to learn first to gather what all the others did.
    """
    v, values_backward = answer_values(params, config, inputs, targets)
    count = (targets != IGNORE).sum(axis=1)
    return v.sum(axis=1) / count, lambda dr: values_backward(xp.broadcast_to((dr / count)[:, None], v.shape))


def policy_and_values(params, config, inputs, targets):
    """Both heads on one body, for PPO: (log_p, values), (batch, time) each, and backward(dlog_p, dvalues) -> grads."""
    hidden, body_backward = model.transformer(params, config, inputs)
    log_p, lm_backward = linear_log_likelihood(hidden, params[model.head_name(config)], targets)
    v, value_backward = linear(hidden, params["score.weight"])

    def backward(dlog_p, dvalues):
        dhidden, dlm = lm_backward(dlog_p)
        dhidden_too, dvalue = value_backward(dvalues[..., None])
        dhidden += dhidden_too
        return model.added(params, body_backward(dhidden), {model.head_name(config): dlm, "score.weight": dvalue})

    return (log_p, v[..., 0]), backward


def pieces(inputs, targets, size=32):
    """The rows in pieces of about one length, each cut off behind its longest: (rows, inputs, targets) of each."""
    answered = targets != IGNORE
    lengths = targets.shape[1] - answered[:, ::-1].argmax(axis=1)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        end = lengths[rows].max()
        yield rows, xp.asarray(inputs[rows, :end]), xp.asarray(targets[rows, :end])


def evaluate(function, params, config, inputs, targets, parallel_map=map):
    """The value of function(params, config, inputs, targets), such as the ones above, for all rows: (batch,) or (batch,
    time), a NumPy array.
    """

    def part(piece):
        rows, *arguments = piece
        return rows, to_numpy(function(params, config, *arguments)[0])

    whole = None
    for rows, value in parallel_map(part, pieces(inputs, targets)):
        if whole is None:
            whole = np.zeros(inputs.shape[: value.ndim], value.dtype)
        whole[(rows, slice(value.shape[1])) if value.ndim == 2 else rows] = value
    return whole


def descend(part, parts, params, optimizer, schedule=1.0, parallel_map=map):
    """A step of the optimiser along the sum of the gradients part(x), dicts, for x in parts."""
    parts = iter(parallel_map(part, parts))  # one at a time, as each is as large as the model
    total = next(parts)
    for grads in parts:
        for name, g in grads.items():
            total[name] += g
    clip(total)
    optimizer.step(params, total, schedule, parallel_map)


def copied(params):
    return {name: xp.array(w, order="C") for name, w in params.items()}


def clock(label, seconds, steps=1):
    """Yields the fraction done, 0 to 1, until both the seconds from now and the least number of steps are over.

    label: of a progress bar; None for none. There is none either where standard error is no terminal.
    """
    from tqdm import tqdm

    began = perf_counter()

    def ticks():
        bar_format = "{desc:30}{percentage:3.0f}%|{bar}| {elapsed}"
        with tqdm(total=1.0, desc=label, disable=True if label is None else None, bar_format=bar_format) as bar:
            for step in itertools.count():
                done = min((perf_counter() - began) / seconds, step / steps)
                if done >= 1:
                    break
                bar.update(done - bar.n)
                yield done
            bar.update(1 - bar.n)

    return ticks()
