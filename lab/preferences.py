"""Preferences that somebody wrote down: a file of comparisons, in the format that preference sets are published in, and
a chat model that learns from them by DPO.

A line is {"prompt", "chosen", "rejected"}: texts, or lists of messages {"role", "content"}, of which chosen and
rejected end with an answer; the messages before it may stand there or in the prompt.
"""

import os
import shutil

import numpy as np

import model
import rlhf
from engine.batches import as_rows, copied, evaluate
from engine.files import json_lines, read_text, refuse
from engine.progress import counted
from lab import talk


def is_chat(messages):
    """Whether it is a list of messages, each of somebody."""
    fields = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
    known = all(role in ("system", "user", "assistant") and isinstance(said, str) for role, said in fields)
    return known and len(fields) == len(messages) > 0


def conversation(row):
    """A line's conversation before the answers, a list of messages, and the two answers, texts. ValueError where it has
    none.
    """
    given = [row.get(key) for key in ("prompt", "chosen", "rejected")] if isinstance(row, dict) else [None] * 3
    asked, *answers = ([{"role": role, "content": some}] if isinstance(some, str) else some
                       for role, some in zip(("user", "assistant", "assistant"), given))  # fmt: skip
    refuse(not all(isinstance(some, list) and is_chat(some) and some[-1]["role"] == "assistant" for some in answers),
           "chosen and rejected must be answers")  # fmt: skip
    before, other = (some[:-1] for some in answers)
    refuse(before != other, "chosen and rejected must answer the same")
    refuse(
        asked is not None and not (isinstance(asked, list) and is_chat(asked)), "the prompt must be text or messages"
    )
    messages = before if before else asked
    refuse(not messages, "there is no prompt")
    return messages, *(some[-1]["content"] for some in answers)


def read(path):
    """The conversations of a file: a list. ValueError with the line that is none."""
    found = []
    for where, row in json_lines(read_text(path), path):
        try:
            found.append(conversation(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    refuse(not found, f"{path} holds no comparison")
    return found


def learn(init, path, out, effort=1.0, seed=0, parallel_map=map):
    """Tunes the chat model in folder `init` on the comparisons of a file, and saves it in folder `out`. A tenth of the
    comparisons, if there are ten, is held out. effort: 1 learns from each comparison three times, in at least 20 steps.
    """
    given = read(path)
    params, config, tokenizer, stop = talk.opened(init, mapped=False)
    ask = talk.asking(init, tokenizer)
    refuse(ask is None, f"{init} has a model that was never in a chat: fine-tune it first, with finetune.py")
    comparisons = []
    for messages, *answers in given:
        prompt, answers = ask(messages), [tokenizer.encode(answer) + stop[-1:] for answer in answers]
        if len(prompt) + max(map(len, answers)) <= config.max_position_embeddings and answers[0] != answers[1]:
            comparisons.append((prompt, answers, [(0, 1)]))
    refuse(
        not comparisons, f"no comparison of {path} fits into the model's context of {config.max_position_embeddings}"
    )
    order = np.random.default_rng(seed).permutation(len(comparisons))
    held_out, training = ([comparisons[i] for i in some] for some in np.split(order, [len(order) // 10]))
    print(f"{len(training):,} comparisons to learn from, {len(held_out):,} held out,", end=" ")
    print(f"{len(given) - len(comparisons):,} left out: longer than the context, or two answers that are the same")
    batch = min(8, len(training))
    progress = counted("DPO", max(1, round(effort * max(20, 3 * len(training) // batch))))
    lr = 1e-3 * min(1.0, 128 / config.hidden_size)
    policy = rlhf.dpo(
        copied(params), config, training, progress, lr=lr, batch=batch, seed=seed, parallel_map=parallel_map
    )
    for name, some in {"learned": training, "held-out": held_out}.items():
        if some:
            print(
                f"prefers what was chosen in {prefers(policy, params, config, some, parallel_map):.1%} of {name} ones"
            )
    save(out, policy, config, init)
    print(f"talk to it: python model.py --load {out} --chat")


def prefers(policy, params, config, comparisons, parallel_map=map):
    """The share of comparisons in which log(π/π₀) is larger for the chosen answer."""
    rows = as_rows([p for p, some, _ in comparisons for _ in some], [a for _, some, _ in comparisons for a in some])
    new, old = (evaluate(rlhf.log_likelihoods, p, config, *rows, parallel_map) for p in (policy, params))
    chosen, rejected = (new - old).reshape(-1, 2).T
    return float(np.mean(chosen > rejected))


def save(folder, params, config, init):
    """A checkpoint with the tokenizer and the chat template of the folder `init` that it came from."""
    os.makedirs(folder, exist_ok=True)
    for name in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json":
        if os.path.exists(path := os.path.join(init, name)):
            shutil.copyfile(path, os.path.join(folder, name))
    model.save(folder, params, config)
