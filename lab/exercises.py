"""Exercises: a file of the ideas without the body of one backward or forward pass, and the test that judges what a
student writes there.
"""

import ast
import os
import re

from engine.files import read_text, refuse, write_text
from lab.claims import ROOT

FOLDER = "exercises"
TODO = "raise NotImplementedError"


def source(module):
    return read_text(os.path.join(ROOT, f"{module}.py"))


def functions(text):
    """{name: FunctionDef} of a file's text."""
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def passes(module):
    """Those functions of a file that return a backward pass of their own."""
    return {name: node for name, node in functions(source(module)).items() if backward_of(node)}


def backward_of(function):
    """The backward pass inside a function: a FunctionDef, or a Lambda that it returns; None if there is none."""
    for node in function.body:
        if isinstance(node, ast.FunctionDef) and node.name == "backward":
            return node
    value = getattr(function.body[-1], "value", None)
    is_pair = isinstance(value, ast.Tuple) and isinstance(value.elts[-1], ast.Lambda)
    return value.elts[-1] if is_pair else None


def begins(function):
    """The line, from 0, in which a function's body begins, behind its docstring."""
    return function.body[ast.get_docstring(function) is not None].lineno - 1


def all_exercises(slides):
    """{slide: ["file.function", ...]}, each under the first slide that it belongs to."""
    found, known = {}, set()
    for name, slide in slides.items():
        names = [f"{m}.{f}" for m in (file.removesuffix(".py") for file in slide.files.split()) for f in passes(m)]
        found[name] = [name for name in names if name not in known]
        known |= {*found[name]}
    return found


def taken_out(text, name, forward=False):
    """The text of a file without the body of a function's backward pass; forward: without what comes before it."""
    function = functions(text)[name]
    lines, backward, last = text.splitlines(keepends=True), backward_of(function), function.body[-1]
    indent, whole = " " * function.body[0].col_offset, isinstance(backward, ast.FunctionDef)
    if forward:
        rest = ["\n", *lines[backward.lineno - 1 :]] if whole else lines[last.end_lineno :]
        changed = [*lines[: begins(function)], f"{indent}{TODO}\n", *rest]
    elif whole:
        changed = [*lines[: begins(backward)], f"{indent}    {TODO}\n", *lines[backward.end_lineno :]]
    else:  # the lambda becomes a function
        made = f"\n{indent}def backward({ast.unparse(backward.args)}):\n{indent}    {TODO}\n\n"
        value = ", ".join(map(ast.unparse, last.value.elts[:-1]))
        changed = [*lines[: last.lineno - 1], made, f"{indent}return {value}, backward\n", *lines[last.end_lineno :]]
    return "".join(changed)


def judges(module, name):
    """The tests that judge a function, as pytest names them: those of the file's own tests that name it or, where none
    does, all of them.
    """
    path = f"tests/test_{module}.py"
    text = read_text(os.path.join(ROOT, path))
    called = re.compile(rf"\b{module}\.{name}\b|(?<![\w.]){name}\(")
    of = lambda test: [ast.get_source_segment(text, part) for part in (test, *test.decorator_list)]
    tests = {test: of(node) for test, node in functions(text).items() if test.startswith("test_")}
    return [f"{path}::{test}" for test, parts in tests.items() if any(map(called.search, parts))] or [path]


def write(exercise, forward=False):
    """Writes an exercise, and says how it is judged. ValueError for what is none."""
    module, _, name = exercise.partition(".")
    known = os.path.exists(os.path.join(ROOT, f"{module}.py")) and name in passes(module)
    refuse(not known, f"there is no exercise {exercise}: python lecture.py --exercises lists them")
    path = os.path.join(FOLDER, f"{module}.py")
    old = read_text(path) if os.path.exists(path) else source(module)
    own = functions(old).get(name)
    touched = own is None or ast.unparse(own) != ast.unparse(passes(module)[name])
    refuse(touched, f"{path} has your own {name} already: remove that file to begin again")
    os.makedirs(FOLDER, exist_ok=True)
    write_text(path, taken_out(old, name, forward))
    print(f"{path}: write the {'forward' if forward else 'backward'} pass of {name}. What judges it:\n")
    print(f'python -m pytest -q -x -o pythonpath="{FOLDER} . tests" {" ".join(judges(module, name))}')


def show(slides):
    """Prints the exercises by slide."""
    for name, exercises in all_exercises(slides).items():
        if exercises:
            print(f"\n{slides[name].title}")
            for exercise in exercises:
                print(f"  python lecture.py --exercise {exercise}")
