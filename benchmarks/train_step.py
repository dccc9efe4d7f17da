"""Training step against PyTorch eager: the same Llama-style model, weights, batch, clipping and AdamW.

    python benchmarks/train_step.py [--sizes 1 3 6 12] [--batch 16] [--context 256] [--turns 9] [--compile] [--quick]
    python benchmarks/train_step.py --gpu [--tf32] --sizes 12 135 --batch 8 --context 1024

Each side runs in a process of its own. Both first have to give the same loss and gradients, and the same loss after a
step. Then they take turns of a few steps each. Without PyTorch our side is compared with the same batch in one piece,
and timed alone. --sizes: millions of parameters; --batch: sequences; --context: tokens of each, one number or several;
--micro-batch: sequences that one of our threads takes at a time; --seconds: about how long a turn takes; --compile:
torch.compile too; --gpu: both sides on a GPU, each with the whole batch at once; --tf32: their matrix products with
operands rounded to TF32, on its tensor cores.
"""

import itertools
import os
import sys
from contextlib import contextmanager
from functools import partial

import numpy as np

if "--gpu" not in sys.argv:
    os.environ["BACKEND"] = "numpy"  # both sides on the CPU
from turns import PEAK_MEMORY, compare, demand, gpu, header, installed, options, row, sides, speeds

import model
import train
from checkpoint import config_from_json
from engine import cli, to_numpy, xp
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
    135: (576, 1536, 30, 9, 3, 49152),  # SmolLM2's
}
DEFAULTS = {"sizes": [1, 3, 6, 12], "batch": 16, "context": [256], "micro_batch": 4, "threads": cores()}
DEFAULTS |= {"turns": 9, "seconds": 1.0, "compile": False, "gpu": False, "tf32": False}
MEMORY_OF_GPU = "memory of the GPU"
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
    if args.tf32:
        os.environ["CUPY_TF32"] = "1"  # CuPy looks at its first product
    return model.init(config, 0), config, tokens, targets


@contextmanager
def side(name, size, context, args):
    """Answers "gradient" with (loss, gradients), a number of steps with the loss in the last, MEMORY_OF_GPU with the
    most that its process has taken, in MB. Our step is that of train.py.
    """
    params, config, tokens, targets = setting(size, context, args)
    with thread_pool(args.threads) as pool:
        if name == "ours":
            keep_freed_memory()
            micro_batch, parallel_map = (args.batch, map) if args.gpu else (args.micro_batch, pool.map)
            optimizer = Optimizer("adamw", LEARNING_RATE, DECAY)

            def gradient():
                batch = tokens, targets, None
                return train.gradient(params, config, batch, micro_batch, parallel_map, observe=False)[:2]

            def update(grads):
                clip(grads, CLIP)
                optimizer.step(params, grads, parallel_map=parallel_map)

            in_main_memory, bytes_held = to_numpy, lambda: xp.get_default_memory_pool().total_bytes()
        else:
            import torch
            from llama_torch import gradient_and_update

            params = {name: to_numpy(w) for name, w in params.items()}
            how = args.threads, name == "torch.compile", LEARNING_RATE, BETAS, EPS, DECAY, CLIP
            how = *how, "cuda" if args.gpu else "cpu", args.tf32
            gradient, update = gradient_and_update(params, config, tokens, targets, *how)
            in_main_memory, bytes_held = lambda g: g.cpu().numpy(), torch.cuda.max_memory_reserved

        def answer(question):
            if question == MEMORY_OF_GPU:
                return bytes_held() / 2**20
            if question == "gradient":
                loss, grads = gradient()
                return loss, {name: in_main_memory(g) for name, g in grads.items()}
            for _ in range(question):
                loss, grads = gradient()
                update(grads)
            in_main_memory(grads["model.norm.weight"])  # on a GPU, waits for the last step
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
        bound = 3e-2 if args.tf32 else 1e-3
        demand(difference < bound, f"{size} M: the two sides differ by {difference:.1e} in a gradient")
        warm = {name: [ask[name](1) for _ in range(2)][1] for name in ask}  # the loss after a step, and its seconds
        losses = {name: loss for name, (loss, _) in warm.items()}
        equal = all(abs(losses["ours"] / loss - 1) < 1e-3 for loss in losses.values())
        demand(losses["ours"] < first["ours"][0] and equal, f"{size} M: after a step the losses are {losses}")
        counts = {name: max(1, round(args.seconds / taken)) for name, (_, taken) in warm.items()}
        each = lambda name: ask[name](counts[name])[1] / counts[name]
        times, ratios = compare({name: partial(each, name) for name in ask}, args.turns)
        memory = MEMORY_OF_GPU if args.gpu else PEAK_MEMORY
        heads, cells = speeds(args.batch * context, times, ratios, ask, memory)
    if (size, context) == (args.sizes[0], args.context[0]):
        print(header("training step: parameters, sequences, tokens of each", *heads, "largest difference"))
    parameters = sum(g.size for g in first["ours"][1].values()) / 1e6
    print(row(f"{parameters:.1f} M, {args.batch}, {context:,}", *cells, f"{difference:.0e}"), flush=True)


def main():
    args = options(__doc__, DEFAULTS, QUICK)
    if not set(args.sizes) <= set(SIZES):
        raise ValueError(f"--sizes has to be of {', '.join(map(str, SIZES))}")
    if args.gpu and not gpu():
        return
    names = ["ours"] + (["PyTorch eager"] + ["torch.compile"] * args.compile) * installed("torch")
    for size, context in itertools.product(args.sizes, args.context):
        measure(size, context, args, names)


if __name__ == "__main__":
    cli.run(main)
