"""Razonamiento: chain of thought (CoT), a model that writes its steps down before it answers.

    aAC bAB cAE: CEDAB?    at once: #BADCE    in steps: aAC AEDCB      A and C have swapped places,
                                                        bAB BEDCA      then A and B,
                                                        cAE BADCE      then A and E
                                                        #BADCE

Between one token and the next a transformer computes only as deep as it has layers, and a problem of many steps, each
of which needs the one before, does not fit into that. But what is written becomes input again: a model that writes its
steps computes deeper the longer it writes, and writes longer for a harder problem (Wei et al. 2022; Li et al. 2024). A
chain z of steps is drawn like any text, and the answer y to the question x follows from it:

    p(y | x) = Σ_z p(z | x) p(y | x, z)

    thinking budget     how many tokens of z there may be, before y has to come (Muennighoff et al. 2025)
    self-consistency    the answer that most of n drawn chains reach: an estimate of the likeliest y (Wang et al. 2022)
    best of n           the chain that a verifier prefers, which learned from marked answers (Cobbe et al. 2021)
    reinforcement       chains with a right answer become likelier: GRPO (DeepSeek-AI 2025)

    python cot.py                                      small models trained to answer at once and in steps
    python cot.py --load DIR --question TEXT           a published chat model, with and without "think step by step"
    python cot.py --init DIR --reinforce FILE.jsonl    reinforcement of one, on questions with answers

    >>> import numpy as np
    >>> from cot import stories, written
    >>> problem = stories(2, np.random.default_rng(0))
    >>> print(problem.question + written(problem, "cot"))
    Sam has 9 shells. Mon finds 3. Tue finds 4. How many?
    Mon 9+3=12
    Tue 12+4=16
    #16
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
from optim import Optimizer, descend, warm_up_and_decay
from rlhf import log_likelihoods, sample_answers

# ------------------------------------------------------------------- a problem as text, with and without its steps

Problem = namedtuple("Problem", "question steps answer")  # three texts, of which the steps are a list of lines
MARK, FILLER, END = "#", ".", 0  # what stands before an answer; what says nothing; the token behind an answer
TOKENIZER = bpe.train("any text", 257)  # END and the 256 bytes: no room for merges
lines = lambda texts: "".join(f"\n{text}" for text in texts)


def prompt(problem, way="cot"):
    """The ids of what is asked. "filler": behind it are as many tokens as the steps would have, which say nothing, so
    that a model has the time of thinking without its thoughts (Pfau et al. 2024).
    """
    return TOKENIZER.encode(problem.question + (FILLER * len(lines(problem.steps)) if way == "filler" else ""))


def written(problem, way):
    """What the model has to write: "direct" and "filler" the answer, "cot" the steps first."""
    return lines([*(problem.steps if way == "cot" else []), MARK + problem.answer])


def answer_in(ids):
    """The answer in what a model wrote; None where it has not come to an end, or not to one answer."""
    *ids, last = ids
    _, *answers = TOKENIZER.decode(ids).split(f"\n{MARK}")
    return answers[0] if last == END and len(answers) == 1 else None


def reward(problem, ids):
    """1 for a right answer, 0 for any other: what comes before the answer is not judged."""
    return float(answer_in(ids) == problem.answer)


# ----------------------------------------------------------------------- problems, whose difficulty is a number


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
    swaps, with a label that tells the swaps apart, and writes the row. As the group S5 is not solvable, the end is as
    hard to find as anything in NC¹ (Barrington 1989), and a transformer of a fixed depth computes no more than TC⁰
    (Merrill & Sabharwal 2023): unless the two are the same, none answers at once for all lengths.
    """
    row = "".join(rng.permutation(list("ABCDE")))
    moves, rows = walk(swaps, row, length, rng)
    said = [f"{label}{move}" for label, move in zip("abcdefghijklmnopqrstuvwxyz", moves)]
    return Problem(f"{' '.join(said)}: {row}?", [f"{s} {r}" for s, r in zip(said, rows)], rows[-1])


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
    "permutations": (permutations, [1, 2, 3, 4, 6, 8, 12, 16, 20, 24]),
    "stories": (stories, [1, 2, 3, 4, 5, 6]),
}


def computation(problem):
    """What is computed in a problem, whatever the names in it and the order of two who swap: the characters of each
    step, sorted, so that a few that differ count as the same too.
    """
    return " ".join([problem.answer, *("".join(sorted(step)) for step in problem.steps)])


def held_out(problem):
    """Whether a problem is for tests only: a tenth of all computations are, which depends on nothing but themselves."""
    return hashlib.blake2b(computation(problem).encode(), digest_size=4).digest() < b"\x19\x99\x99\x99"  # of 2³²


def practice(task, difficulty, rng):
    """A problem that may be trained on."""
    while held_out(problem := TASKS[task][0](difficulty, rng)):
        pass
    return problem


# --------------------------------------------------------------------------- training, at once or in steps

TOKENS = {"vocab_size": TOKENIZER.vocab_size, "bos_token_id": END, "eos_token_id": END, "max_position_embeddings": 512}
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 1000.0, "initializer_range": 0.05}
CONFIG = dataclasses.replace(model.ARCHITECTURES["qwen3"], **TOKENS, **SIZES)  # 0.2 million parameters
DEEP = dataclasses.replace(CONFIG, num_hidden_layers=12)  # the same with four times the layers


def train(params, config, task, way, progress, rng, changed=None, largest=None, batch=32, lr=0.005):
    """Trains params, in place, to write the answers to a task's problems in one of the ways. progress: yields how much
    is done, 0 to 1, once a step. changed(problem, rng) -> problem: what is written instead. The difficulty grows by
    half whenever a problem costs less than half a nat, up to `largest`, and from 0.7 on all problems come. Easier ones
    stay more frequent, as they teach the first step, with which all others begin.
    """
    optimizer, largest, hardest, nats = Optimizer("muon", lr), largest or TASKS[task][1][-1] + 1, 2, 1.0
    for done in progress:
        if nats < 0.5 or done >= 0.7:
            hardest, nats = largest if done >= 0.7 else min(largest, hardest + math.ceil(hardest / 2)), 1.0
        problems = [practice(task, math.ceil(hardest * (1 - rng.random()) ** 1.5), rng) for _ in range(batch)]
        problems = [changed(problem, rng) for problem in problems] if changed else problems
        answers = [TOKENIZER.encode(written(problem, way)) + [END] for problem in problems]
        count, losses = sum(map(len, answers)), []

        def gradient(part):
            _, inputs, targets = part
            loss, backward = model.loss(params, config, inputs, targets, count=count)
            losses.append(loss)
            return backward()

        rows = as_rows([prompt(problem, way) for problem in problems], answers)
        parts = pieces(*rows, size=max(8, 100 // hardest))  # of about as many tokens
        descend(gradient, parts, params, optimizer, warm_up_and_decay(done))
        nats += 0.1 * (sum(losses) * count / batch - nats)


# ----------------------------------------------------------- one chain, and the number of tokens it may have


def sample(params, config, problems, way, temperature=0.0, n=1, rng=None, parallel_map=map):
    """What the model writes, n times for each problem: lists of n lists of ids. Temperature 0: the likeliest tokens."""
    prompts = [prompt(problem, way) for problem in problems for _ in range(n)]
    room = 5 + max(len(TOKENIZER.encode(written(problem, way))) for problem in problems)
    drawn = sample_answers(params, config, prompts, room, temperature, rng, parallel_map)
    return [drawn[i : i + n] for i in range(0, len(drawn), n)]


def thinking(ids):
    """How many tokens a chain has before the mark of its answer."""
    mark = TOKENIZER.encode(lines([MARK]))
    return next((i for i in range(len(ids)) if ids[i : i + len(mark)] == mark), len(ids))


def forced(params, config, problems, chains, budget, parallel_map=map):
    """Budget forcing (Muennighoff et al. 2025, section 3), the half of it that shortens: a chain that thinks for more
    tokens than the budget is cut off there, the mark of the answer is put behind it, and the model goes on. The other
    half puts "Wait" in the place of the mark, so that a chain grows. chains: one for each problem.
    """
    mark = TOKENIZER.encode(lines([MARK]))
    cut = [i for i, ids in enumerate(chains) if thinking(ids) > budget]
    begun = [chains[i][:budget] + mark for i in cut]
    prompts, room = [prompt(problems[i]) + ids for i, ids in zip(cut, begun)], 3 + max(len(p.answer) for p in problems)
    ends = sample_answers(params, config, prompts, room, 0.0, None, parallel_map)
    found = {i: ids + end for i, ids, end in zip(cut, begun, ends)}
    return [found.get(i, ids) for i, ids in enumerate(chains)]


# ------------------------------------------------------------- several chains: self-consistency, and a verifier


def majority(answers):
    """Self-consistency: the answer that most chains reach, and of those that tie the first. None is no answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def marked_chains(params, config, task, difficulty, progress, rng, n=8, parallel_map=map):
    """Comparisons of n chains for each of some practice problems: a list of (prompt, chains, pairs), a pair being the
    numbers of a right and a wrong chain. Nobody marks the steps: a chain with a right answer is a right one.
    """
    comparisons = []
    for _ in progress:
        problems = [practice(task, difficulty, rng) for _ in range(64 // n)]
        for problem, chains in zip(problems, sample(params, config, problems, "cot", 1.0, n, rng, parallel_map)):
            marks = [reward(problem, ids) for ids in chains]
            pairs = [(i, j) for i in range(n) for j in range(n) if marks[i] > marks[j]]
            comparisons.append((prompt(problem), chains, pairs))
    return comparisons


def train_verifier(params, config, comparisons, progress, seed, parallel_map=map):
    """Returns a verifier's params: a copy of the model learns by DPO to find right chains likelier than wrong ones, and
    its log-likelihood is the verdict (V-STaR, Hosseini et al. 2024, section 3); Cobbe et al. (2021) train a new head.
    """
    learnable = any(pairs for _, _, pairs in comparisons)  # all may be right, or all wrong
    how = {"batch": 8, "seed": seed, "parallel_map": parallel_map}
    return rlhf.dpo(params, config, comparisons, progress, **how) if learnable else params


def verdicts(verifier, config, problems, chains, parallel_map=map):
    """log p(z, y | x) of each chain, (problems, n): how much a verifier likes it, or a model finds it likely."""
    texts = [(prompt(problem), ids) for problem, own in zip(problems, chains) for ids in own]
    values = evaluate(log_likelihoods, verifier, config, *as_rows(*zip(*texts)), parallel_map)
    return values.reshape(len(problems), -1)


# ---------------------------------------------------------------- reinforcement learning on verifiable answers


def reinforce(
    params, config, draw, reward, progress, rng, room, lr, questions=16, group=8, right=False, size=32, parallel_map=map
):
    """GRPO (Shao et al. 2024) on nothing but right or wrong: no solution is shown (DeepSeek-AI 2025). There is no KL
    penalty, and with one step for what was sampled the ratio of PPO is 1, so that the loss is -Σ A log π(z, y | x) /
    tokens, over the tokens of all chains (as in DAPO, Yu et al. 2025; rlhf.grpo divides by each chain's own). The
    learning rate falls to 0 in a line. right: rejection sampling, which learns each right chain and no other, as
    REINFORCE without a baseline does; STaR (Zelikman et al. 2022) tunes the first model anew in each round.

    draw(rng) -> (prompt ids, problem); reward(problem, chain ids) -> a number, at least 1 where it is right. room: most
    tokens of a chain. size: chains learned from in one piece, half of those sampled at once. Returns the new params.
    """
    policy, optimizer = copied(params), Optimizer("adamw", lr, 0.0)
    for done in progress:
        # sample
        asked = [pair for pair in [draw(rng) for _ in range(questions)] for _ in range(group)]
        prompts, problems = zip(*asked)
        chains = sample_answers(policy, config, prompts, room, 1.0, rng, parallel_map, 2 * size)
        # reward, advantage
        rewards, tokens = np.array(list(map(reward, problems, chains)), np.float32), sum(map(len, chains))
        advantages = np.float32(rewards >= 1) if right else rlhf.group_advantages(rewards, group)

        # step
        def gradient(part):
            rows, inputs, targets = part
            _, backward = log_likelihoods(policy, config, inputs, targets)
            return backward(xp.asarray(-advantages[rows] / tokens))

        descend(gradient, pieces(*as_rows(prompts, chains), size=size), policy, optimizer, 1 - done, parallel_map)
    return policy


if __name__ == "__main__":
    from engine import cli
    from lab.reasoning import main

    cli.run(main)
