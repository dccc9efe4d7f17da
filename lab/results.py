"""Long experiments: what they store under results/, and the tables that RESULTS.md shows of it."""

import json
import os
import platform
import tempfile

from architectures import ARCHITECTURES, costs
from engine.files import read_text, write_text
from engine.threads import cores
from lab.claims import RESULTS, ROOT, spread, stored
from lab.pretrain import pretrain


def machine():
    """The machine in words."""
    lines = read_text("/proc/cpuinfo").splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def store(name, result):
    os.makedirs(RESULTS, exist_ok=True)
    write_text(os.path.join(RESULTS, f"{name}.json"), json.dumps(result, indent=1) + "\n")


def measure_architectures(steps, seed, **sizes):
    """A small sibling of each of the six, trained on Python's documentation: results/architectures.json."""
    runs = {}
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            last = pretrain({"arch": name, "steps": steps, "seed": seed, "out": os.path.join(folder, "run")} | sizes)
            logged = [json.loads(line) for line in read_text(os.path.join(folder, "run", "metrics.jsonl")).splitlines()]
            config = json.loads(read_text(os.path.join(folder, "run", "config.json")))
        losses = [[line["step"], line["seconds"], line["val_loss"]] for line in logged if "val_loss" in line]
        size = last.get("parameters") or sizes_of(config)
        runs[name] = {"parameters": size[0], "active": size[1], "losses": losses} | {
            key: last[key] for key in ("test_loss", "test_bits_per_byte")
        }
    command = f"python lecture.py --measure architectures --steps {steps}" + (f" --seed {seed}" if seed else "")
    store("architectures", {"command": command, "machine": machine(), "seed": seed, "steps": steps, "runs": runs})
    print("results/architectures.json")
