"""The command line of model.py: the published architectures in numbers, a text continued, a conversation."""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import bpe
import finetune
from architectures import ARCHITECTURES, costs
from engine import chat_template, cli, np
from engine.cli import option
from engine.files import read_object
from lab import machine
from model import fill, generate, load

DEFAULTS = {"temperature": 0.8, "top_k": None, "top_p": 0.95, "repetition_penalty": 1.0}
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what a generation_config.json that samples may leave out
ELSE = "if not given, what the folder's generation_config.json says, or"


@dataclass(frozen=True)
class Settings:
    """What to say, and how the model draws its answer."""

    load: str | None = option(None, "checkpoint folder", metavar="DIR")
    prompt: str | None = option(None, "the text to continue, or with <mask> for each gap to fill", metavar="TEXT")
    chat: bool = option(False, "talk, a line at a time, until an empty line")
    system: str | None = option(None, "what a chat begins with: how the assistant should be", metavar="TEXT")
    max_new_tokens: int | None = option(None, "200, or what fits, if not given", least=1)
    temperature: float | None = option(None, f"0 takes the likeliest token; {ELSE} 0.8", least=0)
    top_k: int | None = option(None, f"draw from the K likeliest tokens; {ELSE} all", least=1, metavar="K")
    top_p: float | None = option(
        None, f"draw from the likeliest tokens that have probability P; {ELSE} 0.95", above=0, most=1, metavar="P"
    )
    repetition_penalty: float | None = option(
        None, f"more than 1 makes tokens less likely that were there before; {ELSE} 1", above=0, metavar="P"
    )
    seed: int = option(0, "the same seed draws the same tokens", least=0)


def main(argv=None):
    purpose = "Continue a text with a trained model, talk to it, or print the architectures."
    s = cli.settings(Settings, argv, purpose)
    if s.load is None and (s.prompt is not None or s.chat):
        raise ValueError("--prompt and --chat need a model: --load DIR")
    if s.prompt is not None and s.chat:
        raise ValueError("--prompt continues a text and --chat converses: name one of them")
    if s.system is not None and not s.chat:
        raise ValueError("--system begins a --chat")
    if s.load is None:
        return describe()
    if s.prompt is None and not s.chat:
        return machine.describe(s.load)
    params, config, tokenizer, stop = opened(s.load)
    drawing, window = drawn(s) | {"rng": np.random.default_rng(s.seed)}, config.max_position_embeddings

    def answer(ids):
        """Prints the continuation as it comes, and returns it."""
        length = s.max_new_tokens or max(1, min(200, window - len(ids)))
        return spoken(tokenizer, generate(params, config, ids, length, stop=stop, **drawing), stop)

    if s.chat:
        if (s.max_new_tokens or 0) >= window:
            raise ValueError(f"--max-new-tokens must be below the {window} tokens that the model sees at once")
        room = window - (s.max_new_tokens or min(200, window // 2))
        return converse(asking(s.load, tokenizer), answer, room, s.system)
    ids = tokenizer.encode(s.prompt, allow_special=True)
    if not config.causal:
        if "<mask>" not in tokenizer.special:
            raise ValueError(f"{s.load} fills gaps, but its tokenizer has no <mask>")
        return print(tokenizer.decode(fill(params, config, ids, tokenizer.special["<mask>"])))
    if ids[: len(tokenizer.bos)] != tokenizer.bos:
        ids = tokenizer.bos + ids
    print(s.prompt, end="", flush=True)
    answer(ids)


def drawn(s):
    """How tokens are drawn, {name: value}: as the command line says, else as generation_config.json does, else as we
    do. ValueError where the file says what cannot be.
    """
    path = os.path.join(s.load, "generation_config.json")
    published = read_object(path) if os.path.exists(path) else {}
    samples = published.get("do_sample")
    found = DEFAULTS | (SAMPLING if samples else {})
    found |= {name: value for name, value in published.items() if name in DEFAULTS and value is not None}
    found |= {"temperature": 0.0} if samples is False else {}
    found["top_k"] = found["top_k"] or None  # 0 is all of them
    try:
        cli.check(replace(s, **found))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found | {name: getattr(s, name) for name in found if getattr(s, name) is not None}


def opened(folder, **how):
    """The model of a checkpoint folder: params, config, tokenizer, and the ids that end its answers, a list.

    how: as of `model.load`.
    """
    params, config = load(folder, **how)
    tokenizer = bpe.load(os.path.join(folder, "tokenizer.json"))
    ends = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
    if finetune.has_format(tokenizer):
        ends.append(finetune.end_token(tokenizer))
    return params, config, tokenizer, ends


def asking(folder, tokenizer):
    """How the model of a folder is asked: a function from a conversation so far to token ids. By the chat template that
    was published with it or, if that is our own or there is none, by the format that its special tokens belong to.
    None for a model that was never in a chat.
    """
    template, ours = chat_template.published(folder), finetune.has_format(tokenizer)
    if template and not (ours and template.source == finetune.jinja(tokenizer)):
        return partial(template.encode, tokenizer)
    return partial(finetune.prompt, tokenizer) if ours else None


def spoken(tokenizer, tokens, stop):
    """Prints tokens as they come, but for those in `stop`, and returns their text. If none of those ends it, says so
    on standard error.
    """
    text, said = "", []

    def until_stopped():
        for token in tokens:
            said.append(token)
            if token not in stop:
                yield token

    for piece in tokenizer.stream(until_stopped()):
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    if said and said[-1] not in stop:
        print(f"(cut off after {len(said)} tokens)", file=sys.stderr)
    return text


def converse(ask, answer, room, system=None):
    """A conversation in the terminal, until an empty line or the end of the input. Where it outgrows the context window
    the oldest turns are forgotten.

    ask(messages) -> ids: see `asking`. answer(ids) -> text: the model. room: tokens for all that was said.
    """
    if ask is None:
        raise ValueError("the model was never in a chat: fine-tune it first, with finetune.py")
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            return print()
        if not said.strip():
            return
        kept = [*turns, {"role": "user", "content": said}]
        while len(ids := ask(first + kept)) > room and len(kept) > 1:
            del kept[:2]
        if len(ids) > room:
            print(f"that is {len(ids)} tokens, and there is room for {room}: say less at a time", file=sys.stderr)
            continue
        turns = [*kept, {"role": "assistant", "content": answer(ids)}]


def describe(context=4096):
    """Prints the published architectures in numbers."""
    print(
        "                      parameters           KV cache, bytes   operations a token     memory of the weights\n"
        "architecture             in all    used a token    a token     forward    training     bfloat16       float32"
    )
    for name, config in ARCHITECTURES.items():
        c = costs(config, context)
        print(
            f"{name:12}{c['parameters']:19,}{c['active']:16,}{2 * c['cache']:11,}"
            f"{c['forward'] / 1e9:10.1f} G{c['training'] / 1e9:10.1f} G"
            f"{2 * c['parameters'] / 2**30:9,.1f} GiB{4 * c['parameters'] / 2**30:10,.1f} GiB"
        )
    print(
        "\nA token uses all parameters but the experts it is not sent to. The cache is in bfloat16. Operations:\n"
        f"10⁹ additions and multiplications for a token in a text of {context:,}, of which it sees half on average.\n"
        "DeepSeek V3 without its layer for the token after the next."
    )
