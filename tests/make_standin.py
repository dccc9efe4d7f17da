"""Reads off the real CuPy what it has, for the stand-in: python tests/make_standin.py

Writes tests/standin/cupy/names.json: the names that CuPy shares with NumPy, and the parameters of each. Needs CuPy
(pip install cupy-cuda12x numpy), which imports without a GPU.
"""

import inspect
import json
import pathlib
import re
import types

import cupy
import numpy as np

IN_MEMORY = "base", "data", "device", "flat"  # attributes of an array that are not of NumPy's kind
COMPARISONS = "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"  # which every object has


def names_of(theirs, ours):
    return [name for name in dir(theirs) if not name.startswith("_") and hasattr(ours, name)]


def parameters(function):
    """The parameters as text, each default as None; a compiled method shows them, with types, in its docstring only."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        signature = None
    if signature is None or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        shown = re.match(r"[\w.]+\((.*?)\)( ->|$)", (function.__doc__ or "").strip().split("\n")[0])
        if shown is not None:
            given = [re.sub(r"=.*", "=None", part).split()[-1] for part in shown[1].split(", ")]
            return ", ".join(part for part in given if part != "self")
    bare = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    return str(inspect.Signature(bare))[1:-1]


def functions(theirs, ours):
    found = {name: getattr(theirs, name) for name in names_of(theirs, ours)}
    return {
        name: parameters(value)
        for name, value in found.items()
        if callable(value) and not isinstance(value, (type, cupy.ufunc)) and value is not getattr(ours, name)
    }


shared = names_of(cupy, np)
ufuncs = [name for name in shared if isinstance(getattr(cupy, name), cupy.ufunc)]
attributes = [name for name in names_of(cupy.ndarray, np.ndarray) if name not in IN_MEMORY]
operators = [
    name
    for name in dir(cupy.ndarray)
    if isinstance(getattr(np.ndarray, name, None), types.WrapperDescriptorType)
    and (name in COMPARISONS or not hasattr(object, name))
]
names = {
    "version": cupy.__version__,
    "of NumPy": [name for name in shared if getattr(cupy, name) is getattr(np, name)],
    "functions": functions(cupy, np),
    "linalg": functions(cupy.linalg, np.linalg),
    "ufuncs": ufuncs,
    "ufuncs with at": [name for name in ufuncs if getattr(cupy, name)._scatter_op],
    "operators": operators,
    "attributes": [name for name in attributes if not callable(getattr(cupy.ndarray, name))],
    "methods": {
        name: parameters(getattr(cupy.ndarray, name))
        for name in attributes + ["get"]
        if callable(getattr(cupy.ndarray, name))
    },
    "Generator": functions(cupy.random.Generator, np.random.Generator),
}
path = pathlib.Path(__file__).parent / "standin" / "cupy" / "names.json"
path.write_text(json.dumps(names, indent=0) + "\n")
