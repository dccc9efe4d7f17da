"""Flash attention on a CPU, forward and backward, against PyTorch's scaled_dot_product_attention.

    python benchmarks/attention.py [--turns 5] [--longest 16384] [--quick]

Before any timing, values and gradients are compared: with PyTorch's, and with the textbook version's for the last
queries, so that a long sequence needs no matrix of all pairs. The sides take turns, and a ratio is the median over the
turns of PyTorch's time over ours: above 1, ours is faster. Then the memory of both ways of ours. Without PyTorch our
side is timed alone.
"""

import argparse
import os
import statistics
import sys
import tracemalloc
from pathlib import Path

import numpy as np

os.environ["BACKEND"] = "numpy"  # both sides on the CPU
sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import alternate, header, installed, options, row, seconds, times_as_fast

from attention import attention, flash_attention
from masks import causal

CASES = (4, 64, 2048), (2, 64, 8192), (1, 32, 16384), (1, 64, 16384), (1, 128, 16384), (4, 64, 16384)  # heads, dim, n
LONGEST = 16384
QUICK = {"longest": 512, "turns": 2}


def ours(q, k, v, dy):
    y, backward = flash_attention(q, k, v)
    return y, *backward(dy)


def pytorch(q, k, v, dy):
    import torch

    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    return y.detach(), *torch.autograd.grad(y, tensors, torch.from_numpy(dy))


def textbook(q, k, v, dy):
    y, backward = attention(q, k, v, causal)
    return y, *backward(dy)


def difference(some, others):
    return np.max([np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(some, others, strict=True)])


def largest_difference(q, k, v, dy, peer, last=256):
    """Of ours from PyTorch's, if that is there, and from the textbook's for the last queries alone."""
    errors = [difference(ours(q, k, v, dy), pytorch(q, k, v, dy))] if peer else []
    q, dy = q[:, :, -last:], dy[:, :, -last:]
    return np.max([*errors, difference(ours(q, k, v, dy), textbook(q, k, v, dy))])


def peak(function, *arguments):
    tracemalloc.start()
    function(*arguments)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens; the other sizes keep their ratio to it")
    args = options(parser, QUICK)
    random, peer = np.random.default_rng(0).standard_normal, installed("torch")
    ways = {"ours, s": ours} | ({"PyTorch, s": pytorch} if peer else {})
    title = "attention, forward and backward: heads, size, tokens"
    print(header(title, "largest difference", *ways, *["times as fast"] * peer), flush=True)
    for heads, dim, n in CASES:
        n = n * args.longest // LONGEST
        arrays = [random((1, heads, n, dim), np.float32) for _ in range(4)]
        error = largest_difference(*arrays, peer)
        if not error < 1e-4:
            sys.exit(f"{heads}, {dim}, {n:,}: values or gradients differ by {error:.1e}, so times say nothing")
        times = alternate({name: lambda way=way: seconds(way, *arrays) for name, way in ways.items()}, args.turns)
        own, *others = times.values()
        cells = [f"{statistics.median(side):.3f}" for side in (own, *others)]
        cells += [f"{times_as_fast(own, other):.2f}" for other in others]
        print(row(f"{heads}, {dim}, {n:,}", f"{error:.1e}", *cells), flush=True)

    print(f"\n{header('memory of one head of 64, MB', 'tokens', 'peak')}")
    for name, function, n in ("flash", ours, 8192), ("flash", ours, 16384), ("full", textbook, 8192):
        n = n * args.longest // LONGEST
        most = peak(function, *(random((1, 1, n, 64), np.float32) for _ in range(4)))
        print(row(name, f"{n:,}", f"{most:,.1f}"))


if __name__ == "__main__":
    main()
