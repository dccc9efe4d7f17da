"""Greedy decoding of a checkpoint folder, against transformers, both in float32 with a KV cache.

    python benchmarks/decode.py FOLDER [--prompt TEXT] [--tokens 64] [--batch 1] [--context N ...] [--turns 7]
    python benchmarks/decode.py --quick          of a tiny model with random weights

Each side runs in a process of its own, and the two have to choose the same tokens. The ratio of a turn is transformers'
time over ours, prompt included. --batch: so many rows of the same prompt at once; --context: prompts of so many tokens,
the text over and over. Peak memory is that of a side's whole process, loading included. Without transformers our side
is compared with a forward pass over the whole text, without a cache, and timed alone.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

os.environ["BACKEND"] = "numpy"  # both sides on the CPU
from train_step import llama
from turns import compare, demand, header, installed, options, row, sides, speeds

import bpe
import finetune
import model
from engine import cli

QUESTION = "What is the capital of France, which river runs through it, and what is the name of its tallest building? "
QUESTION += "Answer in one sentence."  # 37 tokens of SmolLM2 as a chat


def tiny_checkpoint(folder):
    tokenizer = bpe.train(QUESTION * 3, 300)
    config = llama((32, 96, 2, 4, 2, tokenizer.vocab_size), 256)
    model.save(folder, model.init(config, 0), config)
    tokenizer.save(folder)


def prompt_of(folder, text):
    """The text's token ids, as a user's turn where the model can converse."""
    tokenizer = bpe.load(os.path.join(folder, "tokenizer.json"))
    if finetune.has_format(tokenizer):
        return finetune.prompt(tokenizer, [{"role": "user", "content": text}])
    return tokenizer.bos + tokenizer.encode(text)


@contextmanager
def side(name, folder, count, batch):
    """Answers a prompt with the tokens it chose, in the last of the rows."""
    if name == "ours":
        params, config = model.load(folder)

        def ours(prompt):
            steps = model.generate_batch(params, config, [prompt] * batch, max_new_tokens=count, stop=[])
            return [int(step[-1]) for step in steps]

        yield ours
        return
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network.generation_config.eos_token_id = None  # a fixed number of tokens

    def generate(prompt):
        ids = torch.tensor([prompt] * batch)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
        return network.generate(ids, **options)[-1, len(prompt) :].tolist()

    yield generate


def without_cache(folder, prompt, tokens):
    """The likeliest token at each place of a text that goes on with `tokens`, by one forward pass over all of it."""
    logits, _ = model.forward(*model.load(folder), np.array([prompt + tokens[:-1]]))
    return logits[0, len(prompt) - 1 :].argmax(axis=-1).tolist()


def measure(folder, args, context=0):
    """Checks the sides against each other, lets them take turns, and prints a row. context: tokens of the prompt; 0:
    the text once.
    """
    prompt = prompt_of(folder, args.prompt)
    if context:
        prompt = (prompt * -(-context // len(prompt)))[:context]
    names = ["ours"] + ["transformers"] * installed("torch", "transformers")
    with sides(side, names, folder, args.tokens, args.batch) as ask:
        chosen = {name: ask[name](prompt)[0] for name in ask}
        if len(names) == 1:
            chosen["without a cache"] = without_cache(folder, prompt, chosen["ours"])
        demand(len(set(map(tuple, chosen.values()))) == 1, f"{' and '.join(chosen)} choose different tokens")
        times, ratios = compare({name: lambda name=name: ask[name](prompt)[1] for name in ask}, args.turns)
        heads, cells = speeds(args.tokens * args.batch, times, ratios, ask)
    if context == args.context[0]:
        print(header(f"{Path(folder).name}: rows, tokens of the prompt, new tokens", *heads))
    print(row(f"{args.batch}, {len(prompt):,}, {args.tokens}", *cells), flush=True)


def main():
    defaults = {"prompt": QUESTION, "tokens": 64, "batch": 1, "context": [0], "turns": 7}
    args = options(__doc__, defaults, {"tokens": 8, "turns": 2}, folder="?")
    if not args.folder and not args.quick:
        raise ValueError("name a checkpoint folder, or --quick")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or os.path.join(temporary, "tiny")
        if not args.folder:
            tiny_checkpoint(folder)
        for context in args.context:
            measure(folder, args, context)


if __name__ == "__main__":
    cli.run(main)
