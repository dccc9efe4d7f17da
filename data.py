"""Proceso de entrenamiento: what a model learns from, texts to continue and conversations to take part in.

Without any file there is a corpus that every Python brings along: the reference of the language and the docstrings
of its library. They are also questions with answers, as a docstring's first sentence says what its function does:

    What does shutil.copyfile do?    Copy data from src to dst in the most efficient way possible.

A tenth of the modules is held out of both, so that a model is tested on what it has never read.
"""

import ast
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.files import json_lines, read_text


@lru_cache(maxsize=1)
def library():
    """The docstrings of Python's own library, {module: [(name, docstring)]}, a name as `shutil.copyfile`. Sources are
    parsed, never imported.
    """
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
    """The text every Python has: {name: text} of the topics of its language reference and of the docstrings of each
    module of its library.
    """
    from pydoc_data.topics import topics

    documents = {f"topic {name}": topics[name] for name in sorted(topics)}
    documents |= {module: "\n\n".join(text for _, text in found) for module, found in library().items()}
    return {name: text for name, text in documents.items() if text}


def split(documents):
    """Names to train on and names held out, a tenth, always the same: two lists."""
    names = list(documents)
    np.random.default_rng(0).shuffle(names)
    return names[len(names) // 10 :], names[: len(names) // 10]


def texts(paths):
    """Texts to train on and texts to validate on: two lists of strings.

    Files: the first 90 % of each and the rest. No file: every tenth of Python's documents is held out.
    """
    if paths:
        read = [read_text(path) for path in paths]
        return [text[: len(text) * 9 // 10] for text in read], [text[len(text) * 9 // 10 :] for text in read]
    documents = python_documentation()
    return tuple([documents[name] for name in names] for names in split(documents))


# -------------------------------------------------------------------------------------- conversations


def questions():
    """Questions and answers made of Python's docstrings: {module: [(name, answer, docstring)]}.

    name: as `shutil.copyfile`, of a public function or class. answer: the docstring's first sentence.
    """

    def asked(module, found):
        for name, docstring in found:
            sentence = re.match(r"[A-Z].*?[.!](?=\s|$)", " ".join(docstring.split("\n\n")[0].split()))
            public = name != module and not re.search(r"\._", name[len(module) :])
            if public and sentence and 12 <= len(sentence[0]) <= 120:
                yield name, sentence[0], docstring

    return {module: list(asked(module, found)) for module, found in library().items()}


def split_questions():
    """Questions to train on and questions held out, [(name, answer, docstring)] each: those of the modules whose text
    is, without the few whose docstring stands in both.
    """
    asked = questions()
    training, held_out = ([q for m in side for q in asked.get(m, [])] for side in split(python_documentation()))
    known = {docstring for _, _, docstring in training}
    return training, [question for question in held_out if question[2] not in known]


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
        if not good or "assistant" not in roles:
            raise ValueError(f"{where}: not a conversation with an answer of the assistant")
        conversations.append(messages)
    if not conversations:
        raise ValueError(f"{path} holds no conversation")
    return conversations


def conversations(paths):
    """Conversations to train on and to validate on: two lists. Files: every tenth conversation is held out. No file:
    questions about Python's library, those of every tenth module held out.
    """
    if paths:
        read = [conversation for path in paths for conversation in read_conversations(path)]
        every = min(10, len(read))
        if every < 2:
            raise ValueError("one conversation cannot be both learned and held out: there must be two at least")
        return [x for i, x in enumerate(read, 1) if i % every], read[every - 1 :: every]
    return tuple([as_conversation(name, answer) for name, answer, _ in side] for side in split_questions())
