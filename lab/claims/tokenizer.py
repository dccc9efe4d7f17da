"""Tokenizador: the slide's tokenizers on words that their training text lacks, special tokens, and the vocabulary."""

from functools import lru_cache
from pydoc_data.topics import topics

import bpe
from engine import np
from engine.figure import COLOURS, figure
from lab.claims import Finding, draw_tokens

STEMS = """agot alarm abrum brill camin calm cant cautiv declar desafi estimul fabric fascin gobern habl inquiet
    interrog naveg observ oper particip penetr provoc refriger simul vigil""".split()
SENTENCES = """ayer {0}aron sin descanso y hoy vuelven a {0}ar .
quien {0}a mucho acaba por no {0}ar nada , y {0}amos todos .
nadie {0}aba tanto como ella , que {0}ó toda la tarde .
lo {0}ado , {0}ado está , y las {0}adas también .
es un {0}ador muy serio , y ella es {0}adora desde niña .
resulta {0}ante , y los {0}antes lo saben .""".split("\n")
SLIDE = " agotador agotado agotante"


@lru_cache
def tokenizers(seed, size=500):
    """Of each: its vocabulary's size, text -> tokens, and the token of what is unknown; and a text of unseen words.

    Of each stem most forms are in the training text. Of agotar, and of others by the seed, the last three sentences are
    not, so that agotado, agotador and agotante are never seen, though agotar and agotaba are.
    """
    held = [(s, n) for i, s in enumerate(STEMS) for n in (3, 4, 5) if s == "agot" or (i + n + seed) % 7 == 0]
    seen = "\n".join(line.format(stem) for stem in STEMS for n, line in enumerate(SENTENCES) if (stem, n) not in held)
    unseen = "\n".join(SENTENCES[n].format(stem) for stem, n in held)
    words, pieces, trained = bpe.train_words(seen, size), bpe.train_wordpiece(seen, size), bpe.train(seen, size)
    return {
        "words": (len(words), lambda text: bpe.encode_words(text, words), "<unk>"),
        "WordPiece": (len(pieces), lambda text: bpe.encode_wordpiece(text, pieces), "[UNK]"),
        "BPE": (trained.vocab_size, lambda text: [trained.decode([i]) for i in trained.encode(text)], None),
        "characters": (len(set(seen)), lambda text: [c if c in seen else "?" for c in text], "?"),
        "bytes": (256, lambda text: [f"{byte:x}" for byte in text.encode()], None),
    }, unseen


def unknown_share(name, seed):
    """How many of the words of the unseen text hold the token of what is unknown."""
    made, unseen = tokenizers(seed)
    _, encode, unknown = made[name]
    return encode(unseen).count(unknown) / len(bpe.words_of(unseen))


def a_word_vocabulary_meets_unknown_words(seed=0):
    """A vocabulary of whole words meets words that it lacks: of agotar it knows no agotado, agotador or agotante."""
    share = unknown_share("words", seed)
    return Finding(share, f"{share:.0%} of the words of new sentences are <unk>", least=0.1)


def sub_words_and_bytes_know_every_word(seed=0):
    """Sub-words and bytes write words that they never saw: agot-ado, agot-ador, agot-ante."""
    made, unseen = tokenizers(seed)
    share = max(unknown_share(name, seed) for name in ("WordPiece", "BPE", "bytes"))
    lines = [f"{'':11}vocabulary  tokens/word  unknown  of{SLIDE}"]
    for name, (vocabulary, encode, _) in made.items():
        count, shown = len(encode(unseen)) / len(bpe.words_of(unseen)), coloured(encode(SLIDE))
        lines.append(f"{name:11}{vocabulary:10}{count:13.2f}{unknown_share(name, seed):9.0%}  {shown}")

    def picture(path):
        with figure(path, size=(9, 2.6)) as axes:
            for row, (name, (_, encode, _)) in enumerate(made.items()):
                tokens = encode(SLIDE)
                end = draw_tokens(axes, -row, tokens, [COLOURS[i % 3] for i in range(len(tokens))])
                axes.text(end + 0.5, -row, f"{len(tokens)} tokens", va="center", fontsize=9)
                axes.text(-1, -row, name, ha="right", va="center")
            axes.set(title="agotador, agotado, agotante, none of them seen before: only words lack them", xlim=(-9, 85))
            axes.set_axis_off()

    return Finding(share, f"{share:.0%} unknown for WordPiece, BPE and bytes", most=0, picture=picture, lines=lines)


def coloured(tokens):
    """Tokens apart by bars, and in a terminal by the colour behind them."""
    return "|".join(
        f"\033[{30 if i % 3 else 97};{(44, 46, 43)[i % 3]}m{token}\033[0m" for i, token in enumerate(tokens)
    )


def a_larger_vocabulary_makes_shorter_texts(seed=0, sizes=(300, 500, 1000, 2000, 4000, 8000)):
    """The size of the vocabulary is a choice: a larger one needs fewer tokens for the same text."""
    pages = [topics[name] for name in np.random.default_rng(seed).permutation(sorted(topics))]
    seen, unseen, found = "\n".join(pages[::2]), "\n".join(pages[1::2]), {}
    for size in sizes:
        words = bpe.encode_words(unseen, bpe.train_words(seen, size))
        found[size] = len(bpe.train(seen, size).encode(unseen)) / len(words), words.count("<unk>") / len(words)
    ratio = found[sizes[0]][0] / found[sizes[-1]][0]
    lines = ["held-out pages of Python's language reference", "vocabulary  BPE: tokens/word  words: unknown"]
    lines += [f"{size:10}{tokens:17.2f}{unknown:15.1%}" for size, (tokens, unknown) in found.items()]

    def picture(path):
        with figure(path, size=(6, 3)) as axes:
            axes.semilogx([*found], [tokens for tokens, _ in found.values()], "o-")
            axes.set_xticks([*found], [*found])
            axes.minorticks_off()
            axes.set(title="The more tokens there are, the fewer a word takes", xlabel="vocabulary of BPE")
            axes.set(ylabel="tokens per word of new text", ylim=(0, None))

    says = f"{ratio:.2f} times as many tokens with {sizes[0]} as with {sizes[-1]:,}"
    return Finding(ratio, says, least=1.2, picture=picture, lines=lines)


def special_tokens_are_no_text(seed=0):
    """A special token has an id of its own, and nobody can type it: what a user writes stays letters."""
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = bpe.train("agota agotó agotamos " * 9, 300 + seed, special=special)
    typed = f"{special[1]}agota{special[0]}"
    typed_ids, meant = tokenizer.encode(typed), tokenizer.encode(typed, allow_special=True)
    found = sum(i in tokenizer.special.values() for i in typed_ids)
    lines = f"typed    {coloured([tokenizer.decode([i]) for i in typed_ids])}"
    lines = lines, f"allowed  {coloured([tokenizer.decode([i]) for i in meant])}"
    whole = tokenizer.decode(meant) == tokenizer.decode(typed_ids) == typed and meant[0] == 1 and meant[-1] == 0
    says = f"{found} special tokens in what was typed, {sum(i < 2 for i in meant)} where they are allowed"
    return Finding(found if whole else 1, says, most=0, lines=lines)


def any_text_goes_in_and_comes_out(seed=0, texts=300):
    """Tokens are the input and the output of a model: every text goes in and comes out unchanged."""
    rng, tokenizer = np.random.default_rng(seed), bpe.train("\n".join(SENTENCES), 300)
    drawn = ["".join(map(chr, rng.integers(0, 0xD800, rng.integers(1, 40)))) for _ in range(texts)]
    same = sum(tokenizer.decode(tokenizer.encode(text)) == text for text in drawn)
    return Finding(same / texts, f"{same} of {texts} random texts in all of Unicode's scripts", least=1)


def the_data_set_decides_the_vocabulary(seed=0):
    """The best vocabulary is that of its data set: one learned from English needs more tokens for Spanish."""
    made, unseen = tokenizers(seed)
    english = bpe.train("\n".join(topics.values()), 500)
    ratio = len(english.encode(unseen)) / len(made["BPE"][1](unseen))
    says = f"{ratio:.2f} times as many tokens for Spanish when learned from English"
    return Finding(ratio, says, least=1.2)
