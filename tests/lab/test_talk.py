"""The command line of model.py: continuing a text, and a conversation."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_model import TINY

import bpe
import chat
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
        while len(prompt := chat.prompt(tokenizer, kept)) > room and len(kept) > 1:
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
    assert done.returncode == 1 and b"--finetune" in done.stderr and done.stderr.count(b"\n") == 1
    assert command("--chat").returncode == 1


def test_the_table_names_the_six_and_their_sizes(capsys):
    talk.describe()
    out = capsys.readouterr().out
    for name, config in model.ARCHITECTURES.items():
        assert any(name in line and f"{talk.costs(config)['parameters']:,}" in line for line in out.splitlines())
