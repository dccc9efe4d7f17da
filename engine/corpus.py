"""Proceso de entrenamiento: what a model learns from, texts to continue and conversations to take part in.

Without any file there is a corpus that every Python brings along: the reference of the language and the docstrings
of its library. They are also questions with answers, as a docstring's first sentence says what its function does:

    What does shutil.copyfile do?    Copy data from src to dst in the most efficient way possible.

Whatever is learned from comes in three parts: one to train on; one for validation, by which the step that is kept is
chosen (and any setting that you try); and one for the test, which chooses nothing and is read only when a run ends.
"""

import ast
import math
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine import spans, tokens
from engine.files import json_lines, read_text, refuse

TEST, VALIDATION = 1 << 21, 1 << 20  # bytes of files that are held out, at most


@lru_cache(maxsize=1)
def library():
    """The docstrings of Python's own library, parsed, never imported: {module: [("shutil.copyfile", docstring)]}."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # a template or a test of bad syntax
                continue
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[module] = [pair for pair in docstrings(tree, module) if pair[1]]
    return found


def docstrings(tree, name):
    """Yields (name, docstring or None) of a module and all that it defines, the outer before the inner."""
    definitions = ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [(tree, name)]
    for node, name in nodes:
        if isinstance(node, (ast.Module, *definitions)):
            yield name, ast.get_docstring(node)
        for child in ast.iter_child_nodes(node):
            nodes.append((child, f"{name}.{child.name}" if isinstance(child, definitions) else name))


def python_documentation():
    """{name: text} of the topics of Python's language reference and of the docstrings of each module."""
    from pydoc_data.topics import topics

    documents = {f"topic {name}": topics[name] for name in sorted(topics)}
    documents |= {module: "\n\n".join(text for _, text in found) for module, found in library().items()}
    return {name: text for name, text in documents.items() if text}


def split(documents):
    """The names of documents to train on, to validate on (a twentieth) and to test on (a tenth), always the same."""
    names = list(documents)
    np.random.default_rng(0).shuffle(names)
    test, validation = len(names) // 10, len(names) // 20
    return names[test + validation :], names[test : test + validation], names[:test]


def unread(texts, known):
    """The texts without the paragraphs that also stand in the known texts: pages of the language reference share whole
    sections, and modules copy docstrings from each other.
    """
    seen = {paragraph.strip() for text in known for paragraph in text.split("\n\n")}
    kept = ("\n\n".join(p for p in text.split("\n\n") if p.strip() not in seen) for text in texts)
    return [text for text in kept if text]


def texts(paths):
    """Texts to train on, to validate on and to test on: three lists of spans.

    Files: the last tenth of each is for the test, and a twentieth of the other nine for validation, taken from the
    middle of those nine tenths, not from their end, so that the model is trained on what comes right before the test:
    in a book, on the people of its last chapters. Of much text less is held out: of all files together, at most TEST
    and VALIDATION bytes. No file: Python's documents, of which what is held out has no paragraph of what is trained on.
    """
    if not paths:
        documents = python_documentation()
        training, validation, test = ([documents[name] for name in names] for names in split(documents))
        parts = training, unread(validation, training), unread(test, training + validation)
        return [[spans.held(text) for text in part] for part in parts]
    training, validation, test = [], [], []
    files = [spans.whole(path) for path in paths]
    total = sum(text.size for text in files)
    for text in files:
        end = max(text.size * 9 // 10, text.size - TEST * text.size // total)
        held_out = min(end // 20, VALIDATION * text.size // total)
        start, stop, end = (spans.character(text, place) for place in (end // 2, end // 2 + held_out, end))
        training += [text.between(0, start), text.between(stop, end)]
        validation.append(text.between(start, stop))
        test.append(text.between(end, text.size))
    return training, validation, test


def as_tokens(run, parts, tokenizer, ends):
    """The three parts of `texts` as token ids, an array each, and how many tokens a byte each of them has.

    A text begins with the token that its tokenizer begins texts with, or with the first in `ends`: ids that end or
    begin a text, some of which may be None. They are mapped from a file in the run's folder. Of a long text no more is
    tokenized than the run can use: what all its batches hold or, where it has so many minutes, as much as a sixth of
    them allows. ValueError where there is no such token, and for parts shorter than the context.
    """
    begin, s = tokenizer.bos or [int(token) for token in ends if token is not None][:1], run.settings
    refuse(not begin, "neither the tokenizer nor config.json has a token that begins or ends a text")
    enough = math.inf if s.steps is None else s.steps * s.batch * (s.context + 1)
    seconds = math.inf if s.minutes is None else 60 * s.minutes / 6
    limits = {"least": s.context + 2, "enough": enough, "seconds": seconds}
    ids, sizes = tokens.mapped(run.make_folder(), parts, tokenizer, begin, run.fingerprint, **limits)
    total = sum(text.size for text in parts[0])
    print(f"data       {total:,} bytes to train on, {sizes[1]:,} for validation, {sizes[2]:,} for the test")
    print(f"tokenizer  {tokenizer.vocab_size:,} tokens, {sizes[0] / len(ids[0]):.2f} bytes each")
    if sizes[0] < total:
        limit = "the steps use" if s.steps else "a sixth of the time allows"
        print(f"tokens     {len(ids[0]):,} to train on, of {sizes[0]:,} of these bytes, as many as {limit}")
    return ids, [(len(some) - 1) / max(1, size) for some, size in zip(ids, sizes)]


def rows(ids, context, fill):
    """An array of ids, cut into rows of the context, the last filled up: (rows, context)."""
    return np.pad(ids, (0, -len(ids) % context), constant_values=fill).reshape(-1, context)


def evenly(arrays, most=None):
    """So many rows of arrays of one length, evenly spaced; None = all. An array that is None stays None."""
    count = len(arrays[0])
    rows = np.linspace(0, count - 1, min(most or count, count)).astype(int)
    return [None if array is None else array[rows] for array in arrays]


def epochs(count, size, step, seed):
    """The rows of batch number `step`, (size,): each of `count` comes once before any comes again, in a new order."""
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in {*epochs}}
    return [order[epoch][place] for epoch, place in zip(epochs, places)]


# -------------------------------------------------------------------------------------- conversations


def questions():
    """Questions and answers made of Python's docstrings: {module: [(name, answer, docstring)]}.

    name: as `shutil.copyfile`, of whatever has no underscore inside its module. answer: the docstring's first sentence.
    """
    asked = {module: [] for module in library()}
    for module, found in library().items():
        for name, docstring in found:
            sentence = re.match(r"[A-Z].*?[.!](?=\s|$)", " ".join(docstring.split("\n\n")[0].split()))
            public = name != module and not re.search(r"\._", name[len(module) :])
            if public and sentence and 12 <= len(sentence[0]) <= 120:
                asked[module].append((name, sentence[0], docstring))
    return asked


def split_questions():
    """Questions to train on, to validate on and to test on, [(name, answer, docstring)] each: those of the same modules
    as the texts, without the few whose docstring stands in an earlier part too.
    """
    asked, parts, known = questions(), [], set()
    for names in split(python_documentation()):
        parts.append([question for name in names for question in asked.get(name, []) if question[2] not in known])
        known |= {docstring for _, _, docstring in parts[-1]}
    return parts


def as_conversation(name, answer):
    return [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": answer}]


def read_conversations(path):
    """A JSONL file of conversations, {"messages": [{"role": ..., "content": ...}, ...]} a line, as chat models are
    commonly tuned on: a list of lists of messages. ValueError with the line that is not one.
    """
    conversations = []
    for where, row in json_lines(read_text(path), path):
        try:
            messages = row["messages"]
            roles, contents = zip(*((message["role"], message["content"]) for message in messages))
            good = all(isinstance(x, str) for x in roles + contents) and {*roles} <= {"system", "user", "assistant"}
        except (ValueError, TypeError, KeyError):
            good = False
        bad = not good or "assistant" not in roles
        refuse(bad, f"{where}: not a conversation with an answer of the assistant")
        conversations.append(messages)
    refuse(not conversations, f"{path} holds no conversation")
    return conversations


def conversations(paths):
    """Conversations to train on, to validate on and to test on: three lists. Files: every tenth conversation is for
    the test, and every tenth for validation; ValueError for fewer than three. No file: questions about Python.
    """
    if not paths:
        return [[as_conversation(name, answer) for name, answer, _ in part] for part in split_questions()]
    read = [conversation for path in paths for conversation in read_conversations(path)]
    refuse(len(read) < 3, "to train, to validate and to test takes three conversations at least")
    every = min(10, len(read))
    training = [conversation for i, conversation in enumerate(read) if i % every < every - 2]
    return training, read[every - 2 :: every], read[every - 1 :: every]
