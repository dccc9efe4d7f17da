"""A stand-in for CuPy, as strict as the real one, so that code for a GPU can be tested where there is none:

    BACKEND=cupy PYTHONPATH="$PWD/tests/standin" python -m pytest -q

NumPy computes. Only what the real CuPy has is there: names.json holds its names and the parameters of each, as
tests/make_standin.py read them off. And it refuses what CuPy refuses:

- a NumPy array in arithmetic, as an argument or as a value to store (numbers and NumPy's scalars pass; array, asarray
  and an index take NumPy arrays, too);
- to become a NumPy array by itself (asnumpy and get() copy it), or an integer (in range, as an index of a list, in a
  shape or a slice);
- lists where an array is meant, dtypes that a GPU does not have, `where` in a reduction or a ufunc, `kind` in a sort.

Whatever is reduced or indexed down to one element is an array of zero dimensions, a view where CuPy gives one.

Where CuPy goes on with something unforeseeable, it is refused as well: an index out of range, an assignment through
indices that come twice with different values. default_rng draws other numbers than NumPy's; empty holds no zeros.

Not promised: rounding, speed, the layout of results, streams, kernels (its device has no shared memory, so that nobody
starts one), and what CuPy has beyond NumPy.
"""

from types import SimpleNamespace

import numpy as np

from ._core import asnumpy as asnumpy
from ._core import function, method, names, ufunc
from ._core import ndarray as ndarray

__version__ = names["version"]


class Generator:
    def __init__(self, bit_generator):
        self._on_host = np.random.Generator(bit_generator)


for _name, _parameters in names["Generator"].items():
    setattr(Generator, _name, method(_name, _parameters))


def _default_rng(seed=None):
    return seed if isinstance(seed, Generator) else Generator(np.random.Philox(seed))


class _Device:
    compute_capability = "00"
    attributes = {"MaxSharedMemoryPerBlockOptin": 0}


def RawModule(*args, **kwargs):
    raise NotImplementedError("the stand-in for CuPy has no kernels")


def fuse(function):
    """Its calls as they are, with arrays and numbers only, by their places."""

    def fused(*arguments):
        for argument in arguments:
            if not isinstance(argument, (ndarray, int, float, np.generic)):
                raise TypeError(f"Invalid argument type for {function.__name__!r}: {type(argument)!r}")
        return function(*arguments)

    return fused


def _functions(group, module):  # an older NumPy may lack some
    return {name: function(module, name, names[group][name]) for name in names[group] if hasattr(module, name)}


linalg = SimpleNamespace(**_functions("linalg", np.linalg))
random = SimpleNamespace(Generator=Generator, default_rng=_default_rng)
cuda = SimpleNamespace(Device=_Device, runtime=SimpleNamespace(getDeviceCount=lambda: 1))
globals().update({name: getattr(np, name) for name in names["of NumPy"] if hasattr(np, name)})
globals().update({name: ufunc(name) for name in names["ufuncs"] if hasattr(np, name)})
globals().update(_functions("functions", np))
