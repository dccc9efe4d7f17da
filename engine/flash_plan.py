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
    each part, and which parts begin a tile of `size`.
    """
    tiles = parts = np.arange(begin, end, size)
    if grain > 1:
        parts = np.union1d(tiles, np.arange(begin - begin % grain + grain, end, grain))
    return parts, np.append(parts[1:], end) - 1, np.searchsorted(parts, tiles)


def grid(tile, grain, keys, first, height, other, width):
    """Of tiles of `height` positions from `first` on and tiles of `width` from `other` on, up to the last of the keys:
    whether some pair is seen, and whether every one is, (tiles, other tiles) each. tile, grain: of a mask.
    """
    row, last_row, rows = cut(first, keys, height, grain)
    col, last_col, cols = cut(other, keys, width, grain)
    some, every = tile(row[:, None], last_row[:, None], col[None], last_col[None])
    joined = lambda of, x: of.reduceat(of.reduceat(np.broadcast_to(x, (len(row), len(col))), rows), cols, axis=1)
    return joined(np.logical_or, some), joined(np.logical_and, every)


@lru_cache(maxsize=32)
def plan(mask, queries, keys, rows, cols, keys_stay=False):
    """Returns starts, tiles, bits and plans, where plans is 1, or the rows of the batch if their masks differ.

    starts: (plans · tiles that stay + 1,), where the tiles of each begin in tiles: (n, 2), the number of a tile that
    passes, and FULL or that of its bits. bits: (tables, rows · words), for each pair a bit, which is 0 behind the end.
    """
    mask, begin, begin_passing = mask or Everywhere, keys - queries, 0
    sees, tile = mask.sees, mask.tile
    if keys_stay:
        begin, begin_passing = begin_passing, begin
        sees, tile = lambda key, query: mask.sees(query, key), lambda k0, k1, q0, q1: mask.tile(q0, q1, k0, k1)

    def look(i, j):
        """At all pairs of tiles i and j, (n, 1, 1) each. Returns their kinds (plans, n) and bits."""
        row, col = xp.arange(rows)[:, None], xp.arange(-(-cols // 32) * 32)  # of whole words
        row, position = begin + i * rows + row, begin_passing + j * cols + col
        # what lies behind the end of the staying rows is not stored, so that any bits will do
        seen = sees(xp.minimum(row, keys - 1), xp.minimum(position, keys - 1))
        seen = seen.reshape(-1, *seen.shape[-3:]) & (position < keys) & (col < cols)  # (plans, n, rows, col)
        bits = xp.packbits(seen.ravel(), bitorder="little").view(np.uint32).reshape(*seen.shape[:2], -1)
        some, every = seen.any(axis=(2, 3)), seen[..., :cols].all(axis=(2, 3))
        return to_numpy(EMPTY * ~some + FULL * every), bits

    some, every = grid(tile, mask.grain, keys, begin, rows, begin_passing, cols)
    every[:, -1] &= (keys - begin_passing) % cols == 0
    # kinds: (plans, tiles that stay, tiles that pass)
    kinds, bits = (EMPTY * ~some + FULL * every)[None], xp.zeros(0, np.uint32)
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
