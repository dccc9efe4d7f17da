"""The experiment behind `python rlhf.py`: a small model is pre-trained and fine-tuned on questions about Python's
library, an annotator compares its answers, a reward model learns from that, and PPO, DPO and GRPO tune the assistant
for the same time each. As the annotator's rules are known, the outcome is measured by what the annotator really wants,
and by what the reward model took it to be (Gao et al. 2022).
"""

import json
import os
from dataclasses import dataclass
from time import perf_counter

import bpe
import checkpoint
import finetune
import model
import rlhf
from engine import cli, np, runs, xp
from engine.batches import evaluate, flat
from engine.cli import option
from engine.figure import figure
from engine.files import replace, write_text
from engine.progress import clock
from engine.threads import cores, thread_pool
from lab import annotator, pretrain
from lab.annotator import LONGEST, MISTAKES, NOTICEABLE, Assistant, at_matched_length, win_rate


def prepare(init, folder, minutes, seed, threads):
    """The folder of an instruct model: `init` if it is one, else made of it or, without it, of nothing."""
    if init is not None and finetune.has_format(bpe.load(os.path.join(init, "tokenizer.json"))):
        print(f"{init} has the tokens of a chat, and is taken for an instruct model")
        return init
    common = {"seed": seed, "threads": threads}
    base, instruct = init or os.path.join(folder, "base"), os.path.join(folder, "instruct")
    if init is None:
        print("1. pre-training: a language model", flush=True)
        pretrain.pretrain(common | {"out": base, "minutes": 0.2 * minutes})
    print("\n2. fine-tuning: an assistant", flush=True)
    finetune.finetune(common | {"out": instruct, "init": base, "minutes": 0.11 * minutes})
    return instruct


def kl_control(kl, target=8.0):
    """The weight β of the KL penalty for a policy at that KL from the reference, in nats an answer: 0.1 at the target,
    next to nothing far below, and growing so fast beyond that no reward is worth it.

    A β that is adjusted step by step (Ziegler et al. 2019, section 2.2) comes too late in a run of some dozen rounds.
    """
    return 0.1 * np.exp(4 * (kl / target - 1))


def accuracy_of(reward_model, config, comparisons, parallel_map=map):
    """The share of the comparisons in which the reward model agrees with the annotator, or None, and their number."""
    if not any(pairs for _, _, pairs in comparisons):
        return None, 0
    inputs, targets, better, worse = flat(comparisons)
    r = evaluate(rlhf.rewards, reward_model, config, inputs, targets, parallel_map)
    return float(np.mean(r[better] > r[worse])), len(better)


def mean_length(answers):
    return float(np.mean(list(map(len, answers))))


def in_deviations(known):
    """A function that tells values as so many standard deviations above the mean of the known ones."""
    mean, deviation = known.mean(), known.std() + 1e-9
    return lambda values: (values - mean) / deviation


class Scale:
    """What tuned models are measured by: the instruct model's own answers to the held-out questions, four to each.
    Rewards are told in standard deviations above the mean of the first ones.

    proxy(questions, answers): by the reward model, (batch,). true(scores): the mean by the annotator's scores.
    """

    def __init__(self, assistant, reward_model):
        a = self.assistant = assistant
        self.prompts = a.prompts(a.training)
        self.answers = [a.answers(a.params, a.held_out) for _ in range(4)]
        self.scores = [a.judge(a.held_out, answers) for answers in self.answers]
        rewards = lambda *asked: a.evaluate(rlhf.rewards, reward_model, *asked)
        proxy, true = in_deviations(rewards(a.held_out, self.answers[0])), in_deviations(self.scores[0])
        self.proxy = lambda *asked: proxy(rewards(*asked))
        self.true = lambda scores: float(true(scores).mean())

    def measure(self, policy):
        """What summary.json says of a tuned policy, by its answers to the held-out questions."""
        a = self.assistant
        mine = a.answers(policy, a.held_out)
        scores = a.judge(a.held_out, mine)
        log_p, ref_log_p = (a.evaluate(rlhf.log_likelihoods, p, a.held_out, mine) for p in (policy, a.params))
        matched = at_matched_length(mine, scores, self.answers, self.scores)
        found = {"matched_answers": len(matched[0]), "kl": float((log_p - ref_log_p).mean())}
        found |= {"answer_length": mean_length(mine), "true_reward": self.true(scores)}
        found |= {"proxy_reward": float(self.proxy(a.held_out, mine).mean())}
        for name, pair in {"win_rate": (scores, self.scores[0]), "win_rate_at_matched_length": matched}.items():
            found[name], found[f"{name}_95"] = win_rate(*pair)
        return found | {"win_rate_noticeable": win_rate(scores, self.scores[0], NOTICEABLE)[0]}


def reinforced(method, scale, progress, beta=kl_control, lr=6e-4, **options):
    """PPO or GRPO on the reward model: the policy, its history, and the share of the time that sampling took."""
    a, marks = scale.assistant, []  # marks: a round begins, its answers are there, the next one begins ...

    def rounds():
        for done in progress:
            marks.append(perf_counter())
            yield done

    def reward(which, answers):
        marks.append(perf_counter())
        return scale.proxy([a.training[i] for i in which], answers)

    given = (a.params, a.config, scale.prompts, reward, rounds(), beta, lr)
    policy, history = method(*given, max_new_tokens=LONGEST, **options)
    sampling = sum(marks[1::2]) - sum(marks[::2])
    return policy, history, {"sampling_share": sampling / (perf_counter() - marks[0])}


def compared(a, seconds):
    """Comparisons to train on, and to test a reward model on: without the annotator's mistakes, and with them."""
    few = lambda most, a_second: max(24, min(most, int(a_second * seconds)))  # in a short time, fewer of everything
    a.held_out = a.held_out[: few(1000, 2)]
    print("\n3. comparisons: a noisy annotator prefers one of two answers", flush=True)
    comparisons = a.comparisons(a.training[: few(1600, 6)], MISTAKES)
    exact = a.comparisons(a.held_out[: few(300, 1)], mistakes=0.0)
    wrong = lambda: a.rng.random() < MISTAKES
    noisy = [(prompt, some, [pair[::-1] if wrong() else pair for pair in pairs]) for prompt, some, pairs in exact]
    count = sum(len(pairs) for _, _, pairs in comparisons)
    print(f"   {count:,} comparisons of answers to {len(comparisons):,} questions, a tenth of them wrong", flush=True)
    if not count:
        raise ValueError("no two answers differ noticeably, so there is nothing to learn from")
    return comparisons, exact, noisy


def chain(assistant, folder, seconds, seed):
    """Comparisons, reward model, PPO, DPO and GRPO for the same time each, over-optimisation; writes the folder and
    returns the summary.
    """
    a, end, options = assistant, perf_counter() + seconds, {"seed": seed, "parallel_map": assistant.parallel_map}
    left = lambda share: max(2.0, share * (end - perf_counter()))
    comparisons, exact, noisy = compared(a, seconds)
    print("\n4. reward model: learns to predict them", flush=True)
    progress = clock("reward model", left(0.42), len(comparisons) // 13)  # steps enough, even on a slow machine
    reward_model = rlhf.train_reward_model(a.params, a.config, comparisons, progress, **options)
    (right, of), (noisily, _) = (accuracy_of(reward_model, a.config, c, a.parallel_map) for c in (exact, noisy))
    if right is not None:
        print(f"   right about {right:.1%} of {of:,} comparisons on held-out questions ({noisily:.1%} of noisy ones)")
    scale = Scale(a, reward_model)

    print("\n5. tuning the assistant on the reward, or on the comparisons, for the same time each", flush=True)
    summary = {"reward_model_accuracy": right, "reward_model_accuracy_noisy": noisily, "methods": {}}
    summary["answer_length"] = mean_length(scale.answers[0])
    each = left(0.18)
    methods = {
        "ppo": lambda progress: reinforced(rlhf.ppo, scale, progress, **options),
        "dpo": lambda progress: (rlhf.dpo(a.params, a.config, comparisons, progress, **options), [], {}),
        "grpo": lambda progress: reinforced(rlhf.grpo, scale, progress, **options),
    }
    for name, tune in methods.items():
        began = perf_counter()
        policy, _, share = tune(clock(name, each))
        took = perf_counter() - began
        a.save(os.path.join(folder, name), policy)
        summary["methods"][name] = {"seconds": took} | scale.measure(policy) | share

    print("\n6. over-optimisation: no penalty for going far from the instruct model", flush=True)
    _, history, _ = reinforced(rlhf.grpo, scale, clock("no penalty", each), lambda kl: 0.0, 1.5e-3, **options)
    judged = lambda h: scale.true(a.judge([a.training[i] for i in h["which"]], h["answers"]))
    summary["over_optimisation"] = [
        {"kl": float(h["kl"]), "proxy_reward": float(h["reward"]), "true_reward": judged(h)} for h in history
    ]
    draw(summary, os.path.join(folder, "overoptimisation.png"))
    text = json.dumps(summary, indent=2) + "\n"
    replace(os.path.join(folder, "summary.json"), lambda new: write_text(new, text))
    show(a, folder, summary)
    return summary


def show(a, folder, summary):
    """The summary as a table, and what each model says to a few held-out questions."""
    print(f"\non {len(a.held_out)} held-out questions, against the instruct model, by the true annotator:\n")
    print("         wins   95 % interval   at matched length   KL, nats   tokens   reward: true   proxy   sampling")
    for name, m in summary["methods"].items():
        low, high = m["win_rate_95"]
        sampling = f"{m['sampling_share']:8.0%}" if "sampling_share" in m else "    none"
        matched = "none" if m["win_rate_at_matched_length"] is None else f"{m['win_rate_at_matched_length']:.1%}"
        print(f"{name:5}{m['win_rate']:8.1%}   {low:.1%} to {high:.1%}{matched:>14}{m['kl']:14.1f}", end="")
        print(f"{m['answer_length']:9.1f}{m['true_reward']:13.2f}{m['proxy_reward']:9.2f}   {sampling}")
    print(f"\nan answer of the instruct model has {summary['answer_length']:.1f} tokens on average")
    print("rewards are above the instruct model's mean, in its standard deviations")
    tuned = {name: model.load(os.path.join(folder, name))[0] for name in summary["methods"]}
    for question in a.held_out[:4]:
        print(f"\n{annotator.asked(question)}")
        for name, params in ({"instruct": a.params} | tuned).items():
            print(f"  {name:10}{a.text(a.answers(params, [question])[0])}")
    print(f"\nsummary: {os.path.join(folder, 'summary.json')}, figure: {os.path.join(folder, 'overoptimisation.png')}")
    print(f"talk to one: python model.py --load {os.path.join(folder, 'ppo')} --chat")


def draw(summary, path):
    """True and proxy reward against √KL (Gao et al. 2022, figure 1)."""
    curve, root = summary["over_optimisation"], lambda point: max(0.0, point["kl"]) ** 0.5
    with figure(path, size=(7, 4.5)) as axes:
        for name, label, colour in ("proxy_reward", "reward model", "C1"), ("true_reward", "annotator", "C0"):
            y = [point[name] for point in curve]
            axes.plot(list(map(root, curve)), y, color=colour, label=f"{label}, without a KL penalty")
            for (method, m), marker in zip(summary["methods"].items(), "os^"):
                axes.plot(root(m), m[name], marker, color=colour)
                axes.annotate(method, (root(m), m[name]), textcoords="offset points", xytext=(6, -4))
        axes.set(xlabel="√KL from the instruct model (nats an answer)", ylabel="reward (standard deviations)")
        axes.set(title="Over-optimisation of a reward model")


def learn_from_human(assistant, folder, seconds, seed):
    """Comparisons at the terminal, then DPO on all that were ever made in this folder."""
    a, path = assistant, os.path.join(folder, "comparisons.jsonl")
    judged = {c["question"] for c in annotator.read_comparisons(path)}
    print(f"which answer is better? {len(judged)} comparisons so far, in {path}")

    def pairs():
        for question in a.training:
            if annotator.asked(question) not in judged:
                tokens = a.answers(a.params, [question, question])
                if tokens[0] != tokens[1]:
                    yield annotator.asked(question), list(map(a.text, tokens)), tokens

    annotator.ask(path, pairs())
    print(f"\ngo on comparing with: python rlhf.py --human --out {folder}")
    made = [c for c in annotator.read_comparisons(path) if c["chosen"] is not None]
    if not made:
        return print("no comparisons yet, nothing to learn from")
    comparisons = [(a.prompt(c["question"]), c["tokens"], [(c["chosen"], 1 - c["chosen"])]) for c in made]
    options = {"seed": seed, "parallel_map": a.parallel_map}
    policy = rlhf.dpo(a.params, a.config, comparisons, clock("learning", seconds), **options)
    a.save(os.path.join(folder, "human"), policy)
    print(f"learned from {len(made)} comparisons")
    print(f"talk to it: python model.py --load {os.path.join(folder, 'human')} --chat")


@dataclass(frozen=True)
class Settings:
    """What the experiment is told."""

    init: str | None = option(None, "a model of train.py, fine-tuned or not; a new one if not given", metavar="DIR")
    out: str | None = option(None, "folder of all results; a new one under runs/ if not given", metavar="DIR")
    minutes: float = option(7.2, "time for all of it", above=0)
    human: bool = option(False, "compare answers yourself, and learn from that")
    threads: int | None = option(None, "all cores if not given", least=1)
    seed: int = option(0, "of all that is drawn", least=0)


def main(argv=None):
    purpose = "From a language model to an assistant tuned by feedback: PPO, DPO and GRPO."
    s = cli.settings(Settings, argv, purpose)
    if s.init is not None:
        checkpoint.existing(s.init)
    began, folder = perf_counter(), s.out or runs.new_folder()
    going_on = s.human and os.path.exists(os.path.join(folder, "comparisons.jsonl"))
    if not runs.is_free(folder) and not going_on:
        raise ValueError(f"{folder} holds something already: name another --out")
    threads = s.threads or (cores() if xp is np else 1)
    instruct = os.path.join(folder, "instruct")
    if not (going_on and os.path.exists(os.path.join(instruct, "model.safetensors"))):
        if going_on and not s.init:
            raise ValueError(f"{folder} was begun with a model of --init: name it again")
        instruct = prepare(s.init, folder, s.minutes, s.seed, threads)
    os.makedirs(folder, exist_ok=True)
    with thread_pool(threads) as pool:
        assistant = Assistant(instruct, s.seed, pool.map)
        if s.human:
            return learn_from_human(assistant, folder, 0.1 * 60 * s.minutes, s.seed)
        chain(assistant, folder, 60 * s.minutes - (perf_counter() - began), s.seed)
