"""Write golden/tokenizers.json: what Hugging Face `tokenizers` makes of texts that are hard on a tokenizer.

python tests/make_golden_tokenizers.py        (needs tokenizers; run it only to renew the file)
"""

import json
import pathlib
import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CASED = r"[\p{Lu}\p{Lt}]?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{Nd}{1,2}|[^\S\r\n]+|\p{P}+(?:\s+(?!\S))?"

TRAINING = (
    "The merges of a small text: she'll sell, they'd sold, we've told; I'M, YOU'RE, it's 1234567 times 89.\n\n"
    "El viaje agotador dejó agotado al caminante; ¿qué día tan agotante? Señor, mañana será otro día.\r\n"
    "\tif x == 0:\n\t\treturn None   # naïve, coöperate, Ångström\n        while True:    pass\n"
    "日本語のテキスト、日本語の文字。 한국어 텍스트 한국어 مرحبا بالعالم नमस्ते दुनिया 😀😀 👩‍👧 e\u0301 o\u0308\n"
    "banana bandana banana ananas aaaaaaaa aaaa abababab cabcabcab "
) * 3
TEXTS = [
    "",
    " ",
    "Hello, world! It's I'LL we'Ve 'ſ 'K",
    "agotador agotado agotante",
    "   three   spaces \n\n  \r\n \t end  ",
    "12345 ²³½ ٣٤٥ Ⅷ ①②③ 1,000.00",
    "a\x1cb\x1d \x1e\x1f\x85 \xa0\u2028x\u3000y\u200bz\ufeff",
    "Ångström A\u030angstro\u0308m e\u0301 ﬁ ﷺ \u1100\u1161\u11a8 \u0338=\u0338",
    "日本語のテキスト、mixed中文text。한국어",
    "😀👩‍👧🏽 𝔸𝟘 \U000e0001 🇪🇸",
    "<|endoftext|>a<|end|>b<|endoftext|> <|end|>of c <|endof",
    "x  <mask>  y<mask>\n z  word  wordy  wo rd",
    "zażółć gęślą jaźń ÐÞßſıİ ΑΒΓ αβγς абв ABCdefGHI",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20 + " abababababab" * 5,
    "def f(x):\n    return {'a': [1, 2]} # ok!!!\n\n\n",
]


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | settings))


def trained(pre_tokenizer, vocab_size=400, special=("<|endoftext|>", "<|end|>", "<|end|>of"), text=TRAINING):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def split(pattern):
    return pre_tokenizers.Split(pattern if isinstance(pattern, str) else Regex(pattern[0]), "isolated")


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


def tokenizers():
    """Yield (name, tokenizer) for each configuration."""
    plain = byte_level(use_regex=False)
    yield "ByteLevel", trained(byte_level())
    yield "ByteLevel without pattern", trained(plain)
    yield "prefix space", trained(byte_level(add_prefix_space=True))
    yield "Llama 3", trained(sequence(split([LLAMA3]), plain))
    yield "Qwen", trained(sequence(split([QWEN]), plain))
    yield "classes", trained(sequence(split([CASED]), plain))
    yield "Split by a string", trained(sequence(split("an"), byte_level()))
    yield "Digits one by one", trained(sequence(pre_tokenizers.Digits(individual_digits=True), byte_level()))
    yield "Digits in runs", trained(sequence(pre_tokenizers.Digits(), byte_level(add_prefix_space=True)))

    nfc = trained(byte_level())
    nfc.normalizer = normalizers.NFC()
    nfc.add_tokens([AddedToken("<mask>", special=True), AddedToken("word"), "A\u030angstro"])
    nfc.add_tokens([AddedToken("e\u0301", normalized=False), "wo rd"])
    yield "NFC and added tokens", nfc

    # Llama 3: words that are in the vocabulary are not merged; a token before every text
    whole = json.loads(trained(sequence(split([LLAMA3]), plain)).to_str())
    whole["model"] |= {"ignore_merges": True}
    whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"][::2]]
    spelled = set(whole["model"]["vocab"])
    whole["model"]["merges"] = [m for m in whole["model"]["merges"] if set(m.split()) <= spelled]
    whole = Tokenizer.from_str(json.dumps(whole))
    whole.post_processor = processors.TemplateProcessing(
        single="<|end|> $A <|endoftext|>", special_tokens=[("<|end|>", 1), ("<|endoftext|>", 0)]
    )
    yield "ignore_merges and a template", whole

    lacking = json.loads(trained(byte_level()).to_str())
    for char in "zÃ":
        del lacking["model"]["vocab"][char]
    lacking["model"]["merges"] = [m for m in lacking["model"]["merges"] if not set("zÃ") & set("".join(m))]
    yield "bytes missing", Tokenizer.from_str(json.dumps(lacking))
    lacking["model"]["unk_token"] = "<|end|>"
    yield "bytes unknown", Tokenizer.from_str(json.dumps(lacking))


def main():
    rng = random.Random(0)
    random_text = "".join(rng.choice("ab \n") for _ in range(2000))
    runs = []
    for pattern, text, size in (
        (GPT2, TRAINING, 500),
        (LLAMA3, TRAINING, 500),
        (QWEN, TRAINING, 5000),
        (GPT2, random_text, 600),
    ):
        pre_tokenizer = byte_level() if pattern == GPT2 else sequence(split([pattern]), byte_level(use_regex=False))
        model = json.loads(trained(pre_tokenizer, size, ["<|endoftext|>"], text).to_str())["model"]
        runs.append(
            {"pattern": pattern, "text": text, "vocab_size": size, "merges": [" ".join(m) for m in model["merges"]]}
        )
    cases = []
    for name, tokenizer in tokenizers():
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
        cases.append({"name": name, "config": json.loads(tokenizer.to_str()), "ids": ids})
    content = json.dumps({"training": runs, "texts": TEXTS, "cases": cases}, ensure_ascii=True, separators=(",", ":"))
    path = pathlib.Path(__file__).parent / "golden" / "tokenizers.json"
    path.write_text(re.sub(r'(\{"name"|\{"pattern")', r"\n\1", content) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
