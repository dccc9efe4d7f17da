"""Tokenizador.

A model reads integers, so text is first cut into pieces from a fixed vocabulary. Whole words need a huge one and still
meet unknown words; characters or bytes need almost none, but make long sequences. Sub-words lie between: agot-ador,
agot-ado, agot-ante share what they have in common. Byte-pair encoding (Sennrich et al. 2016) learns them: start
from the 256 bytes, so that no text is unknown (Radford et al. 2019), and repeat

    merge the most frequent pair of neighbouring tokens into one new token

until the vocabulary has the chosen size. To encode is to replay the merges, the earliest learned first. No merge
crosses the words that a regular expression cuts beforehand (the split pattern), and that makes both fast: a corpus
is a table of distinct words with their counts, and a word encoded once can be remembered.

A tokenizer here is the content of one `tokenizer.json`, the published format: `train` makes it, `load` reads it, and
Hugging Face `tokenizers` gives the same ids with it.
"""

import json
import os
import re
import sys
import unicodedata
from codecs import getincrementaldecoder
from collections import Counter, defaultdict
from functools import lru_cache
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, groupby, product, repeat
from math import log

# --- the idea -----------------------------------------------------------------------------------------------


def textbook_train(words, n_merges, first):
    """Byte-pair encoding as in Sennrich et al. (2016), algorithm 1: all pairs are counted anew for each merge.

    words: {tuple of token ids: count}. Returns {(left, right): (rank, new id)}, new ids counting up from `first`.
    Among equally frequent pairs the one with the smallest ids wins.
    """
    merges = {}
    for rank in range(n_merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges[best] = rank, first + rank
        words = {tuple(textbook_encode(word, {best: merges[best]})): count for word, count in words.items()}
    return merges


def textbook_encode(ids, merges):
    """While any two neighbours can merge, merge the pair that was learned first, the leftmost of equals.

    ids: token ids, at the start those of bytes; merges: {(left, right): (rank, new id)}. Returns a list of ids.
    """
    ids = list(ids)
    while found := [(merges[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]:
        (_, new), i = min(found)
        ids[i : i + 2] = [new]
    return ids


# --- the slide's other tokenizers -----------------------------------------------------------------------------


def words_of(text):
    """Words and punctuation marks, without the space between them."""
    return re.findall(r"\w+|[^\w\s]", text)


def train_words(text, vocab_size):
    """The most frequent words, and <unk> for all others."""
    return {"<unk>", *(word for word, _ in Counter(words_of(text)).most_common(vocab_size - 1))}


def encode_words(text, vocab):
    return [word if word in vocab else "<unk>" for word in words_of(text)]


def train_wordpiece(text, vocab_size):
    """WordPiece (Schuster & Nakajima 2012): merge the pair that raises the likelihood of the text most.

    Under a unigram model of the pieces, merging a and b raises the log-likelihood by about n(ab) log(n(ab) N / (n(a)
    n(b))), N being the number of pieces. Pieces inside a word are written ##piece. Returns the set of pieces.
    """
    words = {(word[0], *("##" + char for char in word[1:])): n for word, n in Counter(words_of(text)).items()}
    vocab = {"[UNK]"}.union(*words)
    while len(vocab) < vocab_size:
        single, pairs = Counter(), Counter()
        for word, n in words.items():
            for piece in word:
                single[piece] += n
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        n_pieces = single.total()
        gain = {(a, b): n * log(n * n_pieces / (single[a] * single[b])) for (a, b), n in pairs.items()}
        best = max(gain, key=lambda pair: (gain[pair], pair))
        new = best[0] + best[1].removeprefix("##")
        words = {tuple(textbook_encode(word, {best: (0, new)})): n for word, n in words.items()}
        vocab.add(new)
    return vocab


def encode_wordpiece(text, vocab):
    """The longest piece that fits, from left to right (Devlin et al. 2019); a word that none spells is [UNK]."""
    pieces = []
    for word in words_of(text):
        start, found = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            matches = ("##" * (start > 0) + word[start:end] for end in ends)
            piece = next((piece for piece in matches if piece in vocab), None)
            if piece is None:
                found = ["[UNK]"]
                break
            found.append(piece)
            start += len(piece) - 2 * (start > 0)
        pieces += found
    return pieces


# --- training -------------------------------------------------------------------------------------------------


def learn_merges(words, alphabet, vocab_size):
    """The same merges by incremental counts: a merge changes only the pairs beside it.

    words: {text: count}; alphabet: the tokens before any merge, among them the 256 byte characters; a token is
    spelled in byte characters. Returns (tokens in order of id, merges as pairs of tokens).

    A word is held as a string whose characters are chr(token id): finding, cutting and comparing pairs are then string
    operations, done in C, and pairs order as their ids do. The heap has for each pair the count at the time it was
    pushed; one that has fallen since is put right when it comes to the top. The merges are those of the Hugging
    Face trainer.
    """
    tokens = list(alphabet)
    ids = {token: i for i, token in enumerate(tokens)}
    table = [chr(ids[BYTE_CHARS[byte]]) for byte in range(256)]
    counts = list(words.values())
    words = [word.encode().decode("latin-1").translate(table) for word in words]
    total = defaultdict(int)  # pair -> how often it occurs
    where = defaultdict(list)  # pair -> the words where it may be
    for n, (word, count) in enumerate(zip(words, counts)):
        for i in range(len(word) - 1):
            pair = word[i : i + 2]
            total[pair] += count
            where[pair].append(n)
    heap = [(-total[pair], pair, place) for pair, place in where.items()]
    heapify(heap)
    merges = []
    while heap and len(tokens) < vocab_size:
        count, pair, place = heap[0]
        if -count != total[pair]:
            heapreplace(heap, (-total[pair], pair, place))
            continue
        heappop(heap)
        left, right = pair
        token = tokens[ord(left)] + tokens[ord(right)]
        if not count or token in ids:  # a special token: ordinary text must not make its id
            continue
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        new = chr(len(tokens))
        ids[token] = len(tokens)
        tokens.append(token)
        where = defaultdict(list)  # the pairs that this merge makes
        for n in place:
            word, count = words[n], counts[n]
            i = word.find(pair)
            while i >= 0:
                if i:
                    before = word[i - 1]
                    total[before + left] -= count
                    total[before + new] += count
                    where[before + new].append(n)
                word = word[:i] + new + word[i + 2 :]
                i += 1
                if i < len(word):
                    after = word[i]
                    total[right + after] -= count
                    total[new + after] += count
                    where[new + after].append(n)
                i = word.find(pair, i)
            words[n] = word
        for made, place in where.items():
            if total[made] > 0:
                heappush(heap, (-total[made], made, place))
    return tokens, merges


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def train(text, vocab_size, pattern="gpt2", special=("<|endoftext|>",)):
    """A Tokenizer with byte-level BPE learned from `text`: a string, or an iterable of strings (documents).

    vocab_size counts the special tokens, the 256 bytes and the merges, which have their ids in that order; where the
    text offers fewer merges the vocabulary stays smaller. pattern: a name in PATTERNS or a regular expression.
    ValueError for an empty text, a vocabulary below the bytes and special tokens, and a pattern `re` cannot take.
    """
    special = list(dict.fromkeys(special))
    alphabet = special + sorted(BYTE_CHARS)
    if vocab_size < len(alphabet):
        need = f"the 256 bytes and {len(special)} special tokens need {len(alphabet)}"
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {need}")
    if any(len(token) < 2 for token in special):
        raise ValueError("a special token must have at least two characters")
    split = {"type": "Split", "pattern": {"Regex": PATTERNS.get(pattern, pattern)}}
    steps = [split | {"behavior": "Isolated", "invert": False}, BYTE_LEVEL | {"use_regex": False}]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(alphabet)}, "merges": []}
    config = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")) | {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token} | FLAGS for i, token in enumerate(special)],
        "pre_tokenizer": BYTE_LEVEL if pattern == "gpt2" else {"type": "Sequence", "pretokenizers": steps},
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    split_words, words = Tokenizer(config).split, Counter()
    for document in [text] if isinstance(text, str) else text:
        words.update(split_words(document))
    if not words:
        raise ValueError("there is no text to train a tokenizer on")
    tokens, merges = learn_merges(words, alphabet, vocab_size)
    model |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": [*map(list, merges)]}
    return Tokenizer(config)


# --- split patterns -------------------------------------------------------------------------------------------

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DIGITS = {True: r"\p{N}|\P{N}+", False: r"\p{N}+|\P{N}+"}  # each digit by itself, or runs of them
COVERING = {*PATTERNS.values(), *DIGITS.values()}  # every character of a text is in some match

# Between a letter or digit and one of these all of COVERING cut, without looking any further on either side, and NFC
# composes nothing: a text can be cut there and encoded in parts. A part of BLOCK characters fits the processor's cache.
EDGE, SPACE_EDGE = re.compile(r"(?<=[^\W_])[ \n.,;:!?、。，]"), re.compile(r"(?<=[^\W_]) ")
BLOCK = 1 << 13

# Text is mostly ASCII, and seldom beyond the basic plane: a class cut down to the characters that can occur is up to
# four times as fast to match as the whole one, which has several hundred ranges.
LIMITS = 0x7F, 0xFFFF, sys.maxunicode


def shown(text):
    """The beginning of what a file says, as it can stand in a sentence."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text)[:80])


def refuse(condition, what):
    if condition:
        raise ValueError(f"tokenizer.json asks for {shown(what)}, which bpe.py does not have")


@lru_cache
def categories(limit):
    """[(general category, first character, last), ...] of the characters up to `limit`, in order."""
    labels = [*map(unicodedata.category, map(chr, range(limit + 1)))]
    for space in filter(lambda char: ord(char) <= limit, "\t\n\v\f\r\x85"):
        labels[ord(space)] = "Cc, a space"
    runs, start = [], 0
    for label, run in groupby(labels):
        end = start + len(list(run))
        runs.append((label, start, end - 1))
        start = end
    return runs


def char_class(name, negated, limit):
    r"""The inside of a [class]: the characters up to `limit` in a category such as L or Lu, or in \s or \d.

    \s is Unicode's White_Space, as for `tokenizers`; Python's \s has \x1c to \x1f too.
    """
    known = re.fullmatch("s|d|[LMNPSZC]|L[ultmo]|M[nce]|N[dlo]|P[cdseifo]|S[mcko]|Z[slp]|C[cfnos]", name)
    refuse(not known, f"\\p{{{name}}} in a split pattern")
    prefix = {"s": ("Z", "Cc, a space"), "d": "Nd"}.get(name, name)
    chars = ""
    for inside, runs in groupby(categories(limit), lambda run: run[0].startswith(prefix) != negated):
        if inside:
            (_, first, last), *more = runs
            chars += f"\\U{first:08x}-\\U{more[-1][2] if more else last:08x}"
    return chars or f"\\U{sys.maxunicode:08x}"  # a class must not be empty, but may have what cannot occur


def to_python(pattern, limit):
    r"""A split pattern for the standard `re`, exact for texts with no character beyond `limit`.

    \p{...}, \s and \d become explicit classes. ValueError for what `re` lacks, or reads otherwise than Oniguruma,
    the engine of `tokenizers`.
    """
    out, inside = [], False  # a [class]
    for m in re.finditer(r"\\[pP]\{\w+\}|\\.|&&|\(\?(?:<?[=!]|i?:)|\}\+|\(\?|.", pattern, re.S):
        part = m[0]
        if part[0] == "\\" and part[1] in "pPsSdD":
            chars = char_class(part[3:-1] or part[1].lower(), part[1].isupper(), limit)
            out.append(chars if inside else f"[{chars}]")
        else:
            odd = r"&&|\[" if inside else r"\(\?|\}\+|[$^]"
            refuse(re.fullmatch(rf"\\[^\W_nrtfv]|{odd}", part), f"{part} in a split pattern")
            out.append("(?:" if part == "(" and not inside else part)
            inside = part != "]" if inside else part == "["
    return "".join(out)


def splitter(pattern):
    """A function from a text to its pieces: the matches of a split pattern, and what lies between them."""

    @lru_cache
    def compiled(limit):
        source = to_python(pattern, limit)
        try:
            return re.compile(source).findall if pattern in COVERING else re.compile(f"({source})").split
        except (re.error, OverflowError) as error:
            raise ValueError(f"the split pattern {shown(pattern)} cannot be read by Python: {error}") from None

    def split(text):
        limit = LIMITS[0] if text.isascii() else LIMITS[2 if re.search("[\U00010000-\U0010ffff]", text) else 1]
        return filter(None, compiled(limit)(text))

    compiled(LIMITS[0])  # so that a bad pattern is refused here
    return split


def sequence(spec, key):
    """The parts of a component of tokenizer.json: none, itself, or those of a Sequence, which it holds under `key`."""
    if spec and spec["type"] == "Sequence":
        refuse(spec.get(key) is None, f"a Sequence without {key}")
        return [part for inner in spec[key] for part in sequence(inner, key)]
    return [spec] if spec else []


def pre_tokenizer(spec):
    """(functions from a text to its pieces, split pattern or None): what one pre-tokenizer does, step by step."""
    kind, steps, pattern = spec["type"], [], None
    if kind == "ByteLevel":
        if spec.get("add_prefix_space", True):
            steps.append(lambda text: [text if text[0] == " " else " " + text])
        pattern = PATTERNS["gpt2"] if spec.get("use_regex", True) else None
    elif kind == "Digits":
        pattern = DIGITS[bool(spec.get("individual_digits"))]
    elif kind == "Split":
        refuse(spec.get("behavior") != "Isolated", f"a Split with the behaviour {spec.get('behavior')}")
        regex, string = map((spec.get("pattern") or {}).get, ("Regex", "String"))
        refuse((regex is None) == (string is None), "a Split without a pattern")
        pattern = re.escape(string) if regex is None else regex
    else:
        refuse(True, f"the pre-tokenizer {kind}")
    return steps if pattern is None else [*steps, splitter(pattern)], pattern


# --- encoding one word ----------------------------------------------------------------------------------------

CACHED_WORDS, CACHED_LENGTH = 1 << 17, 64
LONG_WORD = 200  # tokens from which a heap is faster than looking through the list
NO_MERGE = sys.maxsize


def merge_word(ids, ranks, results):
    """`textbook_encode` with the rank of each pair kept beside it. ids is changed in place and returned.

    ranks: {(left, right): rank}; results: the new id of each rank.
    """
    if len(ids) > LONG_WORD:
        return merge_long_word(ids, ranks, results)
    get = ranks.get
    rank_at = [*map(get, zip(ids, ids[1:]), repeat(NO_MERGE)), NO_MERGE]
    while (rank := min(rank_at)) < NO_MERGE:
        i = rank_at.index(rank)
        del ids[i + 1], rank_at[i]
        ids[i] = new = results[rank]
        if i:
            rank_at[i - 1] = get((ids[i - 1], new), NO_MERGE)
        if i + 1 < len(ids):
            rank_at[i] = get((new, ids[i + 1]), NO_MERGE)
    return ids


def merge_long_word(ids, ranks, results):
    """The same in n log n steps: a doubly linked list of tokens, and a heap of (rank, position) of their pairs."""
    n = len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        j = after[i]
        if j == n or ranks.get((ids[i], ids[j])) != rank:  # one of the two was merged meanwhile
            continue
        ids[i], ids[j] = results[rank], None
        after[i] = k = after[j]
        if k < n:
            before[k] = i
            if (ids[i], ids[k]) in ranks:
                heappush(heap, (ranks[ids[i], ids[k]], i))
        if (h := before[i]) >= 0 and (ids[h], ids[i]) in ranks:
            heappush(heap, (ranks[ids[h], ids[i]], h))
    return [token for token in ids if token is not None]


class Cache(dict):
    """word -> its ids, filled as it is asked; bounded, so that a long text needs no more memory than a short one."""

    def __init__(self, encode_word):
        self.encode_word = encode_word

    def __missing__(self, word):
        ids = self.encode_word(word)
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = tuple(ids)  # which, unlike a list, the garbage collector stops looking at
        return ids


# --- tokenizer.json -------------------------------------------------------------------------------------------

# The published files write a byte as a printable character: itself where Latin-1 has one, else one from U+0100 on.
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_CHARS = [chr(256 + _others.index(byte)) if byte in _others else chr(byte) for byte in range(256)]
CHAR_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARS)}

# halves of surrogate pairs, which JSON can hold; those in which Python keeps a byte that is not UTF-8 are left out
HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")

REFUSED = """truncation padding dropout continuing_subword_prefix end_of_word_suffix byte_fallback fuse_unk
    single_word lstrip rstrip""".split()


class Tokenizer:
    """Byte-level BPE as one tokenizer.json describes it; `config` is its content.

    vocab_size: one more than the largest id. token_bytes: the bytes of each id, in a list. special: {text: id} of the
    special tokens. bos, eos: lists of the ids that the file would put before and after a text; `encode` adds none.
    ValueError, by name, for what bpe.py does not have.
    """

    def __init__(self, config):
        self.config = config
        model, added = config["model"], [t for t in config.get("added_tokens") or [] if t["content"]]
        for part in model, config, *added:
            for option in REFUSED:
                refuse(part.get(option), option)
        normalizers = sequence(config.get("normalizer"), "normalizers")
        for part in normalizers:
            refuse(part["type"] != "NFC", f"the normalizer {part['type']}")
        for part in sequence(config.get("decoder"), "decoders"):
            refuse(part["type"] != "ByteLevel", f"the decoder {part['type']}")
        self.bos, self.eos = template(config.get("post_processor"))

        vocab = model["vocab"]
        ids = {token["content"]: vocab.get(token["content"], token["id"]) for token in added}
        self.special = {token["content"]: ids[token["content"]] for token in added if token.get("special")}
        # what is not spelled in byte characters is an added token, which stands for its own text
        spelled = {i: token.encode() for token, i in ids.items()} | {
            i: bytes(map(CHAR_BYTES.get, token)) if CHAR_BYTES.keys() >= set(token) else token.encode()
            for token, i in vocab.items()
        }
        if not spelled or not 0 <= min(spelled) <= max(spelled) < 1 << 24:
            raise ValueError("tokenizer.json has no tokens, or ids that are not from 0 to 2**24")
        self.vocab_size = 1 + max(spelled)
        if not all(0 <= i < self.vocab_size for i in self.bos + self.eos):
            raise ValueError("tokenizer.json puts an id before or after a text that is no token")
        self.token_bytes = [spelled.get(i, b"") for i in range(self.vocab_size)]

        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        for merge in merges:
            if (
                not isinstance(merge, list)
                or [*map(type, merge)] != [str, str]
                or not vocab.keys() >= {*merge, "".join(merge)}
            ):
                raise ValueError(f"tokenizer.json has a merge that is not of two tokens into a third, {shown(merge)}")
        self._results = [vocab[left + right] for left, right in merges]
        forged = set(self.special.values())  # no merge may make a special token out of text
        self._ranks = {
            (vocab[left], vocab[right]): rank
            for rank, (left, right) in enumerate(merges)
            if self._results[rank] not in forged
        }
        # a byte that the vocabulary lacks becomes the unknown token or, where there is none, vanishes
        self._byte_ids = [vocab.get(char, vocab.get(model.get("unk_token"))) for char in BYTE_CHARS]
        # words that are tokens, whether or not the merges make them, if the file says so
        whole = vocab.values() if model.get("ignore_merges") else ()
        self._whole = {self.token_bytes[i]: i for i in whole if i not in forged}
        self._cache = Cache(self._encode_word)

        splits = sequence(config.get("pre_tokenizer"), "pretokenizers")
        kinds = [part["type"] for part in splits]
        refuse(kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel", "pre-tokenizers that do not end in ByteLevel")
        steps, patterns = zip(*map(pre_tokenizer, splits))
        self._steps = [*chain.from_iterable(steps)]

        self._nfc = bool(normalizers)
        self._added = {}  # (normalised text?, special tokens too?) -> regular expression, {text: id}
        for normalized, allow_special in product((False, True), repeat=2):
            tokens = {
                unicodedata.normalize("NFC", text) if normalized and self._nfc else text: ids[text]
                for text, token in {token["content"]: token for token in added}.items()
                if bool(token.get("normalized")) == normalized and (allow_special or not token.get("special"))
            }
            longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
            self._added[normalized, allow_special] = re.compile(f"({longest_first})"), tokens

        # where a text can be cut: nowhere if a pattern is not known, or an added token might lie across the cut
        self._edge = SPACE_EDGE if splits[-1].get("add_prefix_space", True) else EDGE
        patterns = {*patterns} - {None}
        across = any(EDGE.search(unicodedata.normalize(form, token)) for token in ids for form in ("NFC", "NFD"))
        if across or not patterns & {*PATTERNS.values()} or not patterns <= COVERING:
            self._edge = None

    def encode(self, text, allow_special=False):
        """The ids of a text, as `tokenizers` gives them with add_special_tokens=False.

        text: str, or bytes that need not be UTF-8; the half of a surrogate pair, which is no character, is encoded as
        U+FFFD. The text of a special token gives its id only where `allow_special`; else it is text like any other.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        sections, ids = [text], []  # str, or int where an added token was
        for normalized in False, True:
            if normalized and self._nfc:
                sections = [unicodedata.normalize("NFC", s) if isinstance(s, str) else s for s in sections]
            regex, tokens = self._added[normalized, allow_special]
            if tokens:
                cut = (regex.split(section) if isinstance(section, str) else [section] for section in sections)
                sections = [tokens.get(part, part) for part in chain.from_iterable(cut)]
        for section in sections:
            if isinstance(section, str):
                ids += chain.from_iterable(map(self._cache.__getitem__, self.split(section)))
            else:
                ids.append(section)
        return ids

    def encode_iter(self, chunks, allow_special=False):
        """Yield the ids of a text that comes as an iterable of strings: those of `encode` on all of it.

        A few times BLOCK characters are held at once, however long the text is. All of it is held where no place to cut
        is known to be safe: the file's split pattern is not in PATTERNS, or an added token has a space or a punctuation
        mark after a letter.
        """
        held, enough = "", 2 * BLOCK
        for chunk in chunks:
            held += chunk
            if len(held) >= enough:
                *ready, held = self._blocks(held)
                for block in ready:
                    yield from self.encode(block, allow_special)
                enough = 2 * max(BLOCK, len(held))
        yield from self.encode(held, allow_special)

    def split(self, text):
        """An iterator over the words (pieces that no merge crosses) of a text without added tokens."""
        pieces = filter(None, self._blocks(text))
        for step in self._steps:
            pieces = chain.from_iterable(map(step, pieces))
        return pieces

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
        """Yield the text of an iterable of ids piece by piece, as soon as its characters are complete."""
        decoder = getincrementaldecoder("utf-8")("replace")
        pieces = (decoder.decode(self.decode_bytes([i])) for i in ids)
        yield from filter(None, pieces)
        yield from filter(None, [decoder.decode(b"", final=True)])

    def save(self, path, **further):
        """Write tokenizer.json, atomically: to `path` if that ends in .json, else into the folder `path`.

        In a folder tokenizer_config.json goes beside it, which AutoTokenizer of transformers wants; further: entries of
        it, such as chat_template.
        """
        path = os.fspath(path)
        if not path.endswith(".json"):
            os.makedirs(path, exist_ok=True)
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            if (end := "<|endoftext|>") in self.special:
                settings["eos_token"] = end
            write_json(os.path.join(path, "tokenizer_config.json"), settings | further)
            path = os.path.join(path, "tokenizer.json")
        write_json(path, self.config)

    def _blocks(self, text):
        """Cut a text into blocks of about BLOCK characters, where that changes no id."""
        start = 0
        while self._edge and (edge := self._edge.search(text, start + BLOCK)):
            yield text[start : edge.start()]
            start = edge.start()
        yield text[start:]

    def _encode_word(self, word):
        data = HALVES.sub("\ufffd", word).encode("utf-8", "surrogateescape")
        if data in self._whole:
            return [self._whole[data]]
        ids = [*map(self._byte_ids.__getitem__, data)]
        if None in ids:
            ids = [i for i in ids if i is not None]
        return merge_word(ids, self._ranks, self._results)


def template(post_processor):
    """(bos, eos): the ids that a post_processor puts before and after one text."""
    bos, eos = [], []
    for part in sequence(post_processor, "processors"):
        refuse(part["type"] not in ("ByteLevel", "TemplateProcessing"), f"the post-processor {part['type']}")
        side = bos
        tokens = part.get("special_tokens") or {}
        for item in part.get("single") or ():
            if token := item.get("SpecialToken"):
                refuse(token["id"] not in tokens, f"the special token {token['id']}")
                side += tokens[token["id"]]["ids"]
            else:
                side = eos
    return bos, eos


def write_json(path, content):
    part = f"{path}.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
    os.replace(part, path)


# What bpe.py reads of a tokenizer.json. A type; [shape]: a list of such; {str: shape}: an object of such, by any names;
# {name: shape}: an object with these names, of which those with a question mark may be missing or null.
PART = {"type": str, "behavior?": str, "pattern?": {"Regex?": str, "String?": str}}
PART |= {"single?": [{"SpecialToken?": {"id": str}}], "special_tokens?": {str: {"ids": [int]}}}
PART |= {f"{parts}?": [PART] for parts in ("normalizers", "pretokenizers", "processors", "decoders")}
SHAPE = {f"{part}?": PART for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")} | {
    "added_tokens?": [{"content": str, "id": int}],
    "model": {"vocab": {str: int}, "merges": list, "unk_token?": str},
}
KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def check(value, shape, *place):
    """ValueError, with the place, where a value out of a JSON file does not have the shape, written as above."""
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind:
        raise ValueError(f"{shown(' > '.join(map(str, place)) or 'the whole')} must be {KINDS[kind]}")
    if isinstance(shape, list):
        for i, item in enumerate(value):
            check(item, shape[0], *place, i)
    elif isinstance(shape, dict) and str in shape:
        for name, item in value.items():
            check(item, shape[str], *place, name)
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            name, optional = name.removesuffix("?"), name.endswith("?")
            if not optional or value.get(name) is not None:
                check(value.get(name), inner, *place, name)


def load(path):
    """The Tokenizer of a tokenizer.json. ValueError for a file that is not one, or asks for what bpe.py lacks."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON") from None
    try:
        check(config, {"model": {"type?": str}})
        refuse(config["model"].get("type", "BPE") != "BPE", f"the model {config['model'].get('type')}")
        check(config, SHAPE)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of surrogate pairs: do they make whole ones?
            json.dumps(config, ensure_ascii=False).encode()
        return Tokenizer(config)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path} has half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --- demo -----------------------------------------------------------------------------------------------------

STEMS = """agot alarm abrum brill camin calm cant cautiv declar desafi estimul fabric fascin gobern habl inquiet
    interrog naveg observ oper particip penetr provoc refriger simul vigil""".split()
SENTENCES = (
    "ayer {0}aron sin descanso y hoy vuelven a {0}ar .",
    "quien {0}a mucho acaba por no {0}ar nada , y {0}amos todos .",
    "nadie {0}aba tanto como ella , que {0}ó toda la tarde .",
    "lo {0}ado , {0}ado está , y las {0}adas también .",
    "es un {0}ador muy serio , y ella es {0}adora desde niña .",
    "resulta {0}ante , y los {0}antes lo saben .",
)


def demo():
    """Each tokenizer on words that its training text lacks, and what a larger vocabulary buys."""
    from pydoc_data.topics import topics

    import matplotlib.pyplot as plt

    # of each stem most forms are in the training text; agotado, agotador, agotante are not, though agotar, agotaba are
    held = [(stem, n) for i, stem in enumerate(STEMS) for n in (3, 4, 5) if stem == "agot" or (i + n) % 7 == 0]
    seen = "\n".join(line.format(stem) for stem in STEMS for n, line in enumerate(SENTENCES) if (stem, n) not in held)
    unseen = "\n".join(SENTENCES[n].format(stem) for stem, n in held)
    words, pieces, bpe = train_words(seen, 500), train_wordpiece(seen, 500), train(seen, 500)
    rows = {  # vocabulary, text -> tokens, the token of what is unknown
        "words": (len(words), lambda text: encode_words(text, words), "<unk>"),
        "WordPiece": (len(pieces), lambda text: encode_wordpiece(text, pieces), "[UNK]"),
        "BPE": (bpe.vocab_size, lambda text: [bpe.decode([i]) for i in bpe.encode(text)], None),
        "characters": (len(set(seen)), lambda text: [c if c in seen else "?" for c in text], "?"),
        "bytes": (256, lambda text: [f"{byte:x}" for byte in text.encode()], None),
    }
    print(f"{'':11}vocabulary  tokens/word  unknown  agotador, agotado, agotante")
    for name, (vocabulary, encode, unknown) in rows.items():
        tokens, n_words = encode(unseen), len(words_of(unseen))
        shown = "   ".join("|".join(encode(word)) for word in (" agotador", " agotado", " agotante"))
        print(f"{name:11}{vocabulary:10}{len(tokens) / n_words:13.2f}{tokens.count(unknown) / n_words:9.0%}  {shown}")

    pages, sizes = [topics[name] for name in sorted(topics)], [300, 500, 1000, 2000, 4000, 8000]
    seen, unseen = "\n".join(pages[::2]), "\n".join(pages[1::2])
    tokens, unknown = [], []
    print("\nheld-out pages of Python's language reference\nvocabulary  BPE: tokens/word  words: unknown")
    for size in sizes:
        words = encode_words(unseen, train_words(seen, size))
        tokens.append(len(train(seen, size).encode(unseen)) / len(words))
        unknown.append(100 * words.count("<unk>") / len(words))
        print(f"{size:10}{tokens[-1]:17.2f}{unknown[-1]:15.1f}%")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, values, label in zip(axes, (tokens, unknown), ("BPE: tokens per word", "words: % unknown")):
        axis.plot([f"{size}" for size in sizes], values, "o-")
        axis.set(xlabel="vocabulary", ylabel=label, ylim=(0, 1.1 * max(values)))
    os.makedirs("figures", exist_ok=True)
    figure.savefig("figures/bpe.png", dpi=120)
    print("figures/bpe.png")


if __name__ == "__main__":
    from engine.cli import run_demo

    run_demo(demo)
