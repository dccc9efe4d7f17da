"""Plans of tiles: what the kernels of flash.cu are told of a mask is what the mask says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import masks

from engine import flash_plan, to_numpy, xp
from engine.flash_plan import FULL, plan
from masks import PATTERNS, Mask, causal, padding, same_document, sparse, window


def unpacked(plan, staying, passing, rows, cols):
    """(plans, tiles that stay · rows, tiles that pass · cols) booleans: the pairs that the plan lets see; and the same,
    1 where they are in a tile without bits, 2 in one with, 0 in none."""
    starts, tiles, bits, plans = (to_numpy(x) if isinstance(x, xp.ndarray) else x for x in plan)
    shape = plans, -(-staying // rows), rows, -(-passing // cols), cols
    seen, kinds = np.zeros(shape, bool), np.zeros(shape, int)
    for i, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        at = divmod(i, shape[1])
        numbers = [number for number, _ in tiles[start:end]]
        assert numbers == sorted(set(numbers))
        for number, of_bits in tiles[start:end]:
            kinds[at][:, number] = 1 if of_bits == FULL else 2
            seen[at][:, number] = True
            if of_bits != FULL:
                words = bits[of_bits].reshape(rows, -1)
                column = np.arange(cols)
                seen[at][:, number] = words[:, column // 32] >> column % 32 & 1
    assert starts[-1] == len(tiles) and len(starts) == plans * shape[1] + 1
    return seen, kinds


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 20), st.sampled_from([4, 8, 12, 40]),
       st.sampled_from([8, 32, 40, 64]), st.booleans(), st.integers(1, 500), st.data())  # fmt: skip
def test_a_plan_lets_see_what_the_mask_lets_see(batch, queries, before, rows, cols, keys_stay, most, data):
    keys = before + queries
    mask = data.draw(st.none() | masks(batch, keys))
    pairs = np.ones((queries, keys), bool) if mask is None else to_numpy(mask.matrix(queries, keys))
    pairs = pairs.reshape(-1, queries, keys)
    pairs = pairs.swapaxes(1, 2) if keys_stay else pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_plan, "PAIRS", most)
        made = plan.__wrapped__(mask, queries, keys, rows, cols, keys_stay)
    seen, kinds = unpacked(made, *pairs.shape[1:], rows, cols)
    assert len(seen) in (1, len(pairs)) and (len(seen) > 1 or (pairs == pairs[0]).all())
    behind = seen.shape[1] * rows - pairs.shape[1], seen.shape[3] * cols - pairs.shape[2]
    # what passes is not seen behind the end; what stays may see what it likes there
    expected = np.pad(pairs[: len(seen)], ((0, 0), (0, behind[0]), (0, behind[1])))
    flat = seen.reshape(expected.shape)
    assert (flat[:, : pairs.shape[1]] == expected[:, : pairs.shape[1]]).all()
    tiles = expected.reshape(seen.shape)
    some = tiles.any(axis=(2, 4), keepdims=True)
    assert ((kinds > 0) == some).all()
    inside = np.arange(len(tiles[0]) * rows).reshape(-1, rows, 1, 1) < pairs.shape[1]
    every = (tiles | ~inside).all(axis=(2, 4), keepdims=True) & some
    assert ((kinds == 1) == every).all()


@pytest.mark.parametrize("keys_stay", [False, True])
@pytest.mark.parametrize("before", [0, 100])
@pytest.mark.parametrize(
    "mask",
    [causal & other for other in (causal, window(200), sparse("window", 90, 2), *(sparse(x, 3, 64) for x in PATTERNS))],
)
def test_pairs_are_looked_at_where_tiles_have_seen_and_unseen_ones(mask, before, keys_stay):
    """The numbers would be the same if all pairs were looked at, but not the time."""
    queries, looked = 1000, []
    sees = lambda query, key: looked.append(np.broadcast_shapes(query.shape, key.shape)) or mask.sees(query, key)
    plan(Mask(sees, mask.tile, mask.grain), queries, before + queries, 128, 64, keys_stay)
    pairs = to_numpy(mask.matrix(queries, before + queries))
    pairs = pairs.T if keys_stay else pairs
    ends = [slice(None, -(-size // tile) * tile) for size, tile in zip(pairs.shape, (128, 64))]
    rows, cols = (np.minimum(np.arange(end.stop), size - 1) for end, size in zip(ends, pairs.shape))
    tiles = pairs[rows[:, None], cols].reshape(len(rows) // 128, 128, len(cols) // 64, 64)
    some, every = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
    every[:, -1] = False  # sticks out
    assert sum(np.prod(shape) for shape in looked) == (some & ~every).sum() * 128 * 64


def test_rows_of_a_batch_have_plans_of_their_own_where_they_differ():
    real = xp.asarray(np.arange(256) >= np.array([[0], [128]]))
    ids = xp.asarray(np.repeat([[1, 1], [1, 2]], 128, axis=1))
    for mask in padding(real), same_document(ids):
        starts, tiles, bits, plans = plan(mask, 256, 256, 64, 64)
        assert plans == 2 and starts.tolist() == [0, 4, 8, 12, 16, 18, 20, 22, 24]
        assert tiles[:, 1].tolist() == [FULL] * 24 and not len(bits)
    assert plan(padding(real[1:]), 256, 256, 64, 64)[3] == 1


def test_one_plan_serves_all_layers():
    assert plan(causal, 64, 64, 32, 32) is plan(causal, 64, 64, 32, 32)
