"""What the lecture claims, measured: a file for a part of it, and in it a short function for each claim.

A claim is named after what it claims, and its docstring is the sentence. It takes a seed and returns a Finding. The
title of its picture says what it shows.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from lab.results import spread

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIGURES = os.path.join(ROOT, "figures")


@dataclass(frozen=True)
class Finding:
    """What was found: a number, and the range in which the claim holds, which has some margin for other seeds."""

    number: float | None  # None: a long experiment of which no result is stored here
    says: str  # the number in a few words
    least: float = -math.inf
    most: float = math.inf
    picture: Callable | str | None = None  # path -> None, writes it; or the name of a picture that is made elsewhere
    lines: list | tuple = ()  # further numbers, a line each

    @property
    def holds(self):
        """True, False, or None where nothing was measured."""
        return None if self.number is None else bool(self.least <= self.number <= self.most)


def sentence(claim):
    """What a claim says: the first paragraph of its docstring."""
    return " ".join(claim.__doc__.split("\n\n")[0].split())


def title(claim):
    """Its name, to be read."""
    return claim.__name__.replace("_", " ")


def picture_of(claim, finding):
    """Where its picture is, or None."""
    if finding.picture is None:
        return None
    return os.path.join(FIGURES, finding.picture if isinstance(finding.picture, str) else f"{claim.__name__}.png")


def tiny(error):
    """A difference that may be none at all."""
    return f"{error:.0e}" if error else "0"


def shares(values):
    """Shares of several seeds, in per cent: their mean and range."""
    return spread(values, "{:.0%}")


def draw_tokens(axes, y, tokens, colours):
    """A row of boxes at height y, one a token, each in its colour. Returns where the last one ends, in characters."""
    at = 0
    for token, colour in zip(tokens, colours):
        shown = token.strip() or {"\n": "↵"}.get(token, "␣")
        width = len(shown) + 0.8
        axes.barh(y, width, left=at, color=colour, alpha=0.3, edgecolor="white", linewidth=2)
        axes.text(at + width / 2, y, shown, ha="center", va="center", family="monospace", fontsize=9)
        at += width
    return at
