"""BPE training against Hugging Face `tokenizers`, encoding against tiktoken: same text, pattern and vocabulary.

    python benchmarks/tokenizer.py [FILE ...]

Both are timed in turn, round after round, and the median of the rounds' ratios is printed. Without files the text is
the standard library's own source code and documentation. A peer that is not installed is left out.
"""

import pathlib
import pydoc_data.topics
import re
import statistics
import sys
import sysconfig
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import bpe

ROUNDS = 5


def standard_library(megabytes=8):
    """About half documentation and half code, as far as there is enough of each."""
    text = "\n".join(pydoc_data.topics.topics.values())
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < megabytes * 1e6:
            text += path.read_text(encoding="utf-8", errors="replace")
    return text


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours, peer):
    """Median over the rounds of (our time, the peer's time, ours / the peer's)."""
    times = [(seconds(ours), seconds(peer)) for _ in range(ROUNDS)]
    return *map(statistics.median, zip(*times, strict=True)), statistics.median(a / b for a, b in times)


def training(text, vocab_size, pattern):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    # in parts, cut where every pattern cuts, so that tokenizers can use all its threads
    parts = re.findall(r"(?s:.{10000}.*?[a-z](?= )|.+)", text)

    def peer():
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

    def ours():
        bpe.train(text, vocab_size, pattern)

    a, b, ratio = compare(ours, peer)
    print(f"train {pattern:7} vocabulary {vocab_size:6}: {a:6.2f} s, tokenizers {b:6.2f} s, time ratio {ratio:.2f}")


def encoding(text, vocab_size, pattern):
    import tiktoken

    trained = bpe.train(text, vocab_size, pattern)
    shift = len(trained.special)  # tiktoken counts from the bytes on
    ranks = {spelled: i for i, spelled in enumerate(trained.token_bytes[shift:])}
    peer = tiktoken.Encoding("peer", pat_str=bpe.PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    if [i - shift for i in trained.encode(text)] != peer.encode_ordinary(text):
        print(f"encode {pattern}: the ids are not tiktoken's")

    fresh = [bpe.Tokenizer(trained.config) for _ in range(ROUNDS)]  # that remember no word

    def ours():
        fresh.pop().encode(text)

    a, b, ratio = compare(ours, lambda: peer.encode_ordinary(text))
    size = len(text.encode()) / 1e6
    print(
        f"encode {pattern:7} vocabulary {vocab_size:6}: {size / a:6.2f} MB/s, tiktoken {size / b:6.2f} MB/s, "
        f"speed ratio {1 / ratio:.2f}"
    )


def main(files):
    text = "".join(pathlib.Path(file).read_text(encoding="utf-8") for file in files) or standard_library()
    print(f"{len(text.encode()) / 1e6:.1f} MB of text, medians of {ROUNDS} alternated rounds")
    for benchmark, peer in (training, "tokenizers"), (encoding, "tiktoken"):
        try:
            __import__(peer)
        except ImportError:
            print(f"{benchmark.__name__}: {peer} is not installed, so there is nothing to compare with")
            continue
        for pattern in "gpt2", "llama3":
            for vocab_size in 1000, 8000:
                benchmark(text, vocab_size, pattern)


if __name__ == "__main__":
    main(sys.argv[1:])
