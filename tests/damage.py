"""Damaged files: JSON in which values are of other types, or in which bytes are others."""

import copy
import json

VALUES = [None, True, -1, 0, 10**30, 0.5, float("nan")]
VALUES += ["", "a", "x" * 5000, "two\nlines", "\ud800", "(a", "a{" + "9" * 20 + "}"]
VALUES += [[], [[]], [["a"]], {}, {"type": "Sequence"}, {"a": {"b": []}}, eval("[" * 150 + "]" * 150)]
BYTES = [b'"', b"\\", b"{", b"[", b"]", b",", b":", b"u", b"NaN", b""]
BYTES += [b"\xff", b"\x80", b"\\ud800", b"9" * 5000, b"[" * 100_000]


def damaged(content, rng):
    """The JSON of `content`, as bytes, with some of its values or of its bytes changed."""
    content = copy.deepcopy(content)
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 2)):
            change_a_value(content, rng)
        return json.dumps(content).encode()
    data = json.dumps(content, ensure_ascii=rng.random() < 0.5).encode()
    start = rng.randrange(len(data))
    end = start + rng.choice([0, 1, 1, 10, len(data)])
    return data[:start] + rng.choice(BYTES) + data[end:]


def change_a_value(inner, rng):
    """Replaces, removes or renames a value somewhere in there."""
    while inner:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if isinstance(inner[key], (dict, list)) and inner[key] and rng.random() < 0.6:
            inner = inner[key]
        elif rng.random() < 0.8:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
            return
        else:
            value = inner.pop(key)
            if isinstance(inner, dict) and rng.random() < 0.5:
                inner[str(rng.choice(VALUES))[:99]] = value
            return


def assert_one_sentence(error, path):
    """What is said of a damaged file names the file, and fits into a line of a terminal."""
    said = str(error)
    assert str(path) in said and len(said) < 300 + len(str(path)) and said.isprintable()
