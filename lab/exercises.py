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


def passes(module):
    """{name: its FunctionDef} of the functions of a file that return a backward pass of their own, in their order."""
    tree = ast.parse(source(module))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and backward_of(node)}


def backward_of(function):
    """The backward pass inside a function: a FunctionDef, or a Lambda that it returns; None if there is none."""
    for node in function.body:
        if isinstance(node, ast.FunctionDef) and node.name == "backward":
            return node
    last = function.body[-1]
    if (
        isinstance(last, ast.Return)
        and isinstance(last.value, ast.Tuple)
        and isinstance(last.value.elts[-1], ast.Lambda)
    ):
        return last.value.elts[-1]
    return None


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
    function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    lines, backward, last = text.splitlines(keepends=True), backward_of(function), function.body[-1]
    indent = " " * function.body[0].col_offset
    own = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if forward:
        rest = (
            ["\n", *lines[backward.lineno - 1 :]] if isinstance(backward, ast.FunctionDef) else lines[last.end_lineno :]
        )
        return "".join([*lines[: own[0].lineno - 1], f"{indent}{TODO}\n", *rest])
    if isinstance(backward, ast.FunctionDef):
        body = [
            node for node in backward.body if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant)
        ]
        start = lines[: backward.lineno] if body[0] is backward.body[0] else lines[: body[0].lineno - 1]
        return "".join([*start, f"{indent}    {TODO}\n", *lines[backward.end_lineno :]])
    value = ", ".join(map(ast.unparse, last.value.elts[:-1]))
    made = [f"\n{indent}def backward({ast.unparse(backward.args)}):\n", f"{indent}    {TODO}\n\n"]
    return "".join([*lines[: last.lineno - 1], *made, f"{indent}return {value}, backward\n", *lines[last.end_lineno :]])


def judges(module, name):
    """The tests that judge a function, as pytest names them: those of the file's own tests that name it or, where none
    does, all of them.
    """
    path = f"tests/test_{module}.py"
    text = read_text(os.path.join(ROOT, path))
    tests = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    called = re.compile(rf"\b{module}\.{name}\b|(?<![\w.]){name}\(")
    naming = lambda node: any(
        called.search(ast.get_source_segment(text, part)) for part in [node, *node.decorator_list]
    )
    return [f"{path}::{node.name}" for node in tests if naming(node)] or [path]


def write(exercise, forward=False):
    """Writes an exercise, and says how it is judged. ValueError for what is none."""
    module, _, name = exercise.partition(".")
    known = os.path.exists(os.path.join(ROOT, f"{module}.py")) and name in passes(module)
    refuse(not known, f"there is no exercise {exercise}: python lecture.py --exercises lists them")
    path = os.path.join(FOLDER, f"{module}.py")
    old = read_text(path) if os.path.exists(path) else source(module)
    found = [n for n in ast.parse(old).body if isinstance(n, ast.FunctionDef) and n.name == name]
    untouched = found and ast.unparse(found[0]) == ast.unparse(passes(module)[name])
    refuse(not untouched, f"{path} has your own {name} already: remove that file to begin again")
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
