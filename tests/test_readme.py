"""README.md and benchmarks/README.md: their snippets and commands are run as they are written, at a small size."""

import argparse
import ast
import importlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path

import numpy as np
import pytest
from programs import small_chains

import finetune
import layers
import lecture
from engine import corpus, to_numpy, xp
from lab import claims, pretrain, verifiable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    """The fenced blocks of a language; of "" those of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def commands(text):
    """What a text tells to run, each once: [script, argument, ...], be it in a block or in a sentence."""
    found = re.findall(r"(?:\bpython |`(?=\S+\.py --))(\w[\w/]*\.py[^`\n]*)", text)
    return [list(words) for words in dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in found)]


COMMANDS = commands(README)


def test_nothing_is_overlooked():
    scripts = {script for script, *_ in COMMANDS}
    assert {"lecture.py", "model.py", "train.py", "finetune.py", "rlhf.py", "cot.py", "evals.py"} <= scripts
    shell = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("python ")]
    assert len(shell) >= 10
    assert all(shlex.split(line, comments=True)[1:] in COMMANDS for line in shell)
    scripts = {path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert {f"benchmarks/{path.name}" for path in scripts} == {script for script, *_ in commands(BENCHMARKS)}


# --- a small world, in which every file and folder that is named exists ---

TINY = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "vocab": 300, "batch": 2, "context": 160}
SIZES = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
MODULES = "argparse ast bisect calendar copy csv datetime fnmatch glob heapq json os random shutil string textwrap"


@pytest.fixture(scope="module")
def library():
    """The docstrings of some modules of the standard library, in place of all."""
    found = {}
    for name in MODULES.split():
        tree = ast.parse(Path(importlib.import_module(name).__file__).read_bytes())
        found[name] = [pair for pair in corpus.docstrings(tree, name) if pair[1]]
    return lambda: found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a text, conversations, a language model and one that converses."""
    folder = tmp_path_factory.mktemp("readme")
    rng, words = np.random.default_rng(0), "once upon a time there was one who read what it does to them".split()
    book, chats = str(folder / "book.txt"), str(folder / "CHAT.jsonl")
    Path(book).write_text(" ".join(rng.choice(words, 20000)))
    turns = [[{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": b}] for a in words for b in words]
    Path(chats).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    base, tuned = str(folder / "runs" / "book"), str(folder / "runs" / "2")
    pretrain.main([*SIZES, "--data", book, "--steps", "2", "--out", base])
    finetune.main(["--data", chats, "--init", base, "--steps", "1", "--out", tuned])
    compared = {"prompt": "What does it do?", "chosen": "It reads.", "rejected": "It was."}
    (folder / "COMPARISONS.jsonl").write_text((json.dumps(compared) + "\n") * 12)
    verifiable.small_sums(folder / "PROBLEMS.jsonl", 10)
    for name, like in {"checkpoint": base, "runs/1": base, "DIR": tuned, "runs/assistant": tuned}.items():
        shutil.copytree(like, folder / name)
    return folder


@pytest.fixture
def here(world, library, small_village, tmp_path, monkeypatch):
    """A copy of the world, in which the test is, and in which time flies."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(corpus, "library", library)
    monkeypatch.setattr(claims, "FIGURES", str(folder / "figures"))
    small_chains(monkeypatch.setattr)
    monkeypatch.setattr(verifiable, "SHOWN", [])  # in so small a window there is no room for it
    monkeypatch.setattr(verifiable, "TASK", "")
    small = [
        (one.name, one.type, field(default=TINY[one.name], metadata=one.metadata))
        for one in fields(pretrain.Settings)
        if one.name in TINY
    ]
    monkeypatch.setattr(
        pretrain, "Settings", make_dataclass("Settings", small, bases=(pretrain.Settings,), frozen=True)
    )
    return folder


def run(script, *arguments):
    """Runs a script as the command line does; AssertionError with what it says where it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1\nWhat does it do?\n\n")))  # at the terminal
        patch.setenv("BACKEND", os.environ.get("BACKEND", ""))  # which the benchmarks set
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            assert end.code in (None, 0), end.code


# --- snippets ---


def test_the_snippets_compute_what_they_say(here, capsys):
    random = xp.random.default_rng(0).standard_normal
    x, weight, dy = random((3, 4)), random(4), random((3, 4))
    names = {"rms_norm": layers.rms_norm, "x": x, "weight": weight, "dy": dy}
    for snippet in blocks(README, "python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["dx"].shape == x.shape and names["dweight"].shape == weight.shape
    params, tokens, logits = names["params"], to_numpy(names["tokens"]), to_numpy(names["logits"])
    assert logits.shape == (*tokens.shape, names["config"].vocab_size)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    of_the_next = np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)
    assert math.isfinite(names["loss"]) and names["loss"] == pytest.approx(-of_the_next.mean(), rel=1e-5)
    assert {name: g.shape for name, g in names["grads"].items()} == {name: w.shape for name, w in params.items()}
    printed = [int(line) for line in capsys.readouterr().out.split()]
    assert 1 <= len(printed) <= 20 and all(0 <= token < logits.shape[-1] for token in printed)


# --- commands ---


class Parsed(BaseException):
    """The command line is understood."""


@pytest.mark.parametrize("words", COMMANDS + commands(BENCHMARKS), ids=" ".join)
def test_every_option_of_a_command_exists(words, here, monkeypatch):
    script, *arguments = (word for word in words if word[0] != "[")  # [FILE] may be left out
    assert (ROOT / script).is_file()
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    names = {"TASK": "text", "NAME": "qwen3"}
    if arguments and arguments != ["--help"]:
        with pytest.raises(Parsed):
            run(script, *(names.get(word, word) for word in arguments))


def small(script, arguments):
    """The command's arguments with what makes them small."""
    names = {"TASK": "text", "F": "book.txt", "NAME": "deepseek-v3", "FILE": "book.txt"}
    arguments = [names.get(word, word) for word in arguments]
    given = set(arguments)
    if script == "model.py" and given & {"--prompt", "--chat"}:
        arguments += ["--max-new-tokens", "3"]
    if script == "evals.py" and "--load" in given:
        arguments += ["--limit", "1"]
    if script in ("train.py", "finetune.py"):
        arguments += ["--steps", "3"]
        if script == "train.py" and not given & {"--init", "--resume"}:
            arguments += SIZES
    if "--seeds" in given:
        arguments += ["--seeds", "2"]
    if script == "cot.py" and "--load" not in given:
        arguments += ["--steps", "10"]
    if "--reinforce" in given:
        arguments += "--rounds 1 --budget 8 --questions 1 --group 2 --held-out 1".split()
    if script == "rlhf.py" and "--comparisons" not in given:
        arguments += ["--effort", "0.005"]
    return arguments


def one_slide():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lecture, "SLIDES", {"positions": lecture.SLIDES["positions"]})
        lecture.main([])


SHORT = {("lecture.py",): one_slide}  # all of it takes long
MADE = {
    "train.py": "model.safetensors",
    "finetune.py": "model.safetensors",
    "rlhf.py": "summary.json",
    "cot.py": "summary.json",
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_runs(words, here, capsys):
    script, *arguments = words
    if "--gguf" in arguments:
        pytest.importorskip("gguf")
    if "--out" in arguments:
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    before = set(here.rglob("*"))
    SHORT.get(tuple(words), lambda: run(script, *small(script, arguments)))()
    printed = capsys.readouterr().out
    assert printed
    new = {path.name for path in set(here.rglob("*")) - before}
    if script in MADE and not {"--help", "--load", "--human", "--resume"} & set(arguments):
        assert ("model.safetensors" if "--init" in arguments else MADE[script]) in new
    if script == "lecture.py":
        by_option = {"--page": "lecture.html", "--exercise": "layers.py", "--results": "RESULTS.md"}
        expected = [made for option, made in by_option.items() if option in arguments]
        assert {*expected} <= new and (expected or "--exercises" in arguments or any(n.endswith(".png") for n in new))
    if script == "model.py" and "--prompt" in arguments:
        assert printed.startswith(arguments[arguments.index("--prompt") + 1])
    if words == ["model.py"]:
        assert printed in blocks(README, "")  # the README shows it


def test_every_slide_is_in_the_table_with_its_claims():
    """And every picture that the README shows is there."""
    for name, slide in lecture.SLIDES.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {slide.title} | ")]
        assert f"| `{name}` |" in row and all(f"[`{file}`]({file})" in row for file in slide.files.split())
        assert all(claims.title(claim) in row for claim in slide.claims)
    shown = re.findall(r"\]\((figures/[^)]+)\)", README)
    assert len(shown) > 20 and all((ROOT / path).is_file() for path in shown)


def test_every_paper_that_is_cited_is_in_the_list():
    listed = README.split("## References")[1]
    name = r"[A-Z][\w-]+(?: et al\.| & [A-Z]\w+|-AI| Team)?"
    cited = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("lab/**/*.py")]:
        text = " ".join(path.read_text(encoding="utf-8").replace("#", " ").split())
        cited |= {f"{who} {year}" for who, year in re.findall(rf"({name})[ ,]+((?:19|20)\d\d[ab]?)\b", text)}
    papers = {paper for paper in cited if re.search(r" et al\.| & |-AI| Team", paper)}
    assert len(papers) > 50 and not {paper for paper in papers if f"- {paper}. " not in listed}
