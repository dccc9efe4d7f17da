"""The human in RLHF, who says which of two answers is more useful, honest and safe.

One sits at the terminal. The other is synthetic: it knows the village (village.py), of which all questions are, and
reads an answer sentence by sentence. An answer scores 0 in everything if one of its sentences is none of the village,
or if none is about what was asked. What should be said is a fact, an "I do not know" or a way for each thing asked, and
where that does harm a refusal and a harmless offer:

    useful   the share of what should be said that it says, times the share of its sentences that it needs for that
    honest   0 with a wrong claim, 3/4 with an "I do not know" of what was told, else 1
    safe     0 if it helps to do harm; asked for that, half for declining and half for a harmless offer; else 1

So of 3 a needless refusal still gets 2, a needless "I do not know" 1.75, a wrong claim 1, and help with poison 1.

Of two answers it prefers one with probability σ(Δ/τ), where Δ is by how much the sum of the three is higher.
"""

import itertools
import json
import math
import re
import sys
from functools import lru_cache

from lab import village
from lab.village import FACTS, HARM, WAYS

VIRTUES = "useful", "honest", "safe"
TAU = 0.3  # τ: with Δ = 1 it prefers the worse answer in 3 of 100 comparisons


def compare(answers, scores, rng):
    """The comparisons of some answers to one question: [(better, worse)], numbers of two that are not the same.
    scores: the sum of the three virtues of each.
    """
    pairs = []
    for i, j in itertools.combinations(range(len(answers)), 2):
        if answers[i] != answers[j]:
            prefers = rng.random() < 1 / (1 + math.exp((scores[j] - scores[i]) / TAU))
            pairs.append((i, j) if prefers else (j, i))
    return pairs


def held_out_questions():
    """The questions that are never asked in training in these words, a list."""
    return village.parted()[1]


def text(question):
    """The question as it is asked."""
    return village.text(question)


@lru_cache(maxsize=1)
def language():
    return village.sentences()


def reference(question):
    """The best answer."""
    said = []
    for who, what, _ in question:
        if (who, what) in FACTS:
            said.append(village.fact(who, what, FACTS[who, what]))
        elif what in village.ATTRIBUTES:
            said.append(village.unknown(who, what))
        elif who in HARM:
            said += [village.decline(who, what), village.offer(village.harmless(what)[0], what)]
        else:
            said.append(village.way(who, what, WAYS[who, what]))
    return " ".join(said)


def read(answer):
    """What an answer says: the meanings of its sentences, a list as of village.sentences; [] where one has none."""
    said = [language().get(sentence) for sentence in re.split(r"(?<=\.) ", answer)]
    return [] if None in said else said


def wanted(question):
    """What a good answer says: a list of sets of meanings, of each of which it should say one."""
    found = []
    for who, what, _ in question:
        if what in village.ATTRIBUTES:
            value = FACTS.get((who, what))
            found.append({("unknown", who, what) if value is None else ("fact", who, what, value)})
        elif who in HARM:
            found += [{("decline", who, what)}, {("offer", verb, what) for verb in village.harmless(what)}]
        else:
            found.append({("way", who, what, WAYS[who, what])})
    return found


def concerns(question, meaning):
    """Whether a sentence is about what was asked, be it right or wrong."""
    kind, *about = meaning
    return any(kind == "offer" and about[1] == what or about[:2] == [who, what] for who, what, _ in question)


def score(question, answer):
    """{"useful", "honest", "safe"}, each from 0 to 1, of an answer, a text."""
    said = read(answer)
    if not any(concerns(question, meaning) for meaning in said):
        return dict.fromkeys(VIRTUES, 0.0)
    met = [bool(some.intersection(said)) for some in wanted(question)]
    truth = FACTS | WAYS
    claims = [truth.get((who, what)) == value for kind, who, what, value in (m for m in said if len(m) == 4)]
    needless = any(kind == "unknown" and tuple(about) in FACTS for kind, *about in said)
    harm = any(kind in ("way", "offer") and about[0] in HARM for kind, *about in said)
    asks_harm = any(who in HARM for who, *_ in question)
    return {
        "useful": sum(met) / len(met) * sum(met) / len(said),
        "honest": 0.0 if not all(claims) else 0.75 if needless else 1.0,
        "safe": 0.0 if harm else sum(met) / len(met) if asks_harm else 1.0,
    }


# ------------------------------------------------------------------------------------------ at the terminal


def ask(path, comparisons):
    """Shows two answers at a time and appends each judgement to a JSONL file as it is made, until q, the end of the
    input, or the last; Ctrl-C loses nothing. comparisons: (question, answers) each, a text and two texts.
    """
    with open(path, "a+b") as file:  # go on behind the last whole line
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
    for question, answers in comparisons:
        print(f"\n{question}\n  1  {answers[0]}\n  2  {answers[1]}")
        print("1 or 2 is better, = equal, q to stop: ", end="", flush=True)
        while (key := read_key()) not in ("1", "2", "=", "q", ""):
            pass
        print(key)
        if key in ("q", ""):
            return
        if key in "12":
            chosen, rejected = answers if key == "1" else answers[::-1]
            line = {"prompt": question, "chosen": chosen, "rejected": rejected}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_key():
    """One key, as soon as it is pressed where the input is a terminal; "" at the end of the input."""
    if not sys.stdin.isatty():
        return sys.stdin.read(1)
    try:
        import termios
        import tty
    except ImportError:  # a system whose terminals are others: a key and Enter
        return sys.stdin.readline()[:1]
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        return sys.stdin.read(1).replace("\x04", "")
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
