"""Razonamiento: chain of thought, a model that writes its steps down before it answers.

Between one token and the next a transformer computes only as deep as it has layers, and a problem of many steps, each
of which needs the one before, does not fit into that. But what is written becomes input again: a model that writes its
steps has a depth that grows with its answer (Wei et al. 2022; Li et al. 2024). To see it, the same small model is
trained twice on the same problems for the same time, to answer at once and to write its steps first:

    addition        a column a step, from the right
    permutations    who sits where after some swaps: as the group S5 is not solvable, no transformer of a fixed
                    depth is expected to do it for all lengths (Barrington 1989; Merrill & Sabharwal 2023)
    stories         small word problems; a step is the total after a sentence

Then, with chains that are drawn at a high temperature, so that they differ and go wrong now and then (the likeliest
chain alone is often better here):

    self-consistency    the answer that most of n chains reach (Wang et al. 2022)
    best of n           the chain that a verifier likes best, which has learned from chains of which only
                        the end was marked (Cobbe et al. 2021)
    reinforcement       GRPO on verifiable answers: a weak model improves by nothing but right or wrong at the
                        end of its own chains (DeepSeek-AI 2025)

    python cot.py                                all of it, in under eight minutes on two cores
    python cot.py --load DIR --question TEXT     a published chat model, with and without "think step by step"
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from typing import NamedTuple

import numpy as np

import bpe
import model
import rlhf
from engine import cli, xp
from engine.batches import as_rows, evaluate
from engine.progress import clock
from engine.threads import cores, thread_pool
from evals import proportion
from optim import Optimizer, clip, warm_up_and_decay
from train import keep_freed_memory

# ----------------------------------------------------------------- problems, whose difficulty is a number


class Problem(NamedTuple):
    """The texts of a question, of the steps from there (a list) and of the answer."""

    question: str
    steps: list
    answer: str


def addition(digits, rng):
    """Two numbers with so many digits, as 47+85. A step adds two digits, from the right, and the carry so far; it
    writes the new carry and behind it all digits that are found: 7+5+0=12, then 4+8+1=132.
    """
    a, b = (int(number) for number in rng.integers(10 ** (digits - 1), 10**digits, 2))
    steps, carry, found = [], 0, ""
    for x, y in zip(map(int, reversed(str(a))), map(int, reversed(str(b)))):
        found = f"{(x + y + carry) % 10}{found}"
        steps.append(f"{x}+{y}+{carry}={(x + y + carry) // 10}{found}")
        carry = (x + y + carry) // 10
    return Problem(f"{a}+{b}?", steps, str(a + b))


def permutations(length, rng):
    """Five sit in a row, and `length` times two of them swap places. How do they sit at the end? A step says again who
    swaps, and writes the row: to ABCDE aAD bBE, with labels that tell the swaps apart, aAD DBCAE, then bBE DECAB.
    """
    row = "".join(rng.permutation(list("ABCDE")))
    moves, rows = walk(swaps, row, length, rng)
    said = [f"{label}{move}" for label, move in zip("abcdefghijklmnopqrstuvwxyz", moves)]
    return Problem(f"{row} {' '.join(said)}?", [f"{s} {r}" for s, r in zip(said, rows)], rows[-1])


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


@functools.cache
def swaps(row):
    """The moves there are in a row: (who swaps, the row afterwards) each."""
    return [(x + y, row.translate(str.maketrans(x + y, y + x))) for x, y in itertools.permutations(sorted(row), 2)]


@functools.cache
def changes(total):
    """The moves there are from a total: ((in words, in signs), the total afterwards) each, which stays in 0 to 20."""
    moves = [((f"finds {k}", f"+{k}"), total + k) for k in range(1, 6)]
    moves += [((f"loses {k}", f"-{k}"), total - k) for k in range(1, 6)]
    moves += [(("doubles", "*2"), 2 * total)] + ([] if total % 2 else [(("halves", "/2"), total // 2)])
    return [(move, after) for move, after in moves if 0 <= after <= 20]


def walk(moves_from, state, length, rng):
    """So many moves, each drawn from those there are. Returns the moves and the states after them, two lists."""
    moves, states = [], []
    for _ in range(length):
        options = moves_from(state)
        move, state = options[rng.integers(len(options))]
        moves.append(move)
        states.append(state)
    return moves, states


TASKS = {  # and the difficulties to test at; training goes one beyond, so that the hardest is not its edge
    "addition": (addition, [1, 2, 3, 4, 5, 6]),
    "permutations": (permutations, [1, 2, 3, 4, 6, 8, 10]),
    "stories": (stories, [1, 2, 3, 4, 5, 6]),
}


def chance(task, difficulty):
    """The accuracy of who knows where a problem begins and how long it is, and guesses the likeliest end."""
    if task == "addition":  # of n² pairs of numbers, n have the sum in the middle
        return 1 / (9 * 10 ** (difficulty - 1))
    moves_from, starts = {"permutations": (swaps, ["ABCDE"]), "stories": (changes, range(1, 11))}[task]
    likeliest = []
    for start in starts:  # all rows are alike
        p = {start: 1.0}
        for _ in range(difficulty):
            after = Counter()
            for state, probability in p.items():
                options = moves_from(state)
                for _, reached in options:
                    after[reached] += probability / len(options)
            p = after
        likeliest.append(max(p.values()))
    return sum(likeliest) / len(likeliest)


# --- as text, and as tokens ---

MARK, END = "#", 0  # what stands before an answer; the token behind it
TOKENIZER = bpe.train("bytes", 257)  # no merges: END and the bytes


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


# --- what may be trained on, and what is for tests ---


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


def exam(task, difficulty, size):
    """Up to `size` problems, of different computations, that no model is trained on, always the same ones."""
    rng, problems = np.random.default_rng(difficulty), {}
    for _ in range(200 * size):  # there are not that many with one digit
        if held_out(problem := TASKS[task][0](difficulty, rng)):
            problems[computation(problem)] = problem
        if len(problems) == size:
            break
    return list(problems.values())


# --------------------------------------------------------------------------- training, at once or in steps

CONFIG = dataclasses.replace(  # a small Qwen3: 0.2 million parameters
    model.ARCHITECTURES["qwen3"],
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rope_theta=1000.0,  # the problems are short
    initializer_range=0.05,
    bos_token_id=END,
    eos_token_id=END,
)


def train(params, task, way, progress, rng, largest=None, batch=12, lr=0.005):
    """Trains params, in place, to write the answers to a task's problems, directly or in steps.

    progress: yields how much of the training is done, once a step. In the first 0.4 of it the difficulty grows, and the
    easier problems stay the more frequent ones: there the first step is learned, with which all others begin.
    """
    optimizer, largest = Optimizer("muon", lr), largest or TASKS[task][1][-1] + 1
    for done in progress:
        limit = max(2, largest * min(1, done / 0.4))
        problems = [practice(task, math.ceil(limit * (1 - rng.random()) ** 1.5), rng) for _ in range(batch)]
        answers = [TOKENIZER.encode(written(problem, way)) + [END] for problem in problems]
        inputs, targets = map(xp.asarray, as_rows([prompt(problem) for problem in problems], answers))
        _, backward = model.loss(params, CONFIG, inputs, targets)
        grads = backward()
        clip(grads)
        optimizer.step(params, grads, warm_up_and_decay(done))


# -------------------------------------------------------------------------------- answers, and how to judge


def attempts(params, problems, way, temperature=0.0, n=1, rng=None, parallel_map=map):
    """What the model writes, n times for each problem: a list of lists of n lists of ids.

    Temperature 0 takes the likeliest token.
    """
    prompts = [prompt(problem) for problem in problems for _ in range(n)]
    room = 5 + max(len(TOKENIZER.encode(written(problem, way))) for problem in problems)
    size = min(256, math.ceil(len(prompts) / cores()))
    drawn = rlhf.sample_answers(params, CONFIG, prompts, room, temperature, rng, parallel_map, size)
    return [drawn[start : start + n] for start in range(0, len(drawn), n)]


def right(problems, answers):
    """For each problem, whether its answer is right."""
    return [answer == problem.answer for problem, answer in zip(problems, answers)]


def majority(answers):
    """Self-consistency: the answer that most chains reach, and of those that tie the first. None is no answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


# ------------------------------------------------------------------------------------- best of n: a verifier


def train_verifier(params, task, seconds, rng, n=4, parallel_map=map):
    """A model that tells right chains from wrong ones. Nobody marks the steps: a chain with a right end is a right one.

    In the first half of the time the model solves problems that it may be trained on, n times each; in the second a
    copy of it learns by DPO to find the right chains of a problem likelier than the wrong ones (V-STaR, Hosseini et al.
    2024, section 3): its log-likelihood is the verdict. A scalar head, as of Cobbe et al., would have to learn anew
    what the model knows when it writes: what it finds likely is nearly always right here, and the training adds little.
    Returns the verifier's params.
    """
    comparisons, harder = [], TASKS[task][1][1:]
    for _ in clock(f"{task}: chains to judge", seconds / 2):
        problems = [practice(task, int(rng.choice(harder)), rng) for _ in range(256 // n)]
        for problem, drawn in zip(problems, attempts(params, problems, "cot", TEMPERATURE, n, rng, parallel_map)):
            good = right([problem] * n, map(answer_in, drawn))
            pairs = [(i, j) for i, j in itertools.permutations(range(n), 2) if good[i] and not good[j]]
            comparisons.append((prompt(problem), drawn, pairs))
    if not any(pairs for _, _, pairs in comparisons):  # all are right, or all wrong
        return params
    progress = clock(f"{task}: a verifier", seconds / 2)
    seed = int(rng.integers(2**31))
    return rlhf.dpo(params, CONFIG, comparisons, progress, seed=seed, parallel_map=parallel_map)


def best_of(verifier, problems, answers, parallel_map=map):
    """For each problem the answer of the chain that the verifier likes best. answers: as `attempts` returns them."""
    chains = [(prompt(problem), ids) for problem, drawn in zip(problems, answers) for ids in drawn]
    rows = as_rows(*zip(*chains))
    verdicts = evaluate(rlhf.log_likelihoods, verifier, CONFIG, *rows, parallel_map)
    best = verdicts.reshape(len(problems), -1).argmax(axis=1)
    return [answer_in(drawn[i]) for drawn, i in zip(answers, best)]


# ---------------------------------------------------------------- reinforcement learning on verifiable answers


def until_it_solves(share, params, task, difficulties, seconds, rng):
    """Yields how much of the time is over, until params, sampling, solve such a share of practice problems."""
    for step, done in enumerate(clock(f"{task}: a weak model", seconds)):
        if step % 10 == 9:
            problems = [practice(task, int(rng.choice(difficulties)), rng) for _ in range(64)]
            sampled = attempts(params, problems, "cot", 1.0, 1, rng)
            if np.mean(right(problems, [answer_in(ids) for (ids,) in sampled])) >= share:
                return
        yield done


def reinforce(params, task, difficulties, progress, rng, parallel_map=map, lr=3e-4):
    """GRPO with reward 1 for a chain whose answer is right, and 0 for any other (DeepSeek-AI 2025): the model sees no
    solution, and does more of what went well. Returns the new params.
    """
    problems = [practice(task, int(rng.choice(difficulties)), rng) for _ in range(2000)]
    room = 5 + max(len(written(problem, "cot")) for problem in problems)

    def reward(which, answers):
        return np.array([answer_in(ids) == problems[i].answer for i, ids in zip(which, answers)], np.float32)

    prompts, free = list(map(prompt, problems)), lambda kl: 0.0  # no penalty
    options = {"max_new_tokens": room, "seed": int(rng.integers(2**31)), "parallel_map": parallel_map}
    tuned, _ = rlhf.grpo(params, CONFIG, prompts, reward, progress, free, lr, **options)
    return tuned


# ------------------------------------------------------------------------------------------------- the demo

WAYS = {  # name in summary.json: name on paper
    "direct": "at once",
    "cot": "in steps",
    "sampled": "sampled",
    "self_consistency": "majority of 8",
    "best_of_n": "best of 8",
}
N, TEMPERATURE = 8, 1.5  # chains a problem, and how freely they are drawn


def measure(task, params, verifier, size, rng, parallel_map=map):
    """All ways on problems that no model was trained on: the task's entry of summary.json. Those that sample chains are
    tried on the first half of the problems.
    """
    table = {
        "difficulty": [],
        "problems": [],
        "problems_sampled": [],
        "chance": [],
        "tokens_direct": [],
        "tokens_cot": [],
    }
    for difficulty in TASKS[task][1]:
        problems = exam(task, difficulty, size)
        assert all(map(held_out, problems))
        written_by = {way: attempts(params[way], problems, way, parallel_map=parallel_map) for way in params}
        answers = {way: [answer_in(ids) for (ids,) in drawn] for way, drawn in written_by.items()}
        some = problems[: max(1, size // 2)]
        chains = attempts(params["cot"], some, "cot", TEMPERATURE, N, rng, parallel_map)
        reached = [[answer_in(ids) for ids in drawn] for drawn in chains]
        answers["self_consistency"] = [majority(drawn) for drawn in reached]
        answers["best_of_n"] = best_of(verifier, some, chains, parallel_map)
        row = {
            "difficulty": difficulty,
            "problems": len(problems),
            "problems_sampled": len(some),
            "chance": chance(task, difficulty),
        }
        for way, drawn in written_by.items():
            row[f"tokens_{way}"] = float(np.mean([len(ids) for (ids,) in drawn]))
        for way, given in answers.items():
            row[way], *row[f"{way}_95"] = proportion(right(problems, given))
        every = [np.mean(right([problem] * N, given)) for problem, given in zip(some, reached)]
        row["sampled"], *row["sampled_95"] = proportion(every)
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    return table


def show(task, table):
    """Prints a task's entry of summary.json."""
    print(f"\n{task:14}" + "".join(f"{name:>21}" for name in WAYS.values()) + f"{'chance':>9}{'tokens':>8}")
    for i, difficulty in enumerate(table["difficulty"]):
        cells = "".join(f"{percent(table[way][i], table[f'{way}_95'][i]):>21}" for way in WAYS)
        print(f"{difficulty:<14}{cells}{100 * table['chance'][i]:7.2g} %{table['tokens_cot'][i]:8.0f}")


def percent(share, interval):
    return f"{100 * share:.0f} % [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def draw(tables, path):
    """Accuracy and tokens thought against difficulty, a column for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(tables), figsize=(4.2 * len(tables), 6.4), layout="constrained", sharex="col")
    for (task, table), (above, below) in zip(tables.items(), axes.T):
        x = table["difficulty"]
        for way, name in WAYS.items():
            y, ends = 100 * np.array(table[way]), 100 * np.array(table[f"{way}_95"])
            (line,) = above.plot(x, y, "o-", markersize=4, label=name)
            above.fill_between(x, *ends.T, alpha=0.12, color=line.get_color(), linewidth=0)
        above.plot(x, 100 * np.array(table["chance"]), ":", color="grey", label="chance")
        above.set(title=task, ylim=(-3, 103))
        below.plot(x, table["tokens_direct"], "o-", markersize=4)
        below.plot(x, table["tokens_cot"], "o-", markersize=4)
        below.set(xlabel={"addition": "digits", "permutations": "swaps", "stories": "sentences"}[task], ylim=(0, None))
        for axis in above, below:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("right answers (%)")
    axes[1, 0].set_ylabel("tokens written")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def experiment(folder, minutes, seed):
    """All that this file is about. Writes a folder of models, with summary.json, and a figure."""
    keep_freed_memory()
    os.makedirs(folder, exist_ok=True)
    seconds, size = 60 * minutes / 7, max(4, min(200, round(200 * minutes / 7)))
    summary = {"minutes": minutes, "seed": seed, "n": N, "temperature": TEMPERATURE, "tasks": {}}
    with thread_pool(max(2, cores())) as pool:  # two even on one core, so that both ways have the same minutes
        for task in TASKS:
            share = 1.3 if task == "permutations" else 0.8  # its chains are the longest
            learn = functools.partial(learned, task, seconds=share * seconds, seed=seed)
            params = dict(zip(["direct", "cot"], pool.map(learn, ["direct", "cot"])))  # side by side
            for way in params:
                save(os.path.join(folder, f"{task}-{way}"), params[way])
            rng = np.random.default_rng(seed)
            verifier = train_verifier(params["cot"], task, 0.3 * seconds, rng, parallel_map=pool.map)
            summary["tasks"][task] = measure(task, params, verifier, size, rng, pool.map)
            show(task, summary["tasks"][task])
            problem = exam(task, TASKS[task][1][-1], 1)[0]
            ((ids,),) = attempts(params["cot"], [problem], "cot")
            print(f"\n{problem.question}{TOKENIZER.decode(ids[:-1])}   (right: {problem.answer})\n")
        summary["grpo"] = improved(folder, seconds, seed, 2 * size, pool.map)
    with open(os.path.join(folder, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
    os.makedirs("figures", exist_ok=True)
    draw(summary["tasks"], "figures/cot.png")
    print(f"\nfigures/cot.png\n{os.path.join(folder, 'summary.json')}")
    print(f"try one: python model.py --load {os.path.join(folder, 'addition-cot')} --prompt '27+58?' --temperature 0")


def learned(task, way, seconds, seed):
    """A new model, trained for so long. Direct answers are shorter, so that way more problems are seen."""
    params, name = model.init(CONFIG, seed), f"{task}: both ways" if way == "cot" else None  # one bar for the two
    train(params, task, way, clock(name, seconds), np.random.default_rng(seed))
    return params


def improved(folder, seconds, seed, size, parallel_map=map):
    """A weak chain model before and after GRPO: the entry of summary.json."""
    task, difficulties, rng = "permutations", range(1, 7), np.random.default_rng(seed)
    params = model.init(CONFIG, seed)
    progress = until_it_solves(0.28, params, task, difficulties, 0.6 * seconds, rng)
    train(params, task, "cot", progress, rng, largest=difficulties[-1])
    progress = clock(f"{task}: GRPO", 1.6 * seconds)
    stages = {"before": params, "after": reinforce(params, task, difficulties, progress, rng, parallel_map)}
    save(os.path.join(folder, "grpo"), stages["after"])
    problems = [problem for d in difficulties for problem in exam(task, d, math.ceil(size / len(difficulties)))]
    result = {"task": task, "difficulty": list(difficulties), "problems": len(problems)}
    for name, params in stages.items():
        drawn = attempts(params, problems, "cot", parallel_map=parallel_map)
        result[name], *result[f"{name}_95"] = proportion(right(problems, [answer_in(ids) for (ids,) in drawn]))
        print(f"{name} GRPO: {percent(result[name], result[f'{name}_95'])}")
    return result


def save(folder, params):
    model.save(folder, params, CONFIG)
    TOKENIZER.save(folder)


# ------------------------------------------------------------------------- prompting a model that can converse


def zero_shot(folder, question, max_new_tokens=300):
    """Asks a published chat model twice, the second time to think step by step, which is all that some need to do it
    (Kojima et al. 2022). Prints both answers as they come.
    """
    import chat

    params, config = model.load(folder)
    tokenizer = bpe.load(os.path.join(folder, "tokenizer.json"))
    ends = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
    stop = [chat.end_token(tokenizer), *ends]
    for suffix in "", "\nLet's think step by step.":
        ids = chat.prompt(tokenizer, [{"role": "user", "content": question + suffix}])
        room = config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(f"a question of {len(ids)} tokens leaves no room for an answer")
        print(f"> {question}{suffix}")
        answer = model.generate(params, config, ids, min(room, max_new_tokens), stop=stop)
        for piece in tokenizer.stream(token for token in answer if token not in stop):
            print(piece, end="", flush=True)
        print("\n")


def main(argv=None):
    parser = cli.Parser(description="Chain of thought: train small models to reason, or prompt a published one.")
    parser.add_argument("--out", metavar="DIR", default="runs/cot", help="folder of models and summary.json (runs/cot)")
    parser.add_argument("--minutes", type=float, default=7.0, metavar="N", help="for all of it, about (7)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--load", metavar="DIR", help="a chat model to ask instead")
    parser.add_argument("--question", metavar="TEXT", help="what to ask it")
    args = parser.parse_args(argv)
    if (args.load is None) != (args.question is None):
        parser.error("--load and --question go together")
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes must be more than 0")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if args.load is not None:
        return zero_shot(args.load, args.question)
    experiment(args.out, args.minutes, args.seed)


if __name__ == "__main__":
    cli.run(main)
