"""The command line of model.py: continuing a text, and a conversation."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_finetune import TOKENIZERS, assistant, user
from test_model import TINY

import bpe
import finetune
import model
from lab import talk

WINDOW = 100


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that has a chat and nothing to say."""
    folder = tmp_path_factory.mktemp("models") / "talker"
    words = "the cat sat on a mat and the dog ran to the user and the assistant " * 9
    tokenizer = bpe.train(words, 300, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = dataclasses.replace(TINY, vocab_size=300, max_position_embeddings=WINDOW, eos_token_id=2)
    model.save(folder, model.init(config, 3), config)
    tokenizer.save(folder)
    return folder


def command(*arguments, said=b""):
    environment = {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    program = [sys.executable, Path(__file__).parents[2] / "model.py", *map(str, arguments)]
    return subprocess.run(program, input=said, capture_output=True, timeout=60, env=environment)


def test_a_chat_answers_forgets_its_beginning_and_survives_a_line_too_long(talker):
    tokenizer = bpe.load(talker / "tokenizer.json")
    params, config = model.load(talker)
    lines, room = ["the cat", "a mat", "the dog " * 99, "ran", "on a mat", "cat"], WINDOW - 9
    turns, expected, forgotten = [], "", 0
    for line in lines:
        kept = [*turns, {"role": "user", "content": line}]
        while len(prompt := finetune.prompt(tokenizer, kept)) > room and len(kept) > 1:
            kept = kept[2:]
        expected += "> "
        if len(prompt) > room:
            continue
        forgotten += len(kept) < len(turns) + 1
        ids = [i for i in model.generate(params, config, prompt, 9, stop=[2]) if i != 2]
        expected += tokenizer.decode(ids) + "\n"
        turns = [*kept, {"role": "assistant", "content": tokenizer.decode(ids)}]
    options = "--load", talker, "--chat", "--max-new-tokens", 9, "--temperature", 0
    done = command(*options, said="\n".join([*lines, ""]).encode())
    assert forgotten and done.returncode == 0 and done.stdout.decode() == expected + "> \n"
    assert done.stderr.count(b"\n") == 1 and f"room for {room}" in done.stderr.decode()
    ended = command(*options, said=b"the cat\n\nnever read\n")  # an empty line ends it
    assert ended.returncode == 0 and ended.stdout.decode().count("> ") == 2


def test_an_answer_takes_what_is_left_of_the_window(talker):
    said = b"the cat sat on a mat " * 3 + b"\n"
    done = command("--load", talker, "--chat", "--system", "a dog", said=said)
    assert done.returncode == 0 and not done.stderr


def test_bytes_that_are_no_utf_8_are_prompted_with_and_typed(talker, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")  # which is strict, as a terminal is
    odd, options = os.fsdecode(b"a \xff cat"), ["--load", talker, "--max-new-tokens", 3]
    done = command(*options, "--prompt", odd)
    assert done.returncode == 0 and done.stdout.startswith(b"a ? cat") and not done.stderr
    done = command(*options, "--chat", "--system", odd, said=b"the \xff cat\n\n")
    assert done.returncode == 0 and done.stdout.count(b"> ") == 2 and not done.stderr


@pytest.mark.parametrize(
    "options, what",
    [
        (["--chat", "--prompt", "x"], "one of them"),
        (["--prompt", "x", "--system", "y"], "--system"),
        (["--system", "y"], "--load"),
        (["--chat", "--temperature", "-1"], "--temperature"),
        (["--chat", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_bad_options_are_one_sentence(talker, options, what):
    done = command("--load", talker, *options, said=b"the cat\n")
    error = done.stderr.decode()
    assert done.returncode == 1 and what in error and error.count("\n") == 1 and not done.stdout


def test_a_model_that_never_was_in_a_chat_says_so(talker, tmp_path):
    model.save(tmp_path, *model.load(talker))
    bpe.train("the cat sat on a mat", 257).save(tmp_path)
    done = command("--load", tmp_path, "--chat", said=b"the cat\n")
    assert done.returncode == 1 and b"finetune.py" in done.stderr and done.stderr.count(b"\n") == 1
    assert command("--chat").returncode == 1


def test_the_table_names_the_six_and_their_sizes(capsys):
    talk.describe()
    out = capsys.readouterr().out
    for name, config in model.ARCHITECTURES.items():
        assert any(name in line and f"{talk.costs(config)['parameters']:,}" in line for line in out.splitlines())


# --- the conversation in the terminal ---


def converse(lines, room, monkeypatch, system=None):
    """What the model was asked, as text, in a conversation of these lines; it answers "ok 1", "ok 2", ..."""
    tokenizer, asked, stop, lines = TOKENIZERS["published ChatML"], [], [], iter(lines)

    def answer(ids):
        assert len(ids) <= room
        asked.append(tokenizer.decode(ids))
        return f"ok {len(asked)}"

    def read(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    talk.converse(tokenizer, answer, stop, room, system)
    assert stop == [finetune.end_token(tokenizer)]
    return asked


def text_of(*messages):
    tokenizer = TOKENIZERS["published ChatML"]
    return tokenizer.decode(finetune.prompt(tokenizer, list(messages)))


def test_the_model_is_asked_with_all_that_was_said(monkeypatch):
    asked = converse(["a", "b", "", "never"], 1000, monkeypatch, "be brief")
    system = {"role": "system", "content": "be brief"}
    assert asked == [text_of(system, user("a")), text_of(system, user("a"), assistant("ok 1"), user("b"))]


def test_the_oldest_turns_are_forgotten_and_the_system_message_never(monkeypatch):
    system = {"role": "system", "content": "be brief"}
    three = system, user("b"), assistant("ok 2"), user("c")
    # there would be room for an answer whose question is forgotten
    room = len(finetune.prompt(TOKENIZERS["published ChatML"], [*three, assistant("ok 1")]))
    asked = converse(["a", "b", "c"], room, monkeypatch, "be brief")
    assert asked == [
        text_of(system, user("a")),
        text_of(system, user("a"), assistant("ok 1"), user("b")),
        text_of(*three),
    ]


def test_a_line_too_long_is_refused_and_nothing_is_forgotten(monkeypatch, capsys):
    asked = converse(["a", "the cat " * 99, "b"], 80, monkeypatch)
    assert asked == [text_of(user("a")), text_of(user("a"), assistant("ok 1"), user("b"))]
    error = capsys.readouterr().err
    assert re.fullmatch(r"that is \d+ tokens, and there is room for 80: .*\n", error)


def test_what_the_model_says_is_no_special_token_when_it_comes_back(monkeypatch):
    tokenizer, asked = TOKENIZERS["published ChatML"], []
    lines = iter(["a", "b"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    talk.converse(tokenizer, lambda ids: asked.append(ids) or "<|im_start|>", [], 1000)
    assert asked[1].count(tokenizer.special["<|im_start|>"]) == 4
