"""Evaluación de LLMs: the benchmarks of the slide, from votes, grids, answers and programs to a number.

    LMArena               people vote blindly between two answers       ratings with intervals
    ARC-AGI               puzzles of coloured grids                     exact grids, in two attempts
    Humanity's Last Exam  questions at the level of a doctorate         accuracy and calibration error
    HumanEval             programming problems, judged by running them  pass@k

and two measures that need no answer to be written out: bits per byte of a text, and multiple choice by likelihood.
All of it is plain Python and NumPy that scores votes, texts and arrays, from whatever model they come; only the command
line runs one. The files it reads are those the benchmarks are published in.

    python evals.py                                           the benchmarks on the samples, without a model
    python evals.py --task arena --file votes.jsonl           ratings from votes
    python evals.py --load DIR --task humaneval --file F      a model folder goes in, a table comes out
"""

import collections
import decimal
import itertools
import json
import math
import os
import re
import sys
import types
import unicodedata

import numpy as np

from engine import cli
from engine.files import read_json, read_rows, read_text, shown
from engine.sandbox import run_program

# ---------------------------------------------------------------------------------------------- intervals


def proportion(values, z=1.96):
    """The mean of values in [0, 1] and its 95 % interval (Wilson 1927): all p that it is within z standard errors of.

    values: one number an item; where an item counts in part, the interval is too wide rather than too narrow, since
    nothing in [0, 1] varies more than p (1 - p). Returns (mean, low, high).
    """
    n, p = len(values), float(np.mean(values))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def bootstrap(statistic, counts, rng, rounds=1000):
    """The 95 % percentile interval of a statistic (Efron 1979): recomputed on data drawn again, with replacement.

    counts: (cells,) how often each datum was observed. statistic: (rounds, cells) counts -> (rounds, ...).
    Returns (low, high), each (...).
    """
    counts = np.asarray(counts)
    draws = rng.multinomial(counts.sum(), counts / counts.sum(), size=rounds)
    values = [statistic(draws[i : i + 50]) for i in range(0, rounds, 50)]
    return tuple(np.percentile(np.concatenate(values), (2.5, 97.5), axis=0))


# ------------------------------------------------------------------------------------------------ LMArena

SCORES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}  # of model_a
ELO = 400 / math.log(10)  # Elo points in a unit of log-odds


def read_votes(path):
    """Votes in the format LMArena publishes (JSON, JSONL or CSV): a list of (model_a, model_b, score of model_a)."""
    votes = []
    for where, row in read_rows(path, {"model_a": str, "model_b": str, "winner": str}):
        if row["winner"] not in SCORES:
            raise ValueError(f"{where}: the winner {shown(row['winner'])} is none of {', '.join(SCORES)}")
        if row["model_a"] == row["model_b"]:
            raise ValueError(f"{where}: {shown(row['model_a'])} is compared with itself")
        votes.append((row["model_a"], row["model_b"], SCORES[row["winner"]]))
    return votes


def elo(votes, k=4.0, start=1000.0):
    """Elo's update (Elo 1978), a vote at a time: R_a += k (score - E),  E = 1 / (1 + 10^((R_b - R_a) / 400)).

    The last votes count most, so the ratings depend on the order: right for players who change, not for models, who do
    not. votes: as of `read_votes`. Returns {model: rating}.
    """
    ratings = collections.defaultdict(lambda: start)
    for a, b, score in votes:
        gain = k * (score - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a], ratings[b] = ratings[a] + gain, ratings[b] - gain
    return dict(ratings)


def strengths(wins):
    """The likeliest s of the Bradley-Terry model (1952): P(i beats j) = 1 / (1 + exp(s_j - s_i)), of mean 0.

    wins: (..., models, models), how often i beat j; half a win each is a tie. By Newton's method on the log-likelihood,
    which is concave:  gradient_i = Σ_j wins_ij - games_ij P_ij,  -Hessian = diag(Σ_j V_ij) - V,  V = games P_ij P_ji.
    Returns (..., models). Raises ValueError where there is no maximum: a group of models never lost to the others.
    """
    wins = np.asarray(wins, float)
    games, models = wins + np.swapaxes(wins, -1, -2), wins.shape[-1]
    s = np.zeros(wins.shape[:-1])
    for _ in range(200):
        p = 1 / (1 + np.exp(s[..., None, :] - s[..., None]))
        gradient = (wins - games * p).sum(axis=-1)
        v = games * p * (1 - p)
        # 1 / models lifts the one direction that changes no probability: all strengths together
        hessian = v.sum(axis=-1)[..., None] * np.eye(models) - v + 1 / models
        try:
            step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        s = s + step / np.maximum(1, np.abs(step).max(axis=-1, keepdims=True))  # no further than it can be trusted
        if np.abs(step).max() < 1e-9 * (1 + np.abs(s).max()):
            return s
    raise ValueError("no ratings are likeliest: some models never lost to the others, and there is no prior")


def bradley_terry(votes, prior=0.1, anchor=None, rounds=0, rng=None):
    """Ratings as LMArena computes them (Chiang et al. 2024, section 4), on Elo's scale: 400 points are odds of 10 to 1.

    votes: as of `read_votes`; a tie is half a win for each side. prior: so many ties are added to every pair that met,
    which keeps finite the rating of a model that never lost. The mean is 1000, or the model `anchor` is.
    rounds: of the bootstrap, with the Generator rng; 0 for none.
    Returns {model: (rating, low, high)}, best first. Raises ValueError where groups of models never met.
    """
    if not votes:
        raise ValueError("there are no votes")
    cells = collections.Counter(votes)
    models = sorted({name for a, b, _ in cells for name in (a, b)})
    index = {name: i for i, name in enumerate(models)}
    i, j, score = (np.array(column) for column in zip(*((index[a], index[b], score) for a, b, score in cells)))
    met = np.zeros((len(models), len(models)), bool)
    met[i, j] = met[j, i] = True

    reached = np.eye(len(models)) + met  # in one step, then in two, four, ...
    for _ in range(len(models).bit_length()):
        reached = np.sign(reached @ reached)
    if not reached.all():
        groups = [shown(", ".join(m for m, r in zip(models, row) if r)) for row in np.unique(reached, axis=0)]
        groups = " | ".join([*groups[:2], *(["..."] if groups[2:] else [])])
        raise ValueError(f"no votes compare these groups of models, so no ratings do: {groups}")
    if anchor is not None and anchor not in index:
        raise ValueError(f"the anchor {shown(anchor)} is in no vote")

    def ratings(counts):  # (rounds, cells) -> (rounds, models)
        wins = np.zeros((len(counts), len(models), len(models))) + prior / 2 * met
        np.add.at(wins, (slice(None), i, j), counts * score)
        np.add.at(wins, (slice(None), j, i), counts * (1 - score))
        s = ELO * strengths(wins)
        return 1000 + s - (0 if anchor is None else s[:, [index[anchor]]])

    counts = np.array(list(cells.values()))
    middle = ratings(counts[None])[0]
    low, high = bootstrap(ratings, counts, rng, rounds) if rounds else (middle, middle)
    return {models[m]: (float(middle[m]), float(low[m]), float(high[m])) for m in np.argsort(-middle, kind="stable")}


# ------------------------------------------------------------------------------------------------ ARC-AGI


def read_arc(path):
    """Tasks of ARC-AGI (Chollet 2019): {name: {"train": [{"input": grid, "output": grid}, ...], "test": [...]}}.

    path: a folder of task files, one of them, or all in one file as on Kaggle, *challenges.json with the solutions in
    *solutions.json beside it. A grid is a list of rows of colours from 0 to 9.
    """
    if os.path.isdir(path):
        files = {name.removesuffix(".json"): os.path.join(path, name) for name in sorted(os.listdir(path))}
        tasks = {name: read_json(file) for name, file in files.items() if file.endswith(".json")}
        places = files
    else:
        tasks = read_json(path)
        if not isinstance(tasks, dict):
            raise ValueError(f"{path}: not ARC tasks, which are an object")
        if {"train", "test"} & tasks.keys():
            tasks = {os.path.basename(path).removesuffix(".json"): tasks}
        places = {name: f"{path}, task {shown(name)}" for name in tasks}
    if not tasks:
        raise ValueError(f"{path}: no ARC tasks")
    beside = os.path.join(os.path.dirname(path), os.path.basename(path).replace("challenges", "solutions"))
    if "challenges" in os.path.basename(path) and os.path.isfile(beside):
        solutions = read_json(beside)
        try:
            for name, task in tasks.items():
                for pair, grid in zip(task["test"], solutions[name], strict=True):
                    pair["output"] = grid
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{beside}: not a grid for each test input of {path}") from None
    for name, task in tasks.items():
        if fault := arc_fault(task):
            raise ValueError(f"{places[name]}: not an ARC task: {fault}")
    return tasks


def arc_fault(task):
    """What keeps a value from being a task, in words, or None."""
    for part in "train", "test":
        pairs = task.get(part) if isinstance(task, dict) else None
        if not isinstance(pairs, list) or not pairs:
            return f"no {part} pairs"
        for n, pair in enumerate(pairs, 1):
            for side in "input", "output":
                if not isinstance(pair, dict) or not is_grid(pair.get(side)):
                    return f"{part} pair {n} has no grid as its {side}"


def is_grid(grid):
    if not isinstance(grid, list) or not all(isinstance(row, list) for row in grid):
        return False
    rows = {len(row) for row in grid}
    return len(rows) == 1 and 0 not in rows and all(type(c) is int and 0 <= c <= 9 for row in grid for c in row)


def grid_text(grid):
    """A line for each row, its colours apart by blanks."""
    return "\n".join(" ".join(map(str, row)) for row in grid)


ROWS = r"\[\s*[0-9][0-9\s,]*\](?:[\s,]*\[\s*[0-9][0-9\s,]*\])*"  # [1, 2], [3, 4], however they are laid out


def parse_grid(text):
    """The last grid in a text, as `grid_text` or JSON writes one, or None."""

    def as_lines(found):
        rows = re.findall(r"\[\s*([0-9][0-9\s,]*)\]", found[0])
        return "\n\n" + "\n".join(" ".join(re.findall("[0-9]+", row)) for row in rows) + "\n\n"

    rows = rf"\[\s*{ROWS}[\s,]*\]|^\s*{ROWS}[\s,]*$"
    # part by part, as no grid has an empty line
    parts = [re.sub(rows, as_lines, part, flags=re.M) for part in re.split(r"\n\s*\n", text)]
    blocks, block = [], []
    for line in "\n\n".join([*parts, ""]).splitlines():
        if re.fullmatch(r"[\s,|]*[0-9][0-9\s,|]*", line):
            cells = re.findall("[0-9]+", line)
            block.append([int(c) for c in (cells[0] if len(cells) == 1 else cells)])  # 012 is a row of three
        elif block:
            blocks, block = [*blocks, block], []
    return blocks[-1] if blocks and is_grid(blocks[-1]) else None


def arc_prompt(task, grid):
    """The examples of a task and one grid to answer."""
    parts = ["Find the rule that turns each input grid into its output grid.", ""]
    for n, pair in enumerate(task["train"], 1):
        parts += [f"Input {n}:", grid_text(pair["input"]), f"Output {n}:", grid_text(pair["output"]), ""]
    parts += ["Apply it to this input, and answer with the output grid alone.", "Input:", grid_text(grid), "Output:\n"]
    return "\n".join(parts)


def arc_score(task, attempts):
    """The share of a task's test inputs with an exactly right grid among its first two attempts (ARC Prize).

    attempts: for each test input a list of grids, or None. The benchmark is the mean of its tasks.
    """
    return float(np.mean([pair["output"] in grids[:2] for pair, grids in zip(task["test"], attempts, strict=True)]))


def score_arc(tasks, answers):
    """answers(prompt) -> two texts, or None where a model cannot be asked. Returns ({measure: (...)}, items)."""
    items = []
    for name, task in tasks.items():
        texts = [answers(arc_prompt(task, pair["input"])) or [] for pair in task["test"]]
        attempts = [[parse_grid(text) for text in two] for two in texts]
        first = arc_score(task, [two[:1] for two in attempts])
        items.append({"id": name, "first": first, "score": arc_score(task, attempts), "answers": texts})
    names = {"in one attempt": "first", "in two attempts": "score"}
    return {name: proportion([item[which] for item in items]) for name, which in names.items()}, items


# ----------------------------------------------------------------------------------- Humanity's Last Exam

HLE_FORMAT = """

Answer in these three lines:
Explanation: why it is your answer
Answer: the answer and nothing else
Confidence: how sure you are, from 0% to 100%"""


def read_hle(path):
    """Questions of Humanity's Last Exam (Phan et al. 2025): the rows without an image, and how many have one."""
    rows = read_rows(path, {"question": str, "answer": str, "answer_type": ("exactMatch", "multipleChoice")})
    rows = [row for _, row in rows]
    return [row for row in rows if not row.get("image")], sum(bool(row.get("image")) for row in rows)


EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|`)(?=\S)(.+?)(?<=\S)\1(?![\w*])")  # in Markdown, not the * of 2*3 or C*
LABEL = r"\W*(?:(?:exact |final )?answer|explanation|confidence)\W*:"


def parse_answer(text):
    """(answer, confidence) of an answer in HLE's format, the last of each; confidence in [0, 1].

    The answer is what stands behind "Answer:", or on the next line; else behind "the answer is"; else the last line
    without a label. Without a confidence that is 1, as the benchmark has it.
    """
    text = EMPHASIS.sub(r"\2", text)
    for label in r"^\W*(?:exact |final )?answer\W*:\**", r"\banswer(?: is\b|:):?":
        answers = re.findall(rf"{label}\s*(?!{LABEL})(\S.*)$", text, re.I | re.M)
        if answers:
            break
    else:
        answers = [line for line in text.splitlines() if line.strip() and not re.match(LABEL, line, re.I)] or [""]
    told = re.findall(r"^\W*confidence\W*:[\s*~]*(\d*\.?\d+)\s*(%?)", text, re.I | re.M)
    sure = [float(number) * (100 if "." in number and float(number) <= 1 and not sign else 1) for number, sign in told]
    return answers[-1].strip(), min(1.0, sure[-1] / 100) if sure else 1.0


def same_answer(given, expected, answer_type="exactMatch"):
    """Equality after normalisation, where the benchmark asks a judge model, which also accepts other wordings.

    Of a multiple choice the letter that is named. Else case, blanks, a final stop, emphasis, TeX's $ and \\boxed{}, and
    thousands' commas do not count, and numerals are compared as numbers. Nothing is computed: 10² is 10^2, not 100.
    """
    expected = expected.strip()
    if answer_type == "multipleChoice" and re.fullmatch("[A-Z]", expected):
        return named_choice(given) == expected
    given, expected = normal(given), normal(expected)
    if NUMERAL.fullmatch(given) and NUMERAL.fullmatch(expected):
        return decimal.Decimal(given) == decimal.Decimal(expected)
    return given == expected


def named_choice(text):
    """The letter that an answer to a multiple choice names, or None: the first that stands alone, unless another one
    stands beside it, as in "B or C". A lone letter may be a small one.
    """
    text = EMPHASIS.sub(r"\2", text)
    if alone := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return alone[1].upper()
    # A and I are words too, if another word follows that may stand behind an article or a pronoun; but in the middle of
    # a sentence the article is no capital
    text = re.sub(r"\bI(?=['’])|\b(?:I|(?<![\w,] )A)(?= (?!(?:or|and|is|because)\b)[a-z])", "", text)
    letters = list(re.finditer(r"(?<![^\W_])(?<!['’-])(?<!\bnot )[A-Z](?![^\W_]|['’-]\w)", text))
    if len({letter[0] for letter in letters[:2]}) == 2:
        between = text[letters[0].end() : letters[1].start()]
        if re.fullmatch(r"\W*(?:(?:or|nor|and)\b\W*)?", between):
            return None
    return letters[0][0] if letters else None


NUMERAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,6})?")
THOUSANDS = re.compile(r"(?<![\w.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![\w,])")
SPELLED = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s"}  # what NFKC would make digits like any: 10², 2½


def normal(text):
    """A text without what does not count when answers are compared."""
    kind = lambda char: SPELLED.get(unicodedata.decomposition(char).split(" ")[0], "%s")
    text = "".join(form % unicodedata.normalize("NFKC", "".join(run)) for form, run in itertools.groupby(text, kind))
    text = re.sub("[\u2010-\u2015\u2212]", "-", text).replace("\u2044", "/").replace("$", "").casefold()
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", EMPHASIS.sub(r"\2", text)).strip().rstrip(". ")
    text = re.sub(r"([\^_])\{(\w|[+-]?[0-9]+)\}", r"\1\2", text)  # as TeX may write it too
    return " ".join(THOUSANDS.sub(lambda number: number[0].replace(",", ""), text).split())


def calibration_error(confidence, correct, size=100):
    """The root mean square gap between confidence and accuracy (Hendrycks et al. 2019), HLE's calibration error.

        √ Σ_b |b| / n (mean confidence in b - accuracy in b)²

    over bins b of `size` answers sorted by confidence, the last with the rest. (The benchmark's own script leaves the
    last bin out of the sum.) confidence, correct: (n,) in [0, 1].
    """
    order = np.argsort(confidence, kind="stable")
    gaps = (np.asarray(confidence, float) - correct)[order]
    bins = np.split(gaps, range(size, len(gaps) - size + 1, size))
    return math.sqrt(sum(len(b) * b.mean() ** 2 for b in bins) / len(gaps))


def expected_calibration_error(confidence, correct, bins=10):
    """Σ_b |b| / n |mean confidence in b - accuracy in b| over bins of equal width (Naeini et al. 2015)."""
    which = np.minimum((np.asarray(confidence, float) * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(which, np.asarray(confidence, float) - correct)).sum() / len(which))


def score_hle(questions, answer, rng):
    """answer(prompt) -> a text, or None where a model cannot be asked. Returns ({measure: (...)}, items).

    A question that is not asked counts as wrong, and not in the calibration.
    """
    items = []
    for row in questions:
        text = answer(row["question"] + HLE_FORMAT)
        given, confidence = (None, None) if text is None else parse_answer(text)
        correct = text is not None and same_answer(given, row["answer"], row["answer_type"])
        items.append({"id": row.get("id"), "correct": correct, "confidence": confidence, "given": given, "text": text})
    measures = {"accuracy": proportion([item["correct"] for item in items])}
    told = np.array([(item["confidence"], item["correct"]) for item in items if item["text"] is not None])
    for name, error in ("calibration error", calibration_error), ("expected cal. error", expected_calibration_error):
        if len(told):
            measures[name] = (error(*told.T), None, None)  # biased upwards, so that a bootstrap would mislead
    return measures, items


# ---------------------------------------------------------------------------------------------- HumanEval

HUMANEVAL_ASK = "Complete this Python function. Answer with all of it, in one block of code.\n\n"  # to who chats
STOPS = ("\ndef", "\nclass", "\nif", "\nprint", "\n#")  # what begins the next thing after a function's body


def read_humaneval(path):
    """Problems of HumanEval (Chen et al. 2021), JSONL or .jsonl.gz: a list of dicts."""
    return [row for _, row in read_rows(path, dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str))]


def pass_at_k(n, c, k):
    """The chance that k of n programs hold a right one where c are right (Chen et al. 2021, equation 1).

    1 - C(n-c, k) / C(n, k), as 1 - Π_{i=n-c+1..n} (1 - k/i), whose factors do not overflow. Unbiased, unlike
    1 - (1 - c/n)^k. Raises ValueError for k outside 1..n or c outside 0..n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {c} right programs among {n} is not defined")
    return 1 - float(np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def completion(answer, entry_point):
    """The code in a model's answer to a prompt: what follows it up to a stop sequence or, from a model that chats, the
    first block between fences that defines the function."""
    for block in re.findall(r"```(?:python|py)?\n(.*?)(?:```|\Z)", answer, re.S | re.I):
        if re.search(rf"^def {re.escape(entry_point)}\b", block, re.M):
            return f"    pass\n\n\n{block}"  # ends the function that the prompt begins; the block defines it again
    return cut(answer, STOPS)


def cut(text, stops):
    """The text before the first of the stops."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=None)]


def passes(problem, code, seconds=3.0, megabytes=512, unconfined=False):
    """Whether a prompt and its completion pass the problem's tests, run apart in a process that may do no harm."""
    program = f"{problem['prompt']}{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    return run_program(program, seconds, megabytes, unconfined)


def score_humaneval(problems, answers, ks=(1,), unconfined=False):
    """pass@k over the problems. answers(problem) -> n texts of a model, or None where it cannot be asked (all wrong).

    Returns ({"pass@k": (mean, low, high)}, items): of each problem its number of programs, n, and of right ones, c.
    Raises ValueError where programs cannot be run, or not confined (`sandbox.run_program`) unless `unconfined`.
    """
    if not run_program("", seconds=30, unconfined=unconfined):
        raise ValueError("not even an empty program can be run apart on this system")
    items = []
    for problem in problems:
        codes = [completion(text, problem["entry_point"]) for text in answers(problem) or []]
        right = [passes(problem, code, unconfined=unconfined) for code in codes]
        items.append({"id": problem["task_id"], "n": len(codes), "c": sum(right), "right": right, "programs": codes})
    chances = {k: [pass_at_k(item["n"], item["c"], k) if item["n"] else 0.0 for item in items] for k in ks}
    return {f"pass@{k}": proportion(values) for k, values in chances.items()}, items


# ------------------------------------------------------------------------------- likelihood, without an answer


def perplexity(nats):
    """exp of the mean of -log p of each token: as unsure as among so many equally likely ones."""
    return math.exp(np.mean(nats))


def bits_per_byte(nats, n_bytes):
    """The sum of -log2 p over the bytes of the text: comparable between tokenizers, as perplexity is not."""
    return float(np.sum(nats)) / math.log(2) / n_bytes


def read_choice(path):
    """Multiple choice as JSONL: {"question": text, "choices": [text, ...], "answer": index or letter}, or as ARC-Easy
    has it (Clark et al. 2018): {"question": text, "choices": {"text": [...], "label": [...]}, "answerKey": label}.

    Returns a list of {"question": text, "choices": [text, ...], "answer": index}.
    """
    questions = []
    for where, row in read_rows(path, {}):
        try:
            question, choices, answer = row["question"], row.get("choices"), row.get("answerKey", row.get("answer"))
            if isinstance(question, dict):
                question, choices = question["stem"], question.get("choices", choices)
            if isinstance(choices, list) and isinstance(choices[0], dict):
                choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
            texts, labels = (choices, None) if isinstance(choices, list) else (choices["text"], choices["label"])
            if type(answer) is not int:
                answer = (labels or [chr(ord("A") + i) for i in range(len(texts))]).index(answer)
            right = isinstance(question, str) and isinstance(texts, list)
            right = right and all(isinstance(text, str) and text for text in texts)
            if not right or not 0 <= answer < len(texts):
                raise TypeError
            questions.append({"question": question, "choices": texts, "answer": answer})
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{where}: not a question with choices and, among them, the answer") from None
    return questions


def score_choice(questions, loglikelihood):
    """Accuracy of the choice that is likeliest after the question, in all and for each of its bytes.

    The second does not favour short choices. loglikelihood(context, text) -> nats, or None where it cannot be told,
    which counts as wrong. Returns ({measure: (mean, low, high)}, items).
    """
    items = []
    for question in questions:
        context, choices = f"Question: {question['question']}\nAnswer:", [f" {text}" for text in question["choices"]]
        scores = [loglikelihood(context, text) for text in choices]
        if None in scores:
            items.append({**question, "likeliest": None, "per_byte": None})
            continue
        per_byte = np.array(scores) / [len(text.encode()) for text in choices]
        picked = {"likeliest": int(np.argmax(scores)), "per_byte": int(np.argmax(per_byte))}
        items.append({**question, **picked, "loglikelihoods": scores})
    names = {"accuracy": "likeliest", "accuracy, per byte": "per_byte"}
    return {n: proportion([item[which] == item["answer"] for item in items]) for n, which in names.items()}, items


def score_text(windows, rng):
    """windows: (windows, 3), the nats, tokens and bytes of stretches of a text, which the bootstrap draws again.

    Returns ({measure: (value, low, high)}, items); a single stretch has no interval.
    """
    nats, tokens, size = np.asarray(windows, float).T
    ones, measures, none = np.ones(len(nats), int), {}, (None, None)
    for name, value in {
        "bits per byte": lambda counts: counts @ nats / (counts @ size) / math.log(2),
        "nats a token": lambda counts: counts @ nats / (counts @ tokens),
        "perplexity": lambda counts: np.exp(counts @ nats / (counts @ tokens)),
    }.items():
        interval = map(float, bootstrap(value, ones, rng)) if len(ones) > 1 else none
        measures[name] = (float(value(ones)), *interval)
    return measures, [dict(zip(("nats", "tokens", "bytes"), window)) for window in windows]


# ------------------------------------------------------------------------------------------- command line

SAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "samples")
TASKS = {  # task: (the sample it takes without --file, what reads it, new tokens an answer may have)
    "arena": ("votes.jsonl", read_votes, None),
    "arc": ("arc", read_arc, 1024),
    "hle": ("hle.jsonl", read_hle, 512),
    "humaneval": ("humaneval.jsonl", read_humaneval, 384),
    "choice": ("choice.jsonl", read_choice, None),
    "text": ("text.txt", read_text, None),
}


def connect(folder):
    """The model of a checkpoint folder as functions of texts.

    chats: whether it is asked as an assistant (its tokenizer has chat tokens), or given the beginning of a text.
    answer(prompt, n, max_new_tokens, temperature, rng, stops=()) -> n texts, up to the first of `stops`.
    loglikelihood(context, text) -> nats of the text after the context. Both are None where a prompt is longer than the
    context window; an answer that would pass its end is cut there.
    windows(text, limit) -> (nats, tokens, bytes) of each stretch of a text as long as the context, 1024 at most.
    """
    import bpe
    import chat
    import model
    from engine import xp

    params, config = model.load(folder)
    tokenizer = bpe.load(os.path.join(folder, "tokenizer.json"))
    context = config.max_position_embeddings
    if not config.causal:
        raise ValueError(f"{folder}: this model was trained to fill gaps and cannot continue a text")

    ends = [] if config.eos_token_id is None else list(np.atleast_1d(config.eos_token_id))
    chats = chat.has_format(tokenizer)
    if chats:
        ends.append(chat.end_token(tokenizer))

    def answer(prompt, n, max_new_tokens, temperature, rng, stops=()):
        ids = tokenizer.bos + tokenizer.encode(prompt)
        if chats:
            ids = list(chat.prompt(tokenizer, [{"role": "user", "content": prompt}]))
        length, texts = min(max_new_tokens, context - len(ids)), []
        if length < 1:
            return None
        while len(texts) < n:
            rows = [[] for _ in range(min(16, n - len(texts)))]
            options = {"temperature": temperature, "stop": ends, "rng": rng}
            for step in model.generate_batch(params, config, [ids] * len(rows), length, **options):
                for row, token in zip(rows, step):
                    row += [] if token < 0 or token in ends else [int(token)]
                if stops and all(any(stop in tokenizer.decode(row) for stop in stops) for row in rows):
                    break
            texts += [cut(tokenizer.decode(row), stops) for row in rows]
        return texts

    def nats(ids, given):
        """Of the tokens from `given` on."""
        targets = [-100] * (given - 1) + ids[given:]
        value, _ = model.loss(params, config, xp.asarray([ids[:-1]]), xp.asarray([targets]))
        return float(value) * (len(ids) - given)

    def loglikelihood(before, text):
        before, text = tokenizer.bos + tokenizer.encode(before), tokenizer.encode(text)
        return None if len(before + text) > context + 1 or not text else -nats(before + text, max(1, len(before)))

    def windows(text, limit):
        ids, length = tokenizer.bos + tokenizer.encode(text), min(context, 1024)
        parts = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)][:limit]
        size = [len(token) for token in tokenizer.token_bytes]
        return [(nats(part, 1), len(part) - 1, sum(size[i] for i in part[1:])) for part in parts]

    return types.SimpleNamespace(answer=answer, loglikelihood=loglikelihood, windows=windows, chats=chats)


def evaluate(task, path, args, bar):
    """(measures, items, notes) of a task, with the model in args.load. bar: counts the prompts."""
    rng, (_, read, default_length) = np.random.default_rng(args.seed), TASKS[task]
    content = read(path)  # before the model, which may take minutes
    if task == "arena":
        votes = content[: args.limit]
        online = elo(votes)
        try:
            ratings = bradley_terry(votes, anchor=args.anchor, rounds=1000, rng=rng)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return ratings, [{"model": name, "elo": online[name]} for name in ratings], [f"{len(votes):,} votes"]
    known = connect(args.load)
    length, temperature = args.max_new_tokens or default_length, args.temperature
    too_long, notes = [], []

    def ask(prompt, n=1, temperature=0.0, **options):
        texts = known.answer(prompt, n, length, temperature, rng, **options)
        too_long.append(texts is None)
        bar.update()
        return texts

    def likelihood(context, text):
        value = known.loglikelihood(context, text)
        too_long.append(value is None)
        bar.update()
        return value

    if task == "text":
        measured = known.windows(content, args.limit)
        if not measured:
            raise ValueError(f"{path} is empty, or a single token")
        measures, items = score_text(measured, rng)
    elif task == "choice":
        measures, items = score_choice(content[: args.limit], likelihood)
    elif task == "hle":
        questions, images = content
        notes = [f"{images} questions with an image are left out"] if images else []
        if not questions:
            raise ValueError(f"{path}: every question has an image")
        draw = lambda prompt: (ask(prompt, temperature=temperature or 0.0) or [None])[0]
        measures, items = score_hle(questions[: args.limit], draw, rng)
    elif task == "arc":

        def two(prompt):  # the likeliest answer, and one that is drawn; without a chat, an empty line ends the grid
            stops = () if known.chats else ("\n\n",)
            first = ask(prompt, stops=stops)
            return first and first + ask(prompt, temperature=0.8 if temperature is None else temperature, stops=stops)

        measures, items = score_arc(dict(list(content.items())[: args.limit]), two)
    else:
        warmth = temperature if temperature is not None else 0.8 if args.samples > 1 else 0.0

        def draw(problem):
            if known.chats:
                return ask(f"{HUMANEVAL_ASK}```python\n{problem['prompt']}```", args.samples, warmth)
            return ask(problem["prompt"], args.samples, warmth, stops=STOPS)

        ks = [k for k in (1, 10, 100) if k <= args.samples]
        measures, items = score_humaneval(content[: args.limit], draw, ks, args.unconfined)
    if any(too_long):
        notes += [f"{sum(too_long)} of {len(too_long)} prompts do not fit into the context window, and count as wrong"]
    return measures, items, [f"{len(items)} items", *notes]


def table(measures, unit=""):
    print(f"{unit:22}{'value':>9}   95 % interval")
    for name, numbers in measures.items():
        value, low, high = ("-" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3f}" for x in numbers)
        name = name if name.isprintable() else shown(name)
        print(f"  {name:20}{value:>9}   {low} to {high}")


def main(argv=None):
    from tqdm import tqdm

    parser = cli.Parser(description="Score a model folder, or votes, on a benchmark; without options, a demo.")
    parser.add_argument("--load", metavar="DIR", help="checkpoint folder (arena needs none)")
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--file", metavar="F", help="in the benchmark's own format; a sample of ours if not given")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="humaneval: programs drawn for a problem")
    parser.add_argument(
        "--unconfined",
        action="store_true",
        help="humaneval: run programs even where the kernel cannot keep them from your files and network",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 if not given, 0.8 for several answers")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--anchor", metavar="MODEL", help="arena: the model rated 1000, instead of the mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", help="write measures and every item to a JSON file")
    args = parser.parse_args(argv)
    if args.task is None:
        if sys.argv[1:] if argv is None else argv:
            parser.error("--task is needed")
        return demo()
    if args.load is None and args.task != "arena":
        parser.error(f"--task {args.task} needs --load")
    for name, wrong in {
        "samples": args.samples < 1 or args.samples > 1 and args.task != "humaneval",
        "temperature": args.temperature is not None and not 0 <= args.temperature < float("inf"),
        "max-new-tokens": args.max_new_tokens is not None and args.max_new_tokens < 1,
        "limit": args.limit is not None and args.limit < 1,
        "seed": args.seed < 0,
    }.items():
        if wrong:
            parser.error(f"--{name} is out of its range")
    path = args.file or os.path.join(SAMPLES, TASKS[args.task][0])
    if args.out:
        new = not os.path.exists(args.out)
        open(args.out, "a").close()  # says now, not after all the work, where it cannot be written
        if new:
            os.remove(args.out)  # a run that fails leaves nothing
    with tqdm(unit=" prompts", leave=False, disable=None) as bar:  # gone before anything is said
        measures, items, notes = evaluate(args.task, path, args, bar)
    table(measures, args.task)
    print("; ".join(notes))
    if args.out:
        result = {name: dict(zip(("value", "low", "high"), numbers)) for name, numbers in measures.items()}
        text = json.dumps({"task": args.task, "measures": result, "notes": notes, "items": items}, indent=1)
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text)


# --------------------------------------------------------------------------------------------------- demo

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
    sample = {task: os.path.join(SAMPLES, name) for task, (name, *_) in TASKS.items()}
    votes = read_votes(sample["arena"])
    ratings = bradley_terry(votes, rounds=1000, rng=rng)
    table(ratings, f"LMArena, {len(votes)} votes")
    there, back = elo(votes, k=32), elo(votes[::-1], k=32)
    print("  Elo, k = 32, with the same votes from first to last, and from last to first:")
    print("  " + ", ".join(f"{name} {there[name]:,.0f} {back[name]:,.0f}" for name in ratings))

    tasks = read_arc(sample["arc"])
    rules = np.fliplr, lambda x: np.where(x == 2, 7, x)
    solve = lambda prompt: [grid_text(rule(np.array(parse_grid(prompt.removesuffix("Output:\n"))))) for rule in rules]
    print()
    table(score_arc(tasks, solve)[0], "ARC-AGI, two rules")

    n = 2500
    true = rng.beta(1, 2, n)  # how likely it is that an answer is right
    told = {"says what it knows": true, "is too sure": true**0.25}
    right = rng.random(n) < true
    print(f"\nHumanity's Last Exam, {n:,} simulated answers\n{'':22}accuracy  calibration error  expected cal. error")
    for name, confidence in told.items():
        errors = calibration_error(confidence, right), expected_calibration_error(confidence, right)
        print(f"  {name:20}{right.mean():8.3f}{errors[0]:19.3f}{errors[1]:21.3f}")

    def draw(problem):  # ten times the solution; in most, one word or sign has become another
        programs = []
        for _ in range(10):
            words = re.findall(r"\w+|\s+|.", problem["canonical_solution"])
            a, b = rng.choice([i for i, word in enumerate(words) if word.strip()], 2)
            words[a] = words[b if rng.random() < 0.8 else a]
            programs.append("".join(words))
        return programs

    ks = range(1, 11)
    print()
    try:
        measures, items = score_humaneval(read_humaneval(sample["humaneval"]), draw, ks)
        table({name: measures[name] for name in ("pass@1", "pass@5", "pass@10")}, "HumanEval, 10 programs")
        verdicts = {what: "passes" if run_program(text, seconds=1.0) else "fails" for what, text in HOSTILE.items()}
        print("  a program that " + ", ".join(f"{what}: {verdict}" for what, verdict in verdicts.items()))
    except ValueError as error:  # the other measures need no programs
        items = []
        print(f"HumanEval: {error}")

    print(f"\n{figure(ratings, tasks, told, right, items)}")


def figure(ratings, tasks, told, right, items, path="figures/evals.png"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, ((arena, arc), (calibration, passing)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    value, low, high = np.array(list(ratings.values())).T
    arena.errorbar(value, range(len(value))[::-1], xerr=(value - low, high - value), fmt="o", capsize=4)
    arena.set_yticks(range(len(value))[::-1], list(ratings))
    arena.set(title="LMArena: ratings and their 95 % intervals", xlabel="Bradley-Terry rating on Elo's scale")

    task = tasks["gravity"]
    grids = [grid for pair in task["train"][:2] for grid in pair.values()] + list(task["test"][0].values())
    colours = matplotlib.colors.ListedColormap(["black", *plt.cm.tab10.colors[:9]])
    for i, grid in enumerate(grids):
        left = 1.05 * i + 0.2 * (i // 2)
        arc.imshow(grid, cmap=colours, vmin=0, vmax=9, extent=(left, left + 1, 1, 0))
        arc.text(left, -0.06, ("input", "output")[i % 2])
    arc.set(title="ARC-AGI: two examples, and a test", xlim=(-0.05, 6.8), ylim=(1.05, -0.3))
    arc.axis("off")

    for name, confidence in told.items():
        bins = np.array_split(np.argsort(confidence), 25)
        calibration.plot([confidence[b].mean() for b in bins], [right[b].mean() for b in bins], "o-", ms=3, label=name)
    calibration.plot([0, 1], [0, 1], "k:", label="calibrated")
    calibration.set(title="Humanity's Last Exam: bins of 100 answers", xlabel="confidence", ylabel="accuracy")

    for item in items:
        passing.plot(range(1, 11), [pass_at_k(item["n"], item["c"], k) for k in range(1, 11)], "o-", ms=3)
        passing.plot(range(1, 11), [1 - (1 - item["c"] / item["n"]) ** k for k in range(1, 11)], ":", c="gray")
    passing.plot([], [], ":", c="gray", label="1 - (1 - c/n)^k, biased")
    passing.set(title="HumanEval: pass@k of each problem, 10 programs", xlabel="k", ylabel="pass@k")
    for axes in calibration, passing:
        axes.legend(frameon=False)
    for axes in arena, calibration, passing:
        axes.spines[["top", "right"]].set_visible(False)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    canvas.savefig(path, dpi=120)
    plt.close(canvas)
    return path


if __name__ == "__main__":
    cli.run(main)
