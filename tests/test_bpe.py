import inspect
import json
import os
import pathlib
import random
import re
import sys
from contextlib import contextmanager

import pytest
from damage import assert_one_sentence, damaged
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bpe

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "tokenizers.json").read_text())
NAMES = [case["name"] for case in GOLDEN["cases"]]
TRAINING = GOLDEN["training"][0]["text"]
SPECIAL = ("<|endoftext|>", "<|end|>", "<|end|>of")
TOKENIZERS = {name: bpe.train(TRAINING, 400, name, SPECIAL) for name in bpe.PATTERNS} | {
    case["name"]: bpe.Tokenizer(case["config"]) for case in GOLDEN["cases"]
}
TOKENIZERS["words with spaces"] = bpe.train(TRAINING, 400, r"[a-z .]{5}")
TOKENIZERS["digits alone"] = bpe.Tokenizer(
    GOLDEN["cases"][NAMES.index("ByteLevel without pattern")]["config"]
    | {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
        }
    }
)
PAIRS = {"type": "Split", "pattern": {"Regex": "[a-z] [a-z]"}, "behavior": "Isolated", "invert": False}
TOKENIZERS["pairs and ByteLevel"] = bpe.Tokenizer(
    TOKENIZERS["gpt2"].config
    | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [PAIRS, TOKENIZERS["gpt2"].config["pre_tokenizer"]]}}
)
COMPLETE = [name for name in TOKENIZERS if not re.search("bytes|prefix|runs|NFC", name)]

# text as files have it, seeded with what patterns, normalisation and added tokens are sensitive to
hard = st.sampled_from(
    [
        "'s",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
        "1",
        "12",
        "²",
        "Ⅷ",
        "é",
        "e\u0301",
    ]
    + [
        "\u030a",
        "A",
        "ß",
        "ſ",
        "日本",
        "。",
        "한",
        "😀",
        "👩‍👧",
        "🏽",
        "a",
        "word",
        "agot",
        "aaaa",
        ".",
        ",",
        "_",
        "-",
        "<",
        "|>",
        "<mask>",
    ]
    + [" the", " of", "wo rd", "e", "o", *SPECIAL]
)
texts = (
    st.lists(hard | st.text(max_size=4), max_size=25).map("".join).filter(lambda t: not re.search("[\ud800-\udfff]", t))
)
few = settings(max_examples=150, deadline=None)


def to_config(tokenizer, **changes):
    """A copy of the tokenizer.json content, with keys of any depth given as a__b replaced."""
    config = json.loads(json.dumps(tokenizer.config))
    for path, value in changes.items():
        *parents, key = path.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[key] = value
    return config


# --- training


@pytest.mark.parametrize("run", GOLDEN["training"])
def test_merges_are_those_of_tokenizers(run):
    tokenizer = bpe.train(run["text"], run["vocab_size"], run["pattern"])
    assert [" ".join(merge) for merge in tokenizer.config["model"]["merges"]] == run["merges"]
    assert tokenizer.vocab_size <= run["vocab_size"]


@few
@given(st.lists(st.text("abc é", max_size=40) | texts, min_size=1, max_size=3), st.integers(1, 60))
def test_textbook_training_gives_the_same_merges(documents, n_merges):
    tokenizer = bpe.train(["x", *documents], 256 + n_merges, special=())
    byte_ids = tokenizer._byte_ids
    words = bpe.Counter()
    for document in ["x", *documents]:
        words.update(tuple(byte_ids[byte] for byte in word.encode()) for word in tokenizer.split(document))
    learned = list(zip(tokenizer._ranks, tokenizer._results))
    assert learned == [(pair, new) for pair, (_, new) in bpe.textbook_train(words, n_merges, 256).items()]


def test_training_wants_text_and_room():
    with pytest.raises(ValueError, match="257"):
        bpe.train("text", 256)
    for empty in "", [], ["", ""]:
        with pytest.raises(ValueError, match="no text"):
            bpe.train(empty, 300)
    assert bpe.train("ab", 1000).vocab_size == 258  # all there is to merge is a and b


# --- encoding


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=NAMES)
def test_ids_are_those_of_tokenizers(case):
    tokenizer = TOKENIZERS[case["name"]]
    assert [tokenizer.encode(text, allow_special=True) for text in GOLDEN["texts"]] == case["ids"]


@few
@given(st.sampled_from(COMPLETE), texts, st.booleans())
def test_any_text_comes_back(name, text, allow_special):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, allow_special)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


@few
@given(st.sampled_from(COMPLETE), st.binary() | st.lists(st.binary(max_size=3) | texts.map(str.encode)).map(b"".join))
def test_any_bytes_come_back(name, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == data.decode("utf-8", "replace")


@few
@given(st.sampled_from(sorted(bpe.PATTERNS)), st.text("abn é", max_size=60) | texts)
@example("gpt2", "banana" * 100)
def test_textbook_encoding_gives_the_same_ids(name, text):
    tokenizer = TOKENIZERS[name]
    merges = {pair: (rank, tokenizer._results[rank]) for pair, rank in tokenizer._ranks.items()}
    for word in tokenizer.split(text):
        start = [tokenizer._byte_ids[byte] for byte in word.encode()]
        expected = bpe.textbook_encode(start, merges)
        assert tokenizer._encode_word(word) == expected
        assert bpe.merge_long_word(start, tokenizer._ranks, tokenizer._results) == expected


def test_a_long_word_takes_time_in_proportion():
    for word in "a" * 200_000, "".join(random.Random(0).choices("abnt", k=200_000)):
        tokenizer = TOKENIZERS["gpt2"]
        assert tokenizer.decode(tokenizer.encode(word)) == word  # an hour, were it quadratic


# long beside the added tokens, so that there is room to cut
edges = st.lists(
    st.sampled_from(["wo rd", "word", " ", "a", "b.", "e\u0301", ".", "1,", "'s", "\n", "the "]),
    min_size=20,
    max_size=50,
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=edges | texts, data=st.data(), allow_special=st.booleans(), block=st.integers(1, 5))
def test_pieces_give_the_ids_of_the_whole(name, text, data, allow_special, block):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=len(text) // 4)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    tokenizer = TOKENIZERS[name]
    whole = tokenizer.encode(text, allow_special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "BLOCK", block)
        assert list(tokenizer.encode_iter(pieces, allow_special)) == whole
        assert tokenizer.encode(text, allow_special) == whole


@pytest.mark.parametrize("line", ["a word\n", "1 2 3 ", "日本語。", "<|end|> it's me"])
def test_a_text_in_pieces_is_never_held_whole(line, monkeypatch):
    tokenizer, sizes = bpe.Tokenizer(TOKENIZERS["llama3"].config), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, *rest: sizes.append(len(text)) or encode(text, *rest))
    n = sum(1 for _ in tokenizer.encode_iter((line for _ in range(100_000)), allow_special=True))
    assert n > 100_000 and max(sizes) < 4 * bpe.BLOCK


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "CACHED_WORDS", 50)
    tokenizer = bpe.Tokenizer(TOKENIZERS["gpt2"].config)
    text = " ".join(map(str, range(500))) + "x" * 5000
    assert tokenizer.encode(text) == TOKENIZERS["gpt2"].encode(text)
    assert len(tokenizer._cache) <= 50 and all(len(word) <= bpe.CACHED_LENGTH for word in tokenizer._cache)


# --- special tokens


@few
@given(st.sampled_from(sorted(TOKENIZERS)), texts)
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


def test_the_template_is_shown_and_not_applied():
    tokenizer = TOKENIZERS["ignore_merges and a template"]
    assert (tokenizer.bos, tokenizer.eos) == ([1], [0])
    assert (TOKENIZERS["gpt2"].bos, TOKENIZERS["gpt2"].eos) == ([], [])


# --- decoding


@few
@given(texts)
def test_a_stream_has_whole_characters(text):
    tokenizer = bpe.train("x", 256, special=())  # each byte a token
    pieces = list(tokenizer.stream(iter(tokenizer.encode(text))))
    assert pieces == list(text)


def test_ids_outside_the_vocabulary_are_refused():
    tokenizer = TOKENIZERS["gpt2"]
    for wrong in tokenizer.vocab_size, -1:
        with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
            tokenizer.decode([wrong])


# --- files


def test_saving_and_loading_change_nothing(tmp_path):
    for name, tokenizer in TOKENIZERS.items():
        tokenizer.save(tmp_path / "saved.json")
        assert bpe.load(tmp_path / "saved.json").config == tokenizer.config, name
    tokenizer.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["saved.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("special", [["<|endoftext|>", "<mask>"], ["<mask>"]])
def test_a_folder_says_which_token_ends_a_text(special, tmp_path):
    bpe.train("text", 300, special=special).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.get("eos_token") == ("<|endoftext|>" if "<|endoftext|>" in special else None)


def test_merges_may_be_strings_or_pairs():
    tokenizer = TOKENIZERS["gpt2"]
    strings = [" ".join(merge) for merge in tokenizer.config["model"]["merges"]]
    other = bpe.Tokenizer(to_config(tokenizer, model__merges=strings))
    assert other.encode(TRAINING) == tokenizer.encode(TRAINING)


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def splits(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}


@pytest.mark.parametrize(
    "name, changes",
    {
        "Unigram": {"model__type": "Unigram"},
        "dropout": {"model__dropout": 0.1},
        "byte_fallback": {"model__byte_fallback": True},
        "end_of_word_suffix": {"model__end_of_word_suffix": "</w>"},
        "continuing_subword_prefix": {"model__continuing_subword_prefix": "##"},
        "fuse_unk": {"model__fuse_unk": True, "model__unk_token": "<|end|>"},
        "truncation": {"truncation": {"max_length": 5}},
        "padding": {"padding": {"strategy": "BatchLongest"}},
        "NFKC": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        "Metaspace": {"pre_tokenizer": splits({"type": "Metaspace"})},
        "ByteLevel": {"pre_tokenizer": None},
        "the decoder Fuse": {"decoder": {"type": "Fuse"}},
        "Removed": {"pre_tokenizer": splits(SPLIT | {"pattern": {"String": " "}, "behavior": "Removed"})},
        "MergedWithNext": {"pre_tokenizer": splits(SPLIT | {"pattern": {"String": " "}, "behavior": "MergedWithNext"})},
        "Han": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\p{Han}+"}})},
        "&&": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"[\p{L}&&\p{Lu}]"}})},
        r"\\w": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\w+"}})},
        r"\}\+": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\p{N}{1,3}+"}})},
        r"\$": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\s+$"}})},
        "split pattern": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"(a"}})},
        "single_word": {"added_tokens": [{"id": 0, "content": "a", "single_word": True}]},
        "lstrip": {"added_tokens": [{"id": 0, "content": "a", "lstrip": True}]},
        "rstrip": {"added_tokens": [{"id": 0, "content": "a", "rstrip": True}]},
        "post-processor": {"post_processor": {"type": "Other"}},
    }.items(),
)
def test_what_it_does_not_have_is_refused_by_name(name, changes, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(to_config(TOKENIZERS["gpt2"], **changes)))
    with pytest.raises(ValueError, match=name) as refusal:
        bpe.load(path)
    assert str(path) in str(refusal.value)


GOOD = json.dumps(TOKENIZERS["gpt2"].config)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", GOOD[:1000].encode(), b"\xff\xfe", b"[]", b"3", b"{}", b'{"model": 1}', b'{"model": {"type": "BPE"}}']
    + [
        json.dumps(to_config(TOKENIZERS["gpt2"], **{key: value})).encode()
        for key, value in {
            "model__merges": [["a", "nowhere"]],
            "model__vocab": [],
            "added_tokens": [{"id": 3}],
            "pre_tokenizer": "ByteLevel",
            "model__vocab__a": "7",
            "model__vocab__b": -1,
            "model__vocab__c": 10**12,
        }.items()
    ]
    + [
        json.dumps(to_config(TOKENIZERS["gpt2"], model__merges=merges)).encode()
        for merges in (["a b c"], ["ab"], [[]], 5)
    ],
)
def test_a_malformed_file_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        bpe.load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


SPECIAL_TOKENS = {"<|a|>": {"id": "<|a|>", "ids": [0], "tokens": ["<|a|>"]}}
SMALL = bpe.train("the cat sat on a mat " * 3, 264, "qwen", ("<|a|>",)).config | {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|a|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": SPECIAL_TOKENS,
    },
}


@settings(max_examples=600, deadline=None)
@given(st.integers(0, 2**32))
def test_a_damaged_file_is_read_or_is_one_sentence(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_bytes(damaged(SMALL, random.Random(seed)))
    try:
        tokenizer = bpe.load(path)
    except ValueError as error:
        return assert_one_sentence(error, path)
    assert isinstance(tokenizer.decode(tokenizer.bos + tokenizer.encode("The cat's<|a|> 12 e\u0301", True)), str)
    assert len(tokenizer.decode_bytes(range(tokenizer.vocab_size))) > 0
    tokenizer.save(path)


def test_a_file_that_is_nested_too_deeply_is_one_sentence(tmp_path):
    path, normalizer = tmp_path / "tokenizer.json", {"type": "NFC"}
    for _ in range(300):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    for content in json.dumps(SMALL | {"normalizer": normalizer}), '{"a":' * 100_000 + "1" + "}" * 100_000:
        path.write_text(content)
        with recursion_limit(400), pytest.raises(ValueError) as refusal:
            bpe.load(path)
        assert_one_sentence(refusal.value, path)


@contextmanager
def recursion_limit(further):
    """So many calls inside each other from here on, however many there are already."""
    before, depth = sys.getrecursionlimit(), len(inspect.stack(0))
    sys.setrecursionlimit(depth + further)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


NO_CHARACTERS = {"a\ud800b": "a\ufffdb".encode(), "\ud83d\ude00": "\ufffd\ufffd".encode(), "a\udcff": b"a\xff"}


@pytest.mark.parametrize("text, encoded", NO_CHARACTERS.items(), ids=ascii)
def test_what_is_no_character_is_replaced_and_what_is_no_utf_8_kept(text, encoded):
    tokenizer = TOKENIZERS["gpt2"]
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == encoded


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        bpe.load(tmp_path / "tokenizer.json")


@few
@given(st.characters(exclude_categories=["Cs"]))
def test_character_classes_are_the_unicode_categories(char):
    category = bpe.unicodedata.category(char)
    white = char.isspace() and char not in "\x1c\x1d\x1e\x1f"
    expected = {rf"\p{{{name}}}": category.startswith(name) for name in ("L", "N", "Lu", "Nd", "P", "Cn", "M")}
    for pattern, inside in (expected | {r"\s": white, r"\d": category == "Nd"}).items():
        opposite = pattern[0] + pattern[1].upper() + pattern[2:]
        for limit in (limit for limit in bpe.LIMITS if ord(char) <= limit):
            for form, wanted in {pattern: inside, f"[^{pattern}]": not inside, f"[{opposite}]": not inside}.items():
                assert bool(re.fullmatch(bpe.to_python(form, limit), char)) == wanted


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
