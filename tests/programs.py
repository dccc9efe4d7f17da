"""Command lines, run as programs of their own, and what they leave; an experiment at the size of a test."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cot
import model
from engine import to_numpy
from lab import controls, thinking

ROOT = Path(__file__).parents[1]
CONFIG = model.Config(
    model_type="llama",
    tie_word_embeddings=True,
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=16,
)
BASE = dataclasses.replace(CONFIG, vocab_size=270, max_position_embeddings=64, eos_token_id=0)

SMALL = ["--layers", "1", "--hidden", "16", "--heads", "2", "--kv-heads", "1", "--context", "16"]
SMALL += ["--vocab", "270", "--batch", "4", "--threads", "2"]
BY_HEART = ["--steps", "200", "--hidden", "64", "--vocab", "258", "--batch", "16", "--lr", "0.03"]


def command(*arguments, script="train.py", **options):
    options |= {"env": {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    program = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finished(*arguments, script="train.py"):
    process = command(*arguments, script=script)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def weights(folder):
    params, _ = model.load(folder)
    return {name: to_numpy(value).tobytes() for name, value in params.items()}


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 60
    while max(steps_logged(folder), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def small_chains(setattr=setattr):
    """Makes the experiment of cot.py one of seconds: problems of one and two steps, and models of one layer."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = dataclasses.replace(cot.CONFIG, num_hidden_layers=1, head_dim=8, **sizes)
    configs = {cot.CONFIG: small, cot.DEEP: dataclasses.replace(small, num_hidden_layers=2)}
    of_models = {name: (*how[:2], configs[how[2]], *how[3:]) for name, how in controls.MODELS.items()}
    setattr(controls, "MODELS", of_models)
    setattr(thinking, "CONFIG", small)
    setattr(cot, "CONFIG", small)
    setattr(cot, "TASKS", {task: (draw, [1, 2]) for task, (draw, _) in cot.TASKS.items()})
