"""Training step against PyTorch eager: the same Llama-style model, weights, batch, clipping and AdamW.

    python benchmarks/train_step.py [--sizes 1 3 6 12] [--batch 16] [--turns 9] [--compile] [--quick]

Each side runs in a process of its own. Both first have to give the same loss and gradients, and the same loss after a
step. Then they take turns of a few steps each, and the ratio of a turn is torch's time over ours: above 1, ours is
faster. Peak memory is that of a side's whole process. Without PyTorch our side is compared with the same batch in one
piece, and timed alone.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

os.environ["BACKEND"] = "numpy"  # both sides on the CPU
sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import PEAK_MEMORY, alternate, header, installed, options, row, sides, times_as_fast

import model
import train
from checkpoint import config_from_json
from engine import cli
from engine.threads import cores, thread_pool
from optim import Optimizer, clip

LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SIZES = {  # millions of parameters: (hidden, intermediate, layers, heads, kv_heads, vocab)
    0: (32, 96, 2, 4, 2, 256),
    1: (128, 352, 4, 4, 2, 2048),
    3: (192, 512, 6, 6, 3, 3072),
    6: (256, 704, 7, 8, 4, 3072),
    12: (384, 1088, 6, 6, 2, 4096),
}
QUICK = {"sizes": [0], "batch": 4, "micro_batch": 1, "context": 32, "turns": 2, "seconds": 0.01}


def setting(size, args):
    """The model and the batch of both sides: params, config, tokens, targets."""
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    published = dict(zip(keys.split(), SIZES[size], strict=True)) | {"model_type": "llama", "rms_norm_eps": 1e-6}
    published |= {"max_position_embeddings": args.context, "tie_word_embeddings": True}
    config = config_from_json(published | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, args.batch, args.context))
    return model.init(config, 0), config, tokens, targets


def ours(params, config, tokens, targets, micro_batch, parallel_map):
    """gradient() -> (loss, grads), and step(), which trains `params` in place as train.py does and returns the loss."""
    train.keep_freed_memory()
    optimizer = Optimizer("adamw", LEARNING_RATE, DECAY)

    def gradient():
        return train.gradient(params, config, tokens, targets, micro_batch, parallel_map, observe=False)[:2]

    def step():
        loss, grads = gradient()
        clip(grads, CLIP)
        optimizer.step(params, grads, parallel_map=parallel_map)
        return loss

    return gradient, step


@contextmanager
def side(name, size, args):
    """Answers "gradient" with (loss, gradients), and a number of steps with (seconds per step, loss in the last)."""

    def answering(gradient, step):
        def answer(question):
            if question == "gradient":
                return gradient()
            began = time.perf_counter()
            for _ in range(question):
                loss = step()
            return (time.perf_counter() - began) / question, loss

        return answer

    if name == "ours":
        with thread_pool(args.threads) as pool:
            yield answering(*ours(*setting(size, args), args.micro_batch, pool.map))
    else:
        from llama_torch import gradient_and_step

        further = name == "torch.compile", LEARNING_RATE, BETAS, EPS, DECAY, CLIP
        yield answering(*gradient_and_step(*setting(size, args), args.threads, *further))


def largest_difference(one, other):
    """Of the losses and of each weight's gradient, relative to its largest entry."""
    (loss, grads), (other_loss, other_grads) = one, other
    parts = [np.abs(grads[name] - g).max() / np.abs(g).max() for name, g in other_grads.items()]
    return float(np.max([*parts, abs(loss / other_loss - 1)]))


def compare(size, args, names):
    """Checks the sides against each other, lets them take turns, and prints a row."""
    with sides(side, names, size, args) as ask:
        first = {name: ask[name]("gradient") for name in ask}
        others = [first[name] for name in names if name != "ours"]
        if not others:
            loss, backward = model.loss(*setting(size, args))
            others = [(loss, backward())]
        difference = float(np.max([largest_difference(first["ours"], other) for other in others]))
        if not difference < 1e-3:
            sys.exit(f"{size} M: the two sides differ by {difference:.1e} in a gradient, so times say nothing")
        warm = {name: [ask[name](1) for _ in range(2)] for name in ask}  # a step, and the loss after it
        after = {name: steps[1][1] for name, steps in warm.items()}
        if not after["ours"] < first["ours"][0] or not all(abs(after["ours"] / x - 1) < 1e-3 for x in after.values()):
            sys.exit(f"{size} M: after a step the losses are {after}, so times say nothing")
        counts = {name: max(1, round(args.seconds / steps[1][0])) for name, steps in warm.items()}
        times = alternate({name: lambda name=name: ask[name](counts[name])[0] for name in ask}, args.turns)
        memory = {name: ask[name](PEAK_MEMORY) for name in ask}
    speed = {name: f"{args.batch * args.context / statistics.median(t):,.0f}" for name, t in times.items()}
    parameters = sum(g.size for g in first["ours"][1].values()) / 1e6
    cells = [f"{parameters:.1f} M parameters", speed["ours"]]
    for name in names[1:]:
        cells += [speed[name], f"{times_as_fast(times['ours'], times[name]):.2f}"]
    print(row(*cells, *(f"{memory[name]:,.0f}" for name in names), f"{difference:.0e}"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES)[1:], choices=list(SIZES), metavar="M")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences that one of our threads takes at a time")
    parser.add_argument("--threads", type=int, default=cores(), help="of either side")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a turn takes")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    args = options(parser, QUICK)
    names = ["ours"]
    if installed("torch"):
        names += ["PyTorch eager"] + ["torch.compile"] * args.compile
    columns = [f"training step, {args.batch} sequences of {args.context} tokens", "ours, tokens/s"]
    for name in names[1:]:
        columns += [name, "times as fast"]
    print(header(*columns, *(f"peak MB of {name}" for name in names), "largest difference"), flush=True)
    for size in args.sizes:
        compare(size, args, names)


if __name__ == "__main__":
    cli.run(main)
