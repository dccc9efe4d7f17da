"""flash.cu: it compiles, and its kernels compute what attention.py computes, on a GPU or on a stand-in for one."""

import ast
import ctypes
import functools
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_masks import masks

from attention import attention, flash_attention
from engine import flash_cuda as launch
from engine import to_numpy, xp
from masks import PATTERNS, all_of, causal, padding, same_document, sparse, window

root = pathlib.Path(__file__).parents[2]
variants = pytest.mark.parametrize("half, dim", [(half, dim) for half in (False, True) for dim in (32, 64, 128)])


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@variants
def test_every_kernel_compiles_and_fits_the_registers(half, dim, tmp_path):
    kernels = ", ".join(f"(void*){name}" for name in launch.instances(half, dim))
    source = (root / "engine" / "flash.cu").read_text() + f"void* kernels[] = {{{kernels}}};"
    (tmp_path / "kernels.cu").write_text(source)
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    command = ["nvcc", "-fatbin", "-t2", "-Xptxas=-v", *architectures, *launch.options(half, dim), "kernels.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2 * 3, done.stderr


# --- the kernels on the CPU ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@functools.cache
def launchers_on_the_cpu(half, dim, folder):
    """Like launch.launchers, for arrays in main memory and the stand-in of cuda_on_cpu.h."""
    kernels = ", ".join(f"(void*)OnCpu<{name}>::launch" for name in launch.instances(half, dim))
    source = f"""
        #include "{root}/tests/engine/cuda_on_cpu.h"
        #include "{root}/engine/flash.cu"
        Quad shared[MOST_SHARED / sizeof(Quad)];
        extern "C" {{ void* kernels[] = {{{kernels}}}; }}
    """
    library = folder / f"kernels_{half}_{dim}.so"
    defines = [option for option in launch.options(half, dim) if option.startswith("-D")]
    command = ["g++", "-std=c++20", "-O2", "-pthread", "-shared", "-fPIC", *defines, "-xc++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    in_c = {np.ndarray: lambda x: ctypes.c_void_p(x.ctypes.data), np.uintp: lambda x: ctypes.c_void_p(int(x))}
    in_c |= {np.int32: ctypes.c_int, np.float32: ctypes.c_float}

    def launcher(address, shared_bytes):
        def run(grid, arguments):
            sizes = [ctypes.c_int(x) for x in (*grid, launch.THREADS, shared_bytes)]
            arguments = sizes + [in_c[type(x)](x) for x in arguments]
            ctypes.CFUNCTYPE(None, *map(type, arguments))(address)(*arguments)

        return run

    addresses = (ctypes.c_void_p * 3).in_dll(ctypes.CDLL(library), "kernels")
    return [launcher(*each) for each in zip(addresses, launch.shared_bytes(half, dim))]


@pytest.fixture
def on_the_cpu(folder, monkeypatch):
    if xp is not np or not shutil.which("g++"):
        pytest.skip("needs NumPy's arrays and g++")
    monkeypatch.setattr(launch, "launchers", lambda half, dim: launchers_on_the_cpu(half, dim, folder))


@st.composite
def masks_of_many_tiles(draw, batch, keys):
    """Like test_masks.masks, with windows, blocks, padding and documents as long as tiles."""
    rng, maybe = np.random.default_rng(draw(st.integers(0))), st.booleans()
    parts = [causal] if draw(maybe) else []
    parts += [window(draw(st.integers(1, 140)))] if draw(maybe) else []
    parts += [sparse(draw(st.sampled_from(sorted(PATTERNS))), 2, draw(st.integers(10, 70)))] if draw(maybe) else []
    parts += [left_padding(keys, rng.integers(0, keys + 1, batch))] if draw(maybe) else []
    parts += [same_document(xp.asarray(np.sort(rng.integers(0, 4, (batch, keys)))))] if draw(maybe) else []
    return all_of(*parts)


def left_padding(keys, first):
    return padding(xp.asarray(np.arange(keys) >= np.array(first)[:, None]))


@st.composite
def problems(draw):
    """(rows of the batch, kv_heads, heads a key head serves, queries, keys before the first query), mask"""
    most = (2, 1), (2, 1), (2, 1), (150, 1), (50, 0)
    sizes = tuple(draw(st.integers(low, high)) for high, low in most)
    kinds = masks(sizes[0], sum(sizes[3:])) | masks_of_many_tiles(sizes[0], sum(sizes[3:]))
    return sizes, draw(kinds)


# several tiles of everything, and a row that is all padding
LARGE = (2, 1, 2, 135, 15), causal & window(70) & left_padding(150, (20, 150))


@pytest.mark.parametrize("place", ["a GPU", "the CPU"])
@variants
def test_the_kernels_compute_flash_attention(half, dim, place, request):
    dtype, tolerance = (np.float16, 2e-3) if half else (np.float32, 1e-5)
    some = xp.ones((1, 1, 1, dim), dtype)
    if place == "the CPU":
        request.getfixturevalue("on_the_cpu")
    elif not launch.usable(some, some):
        pytest.skip("needs a GPU")

    @settings(max_examples=1 if half else 4, deadline=None)
    @given(problems(), st.sampled_from([None, 0.1]), st.integers(0))
    @example(LARGE, None, 0)
    def check(problem, scale, seed):
        (batch, kv_heads, group, queries, before), mask = problem
        rng, heads, keys = np.random.default_rng(seed), kv_heads * group, before + queries
        # heads and time change places, as in a model: the arrays are not contiguous
        shapes = [(batch, queries, heads), (batch, keys, kv_heads), (batch, keys, kv_heads), (batch, queries, heads)]
        arrays = [rng.standard_normal((*shape, dim)).astype(dtype).swapaxes(1, 2) for shape in shapes]
        *exact, exact_dy = (xp.asarray(x.astype(np.float64)) for x in arrays)
        y, backward = attention(*exact, mask, scale=scale)
        expected = [to_numpy(x) for x in (y, *backward(exact_dy))]
        q, k, v, dy = (xp.asarray(x) for x in arrays)
        y, backward = launch.flash_attention(q, k, v, mask, scale)
        found = [to_numpy(x) for x in (y, *backward(dy))]
        for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == dtype
            error = abs(ours - theirs).max() / max(abs(theirs).max(), 1)
            assert error < tolerance, f"{name} is {error:.1e} away from the textbook's"

    check()


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(), st.integers(0, 10))
@example(LARGE, 1)
@example(((1, 1, 1, 10, 90), causal & window(20)), 0)
def test_tiles_that_no_query_of_a_tile_sees_are_not_read(on_the_cpu, problem, which):
    (batch, kv_heads, group, queries, before), mask = problem
    keys, of_q, of_kv = (
        before + queries,
        (batch, kv_heads * group, queries, 32),
        (batch, kv_heads, before + queries, 32),
    )
    q, k, v, dy = (np.random.default_rng(0).standard_normal(s, np.float32) for s in (of_q, of_kv, of_kv, of_q))
    pairs = np.ones((queries, keys), bool) if mask is None else mask.matrix(queries, keys)
    pairs = np.broadcast_to(pairs, (batch, 1, queries, keys))[:, 0]

    def tile(time, cols):
        start = which % -(-time // cols) * cols
        return slice(start, start + cols)

    def is_read(array, rows, sees):
        """What is not a number spreads where it is read: over the tiles of which some see it, and not over others."""
        for start in range(0, array.shape[2], rows):
            lost = np.isnan(array[:, :, start : start + rows]).all(axis=(1, 2, 3))
            assert (lost == np.isnan(array[:, :, start : start + rows]).any(axis=(1, 2, 3))).all()
            assert (lost == sees[:, start : start + rows].any(axis=(1, 2))).all()

    forward, backward_q, backward_kv = launch.TILES[False, 32]
    y, backward = launch.flash_attention(q, k, v, mask)
    passing = tile(keys, backward_q[1])
    clean = k[:, :, passing].copy(), v[:, :, passing].copy()
    k[:, :, passing] = v[:, :, passing] = np.nan  # the arrays that backward reads, too
    is_read(backward(dy)[0], backward_q[0], pairs[:, :, passing])
    passing = tile(keys, forward[1])
    is_read(launch.flash_attention(q, k, v, mask)[0], forward[0], pairs[:, :, passing])
    k[:, :, passing], v[:, :, passing] = clean
    passing = tile(queries, backward_kv[1])
    q[:, :, passing] = dy[:, :, passing] = np.nan
    for gradient in backward(dy)[1:]:
        is_read(gradient, backward_kv[0], pairs[:, passing].swapaxes(1, 2))


def test_flash_attention_comes_here_by_itself(monkeypatch):
    monkeypatch.setattr(launch, "usable", lambda q, v: q.dtype == np.float32)
    monkeypatch.setattr(launch, "flash_attention", lambda *arguments: arguments)
    x = xp.ones((1, 1, 2, 32), np.float32)
    given = flash_attention(x, x, x, causal, scale=2)
    assert all(one is other for one, other in zip(given, (x, x, x, causal, 2), strict=True))
    double = x.astype(np.float64)
    for other in (double, {}), (x, {"bias": lambda q, k: xp.zeros((1, 2, 2), np.float32)}), (x, {"observe": {}}):
        y, _ = flash_attention(*[other[0]] * 3, causal, **other[1])
        assert y.shape == x.shape


# --- CuPy in the place of NumPy ---


def test_cupy_has_every_name_that_is_asked_of_xp():
    cupy = pytest.importorskip("cupy")
    names = set()
    for module in [*root.glob("*.py"), *root.glob("engine/*.py"), *root.glob("lab/*.py")]:
        for node in ast.walk(ast.parse(module.read_text())):
            path = []
            while isinstance(node, ast.Attribute):
                path.insert(0, node.attr)
                node = node.value
            if path and isinstance(node, ast.Name) and node.id == "xp":
                names.add((module.name, *path))
    assert len(names) > 50
    missing = {name for name in names if not _has(cupy, name[1:])}
    assert not missing


def _has(value, path):
    return not path or hasattr(value, path[0]) and _has(getattr(value, path[0]), path[1:])
