"""The command line of model.py: the published architectures in numbers, a text continued, a conversation."""

import os
import sys

import bpe
import finetune
from architectures import ARCHITECTURES, costs
from engine import cli, np
from model import fill, generate, load


def main(argv=None):
    parser = cli.Parser(description="Continue a text with a trained model, talk to it, or print the architectures.")
    parser.add_argument("--load", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue, or with <mask> for each gap to fill")
    parser.add_argument("--chat", action="store_true", help="talk, a line at a time, until an empty line")
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with: how the assistant should be")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="200, or what fits, if not given")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.load is None) != (args.prompt is None and not args.chat):
        parser.error("--load goes together with --prompt or --chat")
    if args.prompt is not None and args.chat:
        parser.error("--prompt continues a text and --chat converses: name one of them")
    if args.system is not None and not args.chat:
        parser.error("--system begins a --chat")
    if args.load is None:
        return describe()
    for name, wrong in {
        "max-new-tokens": args.max_new_tokens is not None and args.max_new_tokens < 1,
        "temperature": not 0 <= args.temperature < float("inf"),
        "top-k": args.top_k is not None and args.top_k < 1,
        "top-p": not 0 < args.top_p <= 1,
    }.items():
        if wrong:
            parser.error(f"--{name} is out of its range")
    params, config = load(args.load)
    tokenizer = bpe.load(os.path.join(args.load, "tokenizer.json"))
    stop = [] if config.eos_token_id is None else list(np.atleast_1d(config.eos_token_id))
    rng, window = np.random.default_rng(args.seed), config.max_position_embeddings

    def answer(ids):
        """Prints the continuation as it comes, and returns it."""
        length = args.max_new_tokens or max(1, min(200, window - len(ids)))
        drawing = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "rng": rng}
        tokens, text = generate(params, config, ids, length, stop=stop, **drawing), ""
        for piece in tokenizer.stream(token for token in tokens if token not in stop):
            print(piece, end="", flush=True)
            text += piece
        print()
        return text

    if args.chat and (args.max_new_tokens or 0) >= window:
        parser.error(f"--max-new-tokens must be below the {window} tokens that the model sees at once")
    if args.chat:
        return converse(tokenizer, answer, stop, window - (args.max_new_tokens or min(200, window // 2)), args.system)
    ids = tokenizer.encode(args.prompt, allow_special=True)
    if not config.causal:
        if "<mask>" not in tokenizer.special:
            raise ValueError(f"{args.load} fills gaps, but its tokenizer has no <mask>")
        return print(tokenizer.decode(fill(params, config, ids, tokenizer.special["<mask>"])))
    if ids[: len(tokenizer.bos)] != tokenizer.bos:
        ids = tokenizer.bos + ids
    print(args.prompt, end="", flush=True)
    answer(ids)


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
