"""Reinforcement learning with human feedback, the experiment: a language model becomes an assistant for a made-up
village, an annotator compares its answers, a reward model learns from that, and PPO, DPO, GRPO and Dr. GRPO tune the
assistant. As the annotator's rules are known, what comes of it is measured by what it really wants, on questions in
words that were never used for what they ask, beside what nobody had to tune: greedy answers, and the best of four by
the reward model.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import partial

import checkpoint
import model
import rlhf
from engine import cli, np, runs, xp
from engine.batches import evaluate, flat
from engine.cli import option
from engine.figure import figure
from engine.files import replace, write_text
from engine.progress import counted
from engine.threads import cores, thread_pool
from evals import proportion
from lab import annotator, assistant, preferences, results
from lab.annotator import VIRTUES
from lab.assistant import LONGEST, Assistant

STEPS = {"pre-training": 900, "fine-tuning": 800, "reward model": 266, "ppo": 120, "grpo": 80, "dpo": 266}
UNTUNED = {"instruct": "instruct, sampled", "greedy": "instruct, greedy", "best_of_4": "instruct, best of 4"}
TUNED = {"ppo": "PPO", "dpo": "DPO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO"}


def kl_control(kl, target=4.0):
    """The weight β of the KL penalty for a policy at that KL from the reference, in nats an answer: 0.1 at the target,
    next to nothing far below, and growing so fast beyond that no reward is worth it.

    A β that is adjusted step by step (Ziegler et al. 2019, section 2.2) comes too late in a run of some hundred rounds.
    """
    return 0.1 * np.exp(4 * (kl / target - 1))


def accuracy_of(reward_model, config, comparisons, parallel_map=map):
    """The share of the comparisons that the reward model decides alike, or None where there are none."""
    if not any(pairs for _, _, pairs in comparisons):
        return None
    inputs, targets, better, worse = flat(comparisons)
    r = evaluate(rlhf.rewards, reward_model, config, inputs, targets, parallel_map)
    return float(np.mean(r[better] > r[worse]))


def truly(comparisons, scores):
    """The comparisons by the scores themselves, without chance and without those of answers that are worth the same."""
    order = lambda own, i, j: (i, j) if own[i] > own[j] else (j, i)
    return [
        (prompt, answers, [order(own, i, j) for i, j in pairs if own[i] != own[j]])
        for (prompt, answers, pairs), own in zip(comparisons, scores)
    ]


class Scale:
    """What policies are measured by: the instruct model's own answers to the held-out questions. Eight to each to take
    the best of, with their rewards, in standard deviations above their mean; and four others to compare with.
    """

    def __init__(self, assistant, reward_model):
        a = self.assistant = assistant
        self.prompts = a.prompts(a.training)
        self.answers = [a.answers(a.params, a.held_out) for _ in range(8)]
        self.others = [a.answers(a.params, a.held_out) for _ in range(4)]
        self.other_scores = [a.judge(a.held_out, answers).sum(axis=1) for answers in self.others]
        rewards = partial(a.evaluate, rlhf.rewards, reward_model)
        raw = np.stack([rewards(a.held_out, answers) for answers in self.answers])
        self.rewards = (raw - raw.mean()) / raw.std()
        self.proxy = lambda *asked: (rewards(*asked) - raw.mean()) / raw.std()

    def best_of(self, n):
        """Of the first n answers to each question, those that the reward model likes best: a list."""
        return [self.answers[i][k] for k, i in enumerate(self.rewards[:n].argmax(axis=0))]

    def measure(self, answers, kl):
        """What summary.json says of answers to the held-out questions."""
        a = self.assistant
        virtues = a.judge(a.held_out, answers)
        scores = virtues.sum(axis=1)
        found = dict(zip(VIRTUES, virtues.mean(axis=0).tolist()))
        found |= {"true_reward": float(scores.mean()), "proxy_reward": float(self.proxy(a.held_out, answers).mean())}
        matched = at_matched_length(answers, scores, self.others, self.other_scores)
        for name, pair in {"win_rate": (scores, self.other_scores[0]), "win_rate_at_matched_length": matched}.items():
            found[name], found[f"{name}_95"] = win_rate(*pair)
        return found | {"matched": len(matched[0]), "kl": kl, "tokens": float(np.mean(list(map(len, answers))))}

    def of_policy(self, policy):
        """The same of a policy, by one answer to each question: {"sampled": at temperature 1, also the entropy of the
        next token and the true reward of answers about what was never asked in training; "greedy"}.
        """
        a = self.assistant
        sampled, greedy = (a.answers(policy, a.held_out, temperature) for temperature in (1.0, 0.0))
        log_p, ref_log_p = (a.evaluate(rlhf.log_likelihoods, p, a.held_out, sampled) for p in (policy, a.params))
        ref_log_p_greedy = a.evaluate(rlhf.log_likelihoods, a.params, a.held_out, greedy)
        unasked = float(a.judge(a.unasked, a.answers(policy, a.unasked)).sum(axis=1).mean())
        besides = {"entropy": a.entropy(policy, a.held_out, sampled), "unasked": unasked}
        found = self.measure(sampled, float((log_p - ref_log_p).mean())) | besides
        # a greedy policy draws its answer for certain, log π = 0, which leaves -log π₀ of the KL
        return {"sampled": found, "greedy": self.measure(greedy, -float(ref_log_p_greedy.mean()))}


def win_rate(mine, theirs):
    """How often my score is higher, a tie being half a win, and the 95 % interval over the answers: (rate, [low,
    high]), or (None, [0, 1]) without any.
    """
    if not len(mine):
        return None, [0.0, 1.0]
    gap = np.asarray(mine) - theirs
    rate, *interval = proportion(np.where(abs(gap) < 1e-9, 0.5, gap > 0))
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


def reinforced(method, scale, label, steps, beta=kl_control, lr=3e-4, **options):
    """PPO or GRPO on the reward model: the policy, and of each round KL, reward, entropy and true reward."""
    a = scale.assistant
    reward = lambda which, answers: scale.proxy([a.training[i] for i in which], answers)
    given = (a.params, a.config, scale.prompts, reward, counted(label, steps), beta, lr)
    policy, history = method(*given, max_new_tokens=LONGEST, **options)
    true = lambda round: float(a.judge([a.training[i] for i in round["which"]], round["answers"]).sum(axis=1).mean())
    told = lambda round: {name: float(round[name]) for name in ("kl", "reward", "entropy")}
    return policy, [told(round) | {"true_reward": true(round)} for round in history]


def compared(a, steps, options):
    """Comparisons, and a reward model that learned to predict them. In two rounds, as a reward model knows nothing of
    answers that it never saw (Bai et al. 2022, section 4.5): the second has answers of a policy tuned on the first too.
    All methods learn from these.
    """
    half, comparisons = len(a.training) // 2, []
    policies = [a.params] * 4
    for number, questions in enumerate((a.training[:half], a.training[half:])):
        comparisons += a.comparisons(questions, policies)[0]
        if not any(pairs for _, _, pairs in comparisons):
            raise ValueError("no two answers differ, so there is nothing to compare")
        progress = counted("reward model", steps["reward model"] * len(comparisons) // len(a.training))
        reward_model = rlhf.train_reward_model(a.params, a.config, comparisons, progress, **options)
        if number == 0:
            policy, _ = reinforced(rlhf.ppo, Scale(a, reward_model), "PPO, to compare", steps["ppo"] // 4, **options)
            policies = [policy, policy, a.params, a.params]
    return comparisons, reward_model


def chain(a, folder, steps, seed):
    """Comparisons, a reward model, PPO, DPO, GRPO, Dr. GRPO, over-optimisation; writes the folder, returns the summary.
    a: an Assistant. steps: {stage: number}, as STEPS.
    """
    options = {"seed": seed, "parallel_map": a.parallel_map}
    print("\n3. comparisons: an annotator prefers one of two answers", flush=True)
    comparisons, reward_model = compared(a, steps, options)
    unseen, scores = a.comparisons(a.held_out, [a.params] * 4)
    count = sum(len(pairs) for _, _, pairs in comparisons)
    print(f"   {count:,} comparisons of four answers each to {len(comparisons):,} questions", flush=True)
    summary = {"seed": seed, "steps": steps, "comparisons": count}
    for name, some in ("", truly(unseen, scores)), ("_as_compared", unseen):
        summary[f"reward_model_accuracy{name}"] = accuracy_of(reward_model, a.config, some, a.parallel_map)
    right, agrees = (summary[f"reward_model_accuracy{name}"] for name in ("", "_as_compared"))
    print(f"   right about {results.percent(right)} of answers to held-out questions, agrees with", end=" ")
    print(f"{results.percent(agrees)} of comparisons")
    scale = Scale(a, reward_model)

    print("\n4. tuning the assistant, on the reward or on the comparisons", flush=True)
    own = scale.of_policy(a.params)
    methods = summary["methods"] = {"instruct": own["sampled"], "greedy": own["greedy"]}
    methods["best_of_4"] = scale.measure(scale.best_of(4), kl_of_best(4))
    summary["best_of_n"] = [{"n": n, **scale.measure(scale.best_of(n), kl_of_best(n))} for n in (1, 2, 4, 8)]
    dpo = partial(rlhf.dpo, beta=0.3, lr=4e-4, **options)
    tune = {
        "ppo": lambda: reinforced(rlhf.ppo, scale, "PPO", steps["ppo"], lr=1e-4, **options),
        "dpo": lambda: (dpo(a.params, a.config, comparisons, counted("DPO", steps["dpo"])), []),  # without rounds
        "grpo": lambda: reinforced(rlhf.grpo, scale, "GRPO", steps["grpo"], **options),
        "dr_grpo": lambda: reinforced(rlhf.grpo, scale, "Dr. GRPO", steps["grpo"], done_right=True, **options),
    }
    summary["rounds"] = {}
    for name in TUNED:
        policy, summary["rounds"][name] = tune[name]()
        a.save(os.path.join(folder, name), policy)
        found = scale.of_policy(policy)
        methods[name] = found["greedy"] | {"sampled": found["sampled"]}

    print("\n5. over-optimisation: no penalty for going far from the instruct model", flush=True)
    free = {"beta": lambda kl: 0.0} | options
    _, summary["over_optimisation"] = reinforced(rlhf.grpo, scale, "no penalty", steps["grpo"], **free)
    text = json.dumps(summary, indent=1) + "\n"
    replace(os.path.join(folder, "summary.json"), lambda new: write_text(new, text))
    draw(summary, os.path.join(folder, "reward_kl.png"))
    return summary


def kl_of_best(n):
    """The KL of the best of n from what they were drawn from, in nats: at most log n - (n - 1)/n."""
    return math.log(n) - (n - 1) / n


def rows(summaries):
    """Of some seeds' summaries, row by row of a table: what it is of, and its measures for each seed, a list."""
    of = {name: [summary["methods"][name] for summary in summaries] for name in (*UNTUNED, *TUNED)}
    untuned = {shown: of[name] for name, shown in UNTUNED.items()}
    greedy = {f"{shown}, greedy": of[name] for name, shown in TUNED.items()}
    sampled = {f"{shown}, sampled": [found["sampled"] for found in of[name]] for name, shown in TUNED.items()}
    return untuned | greedy | sampled


def show(summaries):
    """The summaries of some seeds as a table: means and, of several, the range."""
    width = 17 if len(summaries) > 1 else 9
    print("\n" + " " * 22 + "".join(f"{name:>{width}}" for name in (*VIRTUES, "sum", "wins")), end="")
    print("   same length   KL, nats   tokens")
    for shown, found in rows(summaries).items():
        print(f"{shown:22}", end="")
        for key, form in {**dict.fromkeys((*VIRTUES, "true_reward"), "{:.2f}"), "win_rate": "{:.0%}"}.items():
            print(f"{results.spread([measures[key] for measures in found], form):>{width}}", end="")
        mean = lambda key: results.mean([measures[key] for measures in found])
        print(f"{results.percent(mean('win_rate_at_matched_length')):>14}{mean('kl'):11.1f}{mean('tokens'):9.1f}")


def examples(a, folder, count=10):
    """What the assistant says to held-out questions, greedily, before and after PPO: of the answers that changed, in
    the order of how much their sum rose, some at equal distances, so that they show losses and gains as they are.
    """
    tuned = model.load(os.path.join(folder, "ppo"))[0]
    answers = [a.answers(params, a.held_out, 0.0) for params in (a.params, tuned)]
    scores = [a.judge(a.held_out, some).sum(axis=1) for some in answers]
    changed = np.array([i for i, (before, after) in enumerate(zip(*answers)) if before != after], int)
    risen = scores[1][changed] - scores[0][changed]
    better, worse = ((sign * risen > 1e-9).sum() for sign in (1, -1))
    print(f"\nPPO changed {len(changed)} of {len(a.held_out)} greedy answers, {better} for the better and", end=" ")
    print(f"{worse} for the worse; some, from the greatest loss to the greatest gain, with their sums of three:")
    in_order = changed[np.argsort(risen, kind="stable")]
    for i in in_order[np.linspace(0, len(in_order) - 1, min(count, len(in_order))).round().astype(int)]:
        print(f"\n{annotator.text(a.held_out[i])}")
        for when, some, score in zip(("before", "after"), answers, scores):
            print(f"  {when:6} {score[i]:.2f}  {a.text(some[i])}")


def draw(summary, path):
    """What the annotator thinks of answers against their KL from the instruct model (Gao et al. 2022, figure 1)."""
    with figure(path, size=(7, 4.5), legends=False) as axes:
        curve = lambda rounds: zip(*((round["kl"], round["true_reward"]) for round in rounds))
        axes.plot(
            *curve(summary["best_of_n"]),
            "o--",
            color="black",
            markersize=4,
            label="best of n = 1, 2, 4, 8 (KL: at most)",
        )
        rounds = np.array([[*point] for point in curve(summary["over_optimisation"])])  # means of ten rounds
        smooth = [np.convolve(row, np.ones(10) / 10, "valid") if len(row) > 10 else row for row in rounds]
        axes.plot(*smooth, ":", color="C3", label="GRPO without a penalty")
        for (name, shown), marker, colour in zip(TUNED.items(), "s^Dv", ("C0", "C1", "C2", "C4")):
            found, look = summary["methods"][name], {"color": colour, "markersize": 9}
            for decoded, one in {"sampled": found["sampled"], "greedy": found}.items():
                fill = "full" if decoded == "sampled" else "none"
                point = one["kl"], one["true_reward"]
                axes.plot(*point, marker, fillstyle=fill, label=f"{shown}, {decoded}", **look)
        greedy = summary["methods"]["greedy"]
        axes.plot(greedy["kl"], greedy["true_reward"], "*", color="grey", markersize=11, label=UNTUNED["greedy"])
        axes.set(xlabel="KL from the instruct model (nats an answer)", ylabel="useful + honest + safe (at most 3)")
        axes.set(title="What answers are worth, against how far the model went from where it began", ylim=(1.5, 3))
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)


def learn_from_human(a, folder, instruct, seed):
    """Comparisons at the terminal, then DPO on all that were ever made in this folder."""
    path = os.path.join(folder, "comparisons.jsonl")
    made = preferences.read(path) if os.path.exists(path) and os.path.getsize(path) else []
    judged = {messages[-1]["content"] for messages, *_ in made}
    print(f"which answer is better? {len(made)} comparisons so far, in {path}")

    def pairs():
        for question in a.training:
            if annotator.text(question) not in judged:
                one, other = (a.text(answer) for answer in a.answers(a.params, [question, question]))
                if one != other:
                    yield annotator.text(question), (one, other)

    annotator.ask(path, pairs())
    print(f"\ngo on comparing with: python rlhf.py --human --out {folder}")
    if not os.path.getsize(path):
        return print("no comparisons yet, nothing to learn from")
    preferences.learn(instruct, path, os.path.join(folder, "human"), 1.0, seed, a.parallel_map)


@dataclass(frozen=True)
class Settings:
    """What the experiment is told."""

    init: str | None = option(None, "a chat model to tune; an assistant is made if not given", metavar="DIR")
    comparisons: str | None = option(None, "tune the model of --init on these, by DPO", metavar="FILE.jsonl")
    human: bool = option(False, "compare answers yourself, and learn from that")
    out: str | None = option(None, "folder of all results; a new one under runs/ if not given", metavar="DIR")
    effort: float = option(1.0, "times as many steps of everything", above=0)
    seeds: int | None = option(None, "so many runs, one after another, stored in results/rlhf.json", least=1)
    threads: int | None = option(None, "all cores if not given", least=1)
    seed: int = option(0, "of all that is drawn, the first of --seeds", least=0)


def main(argv=None):
    purpose = "From a language model to an assistant tuned by feedback: PPO, DPO and GRPO."
    s = cli.settings(Settings, argv, purpose)
    if s.init is not None:
        checkpoint.existing(s.init)
    if s.comparisons is not None and (s.init is None or s.human):
        raise ValueError("--comparisons tunes the model of --init DIR, and is not for --human")
    if s.init is not None and s.comparisons is None and not s.human:
        raise ValueError("--init goes with --comparisons or --human")
    folder = s.out or runs.new_folder()
    going_on = s.human and os.path.exists(os.path.join(folder, "comparisons.jsonl"))
    if not runs.is_free(folder) and not going_on:
        raise ValueError(f"{folder} holds something already: name another --out")
    threads = s.threads or (cores() if xp is np else 1)
    steps = {name: max(2, round(s.effort * number)) for name, number in STEPS.items()}
    with thread_pool(threads) as pool:
        if s.comparisons is not None:
            return preferences.learn(s.init, s.comparisons, folder, s.effort, s.seed, pool.map)
        making = partial(assistant.made, steps=(steps["pre-training"], steps["fine-tuning"]), threads=threads)
        if s.human:
            instruct = s.init or os.path.join(folder, "instruct")
            if s.init is None and not os.path.exists(os.path.join(instruct, "model.safetensors")):
                making(folder, seed=s.seed)
            os.makedirs(folder, exist_ok=True)
            return learn_from_human(Assistant(instruct, s.seed, pool.map), folder, instruct, s.seed)
        summaries = []
        for seed in range(s.seed, s.seed + (s.seeds or 1)):
            where = os.path.join(folder, f"seed-{seed}") if s.seeds else folder
            a = Assistant(making(where, seed=seed), seed, pool.map)
            summaries.append(chain(a, where, steps, seed))
        examples(a, where)
    print(f"\non {len(a.held_out)} held-out questions; wins are over an answer of the instruct model:")
    show(summaries)
    if s.seeds:
        draw(summaries[0], "figures/rlhf.png")
        results.store("rlhf", f"python rlhf.py --seeds {s.seeds}" + (f" --seed {s.seed}" if s.seed else ""), summaries)
    print(f"\nsummary: {os.path.join(where, 'summary.json')}, figure: {os.path.join(where, 'reward_kl.png')}")
    print(f"talk to one: python model.py --load {os.path.join(where, 'ppo')} --chat")
