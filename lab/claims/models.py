"""LLMs, their types, and the six architectures: what a model does, what an open one is, and what it weighs."""

import os
import tempfile
from dataclasses import replace

import checkpoint
import model
from architectures import ARCHITECTURES, costs, sibling
from engine import np, xp
from engine.figure import COLOURS, figure
from lab.claims import Finding, tiny
from lab.results import mean, stored
from optim import Optimizer

SIZES = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "feed_forward": 64, "context": 24}


def small(name="llama3.2", seed=0, **others):
    config = replace(sibling(name, 100, **SIZES), **others)
    return model.init(config, seed), config


def a_model_is_autoregressive(seed=0):
    """An LLM is a transformer that works token by token: what it says next depends on what came before, and on nothing
    later."""
    (params, config), rng, changed = small(seed=seed), np.random.default_rng(seed), 0.0
    tokens = rng.integers(0, 100, (1, 20))
    logits, _ = model.forward(params, config, xp.asarray(tokens))
    for at in range(1, 20):
        other = tokens.copy()
        other[0, at:] = rng.integers(0, 100, 20 - at)
        changed = max(changed, float(abs(model.forward(params, config, xp.asarray(other))[0] - logits)[:, :at].max()))
    return Finding(changed, f"other tokens later change the earlier logits by {tiny(changed)}", most=1e-5)


def the_window_holds_prompt_and_answer(seed=0):
    """The context window is shared by the prompt and the answer: what one takes, the other lacks."""
    params, config = small(seed=seed)
    window, prompt, fits = config.max_position_embeddings, 5 + seed % 5, 0
    for length in range(window, 0, -1):
        try:
            fits = len([*model.generate(params, config, range(1, prompt + 1), length, stop=[])])
            break
        except ValueError:  # the prompt and an answer of this length do not fit
            pass

    def picture(path):
        with figure(path, size=(7, 1.5)) as axes:
            for start, size, name, colour, hatch in (
                (0, prompt, "prompt", COLOURS[0], ""),
                (prompt, fits, "answer", COLOURS[4], "//"),
            ):
                axes.barh(0, size, left=start, color=colour, alpha=0.4, hatch=hatch, edgecolor="white")
                axes.text(start + size / 2, 0, f"{name}, {size} tokens", ha="center", va="center")
            axes.set(title=f"A context window of {window} tokens: prompt + answer", xlim=(0, window))
            axes.set_axis_off()

    return Finding(
        prompt + fits - window, f"{prompt} of the prompt + at most {fits} of the answer = {window}", 0, 0, picture
    )


def an_open_model_is_a_folder(seed=0):
    """Of an open model architecture and weights are public: a folder gives the same model to anybody who loads it."""
    params, config = small("qwen3", seed)
    tokens = xp.asarray(np.random.default_rng(seed).integers(0, 100, (2, 12)))
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, params, config)
        files = {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
        loaded, same = model.load(folder)
    error = float(abs(model.forward(params, config, tokens)[0] - model.forward(loaded, same, tokens)[0]).max())
    lines = [f"{name:20} {size:9,} bytes" for name, size in files.items()]
    return Finding(error, f"loaded, it computes logits that differ by {tiny(error)}", most=1e-6, lines=lines)


def an_open_model_can_be_tuned(seed=0, steps=30):
    """Who has the weights can fine-tune them, which nobody can with a model behind an API."""
    params, config = small("qwen3", seed)
    tokens = xp.asarray(np.random.default_rng(seed).integers(0, 100, (4, 13)))
    before, optimizer = None, Optimizer("adamw", 0.01)
    for _ in range(steps):
        loss, backward = model.loss(params, config, tokens[:, :-1], tokens[:, 1:])
        before = loss if before is None else before
        optimizer.step(params, backward())
    return Finding(before - loss, f"the loss on a text falls from {before:.2f} to {loss:.2f} nats", least=1)


def a_large_model_needs_machines_of_its_own(seed=0):
    """To run an open model takes resources of one's own: its weights have to fit into memory."""
    bytes_of = {name: 2 * costs(config)["parameters"] / 2**30 for name, config in ARCHITECTURES.items()}
    fitting = [name for name, size in bytes_of.items() if size <= 16]

    def picture(path):
        with figure(path, size=(7.5, 2.8)) as axes:
            names = [f"{name}: {size:,.1f} GiB" for name, size in bytes_of.items()]
            axes.barh(names, [*bytes_of.values()], color="C0", alpha=0.7)
            axes.axvline(16, color="C1", linestyle="--")
            axes.text(18, 1, "a laptop of 16 GiB", color="C1", va="center", fontsize=9)
            axes.set(title="Three of the six fit into a laptop", xscale="log", xlim=(1, 4000), ylim=(5.5, -0.6))
            axes.set(xlabel="memory of the weights in bfloat16, GiB")

    largest = max(bytes_of.values())
    says = f"{', '.join(fitting)} fit into 16 GiB; the largest takes {largest:,.0f} GiB"
    return Finding(largest / 16, says, least=10, picture=picture)


def the_six_use_what_they_need(seed=0):
    """Of the six the largest hold up to a trillion parameters and compute each token with a few per cent of them."""
    rows = {name: costs(config) for name, config in ARCHITECTURES.items()}
    share = rows["kimi-k2"]["active"] / rows["kimi-k2"]["parameters"]
    lines = [f"{'':12}{'parameters':>20}{'used a token':>18}{'operations a token':>20}"]
    for name, row in rows.items():
        lines.append(f"{name:12}{row['parameters']:20,}{row['active']:18,}{row['forward'] / 1e9:18.1f} G")

    def picture(path):
        with figure(path, size=(7.5, 3.2)) as axes:
            for i, row in enumerate(rows.values()):
                axes.barh(i, row["parameters"], color="C5", alpha=0.6, label="in all" if not i else None)
                axes.barh(i, row["active"], 0.4, color="C0", label="used a token" if not i else None)
                axes.text(
                    row["parameters"] * 1.1, i, f"{row['active'] / row['parameters']:.0%}", va="center", fontsize=9
                )
            axes.set_yticks(range(len(rows)), rows)
            axes.set(title="The larger the model, the smaller the part that computes a token")
            axes.set(xscale="log", xlim=(5e8, 4e12), ylim=(5.6, -0.6), xlabel="parameters")

    return Finding(
        share,
        f"Kimi K2 uses {share:.1%} of {rows['kimi-k2']['parameters']:,}",
        most=0.1,
        picture=picture,
        lines=lines,
    )


def one_model_is_all_six(seed=0):
    """The six differ in sizes and in what attention and feed-forward are: one program computes them all."""
    sizes = SIZES | {"layers": 4}
    tokens = xp.asarray(np.random.default_rng(seed).integers(0, 100, (2, 12)))
    losses = {}
    for name in ARCHITECTURES:
        config = sibling(name, 100, **sizes, bos_token_id=0, eos_token_id=0, num_nextn_predict_layers=0)
        checkpoint.check(config)
        losses[name] = model.loss(model.init(config, seed), config, tokens[:, :-1], tokens[:, 1:])[0]
    error = max(abs(loss - float(np.log(100))) for loss in losses.values())
    lines = [f"{name:12} {loss:.2f} nats a token" for name, loss in losses.items()]
    return Finding(
        error, f"untrained, all six are as unsure as log 100 = 4.61 nats, to {error:.2f}", most=0.3, lines=lines
    )


def the_six_learn_from_the_same_text(seed=0):
    """Small siblings of the six learn from the same text: in a minute the dense ones get further, as experts are more
    weights to learn.
    """
    if (found := stored("architectures")) is None:
        return Finding(None, "not measured here: python lecture.py --measure architectures")
    runs = found["runs"][0]["architectures"]
    tested = {dense: [run["test_loss"] for run in runs.values() if (run["active"] == run["parameters"]) is dense]
              for dense in (True, False)}  # fmt: skip
    lines = [f"{found['command']}: {found['machine']}"]
    for name, run in runs.items():
        size = f"{run['parameters']:10,} parameters, {run['losses'][-1][0]:5} steps"
        lines.append(f"{name:12} {size}, {run['test_loss']:.3f} nats a token of the test text")

    def picture(path):
        with figure(path, size=(7.5, 3.6)) as axes:
            for name, run in runs.items():
                _, seconds, losses = zip(*run["losses"])
                axes.plot(seconds, losses, label=name)
            axes.set(title="Siblings of the six on the same text: in a minute dense ones get further")
            axes.set(xlabel="seconds of training", ylabel="validation loss, nats a token")

    says = f"dense {mean(tested[True]):.2f}, with experts {mean(tested[False]):.2f} nats a token, on average"
    return Finding(mean(tested[False]) - mean(tested[True]), says, least=0.05, picture=picture, lines=lines)
