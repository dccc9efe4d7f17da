"""The arrays, the ufuncs and the functions of the stand-in, each with the parameters that names.json gives it."""

import inspect
import itertools
import json
import pathlib
import sys

import numpy as np

names = json.loads(pathlib.Path(__file__).with_name("names.json").read_text())

# parameters that take numbers, shapes, names and dtypes, but no array
PLAIN = set(
    """M N axes axis axis1 axis2 axisa axisb axisc bins bitorder casting destination dims dimensions dtype file from_
    func func1d funclist high indices_or_sections k kind kth low mask_func method mode n new_shape newshape num number
    ord order pad_width range reps requirements shape shift side size source start step stop subscripts to trim
    """.split()
)
LISTS = {"choicelist", "condlist", "keys", "multi_index", "tup"}  # parameters that take several arrays
FROM_HOST = {"array", "asanyarray", "asarray", "ascontiguousarray", "asfortranarray"}  # functions that take anything
# functions that tell of an array, in plain Python
ABOUT = set("can_cast common_type iscomplexobj isfortran isrealobj isscalar may_share_memory min_scalar_type".split())
ABOUT |= set("ndim result_type shape shares_memory size".split())


class ndarray:
    __slots__ = ("_on_host",)
    __hash__ = None

    def __init__(self, shape, dtype=float):
        self._on_host = np.empty(shape, dtype)

    def __getitem__(self, index):
        return wrap(self._on_host[for_numpy(index)])

    def __setitem__(self, index, value):
        index, value = for_numpy(index), operand(value)
        self._on_host[index] = value
        if any(isinstance(part, (list, np.ndarray)) for part in index):
            stored = self._on_host[index]
            meant = np.empty_like(stored)
            meant[...] = value
            if not np.array_equal(stored, meant, equal_nan=True):
                raise ValueError("an index comes twice, with different values: it is left open which of them stays")

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, of_numpy, how, *inputs, out=(), **kwargs):
        ours = getattr(sys.modules[__package__], of_numpy.__name__, None)
        return getattr(ours, how)(*inputs, *out, **kwargs) if isinstance(ours, ufunc) else NotImplemented

    def __array_function__(self, of_numpy, types, args, kwargs):
        ours = sys.modules[__package__]
        for name in [*of_numpy.__module__.split(".")[1:], of_numpy.__name__]:
            ours = getattr(ours, name, None)
        return NotImplemented if ours is None else ours(*args, **kwargs)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def __reduce__(self):
        return wrap, (self.get(),)

    def __repr__(self):
        return repr(self._on_host)

    def __str__(self):
        return str(self._on_host)

    def __format__(self, how):
        return format(self._on_host, how)

    def get(self, stream=None, order="C", out=None, blocking=True):
        return asnumpy(self, stream, order, out, blocking=blocking)

    @property
    def shape(self):
        return self._on_host.shape

    @shape.setter
    def shape(self, shape):
        self._on_host = self._on_host.reshape(shape)


class ufunc:
    def __init__(self, name):
        self.name = self.__name__ = name
        self._of_numpy = getattr(np, name)
        self.nin, self.nout = (getattr(self._of_numpy, count, 1) for count in ("nin", "nout"))
        self.nargs = self.nin + self.nout

    def __call__(self, *args, out=None, **kwargs):
        if not self.nin <= len(args) <= self.nargs:
            raise TypeError(f"Wrong number of arguments for {self.name!r}: {len(args)}")
        if not kwargs.keys() <= {"dtype", "casting"}:
            raise TypeError(f"Wrong arguments {kwargs}")
        outs = args[self.nin :] or (out if isinstance(out, tuple) else (out,) * self.nout)
        if any(each is not None for each in outs):
            kwargs["out"] = tuple(each if each is None else host(each) for each in outs)
        result = self._of_numpy(*map(operand, args[: self.nin]), **kwargs)
        return outs[0] if self.nout == 1 and outs[0] is not None else wrap(result)

    def at(self, a, indices, b=None):
        if self.name not in names["ufuncs with at"]:
            raise NotImplementedError(f"`{self.name}.at` is not supported yet")
        if self.name == "add" and a.dtype.name not in "float16 float32 float64 int32 uint32 uint64".split():
            raise TypeError(f"cupy.add.at does not support {a.dtype}")
        self._of_numpy.at(host(a), for_numpy(indices), operand(b))

    def reduce(self, array, axis=0, dtype=None, out=None, keepdims=False):
        return self._along(array, {"add": "sum", "multiply": "prod"})(axis, dtype, out, keepdims)

    def accumulate(self, array, axis=0, dtype=None, out=None):
        return self._along(array, {"add": "cumsum", "multiply": "cumprod"})(axis, dtype, out)

    def _along(self, array, methods):
        if self.name not in methods:
            raise NotImplementedError(f"`{self.name}` is not supported along an axis yet")
        return getattr(array, methods[self.name])


def wrap(value):
    """What NumPy gives, as CuPy gives it."""
    if isinstance(value, (tuple, list)):
        return (tuple if isinstance(value, tuple) else list)(map(wrap, value))
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    if value.dtype.kind not in "biufc":
        raise ValueError(f"Unsupported dtype {value.dtype}")
    array = ndarray.__new__(ndarray)
    array._on_host = np.asarray(value)
    return array


def host(value):
    """The NumPy array in a stand-in, and nothing else."""
    if not isinstance(value, ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value._on_host


def operand(value):
    """What arithmetic takes: an array or a number."""
    return value if isinstance(value, (bool, int, float, complex, np.generic)) else host(value)


def for_numpy(index):
    """An index for NumPy, with an ellipsis, so that one element is a view of zero dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(part._on_host if isinstance(part, ndarray) else part for part in parts)
    return parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def from_host(value):
    """What array() takes: anything, but of lists those that hold arrays alone or none."""
    if isinstance(value, ndarray):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, (list, tuple, ndarray)) for part in value):
        value = [from_host(part)._on_host for part in value]
    return wrap(np.array(value))


def argument(name, value):
    """The value of a parameter for NumPy. TypeError where it is of a kind that the parameter does not take."""
    if name == "kind" and value not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    if name in PLAIN:
        if any(
            isinstance(part, (ndarray, np.ndarray)) for part in (value if type(value) in (list, tuple) else [value])
        ):
            raise TypeError(f"{name} takes no array")
        return value
    if name in LISTS and isinstance(value, (list, tuple)):
        return [host(part) for part in value]
    return None if value is None else operand(value)


def reader(name, parameters):
    """(args, kwargs) -> the same for NumPy. TypeError for what is not among the parameters of the function `name`."""
    check = eval(f"lambda {parameters}: None")  # Python's own check of a call is much faster than inspect's
    check.__qualname__ = name
    by_name = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    places = [name for name, parameter in inspect.signature(check).parameters.items() if parameter.kind not in by_name]

    def read(args, kwargs):
        check(*args, **kwargs)
        placed = zip(itertools.chain(places, itertools.repeat((places or [""])[-1])), args)
        return [argument(*each) for each in placed], {name: argument(name, value) for name, value in kwargs.items()}

    return read


def function(module, name, parameters):
    of_numpy, read, first = getattr(module, name), reader(name, parameters), parameters.split(",")[0]

    def call(*args, **kwargs):
        if name in ABOUT:
            return of_numpy(*(arg._on_host if isinstance(arg, ndarray) else arg for arg in args), **kwargs)
        if name in FROM_HOST and args:
            args = from_host(args[0]), *args[1:]
        elif args and isinstance(args[0], (bool, int, float, complex)) and first not in PLAIN:
            raise AttributeError(f"{type(args[0]).__name__!r} object is no array")  # CuPy asks for one of its methods
        args, kwargs = read(args, kwargs)
        result = of_numpy(*args, **kwargs)
        if name in ("empty", "empty_like"):
            result.fill(np.nan if result.dtype.kind in "fc" else 85)  # memory holds anything on a GPU, seldom zeros
        return wrap(np.asarray(result) if isinstance(result, (bool, int)) else result)

    return call


def method(name, parameters):
    read = reader(name, parameters)

    def call(self, *args, **kwargs):
        args, kwargs = read(args, kwargs)
        return wrap(getattr(self._on_host, name)(*args, **kwargs))

    return call


def operator(name):
    of_numpy = getattr(np.ndarray, name)

    def call(self, *others):
        compared_to_none = name in ("__eq__", "__ne__") and others[0] is None
        result = of_numpy(self._on_host, *(others if compared_to_none else map(operand, others)))
        return self if result is self._on_host else wrap(result)

    return call


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if not isinstance(a, ndarray):
        return np.asarray(a, order=order)
    if out is None:
        return a._on_host.copy(order)
    out[...] = a._on_host
    return out


for _name in names["attributes"]:
    if not hasattr(ndarray, _name):
        setattr(ndarray, _name, property(lambda self, name=_name: wrap(getattr(self._on_host, name))))
for _name in names["operators"]:
    if _name not in vars(ndarray):
        setattr(ndarray, _name, operator(_name))
for _name, _parameters in names["methods"].items():
    if not hasattr(ndarray, _name):
        setattr(ndarray, _name, method(_name, _parameters))
