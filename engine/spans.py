"""Texts that need not fit in memory: a stretch of a file is known by its ends, and read when it is asked for."""

import os
from typing import NamedTuple

from engine.backend import np
from engine.files import decode, read_text, refuse
from engine.pretokenize import EDGE, SPACE_EDGE

PIECE, NEAR, FAR = 1 << 20, 1 << 12, 1 << 20  # bytes of a piece; how far behind them it is looked for a place to cut
BLOCKS, BLOCK = 256, 1 << 16  # by which a text is recognised


class Span(NamedTuple):
    """A stretch of a text in UTF-8. source: the path of a file, or bytes; start, stop: places in it, in bytes."""

    source: str | bytes
    start: int
    stop: int

    @property
    def size(self):
        return self.stop - self.start

    def between(self, start, stop):
        """The same from one place of the source to another, but no further than to its own end."""
        return self._replace(start=start, stop=min(stop, self.stop))

    def data(self):
        if isinstance(self.source, bytes):
            return self.source[self.start : self.stop]
        try:
            with open(self.source, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.source} cannot be read: {error.strerror}") from None
        refuse(len(data) < self.size, f"{self.source} has become shorter while it was read")
        return data

    def text(self):
        """What is written there; ValueError with the file, the byte and the line where it is not UTF-8."""
        return decode(self.data(), self.source, self.start)


def held(text):
    """A span of a string."""
    data = text.encode()
    return Span(data, 0, len(data))


def whole(path):
    """The span of a file, which is held in memory only where it cannot be read from any place: .gz, or a pipe."""
    if os.fspath(path).endswith(".gz") or not os.path.isfile(path):
        return held(read_text(path))
    refuse(not (size := os.path.getsize(path)), f"{path} is empty")
    return Span(path, 0, size)


def character(span, place):
    """The first place of a span, from `place` on, where a character begins."""
    near = span.between(place, place + 3).data()
    return place + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), len(near))


def edge(span, place):
    """The next place, from `place` on, where a text can be cut without changing its words, however one of PATTERNS
    splits it, or where it ends. In what has no such place for long it is the next line, or the next character.
    """
    for reach in NEAR, FAR:
        near = span.between(place, place + reach).data().decode("utf-8", "surrogateescape")
        if found := SPACE_EDGE.search(near) or EDGE.search(near):
            return place + len(near[: found.start()].encode("utf-8", "surrogateescape"))
    if place + reach >= span.stop:
        return span.stop
    before, newline, _ = near.partition("\n")
    return place + len(before.encode("utf-8", "surrogateescape")) + 1 if newline else character(span, place)


def pieces(span):
    """A span in spans of about PIECE bytes, of which each but the first continues the one before."""
    found, start = [], span.start
    while start + PIECE < span.stop:
        place = edge(span, start + PIECE)
        found.append(span.between(start, place))
        start = place
    return [*found, span.between(start, span.stop)]


def sample(spans, most):
    """Evenly spaced pieces of spans, about `most` bytes, or all where they have no more."""
    found = [piece for span in spans for piece in pieces(span)]
    share = min(1.0, most / max(1, sum(span.size for span in spans)))
    return [found[i] for i in np.linspace(0, len(found) - 1, max(1, int(share * len(found)))).astype(int)]


def traits(spans):
    """Yields bytes by which texts are recognised: all, with a NUL between two; of more than BLOCKS · BLOCK bytes the
    sizes, and so many evenly spaced blocks.
    """
    step = max(BLOCK, -(-sum(span.size for span in spans) // BLOCKS))
    for i, span in enumerate(spans):
        yield b"\0" if i else b""
        yield b"%d\0" % span.size if step > BLOCK else b""
        for place in range(span.start, span.stop, step):
            yield span.between(place, place + BLOCK).data()
