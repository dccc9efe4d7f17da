import random
from collections import Counter

import pytest
from example_tokenizers import TOKENIZERS
from example_tokenizers import texts as hard_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bpe
from engine import merges
from engine.tokenizer_json import BYTE_CHARS

few = settings(max_examples=150, deadline=None)


@few
@given(st.lists(st.text("abcñ", min_size=1, max_size=12)), st.permutations(BYTE_CHARS), st.integers(0, 20))
@example(["aaaa", "aaa", "baaab"], BYTE_CHARS, 9)
@example(["abab" * 3, "baba"], BYTE_CHARS[::-1], 9)
def test_learned_are_the_merges_of_the_textbook(words, alphabet, n_merges):
    counts = Counter(words)
    spelled = {tuple(bpe.spell(word)): n for word, n in counts.items()}
    vocab, learned = bpe.textbook_learn(spelled, alphabet, 256 + n_merges)
    assert merges.learn_merges(counts, alphabet, 256 + n_merges) == (list(vocab), learned)


def test_a_token_that_is_there_is_not_made():
    tokens, learned = merges.learn_merges({"abc": 9}, ["ab", *BYTE_CHARS], 999)
    assert tokens == ["ab", *BYTE_CHARS, "bc", "abc"] and learned == [("b", "c"), ("a", "bc")]


@few
@given(st.sampled_from(sorted(bpe.PATTERNS)), st.text("abn é", max_size=60) | hard_texts)
@example("gpt2", "banana" * 100)
def test_a_word_is_merged_as_in_the_textbook(name, text):
    tokenizer = TOKENIZERS[name]
    learned, vocab = map(tuple, tokenizer.config["model"]["merges"]), tokenizer.config["model"]["vocab"]
    learned = list(learned)
    for word in tokenizer.split(text):
        start = [tokenizer.byte_ids[byte] for byte in word.encode()]
        expected = bpe.textbook_encode(word, vocab, learned, split=lambda word: [word])
        assert merges.merge_word(list(start), tokenizer.ranks, tokenizer.results) == expected
        assert merges.merge_long_word(start, tokenizer.ranks, tokenizer.results) == expected


@pytest.mark.parametrize("length", [merges.LONG_WORD, merges.LONG_WORD + 1])
def test_where_a_word_becomes_long_nothing_changes(length):
    tokenizer = TOKENIZERS["gpt2"]
    ids = tokenizer.encode("banana" * length)[:0] + [tokenizer.byte_ids[b"abn"[i * i % 7 % 3]] for i in range(length)]
    merged = merges.merge_word(list(ids), tokenizer.ranks, tokenizer.results)
    assert merged == merges.merge_long_word(ids, tokenizer.ranks, tokenizer.results) and len(merged) < length


@pytest.mark.parametrize("merge", [merges.merge_word, merges.merge_long_word])
def test_a_merge_learned_late_may_make_way_for_an_earlier_one(merge):
    """Published files need not be in the order of learning: 0 1 -> 9 is last, and 9 2 -> 8 first."""
    ranks, results = {(9, 2): 0, (1, 2): 1, (0, 1): 2}, [8, 7, 9]
    assert merge([0, 1, 3, 0, 1, 2, 0, 1, 0], ranks, results) == [9, 3, 0, 7, 9, 0]
    assert merge([0, 1, 2], {(9, 2): 0, (0, 1): 1}, [8, 9]) == [8]
    assert merge([5], ranks, results) == [5] and merge([], ranks, results) == []


def test_a_long_word_takes_time_in_proportion():
    for word in "a" * 200_000, "".join(random.Random(0).choices("abnt", k=200_000)):
        tokenizer = TOKENIZERS["gpt2"]
        assert tokenizer.decode(tokenizer.encode(word)) == word  # an hour, were it quadratic


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(merges, "CACHED_WORDS", 50)
    tokenizer = bpe.Tokenizer(TOKENIZERS["gpt2"].config)
    text = " ".join(map(str, range(500))) + "x" * 5000
    assert tokenizer.encode(text) == TOKENIZERS["gpt2"].encode(text)
    assert len(tokenizer._ids_of) <= 50 and all(len(word) <= merges.CACHED_LENGTH for word in tokenizer._ids_of)


def test_a_word_is_encoded_once():
    asked = []
    cache = merges.Cache(lambda word: asked.append(word) or [len(word)])
    longest, too_long = "x" * merges.CACHED_LENGTH, "x" * (merges.CACHED_LENGTH + 1)
    for word in longest, too_long, longest, too_long:
        assert list(cache[word]) == [len(word)]
    assert asked == [longest, too_long, too_long]
