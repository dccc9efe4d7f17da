"""Stretches of texts: cut where no token changes, spread evenly, and recognised without being read whole."""

import gzip
import os
import threading

import pytest
from example_tokenizers import TOKENIZERS, edges, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from engine import spans

fast = settings(max_examples=100, deadline=None)
anything = texts | edges | st.text(st.characters(exclude_categories=["Cs"]))


@fast
@given(st.sampled_from([*bpe.PATTERNS, "NFC"]), anything, st.integers(1, 9), st.booleans())
def test_the_tokens_of_the_pieces_are_those_of_the_whole(tmp_path_factory, name, text, size, in_memory):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    tokenizer = TOKENIZERS.get(name) or bpe.Tokenizer(TOKENIZERS["gpt2"].config | {"normalizer": {"type": "NFC"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PIECE", size)
        patch.setattr(spans, "NEAR", 4)
        found = spans.pieces(spans.held(text) if in_memory or not text else spans.whole(path))
    assert "".join(piece.text() for piece in found) == text
    assert [i for piece in found for i in tokenizer.encode(piece.text())] == tokenizer.encode(text)


@fast
@given(anything, st.integers(1, 9), st.integers(0, 9))
def test_where_there_is_no_edge_a_text_is_cut_between_lines_or_characters(text, size, before):
    span = spans.held("." * before + text)
    span = span.between(before, span.stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PIECE", size)
        patch.setattr(spans, "NEAR", 3)
        patch.setattr(spans, "FAR", 8)
        found = spans.pieces(span)
        assert max(piece.size for piece in found) <= size + 8
    assert "".join(piece.text() for piece in found) == text
    assert all(a.stop == b.start for a, b in zip(found, found[1:]))


def test_a_text_is_cut_before_a_space_behind_a_mark_before_that_at_a_line_and_else_anywhere(monkeypatch):
    monkeypatch.setattr(spans, "NEAR", 8)
    monkeypatch.setattr(spans, "FAR", 8)
    place = lambda text: spans.edge(spans.held(text + 9 * "-"), 1)
    assert [place(text) for text in ("abc. d e", "abc.-d-e", "-.-\n--.-", "-" * 9, "é" * 9)] == [6, 3, 4, 1, 2]
    assert spans.edge(spans.held("ab------"), 1) == 8  # its end is near


@fast
@given(st.lists(st.binary(max_size=30), max_size=6), st.integers(1, 4))
def test_a_short_text_is_recognised_by_every_byte(contents, block):
    found = [spans.Span(content, 0, len(content)) for content in contents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "BLOCK", block)
        assert b"".join(spans.traits(found)) == b"\0".join(contents)


@fast
@given(st.lists(st.binary(max_size=90), min_size=1, max_size=4), st.integers(1, 5))
def test_a_long_text_is_recognised_by_sizes_and_a_few_blocks(contents, block):
    found = [spans.Span(content, 0, len(content)) for content in contents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "BLOCK", block)
        patch.setattr(spans, "BLOCKS", 4)
        traits = [*spans.traits(found)]
        longer = [*spans.traits([*found[:-1], spans.Span(contents[-1] + b"x", 0, len(contents[-1]) + 1)])]
    total = sum(map(len, contents))
    if total > 4 * block:
        assert sum(map(len, traits)) <= (4 + len(found)) * block + 4 * len(found)
        assert b"%d\0" % len(contents[-1]) in traits
    assert longer != traits


@fast
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 99))
def test_a_sample_is_evenly_spread_and_about_as_large_as_it_may_be(sizes, most):
    texts = [spans.held("a " * size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PIECE", 4)
        found = [piece for text in texts for piece in spans.pieces(text)]
        some = spans.sample(texts, most)
    if sum(text.size for text in texts) <= most:
        assert some == found
    else:
        assert {*some} <= {*found} and len(some) <= max(1, most / sum(text.size for text in texts) * len(found))
        assert some[0] == found[0] and (len(some) == 1 or some[-1] == found[-1])


def test_what_cannot_be_read_from_any_place_is_held(tmp_path):
    (tmp_path / "text.gz").write_bytes(gzip.compress("é a".encode()))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("é a"))
    writer.start()
    for name in "text.gz", "pipe":
        assert spans.whole(str(tmp_path / name)) == spans.held("é a")
    writer.join()


@pytest.mark.parametrize("bad, what", [(b"\xff", "0xff"), (b"\xc3 ", "0xc3"), (b"\xe2\x82\n", "0xe2")])
def test_a_byte_that_is_not_utf8_is_named_wherever_it_stands(bad, what, tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PIECE", 50)
    path, good = tmp_path / "text.txt", b"one line\n" * 100
    path.write_bytes(good + b"a " + bad + good)
    with pytest.raises(ValueError, match=rf"text.txt is not UTF-8 text: byte 902 is {what}, in line 101$"):
        for piece in spans.pieces(spans.whole(path)):
            piece.text()


def test_a_file_that_is_empty_or_becomes_shorter_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words")
    span = spans.whole(path)
    path.write_text("")
    with pytest.raises(ValueError, match="text.txt has become shorter"):
        span.text()
    with pytest.raises(ValueError, match="text.txt is empty"):
        spans.whole(path)
