"""A command line made from a dataclass, which ends in one sentence: what the user can mend is no traceback."""

import argparse
import math
import operator
import os
import sys
from dataclasses import field, fields
from typing import get_args


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence too, without the list of all options."""

    def error(self, message):
        raise ValueError(message)


def option(default, text, **more):
    """A field of a dataclass that is an option of its command line, --name.

    text: what --help says of it. more: its range (least, above, most: see RANGE); convert, a function of a value from
    the command line; positional, if it stands there without its name; and what add_argument of argparse takes: choices,
    metavar, nargs, const.
    """
    return field(default=default, metadata={"text": text} | more)


FILES = {"nargs": "+", "metavar": "FILE", "convert": lambda paths: [os.path.abspath(path) for path in paths]}
RANGE = {"least": (operator.ge, "at least"), "above": (operator.gt, "more than"), "most": (operator.le, "at most")}


def given(argv, description, *classes):
    """The options on a command line, {name: value}; they are the fields of dataclasses, int, float, str, bool, or list
    of texts. argv: a list of words; None is the program's own. ValueError, with one sentence, for what is no option.
    """
    parser = Parser(description=description)
    options = {one.name: one for kind in classes for one in fields(kind)}
    for name, one in options.items():
        kind, rule = _kind(one), one.metadata
        how = {"type": str if kind is list else kind, "metavar": "N" if kind in (int, float) else None}
        how |= {key: rule[key] for key in ("choices", "metavar", "nargs", "const") if key in rule}
        if kind is bool:
            how = {"action": "store_true", "default": None}
        shown = "" if one.default in (None, False) else f" (default {one.default})"
        parser.add_argument(name if rule.get("positional") else _dashed(name), help=rule["text"] + shown, **how)
    found = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return {name: options[name].metadata.get("convert", lambda value: value)(found[name]) for name in found}


def settings(kind, argv, description):
    """The dataclass `kind`, filled from a command line and checked."""
    values = kind(**given(argv, description, kind))
    check(values)
    return values


def check(values):
    """Raises ValueError, with one sentence, where a field of a dataclass has a value that its option cannot have."""
    for one in fields(values):
        value, kind, rule = getattr(values, one.name), _kind(one), one.metadata
        if value is None and one.default is None:
            continue
        known = type(value) in ((int, float) if kind is float else (kind,)) and value in rule.get("choices", [value])
        if not known or kind is list and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{_dashed(one.name)} cannot be {value!r:.60}")
        for bound, (holds, words) in RANGE.items():
            if bound in rule and not holds(value, rule[bound]):
                raise ValueError(f"{_dashed(one.name)} must be {words} {rule[bound]}")
        if kind is float and not abs(value) < math.inf:
            raise ValueError(f"{_dashed(one.name)} must be finite")


def _kind(one):
    """The type of a field; of `int | None`, int."""
    return (get_args(one.type) or (one.type,))[0]


def _dashed(name):
    return f"--{name.replace('_', '-')}"


def run(main):
    """Runs a command line. What the user can mend is one sentence on standard error, and exit status 1. Ctrl-C ends it
    quietly, with status 130, and so does a reader of its output that has gone, with 141, as in `| head -1`.
    """
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")  # a terminal that lacks ⁹, or sends what is no UTF-8, stops nobody
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, because nobody hears of an error when the interpreter ends
    except KeyboardInterrupt:
        os._exit(130)  # at once: sys.exit would wait for the threads, of which each may have minutes to go
    except BrokenPipeError:
        os._exit(141)  # sys.exit would try to write what is left
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def run_demo(demo):
    """Runs a function as a command line that takes no arguments."""

    def main():
        Parser(description=demo.__doc__).parse_args()
        demo()

    run(main)
