"""BPE training against Hugging Face `tokenizers`, encoding against tiktoken: same text, pattern and vocabulary.

    python benchmarks/tokenizer.py [FILE ...] [--vocab 1000 8000] [--turns 5] [--quick]

The merges have to be those of `tokenizers`, and the ids those of tiktoken. The sides take turns, and the median of the
turns' ratios is printed. Without files the text is the reference of the language and source code of the standard
library. Our side is timed alone where a peer is not installed; whatever is encoded has to decode to the text.
"""

import argparse
import json
import pydoc_data.topics
import re
import statistics
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import alternate, header, installed, options, row, seconds, times_as_fast

import bpe
import model

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
        steps = [byte_level] if pattern == "gpt2" else [split, byte_level]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
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
    """The tokenizer, the median of our seconds, and our time over the peer's."""
    trained, ways = bpe.train(text, vocab_size, pattern), {"ours": lambda: bpe.train(text, vocab_size, pattern)}
    if peer:
        ways["peer"] = hugging_face(text, vocab_size, pattern)
        merges = json.loads(ways["peer"]().to_str())["model"]["merges"]
        if merges != trained.config["model"]["merges"]:
            sys.exit(f"{pattern}, {vocab_size}: the merges are not those of tokenizers, so times say nothing")
    return trained, *medians({name: lambda way=way: seconds(way) for name, way in ways.items()}, turns)


def encoding(text, trained, pattern, turns, peer):
    """The median of our seconds, and our time over the peer's."""
    ids = trained.encode(text)
    if trained.decode(ids) != text:
        sys.exit(f"{pattern}: the ids do not decode to the text, so times say nothing")

    def ours():
        fresh = bpe.Tokenizer(trained.config)  # that remembers no word
        return seconds(fresh.encode, text)

    ways = {"ours": ours}
    if peer:
        encode, shift = tiktoken_of(trained, pattern)
        if [i + shift for i in encode(text)] != ids:
            sys.exit(f"{pattern}: the ids are not those of tiktoken, so times say nothing")
        ways["peer"] = lambda: seconds(encode, text)
    return medians(ways, turns)


def medians(ways, turns):
    """Of some turns: our seconds, and our time over the peer's, None without one."""
    times = alternate(ways, turns)
    return statistics.median(times["ours"]), 1 / times_as_fast(
        times["ours"], times["peer"]
    ) if "peer" in times else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--vocab", type=int, nargs="+", default=[1000, 8000], metavar="N")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=8, help="of the standard library, at most")
    args = options(parser, QUICK)
    text = "".join(Path(file).read_text(encoding="utf-8") for file in args.files) or standard_library(args.megabytes)
    size, peers = len(text.encode()) / 1e6, [installed("tokenizers"), installed("tiktoken")]
    title = f"byte-level BPE on {size:.1f} MB, a vocabulary of"
    ratios = "training time, of `tokenizers`'", "encoding speed, of tiktoken's"
    print(header(title, *ratios, "ours: training, s", "encoding, MB/s"), flush=True)
    for pattern, name in NAMES.items():
        for vocab_size in args.vocab:
            trained, taken, time_ratio = training(text, vocab_size, pattern, args.turns, peers[0])
            encoded_in, encoding_ratio = encoding(text, trained, pattern, args.turns, peers[1])
            ratios = (f"{time_ratio:.2f}" if peers[0] else "", f"{1 / encoding_ratio:.2f}" if peers[1] else "")
            print(row(f"{vocab_size:,}, {name}", *ratios, f"{taken:.2f}", f"{size / encoded_in:.2f}"), flush=True)


if __name__ == "__main__":
    model.run(main)
