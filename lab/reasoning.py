"""Razonamiento, the experiment: for each task the same model is trained twice for the same time, to answer at once and
to write its steps first, and tried on problems whose computation no model was trained on. Of several chains, then, the
majority answers, or the one that a verifier likes best. Last, GRPO takes a weak model further.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

import cot
import model
from cot import answer_in, sample
from engine import cli
from engine.cli import option
from engine.figure import figure
from engine.files import write_text
from engine.progress import clock
from engine.runs import keep_freed_memory
from engine.threads import cores, thread_pool
from evals import proportion
from lab import talk

N = 8  # chains a problem
WAYS = {"direct": "at once", "cot": "in steps", "sampled": "sampled"}  # name in summary.json: name on paper
WAYS |= {"self_consistency": f"majority of {N}", "best_of_n": f"best of {N}"}


def exam(task, difficulty, size):
    """Up to `size` problems, of different computations, that no model is trained on, always the same ones."""
    rng, problems = np.random.default_rng(difficulty), {}
    for _ in range(200 * size):  # there are not that many with one digit
        if cot.held_out(problem := cot.TASKS[task][0](difficulty, rng)):
            problems[cot.computation(problem)] = problem
        if len(problems) == size:
            break
    return list(problems.values())


def chance(task, difficulty):
    """The accuracy of who knows where a problem begins and how long it is, and guesses the likeliest end."""
    if task == "addition":  # of n² pairs of numbers, n have the sum in the middle
        return 1 / (9 * 10 ** (difficulty - 1))
    moves_from, starts = {"permutations": (cot.swaps, ["ABCDE"]), "stories": (cot.changes, range(1, 11))}[task]
    likeliest = []
    for start in starts:  # all rows are alike
        p = {start: 1.0}
        for _ in range(difficulty):
            after = Counter()
            for state in p:
                for _, reached in moves_from(state):
                    after[reached] += p[state] / len(moves_from(state))
            p = after
        likeliest.append(max(p.values()))
    return sum(likeliest) / len(likeliest)


def accuracy(problems, chains):
    """The share of right answers in the chains of each problem, as far as there are chains."""
    return [np.mean([cot.reward(problem, ids) for ids in own]) for problem, own in zip(problems, chains)]


def measure(task, params, verifier, size, rng, parallel_map=map):
    """All ways on problems that no model was trained on: the task's entry of summary.json. Those that sample chains are
    tried on the first half of the problems. params: {"direct": params, "cot": params}.
    """
    rows = []
    for difficulty in cot.TASKS[task][1]:
        problems = exam(task, difficulty, size)
        some = problems[: max(1, size // 2)]
        row = {"difficulty": difficulty, "problems": len(problems), "problems_sampled": len(some)}
        row |= {"chance": chance(task, difficulty)}
        chains = {way: sample(params[way], problems, way, parallel_map=parallel_map) for way in params}
        row |= {f"tokens_{way}": float(np.mean([len(ids) for (ids,) in chains[way]])) for way in chains}
        chains["sampled"] = sample(params["cot"], some, "cot", cot.TEMPERATURE, N, rng, parallel_map)
        marks = {way: accuracy(problems, chains[way]) for way in chains}
        answers = {"self_consistency": [cot.majority(map(answer_in, own)) for own in chains["sampled"]]}
        answers["best_of_n"] = cot.best_of(verifier, some, chains["sampled"], parallel_map)
        marks |= {way: [a == problem.answer for a, problem in zip(answers[way], some)] for way in answers}
        for way in marks:
            row[way], *row[f"{way}_95"] = proportion(marks[way])
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


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
    size, harder = (4.2 * len(tables), 6.4), {"addition": "digits", "permutations": "swaps", "stories": "sentences"}
    with figure(path, 2, len(tables), size, legends=False, sharex="col") as axes:
        for (task, table), (above, below) in zip(tables.items(), axes.T):
            x = table["difficulty"]
            for way, name in WAYS.items():
                low, high = 100 * np.array(table[f"{way}_95"]).T
                (line,) = above.plot(x, 100 * np.array(table[way]), "o-", markersize=4, label=name)
                above.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
            above.plot(x, 100 * np.array(table["chance"]), ":", color="grey", label="chance")
            above.set(title=task, ylim=(-3, 103))
            below.plot(x, table["tokens_direct"], "o-", x, table["tokens_cot"], "o-", markersize=4)
            below.set(xlabel=harder[task], ylim=(0, None))
        axes[0, 0].set_ylabel("right answers (%)")
        axes[1, 0].set_ylabel("tokens written")
        axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)


def save(folder, params):
    model.save(folder, params, cot.CONFIG)
    cot.TOKENIZER.save(folder)


def learned(folder, task, way, seconds, seed):
    """A new model, trained for so long and saved. Answers at once are shorter, so that way more problems are seen."""
    params, name = model.init(cot.CONFIG, seed), f"{task}: both ways" if way == "cot" else None  # one bar for the two
    cot.train(params, task, way, clock(name, seconds), np.random.default_rng(seed))
    save(os.path.join(folder, f"{task}-{way}"), params)
    return params


def until_it_solves(share, params, task, difficulties, seconds, rng):
    """Yields how much of the time is over, until params, sampling, solve such a share of practice problems."""
    for step, done in enumerate(clock(f"{task}: a weak model", seconds)):
        if step % 10 == 9:
            problems = [cot.practice(task, int(rng.choice(difficulties)), rng) for _ in range(64)]
            if np.mean(accuracy(problems, sample(params, problems, "cot", 1.0, 1, rng))) >= share:
                return
        yield done


def improved(folder, seconds, seed, size, parallel_map=map):
    """A weak chain model before and after GRPO: the entry of summary.json."""
    task, difficulties, rng = "permutations", range(1, 7), np.random.default_rng(seed)
    params = model.init(cot.CONFIG, seed)
    progress = until_it_solves(0.28, params, task, difficulties, 0.6 * seconds, rng)
    cot.train(params, task, "cot", progress, rng, largest=difficulties[-1])
    progress = clock(f"{task}: GRPO", 1.6 * seconds)
    tuned = cot.reinforce(params, task, difficulties, progress, rng, parallel_map=parallel_map)
    save(os.path.join(folder, "grpo"), tuned)
    problems = [problem for d in difficulties for problem in exam(task, d, math.ceil(size / len(difficulties)))]
    result = {"task": task, "difficulty": list(difficulties), "problems": len(problems)}
    for name, weights in ("before", params), ("after", tuned):
        marks = accuracy(problems, sample(weights, problems, "cot", parallel_map=parallel_map))
        result[name], *result[f"{name}_95"] = proportion(marks)
        print(f"{name} GRPO: {percent(result[name], result[f'{name}_95'])}")
    return result


def experiment(folder, minutes, seed):
    """All of it. Writes a folder of models, with summary.json, and a figure."""
    keep_freed_memory()
    os.makedirs(folder, exist_ok=True)
    seconds, size = 60 * minutes / 7, max(4, min(200, round(200 * minutes / 7)))
    summary = {"minutes": minutes, "seed": seed, "n": N, "temperature": cot.TEMPERATURE, "tasks": {}}
    with thread_pool(max(2, cores())) as pool:  # two even on one core, so that both ways have the same minutes
        for task in cot.TASKS:
            share = 1.3 if task == "permutations" else 0.8  # its chains are the longest
            learn = lambda way: (way, learned(folder, task, way, share * seconds, seed))
            params = dict(pool.map(learn, ["direct", "cot"]))  # side by side
            rng = np.random.default_rng(seed)
            progress = clock(f"{task}: chains to judge", 0.15 * seconds)
            marked = cot.marked_chains(params["cot"], task, progress, rng, parallel_map=pool.map)
            progress = clock(f"{task}: a verifier", 0.15 * seconds)
            verifier = cot.train_verifier(params["cot"], marked, progress, int(rng.integers(2**31)), pool.map)
            summary["tasks"][task] = table = measure(task, params, verifier, size, rng, pool.map)
            show(task, table)
            problem = exam(task, cot.TASKS[task][1][-1], 1)[0]
            ((ids,),) = sample(params["cot"], [problem], "cot")
            print(f"\n{problem.question}{cot.TOKENIZER.decode(ids[:-1])}   (right: {problem.answer})\n")
        summary["grpo"] = improved(folder, seconds, seed, 2 * size, pool.map)
    path = os.path.join(folder, "summary.json")
    write_text(path, json.dumps(summary, indent=1))
    draw(summary["tasks"], "figures/cot.png")
    print(f"\nfigures/cot.png\n{path}")
    print(f"try one: python model.py --load {os.path.join(folder, 'addition-cot')} --prompt '27+58?' --temperature 0")


def zero_shot(folder, question, max_new_tokens=300):
    """Asks a published chat model, then tells it to think step by step too, which is enough (Kojima et al. 2022)."""
    params, config, tokenizer, stop = talk.opened(folder)
    ask = talk.asking(folder, tokenizer)
    if ask is None:
        raise ValueError(f"{folder} has a model that was never in a chat")
    for suffix in "", "\nLet's think step by step.":
        ids = ask([{"role": "user", "content": question + suffix}])
        room = config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(f"a question of {len(ids)} tokens leaves no room for an answer")
        print(f"> {question}{suffix}")
        talk.spoken(tokenizer, model.generate(params, config, ids, min(room, max_new_tokens), stop=stop), stop)
        print()


@dataclass(frozen=True)
class Settings:
    """What the experiment is told, or what a published model is asked."""

    out: str = option("runs/cot", "folder of models and summary.json", metavar="DIR")
    minutes: float = option(7.0, "for all of it, about", above=0)
    seed: int = option(0, "of all that is drawn", least=0)
    load: str | None = option(None, "a chat model to ask instead", metavar="DIR")
    question: str | None = option(None, "what to ask it", metavar="TEXT")


def main(argv=None):
    s = cli.settings(Settings, argv, "Chain of thought: train small models to reason, or prompt a published one.")
    if (s.load is None) != (s.question is None):
        raise ValueError("--load and --question go together")
    if s.load is not None:
        return zero_shot(s.load, s.question)
    experiment(s.out, s.minutes, s.seed)
