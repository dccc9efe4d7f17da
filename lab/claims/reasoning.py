"""Razonamiento: steps before the answer, and how long a problem takes. Long experiments, whose results are stored."""

from lab.claims import Finding, shares
from lab.results import mean, spread, stored

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
    others = max(mean(values) for way, values in last.items() if way != "cot")
    lines = [told(found), f"{'swaps':12}" + "".join(f"{d:6}" for d in difficulty)]
    for way, runs in rows.items():
        lines.append(f"{way:12}" + "".join(f"{mean(values):6.0%}" for values in zip(*runs)))
    says = f"{difficulty[-1]} swaps: in steps {shares(last['cot'])}, at once {shares(last['direct'])}"
    return Finding(mean(last["cot"]) - others, says, least=0.3, picture="cot.png", lines=lines)


def a_quick_answer_is_for_easy_problems(seed=0):
    """Without steps, fewer problems are solved the harder they are: an answer at once has no room for more."""
    if (found := stored("cot")) is None:
        return MISSING
    rows, difficulty = rows_of("permutations", found)
    falls = [run[0] - run[-1] for run in rows["direct"]]
    first, last = ([run[at] for run in rows["direct"]] for at in (0, -1))
    says = f"at once: {shares(first)} with {difficulty[0]} swaps, {shares(last)} with {difficulty[-1]}"
    return Finding(min(falls), says, least=0.2, lines=[told(found)])


def harder_problems_take_longer(seed=0):
    """As for people, a harder problem takes longer: cut off before its last step, which comes later the harder the
    problem, a chain does not know the answer.
    """
    if (found := stored("cot")) is None:
        return MISSING
    budgets = [run["thinking_budget"] for run in found["runs"]]
    first, last = ([budget["needed"][at] for budget in budgets] for at in (0, -1))
    easy, hard = (budgets[0]["difficulty"][at] for at in (0, -1))
    says = f"{spread(first, '{:.0f}')} tokens for {easy} swaps, {spread(last, '{:.0f}')} for {hard}"
    longer = min(b - a for a, b in zip(first, last))
    return Finding(longer, says, least=20, picture="thinking_budget.png", lines=[told(found)])
