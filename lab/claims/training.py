"""Proceso de entrenamiento: both pre-trainings, a model that follows instructions, and human feedback."""

import math
from collections import Counter
from functools import lru_cache

import bpe
import model
import train
from architectures import sibling
from engine import np, xp
from engine.figure import COLOURS, figure
from finetune import IM_START, encode, end_token, pack, prompt
from lab.claims import Finding, draw_tokens, shares
from lab.claims.language import GENDERS, WORDS, fit, ids_of, sentence_of, trained
from lab.feedback import rows
from lab.results import mean, spread, stored


def pictured(objective, seed):
    """A picture of a falling loss, and the loss of a guess by the frequency of each word."""
    losses, rng = trained(objective, seed)[2], np.random.default_rng(seed)
    words = Counter(word for _ in range(2000) for word in sentence_of(rng))
    guess = -sum(n / words.total() * math.log(n / words.total()) for n in words.values())
    does = {"causal": "continue the sentence", "masked": "fill the gaps"}[objective]

    def picture(path):
        with figure(path, size=(7.5, 3)) as axes:
            axes.plot(losses, label="the model")
            axes.axhline(guess, color="C1", linestyle="--", label="by the frequency\nof words alone")
            axes.set(title=f"Pre-training, {does}: no labels, the text is its own answer", ylim=(0, None))
            axes.set(xlabel="step", ylabel="loss, nats a token")

    return guess, picture


def a_text_is_its_own_answer(seed=0):
    """Pre-training by continuing sentences needs no labels: each token is the answer to those before it."""
    losses = trained("causal", seed)[2]
    last, (guess, picture) = float(np.mean(losses[-20:])), pictured("causal", seed)
    says = f"from {losses[0]:.2f} to {last:.2f} nats a token; by the frequency of words alone {guess:.2f}"
    return Finding(guess - last, says, least=0.7, picture=picture)


def a_gap_is_filled_from_both_sides(seed=0, asked=200):
    """Pre-training by removing words and predicting them uses both sides: the noun behind a gap tells its article."""
    share, rng = dict.fromkeys(train.OBJECTIVES, 0.0), np.random.default_rng(seed)
    texts = [text for text in (sentence_of(rng) for _ in range(3 * asked)) if text[0] != "mi"][:asked]
    articles, (end, gap) = ids_of(["el", "la"]), ids_of([".", WORDS[train.MASK]])
    for objective in train.OBJECTIVES:
        params, config, _ = trained(objective, seed)
        for text in texts:
            given, at = ([end], -1) if objective == "causal" else ([end, gap, *ids_of(text[1:])], 1)
            logits = model.forward(params, config, xp.asarray([given]))[0][0, at]
            share[objective] += (GENDERS[text[0]] == int(logits[xp.asarray(articles)].argmax())) / len(texts)
    says = f"el or la: right in {share['masked']:.0%} by both sides, in {share['causal']:.0%} by the left one"
    return Finding(share["masked"] - share["causal"], says, least=0.15, picture=pictured("masked", seed)[1])


# ------------------------------------------------------------------------------------------ instruct

THINGS = """gato perro pato lobo oso zorro ratón caballo burro toro pez loro búho cuervo ciervo mono tigre león sapo
    topo erizo pavo gallo cisne buey conejo halcón delfín pulpo camello canguro koala lince castor tejón
    bisonte""".split()
TOLD = {"color": "rojo azul verde blanco negro gris".split(), "lugar": "bosque río monte pueblo campo mar".split()}
ASIDE = "dicen todos , según mi abuela y todo el pueblo ,".split()


@lru_cache
def assistant(seed=0, steps=400, tuning=200, context=64, held=9):
    """A model that read facts about animals, and one tuned on conversations about most of them.

    Returns the share of right answers {"base" and "instruct": share}, to questions about the animals that were in no
    conversation, and an example: (question, answer of base, answer of instruct, what is right).
    """
    rng = np.random.default_rng(seed)
    facts = {(what, thing): str(rng.choice(words)) for thing in THINGS for what, words in TOLD.items()}
    asides = [ASIDE[a:b] for a, b in rng.integers(0, len(ASIDE), (4000, 2))]  # some are empty
    about = [list(facts)[i] for i in rng.integers(0, len(facts), 4000)]
    text = " ".join(
        " ".join(["el", what, "del", thing, *aside, "es", facts[what, thing], "."])
        for (what, thing), aside in zip(about, asides)
    )
    special = (*train.SPECIAL, IM_START, "<|im_end|>")
    tokenizer = bpe.train(text + " user assistant di el" * 50, 600, special=special)
    tokens, vocab = np.array(tokenizer.encode(f" {text}")), tokenizer.vocab_size
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "feed_forward": 128, "context": context}
    config = sibling("llama3.2", vocab, **sizes, rope_scaling=None, eos_token_id=special.index("<|im_end|>"))
    base = model.init(config, seed)
    fit(base, config, lambda step: (*train.windows(tokens, "causal", context, 16, rng, vocab), None), steps, 0.01)

    unseen, params = {*rng.permutation(THINGS)[:held]}, {name: w.copy() for name, w in base.items()}
    asks = lambda what, thing: {"role": "user", "content": f"di el {what} del {thing}"}
    answers = lambda *about: {"role": "assistant", "content": f"es {facts[about]}"}
    chats = [encode(tokenizer, [asks(*about), answers(*about)]) for about in facts if about[1] not in unseen]

    def batch(step):  # with text of the pre-training beside them, so that what was read there is not forgotten
        inputs, targets, documents = pack([chats[i] for i in rng.permutation(len(chats))[:20]], context)
        texts = train.windows(tokens, "causal", context, 8, rng, vocab)
        return *map(np.concatenate, zip((inputs, targets), texts)), np.concatenate([documents, np.ones_like(texts[0])])

    fit(params, config, batch, tuning, 0.003)

    def says(weights, about):
        ids = model.generate(weights, config, prompt(tokenizer, [asks(*about)]), 6)
        return tokenizer.decode([i for i in ids if i != end_token(tokenizer)]).strip()

    questions, models = [about for about in facts if about[1] in unseen], {"base": base, "instruct": params}
    said = {name: [says(weights, about) for about in questions] for name, weights in models.items()}
    right = [answers(*about)["content"] for about in questions]
    share = {name: sum(map(str.__eq__, some, right)) / len(right) for name, some in said.items()}
    at = next((i for i, (a, b) in enumerate(zip(said["instruct"], right)) if a == b), 0)
    return share, (asks(*questions[at])["content"], said["base"][at], said["instruct"][at], right[at])


def an_instruct_model_follows_instructions(seed=0):
    """Fine-tuned on conversations, a model follows instructions that were in none of them; before, it just goes on."""
    share, (question, before, after, right) = assistant(seed)
    says = f"{share['instruct']:.0%} of new questions answered, {share['base']:.0%} before"
    lines = f"user       {question}", f"base       {before}", f"instruct   {after}   (right: {right})"
    return Finding(share["instruct"] - share["base"], says, least=0.3, lines=lines)


def only_the_answer_is_learned(seed=0):
    """A conversation is one text in which special tokens say who speaks; the loss counts the assistant's alone."""
    tokenizer = bpe.train("di el color del gato es rojo user assistant " * 9, 300, special=[IM_START, "<|im_end|>"])
    answer = f"es {TOLD['color'][seed % 6]}"
    chat = [{"role": "user", "content": "di el color del gato"}, {"role": "assistant", "content": answer}]
    ids, learned = map(np.array, encode(tokenizer, chat))
    said, shown = tokenizer.decode(ids[learned].tolist()), [tokenizer.decode([int(i)]) for i in ids]
    boxed = "".join(f"[{token}]" if mine else token for token, mine in zip(shown, learned))

    def picture(path):
        turns = np.array_split(np.arange(len(ids)), np.flatnonzero(ids == ids[0])[1:])
        with figure(path, size=(7, 1.9)) as axes:
            for row, turn in enumerate(turns):
                colours = [COLOURS[1] if learned[i] else "grey" for i in turn]
                draw_tokens(axes, -row, [shown[i] for i in turn], colours)
            title = f"{learned.sum()} of a conversation's {len(ids)} tokens are learned: the answer, and that it ends"
            axes.set(title=title, ylim=(0.6 - len(turns), 0.6))
            axes.set_axis_off()

    says = f"{learned.sum()} of {len(ids)} tokens have a loss: {said!r}"
    right = float(said == f"{answer}<|im_end|>")
    return Finding(right, says, least=1, picture=picture, lines=(*boxed.strip().splitlines(),))


# ----------------------------------------------------------------------------------------------- RLHF

MISSING = Finding(None, "not measured here: python rlhf.py --seeds 3")


def more(virtue, picture=None):
    """How much more of a virtue greedy answers have after tuning than before: the least of PPO, DPO and GRPO, as a mean
    over seeds.
    """
    found = stored("rlhf")
    if found is None:
        return MISSING
    values = {shown: [one[virtue] for one in of] for shown, of in rows(found["runs"]).items()}
    before = values["instruct, greedy"]
    gains = [mean(values[f"{name}, greedy"]) - mean(before) for name in ("PPO", "DPO", "GRPO")]
    lines = [f"{found['command']}: {found['machine']}, seeds {', '.join(map(str, found['seeds']))}"]
    lines += [f"{shown:20} {spread(of)}" for shown, of in values.items()]
    says = f"{virtue}, greedily: {spread(before)} before, PPO {spread(values['PPO, greedy'])}"
    return Finding(min(gains), says, least=0.01, picture=picture, lines=lines)


def feedback_makes_answers_more_useful(seed=0):
    """RLHF makes the answers more useful: a reward model learns from comparisons, and the model from its rewards."""
    return more("useful", "rlhf.png")


def feedback_makes_answers_more_honest(seed=0):
    """RLHF makes the answers more honest, where that is what the annotators prefer."""
    return more("honest")


def feedback_makes_answers_safer(seed=0):
    """RLHF makes the answers safer."""
    return more("safe")


def a_reward_model_learns_what_is_preferred(seed=0):
    """The reward model is right about most pairs of answers to questions that it never saw."""
    if (found := stored("rlhf")) is None:
        return MISSING
    values = [run["reward_model_accuracy"] for run in found["runs"]]
    return Finding(min(values), f"right about {shares(values)} of the pairs that differ in worth", least=0.7)


def tuned_answers_win(seed=0):
    """The tuned model's greedy answers win more often than greedy ones before, over sampled ones of the same length."""
    if (found := stored("rlhf")) is None:
        return MISSING
    key, of = "win_rate_at_matched_length", rows(found["runs"])
    wins = {name: [one[key] for one in of[f"{name}, greedy"]] for name in ("PPO", "DPO", "GRPO")}
    least = min(mean(values) for values in wins.values())
    says = ", ".join(f"{name} {shares(values)}" for name, values in wins.items())
    before = [one[key] for one in of["instruct, greedy"]]
    return Finding(least - mean(before), f"at matched length {says}, before tuning {shares(before)}", least=0.005)
