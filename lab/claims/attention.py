"""Variantes de atención y caché KV: the same result, the growth with the length, and what a cache saves."""

from architectures import ARCHITECTURES
from attention import KVCache, attention, flash_attention
from engine import np, to_numpy, xp
from engine.figure import figure
from lab.claims import Finding, tiny
from lab.claims.language import attention_weights, ids_of, trained
from lab.measure import both_passes, peak_bytes, seconds
from masks import PATTERNS, causal, sparse, window

BLOCK = 16
ROOT = lambda n: max(1, round((n / BLOCK) ** 0.5))  # of the number of blocks: a stride
MASKS = {  # of n tokens
    "full": lambda n: causal,
    "strided": lambda n: causal & sparse("strided", ROOT(n), BLOCK),
    "fixed": lambda n: causal & sparse("fixed", ROOT(n), BLOCK),
    "bigbird": lambda n: causal & sparse("bigbird", 4, BLOCK),
    "window": lambda n: causal & window(64),
}
GROWTH = {"full": "n²", "strided": "n√n", "fixed": "n√n", "bigbird": "n", "window": "n"}


def random_qkv(seed, heads, kv_heads, n, dim=32):
    rng = xp.random.default_rng(seed)
    return [rng.standard_normal((1, h, n, dim), dtype=xp.float32) for h in (heads, kv_heads, kv_heads)]


def exponent(sizes, costs):
    """The a for which costs grow as sizes^a."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def pairs_counted(names, sizes):
    """{name: [how many pairs of a query and a key its mask lets see, of n tokens]}, and each one's exponent."""
    counts = {name: [int(MASKS[name](n).matrix(n, n).sum()) for n in sizes] for name in names}
    return counts, {name: exponent(sizes, count) for name, count in counts.items()}


def full_attention_is_quadratic(seed=0, sizes=(256, 512, 1024, 2048)):
    """Attention does not scale to long contexts: its work grows as O(n²)."""
    counts, exponents = pairs_counted(["full"], sizes)
    times = [1e3 * seconds(both_passes, attention, *random_qkv(seed, 1, 1, n), causal, times=2) for n in sizes]
    lines = [f"{n:6,} tokens  {pairs:10,} pairs {ms:8.1f} ms" for n, pairs, ms in zip(sizes, counts["full"], times)]
    says = f"n^{exponents['full']:.2f} pairs of a query and a key"
    return Finding(exponents["full"], says, 1.95, 2.05, lines=lines)


def sparse_attention_is_cheaper(seed=0, sizes=(512, 1024, 2048, 4096)):
    """Sparse attention reduces O(n²) to O(n√n), or even O(n), as each query sees a selected subset of the keys only."""
    counts, exponents = pairs_counted(MASKS, sizes)
    expected = {"n²": 2.0, "n√n": 1.5, "n": 1.0}
    worst = max(abs(exponents[name] - expected[GROWTH[name]]) for name in MASKS)
    lines = [f"pairs seen {''.join(f'{n:12,}' for n in sizes)}  tokens"]
    for name, count in counts.items():
        lines.append(
            f"{name:10} {''.join(f'{c:12,}' for c in count)}  n^{exponents[name]:.2f}, in theory {GROWTH[name]}"
        )

    def picture(path):
        with figure(path, size=(7.5, 3.6)) as axes:
            for name, count in counts.items():
                axes.loglog(sizes, count, marker="o", label=f"{name}: {GROWTH[name]}")
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            axes.set(title="Full attention quadruples with twice the tokens, sparse attention does not")
            axes.set(xlabel="tokens n", ylabel="pairs of a query and a key")

    says = ", ".join(f"{name} n^{e:.2f}" for name, e in exponents.items())
    return Finding(worst, says, most=0.2, picture=picture, lines=lines)


def sparse_patterns_are_fixed_windows_or_random(seed=0, n=64):
    """The subset is a fixed pattern, a window or drawn at random: still every token is reached, in a few layers."""
    masks = {"full": causal, "window, of 16 tokens": causal & window(16)}
    drawn = {kind: {"seed": seed} if kind == "bigbird" else {} for kind in PATTERNS}
    masks |= {
        f"{kind}, blocks of 4": causal & sparse(kind, 4 - (kind == "window"), 4, **drawn[kind]) for kind in PATTERNS
    }
    shares, layers = {}, {}
    for name, mask in masks.items():
        sees = to_numpy(mask.matrix(n, n)).astype(int)
        shares[name], reached, layers[name] = sees.sum() / (n * (n + 1) / 2), sees, 1
        while (reached > 0).sum() < n * (n + 1) // 2:
            reached, layers[name] = np.minimum(reached @ sees, 1), layers[name] + 1
    most = max(layers.values())

    def picture(path):
        with figure(path, 2, 3, (8.5, 6)) as axes:
            for axis, (name, mask) in zip(axes.flat, masks.items()):
                axis.imshow(to_numpy(mask.matrix(n, n)), cmap="Blues", vmin=0, vmax=1.4)
                axis.set(title=f"{name}: {shares[name]:.0%}", xlabel="key", ylabel="query")
                axis.label_outer()
            axes.flat[0].figure.suptitle(
                "Who sees whom: blue is computed, the rest is never looked at", fontsize="medium"
            )

    lines = [f"{name:22} {shares[name]:4.0%} of the pairs, all tokens within {layers[name]} layers" for name in masks]
    return Finding(most, f"every earlier token is reached within {most} layers", most=10, picture=picture, lines=lines)


def sparse_attention_is_faster(seed=0, sizes=(2048, 4096, 8192)):
    """What is not seen costs no time: a long text is read faster by sparse attention than by all of it."""
    if xp is not np:
        return Finding(None, "measures time and memory of a CPU: set BACKEND=numpy; for a GPU see benchmarks/")
    costs, memory = {}, {}
    for name, mask in MASKS.items():
        calls = [(both_passes, flash_attention, *random_qkv(seed, 1, 1, n), mask(n)) for n in sizes]
        costs[name] = [1e3 * seconds(*call, times=3) for call in calls]
        memory[name] = peak_bytes(*calls[-1]) / 2**20
    ratio = costs["full"][-1] / costs["window"][-1]
    lines = [
        f"forward and backward of a head of 32, in ms: {', '.join(f'{n:,}' for n in sizes)} tokens; and at most MB"
    ]
    for name, times in costs.items():
        cells = "".join(f"{ms:9.1f}" for ms in times)
        lines.append(f"{name:10}{cells}  time n^{exponent(sizes, times):.2f} {memory[name]:9.1f} MB")
    says = f"{ratio:.1f} times as fast with a window over {sizes[-1]:,} tokens"
    return Finding(ratio, says, least=1.5, lines=lines)


def flash_attention_is_exact(seed=0, n=777):
    """Flash attention computes all of attention, in blocks: the same values and gradients, to rounding."""
    q, k, v = random_qkv(seed, 4, 2, n)
    (y, backward), (flash_y, flash_backward) = attention(q, k, v, causal), flash_attention(q, k, v)
    worst = max(float(abs(a - b).max()) for a, b in zip((y, *backward(y)), (flash_y, *flash_backward(y))))
    says = f"values and gradients of {n} tokens differ by {worst:.0e}"
    return Finding(worst, says, most=1e-3, picture=lambda path: tile_by_tile(path, seed))


def tile_by_tile(path, seed, block=3):
    """One query of flash attention: what m, ℓ and O are after each block of keys."""
    rng = np.random.default_rng(seed)
    q, k, v = 2 * rng.standard_normal(4), rng.standard_normal((9, 4)), rng.standard_normal((9, 1))
    k = k[np.argsort(k @ q)].reshape(3, 3, 4).swapaxes(0, 1).reshape(9, 4)  # in an order in which m grows
    m, l, O, rows = -np.inf, 0.0, 0.0, []
    for j in range(0, len(k), block):
        S = k[j : j + block] @ q / 2
        m_new = max(m, S.max())
        l = np.exp(m - m_new) * l + np.exp(S - m_new).sum()
        O = np.exp(m - m_new) * O + np.exp(S - m_new) @ v[j : j + block, 0]
        m = m_new
        rows.append((S, m, l, O))
    p = np.exp(k @ q / 2)
    with figure(path, size=(9, 3)) as axes:
        for i, (S, m, l, O) in enumerate(rows):
            for j, s in enumerate(S):
                at = block * i + j
                axes.barh(1, 1, left=at, color="C0", alpha=0.25, edgecolor="white")
                axes.text(at + 0.5, 1, f"{s:+.2f}", ha="center", va="center", fontsize=9)
            axes.text(block * (i + 0.5), 1.6, f"block {i + 1} of the keys", ha="center")
            axes.text(block * (i + 0.5), 0.1, f"m = {m:.2f}\nℓ = {l:.2f}\nO = {O:+.2f}", ha="center", va="center")
        axes.text(-0.1, 1, "scores S", ha="right", va="center")
        axes.text(-0.1, 0.1, "kept after it", ha="right", va="center")
        axes.text(
            4.5,
            -0.75,
            f"O / ℓ = {rows[-1][3] / rows[-1][2]:+.3f}, and softmax(S) v = {p @ v[:, 0] / p.sum():+.3f}",
            ha="center",
        )
        axes.set(title="One query of flash attention: three numbers stand for all the keys it has passed")
        axes.set(xlim=(-1.5, 9), ylim=(-1, 1.9))
        axes.set_axis_off()


def flash_attention_needs_linear_memory(seed=0, sizes=(1024, 2048, 4096)):
    """Flash attention does O(n²) work in O(n) memory, as no matrix of all scores ever exists."""
    if xp is not np:
        return Finding(None, "measures time and memory of a CPU: set BACKEND=numpy; for a GPU see benchmarks/")
    ways, costs = {"textbook": lambda *qkv: attention(*qkv, causal), "flash": flash_attention}, {}
    lengths = {"textbook": sizes, "flash": [4 * n for n in sizes]}
    for name, attend in ways.items():
        calls = [(both_passes, attend, *random_qkv(seed, 1, 1, n)) for n in lengths[name]]
        costs[name] = [(peak_bytes(*call) / 2**20, 1e3 * seconds(*call)) for call in calls]
    memory = {name: exponent(lengths[name], [megabytes for megabytes, _ in costs[name]]) for name in ways}
    lines = ["forward and backward of a head of 32"]
    for name, cost in costs.items():
        cells = [f"{n:,} tokens {megabytes:.1f} MB, {ms:.0f} ms" for n, (megabytes, ms) in zip(lengths[name], cost)]
        growth = exponent(lengths[name], [ms for _, ms in cost])
        lines.append(f"{name:9} {'; '.join(cells)}: memory n^{memory[name]:.2f}, time n^{growth:.2f}")

    def picture(path):
        with figure(path, size=(7, 3.2)) as axes:
            for name, cost in costs.items():
                megabytes = [megabytes for megabytes, _ in cost]
                axes.loglog(lengths[name], megabytes, marker="o", label=f"{name}: n^{memory[name]:.1f}")
            every = sorted({n for some in lengths.values() for n in some})
            axes.set_xticks(every, every)
            axes.minorticks_off()
            axes.set(title="The memory of flash attention grows with n, that of the textbook with n²")
            axes.set(xlabel="tokens n", ylabel="MB, forward and backward")

    says = f"memory n^{memory['flash']:.2f}, of the textbook n^{memory['textbook']:.2f}"
    return Finding(memory["flash"], says, most=1.4, picture=picture, lines=lines)


def flash_attention_moves_fewer_bytes(seed=0, n=4096, dim=64, shared=2**17):
    """Computed in blocks inside the shared memory of a GPU, attention moves far fewer bytes to and from its large one.

    Counted for one head in 16 bits, forward: of the textbook, each array that a kernel reads or writes, n × n ones
    included; of flash attention, q and the output once, and k and v once for each block of queries that fits beside a
    block of keys and values in `shared` bytes (Dao et al. 2022, theorem 2).
    """
    number, matrix, rows = 2, n * n, shared // (4 * dim * 2)
    textbook = number * (2 * n * dim + matrix + 2 * matrix + matrix + 2 * n * dim)  # S = q kᵀ; P = softmax(S); P v
    flash = number * (2 * n * dim + -(-n // rows) * 2 * n * dim)
    lines = (f"textbook {textbook / 2**20:7.1f} MB", f"flash    {flash / 2**20:7.1f} MB, in blocks of {rows} queries")
    says = f"{textbook / flash:.0f} times fewer for a head of {dim} and {n:,} tokens"
    return Finding(textbook / flash, says, least=5, lines=lines)


def a_trained_model_attends_to_what_it_needs(seed=0):
    """Trained on sentences whose adjective agrees with the noun, a head finds the noun, across another one."""
    params, config, _ = trained("causal", seed)
    words = "la gata que busca a mi perro está".split()
    by_layer = [attention_weights(params, config, ids_of(words), layer) for layer in range(config.num_hidden_layers)]
    layer = int(np.argmax([weights[:, -1, 1].max() for weights in by_layer]))
    head = int(by_layer[layer][:, -1, 1].argmax())
    weights = by_layer[layer][head]
    share = float(weights[-1, 1])

    def picture(path):
        with figure(path, size=(6, 4.6)) as axes:
            image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
            axes.figure.colorbar(image, ax=axes, label="attention")
            axes.set_xticks(range(len(words)), words, rotation=45)
            axes.set_yticks(range(len(words)), words)
            axes.set(title="To say cansada after está, the model looks at gata", xlabel="key", ylabel="query")

    says = f"{share:.0%} of a head's attention from está is on gata, {weights[-1, 6]:.0%} on perro"
    return Finding(share, says, least=0.5, picture=picture)


def a_cache_gives_the_same_for_less(seed=0, n=256):
    """The KV cache keeps K and V of the tokens already read: the same result, and one query for each token, not n."""
    q, k, v = random_qkv(seed, 4, 4, n)
    part = lambda x, i: x[:, :, i : i + 1]

    def with_cache():
        cache = KVCache()
        return [flash_attention(part(q, i), *cache.append(part(k, i), part(v, i)))[0] for i in range(n)]

    def without():
        return [flash_attention(*(x[:, :, : i + 1] for x in (q, k, v)))[0][:, :, -1:] for i in range(n)]

    error = max(float(abs(a - b).max()) for a, b in zip(with_cache(), without()))
    times = seconds(with_cache), seconds(without)
    saved = (n + 1) / 2
    lines = (
        f"largest difference {tiny(error)}",
        f"{n} tokens one by one: {times[0]:.2f} s with the cache, {times[1]:.2f} s without",
    )

    def picture(path):
        tokens = np.arange(1, n + 1)
        with figure(path, size=(7, 3)) as axes:
            axes.plot(tokens, tokens * (tokens + 1) / 2, label="without: all queries again")
            axes.plot(tokens, tokens, label="with: the new query only")
            axes.set(title="A token costs one query with the cache, and a triangle of pairs without")
            axes.set(xlabel="tokens so far", ylabel="pairs computed for the next token", yscale="log")

    says = f"one query a token instead of {saved:.0f} on average, over {n} tokens; they differ by {tiny(error)}"
    return Finding(error, says, most=1e-4, picture=picture, lines=lines)


def sharing_and_latents_make_the_cache_small(seed=0):
    """Grouped-query, multi-query and latent attention keep less of each token, at the sizes of the published models."""
    rows = {}
    for name, config in ARCHITECTURES.items():
        layers, heads, dim = config.num_hidden_layers, config.num_attention_heads, config.head_dim
        if config.kv_lora_rank is None:
            own, latent = 2 * dim, None
            kept = 2 * config.num_key_value_heads * dim
        else:
            own = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
            latent = kept = config.kv_lora_rank + config.qk_rope_head_dim
        rows[name] = [2 * layers * numbers for numbers in (heads * own, own, kept)] + [latent is not None]
    lines = [f"{'bytes a token':14}{'multi-head':>12}{'multi-query':>13}{'as published':>14}"]
    for name, (every, one, kept, latent) in rows.items():
        how = "latent" if latent else "grouped-query"
        lines.append(f"{name:14}{every:12,}{one:13,}{kept:14,}  {how}, {every / kept:.0f} times less than multi-head")

    def picture(path):
        with figure(path, size=(8, 3.4)) as axes:
            for i, kind in enumerate(("every head its own", "one for all heads", "as published")):
                values = [row[i] for row in rows.values()]
                axes.bar(np.arange(len(rows)) + 0.27 * (i - 1), values, 0.25, label=kind, hatch=("", "//", "")[i])
            axes.set_xticks(range(len(rows)), rows)
            axes.set(title="What each of the six keeps of a token: sharing and latents make it small")
            axes.set(ylabel="bytes, bfloat16", yscale="log")

    least = min(every / kept for every, _, kept, _ in rows.values())
    most = max(every / kept for every, _, kept, _ in rows.values())
    return Finding(
        least, f"{least:.0f} to {most:.0f} times fewer bytes than multi-head", least=4, picture=picture, lines=lines
    )
