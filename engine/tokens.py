"""The tokens of texts, made once, by several processes, in a file from which they are mapped: tokens.bin in the folder
of a run. It begins with HEADER bytes of JSON, which say what it holds.
"""

import json
import math
import os
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from time import perf_counter

from tqdm import tqdm

from engine import files
from engine.backend import np
from engine.files import refuse
from engine.processes import process_map
from engine.spans import pieces
from engine.threads import cores

NAME, HEADER = "tokens.bin", 1 << 12
ALWAYS = 1 << 24  # bytes of a training text of which all is tokenized, in its order, whatever the limits
SEVERAL = 1 << 22  # bytes that are worth starting processes


class Mapped:
    """Numbers in a file, which is mapped whenever some are asked for, with the index of an array of one dimension. A
    map that stayed would count each page that was ever looked at as memory of the program.
    """

    def __init__(self, path, kind, first, count):
        self.path, self.kind, self.offset, self.count = path, kind, HEADER + first * kind.itemsize, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.array(np.memmap(self.path, self.kind, "r", self.offset, self.count)[index])


def mapped(folder, parts, tokenizer, begin, data, least, enough, seconds):
    """The tokens of the three parts of a text, a Mapped each, and how many bytes of each were tokenized.

    folder: is there, and is removed where it is empty and nothing can be made. parts: lists of spans to train on, to
    validate on and to test on; each span begins with the ids `begin`. data: the fingerprint of the parts. Of a training
    part longer than ALWAYS, pieces are tokenized in a drawn order, always the same, until there are `enough` tokens or
    the seconds are over. The tokens are found again in the folder if they were made of the same data by the same
    tokenizer, with no lower limits. ValueError for parts of fewer than `least`.
    """
    path, kind = os.path.join(folder, NAME), np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    of = sha256(json.dumps([data, begin, tokenizer.config]).encode()).hexdigest()
    notes, limits = _notes(path, kind), {"enough": enough, "seconds": seconds}
    if notes.get("of") != of or any(notes[name] < limit for name, limit in limits.items()):
        encode = partial(_encode, tokenizer, begin, kind)
        try:
            files.replace(path, lambda new: _write(new, of, parts, encode, least, **limits))
        finally:
            with suppress(OSError):
                os.rmdir(folder)  # where nothing came of it
        notes = _notes(path, kind)
    _check(notes["tokens"], least)
    training, validation, test = notes["tokens"]
    places = (validation + test, training), (0, validation), (validation, test)
    return [Mapped(path, kind, first, count) for first, count in places], notes["bytes"]


def _notes(path, kind):
    """What the beginning of a file of tokens says of it; {} where there is none, or only a part of one."""
    try:
        with open(path, "rb") as file:
            notes = json.loads(file.read(HEADER))
        return notes if os.path.getsize(path) == HEADER + kind.itemsize * sum(notes["tokens"]) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(path, of, parts, encode, least, enough, seconds):
    """Writes a file of tokens: the validation part, the test part and, last, as much as there is to train on."""
    training, *held_out = [[(piece, not i) for span in part for i, piece in enumerate(pieces(span))] for part in parts]
    sizes = [sum(span.size for span in part) for part in parts]
    if sizes[0] <= ALWAYS:
        enough = seconds = math.inf
    else:
        np.random.default_rng(0).shuffle(training)
    jobs = [(1, *job) for job in held_out[0]] + [(2, *job) for job in held_out[1]] + [(0, *job) for job in training]
    processes = min(cores(), len(jobs)) if sum(sizes) > SEVERAL else 1
    began, tokens, done = perf_counter(), [0, 0, 0], [0, 0, 0]
    form = "tokenize {percentage:3.0f}%|{bar}| {elapsed}"
    results = process_map(encode, jobs, processes)
    with open(path, "wb") as file, closing(results), tqdm(total=1.0, bar_format=form, disable=None, leave=False) as bar:
        file.write(bytes(HEADER))
        for (part, piece, _), ids in zip(jobs, results):
            file.write(ids)
            tokens[part] += len(ids)
            done[part] += piece.size
            passed = max(tokens[0] / enough, (perf_counter() - began) / max(seconds, 1e-9))
            bar.update(min(1.0, max(passed, sum(done) / max(sum(sizes), 1))) - bar.n)
            if passed >= 1 and tokens[0] >= least:
                break
        else:
            enough = seconds = math.inf
        _check(tokens, least)
        file.seek(0)
        notes = {"of": of, "tokens": tokens, "bytes": done, "enough": enough, "seconds": seconds}
        file.write(json.dumps(notes).encode().ljust(HEADER))


def _encode(tokenizer, begin, kind, job):
    _, piece, is_first = job
    return np.array([*(begin if is_first else ()), *tokenizer.encode(piece.text())], kind)


def _check(tokens, least):
    for purpose, count in zip(("train", "validate", "test"), tokens):
        refuse(count < least, f"{count} tokens to {purpose} on are too few for a --context of {least - 2}")
