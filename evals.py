"""Evaluación de LLMs: the benchmarks of the slide, from votes, grids, answers and programs to a number.

    LMArena               people vote blindly between two answers       ratings with intervals
    ARC-AGI               puzzles of coloured grids                     exact grids, in two attempts
    Humanity's Last Exam  questions at the level of a doctorate         accuracy and calibration error
    HumanEval             programming problems, judged by running them  pass@k

and two measures for which a model writes nothing: multiple choice by likelihood, and bits per byte of a text. Here are
the measures alone, on values from whatever model: `evals.pass_at_k(n=10, c=3, k=1)`. lab/tasks.py reads the published
files, asks, and finds the answers in what a model wrote.

    python lecture.py evaluation                              the measures on samples, without a model
    python evals.py --task arena --file votes.jsonl           ratings from votes
    python evals.py --load DIR --task humaneval --file F      a model folder goes in, a table comes out
"""

import collections
import decimal
import math
import re

from engine import np


# ------------------------------------------------------------------------------------------------ LMArena
def elo(votes, k=4.0, start=1000.0):
    """Elo's update (Elo 1978), a vote at a time:  R_a += k (score - E),  E = 1 / (1 + 10^((R_b - R_a) / 400)).

    votes: a list of (model_a, model_b, score of model_a), where the score is 1, 0 or, of a tie, 1/2. The last votes
    count most, so the ratings depend on the order: right for players who change, not for models, who do not.
    Returns {model: rating}.
    """
    ratings = collections.defaultdict(lambda: start)
    for a, b, score in votes:
        gain = k * (score - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a], ratings[b] = ratings[a] + gain, ratings[b] - gain
    return dict(ratings)


def strengths(wins):
    """The likeliest strengths s of the Bradley-Terry model (1952):  P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    This is logistic regression without an intercept, P(y = 1) = σ(s·x): y says who won, x = e_i - e_j who played. Elo
    takes a step of gradient ascent on one vote, k (y - P) x. Here all votes count alike: Newton's method, on a
    log-likelihood that is concave. With such x its gradient, Σ (y - P) x, and its -Hessian, Σ P (1 - P) x xᵀ, are

        gradient_i = Σ_j wins_ij - games_ij P_ij        -Hessian = diag(Σ_j V_ij) - V,   V = games P (1 - P)

    wins: (..., models, models), how often i beat j; half a win each is a tie. Returns (..., models), of mean 0. Raises
    ValueError where there is no maximum: a group of models never lost to the others.
    """
    wins = np.asarray(wins, float)
    games, models = wins + np.swapaxes(wins, -1, -2), wins.shape[-1]
    s = np.zeros(wins.shape[:-1])
    for _ in range(200):
        p = 1 / (1 + np.exp(s[..., None, :] - s[..., None]))
        gradient = (wins - games * p).sum(axis=-1)
        v = games * p * (1 - p)
        # 1 / models lifts the one direction that changes no probability: all strengths together
        curvature = v.sum(axis=-1)[..., None] * np.eye(models) - v + 1 / models
        try:
            step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        s = s + step / np.maximum(1, np.abs(step).max(axis=-1, keepdims=True))  # no further than it can be trusted
        if np.abs(step).max() < 1e-9 * (1 + np.abs(s).max()):
            return s
    raise ValueError("no ratings are likeliest: some models never lost to the others, and there is no prior")


def bootstrap(statistic, counts, rng, rounds=1000):
    """The 95 % percentile interval of a statistic (Efron 1979): recomputed on data drawn again, with replacement.

    counts: (cells,) how often each datum was observed. statistic: (rounds, cells) counts -> (rounds, ...).
    Returns (low, high), each (...).
    """
    draws = rng.multinomial(counts.sum(), counts / counts.sum(), size=rounds)
    values = [statistic(draws[i : i + 50]) for i in range(0, rounds, 50)]
    return tuple(np.percentile(np.concatenate(values), (2.5, 97.5), axis=0))


ELO = 400 / math.log(10)  # points in a unit of log-odds: 400 are odds of 10 to 1


def bradley_terry(votes, prior=0.1, anchor=None, rounds=0, rng=None):
    """The Bradley-Terry ratings of LMArena (Chiang et al. 2024, section 4), on Elo's scale, with two choices of ours:
    the prior, and the mean of 1000.

    votes: as in `elo`, and such that they link every model to every other, if only through others; a tie is half a win
    for each side. prior: so many ties are added to every pair that met, which keeps finite the rating of a model that
    never lost. The mean is 1000, or the model `anchor` is. rounds: of the bootstrap, with a numpy Generator.
    Returns {model: (rating, low, high)}, best first; without rounds low and high are the rating.
    """
    cells = collections.Counter(votes)
    models = sorted({name for a, b, _ in cells for name in (a, b)})
    i, j, score = (np.array(column) for column in zip(*((models.index(a), models.index(b), y) for a, b, y in cells)))
    ties = np.zeros((len(models), len(models)))
    ties[i, j] = ties[j, i] = prior

    def ratings(counts):  # (rounds, cells) -> (rounds, models)
        wins = np.zeros((len(counts), *ties.shape)) + ties / 2
        np.add.at(wins, (slice(None), i, j), counts * score)
        np.add.at(wins, (slice(None), j, i), counts * (1 - score))
        s = ELO * strengths(wins)
        return 1000 + s - (0 if anchor is None else s[:, [models.index(anchor)]])

    counts = np.array(list(cells.values()))
    middle = ratings(counts[None])[0]
    low, high = bootstrap(ratings, counts, rng, rounds) if rounds else (middle, middle)
    return {models[m]: (float(middle[m]), float(low[m]), float(high[m])) for m in np.argsort(-middle, kind="stable")}


# ------------------------------------------------------------------------------------------------ ARC-AGI
def arc_score(outputs, attempts):
    """The share of a task's test inputs with an exactly right grid among their first two attempts (ARC Prize).

    outputs: the right grid of each test input, a list of rows of colours from 0 to 9 (Chollet 2019). attempts: for each
    a list of grids, None where an answer had none. The benchmark is the mean of its tasks.
    """
    return float(np.mean([grid in grids[:2] for grid, grids in zip(outputs, attempts, strict=True)]))


# ----------------------------------------------------------------------------------- Humanity's Last Exam
NUMERAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,6})?")


def same_answer(given, expected):
    """Equality after normalisation, where the benchmark asks a judge model, which also accepts other wordings.

    Case, whitespace and a final full stop do not count, and numerals are compared as numbers. Nothing is computed: 10^2
    is not 100. Where TeX, Markdown or Unicode spell one thing in several ways, `plain` in lab/tasks.py comes first.
    """
    given, expected = (" ".join(text.casefold().split()).rstrip(". ") for text in (given, expected))
    if NUMERAL.fullmatch(given) and NUMERAL.fullmatch(expected):
        return decimal.Decimal(given) == decimal.Decimal(expected)
    return given == expected


def calibration_error(confidence, correct, size=100):
    """The root mean square gap between confidence and accuracy (Hendrycks et al. 2019), HLE's calibration error.

        √( Σ_b (n_b / n) · (mean confidence in b - accuracy in b)² )

    over bins b of `size` answers sorted by confidence, the last with the rest. (The benchmark's own script leaves the
    last bin out of the sum; Phan et al. 2025.) confidence, correct: (n,) in [0, 1].
    """
    order = np.argsort(confidence, kind="stable")
    gaps = (np.asarray(confidence, float) - correct)[order]
    bins = np.split(gaps, range(size, len(gaps) - size + 1, size))
    return math.sqrt(sum(len(b) * b.mean() ** 2 for b in bins) / len(gaps))


def expected_calibration_error(confidence, correct, bins=10):
    """Σ_b (n_b / n) · |mean confidence in b - accuracy in b| over bins of equal width (Naeini et al. 2015)."""
    which = np.minimum((np.asarray(confidence, float) * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(which, np.asarray(confidence, float) - correct)).sum() / len(which))


# ---------------------------------------------------------------------------------------------- HumanEval
def pass_at_k(n, c, k):
    """The chance that k of n programs, drawn without replacement, include a right one if c of the n are right (Chen et
    al. 2021, equation 1).

    1 - C(n-c, k) / C(n, k), as 1 - Π_{i=n-c+1..n} (1 - k/i), whose factors do not overflow. Unbiased, unlike
    1 - (1 - c/n)^k. Raises ValueError for k outside 1..n or c outside 0..n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {c} right programs among {n} is not defined")
    return 1 - float(np.prod(1 - k / np.arange(n - c + 1, n + 1)))


# ------------------------------------------------------------------------------- likelihood, without an answer
def likeliest(loglikelihoods, choices):
    """The numbers of the choices that are likeliest after a question: by total log-likelihood (acc), and by that per
    byte (acc_norm), which does not favour short choices. loglikelihoods: log p in nats of each choice, a text.
    """
    per_byte = np.array(loglikelihoods) / [len(text.encode()) for text in choices]
    return int(np.argmax(loglikelihoods)), int(np.argmax(per_byte))


def perplexity(nats, tokens):
    """exp(nats / tokens), with nats = Σ -log p: the model is as unsure as among that many equally likely tokens."""
    return np.exp(nats / tokens)


def bits_per_byte(nats, n_bytes):
    """Σ -log₂ p of a text divided by its number of bytes: comparable between tokenizers, as perplexity is not."""
    return nats / math.log(2) / n_bytes


# ------------------------------------------------------------------- how sure one can be after so many items
def proportion(values, z=1.96):
    """The mean of values in [0, 1] and its score interval (Wilson 1927): all p for which it lies within z standard
    errors √(p (1 - p) / n). z = 1.96 makes it one of 95 %.

    values: one number an item; where an item counts in part, the interval is too wide rather than too narrow, since
    nothing in [0, 1] varies more than p (1 - p). Returns (mean, low, high).
    """
    n, p = len(values), float(np.mean(values))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


if __name__ == "__main__":
    from engine import cli
    from lab.benchmark_runner import main

    cli.run(main)
