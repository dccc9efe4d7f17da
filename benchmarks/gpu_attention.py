"""Flash attention on an NVIDIA GPU, against PyTorch's flash backend and against the textbook version, both on that GPU.

    python benchmarks/gpu_attention.py [--turns 9] [--tokens 16384]

Before any timing, values and gradients are compared with NumPy's, in float64. The sides take turns, and a ratio is the
median over the turns of the other side's time over ours: above 1, ours is faster. A batch holds about --tokens tokens.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import attention_gpu as launch
from attention import attention, flash_attention, look
from backend import xp

if xp is np:
    print("Skipped: no CuPy or no GPU.")
    sys.exit()
try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    torch = None
HEADS = 16


def random(dtype, *shape):
    return xp.random.default_rng(len(shape)).standard_normal(shape, dtype=xp.float32).astype(dtype)


def largest_errors(dtype, dim):
    """Of y, dq, dk and dv, as parts of the largest number in each, with grouped heads, a window and padding."""
    q, dy = random(dtype, 2, 4, 300, dim), random(dtype, 2, 4, 300, dim)
    k, v = random(dtype, 2, 2, 333, dim), random(dtype, 2, 2, 333, dim)
    first_key = xp.asarray([7, 200], dtype=xp.int32)
    y, backward = launch.flash_attention(q, k, v, True, 150, first_key)
    real = xp.arange(333) >= first_key[:, None]
    exact_y, exact_backward = flash_attention(*(x.astype(xp.float64) for x in (q, k, v)), True, 150, padding=real)
    pairs = zip((y, *backward(dy)), (exact_y, *exact_backward(dy.astype(xp.float64))))
    return [float(abs(ours - exact).max() / abs(exact).max()) for ours, exact in pairs]


def milliseconds(function):
    start, end = xp.cuda.Event(), xp.cuda.Event()
    start.record()
    function()
    end.record()
    end.synchronize()
    return xp.cuda.get_elapsed_time(start, end)


def sides(dtype, dim, n, causal, batch):
    """name -> (forward, forward and backward), functions without arguments"""
    q, k, v, dy = (random(dtype, batch, HEADS, n, dim) for _ in range(4))

    def both_ways(attend):
        return attend, lambda: attend()[1](dy)

    result = {"ours": both_ways(lambda: launch.flash_attention(q, k, v, causal))}
    if torch and dtype == xp.float16:
        tensors = [torch.from_dlpack(x).requires_grad_() for x in (q, k, v)]
        dy_tensor = torch.from_dlpack(dy)

        def attend():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
            return y, lambda _: torch.autograd.grad(y, tensors, dy_tensor)

        result["PyTorch flash"] = both_ways(attend)
    if dtype == xp.float32 and batch * n * n * HEADS * 4 < 5e9:  # bytes of a matrix of scores, of which there are some
        mask = look(n, n) if causal else None
        result["textbook"] = both_ways(lambda: attention(q, k, v, mask))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    print(xp.cuda.runtime.getDeviceProperties(0)["name"].decode(), "· CuPy", xp.__version__, end=" ")
    print("· PyTorch", torch.__version__ if torch else "is not installed")

    for dtype, bound in (xp.float32, 1e-5), (xp.float16, 2e-3):
        for dim in 32, 64, 128:
            errors = largest_errors(dtype, dim)
            print(f"{dtype.__name__}, head size {dim}: y, dq, dk, dv within {max(errors):.1e}")
            assert max(errors) < bound, errors

    print("\n| dtype | dim | n | causal | pass | ours, ms | TFLOP/s | the other side | times as fast |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in xp.float32, xp.float16:
        for dim, causal, n in ((d, c, n) for d in (64, 128) for c in (False, True) for n in (1024, 4096, 16384)):
            batch = max(1, args.tokens // n)
            functions = sides(dtype, dim, n, causal, batch)
            for way, name in enumerate(("forward", "forward + backward")):
                for pair in functions.values():  # compiled, and memory taken
                    pair[way](), pair[way]()
                times = {side: [] for side in functions}
                for _ in range(args.turns):
                    for side, pair in functions.items():
                        times[side].append(milliseconds(pair[way]))
                ours = statistics.median(times["ours"])
                # two products forward, five backward, as the papers count; half of the scores if causal
                flops = 2 * (2, 7)[way] * batch * HEADS * n * n * dim / (2 if causal else 1)
                for side in [side for side in times if side != "ours"] or ["ours"]:
                    ratio = statistics.median(b / a for a, b in zip(times["ours"], times[side]))
                    other = f"{side} | {ratio:.2f}" if side != "ours" else " | "
                    speed = flops / ours / 1e9
                    row = f"{dtype.__name__} | {dim} | {n} | {causal} | {name} | {ours:.3f} | {speed:.1f} | {other}"
                    print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
