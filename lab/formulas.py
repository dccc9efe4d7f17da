"""Formulas in one line of text, such as "g_i = s_i / Σ_{j ∈ T} s_j", as MathML, which browsers draw by themselves.

Names, numbers and signs are as they are; _ and ^ put what follows below and above, / makes a fraction of what stands on
either side of it, √ a root, and { } hold together what belongs together. Σ and ∏ carry theirs under them.
"""

import re
from html import escape

TOKEN = re.compile(r"\s+|[^\W\d_]+'?|\d+(?:\.\d+)?|[_^/√{}()\[\]⟨⟩]|.")
CLOSING = {"(": ")", "[": "]", "⟨": "⟩", "{": "}"}


def mathml(text):
    """The formula as a math element."""
    tokens = [token for token in TOKEN.findall(text) if token.strip()]
    return f'<math displaystyle="true">{row(tokens, None)}</math>'


def row(tokens, end):
    """What stands up to the closing bracket `end`, which is taken too: its parts in a row."""
    parts = []
    while tokens and tokens[0] != end:
        parts.append(product(tokens, end))
    if tokens and end:
        tokens.pop(0)
    return f"<mrow>{''.join(parts)}</mrow>"


def product(tokens, end):
    """One part, or the fraction that it begins: its numerator is what stands right before /, its denominator behind."""
    part = scripted(tokens)
    if tokens and tokens[0] == "/":
        tokens.pop(0)
        return f"<mfrac>{part}{scripted(tokens)}</mfrac>"
    return part


def scripted(tokens):
    """One part with what _ and ^ put below and above it; a function with its argument is one part."""
    first = tokens[0]
    below, above = ("munder", "mover") if first in "Σ∏" else ("msub", "msup")
    part = atom(tokens)
    while tokens and tokens[0] in "_^":
        kind = below if tokens.pop(0) == "_" else above
        part = f"<{kind}>{part}{atom(tokens)}</{kind}>"
    if tokens and tokens[0] == "(" and first[0].isalpha():
        part = f"<mrow>{part}{atom(tokens)}</mrow>"
    return part


def atom(tokens):
    """A name, a number, a sign, a root, or what brackets hold."""
    token = tokens.pop(0)
    if token == "√":
        return f"<msqrt>{atom(tokens)}</msqrt>"
    if token in CLOSING:
        inside = row(tokens, CLOSING[token])
        if token == "{":
            return inside
        grows = "true" if "<mfrac>" in inside else "false"
        left, right = (f'<mo stretchy="{grows}">{bracket}</mo>' for bracket in (token, CLOSING[token]))
        return f"<mrow>{left}{inside}{right}</mrow>"
    if token[0].isdigit():
        return f"<mn>{token}</mn>"
    if token[0].isalpha() and token not in "Σ∏":
        return f"<mi>{token}</mi>"
    return f'<mo stretchy="false">{escape(token)}</mo>'
