"""Razonamiento, the experiment: steps against all that a sceptic would rather believe in (lab/controls.py), then what
more thinking is good for (lab/thinking.py), with one seed or several. Beside it a published model is asked, or
reinforced (lab/verifiable.py).
"""

import json
import os
from dataclasses import dataclass

import numpy as np

import cot
import model
from cot import sample
from engine import cli
from engine.cli import option
from engine.files import write_text
from engine.runs import keep_freed_memory
from engine.threads import cores, thread_pool
from lab import controls, results, talk, thinking, verifiable
from lab.controls import WAYS, exam


def experiment(folder, steps, seed):
    """All of it. Writes a folder of models with summary.json, and figures; returns the summary."""
    keep_freed_memory()
    os.makedirs(folder, exist_ok=True)
    size, summary = max(4, min(100, steps // 10)), {"steps": steps, "seed": seed, "tasks": {}, "learning_curves": {}}
    with thread_pool(max(2, cores())) as pool:
        models, curves = controls.all_learned(folder, steps, seed, max(4, size // 2), pool.map)
        for task in cot.TASKS:
            ways = {name.removeprefix(f"{task}-"): params for name, params in models.items() if name.startswith(task)}
            summary["tasks"][task] = table = controls.measure(task, ways, size, pool.map)
            controls.show(task, table)
        summary["learning_curves"] = {name: curve for name, curve in curves.items() if curve["steps"]}
        controls.show_curves(summary["learning_curves"])
        careful = models["permutations-cot"]
        hardest = exam("permutations", cot.TASKS["permutations"][1][-1], 1)
        ((ids,),) = sample(careful, cot.CONFIG, hardest, "cot")
        print(f"\n{hardest[0].question}{cot.TOKENIZER.decode(ids[:-1])}   (right: {hardest[0].answer})\n")
        summary |= thinking.experiment(folder, careful, steps, seed, size, pool.map)
    path = os.path.join(folder, "summary.json")
    write_text(path, json.dumps(summary, indent=1))
    print(f"\n{path}")
    asked = "--prompt 'aAC bAB cAE: CEDAB?' --temperature 0"
    print(f"try one: python model.py --load {os.path.join(folder, 'permutations-cot')} {asked}")
    return summary


def figures(runs):
    """Of the summaries of one seed or several; many chains of the first, as each chooses a difficulty for them."""
    controls.draw([run["tasks"]["permutations"] for run in runs], "figures/cot.png")
    thinking.draw_budget(over(np.mean, [run["thinking_budget"] for run in runs]), "figures/thinking_budget.png")
    thinking.draw_chains(runs[0]["many_chains"], "figures/many_chains.png")
    print("figures/cot.png, figures/thinking_budget.png, figures/many_chains.png")


def over(function, summaries):
    """One summary of several alike: function(numbers) in the place of each number; of what is none, the first."""
    first = summaries[0]
    if isinstance(first, dict):
        return {name: over(function, [each[name] for each in summaries]) for name in first}
    if isinstance(first, list):
        return [over(function, each) for each in zip(*summaries)]
    return float(function(summaries)) if isinstance(first, (int, float)) else first


def gathered(runs):
    """Stores the summaries of several seeds as results/cot.json, and draws their figures."""
    results.store("cot", f"python cot.py --seeds {len(runs)}", runs)
    figures(runs)
    print(markdown(runs))


def markdown(runs):
    """The README's table: right answers in per cent, means of the seeds, and their range if wider than four points."""
    tables = [over(function, runs)["tasks"]["permutations"] for function in (np.mean, min, max)]
    rows = [["swaps", *map(round, tables[0]["difficulty"])]]
    for way, (name, _) in WAYS.items():
        cells = []
        for mean, low, high in zip(*(table[way] for table in tables)):
            mean, low, high = (round(100 * share) for share in (mean, low, high))
            cells.append(f"{mean}" if high - low <= 4 else f"{mean} ({low} to {high})")
        rows.append([name, *cells])
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


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
    """What the experiment is told, or what a published model is asked, or how it is reinforced."""

    out: str = option("runs/cot", "folder of models and summary.json", metavar="DIR")
    steps: int = option(1500, "of the training of a model that answers at once; of others in proportion", least=10)
    seed: int = option(0, "of all that is drawn", least=0)
    seeds: int | None = option(None, "so many runs, with mean and range in results/cot.json", least=1)
    load: str | None = option(None, "a chat model to ask instead", metavar="DIR")
    question: str | None = option(None, "what to ask it", metavar="TEXT")
    init: str | None = option(None, "a chat model to reinforce instead", metavar="DIR")
    reinforce: str | None = option(None, "questions with answers, to learn from", metavar="FILE.jsonl")
    rounds: int = option(20, "of reinforcement", least=1)
    budget: int = option(128, "tokens of a chain, its answer with it", least=8)
    questions: int = option(4, "of a round of reinforcement", least=1)
    group: int = option(8, "chains for each of them", least=2)
    held_out: int = option(40, "problems to test on, at most", least=1)
    lr: float = option(3e-5, "learning rate of reinforcement", above=0)


def main(argv=None):
    purpose = "Chain of thought: train small models to reason, or prompt or reinforce a published one."
    s = cli.settings(Settings, argv, purpose)
    if (s.load is None) != (s.question is None):
        raise ValueError("--load and --question go together")
    if (s.init is None) != (s.reinforce is None):
        raise ValueError("--init and --reinforce go together")
    if s.load is not None:
        return zero_shot(s.load, s.question)
    if s.init is not None:
        return verifiable.experiment(s)
    if s.seeds is not None:
        seeds = range(s.seed, s.seed + s.seeds)
        return gathered([experiment(os.path.join(s.out, f"seed-{seed}"), s.steps, seed) for seed in seeds])
    figures([experiment(s.out, s.steps, s.seed)])
