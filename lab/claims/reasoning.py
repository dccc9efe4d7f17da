"""Razonamiento: steps before the answer, and how long a problem takes. Long experiments, whose results are stored."""

from lab.claims import Finding, spread, stored

MISSING = Finding(None, "not measured here: python cot.py --seeds 3")


def rows_of(task, found):
    """{way: [its accuracies at each difficulty, of a seed, ...]} and the difficulties."""
    runs = [run["tasks"][task] for run in found["runs"]]
    ways = [way for way in ("direct", "direct_deep", "filler", "cot", "chance") if way in runs[0]]
    return {way: [run[way] for run in runs] for way in ways}, runs[0]["difficulty"]


def told(found):
    return f"{found['command']}: {found['machine']}, seeds {', '.join(map(str, found['seeds']))}"


def steps_before_the_answer_solve_more(seed=0):
    """Chain of thought: writing intermediate steps before the answer solves what answering at once does not."""
    if (found := stored("cot")) is None:
        return MISSING
    rows, difficulty = rows_of("permutations", found)
    last = {way: [accuracies[-1] for accuracies in runs] for way, runs in rows.items()}
    others = max(sum(values) / len(values) for way, values in last.items() if way != "cot")
    lines = [told(found), f"{'swaps':12}" + "".join(f"{d:6}" for d in difficulty)]
    for way, runs in rows.items():
        lines.append(f"{way:12}" + "".join(f"{sum(values) / len(values):6.0%}" for values in zip(*runs)))
    says = f"{difficulty[-1]} swaps: in steps {spread(last['cot'])}, at once {spread(last['direct'])}"
    return Finding(sum(last["cot"]) / len(last["cot"]) - others, says, least=0.3, picture="cot.png", lines=lines)


def harder_problems_defeat_a_quick_answer(seed=0):
    """The harder the problem, the longer one has to think: a quick answer is right for the easiest ones only."""
    if (found := stored("cot")) is None:
        return MISSING
    rows, difficulty = rows_of("permutations", found)
    falls = [run[0] - run[-1] for run in rows["direct"]]
    first, last = ([run[at] for run in rows["direct"]] for at in (0, -1))
    says = f"at once: {spread(first)} with {difficulty[0]} swaps, {spread(last)} with {difficulty[-1]}"
    return Finding(min(falls), says, least=0.2, picture="thinking_budget.png", lines=(told(found),))
