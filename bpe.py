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


# --- training -----------------------------------------------------------------------------------------------


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
        if not count:
            continue
        left, right = pair
        token = tokens[ord(left)] + tokens[ord(right)]
        if token in ids:  # a special token: ordinary text must not make its id
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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS.get(pattern, pattern)}}
    split |= {"behavior": "Isolated", "invert": False}
    steps = [split, byte_level | {"use_regex": False}]
    config = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | flags for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level if pattern == "gpt2" else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(alphabet)}, "merges": []},
    }
    split_words = Tokenizer(config).split
    words = Counter()
    for document in [text] if isinstance(text, str) else text:
        words.update(split_words(document))
    if not words:
        raise ValueError("there is no text to train a tokenizer on")
    tokens, merges = learn_merges(words, alphabet, vocab_size)
    config["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": [*map(list, merges)]}
    return Tokenizer(config)


def refuse(condition, what):
    if condition:
        raise ValueError(f"tokenizer.json asks for {what}, which bpe.py does not have")


# --- split patterns ---------------------------------------------------------------------------------------------------

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DIGITS = {True: r"\p{N}|\P{N}+", False: r"\p{N}+|\P{N}+"}  # each digit by itself, or runs of them
COVERING = {*PATTERNS.values(), *DIGITS.values()}  # every character of a text is in some match
ALL, GAPS, MATCHES = slice(None), slice(0, None, 2), slice(1, None, 2)  # of gap, match, gap, ..., match, gap

# Between a letter or digit and one of these all of PATTERNS cut, without looking any further on either side, and NFC
# composes nothing: a text can be cut there and encoded in parts.
EDGE, SPACE_EDGE = re.compile(r"(?<=[^\W_])[ \n.,;:!?、。，]"), re.compile(r"(?<=[^\W_]) ")
BLOCK = 1 << 13


# Text is mostly ASCII, and seldom beyond the basic plane: a class cut down to the characters that can occur is up to
# four times as fast to match as the whole one, which has several hundred ranges.
LIMITS = 0x7F, 0xFFFF, sys.maxunicode
# Unicode's White_Space, which is what tokenizers means by \s; Python's \s has \x1c to \x1f too
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
SPACE_RUN = re.compile(f"[{SPACES}]*")


@lru_cache
def categories(limit):
    """{general category: [(first, last), ...]} of the characters up to `limit`."""
    ranges, start = defaultdict(list), 0
    for category, run in groupby(map(unicodedata.category, map(chr, range(limit + 1)))):
        end = start + len(list(run))
        ranges[category].append((start, end - 1))
        start = end
    return ranges


def char_class(name, negated, limit):
    r"""The inside of a [class]: the characters up to `limit` in a category such as L or Lu, or in \s or \d."""
    name = {"d": "Nd"}.get(name, name)
    if name == "s":
        ranges = [(ord(space), ord(space)) for space in SPACES]
    else:
        known = re.fullmatch("[LMNPSZC]|L[ultmo]|M[nce]|N[dlo]|P[cdseifo]|S[mcko]|Z[slp]|C[cfnos]", name)
        refuse(not known, f"\\p{{{name}}} in a split pattern")
        ranges = sorted(chain(*(rs for category, rs in categories(limit).items() if category.startswith(name))))
    if negated:
        edges = [0, *chain(*((first - 1, last + 1) for first, last in ranges)), sys.maxunicode]
        ranges = zip(edges[::2], edges[1::2])
    # where no character qualifies, one that cannot occur keeps the class from being empty
    ranges = [(a, b) for a, b in ranges if a <= min(b, limit)] or [(sys.maxunicode, sys.maxunicode)]
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in ranges)


@lru_cache
def compile_pattern(pattern, limit):
    r"""A split pattern for the standard `re`, exact for texts with no character beyond `limit`.

    \p{...}, \s and \d become explicit classes. ValueError for what `re` lacks, or reads otherwise than Oniguruma,
    the engine of `tokenizers`.
    """
    out, inside = [], False
    for m in re.finditer(r"\\[pP](?:\{\^?\w+\}|\w)|\\.|&&|\(\?(?:<?[=!]|i?:|>)?|\}\+|.", pattern, re.S):
        t = m[0]
        if t[0] == "\\" and t[1] in "pPsSdD":
            chars = char_class(t[2:].strip("{^}") or t[1].lower(), t[1].isupper() != ("^" in t), limit)
            out.append(chars if inside else f"[{chars}]")
            continue
        refuse(
            re.fullmatch(r"\\[^\W_nrtfvaxuAz0]|" + (r"&&|\[" if inside else r"\(\?|\}\+"), t), f"{t} in a split pattern"
        )
        out.append(t if inside else {"(": "(?:", "^": "(?m:^)", "$": "(?m:$)", r"\z": r"\Z"}.get(t, t))
        inside = t != "]" if inside else t == "["
    try:
        return re.compile("".join(out))
    except re.error as error:
        raise ValueError(f"the split pattern {pattern!r} cannot be read by Python: {error}") from None


def find_limit(text):
    """The smallest of LIMITS that no character of `text` exceeds."""
    return LIMITS[0] if text.isascii() else LIMITS[2 if re.search("[\U00010000-\U0010ffff]", text) else 1]


def splitter(pattern, keep=ALL):
    """A function from a text to the list of its pieces: the matches of a regular expression and what lies between."""
    compile_pattern(pattern, LIMITS[0])  # so that a bad one is refused here

    def split(text):
        regex = compile_pattern(pattern, find_limit(text))
        if pattern in COVERING and keep != GAPS:
            return regex.findall(text)
        cuts = [0, *chain.from_iterable(m.span() for m in regex.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]
        return [piece for piece in pieces[keep] if piece]

    return split


def blocks(text):
    """Cut a text into blocks of about BLOCK characters where all of PATTERNS cut anyway.

    They fit the processor's cache, and one rare character slows the matching of one block only (see LIMITS).
    """
    start = 0
    while edge := SPACE_EDGE.search(text, start + BLOCK):
        yield text[start : edge.start()]
        start = edge.start()
    yield text[start:]


# --- the tokenizer ----------------------------------------------------------------------------------------------------

# The published files write a byte as a printable character: itself where Latin-1 has one, else one from U+0100 on.
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_CHARS = [chr(256 + _others.index(byte)) if byte in _others else chr(byte) for byte in range(256)]
CHAR_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARS)}

CACHED_WORDS, CACHED_LENGTH = 1 << 17, 64
REFUSED = "truncation padding dropout continuing_subword_prefix end_of_word_suffix byte_fallback".split()
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
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


def sequence(spec, key):
    """The parts of a component of tokenizer.json: none, itself, or those of a Sequence, which it holds under `key`."""
    if spec and spec["type"] == "Sequence":
        return [part for inner in spec[key] for part in sequence(inner, key)]
    return [spec] if spec else []


def pre_tokenizer(spec):
    """The functions, each from an iterable of pieces to an iterable of pieces, that one pre-tokenizer stands for."""
    prefix = [lambda pieces: (piece if piece[0] == " " else " " + piece for piece in pieces)]
    prefix *= spec["type"] == "ByteLevel" and spec.get("add_prefix_space", True)
    if spec["type"] == "ByteLevel":
        if not spec.get("use_regex", True):
            return prefix
        split = splitter(PATTERNS["gpt2"])
    elif spec["type"] == "Digits":
        split = splitter(DIGITS[spec.get("individual_digits", False)])
    elif spec["type"] == "Split":
        ((form, pattern),) = spec["pattern"].items()
        keep = {"Isolated": ALL, "Removed": MATCHES if spec.get("invert") else GAPS}.get(spec["behavior"])
        refuse(keep is None, f"a Split with the behaviour {spec['behavior']}")
        split = splitter({"Regex": pattern, "String": re.escape(pattern)}[form], keep)
    else:
        refuse(True, f"the pre-tokenizer {spec['type']}")
    return [*prefix, lambda pieces: chain.from_iterable(map(split, pieces))]


class Tokenizer:
    """Byte-level BPE as one tokenizer.json describes it; `config` is its content.

    vocab_size: one more than the largest id. token_bytes: the bytes of each id, in a list. special: {text: id} of the
    special tokens. bos, eos: lists of the ids that the file would put before and after a text; `encode` adds none.
    ValueError, by name, for what bpe.py does not have.
    """

    def __init__(self, config):
        self.config = config
        model, added = config["model"], config.get("added_tokens") or []
        normalizers = sequence(config.get("normalizer"), "normalizers")
        splits = sequence(config.get("pre_tokenizer"), "pretokenizers")
        kinds = [part["type"] for part in splits]
        refuse(model.get("type", "BPE") != "BPE", f"the model {model.get('type')}")
        for part in model, config:
            for option in REFUSED:
                refuse(part.get(option), option)
        refuse(model.get("unk_token") and model.get("fuse_unk"), "fuse_unk")
        for part in normalizers:
            refuse(part["type"] != "NFC", f"the normalizer {part['type']}")
        for part in sequence(config.get("decoder"), "decoders"):
            refuse(part["type"] != "ByteLevel", f"the decoder {part['type']}")
        for token in added:
            refuse(token.get("single_word"), f"single_word in the added token {token['content']!r}")
        refuse(kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel", "pre-tokenizers that do not end in ByteLevel")

        vocab = model["vocab"]
        ids = {token["content"]: vocab.get(token["content"], token["id"]) for token in added if token["content"]}
        self.special = {token["content"]: ids[token["content"]] for token in added if token.get("special")}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self._results = [vocab[left + right] for left, right in merges]
        forged = set(self.special.values())  # no merge may make a special token out of text
        self._ranks = {
            (vocab[left], vocab[right]): rank
            for rank, (left, right) in enumerate(merges)
            if self._results[rank] not in forged
        }
        # a byte that the vocabulary lacks becomes the unknown token or, where there is none, vanishes
        self._byte_ids = [vocab.get(char, vocab.get(model.get("unk_token"))) for char in BYTE_CHARS]
        self._lacks_bytes = None in self._byte_ids
        # what is not spelled in byte characters is an added token, which stands for its own text
        spelled = {
            i: bytes(map(CHAR_BYTES.get, token)) if CHAR_BYTES.keys() >= set(token) else token.encode()
            for token, i in vocab.items()
        }
        self._whole = {text: i for i, text in spelled.items() if i not in forged} if model.get("ignore_merges") else {}
        self._cache = Cache(self._encode_word)

        self._nfc = bool(normalizers)
        self._steps = [step for part in splits for step in pre_tokenizer(part)]
        own = [part["pattern"].get("Regex") for part in splits if part["type"] == "Split"]
        # whether the text may be cut at an EDGE: a known pattern cuts there, and no other looks across
        self._local = set(own) <= set(PATTERNS.values()) and bool(own or splits[-1].get("use_regex", True))
        self._edge = SPACE_EDGE if splits[-1].get("add_prefix_space", True) else EDGE

        self._added = {  # for (normalised text?, special tokens too?): a function that cuts a text at added tokens
            key: cut_at_added([t | {"id": ids[t["content"]]} for t in added if t["content"]], *key, self._nfc)
            for key in product((False, True), repeat=2)
        }
        self._added_texts = {form for token in ids for form in (token, unicodedata.normalize("NFC", token))}
        spelled = {i: token.encode() for token, i in ids.items()} | spelled
        if not all(isinstance(i, int) and 0 <= i < 1 << 24 for i in spelled):
            raise ValueError("tokenizer.json has an id that is not an integer from 0 to 2**24")
        self.vocab_size = 1 + max(spelled)
        self.token_bytes = [spelled.get(i, b"") for i in range(self.vocab_size)]
        self.bos, self.eos = template(config.get("post_processor"))

    def encode(self, text, allow_special=False):
        """The ids of a text, as `tokenizers` gives them with add_special_tokens=False.

        text: str, or bytes that need not be UTF-8. The text of a special token gives its id only where
        `allow_special`; else it is text like any other.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids = []
        for section, token in self._sections(text, allow_special):
            if token is None:
                ids += chain.from_iterable(map(self._cache.__getitem__, self.split(section)))
            else:
                ids.append(token)
        return ids

    def split(self, text):
        """An iterator over the words (pieces that no merge crosses) of a text without added tokens."""
        pieces = filter(None, blocks(text) if self._local else [text])
        for step in self._steps:
            pieces = step(pieces)
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
        for i in ids:
            if piece := decoder.decode(self.decode_bytes([i])):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def encode_iter(self, chunks, allow_special=False):
        """Yield the ids of a text that comes as an iterable of strings: those of `encode` on all of it.

        A few times BLOCK characters are held at once, however long the text is. All of it is held where the file has
        no split pattern or one that is not in PATTERNS, for which no cut is known to be safe.
        """
        held, enough = "", 2 * BLOCK
        for chunk in chunks:
            held += chunk
            if len(held) >= enough:
                cut = self._safe_cut(held)
                yield from self.encode(held[:cut], allow_special)
                held = held[cut:]
                enough = 2 * max(BLOCK, len(held))
        yield from self.encode(held, allow_special)

    def save(self, path, **settings):
        """Write tokenizer.json, atomically: to `path` if that ends in .json, else into the folder `path`.

        In a folder tokenizer_config.json goes beside it, with `settings` such as eos_token or chat_template: what
        AutoTokenizer of transformers opens.
        """
        path = os.fspath(path)
        if not path.endswith(".json"):
            os.makedirs(path, exist_ok=True)
            write_json(os.path.join(path, "tokenizer_config.json"), TOKENIZER_CONFIG | settings)
            path = os.path.join(path, "tokenizer.json")
        write_json(path, self.config)

    def _encode_word(self, word):
        data = word.encode("utf-8", "surrogateescape")
        if self._whole and data in self._whole:
            return [self._whole[data]]
        ids = [*map(self._byte_ids.__getitem__, data)]
        if self._lacks_bytes:
            ids = [i for i in ids if i is not None]
        return merge_word(ids, self._ranks, self._results)

    def _safe_cut(self, text):
        """A place in `text` where it can be cut, whatever follows it: an edge with no added token across it, or 0."""
        reach = max(map(len, self._added_texts), default=0)
        for edge in self._edge.finditer(text, len(text) // 2, len(text) - reach) if self._local else ():
            cut = edge.start()
            before = text[max(0, cut - 8 * reach) : cut]  # enough for `reach` characters in NFC
            before = unicodedata.normalize("NFC", before) if self._nfc else before
            near, here = before + text[cut : cut + reach], len(before)
            # nor may one end here, since it may take the spaces that follow
            if all(near.find(t, max(0, here - len(t)), here + len(t) - 1) < 0 for t in self._added_texts):
                return cut
        return 0

    def _sections(self, text, allow_special):
        """Cut a text at its added tokens: a list of (text between them, None) and (None, id)."""
        sections = [(text, None)]
        for normalized in False, True:
            if normalized and self._nfc:
                sections = [(text and unicodedata.normalize("NFC", text), token) for text, token in sections]
            if find := self._added[normalized, allow_special]:
                cut = ([section] if section[0] is None else find(section[0]) for section in sections)
                sections = list(chain.from_iterable(cut))
        return sections


def cut_at_added(added, normalized, allow_special, nfc):
    """A function that cuts a text at those of the added tokens that apply: -> [(text, None) or (None, id), ...].

    Where several begin at one place, the longest wins. None if none applies.
    """
    tokens = {
        unicodedata.normalize("NFC", token["content"]) if nfc and normalized else token["content"]: token
        for token in added
        if bool(token.get("normalized")) == normalized and (allow_special or not token.get("special"))
    }
    regex = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def cut(text):
        sections, end = [], 0
        for m in regex.finditer(text):
            token, (start, stop) = tokens[m[0]], m.span()
            before = text[end:start]
            if token.get("lstrip"):
                before = before.rstrip(SPACES)
            if token.get("rstrip"):
                stop = SPACE_RUN.match(text, stop).end()
            sections += [(before, None), (None, token["id"])]
            end = stop
        return [*sections, (text[end:], None)]

    return cut if tokens else None


def template(post_processor):
    """(bos, eos): the ids that a post_processor puts before and after one text."""
    bos, eos = [], []
    for part in sequence(post_processor, "processors"):
        if part["type"] == "TemplateProcessing":
            side = bos
            for item in part["single"]:
                if "Sequence" in item:
                    side = eos
                else:
                    side += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif part["type"] in ("RobertaProcessing", "BertProcessing"):
            bos, eos = [part["cls"][1]], [part["sep"][1]]
        else:
            refuse(part["type"] != "ByteLevel", f"the post-processor {part['type']}")
    return bos, eos


def write_json(path, content):
    part = f"{path}.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
    os.replace(part, path)


def load(path):
    """The Tokenizer of a tokenizer.json. ValueError for a file that is not one, or asks for what bpe.py lacks."""
    try:
        with open(path, encoding="utf-8") as file:
            return Tokenizer(json.load(file))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a tokenizer.json that can be read: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
    from pydoc_data.topics import topics

    import matplotlib.pyplot as plt

    # of each stem most forms are in the training text; agotado, agotador, agotante are not, though agotar, agotaba are
    held = [(stem, n) for i, stem in enumerate(STEMS) for n in (3, 4, 5) if stem == "agot" or (i + n) % 7 == 0]
    seen = "\n".join(line.format(stem) for stem in STEMS for n, line in enumerate(SENTENCES) if (stem, n) not in held)
    unseen = "\n".join(SENTENCES[n].format(stem) for stem, n in held)
    size = 500
    words, pieces, tokenizer = train_words(seen, size), train_wordpiece(seen, size), train(seen, size)
    rows = {  # vocabulary, text -> tokens, the token of what is unknown
        "words": (len(words), lambda text: encode_words(text, words), "<unk>"),
        "WordPiece": (len(pieces), lambda text: encode_wordpiece(text, pieces), "[UNK]"),
        "BPE": (tokenizer.vocab_size, lambda text: [tokenizer.decode([i]) for i in tokenizer.encode(text)], None),
        "characters": (len(set(seen)), lambda text: [c if c in seen else "?" for c in text], "?"),
        "bytes": (256, lambda text: [f"{byte:x}" for byte in text.encode()], None),
    }
    print(f"{'':11}vocabulary  tokens/word  unknown  agotador, agotado, agotante")
    for name, (vocabulary, encode, unknown) in rows.items():
        tokens, n_words = encode(unseen), len(words_of(unseen))
        shown = "   ".join("|".join(encode(word)) for word in (" agotador", " agotado", " agotante"))
        print(f"{name:11}{vocabulary:10}{len(tokens) / n_words:13.2f}{tokens.count(unknown) / n_words:9.0%}  {shown}")

    pages = [topics[name] for name in sorted(topics)]
    seen, unseen = "\n".join(pages[::2] + pages[3::4]), "\n".join(pages[1::4])
    n_words, sizes = len(words_of(unseen)), [300, 500, 1000, 2000, 4000, 8000]
    tokens = [len(train(seen, size).encode(unseen)) / n_words for size in sizes]
    unknown = [100 * encode_words(unseen, train_words(seen, size)).count("<unk>") / n_words for size in sizes]
    print("\nheld-out pages of Python's language reference")
    print("vocabulary          " + "".join(f"{size:8}" for size in sizes))
    print("BPE, tokens per word" + "".join(f"{value:8.2f}" for value in tokens))
    print("words, % unknown    " + "".join(f"{value:8.1f}" for value in unknown))

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, values, label in zip(axes, (tokens, unknown), ("BPE: tokens per word", "words: % unknown")):
        axis.plot([f"{size}" for size in sizes], values, "o-")
        axis.set(xlabel="vocabulary", ylabel=label, ylim=(0, 1.1 * max(values)))
    os.makedirs("figures", exist_ok=True)
    figure.savefig("figures/bpe.png", dpi=120)
    print("figures/bpe.png")


if __name__ == "__main__":
    demo()
