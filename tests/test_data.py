"""Data: what every Python brings along, what is held out of it, and conversations in files."""

import ast
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data

content = st.text() | st.sampled_from(["", "\u2028", "\x85", "\x0b", "\x1c", "\0", "\r\n", "{role}"])
role = st.sampled_from(["system", "user", "assistant"])
message = st.fixed_dictionaries({"role": role, "content": content})
conversation = st.lists(message, min_size=1, max_size=4).filter(lambda c: any(m["role"] == "assistant" for m in c))
fast = settings(max_examples=60, deadline=None)


def test_python_has_documentation():
    documents = data.python_documentation()
    assert sum(map(len, documents.values())) > 1_000_000 and all(documents.values())
    assert "shutil" in documents and "topic lambda" in documents
    assert not any(".test." in f".{name}." for name in documents)


def test_docstrings_have_the_names_that_python_gives_them():
    source = '"""Of m."""\nclass A:\n  """Of A."""\n  async def f(self): """Of f."""\nif 1:\n  def g():\n    "Of g."'
    found = list(data.docstrings(ast.parse(source), "m"))
    assert sorted(found) == [("m", "Of m."), ("m.A", "Of A."), ("m.A.f", "Of f."), ("m.g", "Of g.")]
    assert found.index(("m.A", "Of A.")) < found.index(("m.A.f", "Of f."))


def test_there_are_thousands_of_questions_and_their_answers_are_what_docstrings_begin_with():
    asked = [(module, *qa) for module, found in data.questions().items() for qa in found]
    assert len(asked) > 4000
    for module, name, answer, docstring in asked:
        assert name.startswith(f"{module}.") and "._" not in name[len(module) :]
        assert " ".join(docstring.split()).startswith(answer) and answer[0].isupper() and answer[-1] in ".!"
        assert 12 <= len(answer) <= 120
    answers = {name: answer for _, name, answer, _ in asked}
    assert answers["shutil.copyfile"].startswith("Copy data from src to dst")
    conversation = data.as_conversation("shutil.copyfile", answers["shutil.copyfile"])
    assert conversation[0] == {"role": "user", "content": "What does shutil.copyfile do?"}
    assert conversation[1] == {"role": "assistant", "content": answers["shutil.copyfile"]} and len(conversation) == 2


def test_what_is_held_out_is_of_other_modules():
    train, held_out = data.split(data.python_documentation())
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(data.python_documentation())
    assert len(held_out) == (len(train) + len(held_out)) // 10
    train_texts, held_out_texts = data.texts(None)
    assert (len(train_texts), len(held_out_texts)) == (len(train), len(held_out))
    to_train, to_validate = ({chat[0]["content"] for chat in side} for side in data.conversations([]))
    assert not to_train & to_validate and len(to_validate) > 200
    asked = data.questions()
    known = {docstring for module in train for _, _, docstring in asked.get(module, [])}
    for names, side, left_out in (train, to_train, set()), (held_out, to_validate, known):
        wanted = {name for module in names for name, _, text in asked.get(module, []) if text not in left_out}
        assert side == {f"What does {name} do?" for name in wanted}


def test_the_halves_are_the_same_each_time():
    assert data.split(dict.fromkeys(map(str, range(50)))) == data.split(dict.fromkeys(map(str, range(50))))
    assert data.split({"only": "one"}) == (["only"], [])


# --- files ---


@fast
@given(st.lists(conversation, min_size=1, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
@example([[{"role": "user", "content": "a\u2028b\x85"}, {"role": "assistant", "content": "c"}]], False, "\n")
def test_conversations_come_back_from_a_file(tmp_path_factory, conversations, ascii, newline):
    path = tmp_path_factory.getbasetemp() / "back.jsonl"
    lines = [json.dumps({"messages": messages, "id": 1}, ensure_ascii=ascii) for messages in conversations]
    path.write_bytes((newline.join(lines) + newline).encode())
    assert data.read_conversations(path) == conversations


BAD = {
    "not JSON": "{",
    "no object": "[]",
    "a number": "1",
    "null": "null",
    "no messages": "{}",
    "no message": '{"messages": []}',
    "messages that are none": '{"messages": "abc"}',
    "a message that is none": '{"messages": [null]}',
    "no content": '{"messages": [{"role": "assistant"}]}',
    "no text": '{"messages": [{"role": "assistant", "content": null}]}',
    "no role": '{"messages": [{"content": "x"}]}',
    "another role": '{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    "a role that is none": '{"messages": [{"role": ["user"], "content": "x"}, {"role": "assistant", "content": "y"}]}',
    "no answer": '{"messages": [{"role": "user", "content": "x"}]}',
    "two in a line": '{"messages": [{"role": "assistant", "content": "x"}]}' * 2,
    "too deep": "[" * 100_000,
    "too long a number": "9" * 5000,
    "no number": '{"messages": [{"role": "assistant", "content": "x", "weight": NaN}]}',
    "half a character": '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
    "half a character, a low one": '{"messages": [{"role": "assistant", "content": "\\udc80"}]}',
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named(tmp_path, bad):
    good = json.dumps({"messages": [{"role": "assistant", "content": "x"}]})
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{good}\n\n{good}\n{BAD[bad]}\n{good}\n")
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 4: [a-zA-Z ,:]{9,80}$"):
        data.read_conversations(path)


@pytest.mark.parametrize(
    "content, what",
    [(b"", "empty"), (b"\n \n", "conversation"), (b'{"messages": [\xff', "UTF-8 text: byte 14 is 0xff")],
)
def test_a_file_without_conversations_is_refused(tmp_path, content, what):
    (tmp_path / "chat.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"chat.jsonl .*{what}"):
        data.read_conversations(tmp_path / "chat.jsonl")


@fast
@given(st.integers(2, 45), st.integers(0, 45))
def test_every_tenth_conversation_of_the_files_is_held_out(tmp_path_factory, first, second):
    paths = [tmp_path_factory.getbasetemp() / name for name in ("one.jsonl", "two.jsonl")][: 1 + (second > 0)]
    every = [[{"role": "assistant", "content": f"{i}"}] for i in range(first + second)]
    for path, part in zip(paths, (every[:first], every[first:])):
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in part))
    train, held_out = data.conversations(paths)
    step = min(10, len(every))  # of fewer, the last
    assert held_out == every[step - 1 :: step] and sorted(map(str, train + held_out)) == sorted(map(str, every))
