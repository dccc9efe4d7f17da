"""Runs: a folder for each, its metrics, what going on after an interruption takes, and time, signals and progress.

training.safetensors   the last weights and the optimiser's state, the settings, and how far the run had come
metrics.jsonl          a line each time it logs
tokens.bin             the tokens of a text, see engine/tokens.py
loss.png               the loss of the steps
"""

import bz2
import ctypes
import gzip
import hashlib
import itertools
import json
import lzma
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

from engine import cli, files, np, ranks, safetensors, to_numpy, tokens, xp
from engine.figure import figure
from engine.files import refuse

VALIDATIONS = 20  # in a run; at each fifth of them, but not at the end, it shows what the model writes
FLEXIBLE = {"minutes", "steps", "threads", "save_seconds"}  # may change when a run is resumed


@dataclass
class Place:
    """Where a run is, on a command line."""

    out: str | None = cli.option(None, "folder of the run; a new one under runs/ if not given", metavar="DIR")
    resume: str | None = cli.option(None, "go on with the run in DIR, or in --out", metavar="DIR", nargs="?", const="")


class Run:
    """A run: its folder, its settings and its time, and how far it has come.

    program: the script it is a run of. kind: the dataclass of its settings, among them init, minutes, steps and
    save_seconds. complete(settings) -> settings: finds the values of those that have none. given: {name: value} of a
    command line's settings and places. ValueError or OSError, with one sentence, where nothing can be begun with them.
    """

    def __init__(self, program, kind, complete, given):
        self.began, self.program, self.progress = time.perf_counter(), program, {"step": 0, "seconds": 0.0}
        given = dict(given)
        out, resume = given.pop("out", None), given.pop("resume", None)
        self.folder, self.resumed = resume or out, resume is not None
        if self.resumed:
            refuse(not self.folder, "--resume needs the folder of a run")
            two = out and os.path.abspath(self.folder) != os.path.abspath(out)
            refuse(two, f"--resume {resume} and --out {out} are two folders, and a run has one")
            self.progress, settings = read_progress(self.folder, kind)
            for name in sorted(given.keys() - FLEXIBLE):
                changed = given[name] != getattr(settings, name)
                refuse(changed, f"--{name.replace('_', '-')} cannot change in the middle of a run")
            if {"minutes", "steps"} & given.keys():  # a new limit takes the place of the old one
                settings = replace(settings, minutes=None, steps=None)
            self.settings = complete(replace(settings, **given))
        else:
            self.settings = complete(kind(**given))
            taken = out and not is_free(out)
            refuse(taken, f"{out} holds something already: name another --out, or go on with --resume {out}")
        self.step, self.best, self.saved_best = self.progress["step"], {"step": 0, "val_loss": math.inf}, None
        self.start = self.folder if self.resumed else self.settings.init  # a checkpoint, or None

    def check_data(self, traits):
        """ValueError where the data, known by an iterable of bytes, are not what the run began with."""
        digest = hashlib.sha256()
        for some in traits:
            digest.update(some)
        self.fingerprint = digest.hexdigest()
        same = self.progress.get("data", self.fingerprint) == self.fingerprint
        refuse(not same, f"the data is not what the run in {self.folder} began with")

    def make_folder(self):
        """The folder of the run, which is made where it is not there yet."""
        self.folder = self.folder or new_folder()
        os.makedirs(self.folder, exist_ok=True)
        return self.folder

    def begin(self, params, optimizer, weights, save_weights):
        """Makes the folder; where the run is resumed, puts the last weights and the optimiser's state in place.

        params, optimizer: what is trained, {name: array}, and its optimiser, with state and steps. weights: those that
        the model begins with. save_weights(weights, notes): writes a checkpoint.
        """
        self.params, self.save_weights = params, save_weights
        if self.resumed:
            self.best = best_in(self.folder) | {"weights": {name: w.copy() for name, w in weights.items()}}
            self.saved_best, optimizer.steps = self.best["step"], self.step
            load_training(self.folder, params, optimizer.state)
        self.make_folder()
        self.prepared = self.progress.get("prepared", self.seconds())
        self.reach(self.step)
        self.validated = min(self.due, VALIDATIONS - 1)  # the end is always validated
        self.metrics, path = [], os.path.join(self.folder, "metrics.jsonl")
        if os.path.exists(path):  # going on from a step forgets what came after it
            with open(path, encoding="utf-8") as file:
                whole = [json.loads(line) for line in file if line.endswith("}\n")]  # a last one may be cut off
            self.metrics = [line for line in whole if line["step"] <= self.step]
        lines = "".join(json.dumps(line) + "\n" for line in self.metrics)
        files.replace(path, lambda new: files.write_text(new, lines))
        self.line, self.losses, self.tokens = {"step": self.step, "seconds": self.seconds()}, [], 0
        self.saved_step, self.saved_at, self.logged_at = self.step, time.perf_counter(), self.seconds()
        self.over = self.finished  # before the first step of this time

    def seconds(self):
        return self.progress["seconds"] + time.perf_counter() - self.began

    def fraction_done(self, step):
        """How much of the training is behind us, of its steps or of the time that the preparations left: 1 or more at
        the end. The preparations of a resumed run count as training.
        """
        by_steps = step / self.settings.steps if self.settings.steps else 0.0
        if self.settings.minutes is None:
            return by_steps
        left = max(60 * self.settings.minutes - self.prepared, 1e-9)
        return max(by_steps, (self.seconds() - self.prepared) / left)

    def reach(self, step):
        """Notes how far the run is after a number of steps; there is always a first one."""
        self.step, self.done = step, min(1.0, self.fraction_done(step)) if step else 0.0
        self.finished, self.due = self.done == 1, int(VALIDATIONS * self.done)

    @contextmanager
    def watched(self, state):
        """As long as it lasts there is a progress bar, and a first Ctrl-C or termination is only noted, so that no step
        is cut in two; a second one does what it always does. state: a function, of the optimiser's state to save.
        """

        def note(number, frame):
            self.interrupted.append(number)
            signal.signal(number, before[number])

        if self.over:
            print(f"the run in {self.folder} is finished, after {self.step:,} steps: more --minutes or --steps go on")
        self.state, self.interrupted, form = state, [], "{percentage:3.0f}%|{bar}| {elapsed} < {remaining}{postfix}"
        before = {number: signal.signal(number, note) for number in ranks.SIGNALS}
        try:
            with tqdm(total=1.0, initial=self.done, bar_format=form, disable=None) as self.bar:
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def keep_if_best(self, line, weights):
        """Keeps the weights if their validation loss is lower than any before. Returns the validation's line."""
        if line["val_loss"] < self.best["val_loss"]:
            self.best = {"step": self.step, "val_loss": line["val_loss"]}
            self.best["weights"] = {name: w.copy() for name, w in weights.items()}
        return line

    def first(self, line):
        """Says and saves what the run begins with; line: of the first validation."""
        refuse(not math.isfinite(line["val_loss"]), "the loss of the model to begin with is not finite")
        print(f"start      {line['val_loss']:.3f} nats a token of the validation part", flush=True)
        self.save()

    def count(self, loss, tokens):
        """Counts a step: its loss, and the tokens it was computed from."""
        self.reach(self.step + 1)
        self.tokens, self.counted_at = self.tokens + tokens, self.seconds()
        self.losses.append(loss)
        self.bar.update(self.done - self.bar.n)

    def log(self, more=None, sample=None):
        """Writes a line of metrics.jsonl, with the mean loss since the one before; the last is written by `result`.

        more: what a validation adds to it. sample(step) -> text: what the model writes, shown three times a run.
        """
        loss, speed = float(np.mean(self.losses)), self.tokens / (self.counted_at - self.logged_at)
        self.line = {"step": self.step, "seconds": self.counted_at, "train_loss": loss, "tokens_per_second": speed}
        self.line |= more or {}
        self.bar.set_postfix_str(f"step {self.step}, loss {loss:.3f}, {speed:,.0f} tokens/s")
        if self.due // 5 > self.validated // 5 and not self.finished:
            losses = f"loss {loss:.3f}, validation {more['val_loss']:.3f}"
            self.bar.write(f"step {self.step}: {losses}, {speed:,.0f} tokens/s\n{sample(self.step)}\n")
        if not self.finished:
            self.write(self.line)
        self.validated, self.tokens, self.losses, self.logged_at = self.due, 0, [], self.seconds()

    def result(self, test):
        """The last line of metrics.jsonl: where the run ended, and test(), asked for if it is not there yet."""
        if not (self.over and self.metrics and "test_loss" in self.metrics[-1]):
            self.write(self.line | test())
        return self.metrics[-1]

    def write(self, line):
        self.metrics.append({name: round(value, 6) for name, value in line.items()})
        with open(os.path.join(self.folder, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(self.metrics[-1]) + "\n")

    def save(self):
        """The best weights, if they are new, and then the last, in this order: if it is killed in between, going on
        from the older last weights finds the same best ones.
        """
        if self.saved_best != self.best["step"]:
            notes = {name: json.dumps(self.best[name]) for name in ("step", "val_loss")}
            self.save_weights(self.best["weights"], notes)
            self.saved_best = self.best["step"]
        progress = {"step": self.step, "seconds": self.seconds(), "prepared": self.prepared}
        progress |= {"settings": asdict(self.settings), "data": self.fingerprint}
        save_training(self.folder, self.params, self.state(), progress)
        self.saved_step, self.saved_at = self.step, time.perf_counter()

    def save_if_due(self, loss, when, last=False):
        """Saves every so many seconds, at the end, and where somebody interrupts, which ends the program.
        ValueError for a loss that is not finite: only weights that gave a finite one are saved.
        """
        kept = f"{self.folder} keeps the checkpoint of step {self.saved_step}"
        refuse(not math.isfinite(loss), f"the loss is not finite {when}; {kept}")
        if last or self.interrupted or time.perf_counter() - self.saved_at > self.settings.save_seconds:
            self.save()
        if self.interrupted:
            self.bar.close()
            print(f"stopped and saved at step {self.step}; go on with: python {self.program} --resume {self.folder}")
            sys.exit(128 + self.interrupted[0])


# ------------------------------------------------------------------------------------------------------ folders


def new_folder():
    """Makes runs/1, or the first number after it that is free; of two programs that ask at once, each has its own."""
    os.makedirs("runs", exist_ok=True)
    for number in itertools.count(1):
        with suppress(FileExistsError):
            os.mkdir(folder := os.path.join("runs", str(number)))
            return folder


def is_free(folder):
    """Whether a new run may write there: there is nothing, or only what a run left that ended before its first save."""
    if not os.path.isdir(folder):
        return not os.path.exists(folder)
    names = {name for name in os.listdir(folder) if not name.endswith(".new")} - {tokens.NAME}  # see files.replace
    began = "metrics.jsonl" in names and os.path.getsize(os.path.join(folder, "metrics.jsonl")) == 0
    return not names or began and "training.safetensors" not in names


def save_training(folder, params, state, progress):
    """training.safetensors, with all that resuming needs: one file, so that it is whole or not there."""
    arrays = {f"params/{name}": to_numpy(value) for name, value in params.items()}
    arrays |= {f"state/{key}/{name}": to_numpy(value) for name, of in state.items() for key, value in of.items()}
    safetensors.write(os.path.join(folder, "training.safetensors"), arrays, {"progress": json.dumps(progress)})


def load_training(folder, params, state):
    """Puts the saved weights into params and the optimiser's state, {name: {key: array}}, into `state`, in place.
    ValueError for a file of another model.
    """
    path = os.path.join(folder, "training.safetensors")
    arrays = safetensors.read(path)
    for full, value in arrays.items():
        kind, _, name = full.rpartition("/")
        fits = name in params and params[name].shape == value.shape and (kind == "params" or kind[:6] == "state/")
        refuse(not fits, f"{path} is damaged: {full[:100]} fits no weight of the model beside it")
        if kind == "params":
            params[name][...] = xp.asarray(value)
        else:
            state.setdefault(name, {})[kind[6:]] = xp.array(value)
    for name in params:
        refuse(f"params/{name}" not in arrays, f"{path} is damaged: it has no {name}")


def read_progress(folder, kind):
    """How far the run in a folder had come, as save_training was given it, and its settings, a dataclass `kind`.
    ValueError for what no run with such settings wrote.
    """
    path = os.path.join(folder, "training.safetensors")
    refuse(not os.path.exists(path), f"{folder} holds no run to go on with")
    known = kind.__dataclass_fields__.keys()
    try:
        progress = json.loads(safetensors.metadata(path)["progress"])
        given = {name: value for name, value in progress["settings"].items() if value is not None}
        numbers = [progress[name] for name in ("step", "seconds", "prepared")]
        good = type(numbers[0]) is int and all(0 <= number < math.inf for number in numbers)
        good = good and isinstance(progress["data"], str) and {"minutes", "steps"} & given.keys()
        cli.check(settings := kind(**{name: given[name] for name in given.keys() & known}))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        good = False
    refuse(not good, f"{path} is damaged: its header does not say how far a run had come")
    for name in sorted(given.keys() - known):
        raise ValueError(f"the run in {folder} has a setting {name!r:.60}, which this program does not know")
    return progress, settings


def best_in(folder):
    """The step and the validation loss of the weights that a run's folder holds."""
    try:
        notes = safetensors.metadata(os.path.join(folder, "model.safetensors"))
        return {"step": int(notes["step"]), "val_loss": float(notes["val_loss"])}
    except (KeyError, TypeError, ValueError):  # written by something else: any validation is better
        return {"step": -1, "val_loss": math.inf}


# ------------------------------------------------------------------------------------------ process and its end


def keep_freed_memory():
    """Asks the C library to keep the memory of freed arrays for the next ones, in one arena for all threads. By default
    glibc gives large arrays back to the system, and the page faults of the next ones take up to a sixth of a training
    step; and each thread has an arena, whose free memory no other can use: up to half of a long context's.
    """
    with suppress(OSError, AttributeError):  # another C library
        set_to = ctypes.CDLL("libc.so.6").mallopt
        set_to(-8, 1)  # M_ARENA_MAX
        set_to(-1, 2**30)  # M_TRIM_THRESHOLD
        set_to(-3, 2**30) or set_to(-3, 2**25)  # M_MMAP_THRESHOLD: 32 MiB is the most that an older glibc takes


def report(run, final, task):
    """Prints the result (for a text, beside what compressors need for it), and draws the loss curve.

    final: the last line of the run's metrics. task: test_text, the bytes of the test part, or None; tested, of which of
    it the test was; talk, options of model.py.
    """
    best, last = run.best, next((line for line in reversed(run.metrics) if "val_loss" in line), None)
    print(f"\nweights of step {best['step']:,} of {run.step:,}, which had the lowest validation loss")
    if last and last["val_loss"] > 1.01 * best["val_loss"]:
        rise = f"from {best['val_loss']:.3f} to {last['val_loss']:.3f} nats a token"
        print(f"then it rose, {rise}: this is too little to learn from for so much training")
    print(f"test, which chose nothing: {final['test_loss']:.3f} nats a token{task.tested}")
    if "test_bits_per_byte" in final:
        print("bits per byte of it (the compressors begin with nothing, the model has read the training text):")
        text = task.test_text
        packed = {"xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME), "bz2": bz2.compress(text, 9)}
        packed["gzip"] = gzip.compress(text, 9)
        bits = {name: 8 * len(some) / len(text) for name, some in packed.items()}
        for name, value in {"this model": final["test_bits_per_byte"], **bits}.items():
            print(f"  {name:12}{value:6.3f}")
    draw(run.metrics, picture := os.path.join(run.folder, "loss.png"), best["step"])
    print(f"loss curve: {picture}\ntalk to it: python model.py --load {run.folder} {task.talk}")


def draw(lines, path, best_step):
    """The loss of a run against its steps, and the step whose weights are kept."""
    curve = lambda name: np.reshape([(line["step"], line[name]) for line in lines if name in line], (-1, 2)).T
    with figure(path) as axes:
        axes.plot(*curve("train_loss"), label="training")
        axes.plot(*curve("val_loss"), "o-", markersize=4, label="validation")
        axes.plot(best_step, lines[-1]["test_loss"], "*", markersize=12, label="test")
        axes.axvline(best_step, color="grey", linewidth=0.8, linestyle=":", label="weights kept")
        axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training")
