"""The command line of evals.py: a checkpoint folder is asked a benchmark, and a table of its measures comes out."""

import json
import math
import os
import sys
import types

import finetune
import model
from engine import cli, np, xp
from lab import talk, tasks
from lab.demo_evals import demo


def connect(folder):
    """The model of a checkpoint folder as three functions. None is for what does not fit into the context window.

    answers(prompt, task, draws, length, rng) -> n texts of at most `length` tokens for each (n, temperature) of draws.
    With chat tokens it is asked as an assistant, else it goes on with the prompt up to one of the task's stops.
    loglikelihood(context, text) -> log p of the text after the context, in nats.
    windows(text, limit) -> (nats, tokens, bytes) of each stretch of a text as long as the context, 1024 at most.
    """
    params, config, tokenizer, ends = talk.opened(folder)
    context = config.max_position_embeddings
    if not config.causal:
        raise ValueError(f"{folder}: this model was trained to fill gaps and cannot continue a text")
    chats = finetune.has_format(tokenizer)
    ends += [finetune.end_token(tokenizer)] if chats else []

    def answers(prompt, task, draws, length, rng):
        ids, stops = tokenizer.bos + tokenizer.encode(prompt), task.stops
        if chats:
            ids, stops = finetune.prompt(tokenizer, [{"role": "user", "content": task.chat.format(prompt)}]), ()
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

    return types.SimpleNamespace(answers=answers, loglikelihood=loglikelihood, windows=windows)


def evaluate(args, bar):
    """(measures, items, notes) of args.task, with the model in args.load. bar: counts the prompts."""
    task, rng = tasks.TASKS[args.task], np.random.default_rng(args.seed)
    path = args.file or os.path.join(tasks.SAMPLES, task.sample)
    content, too_long, images = task.read(path), [], 0  # before the model, which may take minutes
    if args.task == "hle":
        content, images = content
    items = content[: args.limit]
    if args.task == "arena":
        try:
            return *tasks.score_arena(items, args.anchor, rng), [f"{len(items):,} votes"]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    known = connect(args.load)

    def counted(answer):
        too_long.append(answer is None)
        bar.update()
        return answer

    def ask(prompt):  # of two answers to a puzzle the first is the likeliest
        n, arc, temperature = args.samples, args.task == "arc", args.temperature
        temperature = (0.8 if arc or n > 1 else 0.0) if temperature is None else temperature
        draws = [(1, 0.0)] * arc + [(n, temperature)]
        return counted(known.answers(prompt, task, draws, args.max_new_tokens or task.length, rng))

    if args.task == "text":
        if not (windows := known.windows(content, args.limit)):
            raise ValueError(f"{path} is empty, or a single token")
        measures, items = tasks.score_text(windows, rng)
    elif args.task == "choice":
        measures, items = tasks.score_choice(items, lambda *texts: counted(known.loglikelihood(*texts)))
    elif args.task == "humaneval":
        ks = [k for k in (1, 10, 100) if k <= args.samples]
        measures, items = tasks.score_humaneval(items, ask, ks, args.unconfined)
    else:
        measures, items = {"arc": tasks.score_arc, "hle": tasks.score_hle}[args.task](items, ask)
    notes = [f"{len(items)} items"] + [f"{images} questions with an image are left out"] * bool(images)
    if any(too_long):
        notes += [f"{sum(too_long)} of {len(too_long)} prompts do not fit into the context window, and count as wrong"]
    return measures, items, notes


def arguments(argv):
    """The checked command line, with a task or, where there are no options at all, with none."""
    parser = cli.Parser(description="Score a model folder, or votes, on a benchmark; without options, a demo.")
    add = parser.add_argument
    add("--load", metavar="DIR", help="checkpoint folder (arena needs none)")
    add("--task", choices=list(tasks.TASKS))
    add("--file", metavar="F", help="in the benchmark's own format; a sample of ours if not given")
    add("--samples", type=int, default=1, metavar="N", help="humaneval: programs drawn for a problem")
    anyway = "humaneval: run programs even where the kernel cannot keep them from your files and network"
    add("--unconfined", action="store_true", help=anyway)
    add("--temperature", type=float, metavar="T", help="0 if not given, 0.8 for several answers")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer")
    add("--limit", type=int, metavar="N", help="only the first N items")
    add("--anchor", metavar="MODEL", help="arena: the model rated 1000, instead of the mean")
    add("--seed", type=int, default=0)
    add("--out", metavar="FILE", help="write measures and every item to a JSON file")
    args = parser.parse_args(argv)
    if args.task is None and (sys.argv[1:] if argv is None else argv):
        parser.error("--task is needed")
    if args.load is None and args.task not in (None, "arena"):
        parser.error(f"--task {args.task} needs --load")
    below = math.inf if args.task == "humaneval" else 2
    for name, least in ("samples", 1), ("temperature", 0), ("max_new_tokens", 1), ("limit", 1), ("seed", 0):
        value = getattr(args, name)
        if value is not None and not least <= value < (below if name == "samples" else math.inf):
            parser.error(f"--{name.replace('_', '-')} is out of its range")
    return args


def main(argv=None):
    from tqdm import tqdm

    args = arguments(argv)
    if args.task is None:
        return demo()
    if args.out:
        new = not os.path.exists(args.out)
        open(args.out, "a").close()  # says now, not after all the work, where it cannot be written
        if new:
            os.remove(args.out)  # a run that fails leaves nothing
    with tqdm(unit=" prompts", leave=False, disable=None) as bar:  # gone before anything is said
        measures, items, notes = evaluate(args, bar)
    tasks.table(measures, args.task)
    print("; ".join(notes))
    if args.out:
        result = {name: dict(zip(("value", "low", "high"), numbers)) for name, numbers in measures.items()}
        text = json.dumps({"task": args.task, "measures": result, "notes": notes, "items": items}, indent=1)
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text)
