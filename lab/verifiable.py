"""Reinforcement of a published chat model on questions whose answers can be checked, as DeepSeek-R1-Zero was: it
thinks between <think> and </think>, then answers; rewarded are the format and a right answer, nothing else (DeepSeek-AI
2025, section 2.2). The baseline, with as many samples, learns from its own right answers alone (rejection sampling).
"""

import json
import os
import re
import shutil

import checkpoint
import cot
import model
import rlhf
from engine import np
from engine.files import read_rows, refuse, write_text
from engine.progress import counted
from engine.threads import cores, thread_pool
from evals import NUMERAL, pass_at_k, proportion, same_answer
from lab import talk

K = 8  # chains for each held-out problem
HELD_OUT = 5  # every fifth problem
THINK, ANSWER = "<think>", "</think>"
TASK = f"Think in steps, close them with {ANSWER}, and write behind it only the answer."
SHOWN = [  # one turn of a conversation before the question, which shows the format
    {"role": "user", "content": f"Ann has 3 coins and finds 4. How many are there? {TASK}"},
    {"role": "assistant", "content": f"{THINK}3 and 4 are 7.{ANSWER}7"},
]


def read_problems(path):
    """Pairs (question, answer) of a file of {"question", "answer"}, where an answer may end in "#### 42", as those of
    GSM8K do (Cobbe et al. 2021). ValueError, with file and line, for a row that has none.
    """
    problems = []
    for where, row in read_rows(path, {"question": str, "answer": str}):
        answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
        refuse(not row["question"].strip(), f"{where}: the question is empty")
        refuse(not answer, f"{where}: the answer is empty")
        problems.append((row["question"].strip(), answer))
    refuse(len(problems) < 2 * HELD_OUT, f"{path} has {len(problems)} problems, and {2 * HELD_OUT} are the least")
    return problems


def small_sums(path, count=200, seed=0):
    """Writes such a file: sums and differences of two numbers, each once, whose answers are from 0 to 20."""
    pairs = [(a, b) for a in range(1, 20) for b in range(1, 20)]
    sums = [(f"What is {a} + {b}?", a + b) for a, b in pairs if a + b <= 20]
    sums += [(f"What is {a} - {b}?", a - b) for a, b in pairs if a >= b]
    chosen = [sums[i] for i in np.random.default_rng(seed).permutation(len(sums))[:count]]
    rows = [json.dumps({"question": question, "answer": f"#### {answer}"}) for question, answer in chosen]
    write_text(path, "\n".join(rows) + "\n")


def reward(answer, text):
    """(format, accuracy), 0 or 1 each: whether a text closes its thinking once and something stands behind it, and
    whether that is the answer. The text of a chain that was cut off is None.
    """
    thought, _, said = (text or "").partition(ANSWER)
    if not thought.strip() or not said.strip() or ANSWER in said or THINK in text:
        return 0.0, 0.0
    said = said.strip().replace(",", "")
    if NUMERAL.fullmatch(answer):  # "42 coins" says 42
        numbers = re.findall(r"[+-]?\d+(?:\.\d+)?", said)
        said = numbers[0] if len(numbers) == 1 else said
    return 1.0, float(same_answer(said, answer))


class Reasoner:
    """A chat model that is asked to think first. folder: its checkpoint. budget: of tokens, for thinking and answer."""

    def __init__(self, folder, budget, parallel_map=map):
        self.params, self.config, self.tokenizer, self.stop = talk.opened(folder)
        self.ask, self.budget, self.parallel_map = talk.asking(folder, self.tokenizer), budget, parallel_map
        refuse(self.ask is None, f"{folder} has a model that was never in a chat")
        self.folder = folder

    def prompt(self, question):
        """The ids of a question, up to where thinking begins; ValueError where no room is left for an answer."""
        asked = [*SHOWN, {"role": "user", "content": f"{question} {TASK}"}]
        ids = self.ask(asked) + self.tokenizer.encode(THINK)
        room = self.config.max_position_embeddings - len(ids)
        refuse(
            room < self.budget, f"a question of {len(ids)} tokens leaves no room for {self.budget}: {question!r:.60}"
        )
        return ids

    def text(self, ids):
        """What a chain says; None where it did not come to an end."""
        return self.tokenizer.decode(ids[:-1]) if ids and ids[-1] in self.stop else None

    def reward(self, problem, ids):
        """1 for a right answer, and 0.2 for the format."""
        well_formed, right = reward(problem[1], self.text(ids))
        return 0.2 * well_formed + right

    def sample(self, params, prompts, rng):
        """A chain for each prompt, 16 at a time."""
        return rlhf.sample_answers(params, self.config, prompts, self.budget, 1.0, rng, self.parallel_map, 16)

    def examine(self, params, problems, seed):
        """pass@1 and pass@8 on problems, the share of chains in the format, and their length: a dict, and a chain."""
        prompts = [self.prompt(question) for question, _ in problems for _ in range(K)]
        chains = self.sample(params, prompts, np.random.default_rng(seed))
        marks = [
            reward(answer, self.text(ids)) for (_, answer), ids in zip([p for p in problems for _ in range(K)], chains)
        ]
        well_formed, right = np.array(marks).reshape(len(problems), K, 2).transpose(2, 0, 1)
        found = {"format": float(well_formed.mean()), "tokens": float(np.mean(list(map(len, chains))))}
        for k in 1, K:
            mean, *interval = proportion([pass_at_k(K, int(c), k) for c in right.sum(axis=1)])
            found |= {f"pass@{k}": mean, f"pass@{k}_95": interval}
        return found, self.tokenizer.decode(chains[0])

    def save(self, folder, params):
        """A checkpoint with the tokenizer and the chat template that the model came with."""
        model.save(folder, params, self.config)
        for name in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json":
            if os.path.exists(path := os.path.join(self.folder, name)):
                shutil.copy(path, folder)


def experiment(s):
    """GRPO and, with as many samples, rejection sampling. Writes checkpoints and summary.json. s: Settings."""
    checkpoint.existing(s.init)
    problems = read_problems(s.reinforce)
    refuse(os.path.exists(s.out) and os.listdir(s.out), f"{s.out} holds something already: name another --out")
    tests = problems[::HELD_OUT][: s.held_out]
    training = [problem for i, problem in enumerate(problems) if i % HELD_OUT]
    with thread_pool(cores()) as pool:
        reasoner = Reasoner(s.init, s.budget, pool.map)
        for question, _ in problems:
            reasoner.prompt(question)  # whether there is room
        settings = {name: getattr(s, name) for name in ("rounds", "budget", "questions", "group", "lr", "seed")}
        summary = settings | {"trained_on": len(training), "held_out": len(tests)}

        def report(name, params):
            summary[name], said = reasoner.examine(params, tests, s.seed)
            numbers = {key: round(value, 3) for key, value in summary[name].items() if isinstance(value, float)}
            print(f"\n{name}: {numbers}\n> {tests[0][0]}\n{THINK}{said}", flush=True)

        def draw(rng):
            problem = training[rng.integers(len(training))]
            return reasoner.prompt(problem[0]), problem

        report("before", reasoner.params)
        for name in "grpo", "rejection_sampling":
            how = {"questions": s.questions, "group": s.group, "right": name == "rejection_sampling", "size": 8}
            given = (reasoner.params, reasoner.config, draw, reasoner.reward, counted(name, s.rounds))
            rng = np.random.default_rng(s.seed)
            tuned = cot.reinforce(*given, rng, s.budget, s.lr, **how, parallel_map=pool.map)
            reasoner.save(os.path.join(s.out, name), tuned)
            report(name, tuned)
    write_text(os.path.join(s.out, "summary.json"), json.dumps(summary, indent=1) + "\n")
    print(f"\n{os.path.join(s.out, 'summary.json')}")
    print(f"talk to it: python model.py --load {os.path.join(s.out, 'grpo')} --chat")
