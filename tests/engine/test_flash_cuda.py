"""flash.cu: it compiles, and its kernels compute what attention.py computes, on a GPU or on a stand-in for one."""

import ast
import ctypes
import functools
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import masks
from attention import flash_attention
from engine import flash_cuda as launch
from engine import to_numpy, xp

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


# rows of the batch, kv_heads, heads a key head serves, queries, keys before the first query
sizes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 90), st.integers(0, 50))
windows = st.none() | st.integers(1, 140)
paddings = st.none() | st.tuples(st.integers(0, 140), st.integers(0, 140))


@pytest.mark.parametrize("place", ["a GPU", "the CPU"])
@variants
def test_the_kernels_compute_flash_attention(half, dim, place, folder):
    dtype, tolerance = (np.float16, 2e-3) if half else (np.float32, 1e-5)
    some = xp.ones((1, 1, 1, dim), dtype)
    if place == "a GPU" and not launch.usable(some, some) or place == "the CPU" and not shutil.which("g++"):
        pytest.skip(f"needs {'a GPU' if place == 'a GPU' else 'g++'}")
    here = xp if place == "a GPU" else np

    # the example has several tiles of everything, and a row that is all padding
    @settings(max_examples=1 if half else 3, deadline=None)
    @given(
        sizes, st.booleans(), st.none() | st.integers(1, 140), paddings, st.sampled_from([None, 0.5]), st.integers(0)
    )
    @example((2, 1, 2, 135, 15), True, 70, (20, 150), None, 0)
    def check(sizes, causal, window, padding, scale, seed):
        batch, kv_heads, group, queries, before = sizes
        rng, heads, keys = np.random.default_rng(seed), kv_heads * group, before + queries
        # heads and time change places, as in a model: the arrays are not contiguous
        shapes = [(batch, queries, heads), (batch, keys, kv_heads), (batch, keys, kv_heads), (batch, queries, heads)]
        q, k, v, dy = (rng.standard_normal((*shape, dim)).astype(dtype).swapaxes(1, 2) for shape in shapes)
        first_key = None if padding is None else np.minimum(padding[:batch], keys).astype(np.int32)

        real = None if padding is None else xp.asarray(np.arange(keys) >= first_key[:, None])
        exact = [xp.asarray(x.astype(np.float64)) for x in (q, k, v, dy)]
        parts = [masks.causal] if causal else []
        parts += [] if window is None else [masks.window(window)]
        parts += [] if real is None else [masks.padding(real)]
        y, backward = flash_attention(*exact[:3], masks.both(parts), scale=scale)
        expected = [to_numpy(x) for x in (y, *backward(exact[3]))]

        q, k, v, dy = (here.asarray(x) for x in (q, k, v, dy))
        first_key = None if padding is None else here.asarray(first_key)
        y, backward = launch.flash_attention(q, k, v, causal, window, first_key, scale)
        found = [to_numpy(x) for x in (y, *backward(dy))]
        for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == dtype
            error = abs(ours - theirs).max() / max(abs(theirs).max(), 1)
            assert error < tolerance, f"{name} is {error:.1e} away from NumPy's"

    with pytest.MonkeyPatch.context() as patch:
        if here is np:
            patch.setattr(launch, "xp", np)
            patch.setattr(launch, "launchers", lambda half, dim: launchers_on_the_cpu(half, dim, folder))
        check()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_tiles_that_no_query_of_a_tile_sees_are_not_read(folder, monkeypatch):
    monkeypatch.setattr(launch, "xp", np)
    monkeypatch.setattr(launch, "launchers", lambda half, dim: launchers_on_the_cpu(half, dim, folder))
    rows = launch.TILES[False, 32][0][0]
    # keys before `start` are out of reach of all queries, those from `stop` on of the first tile's queries, and what is
    # not a number spreads where it is read
    cases = (10, 100, 20, 0, 71, 100), (rows + 9, rows + 9, None, 32, 32, rows)
    for queries, keys, window, padding, start, stop in cases:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, 1, time, 32), np.float32) for time in (queries, keys, keys))
        for x in k, v:
            x[:, :, :start] = x[:, :, stop:] = np.nan
        y, backward = launch.flash_attention(q, k, v, True, window, np.array([padding], np.int32))
        dq, _, _ = backward(np.ones_like(q))
        assert np.isfinite(y[:, :, :rows]).all()
        assert np.isfinite(dq[:, :, : launch.TILES[False, 32][1][0]]).all()


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
