"""Pre-tokenization: a text is cut into the words that no merge crosses, by the regular expressions of a tokenizer.json.

Those are written for another engine, Oniguruma; here they are translated, exactly, to Python's `re`.
"""

import re
import sys
import unicodedata
from functools import lru_cache
from itertools import chain, groupby

from engine.files import shown
from engine.tokenizer_json import BYTE_LEVEL, field, parts, refuse

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PATTERNS["qwen"] = PATTERNS["llama3"].replace("{1,3}", "")
DIGITS = {True: r"\p{N}|\P{N}+", False: r"\p{N}+|\P{N}+"}  # each digit by itself, or runs of them
COVERING = {*PATTERNS.values(), *DIGITS.values()}  # every character of a text is in some match
# Between a letter or digit and one of these all of COVERING cut, without looking any further on either side: a text can
# be cut there and split in parts. A part of BLOCK characters fits the processor's cache.
EDGE, SPACE_EDGE = re.compile(r"(?<=[^\W_])[ \n.,;:!?、。，]"), re.compile(r"(?<=[^\W_]) ")
BLOCK = 1 << 13
# Text is mostly ASCII, and seldom beyond the basic plane: a class cut down to the characters that can occur is up to
# four times as fast to match as the whole one, which has several hundred ranges.
LIMITS = 0x7F, 0xFFFF, sys.maxunicode


@lru_cache
def categories(limit):
    r"""[(general category, first character, last), ...] of the characters up to `limit`. Cw: Cc in \s."""
    labels = ("Cw" if char in "\t\n\v\f\r\x85" else unicodedata.category(char) for char in map(chr, range(limit + 1)))
    return [(m[1], m.start() // 2, m.end() // 2 - 1) for m in re.finditer(r"(..)\1*", "".join(labels))]


def char_class(name, negated, limit):
    r"""The inside of a [class]: the characters up to `limit` in L, Lu, ..., \d, or \s (without \x1c to \x1f)."""
    known = re.fullmatch("s|d|[LMNPSZC]|L[ultmo]|M[nce]|N[dlo]|P[cdseifo]|S[mcko]|Z[slp]|C[cfnos]", name)
    refuse(not known, f"{shown(name)} as a class of characters in a split pattern")
    prefix = {"s": ("Z", "Cw"), "d": "Nd", "Cc": ("Cc", "Cw")}.get(name, name)
    grouped = groupby(categories(limit), lambda run: run[0].startswith(prefix) != negated)
    ranges = [[*runs] for inside, runs in grouped if inside] or [[("", sys.maxunicode, sys.maxunicode)]]  # never empty
    return "".join(rf"\U{runs[0][1]:08x}-\U{runs[-1][2]:08x}" for runs in ranges)


def to_python(pattern, limit):
    r"""A split pattern for `re`, exact for texts with no character beyond `limit`: \p{...}, \s and \d become classes.
    ValueError for what `re` lacks, or reads otherwise than Oniguruma.
    """
    out, inside = [], False  # a [class]
    for m in re.finditer(r"\\[pP]\{\w+\}|\\.|&&|\(\?(?:<?[=!]|i?:)|\}\+|\(\?|.", pattern, re.S):
        part = m[0]
        if part[0] == "\\" and part[1] in "pPsSdD":
            chars = char_class(part[3:-1] or part[1].lower(), part[1].isupper(), limit)
            out.append(chars if inside else f"[{chars}]")
        else:
            odd = r"&&|\[" if inside else r"\(\?|\}\+|[$^]"
            refuse(re.fullmatch(rf"\\[^\W_nrtfv]|{odd}", part), f"{shown(part)} in a split pattern")
            out.append("(?:" if part == "(" and not inside else part)
            inside = part != "]" if inside else part == "["
    return "".join(out)


@lru_cache(maxsize=32)
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


def published(pattern):
    """The pre-tokenizer of a tokenizer.json that cuts by a pattern: a name in PATTERNS, or a regular expression."""
    if pattern == "gpt2":
        return BYTE_LEVEL
    split = {"type": "Split", "pattern": {"Regex": PATTERNS.get(pattern, pattern)}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]}


def pattern_of(part):
    """The split pattern of a published pre-tokenizer; None for a ByteLevel without one."""
    if part["type"] == "ByteLevel":
        return PATTERNS["gpt2"] if part.get("use_regex", True) else None
    if part["type"] == "Digits":
        return DIGITS[bool(part.get("individual_digits"))]
    refuse(part.get("behavior") != "Isolated", f"a Split with the behaviour {shown(part.get('behavior'))}")
    pattern = field(part, "pattern", dict)
    regex, string = (field(pattern, kind, str, optional=True) for kind in ("Regex", "String"))
    refuse((regex is None) == (string is None), "a Split without a pattern")
    return re.escape(string) if regex is None else regex


def pre_tokenizer(component):
    """Two functions, as the pre_tokenizer of a tokenizer.json says: from a text to an iterator over its words, and to
    one over blocks of about BLOCK characters, cut where that changes no word.
    """
    kinds = parts(component, "pretokenizers", "ByteLevel", "Digits", "Split")
    types = [part["type"] for part in kinds]
    refuse(types.count("ByteLevel") != 1 or types[-1] != "ByteLevel", "pre-tokenizers that do not end in ByteLevel")
    patterns, with_space = [*map(pattern_of, kinds)], kinds[-1].get("add_prefix_space", True)
    steps = [splitter(pattern) for pattern in patterns if pattern is not None]
    if with_space:
        steps.insert(len(kinds) - 1, lambda text: [text if text[0] == " " else " " + text])
    known = {*patterns} & {*PATTERNS.values()} and {*patterns} <= COVERING | {None}
    search = (SPACE_EDGE if with_space else EDGE).search if known else lambda text, start: None

    def blocks(text):
        start = 0
        while edge := search(text, start + BLOCK):
            yield text[start : edge.start()]
            start = edge.start()
        yield text[start:]

    def split(text):
        pieces = filter(None, blocks(text))
        for step in steps:
            pieces = chain.from_iterable(map(step, pieces))
        return pieces

    return split, blocks


def reblocked(chunks, blocks):
    """The blocks of a text that comes as an iterable of strings, of which a few blocks are held at once."""
    held, enough = "", 2 * BLOCK
    for chunk in chunks:
        held += chunk
        if len(held) >= enough:
            *ready, held = blocks(held)
            yield from ready
            enough = 2 * max(BLOCK, len(held))
    yield held
