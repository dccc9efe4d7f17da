"""Flash attention, forward and backward, against PyTorch's scaled_dot_product_attention and the textbook version.

    python benchmarks/attention.py [--longest 16384] [--turns 5] [--quick]                      on a CPU
    python benchmarks/attention.py --gpu [--longest 16384] [--tokens 16384] [--turns 5]         the CUDA kernels

Before any timing, values and gradients are compared: on a CPU with PyTorch's, and with the textbook version's for the
last queries, so that a long sequence needs no matrix of all pairs; those of the kernels with what NumPy's way gives in
float64. --longest: tokens; the other lengths keep their ratio to it. --tokens: about so many are in a batch on a GPU.
Without a GPU on which they run, --gpu says so and ends; the tests run the kernels on the CPU.
"""

import os
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product

import numpy as np

if "--gpu" not in sys.argv:
    os.environ["BACKEND"] = "numpy"
from turns import compare, demand, gpu, header, installed, options, row

import masks
from attention import attention, flash_attention
from engine import flash_cuda, xp
from lab.measure import peak_bytes, seconds

LONGEST = 16384
CASES = (4, 64, 2048), (2, 64, 8192), (1, 32, 16384), (1, 64, 16384), (1, 128, 16384), (4, 64, 16384)  # heads, dim, n
HEADS = 16  # on a GPU
BOUNDS = {np.float32: 1e-5, np.float16: 2e-3}  # of the kernels' errors, as parts of the largest number


def random(dtype, *shapes):
    draw = xp.random.default_rng(0).standard_normal
    return [draw(shape, dtype=xp.float32).astype(dtype) for shape in shapes]


def pytorch(q, k, v, dy, causal):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    *tensors, upstream = (torch.from_dlpack(x) for x in (q, k, v, dy))
    tensors = [x.requires_grad_() for x in tensors]

    def attend():
        with nullcontext() if xp is np else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
        return y.detach(), lambda _: torch.autograd.grad(y, tensors, upstream)

    return attend


def sides(flash, q, k, v, dy, causal=True, peer=False, textbook=False):
    """{name: attend}, attend() -> y and its backward pass. flash: ours, (q, k, v) -> y, backward."""
    named = {"ours": lambda: flash(q, k, v)}
    if peer:
        named["PyTorch"] = pytorch(q, k, v, dy, causal)
    if textbook:
        named["textbook"] = lambda: attention(q, k, v, masks.causal if causal else None)
    return named


def passes(attend, dy):
    """y, dq, dk and dv."""
    y, backward = attend()
    return y, *backward(dy)


# --- on a CPU ---


def largest_difference(named, dy):
    """Of the values and gradients of the other sides from ours."""
    ours, *others = (passes(attend, dy) for attend in named.values())
    pairs = [pair for other in others for pair in zip(ours, other, strict=True)]
    return np.max([np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs], initial=0.0)


def on_a_cpu(args):
    peer, scaled = installed("torch"), lambda n: n * args.longest // LONGEST
    title = "attention, forward and backward: heads, size, tokens"
    print(header(title, "largest difference", "ours, s", *["PyTorch, s", "times as fast"] * peer), flush=True)
    for heads, dim, n in CASES:
        n = scaled(n)
        q, k, v, dy = random(np.float32, *[(1, heads, n, dim)] * 4)
        named, last = sides(flash_attention, q, k, v, dy, peer=peer), np.s_[:, :, -256:]
        ends = sides(flash_attention, q[last], k, v, dy[last], textbook=True)
        error = np.maximum(largest_difference(named, dy), largest_difference(ends, dy[last]))
        demand(error < 1e-4, f"{heads}, {dim}, {n:,}: values or gradients differ by {error:.1e}")
        times, ratios = compare({name: partial(seconds, passes, named[name], dy) for name in named}, args.turns)
        cells = [f"{time:.3f}" for time in times.values()] + [f"{ratio:.2f}" for ratio in ratios.values()]
        print(row(f"{heads}, {dim}, {n:,}", f"{error:.1e}", *cells), flush=True)

    print(f"\n{header('memory of one head of 64, MB', 'tokens', 'peak')}")
    for name, side, n in ("flash", "ours", 8192), ("flash", "ours", 16384), ("full", "textbook", 8192):
        n = scaled(n)
        q, k, v, dy = random(np.float32, *[(1, 1, n, 64)] * 4)
        attend = sides(flash_attention, q, k, v, dy, textbook=True)[side]
        print(row(name, f"{n:,}", f"{peak_bytes(passes, attend, dy) / 2**20:,.1f}"))


# --- on a GPU ---


def largest_errors(dtype, dim):
    """Of y, dq, dk and dv, as parts of the largest number in each, with grouped heads, a window and padding."""
    queries, keys = (2, 4, 300, dim), (2, 2, 333, dim)
    q, k, v, dy = random(dtype, queries, keys, keys, queries)
    seen = masks.causal & masks.window(150) & masks.padding(xp.arange(333) >= xp.asarray([7, 200])[:, None])
    ours = passes(lambda: flash_cuda.flash_attention(q, k, v, seen), dy)
    exact_q, exact_k, exact_v, exact_dy = (x.astype(xp.float64) for x in (q, k, v, dy))
    exact = passes(lambda: flash_attention(exact_q, exact_k, exact_v, seen), exact_dy)
    return [float(abs(a - b).max() / abs(b).max()) for a, b in zip(ours, exact)]


def check(dtype, dim):
    error = float(np.max(largest_errors(dtype, dim)))
    print(f"{dtype.__name__}, head size {dim}: y, dq, dk, dv within {error:.1e}")
    demand(error < BOUNDS[dtype], "that is too much")


def milliseconds(function):
    start, end = xp.cuda.Event(), xp.cuda.Event()
    start.record()
    function()
    end.record()
    end.synchronize()
    return xp.cuda.get_elapsed_time(start, end)


def case(dtype, dim, causal, n, args, peer, measure=milliseconds):
    """A row for each pass and each of the other sides. measure: a function's milliseconds."""
    batch = max(1, args.tokens // n)
    q, k, v, dy = random(dtype, *[(batch, HEADS, n, dim)] * 4)
    fits = dtype == np.float32 and 4 * batch * n * n * HEADS < 5e9  # bytes of a matrix of scores, one of several
    flash = partial(flash_cuda.flash_attention, mask=masks.causal if causal else None)
    named = sides(flash, q, k, v, dy, causal, peer and dtype == np.float16, fits)
    both = {name: partial(passes, attend, dy) for name, attend in named.items()}
    # two products forward, five backward, as the papers count; half of the scores if causal
    for name, functions, products in ("forward", named, 2), ("forward + backward", both, 7):
        for function in functions.values():  # compiled, and memory taken
            function(), function()
        times, ratios = compare({side: partial(measure, function) for side, function in functions.items()}, args.turns)
        speed = 2 * products * batch * HEADS * n * n * dim / (2 if causal else 1) / times["ours"] / 1e9
        cells = [dtype.__name__, dim, f"{n:,}", causal, name, f"{times['ours']:.3f}", f"{speed:.1f}"]
        for others in [[side, f"{ratio:.2f}"] for side, ratio in ratios.items()] or [["", ""]]:
            print(row(*cells, *others), flush=True)


def on_a_gpu(args):
    if not gpu():
        return
    peer = installed("torch")
    for dtype, dim in product(BOUNDS, (32, 64, 128)):
        check(dtype, dim)
    columns = "dtype", "dim", "n", "causal", "pass", "ours, ms", "TFLOP/s", "the other side", "times as fast"
    print(f"\n{header(*columns)}")
    for each in product(BOUNDS, (64, 128), (False, True), (args.longest // 16, args.longest // 4, args.longest)):
        case(*each, args, peer)


def main():
    defaults = {"gpu": False, "longest": LONGEST, "tokens": 16384, "turns": 5}
    args = options(__doc__, defaults, {"longest": 512, "tokens": 1024, "turns": 2})
    (on_a_gpu if args.gpu else on_a_cpu)(args)


if __name__ == "__main__":
    main()
