"""Proceso de entrenamiento: pre-entrenamiento, from plain text to a language model.

Self-supervised learning (the slide's "semi-supervisado") needs no labels: the text is its own answer. With
the causal objective the model continues it, and every token is the target of those before it; with the masked
one (BERT, Devlin et al. 2019) some tokens are hidden, and the model, which sees both sides, fills the gaps.

    python train.py                                     Python's own documentation, three minutes
    python train.py --data book.txt --minutes 10 --out runs/book
    python train.py --resume runs/book                  go on after an interruption
    mpiexec -n 4 python train.py --batch 32             in four processes, here or on several machines
    python model.py --load runs/book --prompt "Once"    let it continue a text
    python finetune.py --init runs/book                 make an assistant of it

The text is in three parts: one to train on; one for validation, of which at most 32 evenly spaced windows choose the
step whose weights are kept; and one for the test, which chooses nothing and is read only when a run ends, with those
weights. It may be larger than memory: its tokens are in a file, and batches are windows of that.

A run writes one folder: a checkpoint in the published format (config.json, model.safetensors, tokenizer.json) with the
weights of the lowest validation loss; training.safetensors, the last weights, to go on from; tokens.bin; metrics.jsonl;
loss.png.
"""

import math
import operator
import os
from dataclasses import dataclass, replace
from functools import partial

import bpe
import checkpoint
import model
from engine import cli, corpus, np, ranks, rows_of, runs, xp
from engine.backend import MICRO_BATCHES, TOKENS_AT_ONCE
from engine.cli import option
from layers import IGNORE, dropout
from moe import adjust_bias
from mtp import term as mtp_term
from optim import Optimizer, clip, qk_clip, warm_up_and_decay

SPECIAL = ("<|endoftext|>", "<mask>")  # the first ids of the vocabulary
END, MASK = 0, 1

# ------------------------------------------------------------------------------------------ objectives


def causal(tokens, starts, context, rng, vocab_size):
    """Continue the text: the target of each token is the next. Returns inputs, targets (batch, context)."""
    windows = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def masked(tokens, starts, context, rng, vocab_size):
    """Fill the gaps: 15 % of the tokens are targets; of these 80 % are hidden behind MASK, 10 % replaced by any token
    and 10 % left. MASK never comes in real text, so a model that only saw MASK at its targets would learn nothing about
    real tokens; thus some of its targets are real tokens, right or wrong (Devlin et al. 2019, section 3.1).

    Returns inputs, targets (batch, context); targets are IGNORE where nothing is asked.
    """
    targets = tokens[starts[:, None] + np.arange(context)].astype(np.int64)
    inputs = targets.copy()
    chosen, kind = rng.random(targets.shape) < 0.15, rng.random(targets.shape)
    inputs[chosen & (kind < 0.8)] = MASK
    anything = chosen & (kind >= 0.9)
    inputs[anything] = rng.integers(len(SPECIAL), vocab_size, int(anything.sum()))
    targets[~chosen] = IGNORE
    return inputs, targets


OBJECTIVES = {"causal": causal, "masked": masked}


def windows(tokens, objective, context, size, rng, vocab_size):
    """A batch from anywhere in a text: inputs and targets, (size, context)."""
    starts = rng.integers(0, len(tokens) - context, size)
    return OBJECTIVES[objective](tokens, starts, context, rng, vocab_size)


def windows_of(tokens, context, objective, vocab_size):
    """A whole text in windows of the context, each token once: inputs, targets (windows, context)."""
    length = len(tokens) - (objective == "causal")  # the last token has no next
    whole = OBJECTIVES[objective](tokens, np.zeros(1, int), length, np.random.default_rng(0), vocab_size)
    return [corpus.rows(array[0], context, fill) for array, fill in zip(whole, (0, IGNORE))]


# -------------------------------------------------------------------------------------------- gradient

# what the layers observe, over the parts of a batch
COMBINE = {"max_logits": xp.maximum, "load": operator.add, "balance": operator.add}


def together(one, other):
    """The loss of two parts of a batch, and what the layers observed in them: (loss, {layer: {name: array}}) each."""
    (loss, observed), (more, new) = one, other
    join = lambda seen, also: {name: COMBINE[name](seen[name], value) for name, value in also.items()}
    return loss + more, {layer: join(observed[layer], also) for layer, also in new.items()}


def gradient(
    params, config, batch, micro_batch=None, parallel_map=map, aux=0.0, mtp=0.0, observe=True, drop=0.0, seed=(0,)
):
    """Loss and gradient of a batch, computed `micro_batch` sequences at a time (gradient accumulation): the same as in
    one piece. Small pieces stay in the cache, and threads can share them (parallel_map: that of a pool). Their sum is
    taken in order, so it does not depend on the threads. Of several processes each computes its share of the sum.

    batch: inputs, targets and documents or None, (batch, time), see model.loss. aux, mtp: weights of the routers'
    load-balancing loss and of the cross-entropy of the token after the next. observe: even where neither needs it.
    drop: the rate of dropout, which draws what a row loses from (*seed, the row's number).
    Returns the mean cross-entropy in nats, a dict of gradients, and what the layers observed: {layer: {"max_logits":
    (heads,), "load": (experts,)}}.
    """
    tokens, targets, _ = batch
    micro_batch = micro_batch or len(tokens)
    count, later = (max(1, int((asked != IGNORE).sum())) for asked in (targets, targets[:, 1:]))  # of the whole batch

    def part(rows):
        observed = {} if observe or mtp or config.experts else None
        inputs, answers, apart = rows_of(batch, rows)
        around = {"documents": apart, "observe": observed, "balance": aux * len(inputs) / len(tokens)}
        if drop:
            rngs = [np.random.default_rng((*seed, row)) for row in range(rows.start, rows.stop)]
            around["dropout"] = partial(dropout, rate=drop, rngs=rngs)
        terms = [mtp_term(mtp, later, **around)] if mtp else []
        loss, backward = model.loss(params, config, inputs, answers, terms, count, **around)
        loss = observed.pop("losses")["cross_entropy"] if observed else loss
        return loss, backward(), observed or {}

    parts = iter(parallel_map(part, ranks.pieces(len(tokens), micro_batch)))
    loss, grads, observed = next(parts)
    for part_loss, part_grads, part_observed in parts:
        for name, g in part_grads.items():
            grads[name] += g
        loss, observed = together((loss, observed), (part_loss, part_observed))
    return loss, grads, observed


def mean_loss(params, config, rows, micro_batch=4, parallel_map=map):
    """The mean cross-entropy over all targets in nats. rows: inputs, targets and documents or None, (n, context)."""
    count = max(1, int((rows[1] != IGNORE).sum()))

    def part(some):
        inputs, targets, documents = rows_of(rows, some)
        return model.loss(params, config, inputs, targets, count=count, documents=documents)[0]

    return ranks.combined(sum(parallel_map(part, ranks.pieces(len(rows[1]), micro_batch))), operator.add)


def evaluate(task, part, mean_loss):
    """The loss on "val" or "test", as metrics.jsonl has it. mean_loss: a function of rows."""
    rows, tokens_per_byte = task.held_out[part]
    loss = mean_loss(rows)
    bits = {f"{part}_bits_per_byte": loss / math.log(2) * tokens_per_byte} if tokens_per_byte else {}
    return {f"{part}_loss": loss} | bits


def balance(params, observed, bias_update, threshold):
    """What changes weights beside the gradient: the bias of routers that have one, and QK-clip."""
    layers = model.by_layer(params)
    for layer, seen in observed.items():
        bias = layers[layer]["mlp"].get("gate.e_score_correction_bias")
        if bias is not None:
            adjust_bias(bias, seen["load"], bias_update)
        if threshold:
            qk_clip(layers[layer]["self_attn"], seen["max_logits"], threshold)


class Learner:
    """The weights of a run, and what is done with them. Each process of a run (engine/ranks.py) has them all, and does
    its share of the work; one that is alone does all of it.
    """

    def __init__(self, parallel_map, settings, config, params, merge, optimizer):
        self.map, self.settings, self.config, self.params, self.merge = parallel_map, settings, config, params, merge
        self.optimizer, s = ranks.Shared(optimizer), settings
        self.micro_batch = s.micro_batch or max(1, min(TOKENS_AT_ONCE // s.context, s.batch // MICRO_BATCHES))
        runs.keep_freed_memory()

    def gradient(self, step, batch, drop):
        """Finds the gradient of a batch, clipped. Returns the loss, what the layers observed, and the norm before."""
        s, (weights, backward) = self.settings, self.merge(self.params)
        how = self.micro_batch, self.map, s.aux_loss, s.mtp, s.qk_clip, drop, (s.seed, step)
        loss, grads, observed = gradient(weights, self.config, batch, *how)
        self.grads = ranks.total(backward(grads))
        return *ranks.combined((loss, observed), together), clip(self.grads)

    def update(self, observed, schedule):
        """A step of the optimiser, along the gradient that was found."""
        self.optimizer.step(self.params, self.grads, schedule, self.map)
        balance(self.params, observed, self.settings.bias_update, self.settings.qk_clip)

    def state(self):
        return self.optimizer.state()

    def mean_loss(self, rows, weights=None):
        """The mean loss of rows, with these weights or the present ones."""
        weights = weights or self.merge(self.params)[0]
        return mean_loss(weights, self.config, rows, self.micro_batch, self.map)


# ----------------------------------------------------------------------------------- settings and loop

existing = lambda folder: os.path.abspath(checkpoint.existing(folder))


@dataclass(frozen=True)
class Training:
    """How a model is trained, whatever it learns from."""

    data: list | None = option(None, "text files, UTF-8; none: Python's own documentation", **cli.FILES)
    init: str | None = option(None, "checkpoint to go on from, not a new model", metavar="DIR", convert=existing)
    minutes: float | None = option(
        None, "time for preparations and training; 3, to fine-tune 1, if no --steps", least=0
    )
    steps: int | None = option(None, "number of steps, which makes a run repeatable", least=1)
    context: int | None = option(None, "tokens the model sees at once; 256, or fewer with --init", least=2)
    batch: int = option(8, "sequences a step", least=1)
    micro_batch: int | None = option(None, "of them at once; on a CPU a quarter, but at most 1024 tokens", least=1)
    aux_loss: float = option(0.001, "weight of the routers' load-balancing loss", least=0)
    bias_update: float = option(0.001, "step of a router's bias towards an even load, where it has one", least=0)
    mtp: float = option(0.0, "weight of predicting the token after the next (0.3 in DeepSeek V3)", least=0)
    optimizer: str = option("muon", "Muon for matrices and AdamW for the rest, or AdamW", choices=["muon", "adamw"])
    qk_clip: float | None = option(None, "largest attention logit of a head (100 in Kimi K2)", least=0)
    lr: float | None = option(None, "largest learning rate; 0.01, or with --init 0.003, less for a wide model", least=0)
    dropout: float = option(0.2, "highest rate of dropout; a reading of the data adds 0.02", least=0, most=0.9)
    weight_decay: float = option(0.1, "each step takes learning rate × this share off a weight", least=0)
    threads: int | None = option(None, "threads of a process; as many as it has cores if not given", least=1)
    save_seconds: float = option(30.0, "time between checkpoints", least=0)
    seed: int = option(0, "of the first weights and the order of the text", least=0)


def train(task, run):
    """Trains to the end and writes the run's folder. Returns the last line of metrics.jsonl, with the test's result.

    task: params, config, tokenizer; rows, how many there are to learn from; batch(step) -> inputs, targets, documents;
    held_out, {"val" and "test": ((inputs, targets, documents), tokens a byte or None)}; merge(params) -> (weights,
    backward), where other arrays are trained than the weights; sample, test_text, tested and talk, for people. run: an
    engine.runs.Run, of time and folder.
    """
    s, params, config = run.settings, task.params, task.config
    optimizer = Optimizer(s.optimizer, s.lr, s.weight_decay)

    def save(weights, notes):
        task.tokenizer.save(run.folder, **task.tokenizer_notes)
        model.save(run.folder, weights, config, notes)

    def validate():
        weights, _ = task.merge(params)
        return run.keep_if_best(evaluate(task, "val", learner.mean_loss), weights)

    run.begin(params, optimizer, task.merge(params)[0], save)
    with ranks.everywhere(Learner, s.threads, s, config, params, task.merge, optimizer) as learner:
        size = sum(w.size for w in params.values())
        print(f"model      {config.model_type} of {size:,} parameters, on {ranks.crew(s.threads)}, in {run.folder}")
        with run.watched(learner.state):
            if run.step == 0:
                run.first(validate())
            while not run.finished:
                batch = task.batch(run.step)
                drop = min(s.dropout, 0.02 * (run.step * s.batch // task.rows))  # grows as the data is read again
                loss, observed, norm = learner.gradient(run.step, batch, drop)
                run.save_if_due(loss + norm, f"at step {run.step + 1}")  # weights that just gave a finite loss
                learner.update(observed, warm_up_and_decay(run.fraction_done(run.step + 0.5)))
                run.count(loss, batch[0].size)
                if run.due > run.validated:
                    run.log(validate(), task.sample)
                elif run.step % 10 == 0:
                    run.log()
            if run.step > run.saved_step:
                run.save_if_due(run.line["val_loss"], f"after step {run.step}", last=True)
        final = run.result(lambda: evaluate(task, "test", lambda rows: learner.mean_loss(rows, run.best["weights"])))
    runs.report(run, final, task)
    return final


# ------------------------------------------------------------------------------------- at the beginning


def complete(s, minutes=3.0):
    """The settings, checked, with a value for each that has none. minutes: of a run without a number of steps."""
    known = checkpoint.read_config(s.init)[0] if s.init and None in (s.context, s.lr) else None
    # SmolLM2-135M, of width 576, was tuned on questions for 15 steps. With 0.0003 its loss on others was the lowest
    # (3.01 nats a token; with 0.001 3.08, with 0.003 3.60), and it forgot the least: its loss on Shakespeare rose by
    # 0.02 (0.24, 1.39). A small model takes 0.003.
    values = {
        "minutes": minutes if s.steps is None else None,
        "context": min(256, known.max_position_embeddings) if known else 256,
        "lr": round(0.003 * min(1.0, (128 / known.hidden_size) ** 1.5), 6) if known else 0.01,
    }
    s = replace(s, **{name: value for name, value in values.items() if getattr(s, name) is None})
    cli.check(s)
    if s.batch < ranks.count():
        raise ValueError(f"--batch {s.batch} is too small for {ranks.count()} processes to share")
    return s


def check_clip(s, config):
    if s.qk_clip and config.has_qk_norm():
        raise ValueError(f"--qk-clip is not for a {config.model_type}, whose queries and keys are normalised already")


def begun(folder, s, is_causal=True):
    """Params, config and tokenizer to go on with. ValueError where they cannot be trained as the settings say."""
    params, config = model.load(folder, mapped=False)
    window = config.max_position_embeddings
    if s.context > window:
        raise ValueError(f"--context {s.context} is more than the {window} tokens that {folder} sees at once")
    if config.causal != is_causal:
        kind = "to continue a text" if config.causal else "to fill gaps"
        raise ValueError(f"the model in {folder} was trained {kind}, and goes on with that only")
    if s.mtp and not config.num_nextn_predict_layers:
        raise ValueError(f"the model in {folder} has no layer for --mtp")
    check_clip(s, config)
    params = {name: xp.array(w, order="C") for name, w in params.items()}  # laid out as a new model's
    return params, config, bpe.load(os.path.join(folder, "tokenizer.json"))


if __name__ == "__main__":
    from lab.pretrain import main

    cli.run(lambda: ranks.lead(main))
