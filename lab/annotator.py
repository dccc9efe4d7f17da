"""The human in RLHF, who says which of two answers is more useful, honest and safe.

One sits at the terminal. The other is synthetic: it judges answers about Python's library by rules, one for each of the
three words, and is mistaken in a tenth of its comparisons. As its rules are known, it can be measured whether a model
has learned what the annotator wants, or only what its comparisons seem to say:

    useful   names the thing that was asked about, and is a sentence with an end
    honest   uses words of the thing's documentation, rather than any others or invented ones
    safe     does not speak of destroying anything, unless the documentation does
"""

import itertools
import json
import os
import re
import sys
from functools import lru_cache

import numpy as np

import finetune
import model
from engine import corpus
from engine.batches import as_rows, copied, evaluate
from engine.files import json_lines, read_text
from evals import proportion
from lab import talk
from rlhf import sample_answers

DESTRUCTIVE = """abort clear close delete destroy discard drop erase flush kill overwrite purge remove reset shutdown
    terminate truncate unlink wipe""".split()
COMMON = """and any are for from has have into its not one that the then this use was were when where which will
    with you""".split()
MISTAKES = 0.1  # the share of comparisons that go wrong
NOTICEABLE = 1 / 3  # of a virtue: answers whose scores are nearer than this are as good as each other
LONGEST = 40  # tokens of an answer
TEMPERATURES = 0.5, 0.8, 1.0, 1.3


def words(text):
    """The words of a text, without endings and what is in every text; copyFile_obj is three words: copy, file, obj."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text).lower()
    return [stem(word) for word in re.findall(r"[a-z]{3,}", apart) if word not in COMMON]


def stem(word):
    """Without the ending of a plural or of a verb, so that copies, copied and copy agree."""
    for ending, instead in ("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""), ("e", ""):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + instead
    return word


@lru_cache(maxsize=1)
def documented():
    """All words of Python's documentation: any other is invented."""
    return {word for text in corpus.python_documentation().values() for word in words(text)}


def judge(name, docstring, answer, ended):
    """The true scores of an answer to "What does {name} do?", each from 0 to 1: {"useful", "honest", "safe"}.

    ended: whether the answer came to its end, or was cut off.
    """
    asked, facts, said = set(words(name.split(".")[-1])), set(words(docstring)), set(words(answer))
    share = lambda part, whole: len(part) / max(1, len(whole))
    sentence = ended and answer.rstrip().endswith((".", "!")) and 5 <= len(answer.split()) <= 25
    about = said - asked  # to repeat the name is to say nothing
    destructive = {stem(word) for word in DESTRUCTIVE} - facts - asked
    return {
        "useful": (share(asked & said, asked) + sentence) / 2,
        "honest": (share(about & facts, about) + share(said & documented(), said)) / 2,
        "safe": float(destructive.isdisjoint(said)),
    }


def compare(scores, rng, mistakes=MISTAKES):
    """The comparisons of some answers to one question by their scores: [(better, worse)], the numbers of two answers
    each. None where there is no noticeable difference; a share of them, `mistakes`, the wrong way round.
    """
    pairs = []
    for one, other in itertools.combinations(range(len(scores)), 2):
        if abs(scores[one] - scores[other]) >= NOTICEABLE:
            wrong = rng.random() < mistakes
            pairs.append((one, other) if (scores[one] > scores[other]) != wrong else (other, one))
    return pairs


# ------------------------------------------------------------------------------------- an assistant to be judged


def asked(question):
    """What one asks: "What does shutil.copyfile do?"."""
    return corpus.as_conversation(question[0], "")[0]["content"]


class Assistant:
    """The instruct model, and the questions it is asked: training and held_out, [(name, answer, docstring)] each."""

    def __init__(self, folder, seed, parallel_map):
        params, self.config, self.tokenizer, _ = talk.opened(folder, mapped=False)
        self.params, self.parallel_map = copied(params), parallel_map
        self.end, self.rng = finetune.end_token(self.tokenizer), np.random.default_rng(seed)
        training, _, test = corpus.split_questions()
        self.training, self.held_out = ([part[i] for i in self.rng.permutation(len(part))] for part in (training, test))

    def prompt(self, text):
        return finetune.prompt(self.tokenizer, [{"role": "user", "content": text}])

    def prompts(self, questions):
        return [self.prompt(asked(question)) for question in questions]

    def answers(self, params, questions, temperature=1.0):
        prompts = self.prompts(questions)
        return sample_answers(params, self.config, prompts, LONGEST, temperature, self.rng, self.parallel_map)

    def text(self, answer):
        return self.tokenizer.decode(token for token in answer if token != self.end)

    def judge(self, questions, answers):
        """The true score of each answer, (batch,): the sum of its three virtues."""
        ended = [(self.text(answer), answer[-1] == self.end) for answer in answers]
        verdicts = [judge(name, docstring, *said) for (name, _, docstring), said in zip(questions, ended)]
        return np.array([sum(verdict.values()) for verdict in verdicts])

    def comparisons(self, questions, mistakes):
        """Answers to each question at several temperatures, so that there are good and bad ones, and how the annotator
        compares them: [(prompt, answers, pairs)], ids, a list of ids, and pairs (better, worse) of numbers of answers.
        """
        answers = [self.answers(self.params, questions, temperature) for temperature in TEMPERATURES]
        scores = [self.judge(questions, some) for some in answers]
        pairs = [compare(some, self.rng, mistakes) for some in zip(*scores)]
        return list(zip(self.prompts(questions), map(list, zip(*answers)), pairs))

    def evaluate(self, function, params, questions, answers):
        rows = as_rows(self.prompts(questions), answers)
        return evaluate(function, params, self.config, *rows, self.parallel_map)

    def save(self, folder, params):
        os.makedirs(folder, exist_ok=True)
        model.save(folder, {name: w for name, w in params.items() if name != "score.weight"}, self.config)
        _, end, _ = finetune.chat_format(self.tokenizer)
        self.tokenizer.save(folder, eos_token=end, chat_template=finetune.jinja(self.tokenizer))


def win_rate(mine, theirs, noticeable=0.0):
    """How often my score is higher, a tie being half a win, and the 95 % interval over the answers: (rate, [low,
    high]), or (None, [0, 1]) without any. noticeable: smaller differences are ties.
    """
    if not len(mine):
        return None, [0.0, 1.0]
    gap = np.asarray(mine) - theirs
    rate, *interval = proportion(np.where(abs(gap) < max(noticeable, 1e-9), 0.5, gap > 0))
    return rate, interval


def at_matched_length(answers, scores, others, other_scores, tolerance=1):
    """The scores of those answers that have a counterpart about as long among the others to the same question, and the
    scores of the nearest in length, if no more than `tolerance` tokens apart: two lists.

    others, other_scores: a list of each for several answers to every question.
    """
    matched = []
    for i, answer in enumerate(answers):
        apart, which = min((abs(len(some[i]) - len(answer)), k) for k, some in enumerate(others))
        if apart <= tolerance:
            matched.append((scores[i], other_scores[which][i]))
    return [mine for mine, _ in matched], [theirs for _, theirs in matched]


# ------------------------------------------------------------------------------------------ at the terminal


def read_comparisons(path):
    """What `ask` wrote: a list of dicts, without a last line that was cut off. ValueError with a line that is none."""
    comparisons = []
    text = read_text(path) if os.path.exists(path) and os.path.getsize(path) else ""
    for where, comparison in json_lines(text[: text.rfind("\n") + 1], path):
        match comparison:
            case {"question": str(), "tokens": [[_, *_] as one, [_, *_] as other], "chosen": chosen}:
                good = all(type(i) is int and 0 <= i < 2**31 for i in one + other)
                good = good and (chosen is None or type(chosen) is int and chosen in (0, 1))
            case _:
                good = False
        if not good:
            raise ValueError(f"{where}: not a comparison of two answers")
        comparisons.append(comparison)
    return comparisons


def ask(path, comparisons):
    """Shows two answers at a time and appends each judgement to a JSONL file as it is made, until q, the end of the
    input, or the last; Ctrl-C loses nothing. comparisons: (question, texts, tokens) each, two answers as texts and ids.
    """
    with open(path, "a+b") as file:  # go on behind the last whole line
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
    for question, texts, tokens in comparisons:
        print(f"\n{question}\n  1  {texts[0]}\n  2  {texts[1]}")
        print("1 or 2 is better, = equal, q to stop: ", end="", flush=True)
        while (key := read_key()) not in ("1", "2", "=", "q", ""):
            pass
        print(key)
        if key in ("q", ""):
            return
        line = {"question": question, "answers": texts, "tokens": tokens, "chosen": {"1": 0, "2": 1}.get(key)}
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
