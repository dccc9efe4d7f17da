"""The experiment behind `python rlhf.py`: the whole chain in seconds, a human who goes on, and what is refused."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bpe
import model
import rlhf
from lab import annotator, assistant, feedback, results

ROOT = Path(__file__).parents[2]
NAMES = ["instruct", "greedy", "best_of_4", "ppo", "dpo", "grpo", "dr_grpo"]
MEASURED = """useful honest safe true_reward proxy_reward win_rate win_rate_95 win_rate_at_matched_length
    win_rate_at_matched_length_95 matched kl tokens""".split()


def test_the_penalty_is_a_tenth_at_the_target_and_grows():
    assert feedback.kl_control(4.0) == feedback.kl_control(3.0, 3.0) == pytest.approx(0.1)
    assert feedback.kl_control(0.0) < 0.002 and feedback.kl_control(8.0) > 5


def test_the_accuracy_of_a_reward_model(monkeypatch):
    length = lambda params, config, inputs, targets: ((targets >= 0).sum(axis=1), None)  # which likes what is long
    monkeypatch.setattr(rlhf, "rewards", length)
    comparisons = [([1], [[2], [3, 4]], [(1, 0)]), ([5], [[6], [7, 8], [9, 9, 9]], [(0, 1), (2, 0), (2, 1)])]
    assert feedback.accuracy_of(None, None, comparisons) == 0.75
    assert feedback.accuracy_of(None, None, [([1], [[2], [3]], [])]) is None


def test_true_comparisons_are_in_the_order_of_the_scores():
    comparisons = [([1], [[2], [3], [4]], [(0, 1), (2, 0), (1, 2)])]
    assert feedback.truly(comparisons, np.array([[1.0, 2.0, 1.0]])) == [([1], [[2], [3], [4]], [(1, 0), (1, 2)])]


def test_the_kl_of_the_best_of_n():
    assert feedback.kl_of_best(1) == 0 and feedback.kl_of_best(4) == pytest.approx(math.log(4) - 0.75)


def test_wins():
    rate, (low, high) = feedback.win_rate([1, 2, 3, 3], [0, 2, 4, 1])
    assert rate == 0.625 and low < rate < high
    assert feedback.win_rate([], []) == (None, [0.0, 1.0])
    matched = feedback.at_matched_length([[1], [1, 2, 3, 4]], [5, 6], [[[1, 1], [1]], [[9], [7]]], [[1, 2], [3, 4]])
    assert matched == ([5], [3])  # the second has none nearly as long; of the first, the nearest counts


def test_ranges():
    assert results.spread([0.5]) == "0.50" and results.spread([0.5, None, 0.7]) == "0.60 (0.50-0.70)"
    assert results.spread([None]) == "none" and results.percent(None) == "none" and results.percent(0.256) == "26%"


@pytest.fixture
def small(small_village, monkeypatch):
    """The experiment at a size of seconds."""
    make = assistant.pretrain.pretrain
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "batch": 4, "context": 128}
    monkeypatch.setattr(assistant.pretrain, "pretrain", lambda given: make(given | sizes | {"vocab": 400}))


def test_the_whole_chain_in_seconds(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    feedback.main(["--out", str(tmp_path / "out"), "--effort", "0.005", "--seeds", "1", "--seed", "3"])
    stored = json.loads((tmp_path / "results" / "rlhf.json").read_text())
    assert stored["seeds"] == [3] and stored["command"] == "python rlhf.py --seeds 1 --seed 3"
    for seed, summary in zip(stored["seeds"], stored["runs"]):
        folder = tmp_path / "out" / f"seed-{seed}"
        assert summary == json.loads((folder / "summary.json").read_text())
        assert "reward_model_accuracy" in summary and list(summary["methods"]) == NAMES
        assert summary["over_optimisation"] and list(summary["rounds"]) == ["ppo", "dpo", "grpo", "dr_grpo"]
        assert [point["n"] for point in summary["best_of_n"]] == [1, 2, 4, 8]
        for name, method in summary["methods"].items():
            tuned, besides = name in feedback.TUNED, {"entropy", "unasked"}
            assert method.keys() == {*MEASURED} | ({"sampled"} if tuned else besides if name == "instruct" else set())
            assert not tuned or method["sampled"].keys() == {*MEASURED} | besides
            virtues = [method[virtue] for virtue in annotator.VIRTUES]
            assert method["true_reward"] == pytest.approx(sum(virtues)) and all(0 <= v <= 1 for v in virtues)
            if name in feedback.TUNED:
                assert "score.weight" not in model.load(folder / name)[0]
        assert (folder / "reward_kl.png").stat().st_size > 1000
    assert "talk to one" in capsys.readouterr().out


def test_a_human_is_asked_and_an_interrupted_session_goes_on(small, tmp_path, capsys, monkeypatch):
    def session(keys):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        feedback.main(["--human", "--out", str(tmp_path / "out"), "--effort", "0.005"])
        return [json.loads(line) for line in path.read_text().splitlines()]

    path = tmp_path / "out" / "comparisons.jsonl"
    made = session("1x2=")  # and the input ends; x is no answer
    assert len(made) == 2 and all(row.keys() == {"prompt", "chosen", "rejected"} for row in made)
    assert "2 comparisons to learn from" in capsys.readouterr().out
    again = session("2q")
    assert again[:2] == made and len(again) == 3 and len({row["prompt"] for row in again}) == 3
    model.load(tmp_path / "out" / "human")
    assert bpe.load(tmp_path / "out" / "human" / "tokenizer.json").special


def command(*arguments):
    environment = {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "rlhf.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=200)


@pytest.mark.parametrize("bad", [["--effort", "0"], ["--init", "nowhere"], ["--seeds", "0"], ["--comparisons", "x"]])
def test_bad_input_is_one_sentence(bad, tmp_path):
    done = command(*bad, "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = command("--out", tmp_path)
    assert done.returncode == 1 and "holds something already" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]
