"""Tokenizador: the slide's tokenizers on words that their training text lacks, and what a larger vocabulary buys."""

from pydoc_data.topics import topics

import bpe
from engine.figure import figure

STEMS = """agot alarm abrum brill camin calm cant cautiv declar desafi estimul fabric fascin gobern habl inquiet
    interrog naveg observ oper particip penetr provoc refriger simul vigil""".split()
SENTENCES = """ayer {0}aron sin descanso y hoy vuelven a {0}ar .
quien {0}a mucho acaba por no {0}ar nada , y {0}amos todos .
nadie {0}aba tanto como ella , que {0}ó toda la tarde .
lo {0}ado , {0}ado está , y las {0}adas también .
es un {0}ador muy serio , y ella es {0}adora desde niña .
resulta {0}ante , y los {0}antes lo saben .""".split("\n")


def demo():
    """Each tokenizer on words that its training text lacks, and what a larger vocabulary buys."""
    # of each stem most forms are in the training text; agotado, agotador, agotante are not, though agotar, agotaba are
    held = [(stem, n) for i, stem in enumerate(STEMS) for n in (3, 4, 5) if stem == "agot" or (i + n) % 7 == 0]
    seen = "\n".join(line.format(stem) for stem in STEMS for n, line in enumerate(SENTENCES) if (stem, n) not in held)
    unseen = "\n".join(SENTENCES[n].format(stem) for stem, n in held)
    words, pieces, trained = bpe.train_words(seen, 500), bpe.train_wordpiece(seen, 500), bpe.train(seen, 500)
    rows = {  # vocabulary, text -> tokens, the token of what is unknown
        "words": (len(words), lambda text: bpe.encode_words(text, words), "<unk>"),
        "WordPiece": (len(pieces), lambda text: bpe.encode_wordpiece(text, pieces), "[UNK]"),
        "BPE": (trained.vocab_size, lambda text: [trained.decode([i]) for i in trained.encode(text)], None),
        "characters": (len(set(seen)), lambda text: [c if c in seen else "?" for c in text], "?"),
        "bytes": (256, lambda text: [f"{byte:x}" for byte in text.encode()], None),
    }
    print(f"{'':11}vocabulary  tokens/word  unknown  agotador, agotado, agotante")
    for name, (vocabulary, encode, unknown) in rows.items():
        tokens, n_words = encode(unseen), len(bpe.words_of(unseen))
        shown = "   ".join("|".join(encode(word)) for word in (" agotador", " agotado", " agotante"))
        print(f"{name:11}{vocabulary:10}{len(tokens) / n_words:13.2f}{tokens.count(unknown) / n_words:9.0%}  {shown}")

    pages, found = [topics[name] for name in sorted(topics)], {}
    seen, unseen = "\n".join(pages[::2]), "\n".join(pages[1::2])
    print("\nheld-out pages of Python's language reference\nvocabulary  BPE: tokens/word  words: unknown")
    for size in 300, 500, 1000, 2000, 4000, 8000:
        words = bpe.encode_words(unseen, bpe.train_words(seen, size))
        tokens, unknown = len(bpe.train(seen, size).encode(unseen)), words.count("<unk>")
        found[f"{size}"] = tokens / len(words), 100 * unknown / len(words)
        print("{:10}{:17.2f}{:15.1f}%".format(size, *found[f"{size}"]))
    with figure("figures/bpe.png", 1, 2, (8, 3)) as axes:
        for axis, values, label in zip(axes, zip(*found.values()), ("BPE: tokens per word", "words: % unknown")):
            axis.plot([*found], values, "o-")
            axis.set(xlabel="vocabulary", ylabel=label, ylim=(0, 1.1 * max(values)))
    print("figures/bpe.png")
