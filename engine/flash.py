"""Flash attention at speed, on the cores of a CPU. attention.textbook_flash_attention is what it computes; here

- a plan says which tiles some pair sees, and which every pair: empty ones are skipped, and full ones need no mask;
- heads that share a key-value head are more rows of one product, and short sequences share one tile;
- a tile of scores is (keys, queries): NumPy finds the largest down a column three times as fast as along a row;
- the cores share the tiles of long sequences.

A mask is anything with `sees`, `tile` and `grain`, as masks.Mask has them. On a GPU, flash.cu does the same.
"""

from functools import lru_cache

from engine import flash_cuda
from engine.backend import np, xp
from engine.flash_plan import Everywhere, grid
from engine.threads import in_parallel


@lru_cache(maxsize=64)
def plan(mask, queries, keys, height, width, unit):
    """The tiles: [(rows, [(cols, every), ...]), ...]. rows is a slice of `height` queries, cols the keys that some of
    them see, `width` at a time, a slice or, where they lie apart, an array of indices; every: whether each of them sees
    all of cols. The mask is asked for `height` queries by `unit` keys at a time.
    """
    mask = mask or Everywhere
    if mask.grain > 1:
        height = unit = mask.grain
    some, every = grid(mask.tile, mask.grain, keys, keys - queries, height, 0, unit)
    tiles = []
    for i, start in enumerate(range(0, queries, height)):
        columns = []
        for full in True, False:
            units = np.flatnonzero(some[i] & (every[i] == full))
            seen = (units[:, None] * unit + np.arange(unit)).reshape(-1)
            seen = seen[seen < keys]
            for part in np.split(seen, range(width, len(seen), width)) if len(seen) else ():
                together = part[-1] - part[0] == len(part) - 1
                columns.append((slice(int(part[0]), int(part[-1]) + 1) if together else xp.asarray(part), full))
        nothing = [(slice(0, 1), False)]  # a tile that the mask hides
        tiles.append((slice(start, min(start + height, queries)), columns or nothing))
    return tiles


def length(cols):
    return cols.stop - cols.start if isinstance(cols, slice) else len(cols)


def attention(q, k, v, mask, bias=None, scale=None, observe=None, block=None):
    """As attention.flash_attention. block: queries and keys of a tile; None: what is fastest."""
    if bias is None and observe is None and block is None and flash_cuda.usable(q, v):
        return flash_cuda.flash_attention(q, k, v, mask, scale)
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group, v_dim = heads // kv_heads, v.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    mask, offset = mask or Everywhere, keys - queries
    # In long sequences a tile holds one head, in short ones all of them; few queries take more keys, so that Python has
    # little to do.
    long = queries > 1024
    height = block or (max(64, 128 // group) if long else 64)
    width = max(block or (1024 if long or mask.grain > 1 else 256), height * 256 // max(1, queries))
    tiles = plan(mask, queries, keys, height, width, block or 64)
    every_head = [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(kv_heads)]
    parts = every_head if long else [(slice(None), slice(None))]
    jobs = [(b, h, rows, columns) for b, h in parts for rows, columns in tiles]
    work = batch * heads * sum((rows.stop - rows.start) * length(c) for rows, columns in tiles for c, _ in columns)
    spread = in_parallel if work >= 2**23 else lambda function, jobs: [function(jobs)]

    # a head is then (kv_head, member of its group): views, as one axis is split
    by_group = lambda x: x.reshape(batch, kv_heads, group, *x.shape[2:])
    q_groups = by_group(q)

    def fold(x, b, h, rows):
        part = x[b, h, :, rows]
        return part.reshape(*part.shape[:2], -1, part.shape[-1])  # (batch, kv_heads, group · rows, dim)

    def tile_scores(k, q_tile, b, h, rows, cols, full):
        scores = k[b, h, cols] @ q_tile.swapaxes(-1, -2)  # (batch, kv_heads, cols, group · rows)
        if full and bias is None:
            return scores
        by_head = scores.reshape(*scores.shape[:3], group, -1)  # a view
        query = xp.arange(offset + rows.start, offset + rows.stop)[None]
        key = (xp.arange(cols.start, cols.stop) if isinstance(cols, slice) else cols)[:, None]
        if bias is not None:
            of_heads = bias(query, key).reshape(kv_heads, group, *by_head.shape[2::2])  # (…, cols, rows)
            by_head += of_heads[h].swapaxes(1, 2)
        if not full:
            seen = mask.sees(query, key)  # (cols, rows), or (batch, 1, cols, rows)
            seen = seen[b, :, :, None] if seen.ndim == 4 else seen[:, None]
            by_head += xp.where(seen, xp.zeros((), q.dtype), -xp.inf)
        return scores

    y = by_group(xp.empty_like(q, shape=(batch, heads, queries, v_dim)))
    log_sum, top = (xp.empty((batch, kv_heads, group, queries), q.dtype) for _ in range(2))  # L, and the final m

    def forward(jobs):
        for b, h, rows, columns in jobs:
            q_tile = fold(q_groups, b, h, rows) * scale
            m, l, o = xp.finfo(q.dtype).min / 2, None, None  # m is finite: -inf - -inf is not a number
            for cols, full in columns:
                p = tile_scores(k, q_tile, b, h, rows, cols, full)
                larger = xp.maximum(m, p.max(axis=-2))
                p -= larger[..., None, :]
                xp.exp(p, out=p)
                l_tile, o_tile = p.sum(axis=-2), p.swapaxes(-1, -2) @ v[b, h, cols]
                if o is not None:  # in the first tile there is nothing to shrink
                    shrink = xp.exp(m - larger)
                    l_tile += shrink * l
                    o *= shrink[..., None]
                    o_tile += o
                m, l, o = larger, l_tile, o_tile
            l = xp.where(l == 0, 1, l)  # a query that sees no key keeps o = 0
            o /= l[..., None]
            shape = (*m.shape[:2], group, -1)
            y[b, h, :, rows] = o.reshape(*shape, v_dim)
            log_sum[b, h, :, rows] = (m + xp.log(l)).reshape(shape)
            top[b, h, :, rows] = m.reshape(shape)

    spread(forward, jobs)
    if observe is not None:
        observe["max_logits"] = top.max(axis=(0, 3)).reshape(heads)

    def backward(dy):
        dy, dq = by_group(dy), by_group(xp.empty_like(q))
        along = xp.einsum("bhgnd,bhgnd->bhgn", dy, y)  # D
        # [q, -L] · [k, 1] = q·k - L: a column of ones lets the product of a tile subtract; so with dy, D and v
        k_one, v_one = (xp.concatenate([x, xp.ones((*x.shape[:3], 1), x.dtype)], axis=-1) for x in (k, v))

        def part(jobs):
            dk, dv = xp.zeros_like(k), xp.zeros_like(v)
            for b, h, rows, columns in jobs:
                q_tile, dy_tile = fold(q_groups, b, h, rows) * scale, fold(dy, b, h, rows)
                minus = [-x[b, h, :, rows].reshape(*q_tile.shape[:3], 1) for x in (log_sum, along)]
                q_minus, dy_minus = (xp.concatenate(pair, axis=-1) for pair in zip((q_tile, dy_tile), minus))
                dq_tile = xp.zeros_like(q_tile)
                for cols, full in columns:
                    p = tile_scores(k_one, q_minus, b, h, rows, cols, full)
                    xp.exp(p, out=p)
                    dv[b, h, cols] += p @ dy_tile
                    dscores = v_one[b, h, cols] @ dy_minus.swapaxes(-1, -2)
                    dscores *= p
                    dq_tile += dscores.swapaxes(-1, -2) @ k[b, h, cols]
                    dk[b, h, cols] += dscores @ q_tile
                dq_tile *= scale
                dq[b, h, :, rows] = dq_tile.reshape(*dq_tile.shape[:2], group, -1, dim)
            return dk, dv

        (dk, dv), *others = spread(part, jobs)
        for dk_other, dv_other in others:
            dk += dk_other
            dv += dv_other
        return dq.reshape(q.shape), dk, dv

    return y.reshape(batch, heads, queries, v_dim), backward
