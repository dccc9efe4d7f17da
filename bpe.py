"""Tokenizador.

A model reads integers, so text is first cut into tokens of a fixed vocabulary. A vocabulary of whole words is huge and
still lacks words; one of characters or bytes is small, but makes long sequences. Sub-words lie between: agot-ador,
agot-ado, agot-ante share what they have in common. Byte-pair encoding (Sennrich et al. 2016) learns them. The slide
lists it under bytes because it starts from them: take the 256 bytes, so that no text is unknown (Radford et al. 2019),
and repeat

    merge the most frequent pair of neighbouring tokens into one new token

until the vocabulary has the chosen size. To encode is to replay the merges, the earliest learned first. Special tokens,
such as <|endoftext|>, are not learned: each is a text with an id of its own, cut out before anything is merged. Type
along:

    >>> from bpe import *
    >>> vocab, merges = textbook_train("aaabdaaabac", 3)
    >>> merges
    [('a', 'a'), ('a', 'b'), ('aa', 'ab')]
    >>> ids = textbook_encode("aaabdaaabac", vocab, merges)
    >>> ids, [textbook_decode([i], vocab) for i in ids], textbook_decode(ids, vocab)
    ([258, 67, 258, 64, 66], ['aaab', 'd', 'aaab', 'a', 'c'], 'aaabdaaabac')

(a is 64, not 97: a byte is written as a printable character, and ids follow these in order, as in GPT-2; ! is 0.)

The slide's words come apart as on the slide, after ten merges learned from other words (Ġ is a space):

    >>> vocab, merges = textbook_train("simulado operador navegante caminador fabricante agota agoto", 10)
    >>> print(*map("".join, merges))
    ad ado ag an ot te Ġag ador ante Ġagot
    >>> ids = textbook_encode(" agotador agotado agotante", vocab, merges)
    >>> print(*(textbook_decode([i], vocab) for i in ids), sep="-")
     agot-ador- agot-ado- agot-ante

`train` and `load` make the tokenizer that is used. `python lecture.py tokenizer` compares the slide's
tokenizers on unseen words.
"""

import re
from codecs import getincrementaldecoder
from collections import Counter
from itertools import chain
from math import log
from unicodedata import normalize

from engine.merges import Cache, learn_merges, merge_word
from engine.pretokenize import EDGE, PATTERNS, pre_tokenizer, published, reblocked  # noqa: F401  PATTERNS: by name
from engine.tokenizer_json import BYTE_CHARS, CHAR_BYTES, FLAGS, HALVES, Content, content, read  # noqa: F401

# --- byte-pair encoding ---------------------------------------------------------------------------------------


def merge(tokens, pair):
    """Writes a pair of neighbours as one token, from left to right: a a a b, with (a, a), is aa a b."""
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


def textbook_learn(words, alphabet, vocab_size, score=lambda n_pair, n_left, n_right, n: n_pair):
    """Sennrich et al. (2016), algorithm 1: count all pairs anew, merge the best, until there are vocab_size tokens.

    words: {tuple of tokens: how often it occurs}; alphabet: the tokens before any merge. score: of a pair, by the
    counts of the pair, its left token, its right token and all tokens; here it is the first, and WordPiece below needs
    all. Of equal scores the smallest left id, then right id, wins. Returns ({token: id}, merges in order).
    """
    vocab, merges = {token: i for i, token in enumerate(alphabet)}, []
    while len(vocab) < vocab_size:
        single, pairs = Counter(), Counter()
        for word, count in words.items():
            for token in word:
                single[token] += count
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        n = single.total()
        scores = {(a, b): score(n_pair, single[a], single[b], n) for (a, b), n_pair in pairs.items()}
        best = min(pairs, key=lambda pair: (-scores[pair], vocab[pair[0]], vocab[pair[1]]))
        merges.append(best)
        vocab["".join(best)] = len(vocab)
        words = {merge(word, best): count for word, count in words.items()}
    return vocab, merges


# BYTE_CHARS[byte] is the character a byte is written as, and CHAR_BYTES[character] the byte.


def spell(text):
    """A text with one printable character for each byte of its UTF-8: the Latin-1 character of that number where it is
    printable, else one from U+0100 on, Ġ for a space. So ñ, two bytes, is Ã±.
    """
    return text.encode().decode("latin-1").translate(BYTE_CHARS)


def split_words(text):
    """Pre-tokenization: words and runs of marks, each with a single space before it; other white space is a piece of
    its own. No merge crosses pieces. (The patterns that `train` uses also part digits from letters.)
    """
    return re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)


def textbook_train(text, n_merges, split=split_words):
    """({token: id}, merges) of byte-pair encoding, learned from a text; split: text -> words."""
    words = Counter(tuple(spell(word)) for word in split(text))
    return textbook_learn(words, sorted(BYTE_CHARS), len(BYTE_CHARS) + n_merges)


def textbook_encode(text, vocab, merges, split=split_words):
    """The ids of a text: in each word all merges are replayed, in the order they were learned."""
    ids = []
    for word in split(text):
        tokens = tuple(spell(word))
        for pair in merges:
            tokens = merge(tokens, pair)
        ids += [vocab[token] for token in tokens]
    return ids


def textbook_decode(ids, vocab):
    """The text of ids. Tokens need not end where characters do: bytes that are not UTF-8 become U+FFFD. IndexError for
    an id beyond the vocabulary.
    """
    tokens = list(vocab)
    return bytes(CHAR_BYTES[char] for i in ids for char in tokens[i]).decode("utf-8", "replace")


# --- words, and WordPiece: a sub-word method, which the slide files under words ---------------------------------


def words_of(text):
    """Words and punctuation marks, without the space between them."""
    return re.findall(r"\w+|[^\w\s]", text)


def train_words(text, vocab_size):
    """A set of at most vocab_size words: the most frequent ones, and <unk> for all others."""
    return {"<unk>", *(word for word, _ in Counter(words_of(text)).most_common(vocab_size - 1))}


def encode_words(text, vocab):
    """The tokens themselves, to be printed; an id would be a token's place in the vocabulary."""
    return [word if word in vocab else "<unk>" for word in words_of(text)]


def train_wordpiece(text, vocab_size):
    """WordPiece (Schuster & Nakajima 2012): merge the pair that raises the likelihood of the text most.

    Under a unigram model of the pieces, merging a and b raises the log-likelihood by about n(ab) log(n(ab) N / (n(a)
    n(b))), where n counts occurrences in the text, and N is their sum. Returns the set of pieces; those inside a word
    are written ##piece.
    """
    gain = lambda n_pair, n_left, n_right, n: n_pair * log(n_pair * n / (n_left * n_right))
    # a space marks the piece that begins a word
    words = {(" " + word[0], *word[1:]): count for word, count in Counter(words_of(text)).items()}
    pieces, _ = textbook_learn(words, sorted(set().union(*words)), vocab_size - 1, gain)
    return {"[UNK]", *(piece[1:] if piece[0] == " " else "##" + piece for piece in pieces)}


def encode_wordpiece(text, vocab):
    """The longest piece that fits, from left to right (Devlin et al. 2019); a word that none spells is [UNK]."""
    pieces = []
    for word in words_of(text):
        found, mark = [], ""
        while word and (fit := [n for n in range(1, len(word) + 1) if mark + word[:n] in vocab]):
            found.append(mark + word[: fit[-1]])
            word, mark = word[fit[-1] :], "##"
        pieces += ["[UNK]"] if word else found
    return pieces


# --- the tokenizer that is used -------------------------------------------------------------------------------


def cutter(special):
    """A function that cuts special tokens, {text: id}, out of a text before anything is merged; the longest first.

    >>> cutter({"<|end|>": 0, "<|end|>of": 1})("ayer<|end|>ofhoy<|end|>")
    ['ayer', 1, 'hoy', 0, '']
    """
    longest_first = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    regex = re.compile(f"({longest_first})")
    return lambda text: [special.get(part, part) for part in regex.split(text)] if special else [text]


class Tokenizer(Content):
    """Byte-level BPE as one tokenizer.json describes it, with which `tokenizers` of Hugging Face gives the same ids.

    From Content (engine/tokenizer_json.py) it has vocab_size; special, {text: id} of special tokens; bos and eos, ids
    that begin and end a text; token_bytes of each id; byte_ids of each byte; ranks, {(left, right): how early it was
    learned}, and results, the id that each merge makes; whole, {bytes: id} of words that are tokens before any merge;
    added, the tokens that are cut out of a text; and normalize(text).
    """

    def __init__(self, config):
        super().__init__(config)
        self.split, self.blocks = pre_tokenizer(config.get("pre_tokenizer"))
        # where special tokens are allowed or not: what cuts before the text is normalised, and what cuts after
        self._cutters = {allow: [cutter(self.added_tokens(n, allow)) for n in (False, True)] for allow in (False, True)}
        self._ids_of = Cache(self._encode_word)

    def encode(self, text, allow_special=False):
        """The ids of a text; with allow_special, those of `tokenizers` with add_special_tokens=False. Without it,
        "<|endoftext|>" in a text is plain letters, so that nobody who is quoted can end the text.

        text: str, or bytes that need not be UTF-8. The half of a surrogate pair, which is no character, becomes U+FFFD,
        except U+DC80 to U+DCFF, by which Python writes a byte that is not UTF-8.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids, (cut, cut_normalized) = [], self._cutters[allow_special]
        for raw in cut(text):
            parts = cut_normalized(self.normalize(raw)) if isinstance(raw, str) else [raw]
            for part in parts:
                if isinstance(part, str):
                    ids += chain.from_iterable(map(self._ids_of.__getitem__, self.split(part)))
                else:
                    ids.append(part)
        return ids

    def encode_iter(self, chunks, allow_special=False):
        """Yields the ids of a text that comes as an iterable of strings, such as a file larger than memory: those of
        `encode` on all of it. All of it is held where no safe place to cut is known: for a split pattern that is not in
        PATTERNS, or an added token that has a space, a newline or one of .,;:!?、。， after a letter or digit.
        """
        across = any(EDGE.search(normalize(form, token)) for token in self.added for form in ("NFC", "NFD"))
        for block in ["".join(chunks)] if across else reblocked(chunks, self.blocks):
            yield from self.encode(block, allow_special)

    def _encode_word(self, word):
        """The ids of one word, as `textbook_encode` finds them; but of all pairs in the word the one learned earliest
        is merged, until none is left: a pair that a merge makes was learned after it.
        """
        data = HALVES.sub("\ufffd", word).encode("utf-8", "surrogateescape")
        if data in self.whole:
            return [self.whole[data]]
        ids = [*map(self.byte_ids.__getitem__, data)]
        if None in ids:  # a byte that the vocabulary lacks has no id, as in `tokenizers`
            ids = [i for i in ids if i is not None]
        return merge_word(ids, self.ranks, self.results)

    def decode_bytes(self, ids):
        """The bytes that the ids stand for. ValueError for an id outside the vocabulary."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"ids must be at least 0 and below the vocabulary size, {self.vocab_size}")
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def decode(self, ids):
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, ids):
        """Yields the text of an iterable of ids piece by piece, as soon as its characters are complete."""
        decoder = getincrementaldecoder("utf-8")("replace")
        yield from filter(None, (decoder.decode(self.decode_bytes([i])) for i in ids))
        yield from filter(None, [decoder.decode(b"", final=True)])


def train(text, vocab_size, pattern="gpt2", special=("<|endoftext|>",)):
    """A Tokenizer with byte-level BPE learned from `text`: a string, or an iterable of strings (documents).

    vocab_size counts the special tokens, the 256 bytes and the merges, which have their ids in that order; where the
    text offers fewer merges the vocabulary stays smaller. pattern: "gpt2", "llama3", "qwen", or a regular expression as
    in tokenizer.json. special: texts of two characters or more, such as the one that ends a document. ValueError for an
    empty text, a shorter special token, a vocabulary below the bytes and special tokens, and a pattern that Python's
    `re` cannot take.
    """
    special = list(dict.fromkeys(special))
    alphabet = special + sorted(BYTE_CHARS)
    if vocab_size < len(alphabet):
        need = f"the 256 bytes and {len(special)} special tokens need {len(alphabet)}"
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {need}")
    if any(len(token) < 2 for token in special):
        raise ValueError("a special token must have at least two characters")
    words, published_as = Counter(), published(pattern)
    split, _ = pre_tokenizer(published_as)
    for document in [text] if isinstance(text, str) else text:
        words.update(split(document))
    if not words:
        raise ValueError("there is no text to train a tokenizer on")
    # the merges of textbook_learn, with only the pairs beside each merge counted anew: megabytes take seconds
    tokens, merges = learn_merges(words, alphabet, vocab_size)
    return Tokenizer(content(tokens, merges, special, published_as))


def load(path):
    """The Tokenizer of a tokenizer.json. ValueError for a file that is not one, or asks for what bpe.py lacks; OSError
    where it cannot be read.
    """
    return read(path, Tokenizer)
