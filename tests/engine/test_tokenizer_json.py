import inspect
import json
import os
import random
import sys
from contextlib import contextmanager

import pytest
from damage import assert_one_sentence, damaged
from example_tokenizers import TOKENIZERS, TRAINING, to_config
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from engine import tokenizer_json


def test_each_byte_has_a_printable_character_of_its_own():
    assert "".join(tokenizer_json.BYTE_CHARS).isprintable() and len(tokenizer_json.CHAR_BYTES) == 256
    assert (
        bpe.spell("a ñ\n~") == "aĠÃ±Ċ~" and bytes(tokenizer_json.CHAR_BYTES[c] for c in "aĠÃ±Ċ~") == "a ñ\n~".encode()
    )


def test_the_template_is_shown_and_not_applied():
    tokenizer = TOKENIZERS["ignore_merges and a template"]
    assert (tokenizer.bos, tokenizer.eos) == ([1], [0])
    assert (TOKENIZERS["gpt2"].bos, TOKENIZERS["gpt2"].eos) == ([], [])


def test_saving_and_loading_change_nothing(tmp_path):
    for name, tokenizer in TOKENIZERS.items():
        tokenizer.save(tmp_path / "saved.json")
        assert bpe.load(tmp_path / "saved.json").config == tokenizer.config, name
    tokenizer.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["saved.json", "tokenizer.json", "tokenizer_config.json"]
    assert bpe.load(tmp_path / "tokenizer.json").config == tokenizer.config


@pytest.mark.parametrize("special", [["<|endoftext|>", "<mask>"], ["<mask>"]])
def test_a_folder_says_which_token_ends_a_text(special, tmp_path):
    bpe.train("text", 300, special=special).save(tmp_path / "new" / "folder", chat_template="a template")
    settings = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert settings.get("eos_token") == ("<|endoftext|>" if "<|endoftext|>" in special else None)
    assert settings["chat_template"] == "a template"


def test_merges_may_be_strings_or_pairs():
    tokenizer = TOKENIZERS["gpt2"]
    strings = [" ".join(merge) for merge in tokenizer.config["model"]["merges"]]
    other = bpe.Tokenizer(to_config(tokenizer, model__merges=strings))
    assert other.encode(TRAINING) == tokenizer.encode(TRAINING)


def test_ids_may_have_gaps():
    config = to_config(TOKENIZERS["gpt2"], added_tokens=[{"id": 500, "content": "<|end|>", "special": True}])
    del config["model"]["vocab"]["<|end|>"]
    tokenizer = bpe.Tokenizer(config)
    assert tokenizer.vocab_size == 501 and tokenizer.token_bytes[499] == b"" and tokenizer.decode([500]) == "<|end|>"
    assert tokenizer.encode("<|end|>", allow_special=True) == [500]


def test_added_tokens_are_cut_out_before_or_after_the_text_is_normalised():
    added = [
        {"id": i, "content": text, "normalized": i % 2 == 0, "special": i > 501}
        for i, text in enumerate(["A\u030a", "B\u030a", "e\u0301", "o\u0301"], 500)
    ]
    content = tokenizer_json.Content(to_config(TOKENIZERS["gpt2"], added_tokens=added, normalizer={"type": "NFC"}))
    assert content.added_tokens(normalized=True, allow_special=False) == {"Å": 500}
    assert content.added_tokens(normalized=True, allow_special=True) == {"Å": 500, "é": 502}
    assert content.added_tokens(normalized=False, allow_special=False) == {"B\u030a": 501}
    assert content.added_tokens(normalized=False, allow_special=True) == {"B\u030a": 501, "o\u0301": 503}


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
        "end in ByteLevel": {"pre_tokenizer": splits(BYTE_LEVEL)},
        "'Fuse' as one of the decoders": {"decoder": {"type": "Fuse"}},
        "Removed": {"pre_tokenizer": splits(SPLIT | {"pattern": {"String": " "}, "behavior": "Removed"})},
        "MergedWithNext": {"pre_tokenizer": splits(SPLIT | {"pattern": {"String": " "}, "behavior": "MergedWithNext"})},
        "without a pattern": {"pre_tokenizer": splits(SPLIT | {"pattern": {}})},
        "Han": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\p{Han}+"}})},
        "&&": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"[\p{L}&&\p{Lu}]"}})},
        r"\\w": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\w+"}})},
        r"\}\+": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\p{N}{1,3}+"}})},
        r"\$": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"\s+$"}})},
        "split pattern": {"pre_tokenizer": splits(SPLIT | {"pattern": {"Regex": r"(a"}})},
        "single_word": {"added_tokens": [{"id": 0, "content": "a", "single_word": True}]},
        "lstrip": {"added_tokens": [{"id": 0, "content": "a", "lstrip": True}]},
        "rstrip": {"added_tokens": [{"id": 0, "content": "a", "rstrip": True}]},
        "'Other' as one of the processors": {"post_processor": {"type": "Other"}},
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
            "model__vocab__d": 1 << 24,
            "model__vocab__e": True,
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


@pytest.mark.parametrize("ids, good", [([0], True), ([263], True), ([264], False), ([-1], False), (["0"], False)])
def test_a_template_puts_only_tokens_around_a_text(ids, good):
    changed = SMALL["post_processor"] | {"special_tokens": {"<|a|>": {"ids": ids}}}
    if good:
        assert bpe.Tokenizer(SMALL | {"post_processor": changed}).bos == ids
    else:
        with pytest.raises(ValueError, match="no token"):
            bpe.Tokenizer(SMALL | {"post_processor": changed})


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
        with recursion_limit(200), pytest.raises(ValueError) as refusal:
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


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        bpe.load(tmp_path / "tokenizer.json")
