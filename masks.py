"""Variantes de atención: masks, that is, which tokens see which; sparse attention among them.

Full attention compares each of n queries with each of n keys. Sparse attention does so for a subset only, chosen
by fixed patterns, windows or at random, and what is not seen is not computed (engine/flash.py):

    causal          itself and what came before                     n²/2 pairs
    window          what is less than `size` places away            O(n · size)
    strided, fixed  neighbours, and far away every stride-th        O(n √n) for a stride that grows as √n
    bigbird         neighbours, the first, and some at random       O(n)

The same object says which tokens are padding and which belong to another text, and masks combine:

    >>> from masks import causal, window
    >>> (causal & window(2)).matrix(queries=4, keys=4).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])

Shapes: queries and keys are told by their positions, from 0 on; a mask as a matrix is (queries, keys).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, reduce

from engine import np, to_numpy, xp


@dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom. `a & b` is the mask of the pairs that both let see.

    sees(query, key) -> booleans: of positions, arrays of integers that broadcast, such as (queries, 1) and (1, keys).
        Where the rows of a batch differ, the booleans are (batch, 1, queries, keys).
    tile(q0, q1, k0, k1) -> (some, every): flash attention works on tiles, rectangles of queries × keys. Of many tiles
        at once, with queries q0 to q1, (tiles, 1), and keys k0 to k1, (1, tiles), ends included: whether any pair is
        seen, so that empty tiles are left out, and whether every pair is, so that full ones need no mask. Where it is
        not sure it answers (True, False), which costs time and no correctness.
    grain: the edges of tiles have to be multiples of this.
    """

    sees: Callable
    tile: Callable
    grain: int = 1

    def __and__(self, other):
        def tile(*corners):
            (some, every), (other_some, other_every) = self.tile(*corners), other.tile(*corners)
            return some & other_some, every & other_every

        sees = lambda query, key: self.sees(query, key) & other.sees(query, key)
        return Mask(sees, tile, math.lcm(self.grain, other.grain))

    def matrix(self, queries, keys):
        """Booleans, (queries, keys) or (batch, 1, queries, keys); the queries are the last of the keys."""
        return self.sees(xp.arange(keys - queries, keys)[:, None], xp.arange(keys)[None])


@lru_cache(maxsize=32)
def all_of(*masks):
    """The mask of the pairs that every one of the masks lets see, the same object for the same masks. None, which means
    everywhere, if there are no masks.
    """
    return reduce(Mask.__and__, masks) if masks else None


# a token sees itself and what came before
causal = Mask(lambda query, key: key <= query, lambda q0, q1, k0, k1: (k0 <= q1, k1 <= q0))


@lru_cache
def window(size):
    """Sliding window: only keys less than `size` tokens away, the query itself included; with `causal`, the last `size`
    tokens. O(n · size).
    """

    def tile(q0, q1, k0, k1):
        nearest, farthest = np.maximum(k0 - q1, q0 - k1), np.maximum(k1 - q0, q1 - k0)
        return nearest < size, farthest < size

    return Mask(lambda query, key: abs(query - key) < size, tile)


def padding(real):
    """Only real tokens are seen. real: (batch, keys) booleans, False for the tokens that fill a row up."""
    before = np.pad(to_numpy(real).cumsum(axis=1), ((0, 0), (1, 0)))  # (batch, keys + 1): real ones before each key

    def tile(q0, q1, k0, k1):
        count, size = before[:, k1 + 1] - before[:, k0], k1 + 1 - k0
        return (count > 0).any(axis=0), (count == size).all(axis=0)

    return Mask(lambda query, key: real[:, None][..., key] & (query == query), tile)  # all True: broadcasts


def same_document(ids):
    """Only tokens of the query's own text are seen, where several texts share a row. ids: (batch, keys), the number of
    the text that each token belongs to, and 0 for padding. Where they ascend, the padding last, whole tiles can be
    skipped; any order is right.
    """
    order = to_numpy(ids)
    order = np.where(order == 0, order.max(initial=0) + 1, order)
    ascends = bool((np.diff(order, axis=1) >= 0).all())  # then a tile is told by its ends

    def tile(q0, q1, k0, k1):
        first, last = np.maximum(order[:, q0], order[:, k0]), np.minimum(order[:, q1], order[:, k1])
        every = (order[:, q0] == order[:, k1]) & (order[:, q1] == order[:, k0])
        return (first <= last).any(axis=0) | (not ascends), every.all(axis=0) & ascends

    rows = ids[:, None]
    return Mask(lambda query, key: rows[..., query] == rows[..., key], tile)


# Sparse attention: whether a block of queries i sees a block of keys j. i and j: arrays of block numbers


def windowed(i, j, stride):
    """Blocks less than `stride` blocks away: O(n)."""
    return abs(i - j) < stride


def strided(i, j, stride):
    """The same, and every stride-th block (Child et al. 2019): O(n √n) for a stride of √blocks."""
    return windowed(i, j, stride) | ((i - j) % stride == 0)


def fixed(i, j, stride):
    """The blocks of its own span of `stride` blocks, and the last block of every span (Child et al. 2019): O(n √n) for
    a stride of √blocks.
    """
    return (i // stride == j // stride) | (j % stride == stride - 1)


def bigbird(i, j, stride, global_blocks, random_blocks, seed):
    """Blocks less than `stride` away, the first `global_blocks`, which see all, too, and `random_blocks` at random:
    O(n) (Zaheer et al. 2020; without the random ones Longformer, Beltagy et al. 2020). These are drawn, unlike in the
    paper, from the blocks up to i, so that a causal mask leaves them; some may coincide.
    """
    drawn = np.array([draw(block, random_blocks, seed) for block in range(np.max(i) + 1)])[i]  # (..., random_blocks)
    anchored = (j < global_blocks) | (i < global_blocks)
    return windowed(i, j, stride) | anchored | (drawn == j[..., None]).any(axis=-1)


@cache
def draw(block, count, seed):
    return np.random.default_rng((seed, block)).integers(0, block + 1, count)


PATTERNS = {"window": windowed, "strided": strided, "fixed": fixed, "bigbird": bigbird}


@lru_cache
def sparse(kind, stride=4, block=64, global_blocks=1, random_blocks=2, seed=0):
    """The mask of a pattern of PATTERNS over blocks of `block` tokens ("window" counts in blocks, `window` in tokens).
    The last three are bigbird's alone.
    """
    options = (global_blocks, random_blocks, seed) if kind == "bigbird" else ()
    pattern = lambda i, j: PATTERNS[kind](*np.broadcast_arrays(i // block, j // block), stride, *options)

    def tile(q0, q1, k0, k1):
        seen = pattern(q0, k0)
        one_block = (q0 // block == q1 // block) & (k0 // block == k1 // block)
        return seen | np.logical_not(one_block), seen & one_block

    return Mask(lambda query, key: xp.asarray(pattern(to_numpy(query), to_numpy(key))), tile, grain=block)
