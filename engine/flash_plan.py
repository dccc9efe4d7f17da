"""A mask as the kernels of flash.cu take it: for each tile that stays, of queries or of keys, the tiles of the others
that pass by and of which some pair is seen, and bits where some are not. The mask is asked for single pairs there only.

A mask is anything with `sees`, `tile` and `grain`, as masks.Mask has them; None is everywhere.
"""

from functools import lru_cache

from engine.backend import np, to_numpy, xp


class Everywhere:
    """The mask None."""

    sees, tile, grain = lambda q, k: (q == q) & (k == k), lambda *corners: (True, True), 1


# kinds of tiles: no pair is seen, every pair is; others are mixed: 0, and then the number of their bits
EMPTY, FULL = -2, -1
PAIRS = 2**20  # looked at at once


def cut(begin, end, size, grain):
    """Positions from begin to before end, cut every `size` and at the multiples of grain: the first and the last one of
    each part, and which parts begin a tile of `size`."""
    tiles = parts = np.arange(begin, end, size)
    if grain > 1:
        parts = np.union1d(tiles, np.arange(begin - begin % grain + grain, end, grain))
    return parts, np.append(parts[1:], end) - 1, np.searchsorted(parts, tiles)


@lru_cache(maxsize=32)
def plan(mask, queries, keys, rows, cols, keys_stay=False):
    """Returns starts, tiles, bits and plans, where plans is 1, or the rows of the batch if their masks differ.

    starts: (plans · tiles that stay + 1,), where the tiles of each begin in tiles: (n, 2), the number of a tile that
    passes, and FULL or that of its bits. bits: (tables, rows · words), for each pair a bit, which is 0 behind the end.
    """
    mask, first_query = mask or Everywhere, keys - queries
    begin, begin_passing = (0, first_query) if keys_stay else (first_query, 0)
    query_and_key = lambda staying, passing: (passing, staying) if keys_stay else (staying, passing)

    def look(i, j):
        """At all pairs of tiles i and j, (n, 1, 1) each. Returns their kinds (plans, n) and bits."""
        row, col = xp.arange(rows)[:, None], xp.arange(-(-cols // 32) * 32)  # of whole words
        row, position = begin + i * rows + row, begin_passing + j * cols + col
        # what lies behind the end of the staying rows is not stored, so that any bits will do
        seen = mask.sees(*query_and_key(xp.minimum(row, keys - 1), xp.minimum(position, keys - 1)))
        seen = seen.reshape(-1, *seen.shape[-3:]) & (position < keys) & (col < cols)  # (plans, n, rows, col)
        bits = xp.packbits(seen.ravel(), bitorder="little").view(np.uint32).reshape(*seen.shape[:2], -1)
        some, every = seen.any(axis=(2, 3)), seen[..., :cols].all(axis=(2, 3))
        return to_numpy(EMPTY * ~some + FULL * every), bits

    row, last_row, staying = cut(begin, keys, rows, mask.grain)
    col, last_col, passing = cut(begin_passing, keys, cols, mask.grain)
    (q0, k0), (q1, k1) = query_and_key(row[:, None], col[None]), query_and_key(last_row[:, None], last_col[None])
    some, every = (np.broadcast_to(x, (len(row), len(col))) for x in mask.tile(q0, q1, k0, k1))
    some = np.logical_or.reduceat(np.logical_or.reduceat(some, staying), passing, axis=1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(every, staying), passing, axis=1)
    every[:, -1] &= (keys - begin_passing) % cols == 0
    kinds, bits = (
        (EMPTY * ~some + FULL * every)[None],
        xp.zeros(0, np.uint32),
    )  # (plans, tiles that stay, tiles that pass)
    mixed, step = np.argwhere(kinds[0] == 0), max(1, PAIRS // (rows * cols))
    if len(mixed):
        looks = [look(*xp.asarray(mixed[n : n + step].T[:, :, None, None])) for n in range(0, len(mixed), step)]
        found, bits = np.concatenate([x for x, _ in looks], axis=1), xp.concatenate([x for _, x in looks], axis=1)
        kinds, bits = kinds.repeat(len(found), axis=0), bits[xp.asarray(found == 0)]
        kinds[:, mixed[:, 0], mixed[:, 1]] = found
        kinds[kinds == 0] = np.arange(len(bits))  # in the order in which they were found
    pass_by = kinds != EMPTY
    starts = np.append(0, np.cumsum(pass_by.sum(axis=2)))
    tiles = np.stack([np.nonzero(pass_by)[2], kinds[pass_by]], axis=1)
    return xp.asarray(starts, np.int32), xp.asarray(tiles, np.int32), bits, np.int32(len(kinds))
