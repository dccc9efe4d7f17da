"""The experiment's first part: the same small model is trained to answer at once and to write its steps first. What a
sceptic would rather believe in is tried beside it: longer training, four times the layers, as many further tokens that
say nothing (Pfau et al. 2024). All are tried on problems whose computation no model was trained on.
"""

import os
import re
from collections import Counter

import numpy as np

import cot
import model
from cot import sample
from engine.figure import figure
from engine.progress import counted
from evals import proportion

MODELS = {  # folder: task, way, config, share of the steps, and problems in a batch
    "permutations-direct": ("permutations", "direct", cot.CONFIG, 1.0, 32),
    "permutations-filler": ("permutations", "filler", cot.CONFIG, 0.7, 32),
    "permutations-direct_deep": ("permutations", "direct", cot.DEEP, 0.6, 32),
    "permutations-cot": ("permutations", "cot", cot.CONFIG, 0.65, 16),
    "stories-cot": ("stories", "cot", cot.CONFIG, 0.8, 32),
    "stories-direct": ("stories", "direct", cot.CONFIG, 0.8, 32),
}
BEGINS = {  # with what another model has learned; others are new
    "permutations-filler": "permutations-direct",
    "permutations-direct_deep": "permutations-direct",
}
WAYS = {  # name in summary.json: name on paper, and how it is drawn
    "cot": ("in steps", "o-"),
    "direct_deep": ("at once, 12 layers", "s--"),
    "direct": ("at once, 3 layers", "^-."),
    "filler": ("behind filler tokens", "x:"),
    "chance": ("chance", "-"),
}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000"]  # that colour-blind people tell apart (Okabe & Ito)
WATCHED = [1, 2, 3, 4, 8]  # difficulties of the learning curves


def exam(task, difficulty, size):
    """Up to `size` problems, of different computations, that no model is trained on, always the same ones."""
    rng, problems = np.random.default_rng(difficulty), {}
    for _ in range(200 * size):  # there are not that many of one step
        if cot.held_out(problem := cot.TASKS[task][0](difficulty, rng)):
            problems[cot.computation(problem)] = problem
        if len(problems) == size:
            break
    return list(problems.values())


def chance(task, difficulty):
    """The accuracy of who knows where a problem begins and how long it is, and guesses the likeliest end."""
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


def deepened(params, config, seed):
    """params of a model with as many layers or several times as many, that computes the same: behind each old layer
    stand new ones that add nothing yet (Net2DeeperNet, Chen et al. 2016). A new deep model learns less than that.
    """
    new = model.init(config, seed)
    times = config.num_hidden_layers // cot.CONFIG.num_hidden_layers
    nothing = {name: 0 * w for name, w in new.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    place = lambda name: re.sub(r"(?<=layers\.)\d+", lambda layer: str(times * int(layer[0])), name)
    return new | nothing | {place(name): w.copy() for name, w in params.items()}


def learned(folder, name, steps, seed, size, start=None):
    """A model, trained and saved: its params, and its learning curve, with the accuracy at ten points. start: params to
    begin with; None for new ones.
    """
    task, way, config, share, batch = MODELS[name]
    params = deepened(start, config, seed) if start else model.init(config, seed)
    rng, steps = np.random.default_rng(seed), max(1, round(share * steps))
    curve = {"steps": [], "accuracy": {str(d): [] for d in WATCHED if d in cot.TASKS[task][1]}}
    tests = {difficulty: exam(task, int(difficulty), size) for difficulty in curve["accuracy"]}

    def watched(progress):
        for step, done in enumerate(progress, 1):
            yield done
            if step % max(1, steps // 10) == 0 and way != "cot":
                curve["steps"].append(step)
                for difficulty, problems in tests.items():
                    marks = accuracy(problems, sample(params, config, problems, way))
                    curve["accuracy"][difficulty].append(float(np.mean(marks)))

    longest = name == next(iter(MODELS))  # one bar for all
    progress = watched(counted("training" if longest else None, steps))
    cot.train(params, config, task, way, progress, rng, batch=batch)
    save(os.path.join(folder, name), params, config)
    return params, curve


def all_learned(folder, steps, seed, size, parallel_map=map):
    """All of MODELS, side by side, each in one thread: {name: params} and {name: learning curve}."""

    def learn(name):
        found = {name: learned(folder, name, steps, seed, size)}
        for then in [then for then, first in BEGINS.items() if first == name]:
            found[then] = learned(folder, then, steps, seed, size, found[name][0])
        return found

    found = {}
    for some in parallel_map(learn, [name for name in MODELS if name not in BEGINS]):
        found |= some
    return tuple({name: found[name][i] for name in MODELS} for i in (0, 1))


def save(folder, params, config):
    model.save(folder, params, config)
    cot.TOKENIZER.save(folder)


def measure(task, models, size, parallel_map=map):
    """The task's entry of summary.json: every way on problems that no model was trained on. models: {way: params}."""
    rows = []
    for difficulty in cot.TASKS[task][1]:
        problems = exam(task, difficulty, size)
        row = {"difficulty": difficulty, "problems": len(problems), "chance": chance(task, difficulty)}
        for way, params in models.items():
            _, how, config, *_ = MODELS[f"{task}-{way}"]
            chains = sample(params, config, problems, how, parallel_map=parallel_map)
            row[way], *row[f"{way}_95"] = proportion(accuracy(problems, chains))
            row[f"tokens_{way}"] = float(np.mean([len(ids) for (ids,) in chains]))
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def percent(share, interval):
    return f"{100 * share:.0f} % [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def show(task, table):
    """Prints a task's entry of summary.json."""
    ways = [way for way in WAYS if f"{way}_95" in table]
    print(f"\n{task:14}" + "".join(f"{WAYS[way][0]:>22}" for way in ways) + f"{'chance':>9}{'tokens':>8}")
    for i, difficulty in enumerate(table["difficulty"]):
        cells = "".join(f"{percent(table[way][i], table[f'{way}_95'][i]):>22}" for way in ways)
        print(f"{difficulty:<14}{cells}{100 * table['chance'][i]:7.2g} %{table['tokens_cot'][i]:8.0f}")


def show_curves(curves):
    """Prints how far the models that answer at once had come at each tenth of their training, in per cent."""
    for name, curve in curves.items():
        print(f"\n{name}, at each of {len(curve['steps'])} points up to step {curve['steps'][-1]:,}:")
        for difficulty, shares in curve["accuracy"].items():
            print(f"{difficulty:>3}" + "".join(f"{100 * share:5.0f}" for share in shares))


def draw(tables, path):
    """Accuracy against the number of swaps, with and without steps. tables: one of each seed. Shaded is the range of
    the seeds or, of a single one, the 95 % interval.
    """
    with figure(path, size=(7, 4.2), legends=False) as axes:
        x = tables[0]["difficulty"]
        for (way, (name, style)), colour in zip(WAYS.items(), COLOURS):
            shares = 100 * np.array([table[way] for table in tables])
            low, high = shares.min(axis=0), shares.max(axis=0)
            if len(tables) == 1 and way != "chance":
                low, high = 100 * np.array(tables[0][f"{way}_95"]).T
            axes.plot(x, shares.mean(axis=0), style, label=name, markersize=5, color=colour)
            axes.fill_between(x, low, high, alpha=0.15, color=colour, linewidth=0)
        shaded = f"mean and range of {len(tables)} seeds" if len(tables) > 1 else "95 % intervals"
        axes.set(xlabel=f"swaps in the problem ({shaded})", ylabel="right answers (%)", ylim=(-3, 103), xlim=(0, 25))
        axes.set(title="Steps go where depth does not reach")
        axes.figure.legend(loc="outside right center", frameon=False)
