"""Exercises: each is judged by tests that fail before it is written, and pass with what the file has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lecture
from lab import exercises

ROOT = Path(__file__).parents[2]
ALL = [name for names in exercises.all_exercises(lecture.SLIDES).values() for name in names]
FILES = sorted({name.partition(".")[0] for name in ALL})


def test_every_function_with_a_backward_pass_is_an_exercise():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(n, ast.FunctionDef) and n.name == "backward" for n in node.body
            ):
                assert f"{path.stem}.{node.name}" in ALL
    assert len(ALL) == len(set(ALL)) >= 40 and {"layers.rms_norm", "rlhf.kl_loss", "moe.divided_by_sum"} <= {*ALL}


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_only_the_body_is_taken_out(name, forward):
    module, _, function = name.partition(".")
    before, after = (ast.parse(text) for text in (exercises.source(module), exercises.taken_out(
        exercises.source(module), function, forward)))  # fmt: skip
    for one, other in zip(before.body, after.body, strict=True):
        if getattr(one, "name", None) == function:
            assert ast.unparse(one.args) == ast.unparse(other.args)
            assert ast.get_docstring(one) == ast.get_docstring(other)
            assert exercises.TODO in ast.unparse(other)
            assert ast.unparse(one) != ast.unparse(other)
        else:
            assert ast.unparse(one) == ast.unparse(other)


def test_what_nobody_has_written_fails():
    """Each judge, with the body of its function taken out."""
    command = [sys.executable, str(ROOT / "tests" / "judged.py"), *ALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = dict(line.split() for line in done.stdout.splitlines())
    assert codes == dict.fromkeys(ALL, "1")


def test_a_student_writes_one(tmp_path, monkeypatch, capsys):
    """As on the command line: the file, the tests that it names before and after, and no work that is lost."""
    monkeypatch.chdir(tmp_path)
    lecture.main(["--exercise", "layers.layer_norm"])
    command = capsys.readouterr().out.splitlines()[-1].replace("exercises .", f"{tmp_path}/exercises .")
    assert command.startswith("python -m pytest")
    written = tmp_path / "exercises" / "layers.py"
    judged = lambda: subprocess.run(
        command.replace("python", sys.executable, 1), shell=True, cwd=ROOT, capture_output=True
    )
    assert exercises.TODO in written.read_text() and judged().returncode == 1
    text = written.read_text()
    real = exercises.source("layers")
    body = real[real.index("    def backward(dy):", real.index("def layer_norm")) :]
    written.write_text(
        text.replace(f"    def backward(dy):\n        {exercises.TODO}\n", body[: body.index("\n\n")] + "\n")
    )
    assert written.read_text() == real and judged().returncode == 0
    written.write_text(
        real.replace("def layer_norm(x, weight, bias, eps=1e-5):", "def layer_norm(x, weight, bias, eps=1e-6):")
    )
    with pytest.raises(ValueError, match="has your own layer_norm already"):
        lecture.main(["--exercise", "layers.layer_norm"])
    lecture.main(["--exercise", "layers.rms_norm", "--forward"])  # beside what is there
    assert "eps=1e-6" in written.read_text() and exercises.TODO in written.read_text()


@pytest.mark.parametrize("name", ["layers", "layers.nothing", "nofile.rms_norm", "layers.IGNORE", ""])
def test_what_is_no_exercise_is_one_sentence(name):
    with pytest.raises(ValueError, match="there is no exercise"):
        exercises.write(name)


def test_the_list_is_by_slide(capsys):
    lecture.main(["--exercises"])
    printed = capsys.readouterr().out
    assert printed.count("--exercise ") == len(ALL) and "RLHF" in printed
