"""The command line of evals.py: a checkpoint folder is asked a benchmark, and a table of its measures comes out."""

import json
import os
import types
from dataclasses import dataclass

import model
from engine import cli, np, xp
from engine.cli import option
from engine.files import write_text
from lab import talk, tasks


def connect(folder):
    """The model of a checkpoint folder as three functions. None is for what does not fit into the context window.

    answers(prompt, task, draws, length, rng) -> n texts of at most `length` tokens for each (n, temperature) of draws.
    With a chat format it is asked as an assistant, else it goes on with the prompt up to one of the task's stops.
    loglikelihood(context, text) -> log p of the text after the context, in nats.
    windows(text, limit) -> (nats, tokens, bytes) of each stretch of a text as long as the context, 1024 at most.
    """
    params, config, tokenizer, ends = talk.opened(folder)
    context = config.max_position_embeddings
    if not config.causal:
        raise ValueError(f"{folder}: this model was trained to fill gaps and cannot continue a text")
    ask = talk.asking(folder, tokenizer)  # None: a model that was never in a chat

    def answers(prompt, task, draws, length, rng):
        ids, stops = tokenizer.bos + tokenizer.encode(prompt), task.stops
        if ask:
            ids, stops = ask([{"role": "user", "content": task.chat.format(prompt)}]), ()
        length, texts = min(length, context - len(ids)), []
        if length < 1:
            return None
        for n, temperature in draws:
            options = {"temperature": temperature, "stop": ends, "rng": rng}
            for left in range(n, 0, -16):
                rows = [[] for _ in range(min(16, left))]
                for step in model.generate_batch(params, config, [ids] * len(rows), length, **options):
                    for row, token in zip(rows, step):
                        row += [] if token < 0 or token in ends else [int(token)]
                    if stops and all(any(stop in tokenizer.decode(row) for stop in stops) for row in rows):
                        break
                texts += [tasks.cut(tokenizer.decode(row), stops) for row in rows]
        return texts

    def nats(ids, given):  # of the tokens from `given` on
        log_p, _ = model.log_likelihood(params, config, xp.asarray([ids[:-1]]), xp.asarray([ids[1:]]))
        return -float(log_p[0, given - 1 :].sum())

    def loglikelihood(before, text):
        before, text = tokenizer.bos + tokenizer.encode(before), tokenizer.encode(text)
        return None if len(before + text) > context + 1 or not text else -nats(before + text, max(1, len(before)))

    def windows(text, limit):
        ids, length = tokenizer.bos + tokenizer.encode(text), min(context, 1024)
        parts = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)][:limit]
        size = [len(token) for token in tokenizer.token_bytes]
        return [(nats(part, 1), len(part) - 1, sum(size[i] for i in part[1:])) for part in parts]

    return types.SimpleNamespace(answers=answers, loglikelihood=loglikelihood, windows=windows)


@dataclass(frozen=True)
class Settings:
    """What is asked, of which model, and how."""

    load: str | None = option(None, "checkpoint folder (arena needs none)", metavar="DIR")
    task: str | None = option(None, "the benchmark", choices=list(tasks.TASKS))
    file: str | None = option(None, "in the benchmark's own format; a sample of ours if not given", metavar="F")
    samples: int = option(1, "humaneval: programs drawn for a problem", least=1)
    unconfined: bool = option(
        False, "humaneval: run programs even where the kernel cannot keep them from your files and network"
    )
    temperature: float | None = option(None, "0 if not given, 0.8 for several answers", least=0, metavar="T")
    max_new_tokens: int | None = option(None, "longest answer", least=1)
    limit: int | None = option(None, "only the first N items", least=1)
    anchor: str | None = option(None, "arena: the model rated 1000, instead of the mean", metavar="MODEL")
    seed: int = option(0, "of all that is drawn", least=0)
    out: str | None = option(None, "write measures and every item to a JSON file", metavar="FILE")


def evaluate(s, bar):
    """(measures, items, notes) of s.task, with the model in s.load. bar: counts the prompts."""
    task, rng = tasks.TASKS[s.task], np.random.default_rng(s.seed)
    path = s.file or os.path.join(tasks.SAMPLES, task.sample)
    content, images, too_long = task.read(path), 0, []  # before the model, which may take minutes
    if s.task == "hle":
        content, images = content
    items = content[: s.limit]
    if s.task == "arena":
        try:
            return *tasks.score_arena(items, s.anchor, rng), [f"{len(items):,} votes"]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    known = connect(s.load)

    def counted(answer):
        too_long.append(answer is None)
        bar.update()
        return answer

    def ask(prompt):  # of two answers to a puzzle the first is the likeliest
        arc, temperature = s.task == "arc", s.temperature
        temperature = (0.8 if arc or s.samples > 1 else 0.0) if temperature is None else temperature
        draws = [(1, 0.0)] * arc + [(s.samples, temperature)]
        return counted(known.answers(prompt, task, draws, s.max_new_tokens or task.length, rng))

    if s.task == "text":
        if not (windows := known.windows(content, s.limit)):
            raise ValueError(f"{path} is empty, or a single token")
        measures, items = tasks.score_text(windows, rng)
    elif s.task == "choice":
        measures, items = tasks.score_choice(items, lambda *texts: counted(known.loglikelihood(*texts)))
    elif s.task == "humaneval":
        ks = [k for k in (1, 10, 100) if k <= s.samples]
        measures, items = tasks.score_humaneval(items, ask, ks, s.unconfined)
    else:
        measures, items = {"arc": tasks.score_arc, "hle": tasks.score_hle}[s.task](items, ask)
    notes = [f"{len(items)} items"] + [f"{images} questions with an image are left out"] * bool(images)
    if any(too_long):
        notes += [f"{sum(too_long)} of {len(too_long)} prompts do not fit into the context window, and count as wrong"]
    return measures, items, notes


def main(argv=None):
    from tqdm import tqdm

    s = cli.settings(Settings, argv, "Score a model folder, or votes, on a benchmark.")
    if s.task is None:
        raise ValueError("--task is needed; python lecture.py evaluation shows each measure on samples")
    if s.load is None and s.task != "arena":
        raise ValueError(f"--task {s.task} needs --load")
    if s.samples > 1 and s.task != "humaneval":
        raise ValueError("--samples is for --task humaneval")
    if s.out:
        new = not os.path.exists(s.out)
        open(s.out, "a").close()  # says now, not after all the work, where it cannot be written
        if new:
            os.remove(s.out)  # a run that fails leaves nothing
    with tqdm(unit=" prompts", leave=False, disable=None) as bar:  # gone before anything is said
        measures, items, notes = evaluate(s, bar)
    tasks.table(measures, s.task)
    print("; ".join(notes))
    if s.out:
        result = {name: dict(zip(("value", "low", "high"), numbers)) for name, numbers in measures.items()}
        content = {"task": s.task, "measures": result, "notes": notes, "items": items}
        write_text(s.out, json.dumps(content, indent=1))
