"""What more thinking is good for, by experiment: a budget of tokens for one chain, many chains for one problem, and
reinforcement, which finds out by itself that it pays to write more. The last two begin with a model that reasons in
haste: most of its texts skip steps, so that there are many ways from a problem to its answer, and not all lead there.
"""

import os

import numpy as np

import cot
from cot import CONFIG, answer_in, sample
from engine.batches import copied
from engine.figure import figure
from engine.progress import counted
from evals import proportion
from lab.controls import COLOURS, exam, save

STYLES = ["o-", "s--", "^-.", "D:", "v-"]
COUNTS = [1, 2, 4, 8, 16, 32]
TASK = "permutations"
ROOM = 16  # tokens of a chain beside its steps


def shares(name, values):
    """A mean in [0, 1] with its interval, as entries of summary.json."""
    mean, *interval = proportion(values)
    return {name: mean, f"{name}_95": interval}


# ------------------------------------------------------------------------------- one chain, of so many tokens


def budgets(params, size, parallel_map=map):
    """Accuracy against the number of tokens that the model may think, for each difficulty. needed: the least of these
    budgets with at least 90 % of the accuracy without a limit.
    """
    found = {"difficulty": cot.TASKS[TASK][1][1::2], "budget": list(range(0, 270, 15))}
    found |= {"accuracy": [], "needed": [], "unlimited": []}
    for difficulty in found["difficulty"]:
        problems = exam(TASK, difficulty, size)
        chains = [ids for (ids,) in sample(params, CONFIG, problems, "cot", parallel_map=parallel_map)]
        right = lambda some: float(np.mean([cot.reward(problem, ids) for problem, ids in zip(problems, some)]))
        curve, unlimited = [], right(chains)
        for budget in found["budget"]:
            curve.append(right(cot.forced(params, CONFIG, problems, chains, budget, parallel_map)))
        enough = [budget for budget, share in zip(found["budget"], curve) if share >= 0.9 * unlimited]
        found["accuracy"].append(curve)
        found["unlimited"].append(unlimited)
        found["needed"].append(enough[0] if enough else found["budget"][-1])
        print(f"{difficulty:3} swaps: {found['needed'][-1]:4} tokens of thinking are needed", flush=True)
    return found


# --------------------------------------------------------------------------------------------- many chains


def in_haste(problem, rng, most=3):
    """The same problem as people solve it who skip steps: of each one to `most` steps only the last is written down."""
    count = len(problem.steps)
    ends = [end for end in np.cumsum(rng.integers(1, most + 1, count)) if end < count]
    return problem._replace(steps=[problem.steps[end - 1] for end in [*ends, count]])


def nearest_half(options, share):
    """The option for which share(option) is nearest to a half."""
    return min(options, key=lambda option: abs(share(option) - 0.5))


def single(params, difficulty, temperature, size, rng, parallel_map):
    """How often one chain is right, on practice problems."""
    problems = [cot.practice(TASK, difficulty, rng) for _ in range(size)]
    chains = sample(params, CONFIG, problems, "cot", temperature, 1, rng, parallel_map)
    return np.mean([cot.reward(problem, ids) for problem, (ids,) in zip(problems, chains)])


def many_chains(params, verifier, problems, temperature, rng, parallel_map=map):
    """Of n = 1 ... 32 chains the majority, the one that the model itself finds likeliest, and the one that a verifier
    prefers, beside the likeliest token at each place (greedy). Groups of n among 32 chains are averaged.
    """
    most = COUNTS[-1]
    chains = sample(params, CONFIG, problems, "cot", temperature, most, rng, parallel_map)
    greedy = sample(params, CONFIG, problems, "cot", parallel_map=parallel_map)
    answers = [[answer_in(ids) for ids in own] for own in chains]
    scores = {"likelihood": cot.verdicts(params, CONFIG, problems, chains, parallel_map)}
    scores |= {"verifier": cot.verdicts(verifier, CONFIG, problems, chains, parallel_map)} if verifier else {}
    length = float(np.mean([len(ids) for own in chains for ids in own]))
    found = {"problems": len(problems), "temperature": temperature, "n": COUNTS, "tokens": [n * length for n in COUNTS]}
    found |= shares("greedy", [cot.reward(problem, ids) for problem, (ids,) in zip(problems, greedy)])
    found["greedy_tokens"] = float(np.mean([len(ids) for (ids,) in greedy]))
    for way in ["majority", *scores]:
        found[way], found[f"{way}_95"] = [], []
        for n in COUNTS:
            marks = []
            for i, problem in enumerate(problems):
                groups = [range(start, start + n) for start in range(0, most, n)]
                if way == "majority":
                    said = [cot.majority(answers[i][j] for j in group) for group in groups]
                else:
                    said = [answers[i][max(group, key=lambda j: scores[way][i, j])] for group in groups]
                marks.append(np.mean([answer == problem.answer for answer in said]))
            mean, *interval = proportion(marks)
            found[way].append(mean)
            found[f"{way}_95"].append(interval)
        print(f"   {way:12}" + "".join(f"{100 * share:6.0f} %" for share in found[way]), flush=True)
    print(f"   greedy      {100 * found['greedy']:6.0f} %", flush=True)
    return found


# -------------------------------------------------------------------------------------------- reinforcement


def reinforced(folder, params, difficulty, steps, seed, size, parallel_map):
    """The hasty model before and after GRPO, and after what a sceptic would try: rejection sampling with as many
    chains, and as many further worked solutions.
    """
    group, questions = 8, 16
    room, rounds, texts = 10 * difficulty + ROOM, max(1, steps // 50), 32

    def draws(rng):
        problem = cot.practice(TASK, int(rng.integers(1, difficulty + 1)), rng)
        return cot.prompt(problem), problem

    def rewarded(label, **how):
        rng = np.random.default_rng(seed)
        sizes = {"questions": questions, "group": group}
        return cot.reinforce(params, CONFIG, draws, cot.reward, counted(label, rounds), rng, room, 6e-4, **sizes, **how)

    def supervised():
        tuned = copied(params)
        progress = np.linspace(0.7, 1, rounds * questions * group // texts, endpoint=False)
        how = {"changed": in_haste, "largest": difficulty, "batch": texts}
        cot.train(tuned, CONFIG, TASK, "cot", progress, np.random.default_rng(seed + 1000), **how)
        return tuned

    ways = {
        "after": lambda: rewarded("GRPO"),
        "rejection_sampling": lambda: rewarded(None, right=True),
        "more_supervision": supervised,
    }
    models = {"before": params} | dict(zip(ways, parallel_map(lambda way: ways[way](), ways)))
    save(os.path.join(folder, "grpo"), models["after"], CONFIG)
    problems, rng = exam(TASK, difficulty, size), np.random.default_rng(seed)
    found = {"task": TASK, "difficulty": difficulty, "problems": len(problems), "rounds": rounds}
    found["chains"] = rounds * questions * group
    for name, weights in models.items():
        (greedy, sampled) = (
            sample(weights, CONFIG, problems, "cot", temperature, 1, rng, parallel_map) for temperature in (0.0, 1.0)
        )
        marks = lambda chains: [cot.reward(problem, ids) for problem, (ids,) in zip(problems, chains)]
        found |= shares(name, marks(sampled)) | shares(f"{name}_greedy", marks(greedy))
        found[f"{name}_tokens"] = float(np.mean([len(ids) for (ids,) in sampled]))
        print(f"   {name:20}{100 * found[name]:4.0f} % right, {found[f'{name}_tokens']:.0f} tokens a chain", flush=True)
    return found


# ------------------------------------------------------------------------------------------------- all of it


def experiment(folder, careful, steps, seed, size, parallel_map=map):
    """The entries of summary.json. careful: the params of a model that writes every step."""
    rng, few = np.random.default_rng(seed), max(4, size // 2)
    found = {"thinking_budget": budgets(careful, few, parallel_map)}
    hasty, share = copied(careful), lambda *how: single(*how, few, rng, parallel_map)
    progress = (0.7 + 0.3 * done for done in counted("a hasty model", steps // 2))  # all difficulties from the start
    cot.train(hasty, CONFIG, TASK, "cot", progress, rng, in_haste, 10, batch=16)
    save(os.path.join(folder, "permutations-hasty"), hasty, CONFIG)
    difficulty = nearest_half(range(2, 11), lambda d: share(hasty, d, 1.0))
    temperature = nearest_half([1.0, 1.5, 2.0, 2.5, 3.0], lambda t: share(careful, difficulty, t))
    progress = counted("chains to judge", max(2, steps // 50))
    marked = cot.marked_chains(hasty, CONFIG, TASK, difficulty, progress, rng, parallel_map=parallel_map)
    progress = counted("a verifier", max(2, steps // 25))
    verifier = cot.train_verifier(hasty, CONFIG, marked, progress, seed, parallel_map)
    problems = exam(TASK, difficulty, few)
    print(f"\n{difficulty} swaps, many ways to the answer; n = {COUNTS}")
    found["many_chains"] = {"difficulty": difficulty}
    found["many_chains"]["many_ways"] = many_chains(hasty, verifier, problems, 1.0, rng, parallel_map)
    print(f"{difficulty} swaps, one way to the answer, at temperature {temperature}")
    found["many_chains"]["one_way"] = many_chains(careful, None, problems, temperature, rng, parallel_map)
    print(f"\nreinforcement on {difficulty} swaps and fewer")
    found["grpo"] = reinforced(folder, hasty, difficulty, steps, seed, size, parallel_map)
    return found


def draw_budget(found, path):
    """Accuracy against the thinking budget, a line for each difficulty."""
    with figure(path, size=(7, 4.2), legends=False) as axes:
        for difficulty, curve, style, colour in zip(found["difficulty"], found["accuracy"], STYLES, COLOURS):
            how = {"markersize": 4, "color": colour, "label": f"{difficulty:.0f} swaps"}
            axes.plot(found["budget"], 100 * np.array(curve), style, **how)
        axes.set(xlabel="tokens that the model may think", ylabel="right answers (%)", ylim=(-3, 103))
        axes.set(title="The answer comes only when the last step is written")
        axes.figure.legend(loc="outside right center", frameon=False)


def draw_chains(found, path):
    """Accuracy against tokens spent on a problem, where there are many ways to its answer, with 95 % intervals."""
    difficulty, found = found["difficulty"], found["many_ways"]
    names = {"verifier": ("best by a verifier", "s-"), "majority": ("majority", "o-.")}
    names |= {"likelihood": ("likeliest of them", "^--")}
    with figure(path, size=(7, 4.2), legends=False) as axes:
        for (way, (name, style)), colour in zip(names.items(), COLOURS):
            axes.plot(found["tokens"], 100 * np.array(found[way]), style, markersize=5, label=name, color=colour)
            low, high = 100 * np.array(found[f"{way}_95"]).T
            axes.fill_between(found["tokens"], low, high, alpha=0.12, color=colour, linewidth=0)
        axes.plot(found["greedy_tokens"], 100 * found["greedy"], "k*", markersize=12, label="one chain, greedy")
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["tokens"], [f"{tokens:.0f}" for tokens in found["tokens"]])
        spent = f"tokens written for a problem of {difficulty} swaps (1 to 32 chains; 95 % intervals)"
        axes.set(xlabel=spent, ylabel="right answers (%)")
        axes.set(ylim=(-3, 103), title="Many chains are right where the greedy one is wrong")
        axes.figure.legend(loc="outside right center", frameon=False)
