"""Flash attention on a CPU, forward and backward, against PyTorch's scaled_dot_product_attention.

    python benchmarks/attention.py [--turns 5]

Before any timing, values and gradients are compared with PyTorch's. The sides take turns, and a ratio is the median
over the turns of PyTorch's time over ours: above 1, ours is faster. Then the memory of both ways of ours.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from attention import attention, flash_attention, look

try:
    import torch
except ImportError:
    print("Skipped: PyTorch is not installed.")
    sys.exit()


def ours(q, k, v, dy):
    y, backward = flash_attention(q, k, v)
    return y, *backward(dy)


def pytorch(q, k, v, dy):
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    return y.detach(), *torch.autograd.grad(y, tensors, torch.from_numpy(dy))


def seconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def peak(function, *arguments):
    tracemalloc.start()
    function(*arguments)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def full(q, k, v, dy):
    y, backward = attention(q, k, v, look(q.shape[2], k.shape[2]))
    return y, *backward(dy)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    random = np.random.default_rng(0).standard_normal
    print(
        "| heads, dim, tokens | largest difference | ours, s | PyTorch, s | times as fast |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for heads, dim, n in (4, 64, 2048), (2, 64, 8192), (1, 32, 16384), (1, 64, 16384), (1, 128, 16384), (4, 64, 16384):
        arrays = [random((1, heads, n, dim), np.float32) for _ in range(4)]
        error = max(float(abs(a - b.numpy()).max()) for a, b in zip(ours(*arrays), pytorch(*arrays), strict=True))
        times = [(seconds(ours, *arrays), seconds(pytorch, *arrays)) for _ in range(turns)]
        medians = [statistics.median(side) for side in zip(*times, strict=True)]
        ratio = statistics.median(b / a for a, b in times)
        print(
            f"| {heads}, {dim}, {n:,} | {error:.1e} | {medians[0]:.3f} | {medians[1]:.3f} | {ratio:.2f} |", flush=True
        )

    print("\n| memory of one head of 64, MB | tokens | peak |\n| --- | --- | --- |")
    for name, function, n in ("flash", ours, 8192), ("flash", ours, 16384), ("full", full, 8192):
        most = peak(function, *(random((1, 1, n, 64), np.float32) for _ in range(4)))
        print(f"| {name} | {n:,} | {most:,.0f} |")


if __name__ == "__main__":
    main()
