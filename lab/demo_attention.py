"""Variantes de atención, in numbers: the same result, the growth with the length, and what a cache saves."""

from attention import KVCache, attention, flash_attention
from engine import np, to_numpy, xp
from engine.figure import figure
from lab.measure import both_passes, peak_bytes, seconds
from masks import PATTERNS, causal, sparse, window

ROOT = lambda n: round((n / 64) ** 0.5)  # of the number of blocks: a stride
MASKS = {  # of n tokens
    "flash": lambda n: causal,
    "strided": lambda n: causal & sparse("strided", ROOT(n)),
    "fixed": lambda n: causal & sparse("fixed", ROOT(n)),
    "bigbird": lambda n: causal & sparse("bigbird", 4),
    "window": lambda n: causal & window(256),
}


def attend(name, q, k, v):
    if name == "full":
        return attention(q, k, v, causal)
    return flash_attention(q, k, v, MASKS[name](q.shape[2]))


def demo(sizes=(1024, 2048, 4096, 8192, 16384)):
    """What the slide claims, in numbers: the same result, the growth with the length, and what a cache saves."""
    if xp is not np:
        raise SystemExit("this measures time and memory of a CPU: set BACKEND=numpy; for a GPU see benchmarks/")
    rng = xp.random.default_rng(0)
    normal = lambda heads, n: rng.standard_normal((1, heads, n, 32), dtype=xp.float32)
    qkv = lambda heads, kv_heads, n: (normal(heads, n), normal(kv_heads, n), normal(kv_heads, n))
    q, k, v = qkv(4, 2, 777)
    (y, backward), (flash_y, flash_backward) = attention(q, k, v, causal), flash_attention(q, k, v)
    worst = max(float(abs(a - b).max()) for a, b in zip((y, *backward(y)), (flash_y, *flash_backward(y))))
    print(f"flash attention against the textbook, values and gradients: largest difference {worst:.1e}")

    lengths, costs = {"full": sizes[:3]} | dict.fromkeys(MASKS, sizes), {}
    print("\nforward and backward of a head of 32, in ms and in MB, and the exponent of n that fits")
    print("  tokens   " + "".join(f"{n:>15,}" for n in sizes))
    for name in lengths:
        inputs = [(both_passes, attend, name, *qkv(1, 1, n)) for n in lengths[name]]
        costs[name] = np.array([(1e3 * seconds(*each, times=3), peak_bytes(*each) / 2**20) for each in inputs])
        cells = "".join(f"{ms:8.0f}{megabytes:7.1f}" for ms, megabytes in costs[name])
        slopes = [np.polyfit(np.log(lengths[name]), np.log(c), 1)[0] for c in costs[name].T]
        print(f"  {name:9}{cells:75}  time n^{slopes[0]:.2f}, memory n^{slopes[1]:.2f}")

    print("\nkey-value cache, bytes per token and layer in float32, 8 heads of 64:")
    for name, kv_heads in ("multi-head", 8), ("grouped-query", 2), ("multi-query", 1):
        print(f"  {name:14} {kv_heads} key heads {2 * kv_heads * 64 * 4:6,}")
    print(f"  latent         rank {4 * 64} + 32{(4 * 64 + 32) * 4:6,}   (keys and values of their own for all 8 heads)")
    q, k, v = qkv(4, 4, 1024)
    cache = KVCache()

    def with_cache():
        for i in range(1024):
            query, key, value = (x[:, :, i : i + 1] for x in (q, k, v))
            flash_attention(query, *cache.append(key, value))

    def without():  # a sixteenth of the work
        for i in range(0, 1024, 16):
            flash_attention(*(x[:, :, : i + 1] for x in (q, k, v)))

    cached, uncached = seconds(with_cache), 16 * seconds(without)
    print(f"1024 tokens one by one: {cached:.2f} s with the cache, {uncached:.1f} s without ({uncached / cached:.0f}x)")
    draw(sizes, lengths, costs)
    print("figures/attention.png")


def draw(sizes, lengths, costs):
    """Who sees whom, and what it costs."""
    masks = {"full": causal, "sliding window, of 16 tokens": causal & window(16)}
    masks |= {f"{kind}, blocks of 4": causal & sparse(kind, 4 - (kind == "window"), 4) for kind in PATTERNS}
    with figure("figures/attention.png", 2, 4, (15, 7)) as axes:
        for axis, (name, mask) in zip(axes.flat, masks.items()):
            axis.imshow(to_numpy(mask.matrix(64, 64)), cmap="Blues", vmin=0, vmax=1.4)
            axis.set(title=name, xlabel="key", ylabel="query")
        for axis, what, title in (axes[1, 2], 0, "time, ms"), (axes[1, 3], 1, "memory, MB"):
            for name, rows in costs.items():
                axis.loglog(lengths[name], rows[:, what], "o-", label=name)
            axis.set(xlabel="tokens", title=title)
            axis.set_xticks(sizes, sizes)
            axis.minorticks_off()
