"""Flash attention on an NVIDIA GPU, against PyTorch's flash backend and against the textbook version, both on that GPU.

    python benchmarks/gpu_attention.py [--turns 9] [--tokens 16384] [--longest 16384] [--quick]

Before any timing, values and gradients are compared with NumPy's, in float64. The sides take turns, and a ratio is the
median over the turns of the other side's time over ours: above 1, ours is faster. A batch holds about --tokens tokens.
Without such a GPU it says so and ends; the tests run its checks and one of its cases with the kernels on the CPU.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import alternate, header, installed, options, row, times_as_fast

import masks
from attention import attention, flash_attention
from engine import flash_cuda as launch
from engine import xp

HEADS = 16
BOUNDS = {np.float32: 1e-5, np.float16: 2e-3}  # of errors, as parts of the largest number
QUICK = {"turns": 2, "tokens": 1024, "longest": 1024}


def random(dtype, *shapes):
    draw = xp.random.default_rng(0).standard_normal
    return [draw(shape, dtype=xp.float32).astype(dtype) for shape in shapes]


def largest_errors(dtype, dim):
    """Of y, dq, dk and dv, as parts of the largest number in each, with grouped heads, a window and padding."""
    queries, keys = (2, 4, 300, dim), (2, 2, 333, dim)
    q, k, v, dy = random(dtype, queries, keys, keys, queries)
    first_key = xp.asarray([7, 200], dtype=xp.int32)
    y, backward = launch.flash_attention(q, k, v, True, 150, first_key)
    real = xp.arange(333) >= first_key[:, None]
    seen = masks.causal & masks.window(150) & masks.padding(real)
    exact_y, exact_backward = flash_attention(*(x.astype(xp.float64) for x in (q, k, v)), seen)
    pairs = zip((y, *backward(dy)), (exact_y, *exact_backward(dy.astype(xp.float64))))
    return [float(abs(ours - exact).max() / abs(exact).max()) for ours, exact in pairs]


def check(dtype, dim):
    error = float(np.max(largest_errors(dtype, dim)))
    print(f"{dtype.__name__}, head size {dim}: y, dq, dk, dv within {error:.1e}")
    if not error < BOUNDS[dtype]:
        sys.exit("that is too much, so times say nothing")


def milliseconds(function):
    start, end = xp.cuda.Event(), xp.cuda.Event()
    start.record()
    function()
    end.record()
    end.synchronize()
    return xp.cuda.get_elapsed_time(start, end)


def sides(dtype, dim, n, causal, batch, peer):
    """name -> (forward, forward and backward), functions without arguments. peer: whether PyTorch is there."""
    q, k, v, dy = random(dtype, *[(batch, HEADS, n, dim)] * 4)

    def both_ways(attend):
        return attend, lambda: attend()[1](dy)

    result = {"ours": both_ways(lambda: launch.flash_attention(q, k, v, causal))}
    if peer and dtype == np.float16:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        tensors = [torch.from_dlpack(x).requires_grad_() for x in (q, k, v)]
        dy_tensor = torch.from_dlpack(dy)

        def attend():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
            return y, lambda _: torch.autograd.grad(y, tensors, dy_tensor)

        result["PyTorch flash"] = both_ways(attend)
    if dtype == np.float32 and batch * n * n * HEADS * 4 < 5e9:  # bytes of a matrix of scores, of which there are some
        mask = masks.causal if causal else None
        result["textbook"] = both_ways(lambda: attention(q, k, v, mask))
    return result


def compare(dtype, dim, causal, n, args, peer, measure=milliseconds):
    """A row for each pass and each of the other sides. measure: a function's milliseconds."""
    batch = max(1, args.tokens // n)
    functions = sides(dtype, dim, n, causal, batch, peer)
    for way, name in enumerate(("forward", "forward + backward")):
        for pair in functions.values():  # compiled, and memory taken
            pair[way](), pair[way]()
        measured = {side: lambda pair=pair: measure(pair[way]) for side, pair in functions.items()}
        times = alternate(measured, args.turns)
        own = times.pop("ours")
        # two products forward, five backward, as the papers count; half of the scores if causal
        flops = 2 * (2, 7)[way] * batch * HEADS * n * n * dim / (2 if causal else 1)
        ours = statistics.median(own)
        cells = [dtype.__name__, dim, f"{n:,}", causal, name, f"{ours:.3f}", f"{flops / ours / 1e9:.1f}"]
        for others in [[side, f"{times_as_fast(own, each):.2f}"] for side, each in times.items()] or [["", ""]]:
            print(row(*cells, *others), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch, about")
    parser.add_argument("--longest", type=int, default=16384, help="tokens; the other lengths are 1/4 and 1/16 of it")
    args = options(parser, QUICK)
    some = xp.ones((1, HEADS, 1, 64), np.float32)
    if not launch.usable(some, some):
        return print("Skipped: no CuPy, or no GPU on which flash.cu runs, so nothing is compared or timed.")
    print(xp.cuda.runtime.getDeviceProperties(0)["name"].decode(), "· CuPy", xp.__version__)
    peer = installed("torch")
    for dtype in BOUNDS:
        for dim in 32, 64, 128:
            check(dtype, dim)
    columns = "dtype", "dim", "n", "causal", "pass", "ours, ms", "TFLOP/s", "the other side", "times as fast"
    print(f"\n{header(*columns)}")
    for dtype in BOUNDS:
        for dim in 64, 128:
            for causal in False, True:
                for n in args.longest // 16, args.longest // 4, args.longest:
                    compare(dtype, dim, causal, n, args, peer)


if __name__ == "__main__":
    main()
