"""Greedy decoding at batch 1 of a checkpoint folder, against transformers, both in float32 with a KV cache.

    python benchmarks/decode.py FOLDER [--prompt TEXT] [--tokens 64] [--turns 7]
    python benchmarks/decode.py --quick          of a tiny model with random weights

Each side runs in a process of its own, and the two have to choose the same tokens. The ratio of a turn is transformers'
time over ours, prompt included. Peak memory is that of a side's whole process, loading included. Without transformers
our side is compared with a forward pass over the whole text, without a cache, and timed alone.
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
def side(name, folder, count):
    """Answers a prompt with the tokens it chose."""
    if name == "ours":
        params, config = model.load(folder)
        yield lambda prompt: list(model.generate(params, config, prompt, max_new_tokens=count, stop=[]))
        return
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network.generation_config.eos_token_id = None  # a fixed number of tokens

    def generate(prompt):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
        return network.generate(ids, **options)[0, len(prompt) :].tolist()

    yield generate


def without_cache(folder, prompt, tokens):
    """The likeliest token at each place of a text that goes on with `tokens`, by one forward pass over all of it."""
    logits, _ = model.forward(*model.load(folder), np.array([prompt + tokens[:-1]]))
    return logits[0, len(prompt) - 1 :].argmax(axis=-1).tolist()


def measure(folder, args):
    prompt = prompt_of(folder, args.prompt)
    names = ["ours"] + ["transformers"] * installed("torch", "transformers")
    with sides(side, names, folder, args.tokens) as ask:
        chosen = {name: ask[name](prompt)[0] for name in ask}
        if len(names) == 1:
            chosen["without a cache"] = without_cache(folder, prompt, chosen["ours"])
        demand(len(set(map(tuple, chosen.values()))) == 1, f"{' and '.join(chosen)} choose different tokens")
        times, ratios = compare({name: lambda name=name: ask[name](prompt)[1] for name in ask}, args.turns)
        heads, cells = speeds(args.tokens, times, ratios, ask)
        print(header(f"{Path(folder).name}, batch 1, {args.tokens} tokens after a prompt of {len(prompt)}", *heads))
        print(row("prompt included", *cells))


def main():
    defaults = {"prompt": QUESTION, "tokens": 64, "turns": 7}
    args = options(__doc__, defaults, {"tokens": 8, "turns": 2}, folder="?")
    if args.folder:
        return measure(args.folder, args)
    if not args.quick:
        raise ValueError("name a checkpoint folder, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.join(folder, "tiny")
        tiny_checkpoint(folder)
        measure(folder, args)


if __name__ == "__main__":
    cli.run(main)
