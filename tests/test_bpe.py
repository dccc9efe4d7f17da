import doctest
import re

import pytest
from example_tokenizers import GOLDEN, NAMES, SPECIAL, TOKENIZERS, to_config
from example_tokenizers import texts as hard_texts
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe

COMPLETE = [name for name in TOKENIZERS if not re.search("bytes|prefix|runs|NFC", name)]
few = settings(max_examples=150, deadline=None)

# --- the textbook


def test_what_a_reader_types_along_comes_out():
    result = doctest.testmod(bpe)
    assert result.attempted >= 8 and not result.failed


@few
@given(st.lists(st.sampled_from("ab"), max_size=12), st.tuples(st.sampled_from("ab"), st.sampled_from("ab")))
def test_a_merge_is_a_replacement_from_left_to_right(tokens, pair):
    merged = bpe.merge(tokens, pair)
    assert "".join(merged) == "".join(tokens)
    assert "|".join(merged).count("".join(pair)) == "".join(tokens).count("".join(pair))


def test_among_equally_frequent_pairs_the_smallest_ids_win():
    assert bpe.textbook_learn({("c", "d", "a", "b"): 1}, "abcd", 5)[1] == [("a", "b")]
    assert bpe.textbook_learn({("c", "d", "a", "b"): 1}, "dcba", 5)[1] == [("d", "a")]
    assert bpe.textbook_learn({("a", "c"): 1, ("a", "b"): 1}, "abc", 5)[1] == [("a", "b"), ("a", "c")]


def test_training_ends_where_nothing_is_left_to_merge():
    words = {("a", "b"): 2, ("c",): 9}
    assert bpe.textbook_learn(words, "abc", 100) == ({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")])
    assert bpe.textbook_learn(words, "abc", 3)[1] == []


@few
@given(hard_texts, hard_texts, st.integers(0, 30))
def test_the_textbook_gives_any_text_back(text, other, n_merges):
    vocab, merges = bpe.textbook_train(text, n_merges)
    assert [*vocab.values()] == [*range(256 + len(merges))] and len(merges) <= n_merges
    for string in text, other:
        ids = bpe.textbook_encode(string, vocab, merges)
        assert bpe.textbook_decode(ids, vocab) == string
        assert len(ids) <= len(string.encode())
    assert len(bpe.spell(text)) == len(text.encode()) and "".join(bpe.split_words(text)) == text


@few
@given(st.sampled_from(sorted(bpe.PATTERNS)), st.lists(st.text("abc é", max_size=40) | hard_texts), st.integers(1, 60))
def test_the_textbook_gives_the_same_merges_and_ids(name, documents, n_merges):
    text = "x".join(["x", *documents])
    tokenizer = bpe.train(text, 256 + n_merges, name, special=())
    vocab, merges = bpe.textbook_train(text, n_merges, tokenizer.split)
    assert tokenizer.config["model"]["vocab"] == vocab
    assert tokenizer.config["model"]["merges"] == [*map(list, merges)]
    for string in documents:
        ids = bpe.textbook_encode(string, vocab, merges, tokenizer.split)
        assert tokenizer.encode(string) == ids
        assert tokenizer.decode(ids) == bpe.textbook_decode(ids, vocab) == string


# --- training


@pytest.mark.parametrize("run", GOLDEN["training"])
def test_merges_are_those_of_tokenizers(run):
    tokenizer = bpe.train(run["text"], run["vocab_size"], run["pattern"])
    assert [" ".join(merge) for merge in tokenizer.config["model"]["merges"]] == run["merges"]
    assert tokenizer.vocab_size <= run["vocab_size"]


def test_documents_are_cut_as_one_by_one():
    together = bpe.train(iter(["the cat", " sat"]), 300, special=())
    assert together.config == bpe.train("the cat sat", 300, special=()).config
    assert bpe.train(["ab", "cd"], 300, special=()).vocab_size == 258  # and none across: no b c


def test_training_wants_text_and_room():
    with pytest.raises(ValueError, match="a vocabulary of 256 is too small: .* 1 special tokens need 257"):
        bpe.train("text", 256)
    with pytest.raises(ValueError, match="two characters"):
        bpe.train("text", 300, special=("x",))
    for empty in "", [], ["", ""]:
        with pytest.raises(ValueError, match="no text"):
            bpe.train(empty, 300)
    assert bpe.train("text", 257).vocab_size == 257
    assert bpe.train("text", 257, special=("<>",)).special == {"<>": 0}
    assert bpe.train("ab", 1000).vocab_size == 258  # all there is to merge is a and b
    assert bpe.train("ab", 1000, special=("<a>", "<b>", "<a>")).special == {"<a>": 0, "<b>": 1}


# --- encoding


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=NAMES)
def test_ids_are_those_of_tokenizers(case):
    tokenizer = TOKENIZERS[case["name"]]
    assert [tokenizer.encode(text, allow_special=True) for text in GOLDEN["texts"]] == case["ids"]


@few
@given(st.sampled_from(COMPLETE), hard_texts, st.booleans())
def test_any_text_comes_back(name, text, allow_special):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, allow_special)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


@few
@given(
    st.sampled_from(COMPLETE),
    st.binary() | st.lists(st.binary(max_size=3) | hard_texts.map(str.encode)).map(b"".join),
)
def test_any_bytes_come_back(name, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == data.decode("utf-8", "replace")


NO_CHARACTERS = {"a\ud800b": "a\ufffdb".encode(), "\ud83d\ude00": "\ufffd\ufffd".encode(), "a\udcff": b"a\xff"}


@pytest.mark.parametrize("text, encoded", NO_CHARACTERS.items(), ids=ascii)
def test_what_is_no_character_is_replaced_and_what_is_no_utf_8_kept(text, encoded):
    tokenizer = TOKENIZERS["gpt2"]
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == encoded


# --- special tokens


@few
@given(st.sampled_from(sorted(TOKENIZERS)), hard_texts)
def test_text_forges_no_special_token(name, text):
    tokenizer = TOKENIZERS[name]
    unknown = tokenizer.config["model"].get("unk_token")
    special = set(tokenizer.special.values()) - {tokenizer.special.get(unknown)}
    assert not special & set(tokenizer.encode("".join(tokenizer.special) + text))


def test_merges_forge_no_special_token():
    text = "the theme of the other " * 9
    plain, tokenizer = bpe.train(text, 300, special=()), bpe.train(text, 300, special=["the"])
    assert "the" in plain.config["model"]["vocab"]
    assert tokenizer.config["model"]["vocab"]["the"] == tokenizer.special["the"] == 0
    assert 0 not in tokenizer.encode(text)
    assert tokenizer.special["the"] in tokenizer.encode(text, allow_special=True)
    the = plain.config["model"]["vocab"]["the"]
    for ignore_merges in False, True:  # what another trainer may have written
        config = to_config(plain, model__ignore_merges=ignore_merges)
        config["added_tokens"] = [{"id": the, "content": "the", "special": True}]
        assert the not in bpe.Tokenizer(config).encode(text)


def test_the_longest_special_token_wins():
    tokenizer = TOKENIZERS["gpt2"]
    end, longer = tokenizer.special["<|end|>"], tokenizer.special["<|end|>of"]
    ids = tokenizer.encode("<|end|><|end|>of<|end|>o", allow_special=True)
    assert ids == [end, longer, end, *tokenizer.encode("o")]
    assert tokenizer.decode(ids) == "<|end|><|end|>of<|end|>o"


@few
@given(st.lists(st.sampled_from(["ayer", "<", *SPECIAL]), max_size=9).map("".join))
def test_what_is_cut_out_and_what_is_left_are_the_text(text):
    ids = {token: i for i, token in enumerate(SPECIAL)}
    parts = bpe.cutter(ids)(text)
    assert "".join(SPECIAL[part] if isinstance(part, int) else part for part in parts) == text
    assert not any(token in part for part in parts if isinstance(part, str) for token in SPECIAL)
    assert bpe.cutter({})(text) == [text]


# --- decoding


@few
@given(hard_texts)
def test_a_stream_has_whole_characters(text):
    tokenizer = bpe.train("x", 256, special=())  # each byte a token
    pieces = list(tokenizer.stream(iter(tokenizer.encode(text))))
    assert pieces == list(text)


def test_ids_outside_the_vocabulary_are_refused():
    tokenizer = TOKENIZERS["gpt2"]
    for wrong in tokenizer.vocab_size, -1:
        with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
            tokenizer.decode([wrong])
    assert tokenizer.decode([]) == "" and tokenizer.decode([0]) == SPECIAL[0]
    assert tokenizer.decode_bytes([tokenizer.vocab_size - 1])


# --- the slide's other tokenizers


@few
@given(st.text("abcde ", min_size=1), st.text("abcdef "), st.integers(2, 40))
def test_wordpiece_and_words(text, other, vocab_size):
    pieces = bpe.train_wordpiece(text, vocab_size)
    words = bpe.train_words(text, vocab_size)
    assert len(words) <= vocab_size and len(pieces) <= max(vocab_size, 1 + 2 * 5)
    assert bpe.encode_words(other, words) == [w if w in words else "<unk>" for w in other.split()]
    for word in other.split():
        found = bpe.encode_wordpiece(word, pieces)
        if found != ["[UNK]"]:
            assert found[0] + "".join(piece.removeprefix("##") for piece in found[1:]) == word
            # greedy: no longer piece fits where the first one does
            assert not any(word[:n] in pieces for n in range(len(found[0]) + 1, len(word) + 1))
        else:  # somewhere nothing fits
            assert word[0] not in pieces or any("##" + char not in pieces for char in word[1:])


def test_wordpiece_merges_what_raises_the_likelihood():
    # xa is the most frequent pair, but x and a are with others as often; q and z only with each other
    text = "xa xb ya yb " * 10 + "qz " * 9
    assert bpe.train_wordpiece(text, 8) - bpe.train_wordpiece(text, 1) == {"qz"}
    # c and d are together always, as a and b are, but that says little about a text in which they stand once
    assert bpe.train_wordpiece("ab " * 100 + "cd", 6) - bpe.train_wordpiece("ab cd", 1) == {"ab"}


def test_wordpiece_tells_the_beginning_of_a_word_from_its_middle():
    assert bpe.train_wordpiece("aaa", 1) == {"[UNK]", "a", "##a"}
    assert bpe.train_wordpiece("aba", 9) == {"[UNK]", "a", "##b", "##a", "ab", "aba"}
    assert bpe.encode_wordpiece("aab b#", {"a", "##ab", "##a"}) == ["a", "##ab", "[UNK]", "[UNK]"]


def test_the_most_frequent_words_are_kept():
    assert bpe.train_words("a b b c c c.", 3) == {"<unk>", "c", "b"}
    assert bpe.encode_words("c, a", {"c"}) == ["c", "<unk>", "<unk>"]
