"""Files that others wrote: what is read is what json, csv and gzip wrote, and what cannot be read is one sentence."""

import csv
import gzip
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import corpus, files
from lab import preferences, tasks

fast = settings(max_examples=60, deadline=None)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@fast
@given(values, st.booleans(), st.sampled_from([None, 0, 2]))
def test_json_comes_back(value, ascii, indent):
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    assert files.parse_json(text, "f") == json.loads(text) == value


@fast
@given(st.lists(values, max_size=5), st.booleans(), st.sampled_from(["\n", "\r\n", "\n \n"]))
def test_lines_of_json_come_back_with_their_numbers(rows, ascii, newline):
    text = newline.join(json.dumps(row, ensure_ascii=ascii) for row in rows) + newline
    step = newline.count("\n")
    assert list(files.json_lines(text, "f")) == [(f"f, line {1 + step * i}", row) for i, row in enumerate(rows)]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)


@fast
@given(st.lists(st.tuples(cells, cells, st.just("x")), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_rows_of_csv_come_back_with_the_line_they_begin_in(tmp_path_factory, rows, newline):
    path = tmp_path_factory.getbasetemp() / "back.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows([("one", "two", "three"), *rows])
    found = list(files.csv_lines(files.read_text(path), path))
    assert [tuple(row.values()) for _, row in found] == rows
    line = 2
    for (where, _), row in zip(found, rows):
        assert where == f"{path}, line {line}"
        line += 1 + sum(len(re.findall("\r\n|\r|\n", cell)) for cell in row)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "f, line 1: not JSON"),
        ("[1,\n2,\n}", "f, line 3: not JSON"),
        ('{"a": 1', "f, line 1: not JSON"),
        ("[" * 100_000, "f: .*nested too deeply"),
        ('{"a":' * 100_000, "f: .*nested too deeply"),
        ("9" * 5000, "f: a number that is .*thousands of digits"),
        ("NaN", "f: a number that is NaN"),
        ("[-Infinity]", "f: a number that is .*infinite"),
        ("1e999", "f: a number that is .*infinite"),
        (r'"\ud800"', "f: half of a surrogate pair"),
        (r'{"\uDC00": 1}', "f: half of a surrogate pair"),
        (r'["\ud800\ud800\udc00"]', "f: half of a surrogate pair"),
    ],
)
def test_what_is_no_json_says_where(text, said):
    with pytest.raises(ValueError, match=said) as error:
        files.parse_json(text, "f")
    assert len(str(error.value)) < 100


def test_what_looks_like_half_a_character_may_be_none():
    assert files.parse_json(r'["\ud83d\ude00", "\\ud800"]', "f") == ["😀", r"\ud800"]


@given(values)
@fast
def test_what_is_shown_fits_into_a_sentence(value):
    assert len(files.shown(value)) <= 80 and files.shown("x" * 9) == "'xxxxxxxxx'" and files.shown(value).isprintable()


# --- damaged files ---

JUNK = [b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"\xe2\x80\xa8"]
JUNK += [b"NaN", b"-Infinity", b"1e999", b"-1", b"null", b"true", b'""', b"{}", b"[]", b"9" * 5000, b"[" * 100_000]


def damaged(content, rng):
    """Bytes with some of them cut off, changed, left out, or replaced by what is hard to read."""
    for _ in range(rng.choice([1, 1, 2])):
        start = rng.randrange(len(content) + 1)
        values = [found.span() for found in re.finditer(rb'"[^"\n]*"|\d+|\[[^][\n]*\]|true|null', content)]
        begin, end = rng.choice(values or [(start, start)])
        content = rng.choice(
            [
                content[:start],
                content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :],
                content[:start] + rng.choice(JUNK) + content[start + rng.choice([0, 1, 10, 100]) :],
                content[:begin] + rng.choice(JUNK) + content[end:],
                content[:begin] + rng.choice(JUNK) + content[end:],
            ]
        )
    return content


def votes_as_csv(votes):
    return "model_a,model_b,winner\n" + "".join(f'{v["model_a"]},"{v["model_b"]}",{v["winner"]}\n' for v in votes)


def samples():
    """{name of a file: (what reads it, its content)} of every format that is read."""

    def sample(name):
        with open(f"{tasks.SAMPLES}/{name}", "rb") as file:
            return file.read()

    votes = b"".join(sample("votes.jsonl").splitlines(keepends=True)[:20])
    rows = [json.loads(line) for line in votes.splitlines()]
    arc = {name: json.loads(sample(f"arc/{name}.json")) for name in ("gravity", "mirror")}
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]}
    judged = {"prompt": "q", "chosen": [{"role": "assistant", "content": "é"}], "rejected": "b"}
    return {
        "votes.jsonl": (tasks.read_votes, votes),
        "votes.json": (tasks.read_votes, json.dumps(rows, indent=1).encode()),
        "votes.csv": (tasks.read_votes, votes_as_csv(rows).encode()),
        "votes.csv.gz": (tasks.read_votes, gzip.compress(votes_as_csv(rows).encode(), mtime=0)),
        "mirror.json": (tasks.read_arc, sample("arc/mirror.json")),
        "arc.json": (tasks.read_arc, json.dumps(arc).encode()),
        "hle.jsonl": (tasks.read_hle, sample("hle.jsonl")),
        "humaneval.jsonl": (tasks.read_humaneval, sample("humaneval.jsonl")),
        "choice.jsonl": (tasks.read_choice, sample("choice.jsonl")),
        "text.txt": (tasks.read_text, sample("text.txt")),
        "text.txt.gz": (tasks.read_text, gzip.compress(sample("text.txt"), mtime=0)),
        "chat.jsonl": (corpus.read_conversations, (json.dumps(chat) + "\n").encode() * 3),
        "comparisons.jsonl": (preferences.read, (json.dumps(judged) + "\n").encode() * 3),
    }


def read_damaged(name, path, times, seed=0):
    """How many of so many damaged files are refused; asserts of each that it gives a value of whole text and numbers,
    or one sentence.
    """
    (read, content), rng, refused = samples()[name], random.Random(seed), 0
    for _ in range(times):
        path.write_bytes(damaged(content, rng))
        try:
            json.dumps(read(str(path)), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, OSError) as error:
            said = str(error)
            assert type(error) is ValueError or isinstance(error, OSError), repr(error)[:300]
            assert str(path) in said and len(said) <= 300 and said.isprintable(), said[:1000]
            refused += 1
    return refused


@pytest.mark.parametrize("name", samples())
def test_a_damaged_file_is_read_or_refused_in_one_sentence(name, tmp_path):
    read, content = samples()[name]
    (tmp_path / name).write_bytes(content)
    assert read(str(tmp_path / name))
    assert read_damaged(name, tmp_path / name, 100) > 10


@pytest.mark.parametrize("name", samples())
def test_a_folder_is_no_file(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises((OSError, ValueError), match="Is a directory|no ARC tasks") as error:
        samples()[name][0](str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)
