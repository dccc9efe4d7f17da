"""Razonamiento: chain of thought (CoT), a model that writes its steps down before it answers.

    27+58?    at once: #85        in steps: 7+8+0=15
                                            2+5+1=085
                                            #85

(After the second = stand the carry and all digits found so far.)

Between one token and the next a transformer computes only as deep as it has layers, and a problem of many steps, each
of which needs the one before, does not fit into that. But what is written becomes input again: a model that writes its
steps computes deeper the longer it writes, and writes longer for a harder problem (Wei et al. 2022; Li et al. 2024). A
chain z of steps is drawn like any text, and the answer y to the question x follows from it:

    p(y | x) = Σ_z p(z | x) p(y | x, z)

    self-consistency    the answer that most of n chains reach, the likeliest y as they are drawn (Wang et al. 2022)
    best of n           the chain that a verifier prefers, which learned from marked answers (Cobbe et al. 2021)
    reinforcement       chains with a right answer become likelier: GRPO (DeepSeek-AI 2025)

    python cot.py                                a small model trained both ways, in under eight minutes
    python cot.py --load DIR --question TEXT     a published chat model, with and without "think step by step"

    >>> import numpy as np
    >>> from cot import addition, written
    >>> problem = addition(2, np.random.default_rng(0))
    >>> print(problem.question + written(problem, "cot"))
    86+67?
    6+7+0=13
    8+6+1=153
    #153
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections import Counter, namedtuple

import bpe
import model
import rlhf
from engine import np, xp
from engine.batches import as_rows, copied, evaluate, pieces
from engine.threads import cores
from optim import Optimizer, clip, descend, warm_up_and_decay
from rlhf import log_likelihoods, sample_answers

# ------------------------------------------------------------------- a problem as text, with and without its steps

Problem = namedtuple("Problem", "question steps answer")  # three texts, of which the steps are a list of lines
MARK, END = "#", 0  # what stands before an answer; the token behind it
TOKENIZER = bpe.train("any text", 257)  # END and the 256 bytes: no room for merges


def written(problem, way):
    """What the model has to write: "direct" the answer, "cot" the steps first."""
    steps = problem.steps if way == "cot" else []
    return "".join(f"\n{line}" for line in [*steps, MARK + problem.answer])


def prompt(problem):
    return TOKENIZER.encode(problem.question)


def answer_in(ids):
    """The answer in what a model wrote; None where it has not come to an end, or not to one answer."""
    *ids, last = ids
    _, *answers = TOKENIZER.decode(ids).split(f"\n{MARK}")
    return answers[0] if last == END and len(answers) == 1 else None


def reward(problem, ids):
    """1 for a right answer, 0 for any other: what comes before the answer is not judged."""
    return float(answer_in(ids) == problem.answer)


# ----------------------------------------------------------------------- problems, whose difficulty is a number


def addition(digits, rng):
    """Two numbers with so many digits, as 47+85. A step adds two digits, from the right, and the carry so far; it
    writes the new carry and behind it all digits that are found: 7+5+0=12, then 4+8+1=132.
    """
    a, b = (int(number) for number in rng.integers(10 ** (digits - 1), 10**digits, 2))
    steps, carry, found = [], 0, ""
    for x, y in zip(map(int, reversed(str(a))), map(int, reversed(str(b)))):
        step = f"{x}+{y}+{carry}"
        carry, digit = divmod(x + y + carry, 10)
        found = f"{digit}{found}"
        steps.append(f"{step}={carry}{found}")
    return Problem(f"{a}+{b}?", steps, str(a + b))


def walk(moves_from, state, length, rng):
    """So many moves, each drawn from moves_from(state): pairs (move, next state). Returns all moves, and all states."""
    path = []
    for _ in range(length):
        options = moves_from(state)
        path.append(options[rng.integers(len(options))])
        _, state = path[-1]
    return zip(*path)


@functools.cache
def swaps(row):
    """The moves there are in a row: two who swap places."""
    return [(x + y, row.translate(str.maketrans(x + y, y + x))) for x, y in itertools.permutations(sorted(row), 2)]


def permutations(length, rng):
    """Five sit in a row, and `length` times two of them swap places. How do they sit at the end? A step says again who
    swaps, and writes the row: to ABCDE aAD bBE, with labels that tell the swaps apart, aAD DBCAE, then bBE DECAB. As
    the group S5 is not solvable, no transformer of a fixed depth is expected to answer at once for all lengths
    (Barrington 1989; Merrill & Sabharwal 2023).
    """
    row = "".join(rng.permutation(list("ABCDE")))
    moves, rows = walk(swaps, row, length, rng)
    said = [f"{label}{move}" for label, move in zip("abcdefghijklmnopqrstuvwxyz", moves)]
    return Problem(f"{row} {' '.join(said)}?", [f"{s} {r}" for s, r in zip(said, rows)], rows[-1])


@functools.cache
def changes(total):
    """The moves there are from a total, in words and in signs: to another one from 0 to 20."""
    moves = [((f"finds {k}", f"+{k}"), total + k) for k in range(1, 6)]
    moves += [((f"loses {k}", f"-{k}"), total - k) for k in range(1, 6)]
    moves += [(("doubles", "*2"), 2 * total)] + ([] if total % 2 else [(("halves", "/2"), total // 2)])
    return [(move, after) for move, after in moves if 0 <= after <= 20]


def stories(length, rng):
    """Somebody has some things, and every day the number changes. A step computes the new number."""
    total = int(rng.integers(1, 11))
    who = rng.choice(["Ana", "Bob", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe"])
    what = rng.choice(["books", "coins", "shells", "stamps"])
    moves, totals = walk(changes, total, length, rng)
    days = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"][:length]
    told = "".join(f" {day} {words}." for day, (words, _) in zip(days, moves))
    sums = zip(days, [total, *totals], moves, totals)
    steps = [f"{day} {before}{sign}={after}" for day, before, (_, sign), after in sums]
    return Problem(f"{who} has {total} {what}.{told} How many?", steps, str(totals[-1]))


TASKS = {  # and the difficulties to test at; training goes one beyond, so that the hardest is not its edge
    "addition": (addition, [1, 2, 3, 4, 5, 6]),
    "permutations": (permutations, [1, 2, 3, 4, 6, 8, 10]),
    "stories": (stories, [1, 2, 3, 4, 5, 6]),
}


def computation(problem):
    """What is computed in a problem, whatever the names in it and the order of two summands or of who swaps."""
    return " ".join([problem.answer, *("".join(sorted(step)) for step in problem.steps)])


def held_out(problem):
    """Whether a problem is for tests only: a tenth of all computations are, which depends on nothing but themselves."""
    return hashlib.blake2b(computation(problem).encode(), digest_size=4).digest() < b"\x19\x99\x99\x99"


def practice(task, difficulty, rng):
    """A problem that may be trained on."""
    while held_out(problem := TASKS[task][0](difficulty, rng)):
        pass
    return problem


# --------------------------------------------------------------------------- training, at once or in steps

TOKENS = {"vocab_size": TOKENIZER.vocab_size, "bos_token_id": END, "eos_token_id": END, "max_position_embeddings": 512}
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1000.0, "initializer_range": 0.05}
CONFIG = dataclasses.replace(model.ARCHITECTURES["qwen3"], **TOKENS, **SIZES)  # 0.2 million parameters


def train(params, task, way, progress, rng, largest=None, batch=12, lr=0.005):
    """Trains params, in place, to write the answers to a task's problems, directly or in steps. progress: yields how
    much is done, 0 to 1, once a step. Until 0.4 the difficulty grows, to `largest`; easier problems stay more frequent,
    as they teach the first step, with which all others begin.
    """
    optimizer, largest = Optimizer("muon", lr), largest or TASKS[task][1][-1] + 1
    for done in progress:
        limit = max(2, largest * min(1, done / 0.4))
        problems = [practice(task, math.ceil(limit * (1 - rng.random()) ** 1.5), rng) for _ in range(batch)]
        answers = [TOKENIZER.encode(written(problem, way)) + [END] for problem in problems]
        inputs, targets = map(xp.asarray, as_rows(list(map(prompt, problems)), answers))
        _, backward = model.loss(params, CONFIG, inputs, targets)
        grads = backward()
        clip(grads)
        optimizer.step(params, grads, warm_up_and_decay(done))


# --------------------------------------------------- several chains: sampling, self-consistency, and a verifier

TEMPERATURE = 1.5  # so that chains of a problem differ, and go wrong now and then


def sample(params, problems, way, temperature=0.0, n=1, rng=None, parallel_map=map):
    """What the model writes, n times for each problem: a list of lists of n lists of ids. Temperature 0 takes the
    likeliest token, which is often best where a chain is the only one.
    """
    prompts = [prompt(problem) for problem in problems for _ in range(n)]
    room = 5 + max(len(TOKENIZER.encode(written(problem, way))) for problem in problems)
    size = min(256, math.ceil(len(prompts) / cores()))
    drawn = sample_answers(params, CONFIG, prompts, room, temperature, rng, parallel_map, size)
    return [drawn[start : start + n] for start in range(0, len(drawn), n)]


def majority(answers):
    """Self-consistency: the answer that most chains reach, and of those that tie the first. None is no answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def marked_chains(params, task, progress, rng, n=4, parallel_map=map):
    """Comparisons of n chains for each of some practice problems: a list of (prompt, chains, pairs), a pair being the
    numbers of a right and a wrong chain. Nobody marks the steps: a chain with a right answer is a right one.
    """
    comparisons, harder = [], TASKS[task][1][1:]
    for _ in progress:
        problems = [practice(task, int(rng.choice(harder)), rng) for _ in range(256 // n)]
        for problem, chains in zip(problems, sample(params, problems, "cot", TEMPERATURE, n, rng, parallel_map)):
            marks = [reward(problem, ids) for ids in chains]
            pairs = [(i, j) for i in range(n) for j in range(n) if marks[i] > marks[j]]
            comparisons.append((prompt(problem), chains, pairs))
    return comparisons


def train_verifier(params, comparisons, progress, seed, parallel_map=map):
    """Returns a verifier's params: a copy of the model learns by DPO to find right chains likelier than wrong ones, and
    its log-likelihood is the verdict (V-STaR, Hosseini et al. 2024, section 3). A scalar head, as of Cobbe et al. 2021,
    would have to learn anew what the model knows: what it finds likely is nearly always right here.
    """
    if not any(pairs for _, _, pairs in comparisons):  # all are right, or all wrong
        return params
    return rlhf.dpo(params, CONFIG, comparisons, progress, seed=seed, parallel_map=parallel_map)


def best_of(verifier, problems, chains, parallel_map=map):
    """For each problem the answer of the chain that the verifier likes best. chains: as `sample` returns them."""
    texts = [(prompt(problem), ids) for problem, own in zip(problems, chains) for ids in own]
    verdicts = evaluate(log_likelihoods, verifier, CONFIG, *as_rows(*zip(*texts)), parallel_map)  # log p(z, y | x)
    best = verdicts.reshape(len(problems), -1).argmax(axis=1)
    return [answer_in(own[i]) for own, i in zip(chains, best)]


# ---------------------------------------------------------------- reinforcement learning on verifiable answers


def reinforce(params, task, difficulties, progress, rng, lr=3e-4, questions=16, group=8, parallel_map=map):
    """GRPO, without its KL penalty, on nothing but right or wrong: no solution is shown (DeepSeek-AI 2025). With one
    step for what was sampled, the ratio of PPO is 1, and the loss -Σ A log π(z, y | x) / tokens, over all chains. The
    learning rate falls to 0 in a line. Returns the new params.
    """
    policy, optimizer = copied(params), Optimizer("adamw", lr, 0.0)
    for done in progress:
        problems = [practice(task, int(rng.choice(difficulties)), rng) for _ in range(questions)]
        sampled = sample(policy, problems, "cot", 1.0, group, rng, parallel_map)
        chains = [(problem, ids) for problem, own in zip(problems, sampled) for ids in own]
        rewards = np.array([reward(problem, ids) for problem, ids in chains], np.float32)
        advantages = rlhf.group_advantages(rewards, group)
        tokens = sum(len(ids) for _, ids in chains)

        def gradient(piece):
            rows, inputs, targets = piece
            _, backward = log_likelihoods(policy, CONFIG, inputs, targets)
            return backward(xp.asarray(-advantages[rows] / tokens))

        inputs, targets = as_rows(*zip(*((prompt(problem), ids) for problem, ids in chains)))
        descend(gradient, pieces(inputs, targets), policy, optimizer, 1 - done, parallel_map)
    return policy


if __name__ == "__main__":
    from engine import cli
    from lab.reasoning import main

    cli.run(main)
