"""Training step against PyTorch eager: the same Llama-style model, weights, batch, clipping and AdamW.

    python benchmarks/train_step.py [--sizes 1 3 6 12] [--batch 16] [--context 256] [--turns 9] [--compile] [--quick]

Each side runs in a process of its own. Both first have to give the same loss and gradients, and the same loss after a
step. Then they take turns of a few steps each. Without PyTorch our side is compared with the same batch in one piece,
and timed alone. --sizes: millions of parameters; --batch: sequences; --context: tokens of each, one number or several;
--micro-batch: sequences that one of our threads takes at a time; --seconds: about how long a turn takes; --compile:
torch.compile too.
"""

import itertools
import os
from contextlib import contextmanager
from functools import partial

import numpy as np

os.environ["BACKEND"] = "numpy"  # both sides on the CPU
from turns import compare, demand, header, installed, options, row, sides, speeds

import model
import train
from checkpoint import config_from_json
from engine import cli
from engine.runs import keep_freed_memory
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
DEFAULTS = {"sizes": [1, 3, 6, 12], "batch": 16, "context": [256], "micro_batch": 4, "threads": cores()}
DEFAULTS |= {"turns": 9, "seconds": 1.0, "compile": False}
QUICK = {"sizes": [0], "batch": 4, "micro_batch": 1, "context": [32], "turns": 2, "seconds": 0.01}


def llama(size, context):
    """The Config of a model like Llama. size: a value of SIZES."""
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    published = dict(zip(keys.split(), size, strict=True)) | {"model_type": "llama", "rms_norm_eps": 1e-6}
    published |= {"max_position_embeddings": context, "tie_word_embeddings": True}
    return config_from_json(published | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})


def setting(size, context, args):
    """The model and the batch of both sides: params, config, tokens, targets."""
    config = llama(SIZES[size], context)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, args.batch, context))
    return model.init(config, 0), config, tokens, targets


@contextmanager
def side(name, size, context, args):
    """Answers "gradient" with (loss, gradients), and a number of steps with the loss in the last. Our step is that of
    train.py.
    """
    params, config, tokens, targets = setting(size, context, args)
    with thread_pool(args.threads) as pool:
        if name == "ours":
            keep_freed_memory()
            optimizer, how = Optimizer("adamw", LEARNING_RATE, DECAY), (args.micro_batch, pool.map)

            def gradient():
                return train.gradient(params, config, (tokens, targets, None), *how, observe=False)[:2]

            def update(grads):
                clip(grads, CLIP)
                optimizer.step(params, grads, parallel_map=pool.map)
        else:
            from llama_torch import gradient_and_update

            how = args.threads, name == "torch.compile", LEARNING_RATE, BETAS, EPS, DECAY, CLIP
            gradient, update = gradient_and_update(params, config, tokens, targets, *how)

        def answer(question):
            if question == "gradient":
                return gradient()
            for _ in range(question):
                loss, grads = gradient()
                update(grads)
            return loss

        yield answer


def largest_difference(one, other):
    """Of the losses and of each weight's gradient, relative to its largest entry."""
    (loss, grads), (other_loss, other_grads) = one, other
    parts = [np.abs(grads[name] - g).max() / np.abs(g).max() for name, g in other_grads.items()]
    return float(np.max([*parts, abs(loss / other_loss - 1)]))


def measure(size, context, args, names):
    """Checks the sides against each other, lets them take turns, and prints a row."""
    with sides(side, names, size, context, args) as ask:
        first = {name: ask[name]("gradient")[0] for name in ask}
        others = [first[name] for name in names if name != "ours"]
        if not others:
            loss, backward = model.loss(*setting(size, context, args))
            others = [(loss, backward())]
        difference = float(np.max([largest_difference(first["ours"], other) for other in others]))
        demand(difference < 1e-3, f"{size} M: the two sides differ by {difference:.1e} in a gradient")
        warm = {name: [ask[name](1) for _ in range(2)][1] for name in ask}  # the loss after a step, and its seconds
        losses = {name: loss for name, (loss, _) in warm.items()}
        equal = all(abs(losses["ours"] / loss - 1) < 1e-3 for loss in losses.values())
        demand(losses["ours"] < first["ours"][0] and equal, f"{size} M: after a step the losses are {losses}")
        counts = {name: max(1, round(args.seconds / taken)) for name, (_, taken) in warm.items()}
        each = lambda name: ask[name](counts[name])[1] / counts[name]
        times, ratios = compare({name: partial(each, name) for name in ask}, args.turns)
        heads, cells = speeds(args.batch * context, times, ratios, ask)
    if (size, context) == (args.sizes[0], args.context[0]):
        print(header("training step: parameters, sequences, tokens of each", *heads, "largest difference"))
    parameters = sum(g.size for g in first["ours"][1].values()) / 1e6
    print(row(f"{parameters:.1f} M, {args.batch}, {context:,}", *cells, f"{difference:.0e}"), flush=True)


def main():
    args = options(__doc__, DEFAULTS, QUICK)
    if not set(args.sizes) <= set(SIZES):
        raise ValueError(f"--sizes has to be of {', '.join(map(str, SIZES))}")
    names = ["ours"] + (["PyTorch eager"] + ["torch.compile"] * args.compile) * installed("torch")
    for size, context in itertools.product(args.sizes, args.context):
        measure(size, context, args, names)


if __name__ == "__main__":
    cli.run(main)
