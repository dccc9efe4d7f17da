"""Preferences of others: the forms that they are published in, what is none, and a model that learns them."""

import json

import pytest

import finetune
import model
from lab import preferences, pretrain

USER = {"role": "user", "content": "Hi?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Good.", "Bad."))
FORMS = [
    {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
]


@pytest.mark.parametrize("row", FORMS)
def test_every_form_is_the_same_comparison(row):
    assert preferences.conversation(row) == ([USER], "Good.", "Bad.")


def test_what_was_said_before_is_kept():
    before = [{"role": "system", "content": "Be kind."}, USER, GOOD, USER]
    row = {"prompt": before, "chosen": [GOOD], "rejected": "Bad."}
    assert preferences.conversation(row) == (before, "Good.", "Bad.")


@pytest.mark.parametrize(
    "row",
    [
        [],
        {"prompt": "Hi?", "chosen": "Good."},
        {"chosen": "Good.", "rejected": "Bad."},
        {"prompt": 3, "chosen": "Good.", "rejected": "Bad."},
        {"prompt": [], "chosen": "Good.", "rejected": "Bad."},
        {"prompt": "Hi?", "chosen": [USER], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": [GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": ["Good."], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": [{"role": "oracle", "content": "Good."}], "rejected": [BAD]},
    ],
)
def test_what_is_no_comparison_is_refused_with_its_line(row, tmp_path):
    path = tmp_path / "comparisons.jsonl"
    path.write_text(json.dumps(FORMS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        preferences.read(str(path))


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "comparisons.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no comparison"):
        preferences.read(str(path))


def test_a_chat_model_learns_what_was_preferred(tmp_path, capsys):
    text, chat, path = (tmp_path / name for name in ("text.txt", "chat.jsonl", "comparisons.jsonl"))
    text.write_text("Good or bad? Good. Bad. Hi?\n" * 400)
    chat.write_text("".join(json.dumps({"messages": [USER, said]}) + "\n" for said in (GOOD, BAD) for _ in range(20)))
    path.write_text("".join(json.dumps(row) + "\n" for row in FORMS * 4))
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "vocab": 300, "batch": 4, "context": 64}
    base, init, out = (str(tmp_path / name) for name in ("base", "init", "out"))
    pretrain.pretrain(sizes | {"data": [str(text)], "out": base, "steps": 30})
    with pytest.raises(ValueError, match="never in a chat"):
        preferences.learn(base, str(path), out)
    finetune.finetune({"data": [str(chat)], "init": base, "out": init, "steps": 20})
    preferences.learn(init, str(path), out)
    said = capsys.readouterr().out
    assert "18 comparisons to learn from, 2 held out" in said and "100.0% of held-out" in said
    before, after = (model.load(folder)[0] for folder in (init, out))
    assert any((after[name] != w).any() for name, w in before.items())
    assert finetune.has_format(preferences.talk.opened(out)[2])
