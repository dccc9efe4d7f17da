"""Launches the kernels of flash.cu: flash attention for arrays on a GPU, in float32 or, on the tensor cores, in
float16. flash.attention comes here by itself, so that nobody has to choose.
"""

import functools
import pathlib

from engine.backend import np, xp
from engine.flash_plan import plan

THREADS = 128  # of a block, as in flash.cu
FORWARD, BACKWARD_Q, BACKWARD_KV = range(3)  # the kernels

# (float16?, dim) -> (rows, columns) of a tile in forward, backward_q and backward_kv: as large as the registers hold
TILES = {
    (False, 32): ((128, 32), (64, 32), (64, 32)),
    (False, 64): ((128, 32), (64, 32), (64, 32)),
    (False, 128): ((64, 32), (64, 32), (64, 32)),
    (True, 32): ((128, 64), (128, 64), (64, 64)),
    (True, 64): ((128, 64), (128, 64), (64, 64)),
    (True, 128): ((128, 48), (128, 32), (64, 64)),
}


def options(half, dim):
    # -ftz: denormals become zeros, or each exp2f would be four instructions
    return ("-std=c++17", "-ftz=true", f"-DDIM={dim}") + ("-DHALF",) * half


def instances(half, dim):
    names = "forward", "backward_q", "backward_kv"
    return [f"{name}<{rows}, {cols}>" for name, (rows, cols) in zip(names, TILES[half, dim])]


def shared_bytes(half, dim):
    """Of each kernel: tiles that stay, two that pass, two on their way, p between threads, L and D."""
    sizes, tile_row = [], dim * (2 if half else 4) + 16  # with its padding
    for (rows, cols), staying, sums in zip(TILES[half, dim], (1, 2, 2), (0, 0, 2)):
        scratch = 0 if half else rows * (cols + 8) * 4
        sizes.append(scratch + (staying * rows + 4 * cols) * tile_row + 2 * sums * cols * 4)
    return sizes


@functools.cache
def launchers(half, dim):
    """forward, backward_q and backward_kv, each a function (grid, arguments) -> None."""
    code = pathlib.Path(__file__).with_name("flash.cu").read_text("utf-8")
    module = xp.RawModule(code=code, options=options(half, dim), name_expressions=instances(half, dim))

    def launcher(name, size):
        kernel = module.get_function(name)
        kernel.max_dynamic_shared_size_bytes = size  # above 48 KB only if asked for
        return lambda grid, arguments: kernel(grid, (THREADS,), arguments, shared_mem=size)

    return [*map(launcher, instances(half, dim), shared_bytes(half, dim))]


def usable(q, v):
    """Whether `flash_attention` takes these arrays, on this GPU: Ampere (2020) or later, with room for the tiles."""
    kind = bool(q.dtype == np.float16), q.shape[-1]
    if xp is np or kind not in TILES or q.dtype not in (np.float16, np.float32) or v.shape[-1] != kind[1] or not q.size:
        return False
    device = xp.cuda.Device()
    room = device.attributes["MaxSharedMemoryPerBlockOptin"]
    return int(device.compute_capability) >= 80 and max(shared_bytes(*kind)) <= room


def flash_attention(q, k, v, mask, scale=None):
    """attention.flash_attention for arrays that are `usable`.

    Returns y and backward(dy) -> (dq, dk, dv), all in q's dtype.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    half = bool(q.dtype == np.float16)
    q, k, v = (xp.ascontiguousarray(x, q.dtype) for x in (q, k, v))
    sizes = [np.int32(x) for x in (heads // kv_heads, queries, keys)]
    scale = np.float32(dim**-0.5 if scale is None else scale)

    def launch(kernel, *arguments):
        keys_stay = kernel == BACKWARD_KV
        rows, cols = TILES[half, dim][kernel]
        time, count = (keys, kv_heads) if keys_stay else (queries, heads)
        common = q, k, v, *plan(mask, queries, keys, rows, cols, keys_stay), *sizes, scale
        launchers(half, dim)[kernel]((-(-time // rows), count, batch), (*common, *arguments))

    y, L = xp.empty_like(q), xp.empty((batch, heads, queries), np.float32)
    launch(FORWARD, y, L)

    def backward(dy):
        dy = xp.ascontiguousarray(dy, q.dtype)
        D, dq, dk, dv = (xp.empty_like(x) for x in (L, q, k, v))
        launch(BACKWARD_Q, y, dy, L, D, dq)
        launch(BACKWARD_KV, dy, L, D, dk, dv)
        return dq, dk, dv

    return y, backward
