"""`python evals.py`: the benchmarks on the samples, and on answers of simple rules and simulated models."""

import os
import re

from engine import np
from engine.figure import figure
from engine.sandbox import run_program
from evals import bradley_terry, calibration_error, elo, expected_calibration_error, pass_at_k
from lab.tasks import SAMPLES, TASKS, grid_text, parse_grid, score_arc, score_humaneval, table

HOSTILE = {
    "loops": "while True: pass",
    "forks": "import os\nwhile True: os.fork()",
    "fills memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "writes outside": "open('/tmp/evals', 'w')",
    "opens a socket": "import socket\nsocket.socket()",
    "calls exit": "import os\nos._exit(0)",
    "forges success": "import os\nfor pipe in range(9): os.write(pipe, b'passed')",
}


def demo():
    """The benchmarks on the samples and, where answers are needed, on those of simple rules and simulated models."""
    rng = np.random.default_rng(0)
    sample = {name: task.read(os.path.join(SAMPLES, task.sample)) for name, task in TASKS.items()}
    votes = sample["arena"]
    ratings = bradley_terry(votes, rounds=1000, rng=rng)
    table(ratings, f"LMArena, {len(votes)} votes")
    there, back = elo(votes, k=32), elo(votes[::-1], k=32)
    print("  Elo, k = 32, with the same votes from first to last, and from last to first:")
    print("  " + ", ".join(f"{name} {there[name]:,.0f} {back[name]:,.0f}" for name in ratings))

    rules = np.fliplr, lambda x: np.where(x == 2, 7, x)
    solve = lambda prompt: [grid_text(rule(np.array(parse_grid(prompt.removesuffix("Output:\n"))))) for rule in rules]
    print()
    table(score_arc(sample["arc"], solve)[0], "ARC-AGI, two rules")

    n = 2500
    true = rng.beta(1, 2, n)  # how likely it is that an answer is right
    told = {"says what it knows": true, "is too sure": true**0.25}
    right = rng.random(n) < true
    print(f"\nHumanity's Last Exam, {n:,} simulated answers\n{'':22}accuracy  calibration error  expected cal. error")
    for name, confidence in told.items():
        errors = calibration_error(confidence, right), expected_calibration_error(confidence, right)
        print(f"  {name:20}{right.mean():8.3f}{errors[0]:19.3f}{errors[1]:21.3f}")

    items = []
    print()
    try:
        solutions = {problem["prompt"]: problem["canonical_solution"] for problem in sample["humaneval"]}
        answers = lambda prompt: damaged(solutions[prompt], rng)
        measures, items = score_humaneval(sample["humaneval"], answers, ks=range(1, 11))
        table({name: measures[name] for name in ("pass@1", "pass@5", "pass@10")}, "HumanEval, 10 programs")
        verdicts = {what: "passes" if run_program(text, seconds=1.0) else "fails" for what, text in HOSTILE.items()}
        print("  a program that " + ", ".join(f"{what}: {verdict}" for what, verdict in verdicts.items()))
    except ValueError as error:  # the other measures need no programs
        print(f"HumanEval: {error}")
    draw(ratings, next(task for task in sample["arc"] if task["id"] == "gravity"), told, right, items)
    print("\nfigures/evals.png")


def damaged(solution, rng):
    """Ten times the solution; in most, one word or sign has become another."""
    programs = []
    for _ in range(10):
        words = re.findall(r"\w+|\s+|.", solution)
        a, b = rng.choice([i for i, word in enumerate(words) if word.strip()], 2)
        words[a] = words[b if rng.random() < 0.8 else a]
        programs.append("".join(words))
    return programs


def draw(ratings, puzzle, told, right, items):
    """One picture for each of the four benchmarks."""
    from matplotlib.colors import ListedColormap

    with figure("figures/evals.png", 2, 2, (10, 7)) as ((arena, arc), (calibration, passing)):
        value, low, high = np.array(list(ratings.values())).T
        arena.errorbar(value, range(len(value))[::-1], xerr=(value - low, high - value), fmt="o", capsize=4)
        arena.set_yticks(range(len(value))[::-1], list(ratings))
        arena.set(title="LMArena: ratings and their 95 % intervals", xlabel="Bradley-Terry rating on Elo's scale")

        colours = ListedColormap(["black", *(f"C{i}" for i in range(9))])
        grids = [grid for pair in puzzle["train"][:2] + puzzle["test"][:1] for grid in pair.values()]
        for i, grid in enumerate(grids):
            left = 1.05 * i + 0.2 * (i // 2)
            arc.imshow(grid, cmap=colours, vmin=0, vmax=9, extent=(left, left + 1, 1, 0))
            arc.text(left, -0.06, ("input", "output")[i % 2])
        arc.set(title="ARC-AGI: two examples, and a test", xlim=(-0.05, 6.8), ylim=(1.05, -0.3))
        arc.axis("off")

        for name, confidence in told.items():
            bins = np.array_split(np.argsort(confidence), 25)
            means = [[of[b].mean() for b in bins] for of in (confidence, right)]
            calibration.plot(*means, "o-", ms=3, label=name)
        calibration.plot([0, 1], [0, 1], "k:", label="calibrated")
        calibration.set(title="Humanity's Last Exam: bins of 100 answers", xlabel="confidence", ylabel="accuracy")

        ks = range(1, 11)
        for n, c in ((item["n"], item["c"]) for item in items):
            passing.plot(ks, [pass_at_k(n, c, k) for k in ks], "o-", ms=3)
            passing.plot(ks, [1 - (1 - c / n) ** k for k in ks], ":", c="gray")
        passing.plot([], [], ":", c="gray", label="1 - (1 - c/n)^k, biased")
        passing.set(title="HumanEval: pass@k of each problem, 10 programs", xlabel="k", ylabel="pass@k")
