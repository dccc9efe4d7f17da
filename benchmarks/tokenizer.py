"""BPE training against Hugging Face `tokenizers`, encoding against tiktoken: same text, pattern and vocabulary.

    python benchmarks/tokenizer.py [FILE ...] [--vocab 1000 8000] [--turns 5] [--quick]

The merges have to be those of `tokenizers`, and the ids those of tiktoken; whatever is encoded has to decode to the
text. Without files that is the reference of the language and source code of the standard library, --megabytes of them.
"""

import json
import pydoc_data.topics
import re
import sysconfig
from functools import partial
from pathlib import Path

from turns import compare, demand, header, installed, options, row

import bpe
from engine import cli
from lab.measure import seconds

QUICK = {"vocab": [300], "turns": 2, "megabytes": 0.05}
NAMES = {"gpt2": "GPT-2's pattern", "llama3": "Llama 3's pattern"}


def standard_library(megabytes):
    """The reference of the language, then source code, as far as there is enough of it."""
    text = "\n".join(pydoc_data.topics.topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < megabytes * 1e6:
            text += path.read_text(encoding="utf-8", errors="replace")
    return text[: int(megabytes * 1e6)]


def hugging_face(text, vocab_size, pattern):
    """A function that trains with `tokenizers`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    # in parts, cut where every pattern cuts, so that tokenizers can use all its threads
    parts = re.findall(r"(?s:.{10000}.*?[a-z](?= )|.+)", text)

    def train():
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(bpe.PATTERNS[pattern]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level] if pattern == "gpt2" else [split, byte_level])
        options = {"vocab_size": vocab_size, "special_tokens": ["<|endoftext|>"], "show_progress": False}
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
        tokenizer.train_from_iterator(parts, trainer)
        return tokenizer

    return train


def tiktoken_of(trained, pattern):
    """A function that encodes with tiktoken, by the merges of `trained`, and what its ids are too small by."""
    import tiktoken

    shift = len(trained.special)  # tiktoken counts from the bytes on
    ranks = {spelled: i for i, spelled in enumerate(trained.token_bytes[shift:])}
    peer = tiktoken.Encoding("peer", pat_str=bpe.PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    return peer.encode_ordinary, shift


def training(text, vocab_size, pattern, turns, peer):
    """The tokenizer, the median of our seconds, and how many times as fast as the peer that is, in a list."""
    trained, ways = bpe.train(text, vocab_size, pattern), {"ours": lambda: bpe.train(text, vocab_size, pattern)}
    if peer:
        ways["peer"] = hugging_face(text, vocab_size, pattern)
        equal = json.loads(ways["peer"]().to_str())["model"]["merges"] == trained.config["model"]["merges"]
        demand(equal, f"{pattern}, {vocab_size}: the merges are not those of tokenizers")
    times, ratios = compare({name: partial(seconds, way) for name, way in ways.items()}, turns)
    return trained, times["ours"], list(ratios.values())


def encoding(text, trained, pattern, turns, peer):
    """The same of encoding."""
    ids = trained.encode(text)
    demand(trained.decode(ids) == text, f"{pattern}: the ids do not decode to the text")

    ways = {"ours": lambda: seconds(bpe.Tokenizer(trained.config).encode, text)}  # a new one, that remembers no word
    if peer:
        encode, shift = tiktoken_of(trained, pattern)
        demand([i + shift for i in encode(text)] == ids, f"{pattern}: the ids are not those of tiktoken")
        ways["peer"] = partial(seconds, encode, text)
    times, ratios = compare(ways, turns)
    return times["ours"], list(ratios.values())


def main():
    args = options(__doc__, {"vocab": [1000, 8000], "turns": 5, "megabytes": 8.0}, QUICK, files="*")
    text = "".join(Path(file).read_text(encoding="utf-8") for file in args.files) or standard_library(args.megabytes)
    size, peers = len(text.encode()) / 1e6, [installed("tokenizers"), installed("tiktoken")]
    ratios = "training time, of `tokenizers`'", "encoding speed, of tiktoken's"
    title = f"byte-level BPE on {size:.1f} MB, a vocabulary of"
    print(header(title, *ratios, "ours: training, s", "encoding, MB/s"), flush=True)
    for pattern, name in NAMES.items():
        for vocab_size in args.vocab:
            trained, trained_in, faster = training(text, vocab_size, pattern, args.turns, peers[0])
            encoded_in, also_faster = encoding(text, trained, pattern, args.turns, peers[1])
            ratios = "".join(f"{1 / ratio:.2f}" for ratio in faster), "".join(f"{ratio:.2f}" for ratio in also_faster)
            print(row(f"{vocab_size:,}, {name}", *ratios, f"{trained_in:.2f}", f"{size / encoded_in:.2f}"), flush=True)


if __name__ == "__main__":
    cli.run(main)
