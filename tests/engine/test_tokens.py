"""Tokens in a file: those of the texts, made once, as many as are asked for, and found again."""

import math
import os
import pickle

import numpy as np
import pytest
from example_tokenizers import TOKENIZERS, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import spans, tokens

TOKENIZER = TOKENIZERS["gpt2"]
PARTS = [
    [spans.held(text) for text in part] for part in (["the cat sat. " * 40, "a dog"], ["on a mat."], ["so it is 12."])
]


def mapped(
    folder, parts=PARTS, tokenizer=TOKENIZER, begin=(0,), data="data", least=1, enough=math.inf, seconds=math.inf
):
    os.makedirs(folder, exist_ok=True)
    return tokens.mapped(folder, parts, tokenizer, list(begin), data, least, enough, seconds)


@pytest.fixture
def in_small_pieces(monkeypatch):
    monkeypatch.setattr(spans, "PIECE", 20)
    monkeypatch.setattr(tokens, "ALWAYS", 30)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.lists(texts, min_size=1, max_size=3)] * 3), st.sampled_from([0, 1 << 22]), st.integers(1, 20))
def test_the_tokens_are_those_of_each_text_behind_what_begins_it(tmp_path_factory, parts, several, size):
    folder, held = tmp_path_factory.mktemp("tokens"), [[spans.held(text) for text in part] for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SEVERAL", several)
        patch.setattr(tokens, "cores", lambda: 2)
        patch.setattr(spans, "PIECE", size)
        found, sizes = mapped(folder, held)
    for ids, size, part in zip(found, sizes, parts):
        assert (
            ids[:].tolist() == [i for text in part for i in (0, *TOKENIZER.encode(text))] and ids[:].dtype == np.uint16
        )
        assert len(ids) == len(ids[:]) and size == sum(len(text.encode()) for text in part)


def test_a_part_of_a_long_text_is_pieces_of_it_in_another_order(tmp_path, in_small_pieces):
    whole, sizes = mapped(tmp_path / "whole")
    assert sorted(whole[0][:].tolist()) == sorted(i for t in PARTS[0] for i in (0, *TOKENIZER.encode(t.text())))
    assert whole[0][:].tolist() != [i for t in PARTS[0] for i in (0, *TOKENIZER.encode(t.text()))]
    for limits in {"enough": 30}, {"seconds": 0.0}, {"seconds": 0.0, "least": 4}:
        some, less = mapped(tmp_path / "some", **limits)
        assert limits.get("enough", limits.get("least", 1)) <= len(some[0]) < 50 and less[0] < sizes[0]
        assert some[0][:].tolist() == whole[0][:].tolist()[: len(some[0])] and less[1:] == sizes[1:]
        for held_out, all_of_it in zip(some[1:], whole[1:]):
            assert held_out[:].tolist() == all_of_it[:].tolist()
        (tmp_path / "some" / tokens.NAME).unlink()
    assert mapped(tmp_path / "some", enough=1)[1][0] < 50 < mapped(tmp_path / "some", enough=60)[1][0]


def test_limits_are_for_long_texts(tmp_path):
    assert mapped(tmp_path, enough=1, seconds=0.0)[1] == [sum(text.size for text in part) for part in PARTS]


def test_what_was_made_is_found_again(tmp_path, in_small_pieces, monkeypatch):
    first, sizes = mapped(tmp_path, enough=30, seconds=9.0)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_encode", None)
        for limits in {}, {"enough": 29}, {"seconds": 3.0}:
            again, same = mapped(tmp_path, **{"enough": 30, "seconds": 9.0} | limits)
            assert same == sizes and [ids[:].tolist() for ids in again] == [ids[:].tolist() for ids in first]


@pytest.mark.parametrize(
    "change", [{"data": "other"}, {"begin": [1]}, {"tokenizer": TOKENIZERS["qwen"]}, {"enough": 31}, {"seconds": 10.0}]
)
def test_tokens_of_something_else_are_made_anew(change, tmp_path, in_small_pieces, monkeypatch):
    given = {"enough": 30, "seconds": 9.0}
    mapped(tmp_path, **given)
    made, write = [], tokens._write
    monkeypatch.setattr(tokens, "_write", lambda *all, **limits: made.append(1) or write(*all, **limits))
    mapped(tmp_path, **given | change)
    assert made


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"[]" + data[2:]])
def test_a_damaged_file_is_made_anew(damage, tmp_path):
    found, _ = mapped(tmp_path)
    whole = (tmp_path / tokens.NAME).read_bytes()
    (tmp_path / tokens.NAME).write_bytes(damage(whole))
    mapped(tmp_path)
    assert (tmp_path / tokens.NAME).read_bytes() == whole


def test_what_cannot_be_made_leaves_nothing(tmp_path):
    bad = [spans.Span(b"caf\xe9", 0, 4)]
    for parts, least, what in (
        (PARTS, 99, "tokens to validate on are too few for a --context of 97"),
        ([bad, *PARTS[1:]], 1, "not UTF-8"),
    ):
        with pytest.raises(ValueError, match=what):
            mapped(tmp_path / "run", parts, least=least)
        assert not (tmp_path / "run").exists()


def test_there_are_as_many_bits_as_the_vocabulary_needs(tmp_path):
    large = TOKENIZER.config | {"added_tokens": [{"id": 70_000, "content": "wo", "special": False}]}
    found, _ = mapped(tmp_path, [[spans.held("wo")]] * 3, type(TOKENIZER)(large))
    assert found[0][:].tolist() == [0, 70_000] and found[0][1] == 70_000


def test_a_tokenizer_goes_to_another_process():
    text = "the cat's 12 mats"
    for tokenizer in TOKENIZERS.values():
        assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)
