"""Long experiments: what they store under results/, and the tables that RESULTS.md shows of it."""

import json
import os
import tempfile

import checkpoint
from architectures import ARCHITECTURES, costs
from engine.files import read_text, write_text
from lab import feedback
from lab.claims import shares
from lab.claims.reasoning import rows_of
from lab.pretrain import pretrain
from lab.results import spread, store, stored


def measure_architectures(steps, seed, **sizes):
    """A small sibling of each of the six, trained on Python's documentation for a minute, or so many steps:
    results/architectures.json. sizes: of the siblings, as options of train.py.
    """
    runs, limit = {}, {"steps": steps} if steps else {"minutes": 1.0}
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as parent:
            folder = os.path.join(parent, "run")
            last = pretrain({"arch": name, "seed": seed, "out": folder} | limit | sizes)
            logged = [json.loads(line) for line in read_text(os.path.join(folder, "metrics.jsonl")).splitlines()]
            cost = costs(checkpoint.read_config(folder)[0])
        losses = [[line["step"], line["seconds"], line["val_loss"]] for line in logged if "val_loss" in line]
        tested = {key: last[key] for key in ("test_loss", "test_bits_per_byte")}
        runs[name] = {"parameters": cost["parameters"], "active": cost["active"], "losses": losses} | tested
    command = "python lecture.py --measure architectures" + "".join(
        f" --{name} {value}" for name, value in (("steps", steps), ("seed", seed)) if value
    )
    store("architectures", command, [{"seed": seed, "architectures": runs}])


def table(head, rows):
    """Rows of cells as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def of_architectures(found):
    head = "--arch", "parameters", "used a token", "seconds", "loss, nats a token", "bits per byte of the test text"
    rows = []
    for name, run in found["runs"][0]["architectures"].items():
        sizes = f"{run['parameters']:,}", f"{run['active']:,}", f"{run['losses'][-1][1]:.0f}"
        rows.append((name, *sizes, f"{run['test_loss']:.3f}", f"{run['test_bits_per_byte']:.3f}"))
    return table(head, rows)


def of_rlhf(found):
    columns = {key: "{:.2f}" for key in ("useful", "honest", "safe", "true_reward")}
    columns |= {"win_rate": "{:.0%}", "win_rate_at_matched_length": "{:.0%}", "kl": "{:.1f}"}
    cells = lambda runs: [spread([run.get(key) for run in runs], form) for key, form in columns.items()]
    head = "", *(key.replace("_", " ") for key in columns)
    return table(head, [(shown, *cells(runs)) for shown, runs in feedback.rows(found["runs"]).items()])


def of_cot(found):
    parts = []
    for task in found["runs"][0]["tasks"]:
        rows, difficulty = rows_of(task, found)
        cells = [(way, *(shares(values) for values in zip(*runs))) for way, runs in rows.items()]
        parts.append(table((f"{task}, of difficulty", *difficulty), cells))
    return "\n\n".join(parts)


TABLES = {
    "architectures": ("The six, trained on the same text", of_architectures),
    "rlhf": ("Human feedback", of_rlhf),
    "cot": ("Steps before the answer", of_cot),
}


def text():
    """What RESULTS.md says, from what is stored."""
    parts = ["# Long results", "What takes longer than a reader waits: each table with its command, seeds and machine."]
    for name, (title, of) in TABLES.items():
        if found := stored(name):
            seeds = ", ".join(map(str, found["seeds"]))
            told = f"`{found['command']}`, seeds {seeds}, on {found['machine']}: [the file](results/{name}.json)."
            parts += [f"## {title}", told, of(found)]
    parts.append("Speeds and memory beside other libraries: [benchmarks/README.md](benchmarks/README.md).")
    return "\n\n".join(parts) + "\n"


def write():
    """Writes RESULTS.md."""
    write_text("RESULTS.md", text())
    print("RESULTS.md")
