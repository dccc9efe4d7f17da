"""Data: what every Python brings along, what is held out of it, and conversations in files."""

import ast
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import corpus

content = st.text() | st.sampled_from(["", "\u2028", "\x85", "\x0b", "\x1c", "\0", "\r\n", "{role}"])
role = st.sampled_from(["system", "user", "assistant"])
message = st.fixed_dictionaries({"role": role, "content": content})
conversation = st.lists(message, min_size=1, max_size=4).filter(lambda c: any(m["role"] == "assistant" for m in c))
fast = settings(max_examples=60, deadline=None)


def test_python_has_documentation():
    documents = corpus.python_documentation()
    assert sum(map(len, documents.values())) > 1_000_000 and all(documents.values())
    assert "shutil" in documents and "topic lambda" in documents
    assert not any(".test." in f".{name}." for name in documents)


def test_docstrings_have_the_names_that_python_gives_them():
    source = '"""Of m."""\nclass A:\n  """Of A."""\n  async def f(self): """Of f."""\nif 1:\n  def g():\n    "Of g."'
    found = list(corpus.docstrings(ast.parse(source), "m"))
    assert sorted(found) == [("m", "Of m."), ("m.A", "Of A."), ("m.A.f", "Of f."), ("m.g", "Of g.")]
    assert found.index(("m.A", "Of A.")) < found.index(("m.A.f", "Of f."))


def test_there_are_thousands_of_questions_and_their_answers_are_what_docstrings_begin_with():
    asked = [(module, *qa) for module, found in corpus.questions().items() for qa in found]
    assert len(asked) > 2000  # how many there are depends on the release of Python and on what is installed
    for module, name, answer, docstring in asked:
        assert name.startswith(f"{module}.") and "._" not in name[len(module) :]
        assert " ".join(docstring.split()).startswith(answer) and answer[0].isupper() and answer[-1] in ".!"
        assert 12 <= len(answer) <= 120
    answers = {name: answer for _, name, answer, _ in asked}
    assert answers["shutil.copyfile"].startswith("Copy data from src to dst")
    conversation = corpus.as_conversation("shutil.copyfile", answers["shutil.copyfile"])
    assert conversation[0] == {"role": "user", "content": "What does shutil.copyfile do?"}
    assert conversation[1] == {"role": "assistant", "content": answers["shutil.copyfile"]} and len(conversation) == 2


def test_what_is_held_out_is_of_other_modules():
    parts = corpus.split(corpus.python_documentation())
    assert sorted(name for part in parts for name in part) == sorted(corpus.python_documentation())
    total = len(corpus.python_documentation())
    assert [len(part) for part in parts[1:]] == [total // 20, total // 10]
    asked, known = corpus.questions(), set()
    conversations = [{chat[0]["content"] for chat in part} for part in corpus.conversations([])]
    for names, said in zip(parts, conversations):
        found = [question for module in names for question in asked.get(module, []) if question[2] not in known]
        assert said == {f"What does {name} do?" for name, _, _ in found} and len(said) > 100
        known |= {docstring for _, _, docstring in found}


def test_no_paragraph_is_both_learned_and_held_out():
    training, validation, test = (
        {paragraph.strip() for text in part for paragraph in text.text().split("\n\n")} - {""}
        for part in corpus.texts(None)
    )
    assert not training & validation and not training & test and not validation & test
    whole = corpus.python_documentation()
    kept = sum(len(text.text()) for text in corpus.texts(None)[2])
    assert 0.7 < kept / sum(len(whole[name]) for name in corpus.split(whole)[2]) < 1


@fast
@given(st.lists(st.lists(st.sampled_from("abcdef")).map("\n\n".join)), st.lists(st.sampled_from("abcdef")))
def test_unread_takes_out_what_is_known_and_nothing_else(texts, known):
    kept = corpus.unread(texts, known)
    assert "".join(kept).replace("\n", "") == "".join(c for t in texts for c in t if c in "abcdef" and c not in known)


def test_the_parts_are_the_same_each_time():
    assert corpus.split(dict.fromkeys(map(str, range(50)))) == corpus.split(dict.fromkeys(map(str, range(50))))
    assert corpus.split({"only": "one"}) == (["only"], [], [])


# --- files ---


@fast
@given(st.lists(conversation, min_size=1, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
@example([[{"role": "user", "content": "a\u2028b\x85"}, {"role": "assistant", "content": "c"}]], False, "\n")
def test_conversations_come_back_from_a_file(tmp_path_factory, conversations, ascii, newline):
    path = tmp_path_factory.getbasetemp() / "back.jsonl"
    lines = [json.dumps({"messages": messages, "id": 1}, ensure_ascii=ascii) for messages in conversations]
    path.write_bytes((newline.join(lines) + newline).encode())
    assert corpus.read_conversations(path) == conversations


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
        corpus.read_conversations(path)


@pytest.mark.parametrize(
    "content, what",
    [(b"", "empty"), (b"\n \n", "conversation"), (b'{"messages": [\xff', "UTF-8 text: byte 14 is 0xff")],
)
def test_a_file_without_conversations_is_refused(tmp_path, content, what):
    (tmp_path / "chat.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"chat.jsonl .*{what}"):
        corpus.read_conversations(tmp_path / "chat.jsonl")


@fast
@given(st.text(min_size=1, max_size=400).map(lambda text: text.replace("\r", "")).filter(bool))
def test_a_file_is_cut_into_three_parts(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    (before, after), (validation,), (test,) = ([span.text().encode() for span in part] for part in corpus.texts([path]))
    size, most = path.stat().st_size, 1 if text.isascii() else 7  # a part ends where a character does
    assert before + validation + after + test == path.read_bytes()
    assert abs(len(before) - len(validation + after)) <= most
    assert abs(len(test) - size / 10) <= most and abs(len(validation) - 0.9 * size / 20) <= most


def test_of_long_files_less_is_held_out_and_nothing_is_read(tmp_path):
    sizes = {"one.txt": 10**12, "two.txt": 3 * 10**12}
    for name, size in sizes.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # takes no room
    training, validation, test = corpus.texts([str(tmp_path / name) for name in sizes])
    assert abs(sum(text.size for text in validation) - corpus.VALIDATION) <= 2
    assert abs(sum(text.size for text in test) - corpus.TEST) <= 2 and abs(3 * test[0].size - test[1].size) <= 3
    assert sum(text.size for part in (training, validation, test) for text in part) == sum(sizes.values())
    assert abs(training[0].size / training[1].size - 1) < 0.01 and test[1].stop == 3 * 10**12


@fast
@given(st.integers(3, 45), st.integers(0, 45))
def test_every_tenth_conversation_of_the_files_is_held_out(tmp_path_factory, first, second):
    paths = [tmp_path_factory.getbasetemp() / name for name in ("one.jsonl", "two.jsonl")][: 1 + (second > 0)]
    every = [[{"role": "assistant", "content": f"{i}"}] for i in range(first + second)]
    for path, part in zip(paths, (every[:first], every[first:])):
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in part))
    training, validation, test = corpus.conversations(paths)
    step = min(10, len(every))  # of fewer, the last two
    assert test == every[step - 1 :: step] and validation == every[step - 2 :: step]
    assert sorted(map(str, [*training, *validation, *test])) == sorted(map(str, every))


def test_two_conversations_are_too_few(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(2 * '{"messages": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(ValueError, match="three conversations"):
        corpus.conversations([path])


# --- arrays ---


@fast
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 9))
def test_rows_are_the_ids_in_order_and_then_what_fills_up(ids, context):
    rows = corpus.rows(np.array(ids), context, -1)
    flat = rows.ravel().tolist()
    assert flat[: len(ids)] == ids and set(flat[len(ids) :]) <= {-1} and len(flat) - len(ids) < context
    assert rows.shape[1] == context


@fast
@given(st.integers(1, 60), st.integers(1, 60))
def test_what_is_taken_evenly_has_both_ends_and_no_gap_twice_as_wide(count, most):
    (rows, none, doubled) = corpus.evenly((np.arange(count), None, 2 * np.arange(count)), most)
    assert none is None and (doubled == 2 * rows).all() and len(rows) == min(most, count) and rows[0] == 0
    if len(rows) > 1:
        assert rows[-1] == count - 1 and np.diff(rows).max() - np.diff(rows).min() <= 1
    assert (corpus.evenly((np.arange(count),))[0] == np.arange(count)).all()


@fast
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_every_row_comes_once_an_epoch(count, size, seed):
    seen = [row for step in range(4 * count) for row in corpus.epochs(count, size, step, seed)]
    for epoch in range(4 * size):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_order_is_another_in_each_epoch_and_for_each_seed():
    orders = [tuple(corpus.epochs(50, 50, step, seed)) for step in range(3) for seed in range(3)]
    assert len({*orders}) == 9
