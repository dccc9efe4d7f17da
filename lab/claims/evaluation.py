"""Evaluación de LLMs: the four benchmarks of the slide, on samples and on answers of simple rules."""

import os
import re
from functools import lru_cache

from engine import np
from engine.figure import figure
from engine.sandbox import run_program
from evals import bradley_terry, calibration_error, elo, expected_calibration_error, pass_at_k
from lab.claims import Finding
from lab.tasks import SAMPLES, TASKS, grid_text, parse_grid, score_arc, score_humaneval

HOSTILE = {
    "loops": "while True: pass",
    "forks": "import os\nwhile True: os.fork()",
    "fills memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "writes outside": "open('/tmp/evals', 'w')",
    "opens a socket": "import socket\nsocket.socket()",
    "calls exit": "import os\nos._exit(0)",
    "forges success": "import os\nfor pipe in range(9): os.write(pipe, b'passed')",
}


@lru_cache
def sample(name):
    return TASKS[name].read(os.path.join(SAMPLES, TASKS[name].sample))


def blind_votes_become_ratings(seed=0):
    """LMArena: people compare two models blindly; ratings come of their votes, in whatever order these were given."""
    rng, votes = np.random.default_rng(seed), sample("arena")
    ratings, mixed = bradley_terry(votes, rounds=1000, rng=rng), [votes[i] for i in rng.permutation(len(votes))]
    moved = max(abs(rating[0] - ratings[name][0]) for name, rating in bradley_terry(mixed).items())
    there, back = elo(votes, k=32), elo(votes[::-1], k=32)
    elo_moved = max(abs(there[name] - back[name]) for name in ratings)
    lines = [f"{len(votes)} votes; Elo, k = 32, with the votes from first to last, and from last to first"]
    for name, (value, low, high) in ratings.items():
        interval = f"{name:12}{value:7,.0f}, 95 % interval {low:,.0f} to {high:,.0f}"
        lines.append(f"{interval}; Elo {there[name]:,.0f} and {back[name]:,.0f}")

    def picture(path):
        value, low, high = np.array([*ratings.values()]).T
        with figure(path, size=(7, 3)) as axes:
            axes.errorbar(value, range(len(value))[::-1], xerr=(value - low, high - value), fmt="o", capsize=4)
            axes.set_yticks(range(len(value))[::-1], [*ratings])
            axes.set(title="LMArena: votes tell who is better, and how sure that is", xlabel="rating, on Elo's scale")

    says = f"in another order ratings move by {moved:.0e} points, Elo's by {elo_moved:.0f}"
    return Finding(moved, says, most=1e-3, picture=picture, lines=lines)


def a_puzzle_is_solved_exactly_or_not(seed=0):
    """ARC-AGI: a rule is to be found in examples; an answer counts if every cell of the grid is right."""
    rng, rules = np.random.default_rng(seed), (np.fliplr, lambda grid: np.where(grid == 2, 7, grid))
    grid_of = lambda prompt: np.array(parse_grid(prompt.removesuffix("Output:\n")))
    solve = lambda prompt: [grid_text(rule(grid_of(prompt))) for rule in rules]

    def almost(prompt):  # with one cell that is wrong
        grids = [rule(grid_of(prompt)) for rule in rules]
        for grid in grids:
            at = tuple(rng.integers(0, grid.shape))
            grid[at] = (grid[at] + 1) % 10
        return [grid_text(grid) for grid in grids]

    scores, wrong = (score_arc(sample("arc"), answers)[0] for answers in (solve, almost))
    found, nearly = scores["in two attempts"][0], wrong["in two attempts"][0]
    lines = [
        f"two rules {name}: {value:.2f}, 95 % interval {low:.2f} to {high:.2f}"
        for name, (value, low, high) in scores.items()
    ]
    says = f"two simple rules solve {found:.0%} of the samples, with one wrong cell {nearly:.0%}"
    return Finding(found - nearly, says, least=0.3, picture=puzzle, lines=lines)


def puzzle(path):
    from matplotlib.colors import ListedColormap

    task = next(task for task in sample("arc") if task["id"] == "gravity")
    with figure(path, size=(9, 2.2)) as axes:
        colours = ListedColormap(["black", *(f"C{i}" for i in range(7)), "white", "grey"])
        for i, grid in enumerate(grid for pair in task["train"][:2] + task["test"][:1] for grid in pair.values()):
            left = 1.05 * i + 0.2 * (i // 2)
            axes.imshow(grid, cmap=colours, vmin=0, vmax=9, extent=(left, left + 1, 1, 0))
            axes.text(left, -0.06, ("input", "output")[i % 2] + (" of the test" if i > 3 else ""), fontsize=9)
        axes.set(title="ARC-AGI: find the rule in two examples, and apply it", xlim=(-0.05, 6.8), ylim=(1.05, -0.3))
        axes.axis("off")


def a_model_should_know_what_it_knows(seed=0, n=2500):
    """Humanity's Last Exam: beside accuracy it measures whether a model is as often right as it is sure."""
    rng = np.random.default_rng(seed)
    true = rng.beta(1, 2, n)  # how likely it is that an answer is right
    told, right = {"says what it knows": true, "is too sure": true**0.25}, rng.random(n) < true
    errors = {name: float(calibration_error(confidence, right)) for name, confidence in told.items()}
    lines = [f"{n:,} simulated answers, of which {right.mean():.1%} are right"]
    for name, confidence in told.items():
        expected = expected_calibration_error(confidence, right)
        lines.append(f"{name:20} calibration error {errors[name]:.3f}, expected calibration error {expected:.3f}")

    def picture(path):
        with figure(path, size=(6.5, 3.4)) as axes:
            for name, confidence in told.items():
                bins = np.array_split(np.argsort(confidence), 25)
                means = [[of[b].mean() for b in bins] for of in (confidence, right)]
                axes.plot(*means, marker="o", ms=3, label=name)
            axes.plot([0, 1], [0, 1], "k:", label="calibrated")
            axes.set(title="Humanity's Last Exam: as sure as right, or too sure", xlabel="how sure")
            axes.set(ylabel="how often right")

    says = f"calibration error {errors['says what it knows']:.2f}, of one that is too sure {errors['is too sure']:.2f}"
    return Finding(errors["is too sure"] - errors["says what it knows"], says, least=0.2, picture=picture, lines=lines)


def damaged(solution, rng):
    """Ten times the solution; in most, one word or sign has become another."""
    programs = []
    for _ in range(10):
        words = re.findall(r"\w+|\s+|.", solution)
        a, b = rng.choice([i for i, word in enumerate(words) if word.strip()], 2)
        words[a] = words[b if rng.random() < 0.8 else a]
        programs.append("".join(words))
    return programs


def programs_are_judged_by_their_tests(seed=0):
    """HumanEval: a program is right if its tests pass; pass@k is the chance that one of k is, without bias."""
    rng, problems = np.random.default_rng(seed), sample("humaneval")
    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in problems}
    try:
        measures, items = score_humaneval(problems, lambda prompt: damaged(solutions[prompt], rng), ks=range(1, 11))
    except ValueError as error:  # no program can be run here
        return Finding(None, str(error))
    lines = [f"pass@{k}: {measures[f'pass@{k}'][0]:.2f}, of 10 programs of {len(items)} problems" for k in (1, 5, 10)]
    mean = float(np.mean([item["c"] / item["n"] for item in items]))
    bias = max(
        abs(np.mean([pass_at_k(10, c, 3) for c in rng.binomial(10, p, 20_000)]) - (1 - (1 - p) ** 3))
        for p in (0.1, 0.3, 0.6)
    )

    def picture(path):
        ks = range(1, 11)
        with figure(path, size=(7, 3.2)) as axes:
            for item in sorted(items, key=lambda item: -item["c"]):
                axes.plot(ks, [pass_at_k(item["n"], item["c"], k) for k in ks], "o-", ms=3, color="C0")
                axes.plot(ks, [1 - (1 - item["c"] / item["n"]) ** k for k in ks], ":", color="grey")
            axes.plot([], [], "o-", color="C0", label="pass@k of a problem")
            axes.plot([], [], ":", color="grey", label="1 - (1 - c/n)^k, biased")
            axes.set(title="HumanEval: with more tries more problems are solved", xlabel="k programs", ylabel="pass@k")

    says = f"pass@1 {mean:.2f}, pass@10 {measures['pass@10'][0]:.2f}; pass@3 is off by {bias:.3f} on average"
    return Finding(float(bias), says, most=0.02, picture=picture, lines=lines)


def hostile_programs_fail(seed=0):
    """Programs that a model wrote run apart, where they can do no harm and forge no success."""
    if not run_program("", seconds=30):
        return Finding(None, "no program can be run apart on this system")
    verdicts = {what: run_program(text, seconds=1.0) for what, text in HOSTILE.items()}
    lines = [f"a program that {what}: {'passes' if passed else 'fails'}" for what, passed in verdicts.items()]
    return Finding(
        sum(verdicts.values()),
        f"{sum(verdicts.values())} of {len(verdicts)} hostile programs pass",
        most=0,
        lines=lines,
    )
