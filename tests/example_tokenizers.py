"""Tokenizers of every kind that a tokenizer.json may ask for, and texts that are hard on them."""

import json
import pathlib
import re

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

# text as files have it, seeded with what patterns, normalisation and added tokens are sensitive to
hard = st.sampled_from(
    ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "1", "12", "²", "Ⅷ", "é"]
    + [
        "e\u0301",
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
    ]
    + ["_", "-", "<", "|>", "<mask>", " the", " of", "wo rd", "e", "o", *SPECIAL]
)
texts = (
    st.lists(hard | st.text(max_size=4), max_size=25).map("".join).filter(lambda t: not re.search("[\ud800-\udfff]", t))
)
# long beside the added tokens, so that there is room to cut
edges = st.lists(
    st.sampled_from(["wo rd", "word", " ", "a", "b.", "e\u0301", ".", "1,", "'s", "\n", "the "]),
    min_size=20,
    max_size=50,
).map("".join)


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
