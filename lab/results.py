"""Results that take longer than a reader waits: stored under results/, with the command, seeds and machine that they
come from.
"""

import json
import os
import platform

import numpy as np

from engine.files import read_object, replace, write_text
from engine.threads import cores

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "results")


def machine():
    """What it was measured on, a text."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
            name = names[0] if names else name
    return f"{cores()} cores, {name}, Python {platform.python_version()}, NumPy {np.__version__}"


def store(name, command, runs):
    """Writes results/NAME.json where the program is run. runs: the summaries of some seeds, {"seed", …} each."""
    stored = {"command": command, "machine": machine(), "seeds": [run["seed"] for run in runs], "runs": runs}
    os.makedirs("results", exist_ok=True)
    path = os.path.join("results", f"{name}.json")
    replace(path, lambda new: write_text(new, json.dumps(stored, indent=1) + "\n"))
    print(f"\nstored: {path}")


def stored(name):
    """What the repository has of it, or None."""
    path = os.path.join(FOLDER, f"{name}.json")
    return read_object(path) if os.path.exists(path) else None


def mean(values):
    """Of the values that are there, or None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def percent(value):
    return "none" if value is None else f"{value:.0%}"


def spread(values, form="{:.2f}"):
    """The mean and, of several, the range: "0.52 (0.50-0.55)"."""
    values = [value for value in values if value is not None]
    if not values:
        return "none"
    shown = form.format(mean(values))
    return shown if len(values) == 1 else f"{shown} ({form.format(min(values))}-{form.format(max(values))})"
