"""The command line of model.py: the published architectures in numbers, a text continued, a conversation."""

import os
import sys
from dataclasses import dataclass

import bpe
import finetune
from architectures import ARCHITECTURES, costs
from engine import cli, np
from engine.cli import option
from model import fill, generate, load


@dataclass(frozen=True)
class Settings:
    """What to say, and how the model draws its answer."""

    load: str | None = option(None, "checkpoint folder", metavar="DIR")
    prompt: str | None = option(None, "the text to continue, or with <mask> for each gap to fill", metavar="TEXT")
    chat: bool = option(False, "talk, a line at a time, until an empty line")
    system: str | None = option(None, "what a chat begins with: how the assistant should be", metavar="TEXT")
    max_new_tokens: int | None = option(None, "200, or what fits, if not given", least=1)
    temperature: float = option(0.8, "0 takes the likeliest token", least=0)
    top_k: int | None = option(None, "draw from the K likeliest tokens", least=1, metavar="K")
    top_p: float = option(0.95, "draw from the likeliest tokens that have probability P", above=0, most=1, metavar="P")
    seed: int = option(0, "the same seed draws the same tokens", least=0)


def main(argv=None):
    purpose = "Continue a text with a trained model, talk to it, or print the architectures."
    s = cli.settings(Settings, argv, purpose)
    if (s.load is None) != (s.prompt is None and not s.chat):
        raise ValueError("--load goes together with --prompt or --chat")
    if s.prompt is not None and s.chat:
        raise ValueError("--prompt continues a text and --chat converses: name one of them")
    if s.system is not None and not s.chat:
        raise ValueError("--system begins a --chat")
    if s.load is None:
        return describe()
    params, config, tokenizer, stop = opened(s.load)
    rng, window = np.random.default_rng(s.seed), config.max_position_embeddings

    def answer(ids):
        """Prints the continuation as it comes, and returns it."""
        length = s.max_new_tokens or max(1, min(200, window - len(ids)))
        drawing = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "rng": rng}
        return spoken(tokenizer, generate(params, config, ids, length, stop=stop, **drawing), stop)

    if s.chat:
        if (s.max_new_tokens or 0) >= window:
            raise ValueError(f"--max-new-tokens must be below the {window} tokens that the model sees at once")
        return converse(tokenizer, answer, stop, window - (s.max_new_tokens or min(200, window // 2)), s.system)
    ids = tokenizer.encode(s.prompt, allow_special=True)
    if not config.causal:
        if "<mask>" not in tokenizer.special:
            raise ValueError(f"{s.load} fills gaps, but its tokenizer has no <mask>")
        return print(tokenizer.decode(fill(params, config, ids, tokenizer.special["<mask>"])))
    if ids[: len(tokenizer.bos)] != tokenizer.bos:
        ids = tokenizer.bos + ids
    print(s.prompt, end="", flush=True)
    answer(ids)


def opened(folder, **how):
    """The model of a checkpoint folder: params, config, tokenizer, and the ids that end its answers, a list.

    how: as of `model.load`.
    """
    params, config = load(folder, **how)
    ends = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
    return params, config, bpe.load(os.path.join(folder, "tokenizer.json")), ends


def spoken(tokenizer, tokens, stop):
    """Prints tokens as they come, but for those in `stop`, and returns their text."""
    text = ""
    for piece in tokenizer.stream(token for token in tokens if token not in stop):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def converse(tokenizer, answer, stop, room, system=None):
    """A conversation in the terminal, until an empty line or the end of the input. Where it outgrows the context window
    the oldest turns are forgotten.

    answer(ids) -> text: the model. stop: ids that end its turn, to which the chat's own is added. room: tokens for all
    that was said.
    """
    stop.append(finetune.end_token(tokenizer))
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
        while len(ids := finetune.prompt(tokenizer, first + kept)) > room and len(kept) > 1:
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
