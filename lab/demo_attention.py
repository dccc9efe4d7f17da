"""Variantes de atención, in numbers: the same result, the growth with the length, and what a cache saves."""

import os
import time
import tracemalloc

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from attention import KVCache, attention, flash_attention
from engine import np, to_numpy, xp
from masks import PATTERNS, causal, sparse, window


def demo(sizes=(1024, 2048, 4096, 8192, 16384)):
    """What the slide claims, in numbers: the same result, the growth with the length, and what a cache saves."""
    if xp is not np:
        raise SystemExit("this measures time and memory of a CPU: set BACKEND=numpy; for a GPU see benchmarks/")
    rng = xp.random.default_rng(0)

    def qkv(heads, kv_heads, n, dim=32):
        return [rng.standard_normal((1, h, n, dim), dtype=xp.float32) for h in (heads, kv_heads, kv_heads)]

    def full(q, k, v):
        return attention(q, k, v, causal)

    def pattern(kind):
        """Strided and fixed patterns with a stride of √blocks."""

        def attend(q, k, v):
            stride = round((q.shape[2] / 64) ** 0.5) if kind in ("strided", "fixed") else 4
            return flash_attention(q, k, v, causal & sparse(kind, stride))

        return attend

    def cost(function, *arguments):
        """Seconds, the least of three, and bytes of a forward and a backward pass."""
        seconds = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            y, backward = function(*arguments)
            backward(y)
            seconds = min(seconds, time.perf_counter() - began)
        tracemalloc.start()
        y, backward = function(*arguments)
        backward(y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seconds, peak

    q, k, v = qkv(4, 2, 777)
    (y, backward), (flash_y, flash_backward) = full(q, k, v), flash_attention(q, k, v)
    worst = max(float(abs(a - b).max()) for a, b in zip((y, *backward(y)), (flash_y, *flash_backward(y))))
    print(f"flash attention against the textbook, values and gradients: largest difference {worst:.1e}")

    ways = {"full": full, "flash": flash_attention, "strided": pattern("strided"), "fixed": pattern("fixed")}
    ways |= {"bigbird": pattern("bigbird"), "window": lambda q, k, v: flash_attention(q, k, v, causal & window(256))}
    lengths, costs = {name: sizes[: 3 if name == "full" else 5] for name in ways}, {}
    print("\nforward and backward of a head of 32, in ms and in MB, and the exponent of n that fits")
    print("  tokens   " + "".join(f"{n:>15,}" for n in lengths["flash"]))
    for name, function in ways.items():
        costs[name] = np.array([cost(function, *qkv(1, 1, n)) for n in lengths[name]])
        cells = "".join(f"{1e3 * t:8.0f}{m / 2**20:7.1f}" for t, m in costs[name])
        slopes = [np.polyfit(np.log(lengths[name]), np.log(c), 1)[0] for c in costs[name].T]
        print(f"  {name:9}{cells:75}  time n^{slopes[0]:.2f}, memory n^{slopes[1]:.2f}")

    print("\nkey-value cache, bytes per token and layer in float32, 8 heads of 64:")
    for name, kv_heads in ("multi-head", 8), ("grouped-query", 2), ("multi-query", 1):
        print(f"  {name:14} {kv_heads} key heads {2 * kv_heads * 64 * 4:6,}")
    print(f"  latent         rank {4 * 64} + 32{(4 * 64 + 32) * 4:6,}   (keys and values of their own for all 8 heads)")
    q, k, v = qkv(4, 4, 1024)
    cache, times = KVCache(), [time.perf_counter()]
    for i in range(1024):
        now = slice(i, i + 1)
        flash_attention(q[:, :, now], *cache.append(k[:, :, now], v[:, :, now]))
    times.append(time.perf_counter())
    for i in range(0, 1024, 16):  # a sixteenth of the work of going without
        flash_attention(q[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
    times.append(time.perf_counter())
    cached, uncached = times[1] - times[0], 16 * (times[2] - times[1])
    print(f"1024 tokens one by one: {cached:.2f} s with the cache, {uncached:.1f} s without ({uncached / cached:.0f}x)")

    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    masks = {"full": causal, "sliding window, of 16 tokens": causal & window(16)}
    masks |= {f"{kind}, blocks of 4": causal & sparse(kind, 4 - (kind == "window"), 4) for kind in PATTERNS}
    for axis, (name, mask) in zip(axes.flat, masks.items()):
        axis.imshow(to_numpy(mask.matrix(64, 64)), cmap="Blues", vmin=0, vmax=1.4)
        axis.set(title=name, xlabel="key", ylabel="query")
    for axis, what, unit in (axes[1, 2], 0, 1e3), (axes[1, 3], 1, 2**-20):
        for name, rows in costs.items():
            axis.loglog(lengths[name], rows[:, what] * unit, "o-", label=name)
        axis.set(xlabel="tokens", title=["time, ms", "memory, MB"][what])
        axis.set_xticks(lengths["flash"], lengths["flash"])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    os.makedirs("figures", exist_ok=True)
    figure.savefig("figures/attention.png", dpi=120)
    print("figures/attention.png")
