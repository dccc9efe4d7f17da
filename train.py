"""Proceso de entrenamiento: pre-entrenamiento y fine tuning, from plain text to a language model that converses.

Self-supervised learning (the slide's "semi-supervisado") needs no labels: the text is its own answer. With
the causal objective the model continues it, and every token is the target of those before it; with the masked
one (BERT, Devlin et al. 2019) some tokens are hidden, and the model, which sees both sides, fills the gaps.
Fine-tuning goes on from there with conversations (chat.py): the same loss, on what the assistant says.

    python train.py                                     Python's own documentation, three minutes
    python train.py --data book.txt --minutes 10 --out runs/book
    python train.py --resume runs/book                  go on after an interruption
    python model.py --load runs/book --prompt "Once"    let it continue a text
    python train.py --finetune --init runs/book         make an assistant of it; --finetune CHAT.jsonl for your own
    python model.py --load runs/2 --chat                talk to it

The text is in three parts: one to train on; one for validation, which chooses the step whose weights are kept; and one
for the test, which chooses nothing and is read once, with those weights, at the end.

A run writes one folder: a checkpoint in the published format (config.json, model.safetensors, tokenizer.json) with the
weights of the lowest validation loss; training.safetensors, the last weights, to go on from; metrics.jsonl; loss.png.
"""

import bz2
import ctypes
import gzip
import hashlib
import itertools
import json
import lzma
import math
import operator
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np

import architectures
import bpe
import chat
import checkpoint
import lora
import model
import mtp
from engine import cli, corpus, safetensors, to_numpy, xp
from engine.files import replace, write_text
from engine.threads import cores, thread_pool
from layers import IGNORE
from moe import adjust_bias
from optim import Optimizer, clip, qk_clip, warm_up_and_decay

SPECIAL = ("<|endoftext|>", "<mask>")  # the first ids of the vocabulary
END, MASK = 0, 1

# ------------------------------------------------------------------------------------------ objectives


def causal(tokens, starts, context, rng, config):
    """Continue the text: the target of each token is the next. Returns inputs, targets (batch, context)."""
    windows = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def masked(tokens, starts, context, rng, config):
    """Fill the gaps: 15 % of the tokens are targets; of these 80 % are hidden behind MASK, 10 % replaced by
    any token and 10 % left. As MASK never comes in real text, the model has to have an opinion of every token,
    also of those it sees (Devlin et al. 2019, section 3.1).

    Returns inputs, targets (batch, context).
    """
    targets = tokens[starts[:, None] + np.arange(context)].astype(np.int64)
    inputs = targets.copy()
    chosen, kind = rng.random(targets.shape) < 0.15, rng.random(targets.shape)
    inputs[chosen & (kind < 0.8)] = MASK
    anything = chosen & (kind >= 0.9)
    inputs[anything] = rng.integers(len(SPECIAL), config.vocab_size, int(anything.sum()))
    targets[~chosen] = IGNORE
    return inputs, targets


OBJECTIVES = {"causal": causal, "masked": masked}

# ------------------------------------------------------------------------------- gradients over threads


def keep_freed_memory():
    """Asks the C library to keep the memory of freed arrays for the next ones. By default glibc gives large
    ones back to the system, which has to clear every page of them again: up to a sixth of a training step.
    """
    with suppress(OSError, AttributeError):  # another C library
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, 2**30)


# what the layers observe, over the parts of a batch
COMBINE = {"max_logits": xp.maximum, "load": xp.add, "balance": operator.add}


def gradient(
    params,
    config,
    tokens,
    targets,
    micro_batch=None,
    parallel_map=map,
    aux_weight=0.0,
    mtp_weight=0.0,
    observe=True,
    segments=None,
):
    """Loss and gradient of a batch, computed `micro_batch` sequences at a time: the same as in one piece.

    Small pieces stay in the cache, and threads can share them (parallel_map: that of a pool). Their sum is
    taken in order, so it does not depend on the threads. tokens, targets, segments: (batch, time), see model.losses.
    aux_weight, mtp_weight: of the load-balancing loss and of the cross-entropy of the token after the next.
    Returns the mean cross-entropy in nats, a dict of gradients, and what the layers observed, if asked for: {layer:
    {"max_logits": (heads,), "load": (experts,)}}.
    """
    micro_batch = micro_batch or len(tokens)

    counts = [max(1, int((t != IGNORE).sum())) for t in (targets, targets[:, 1:])]  # of tokens, and of those after them

    def part(start):
        rows, observed = slice(start, start + micro_batch), {} if observe else None
        own = xp.asarray(tokens[rows]), xp.asarray(targets[rows])
        around = {"documents": part_of(segments, rows), "observe": observed}
        around["balance"] = aux_weight * len(own[0]) / len(tokens)
        terms = [mtp.term(mtp_weight, counts[1], **around)] if mtp_weight else []
        loss, backward = model.loss(params, config, *own, terms, counts[0], **around)
        loss = observed.pop("losses")["cross_entropy"] if observe else loss
        return loss, backward(), observed or {}

    loss, grads, observed = 0.0, None, {}
    for part_loss, part_grads, part_observed in parallel_map(part, range(0, len(tokens), micro_batch)):
        loss += part_loss
        if grads is None:
            grads, observed = part_grads, part_observed
            continue
        for name, g in part_grads.items():
            grads[name] += g
        for layer, new in part_observed.items():
            observed[layer] = {name: COMBINE[name](observed[layer][name], value) for name, value in new.items()}
    return loss, grads, observed


def part_of(segments, rows):
    return None if segments is None else xp.asarray(segments[rows])


def mean_loss(params, config, inputs, targets, segments=None, micro_batch=4, parallel_map=map):
    """The mean cross-entropy over all targets of some rows, (rows, context) each, in nats."""
    counts = (targets != IGNORE).sum(axis=1)

    def part(start):
        rows = slice(start, start + micro_batch)
        mine = xp.asarray(inputs[rows]), xp.asarray(targets[rows])
        value, _ = model.loss(params, config, *mine, documents=part_of(segments, rows))
        return value * int(counts[rows].sum())

    return sum(parallel_map(part, range(0, len(inputs), micro_batch))) / max(1, int(counts.sum()))


def windows_of(tokens, context, objective, config):
    """A whole text, cut into windows of the context: inputs and targets (windows, context), each token once."""
    length = len(tokens) if objective == "masked" else len(tokens) - 1  # the first token is no target
    starts = np.arange(0, length, context)
    filled = np.append(tokens, np.zeros(context, tokens.dtype))  # up to the end of the last window
    inputs, targets = OBJECTIVES[objective](filled, starts, context, np.random.default_rng(0), config)
    return inputs, np.where(starts[:, None] + np.arange(context) < length, targets, IGNORE)


# ------------------------------------------------------------------------------------------------ data


def to_tokens(documents, tokenizer, config=None):
    """All documents in one array of token ids, before each the token that its tokenizer begins a text with, or
    <|endoftext|>, or the one that the model's config ends or begins a text with. ValueError where there is none.
    """
    named = [tokenizer.special.get(SPECIAL[END])]
    if config is not None:
        named += [*np.atleast_1d(config.eos_token_id).tolist(), config.bos_token_id]
    begin = tokenizer.bos or [i for i in named if i is not None][:1]
    if not begin:
        raise ValueError("neither the tokenizer nor config.json has a token that begins or ends a text")
    ids = [i for document in documents for i in (*begin, *tokenizer.encode(document))]
    return np.array(ids, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


# ----------------------------------------------------------------------------------------- checkpoints


def save_training(folder, params, optimizer, progress):
    """training.safetensors, with all that resuming needs: one file, so that it is whole or not there."""
    arrays = {f"params/{name}": to_numpy(value) for name, value in params.items()}
    for name, state in optimizer.state.items():
        arrays |= {f"state/{key}/{name}": to_numpy(value) for key, value in state.items()}
    path = os.path.join(folder, "training.safetensors")
    safetensors.write(path, arrays, {"progress": json.dumps(progress)})


def load_training(folder, params, optimizer):
    """Puts the saved weights into params and the saved state into the optimiser, in place. ValueError for a file of
    another model.
    """
    path = os.path.join(folder, "training.safetensors")
    missing = set(params)
    for full, value in safetensors.read(path).items():
        kind, _, name = full.partition("/")
        key, _, name = name.partition("/") if kind == "state" else ("", "", name)
        if kind not in ("params", "state") or name not in params or params[name].shape != value.shape:
            raise ValueError(f"{path} is damaged: {full[:100]} fits no weight of the model beside it")
        if kind == "params":
            params[name][...] = xp.asarray(value)
            missing.discard(name)
        else:
            optimizer.state.setdefault(name, {})[key] = xp.array(value)
    if missing:
        raise ValueError(f"{path} is damaged: it has no {min(missing)}")


def read_progress(folder):
    """What save_training was given: the settings, and how far the run had come. ValueError for what no run wrote."""
    path = os.path.join(folder, "training.safetensors")
    if not os.path.exists(path):
        raise ValueError(f"{folder} holds no run to go on with")
    try:
        progress = json.loads(safetensors.metadata(path)["progress"])
        settings = progress["settings"]
        counted = type(progress["step"]) is int and progress["step"] >= 0 and isinstance(progress["data"], str)
        timed = all(math.isfinite(progress[name]) for name in ("seconds", "prepared"))
        good = counted and timed and all(is_setting(name, value) for name, value in settings.items())
        good = good and COMPLETED <= settings.keys() and (settings["minutes"], settings["steps"]) != (None, None)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path} is damaged: its header does not say how far a run had come")
    return progress


def is_setting(name, value):
    """Whether a value is one that the setting may have on the command line."""
    kind, default, _ = SETTINGS[name]
    if value is None:
        return default is None and name not in COMPLETED
    if name in LISTS:
        return isinstance(value, list) and all(isinstance(path, str) for path in value)
    return type(value) in ((int, float) if kind is float else (kind,)) and value in CHOICES.get(name, [value])


# ------------------------------------------------------------------------------------------------- run


def sibling(settings, tokenizer):
    """The published architecture at the size of the settings. ValueError for sizes that do not fit each other."""
    names = "layers hidden heads kv_heads feed_forward context experts experts_per_token attention"
    sizes = {name: settings[name] for name in names.split()} | {"causal": settings["objective"] == "causal"}
    sizes |= {"num_nextn_predict_layers": int(settings["mtp"] > 0), "bos_token_id": END, "eos_token_id": END}
    config = architectures.sibling(settings["arch"], tokenizer.vocab_size, **sizes)
    checkpoint.check(config)
    return config


def is_free(folder):
    """Whether a new run may write there: there is nothing, or only what a run left that ended before its first save."""
    if not os.path.exists(folder):
        return True
    if not os.path.isdir(folder):
        return False
    names = {name for name in os.listdir(folder) if not name.endswith(".new")}  # see checkpoint.replace
    began = "metrics.jsonl" in names and os.path.getsize(os.path.join(folder, "metrics.jsonl")) == 0
    return not names or began and "training.safetensors" not in names


def check(settings):
    """Raises ValueError, with one sentence, for settings that no run can have."""
    least = {"vocab": 256 + len(SPECIAL), "context": 2}
    least |= dict.fromkeys(
        ["minutes", "lr", "weight_decay", "save_seconds", "seed", "aux_loss", "bias_update", "mtp", "qk_clip"], 0
    )
    for name, (kind, _, _) in SETTINGS.items():
        value, bound = settings[name], least.get(name, 1)
        if kind in (int, float) and value is not None and not bound <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}")
    arch = model.ARCHITECTURES[settings["arch"]]
    times = 4 if arch.kv_lora_rank else 2  # latent attention rotates half of a head
    if settings["hidden"] % (times * settings["heads"]):
        raise ValueError(f"--hidden must be a multiple of {times} times --heads, as RoPE rotates pairs")
    if settings["heads"] % settings["kv_heads"]:
        raise ValueError("--heads must be a multiple of --kv-heads")
    if settings["mtp"] and settings["objective"] != "causal":
        raise ValueError("--mtp predicts the token after the next, which only --objective causal has")
    if settings["qk_clip"] and not settings["init"] and arch.has_qk_norm():
        raise ValueError(f"--qk-clip is not for {settings['arch']}, whose normalised queries and keys bound the scores")


class Run:
    """A training run: its data, model and optimiser, and how far it has come.

    settings: as of the command line. folder: where it writes; None takes a new one under runs/. resume: go on with the
    run in the folder.
    Raises ValueError or OSError, with one sentence, for data or a folder that no run can begin or go on with;
    nothing has been written then.
    """

    def __init__(self, settings, folder, resume=False):
        self.began = time.perf_counter()
        check(settings)
        if not resume and folder and not is_free(folder):
            raise ValueError(f"{folder} holds something already: name another --out, or go on with --resume {folder}")
        progress = read_progress(folder) if resume else {"step": 0, "seconds": 0.0}
        self.settings = settings
        self.step, self.earlier_seconds = progress["step"], progress["seconds"]
        self.objective, self.context, batch = settings["objective"], settings["context"], settings["batch"]
        # about a thousand tokens at a time, in no fewer than four pieces for the threads to share
        self.micro_batch = settings["micro_batch"] or max(1, min(1024 // self.context, batch // 4))

        self.chatting, start = settings["finetune"] is not None, folder if resume else settings["init"]
        parts = corpus.conversations(settings["finetune"]) if self.chatting else corpus.texts(settings["data"])
        texts = [json.dumps(x) if self.chatting else x for part in parts for x in part]
        self.fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        if progress.get("data", self.fingerprint) != self.fingerprint:
            raise ValueError(f"the data is not what the run in {folder} began with")
        if start:
            params, self.config = model.load(start, mapped=False)
            self.params = {name: xp.array(w, order="C") for name, w in params.items()}  # laid out as a new model's
            self.tokenizer = bpe.load(os.path.join(start, "tokenizer.json"))
            check_start(settings, self.config, start)
        else:
            self.tokenizer = bpe.train(parts[0], settings["vocab"], special=SPECIAL)
            self.config = sibling(settings, self.tokenizer)
            self.params = model.init(self.config, settings["seed"])
        self.read_conversations(*parts) if self.chatting else self.read_texts(*parts)
        if settings["lora"]:
            self.params |= lora.init(self.params, settings["lora"], settings["seed"])
        self.optimizer = Optimizer(settings["optimizer"], settings["lr"], settings["weight_decay"])
        self.best = {"step": 0, "val_loss": math.inf}
        if resume:
            load_training(folder, self.params, self.optimizer)
            self.optimizer.steps = self.step
            self.best = best_in(folder, params)
        self.saved_best = self.best["step"] if resume else None
        self.folder = folder or new_folder()
        self.prepared = progress.get("prepared", self.seconds())
        size, name = sum(w.size for w in self.params.values()), self.config.model_type
        print(f"model      {name} of {size:,} parameters, on {settings['threads']} threads, in {self.folder}")

    def read_texts(self, *parts):
        """Tokens to train on, in one array, and windows to validate on and to test on."""
        self.train_tokens, self.val_tokens, test_tokens = (to_tokens(p, self.tokenizer, self.config) for p in parts)
        for purpose, tokens in ("train", self.train_tokens), ("validate", self.val_tokens), ("test", test_tokens):
            if len(tokens) < self.context + 2:
                raise ValueError(f"{len(tokens)} tokens to {purpose} on are too few for a --context of {self.context}")
        sizes = [sum(len(text.encode()) for text in part) for part in parts]
        self.held_out, self.packed, self.test_text = {}, None, "\n".join(parts[2]).encode()
        for name, tokens, size in ("val", self.val_tokens, sizes[1]), ("test", test_tokens, sizes[2]):
            windows = windows_of(tokens, self.context, self.objective, self.config)
            # a gap is not all of the text
            self.held_out[name] = (*windows, None), (len(tokens) - 1) / size if self.objective == "causal" else None
        print(f"data       {sizes[0]:,} bytes to train on, {sizes[1]:,} for validation, {sizes[2]:,} for the test")
        print(f"tokenizer  {self.tokenizer.vocab_size:,} tokens, {sizes[0] / len(self.train_tokens):.2f} bytes each")

    def read_conversations(self, *parts):
        """Conversations to train on, to validate on and to test on, packed into rows of the context."""
        self.params, self.config, self.tokenizer = chat.with_chat_tokens(self.params, self.config, self.tokenizer)
        encoded = [[chat.encode(self.tokenizer, messages) for messages in part] for part in parts]
        np.random.default_rng(self.settings["seed"]).shuffle(encoded[0])
        self.packed, *held_out = (chat.pack(part, self.context) for part in encoded)
        if any((targets == IGNORE).all() for _, targets, _ in (self.packed, *held_out)):
            raise ValueError(f"no answer of the assistant begins within a --context of {self.context} tokens")
        self.held_out = {name: (rows, None) for name, rows in zip(("val", "test"), held_out)}
        self.val_chats = parts[1]
        counts = " for validation, ".join(f"{len(part):,}" for part in parts[1:])
        print(f"data       {len(parts[0]):,} conversations to train on, {counts} for the test")

    def seconds(self):
        return self.earlier_seconds + time.perf_counter() - self.began

    def fraction_done(self, step):
        """How much of the training is behind us, 0 to 1: of its steps or of the time left by the preparations."""
        by_steps = step / self.settings["steps"] if self.settings["steps"] else 0.0
        if self.settings["minutes"] is None:
            return by_steps
        left = max(60 * self.settings["minutes"] - self.prepared, 1e-9)
        return max(by_steps, (self.seconds() - self.prepared) / left)

    def batch(self):
        """The inputs, targets and segments of the next step, (batch, context): windows from anywhere in the text, or
        packed conversations, each once before any comes again.
        """
        seed, size = self.settings["seed"], self.settings["batch"]
        if self.packed is None:
            rng = np.random.default_rng((seed, self.step))
            starts = rng.integers(0, len(self.train_tokens) - self.context, size)
            return *OBJECTIVES[self.objective](self.train_tokens, starts, self.context, rng, self.config), None
        epochs, places = np.divmod(np.arange(self.step * size, (self.step + 1) * size), len(self.packed[0]))
        order = {epoch: np.random.default_rng((seed, epoch)).permutation(len(self.packed[0])) for epoch in {*epochs}}
        rows = [order[epoch][place] for epoch, place in zip(epochs, places)]
        return tuple(array[rows] for array in self.packed)

    def gradient(self, tokens, targets, segments=None, parallel_map=map):
        """Loss, gradient and observations of a batch, as of the function `gradient`."""
        weights, merge_backward = lora.merge(self.params)
        scales = self.settings["aux_loss"], self.settings["mtp"]
        observe = bool(self.config.experts or self.settings["qk_clip"] or self.settings["mtp"])
        loss, grads, observed = gradient(
            weights, self.config, tokens, targets, self.micro_batch, parallel_map, *scales, observe, segments
        )
        return loss, merge_backward(grads), observed

    def adjust(self, observed):
        """What changes weights beside the gradient: the bias of routers that have one, and QK-clip."""
        layers = model.by_layer(self.params)
        for layer, seen in observed.items():
            bias = layers[layer]["mlp"].get("gate.e_score_correction_bias")
            if bias is not None:
                adjust_bias(bias, seen["load"], self.settings["bias_update"])
            if self.settings["qk_clip"]:
                qk_clip(layers[layer]["self_attn"], seen["max_logits"], self.settings["qk_clip"])

    def evaluate(self, part, weights, windows=None, parallel_map=map):
        """The loss on "val" or "test", as metrics.jsonl has it. windows: only so many, evenly spaced; None = all."""
        arrays, tokens_per_byte = self.held_out[part]
        count = len(arrays[0])
        rows = np.linspace(0, count - 1, min(windows or count, count)).astype(int)
        rows = [array if array is None else array[rows] for array in arrays]
        loss = mean_loss(weights, self.config, *rows, self.micro_batch, parallel_map)
        bits = {f"{part}_bits_per_byte": loss / math.log(2) * tokens_per_byte} if tokens_per_byte else {}
        return {f"{part}_loss": loss} | bits

    def validate(self, parallel_map=map):
        """The validation loss, as metrics.jsonl has it; weights with a lower one than any before are kept."""
        weights = lora.merge(self.params)[0]
        line = self.evaluate("val", weights, 32, parallel_map)
        if line["val_loss"] < self.best["val_loss"]:
            kept = {name: w.copy() for name, w in weights.items()}
            self.best = {"step": self.step, "val_loss": line["val_loss"], "weights": kept}
        return line

    def save(self):
        """The best weights, if they are new, and then the last, from which the same best ones would be found again."""
        if self.saved_best != self.best["step"]:
            notes = {name: json.dumps(self.best[name]) for name in ("step", "val_loss")}
            model.save(self.folder, self.best["weights"], self.config, notes)
            self.saved_best = self.best["step"]
        progress = {"step": self.step, "seconds": self.seconds(), "prepared": self.prepared}
        progress |= {"settings": self.settings, "data": self.fingerprint}
        save_training(self.folder, self.params, self.optimizer, progress)

    def save_tokenizer(self):
        if self.chatting:
            _, end, _ = chat.chat_format(self.tokenizer)
            self.tokenizer.save(self.folder, eos_token=end, chat_template=chat.jinja(self.tokenizer))
        else:
            self.tokenizer.save(self.folder)

    def sample(self, length=64):
        """What the model makes of something held out: a text's beginning, one with gaps, or a question."""
        params, config, tokenizer = lora.merge(self.params)[0], self.config, self.tokenizer
        window = config.max_position_embeddings
        if not config.causal:
            tokens = self.val_tokens[1 : 1 + min(length, window)].astype(np.int64)
            tokens[3::7] = MASK
            return f"\n{tokenizer.decode(tokens)}\n→ {tokenizer.decode(model.fill(params, config, tokens, MASK))}\n"
        if self.chatting:
            question = list(
                itertools.takewhile(lambda m: m["role"] != "assistant", self.val_chats[self.step % len(self.val_chats)])
            )
            shown = question[-1]["content"] if question else ""  # where the assistant speaks first
            prompt, stop = chat.prompt(tokenizer, question)[-window // 2 :], None
        else:
            prompt, stop = self.val_tokens[: min(12, window // 2)].tolist(), []
            shown = tokenizer.decode(prompt[1:])
        length = min(length, window - len(prompt))
        answer = model.generate(params, config, prompt, length, temperature=0.8, top_p=0.95, stop=stop)
        ends = np.atleast_1d([] if stop == [] else config.eos_token_id)
        return f"\n{shown} … {tokenizer.decode(token for token in answer if token not in ends)}\n"


def best_in(folder, weights):
    """What a run's folder holds as its best: its weights, their step and their validation loss."""
    try:
        notes = safetensors.metadata(os.path.join(folder, "model.safetensors"))
        best = {"step": int(notes["step"]), "val_loss": float(notes["val_loss"])}
    except (KeyError, TypeError, ValueError):  # written by something else: any validation is better
        best = {"step": -1, "val_loss": math.inf}
    return best | {"weights": weights}


def check_start(settings, config, folder):
    """Raises ValueError where the model in the folder cannot be trained as the settings say."""
    window, chatting = config.max_position_embeddings, settings["finetune"] is not None
    if settings["context"] > window:
        raise ValueError(f"--context {settings['context']} is more than the {window} tokens that {folder} sees at once")
    if config.causal != (chatting or settings["objective"] == "causal"):
        kind = "to continue a text" if config.causal else "to fill gaps"
        raise ValueError(f"the model in {folder} was trained {kind}, and goes on with that only")
    if settings["mtp"] and not config.num_nextn_predict_layers:
        raise ValueError(f"the model in {folder} has no layer for --mtp")
    if settings["qk_clip"] and config.has_qk_norm():
        raise ValueError(f"--qk-clip is not for {folder}, whose normalised queries and keys bound the scores")


VALIDATIONS = 20  # in a run; at every fifth of them it shows what the model writes


def train(run):
    """Trains to the end and writes the run's folder. Returns the last line of metrics.jsonl, with the test's result."""
    from tqdm import tqdm

    os.makedirs(run.folder, exist_ok=True)
    metrics = Metrics(os.path.join(run.folder, "metrics.jsonl"), run.step)
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed} < {remaining}{postfix}"
    keep_freed_memory()
    with thread_pool(run.settings["threads"]) as pool, interruptible() as interrupted:
        if run.step == 0:
            start = run.validate(pool.map)
            if not math.isfinite(start["val_loss"]):
                raise ValueError("the loss of the model to begin with is not finite")
            print(f"start      {start['val_loss']:.3f} nats a token of the validation part", flush=True)
            run.save_tokenizer()
            run.save()
        saved_step, saved_at = run.step, time.perf_counter()
        validated = min(int(VALIDATIONS * run.fraction_done(run.step)), VALIDATIONS - 1)  # the end is always validated
        tokens_seen, losses, logged_at = 0, [], time.perf_counter()
        line = {"step": run.step, "seconds": run.seconds()}
        finished = over = run.step > 0 and run.fraction_done(run.step) >= 1
        if over:
            print(f"the run in {run.folder} is finished, after {run.step:,} steps: more --minutes or --steps go on")
        with tqdm(total=1.0, initial=min(1.0, run.fraction_done(run.step)), bar_format=bar_format, disable=None) as bar:
            while not finished:
                tokens, targets, segments = run.batch()
                loss, grads, observed = run.gradient(tokens, targets, segments, pool.map)
                norm = clip(grads)
                if not math.isfinite(loss + norm):
                    raise NotFinite(run, saved_step)
                # only weights that have just given a finite loss are saved
                if interrupted or time.perf_counter() - saved_at > run.settings["save_seconds"]:
                    run.save()
                    saved_step, saved_at = run.step, time.perf_counter()
                if interrupted:
                    bar.close()
                    print(f"stopped and saved at step {run.step}; go on with: python train.py --resume {run.folder}")
                    sys.exit(128 + interrupted[0])
                run.optimizer.step(run.params, grads, warm_up_and_decay(run.fraction_done(run.step + 0.5)), pool.map)
                run.adjust(observed)
                run.step += 1
                tokens_seen += tokens.size
                losses.append(loss)

                progress = min(1.0, run.fraction_done(run.step))
                finished, due = progress == 1, int(VALIDATIONS * progress)
                if run.step % 10 == 0 or due > validated:
                    line = logged(run, losses, tokens_seen / (time.perf_counter() - logged_at))
                    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                    bar.set_postfix_str(f"step {run.step}, loss {line['train_loss']:.3f}, {speed}")
                    if due > validated:
                        line |= run.validate(pool.map)
                        if due // 5 > validated // 5 and not finished:
                            losses_now = f"loss {line['train_loss']:.3f}, validation {line['val_loss']:.3f}"
                            bar.write(f"step {run.step}: {losses_now}, {speed}{run.sample()}")
                    if not finished:
                        metrics.write(line)
                    validated, tokens_seen, losses, logged_at = due, 0, [], time.perf_counter()
                bar.update(progress - bar.n)
        if not over:
            if not math.isfinite(line["val_loss"]):
                raise NotFinite(run, saved_step)
            run.save()
        final = metrics.lines[-1] if metrics.lines else {}
        if not over or "test_loss" not in final:
            final = line | run.evaluate("test", run.best["weights"], None, pool.map)
            metrics.write(final)
    report(run, final, metrics.lines)
    return final


class NotFinite(ValueError):
    """The loss, its gradient or the trained model is not finite."""

    def __init__(self, run, saved_step):
        super().__init__(
            f"the loss is not finite at step {run.step + 1}; {run.folder} keeps the checkpoint of step {saved_step}"
        )


def logged(run, losses, tokens_per_second):
    """A line of metrics.jsonl, before what a validation adds."""
    line = {"step": run.step, "seconds": run.seconds(), "train_loss": float(np.mean(losses))}
    return line | {"tokens_per_second": tokens_per_second}


def parsed(line):
    """A line of JSON; None for one that was cut off as it was being written."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class Metrics:
    """metrics.jsonl, a line each time the run logs. Going on from a step forgets what came after it."""

    def __init__(self, path, step):
        self.path, self.lines = path, []
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.lines = [line for line in map(parsed, file) if line and line["step"] <= step]
        replace(path, lambda new: write_text(new, "".join(json.dumps(x) + "\n" for x in self.lines)))

    def write(self, line):
        line = {name: round(value, 6) for name, value in line.items()}
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def interruptible():
    """Yields a list that is empty until Ctrl-C or a termination comes, so that no step is cut in two.

    A second one does what it always does.
    """
    came = []

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(run, final, lines):
    """The result, a text's beside what general compressors need for it, the loss curve, and what to do next."""
    best, last = run.best, next((line for line in reversed(lines) if "val_loss" in line), None)
    print(f"\nweights of step {best['step']:,} of {run.step:,}, which had the lowest validation loss")
    if last and last["val_loss"] > 1.01 * best["val_loss"]:
        rise = f"from {best['val_loss']:.3f} to {last['val_loss']:.3f} nats a token"
        print(f"then it rose, {rise}: this is too little to learn from for so much training")
    print(f"test, which chose nothing: {final['test_loss']:.3f} nats a token")
    if "test_bits_per_byte" in final:
        text = run.test_text
        ours = {"this model": final["test_bits_per_byte"]}
        squeezed = {"xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
        squeezed |= {"bz2": bz2.compress(text, 9), "gzip": gzip.compress(text, 9)}
        print("bits per byte of it (the compressors begin with nothing, the model has read the training text):")
        for name, bits in (ours | {name: 8 * len(s) / len(text) for name, s in squeezed.items()}).items():
            print(f"  {name:12}{bits:6.3f}")
    draw(lines, os.path.join(run.folder, "loss.png"), best["step"])
    print(f"loss curve: {os.path.join(run.folder, 'loss.png')}")
    prompt = "--prompt " + json.dumps("The" if run.config.causal else "The <mask> of the list")
    print(f"talk to it: python model.py --load {run.folder} {'--chat' if run.chatting else prompt}")


def draw(lines, path, best_step):
    """The loss of a run against its steps, and the step whose weights are kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for part, label, style in ("train", "training", "-"), ("val", "validation", "o-"), ("test", "test", "*"):
        points = [(line["step"], line[f"{part}_loss"]) for line in lines if f"{part}_loss" in line]
        points = points if part != "test" else [(best_step, loss) for _, loss in points[-1:]]
        axes.plot(*zip(*points), style, markersize=4 if part == "val" else 12, label=label) if points else None
    axes.axvline(best_step, color="grey", linewidth=0.8, linestyle=":", label="weights kept")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------- command line

SETTINGS = {  # option: (type, default, what it is)
    "data": (str, None, "text files, UTF-8; none: Python's own documentation"),
    "init": (str, None, "checkpoint folder to go on from, instead of a new model of the sizes below"),
    "finetune": (
        str,
        None,
        "JSONL files of conversations, to make an assistant; none: questions about Python's library",
    ),
    "lora": (int, None, "rank of low-rank adapters, which are trained instead of the weights and merged in the end"),
    "arch": (str, "qwen3", "published architecture to train a small sibling of"),
    "objective": (str, "causal", "causal: continue the text; masked: fill the gaps"),
    "minutes": (float, None, "time for preparations and training; 3, to fine-tune 1, where --steps is not given"),
    "steps": (int, None, "number of steps, which makes a run repeatable"),
    "layers": (int, 4, "number of blocks"),
    "hidden": (int, 128, "size of the hidden states"),
    "heads": (int, 2, "query heads"),
    "kv_heads": (int, 1, "key-value heads"),
    "feed_forward": (int, None, "size inside the feed-forward layer; 8/3 of --hidden if not given"),
    "vocab": (int, 1024, "tokens in the vocabulary"),
    "context": (int, None, "tokens the model sees at once; 256, or fewer with --init, if not given"),
    "batch": (int, 8, "sequences a step"),
    "micro_batch": (
        int,
        None,
        "sequences computed at once, whose gradients accumulate; about 1024 tokens if not given",
    ),
    "attention": (str, None, "of every other layer: a sliding window or a sparse pattern (default: as published)"),
    "experts": (int, 8, "experts per layer, for an --arch that has some"),
    "experts_per_token": (int, 2, "experts that compute a token"),
    "aux_loss": (float, 0.001, "weight of the routers' load-balancing loss"),
    "bias_update": (float, 0.001, "step of a router's bias towards an even load, where it has one"),
    "mtp": (float, 0.0, "weight of predicting the token after the next too (MTP; 0.3 in DeepSeek V3)"),
    "optimizer": (str, "muon", "muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all"),
    "qk_clip": (float, None, "largest attention logit of a head before its queries and keys shrink (100 in Kimi K2)"),
    "lr": (float, None, "largest learning rate; 0.01, with --init 0.003 or, for a wide model, less, if not given"),
    "weight_decay": (float, 0.1, "share of a weight lost per learning rate"),
    "threads": (int, None, "threads that share a batch; all cores if not given"),
    "save_seconds": (float, 30.0, "time between checkpoints"),
    "seed": (int, 0, "of the first weights and the order of the text"),
}
LISTS = {"data", "finetune"}
COMPLETED = {"context", "lr", "threads"}  # whose values `complete` finds where none is given
CHOICES = {"attention": ["sliding", "strided", "fixed", "bigbird"]}
CHOICES |= {"arch": list(model.ARCHITECTURES), "objective": list(OBJECTIVES), "optimizer": ["muon", "adamw"]}
SIZES = {"arch", "layers", "hidden", "heads", "kv_heads", "feed_forward", "vocab", "attention"}
SIZES |= {"experts", "experts_per_token"}
FLEXIBLE = {"minutes", "steps", "threads", "save_seconds"}  # may change when a run is resumed


def complete(given):
    """All settings: those given, as {name: value}, and the defaults of the others. ValueError where two of those given
    do not go together.
    """
    settings = {name: default for name, (_, default, _) in SETTINGS.items()} | given
    if settings["init"] and SIZES & given.keys():
        raise ValueError(f"--{min(SIZES & given.keys()).replace('_', '-')} is for a new model, and --init has one")
    chatting = settings["finetune"] is not None
    if chatting and not settings["init"]:
        raise ValueError("--finetune needs the model to begin with: --init DIR")
    if chatting and settings["data"]:
        raise ValueError("--finetune learns from conversations and --data from texts: name one of them")
    if chatting and settings["objective"] != "causal":
        raise ValueError(f"--objective {settings['objective']} is for texts, and --finetune learns to answer")
    if settings["lora"] and not settings["init"]:
        raise ValueError("--lora adapts a trained model: name it with --init DIR")
    if settings["minutes"] is None and settings["steps"] is None:
        settings["minutes"] = 1.0 if chatting else 3.0
    known = checkpoint.read_config(settings["init"])[0] if settings["init"] else None
    if settings["context"] is None:
        settings["context"] = min(256, known.max_position_embeddings) if known else 256
    if settings["lr"] is None:
        settings["lr"] = tuning_rate(known.hidden_size) if known else 0.01
    settings["threads"] = settings["threads"] or (cores() if xp is np else 1)
    return settings


def tuning_rate(hidden_size):
    """The learning rate for a trained model: 0.003 for a small one and 0.0003 at the width of SmolLM2-135M, 576.

    That model was tuned on questions for 15 steps. 0.0003 gave the lowest loss on other questions (3.01 nats a token,
    0.001 3.08, 0.003 3.60), and it forgot the least: its loss on Shakespeare rose by 0.02, 0.24 and 1.39.
    """
    return round(0.003 * min(1.0, (128 / hidden_size) ** 1.5), 6)


def new_folder():
    """Makes runs/1, or the first number after it that is free; of two programs that ask at once, each has its own."""
    os.makedirs("runs", exist_ok=True)
    for number in itertools.count(1):
        with suppress(FileExistsError):
            os.mkdir(folder := os.path.join("runs", str(number)))
            return folder


def main(argv=None):
    parser = cli.Parser(description="Train a small language model.")
    for name, (kind, default, text) in SETTINGS.items():
        shown = "" if default is None else f" (default {default})"
        files, folder = name in ("data", "finetune"), name == "init"
        shape = (
            {"choices": CHOICES[name]}
            if name in CHOICES
            else {"metavar": "FILE" if files else "DIR" if folder else "N"}
        )
        many = {"data": "+", "finetune": "*"}.get(name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs=many, help=text + shown, **shape)
    parser.add_argument("--out", metavar="DIR", help="folder of the run; a new one under runs/ if not given")
    parser.add_argument("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in DIR, or in --out")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    folder, resume = given.pop("out", None), given.pop("resume", None)
    for name in LISTS & given.keys():
        given[name] = [os.path.abspath(path) for path in given[name]]
    if "init" in given:
        given["init"] = os.path.abspath(checkpoint.existing(given["init"]))
    if resume is None:
        settings = complete(given)
    else:
        if resume and folder and os.path.abspath(resume) != os.path.abspath(folder):
            raise ValueError(f"--resume {resume} and --out {folder} are two folders, and a run has one")
        folder = resume or folder
        if not folder:
            raise ValueError("--resume needs the folder of a run")
        settings = {name: default for name, (_, default, _) in SETTINGS.items()} | read_progress(folder)["settings"]
        fixed = sorted(name for name in given if name not in FLEXIBLE and given[name] != settings[name])
        if fixed:
            raise ValueError(f"--{fixed[0].replace('_', '-')} cannot change in the middle of a run")
        settings |= given
    train(Run(settings, folder, resume is not None))


if __name__ == "__main__":
    cli.run(main)
