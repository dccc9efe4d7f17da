import re
import unicodedata

import pytest
from example_tokenizers import TOKENIZERS, edges
from example_tokenizers import texts as hard_texts
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from engine import pretokenize

few = settings(max_examples=150, deadline=None)
NAMES = "gpt2", "llama3", "qwen", "[a-z]{2}|x", r"\p{L}", r"\d", "b|"
SPLIT = {name: pretokenize.pre_tokenizer(pretokenize.published(name))[0] for name in NAMES}


@few
@given(st.characters(exclude_categories=["Cs"]))
def test_character_classes_are_the_unicode_categories(char):
    category = unicodedata.category(char)
    white = char.isspace() and char not in "\x1c\x1d\x1e\x1f"
    names = ("L", "N", "Lu", "Nd", "P", "Cn", "M")
    expected = {rf"\p{{{name}}}": category.startswith(name) for name in names}
    for pattern, inside in (expected | {r"\s": white, r"\d": category == "Nd"}).items():
        opposite = pattern[0] + pattern[1].upper() + pattern[2:]
        for limit in (limit for limit in pretokenize.LIMITS if ord(char) <= limit):
            for form, wanted in {pattern: inside, f"[^{pattern}]": not inside, f"[{opposite}]": not inside}.items():
                assert bool(re.fullmatch(pretokenize.to_python(form, limit), char)) == wanted


@pytest.mark.parametrize("char", "\t\n\v\f\r\x1c\x1f \x85\xa0\u2028\u3000")
def test_white_space_is_unicode_s(char):
    for limit in (limit for limit in pretokenize.LIMITS if ord(char) <= limit):
        assert bool(re.fullmatch(pretokenize.to_python(r"\s", limit), char)) == (char not in "\x1c\x1f")
        assert bool(re.fullmatch(pretokenize.to_python(r"\p{Cc}", limit), char)) == (char < " " or char == "\x85")


@few
@given(hard_texts)
def test_words_are_the_same_whatever_else_the_text_has(text):
    """A text of ASCII, one of the basic plane and one beyond are each matched by classes of their own."""
    for split in (SPLIT[name] for name in pretokenize.PATTERNS):
        for further in " é", " 😀":
            assert [*split(text + "x"), further] == [*split(text + "x" + further)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=edges | hard_texts, data=st.data(), allow_special=st.booleans(), block=st.integers(1, 5))
def test_blocks_and_pieces_give_the_ids_of_the_whole(name, text, data, allow_special, block):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=len(text) // 4)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    tokenizer = TOKENIZERS[name]
    whole = tokenizer.encode(text, allow_special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenize, "BLOCK", block)
        assert tokenizer.encode(text, allow_special) == whole
        assert list(tokenizer.encode_iter(pieces, allow_special)) == whole


@pytest.mark.parametrize("line", ["a word\n", "1 2 3 ", "日本語。", "<|end|> it's me"])
def test_a_text_in_pieces_is_never_held_whole(line, monkeypatch):
    tokenizer, sizes = bpe.Tokenizer(TOKENIZERS["llama3"].config), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, *rest: sizes.append(len(text)) or encode(text, *rest))
    n = sum(1 for _ in tokenizer.encode_iter((line for _ in range(100_000)), allow_special=True))
    assert n > 100_000 and max(sizes) < 4 * pretokenize.BLOCK


@pytest.mark.parametrize("line", ["a word\n", "1 2 3 ", "日本語。", "it's me. "])
def test_a_long_text_is_split_in_blocks(line, monkeypatch):
    sizes, splitter = [], pretokenize.splitter

    def recorded(pattern):
        split = splitter(pattern)
        return lambda text: sizes.append(len(text)) or split(text)

    monkeypatch.setattr(pretokenize, "splitter", recorded)
    split = pretokenize.pre_tokenizer(pretokenize.published("llama3"))[0]
    assert "".join(split(line * 10_000)) == line * 10_000
    assert len(sizes) > 2 and max(sizes) < pretokenize.BLOCK + 20


@few
@given(st.sampled_from(NAMES), hard_texts)
def test_the_words_are_the_text(name, text):
    words = [*SPLIT[name](text)]
    assert "".join(words) == text and all(words)


def test_words_are_cut_as_published():
    words = lambda name, text: [*SPLIT[name](text)]
    assert words("gpt2", "It's 1234 yes!\n\n  no") == ["It", "'s", " 1234", " yes", "!", "\n\n ", " no"]
    assert words("llama3", "It'S 1234 yes!\n\n  no") == ["It", "'S", " ", "123", "4", " yes", "!\n\n", " ", " no"]
    assert words("qwen", "12 a") == ["1", "2", " a"]
    assert words(r"\d", "a12 b") == ["a", "1", "2", " b"]  # what lies between the matches is a piece too
    assert words("b|", "abc") == ["a", "b", "c"]  # and so is what an empty match cuts
    spaced = pretokenize.pre_tokenizer({"type": "ByteLevel"})[0]
    assert [*spaced("a.b c")] == [" a", ".", "b", " c"] and [*spaced(" a")] == [" a"]
