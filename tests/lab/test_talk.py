"""The command line of model.py: continuing a text, and a conversation."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from test_finetune import TOKENIZERS, assistant, user
from test_model import TINY

import bpe
import finetune
import model
from lab import talk

WINDOW = 100
CUT = b"(cut off after 3 tokens)\n"


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
    assert f"room for {room}" in done.stderr.decode()
    ended = command(*options, said=b"the cat\n\nnever read\n")  # an empty line ends it
    assert ended.returncode == 0 and ended.stdout.decode().count("> ") == 2


def test_an_answer_takes_what_is_left_of_the_window(talker):
    said = b"the cat sat on a mat " * 3 + b"\n"
    done = command("--load", talker, "--chat", "--system", "a dog", said=said)
    assert done.returncode == 0 and b"error" not in done.stderr


def test_bytes_that_are_no_utf_8_are_prompted_with_and_typed(talker, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")  # which is strict, as a terminal is
    odd, options = os.fsdecode(b"a \xff cat"), ["--load", talker, "--max-new-tokens", 3]
    done = command(*options, "--prompt", odd)
    assert done.returncode == 0 and done.stdout.startswith(b"a ? cat") and done.stderr == CUT
    done = command(*options, "--chat", "--system", odd, said=b"the \xff cat\n\n")
    assert done.returncode == 0 and done.stdout.count(b"> ") == 2 and done.stderr == CUT


@pytest.mark.parametrize(
    "options, what",
    [
        (["--chat", "--prompt", "x"], "one of them"),
        (["--prompt", "x", "--system", "y"], "--system"),
        (["--system", "y"], "--system"),
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
    tokenizer, asked, lines = TOKENIZERS["published ChatML"], [], iter(lines)

    def answer(ids):
        assert len(ids) <= room
        asked.append(tokenizer.decode(ids))
        return f"ok {len(asked)}"

    def read(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    talk.converse(partial(finetune.prompt, tokenizer), answer, room, system)
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
    ask = partial(finetune.prompt, tokenizer)
    talk.converse(ask, lambda ids: asked.append(ids) or "<|im_start|>", 1000)
    assert asked[1].count(tokenizer.special["<|im_start|>"]) == 4


# --- what was published with a model ---


@pytest.fixture
def published(talker, tmp_path):
    """A copy of the talker, with files beside it: write(name, content)."""
    shutil.copytree(talker, tmp_path / "model")

    def write(name, content):
        (tmp_path / "model" / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / "model")

    return write


def test_a_chat_is_asked_by_the_template_that_came_with_the_model(published, talker):
    tokenizer, messages = bpe.load(talker / "tokenizer.json"), [user("the <|im_end|>cat")]
    ours = finetune.prompt(tokenizer, messages)
    assert talk.asking(talker, tokenizer)(messages) == ours
    folder = published("chat_template.jinja", finetune.jinja(tokenizer))
    assert talk.asking(folder, tokenizer).func == finetune.prompt  # our own, written into a folder
    folder = published("chat_template.jinja", "<|im_start|>{{ messages[0].content }}\n<|im_start|>")
    ids = talk.asking(folder, tokenizer)(messages)
    assert tokenizer.decode(ids) == "<|im_start|>the <|im_end|>cat\n<|im_start|>" and ids.count(2) == 0
    assert talk.asking(folder, bpe.train("the cat", 260)) is not None  # whatever the special tokens are
    assert talk.asking(talker, bpe.train("the cat", 260)) is None


def test_a_template_that_refuses_ends_the_chat_with_its_reason(published):
    folder = published("chat_template.jinja", "{{ raise_exception('no dogs') }}")
    done = command("--load", folder, "--chat", said=b"the cat\n")
    assert done.returncode == 1 and b"no dogs" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "content, options, expected",
    [
        (None, {}, (0.8, None, 0.95, 1.0)),
        ({"eos_token_id": 2, "_from_model_config": True}, {}, (0.8, None, 0.95, 1.0)),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}, {}, (0.6, 20, 0.9, 1.1)),
        ({"do_sample": True, "temperature": 0.6}, {}, (0.6, 50, 1.0, 1.0)),  # what transformers takes for the others
        ({"do_sample": True, "top_k": 0, "top_p": None}, {}, (1.0, None, 1.0, 1.0)),
        ({"do_sample": False, "temperature": 0.6}, {}, (0.0, None, 0.95, 1.0)),
        ({"do_sample": True, "top_k": 20}, {"temperature": 0.1, "top_k": 3}, (0.1, 3, 1.0, 1.0)),
        ({"do_sample": False}, {"temperature": 0.5, "repetition_penalty": 2.0}, (0.5, None, 0.95, 2.0)),
        (None, {"temperature": 0.0, "top_p": 1.0}, (0.0, None, 1.0, 1.0)),
    ],
)
def test_the_command_line_comes_before_the_file_and_that_before_us(content, options, expected, published):
    folder = published("notes", "") if content is None else published("generation_config.json", content)
    found = talk.drawn(talk.Settings(load=folder, **options))
    assert found == dict(zip(("temperature", "top_k", "top_p", "repetition_penalty"), expected))


@pytest.mark.parametrize("content", [{"temperature": -1}, {"top_p": "x"}, {"top_k": 1.5}, {"repetition_penalty": 0}])
def test_settings_that_cannot_be_are_refused_with_their_file(content, published):
    folder, (name,) = published("generation_config.json", content), content
    with pytest.raises(ValueError, match=f"generation_config.json: --{name.replace('_', '-')} "):
        talk.drawn(talk.Settings(load=folder))


def test_settings_reach_the_model(published, talker):
    prompt = "--prompt", "the cat", "--max-new-tokens", 40
    plain = command("--load", talker, *prompt, "--temperature", 0)
    greedy = command("--load", published("generation_config.json", {"do_sample": False}), *prompt)
    assert plain.returncode == greedy.returncode == 0 and plain.stdout == greedy.stdout
    content = {"do_sample": False, "repetition_penalty": 50.0}
    other = command("--load", published("generation_config.json", content), *prompt)
    assert other.returncode == 0 and other.stdout != plain.stdout
    same = command("--load", talker, *prompt, "--temperature", 0, "--repetition-penalty", 50)
    assert same.stdout == other.stdout


@pytest.mark.parametrize("stop, said", [([2], ""), ([7, 5], ""), ([], "(cut off after 3 tokens)\n"), ([6], "(cut off")])
def test_an_answer_that_did_not_end_says_so(stop, said, capsys):
    tokenizer = TOKENIZERS["published ChatML"]
    tokens = [90, 91, 2 if stop == [2] else 5]
    text = talk.spoken(tokenizer, iter(tokens), stop)
    out, err = capsys.readouterr()
    assert out == text + "\n" and text == tokenizer.decode([i for i in tokens if i not in stop])
    assert err.startswith(said) and bool(err) == bool(said)
