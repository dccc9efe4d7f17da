"""An assistant for the village: how it comes to be, what it answers, and what its answers are worth."""

import json
import os

import numpy as np

import finetune
import model
import rlhf
from engine.batches import as_rows, copied, evaluate
from lab import annotator, pretrain, talk, village
from lab.annotator import VIRTUES
from layers import IGNORE

LONGEST = 48  # tokens of an answer
LINES, CHATS, ASKED = 20_000, 12_000, 6400  # of the text to pre-train on; demonstrations; questions to compare


def made(folder, steps, seed, threads):
    """Writes a text and demonstrations into a folder, and makes an instruct model of them in two steps. Returns its
    folder. steps: of pre-training and of fine-tuning.
    """
    rng, paths = np.random.default_rng(seed), [os.path.join(folder, name) for name in ("village.txt", "chat.jsonl")]
    os.makedirs(folder, exist_ok=True)
    with open(paths[0], "w", encoding="utf-8") as file:
        file.write(village.stories(LINES, rng))
    with open(paths[1], "w", encoding="utf-8") as file:
        for question in village.some(village.parted()[0], CHATS, rng):
            asked, answer = village.text(question), village.demonstration(question, rng)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    base, instruct = os.path.join(folder, "base"), os.path.join(folder, "instruct")
    common = {"seed": seed, "threads": threads}
    print("1. pre-training: a language model", flush=True)
    pretrain.pretrain(common | {"data": paths[:1], "out": base, "steps": steps[0], "vocab": 1280})
    print("\n2. fine-tuning: an assistant", flush=True)
    finetune.finetune(common | {"data": paths[1:], "out": instruct, "init": base, "steps": steps[1], "lr": 0.002})
    return instruct


class Assistant:
    """An instruct model, and the questions that it is asked: lists: training, held_out, unasked (village.parted)."""

    def __init__(self, folder, seed, parallel_map):
        params, self.config, self.tokenizer, _ = talk.opened(folder, mapped=False)
        self.params, self.parallel_map = copied(params), parallel_map
        self.end, self.rng = finetune.end_token(self.tokenizer), np.random.default_rng(seed)
        training, self.held_out, self.unasked = village.parted()
        self.training = village.some(training, ASKED, self.rng)

    def prompts(self, questions):
        asked = ([{"role": "user", "content": annotator.text(question)}] for question in questions)
        return [finetune.prompt(self.tokenizer, messages) for messages in asked]

    def answers(self, params, questions, temperature=1.0):
        prompts = self.prompts(questions)
        return rlhf.sample_answers(params, self.config, prompts, LONGEST, temperature, self.rng, self.parallel_map)

    def text(self, answer):
        return self.tokenizer.decode(token for token in answer if token != self.end)

    def judge(self, questions, answers):
        """The scores of each answer, (batch, 3): a column for each virtue. One that was cut off is worth nothing."""
        texts = [self.text(answer) if answer[-1] == self.end else "" for answer in answers]
        scores = [annotator.score(question, text) for question, text in zip(questions, texts)]
        return np.array([[score[virtue] for virtue in VIRTUES] for score in scores])

    def comparisons(self, questions, policies):
        """An answer of each policy to each question, and how the annotator compares them: [(prompt, answers, pairs)],
        ids, a list of ids, and pairs (better, worse) of numbers of answers; and the true sums of scores, (questions,
        policies). policies: a list of params.
        """
        answers = [self.answers(params, questions) for params in policies]
        scores = np.stack([self.judge(questions, some).sum(axis=1) for some in answers], axis=1)
        answers = [list(some) for some in zip(*answers)]
        pairs = [annotator.compare(own, of, self.rng) for own, of in zip(answers, scores)]
        return list(zip(self.prompts(questions), answers, pairs)), scores

    def evaluate(self, function, params, questions, answers):
        rows = as_rows(self.prompts(questions), answers)
        return evaluate(function, params, self.config, *rows, self.parallel_map)

    def entropy(self, params, questions, answers):
        """The mean entropy of the next token, in nats, over all tokens of some answers."""

        def of_next(params, config, inputs, targets):
            return rlhf.entropy(model.forward(params, config, inputs)[0])[0], None

        answered = as_rows(self.prompts(questions), answers)[1] != IGNORE
        return float(rlhf.masked_mean(self.evaluate(of_next, params, questions, answers), answered))

    def save(self, folder, params):
        os.makedirs(folder, exist_ok=True)
        model.save(folder, {name: w for name, w in params.items() if name != "score.weight"}, self.config)
        _, end, _ = finetune.chat_format(self.tokenizer)
        self.tokenizer.save(folder, eos_token=end, chat_template=finetune.jinja(self.tokenizer))
