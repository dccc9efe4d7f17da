"""The benchmarks as they are published: their files, their prompts, and the answers that a text of a model holds.

Each has read_X(path), which checks a file, and score_X(items, answers), which returns ({measure: (value, low, high)},
what became of each item), with 95 % intervals, by the measures of evals.py. answers(prompt) is a list of texts, from
whatever model, or None where the prompt does not fit into it, which counts as wrong.
"""

import collections
import itertools
import os
import re
import unicodedata

import evals
from engine import np
from engine.files import read_json, read_rows, read_text, shown
from engine.sandbox import run_program
from evals import proportion

SCORES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}  # of model_a


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


def score_arena(votes, anchor, rng):
    """Ratings and, as items, Elo's. ValueError where groups of models never met, or the anchor is in no vote."""
    group = {}
    for a, b in {vote[:2] for vote in votes}:
        together = group.get(a, {a}) | group.get(b, {b})
        group |= dict.fromkeys(together, together)
    if len(groups := sorted({tuple(sorted(models)) for models in group.values()})) > 1:
        names = [shown(", ".join(models)) for models in groups[:2]] + ["..."] * (len(groups) > 2)
        raise ValueError(f"no votes compare these groups of models, so no ratings do: {' | '.join(names)}")
    if anchor is not None and anchor not in group:
        raise ValueError(f"the anchor {shown(anchor)} is in no vote")
    ratings, online = evals.bradley_terry(votes, anchor=anchor, rounds=1000, rng=rng), evals.elo(votes)
    return ratings, [{"model": name, "elo": online[name]} for name in ratings]


ROWS = r"\[\s*[0-9][0-9\s,]*\](?:[\s,]*\[\s*[0-9][0-9\s,]*\])*"  # [1, 2], [3, 4], however they are laid out
LINE = r"(?:(?!\n)[\s,|])*[0-9](?:(?!\n)[0-9\s,|])*"  # 1 2, or 12, or | 1 | 2 |
GRID = re.compile(rf"\[\s*{ROWS}[\s,]*\]|^\s*{ROWS}[\s,]*$|^{LINE}(?:\n{LINE})*$", re.M)


def read_arc(path):
    """Tasks of ARC-AGI (Chollet 2019): [{"id": name, "train": [{"input": grid, "output": grid}, ...], "test": [...]}].

    path: a folder of task files, one of them, or all in one file as on Kaggle, *challenges.json with the solutions in
    *solutions.json beside it. A grid is a list of rows of colours from 0 to 9.
    """
    folder, file = os.path.split(path)
    beside = os.path.join(folder, file.replace("challenges", "solutions"))
    if many := os.path.isdir(path):
        names = [name.removesuffix(".json") for name in sorted(os.listdir(path)) if name.endswith(".json")]
        tasks = {name: read_json(os.path.join(path, f"{name}.json")) for name in names}
    elif not isinstance(tasks := read_json(path), dict):
        raise ValueError(f"{path}: not ARC tasks, which are an object")
    elif {"train", "test"} & tasks.keys():
        tasks = {file.removesuffix(".json"): tasks}
    if not tasks:
        raise ValueError(f"{path}: no ARC tasks")
    if "challenges" in file and os.path.isfile(beside):
        solutions = read_json(beside)
        try:
            for name, task in tasks.items():
                for pair, grid in zip(task["test"], solutions[name], strict=True):
                    pair["output"] = grid
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{beside}: not a grid for each test input of {path}") from None
    for (name, task), part in itertools.product(tasks.items(), ("train", "test")):
        where = os.path.join(path, f"{name}.json") if many else f"{path}, task {shown(name)}"
        pairs = task.get(part) if isinstance(task, dict) else None
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"{where}: not an ARC task: no {part} pairs")
        for (n, pair), side in itertools.product(enumerate(pairs, 1), ("input", "output")):
            if not isinstance(pair, dict) or not is_grid(pair.get(side)):
                raise ValueError(f"{where}: not an ARC task: {part} pair {n} has no grid as its {side}")
    return [task | {"id": name} for name, task in tasks.items()]


def is_grid(grid):
    if not isinstance(grid, list) or not all(isinstance(row, list) for row in grid):
        return False
    rows = {len(row) for row in grid}
    return len(rows) == 1 and 0 not in rows and all(type(c) is int and 0 <= c <= 9 for row in grid for c in row)


def grid_text(grid):
    """A line for each row, its colours apart by blanks."""
    return "\n".join(" ".join(map(str, row)) for row in grid)


def parse_grid(text):
    """The last grid in a text, as `grid_text`, JSON or NumPy writes one, or None. No grid has an empty line."""
    grids = [found[0] for part in re.split(r"\n\s*\n", text) for found in GRID.finditer(part)] or [""]
    rows = [re.findall("[0-9]+", row) for row in re.findall(r"\[([^][]+)\]", grids[-1]) or grids[-1].split("\n")]
    grid = [[int(c) for c in (cells[0] if len(cells) == 1 else cells)] for cells in rows]  # 012 is a row of three
    return grid if is_grid(grid) else None


def arc_prompt(task, grid):
    """The examples of a task and one grid to answer."""
    parts = ["Find the rule that turns each input grid into its output grid.", ""]
    for n, pair in enumerate(task["train"], 1):
        parts += [f"Input {n}:", grid_text(pair["input"]), f"Output {n}:", grid_text(pair["output"]), ""]
    parts += ["Apply it to this input, and answer with the output grid alone.", "Input:", grid_text(grid), "Output:\n"]
    return "\n".join(parts)


def score_arc(tasks, answers):
    """answers: two texts, each with a grid."""
    items = []
    for task in tasks:
        texts = [answers(arc_prompt(task, pair["input"])) or [] for pair in task["test"]]
        attempts = [[parse_grid(text) for text in two] for two in texts]
        outputs = [pair["output"] for pair in task["test"]]
        first, score = evals.arc_score(outputs, [two[:1] for two in attempts]), evals.arc_score(outputs, attempts)
        items.append({"id": task["id"], "first": first, "score": score, "answers": texts})
    names = {"in one attempt": "first", "in two attempts": "score"}
    return {name: proportion([item[which] for item in items]) for name, which in names.items()}, items


HLE_FORMAT = """

Answer in these three lines:
Explanation: why it is your answer
Answer: the answer and nothing else
Confidence: how sure you are, from 0% to 100%"""
LABEL = r"\W*(?:(?:exact |final )?answer|explanation|confidence)\W*:"
EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|`)(?=\S)(.+?)(?<=\S)\1(?![\w*])")  # in Markdown, not the * of 2*3 or C*
THOUSANDS = re.compile(r"(?<![\w.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![\w,])")
SPELLED = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s"}  # what NFKC would make digits like any: 10², 2½


def read_hle(path):
    """Questions of Humanity's Last Exam (Phan et al. 2025): the rows without an image, and how many have one."""
    rows = read_rows(path, {"question": str, "answer": str, "answer_type": ("exactMatch", "multipleChoice")})
    asked = [row for _, row in rows if not row.get("image")]
    if not asked:
        raise ValueError(f"{path}: every question has an image")
    return asked, len(rows) - len(asked)


def parse_answer(text):
    """(answer, confidence) of an answer in HLE's format, the last of each; confidence in [0, 1].

    The answer is what stands behind "Answer:", or on the next line; else behind "the answer is"; else the last line
    without a label. Without a confidence that is 1, as the benchmark has it.
    """
    text = EMPHASIS.sub(r"\2", text)
    for label in r"^\W*(?:exact |final )?answer\W*:\**", r"\banswer(?: is\b|:):?":
        if answers := re.findall(rf"{label}\s*(?!{LABEL})(\S.*)$", text, re.I | re.M):
            break
    else:
        answers = [line for line in text.splitlines() if line.strip() and not re.match(LABEL, line, re.I)] or [""]
    told = re.findall(r"^\W*confidence\W*:[\s*~]*(\d*\.?\d+)\s*(%?)", text, re.I | re.M)
    sure = [float(number) * (100 if "." in number and float(number) <= 1 and not sign else 1) for number, sign in told]
    return answers[-1].strip(), min(1.0, sure[-1] / 100) if sure else 1.0


def is_right(given, expected, answer_type):
    """Whether an answer is the expected one: of a multiple choice the letter that is named, else the same text."""
    if answer_type == "multipleChoice" and re.fullmatch("[A-Z]", expected.strip()):
        return named_choice(given) == expected.strip()
    return evals.same_answer(plain(given), plain(expected))


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


def plain(text):
    """One spelling for what Unicode, TeX and Markdown spell in several ways: powers, fractions, dashes, TeX's $ and
    \\boxed{}, emphasis, thousands' commas."""
    kind = lambda char: SPELLED.get(unicodedata.decomposition(char).split(" ")[0], "%s")
    text = "".join(form % unicodedata.normalize("NFKC", "".join(run)) for form, run in itertools.groupby(text, kind))
    text = re.sub("[\u2010-\u2015\u2212]", "-", text).replace("\u2044", "/").replace("$", "")
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", EMPHASIS.sub(r"\2", text))
    text = re.sub(r"([\^_])\{(\w|[+-]?[0-9]+)\}", r"\1\2", text)  # as TeX may write it too
    return THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)


def score_hle(questions, answers):
    """answers: one text in HLE's format. A question that is not asked does not count in the calibration."""
    items = []
    for row in questions:
        text = (answers(row["question"] + HLE_FORMAT) or [None])[0]
        given, confidence = (None, None) if text is None else parse_answer(text)
        correct = text is not None and is_right(given, row["answer"], row["answer_type"])
        items.append({"id": row.get("id"), "correct": correct, "confidence": confidence, "given": given, "text": text})
    measures = {"accuracy": proportion([item["correct"] for item in items])}
    if told := [(item["confidence"], item["correct"]) for item in items if item["text"] is not None]:
        told = np.array(told).T  # errors are biased upwards, so that a bootstrap would mislead
        measures["calibration error"] = evals.calibration_error(*told), None, None
        measures["expected cal. error"] = evals.expected_calibration_error(*told), None, None
    return measures, items


HUMANEVAL_CHAT = "Complete this Python function. Answer with all of it, in one block of code.\n\n```python\n{}```"
STOPS = ("\ndef", "\nclass", "\nif", "\nprint", "\n#")  # what begins the next thing after a function's body


def read_humaneval(path):
    """Problems of HumanEval (Chen et al. 2021), JSONL or .jsonl.gz: a list of dicts."""
    return [row for _, row in read_rows(path, dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str))]


def cut(text, stops):
    """The text before the first of the stops."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=None)]


def completion(answer, entry_point):
    """The code in an answer: what it goes on with up to a stop or, from a model that chats, the first block between
    fences that defines the function."""
    for block in re.findall(r"```(?:python|py)?\n(.*?)(?:```|\Z)", answer, re.S | re.I):
        if re.search(rf"^def {re.escape(entry_point)}\b", block, re.M):
            return f"    pass\n\n\n{block}"  # ends the function that the prompt begins; the block defines it again
    return cut(answer, STOPS)


def score_humaneval(problems, answers, ks=(1,), unconfined=False):
    """pass@k for each of ks. answers: n completions, each run apart with the problem's tests. ValueError where programs
    cannot be run, or not confined (`sandbox.run_program`) unless `unconfined`.
    """
    if not run_program("", seconds=30, unconfined=unconfined):
        raise ValueError("not even an empty program can be run apart on this system")
    items = []
    for problem in problems:
        codes = [completion(text, problem["entry_point"]) for text in answers(problem["prompt"]) or []]
        ends = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
        right = [run_program(problem["prompt"] + code + ends, unconfined=unconfined) for code in codes]
        items.append({"id": problem["task_id"], "n": len(codes), "c": sum(right), "right": right, "programs": codes})
    chances = {k: [evals.pass_at_k(item["n"], item["c"], k) if item["n"] else 0.0 for item in items] for k in ks}
    return {f"pass@{k}": proportion(values) for k, values in chances.items()}, items


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
    """loglikelihood(context, text): log p in nats, or None where it cannot be told, which counts as wrong."""
    items = []
    for question in questions:
        texts = [f" {text}" for text in question["choices"]]
        nats = [loglikelihood(f"Question: {question['question']}\nAnswer:", text) for text in texts]
        best, per_byte = (None, None) if None in nats else evals.likeliest(nats, texts)
        items.append({**question, "likeliest": best, "per_byte": per_byte, "loglikelihoods": nats})
    names = {"accuracy": "likeliest", "accuracy, per byte": "per_byte"}
    return {n: proportion([item[which] == item["answer"] for item in items]) for n, which in names.items()}, items


def score_text(windows, rng):
    """windows: (windows, 3), the nats, tokens and bytes of stretches of a text, which the bootstrap draws again."""
    nats, tokens, size = np.asarray(windows, float).T
    ones, measures = np.ones(len(nats), int), {}
    for name, value in {
        "bits per byte": lambda counts: evals.bits_per_byte(counts @ nats, counts @ size),
        "nats a token": lambda counts: counts @ nats / (counts @ tokens),
        "perplexity": lambda counts: evals.perplexity(counts @ nats, counts @ tokens),
    }.items():
        interval = map(float, evals.bootstrap(value, ones, rng)) if len(ones) > 1 else (None, None)
        measures[name] = (float(value(ones)), *interval)
    return measures, [dict(zip(("nats", "tokens", "bytes"), window)) for window in windows]


def table(measures, title=""):
    """Prints measures with their intervals."""
    print(f"{title:22}{'value':>9}   95 % interval")
    for name, numbers in measures.items():
        value, low, high = ("-" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3f}" for x in numbers)
        print(f"  {name if name.isprintable() else shown(name):20}{value:>9}   {low} to {high}")


# sample: the file taken without --file; length: new tokens an answer may have; stops: where a model ends it that only
# goes on with the prompt; chat: what a model that chats is asked, with the prompt in it
Task = collections.namedtuple("Task", "sample read length stops chat", defaults=(0, (), "{}"))
SAMPLES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "samples")
TASKS = {
    "arena": Task("votes.jsonl", read_votes),
    "arc": Task("arc", read_arc, 1024, ("\n\n",)),
    "hle": Task("hle.jsonl", read_hle, 512),
    "humaneval": Task("humaneval.jsonl", read_humaneval, 384, STOPS, HUMANEVAL_CHAT),
    "choice": Task("choice.jsonl", read_choice),
    "text": Task("text.txt", read_text),
}
