"""The experiment behind `python rlhf.py`: the whole chain in seconds, a human who goes on, and what is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bpe
import model
import rlhf
from lab import feedback, pretrain

ROOT = Path(__file__).parents[2]


ALWAYS = "reward_model_accuracy", "reward_model_accuracy_noisy", "answer_length"
MEASURED = """seconds win_rate win_rate_95 win_rate_noticeable win_rate_at_matched_length win_rate_at_matched_length_95
    matched_answers kl answer_length true_reward proxy_reward""".split()


def test_the_penalty_is_a_tenth_at_the_target_and_grows():
    assert feedback.kl_control(8.0) == feedback.kl_control(3.0, 3.0) == pytest.approx(0.1)
    assert feedback.kl_control(0.0) < 0.002 and feedback.kl_control(16.0) > 5


def test_the_accuracy_of_a_reward_model(monkeypatch):
    length = lambda params, config, inputs, targets: ((targets >= 0).sum(axis=1), None)  # which likes what is long
    monkeypatch.setattr(rlhf, "rewards", length)
    comparisons = [([1], [[2], [3, 4]], [(1, 0)]), ([5], [[6], [7, 8], [9, 9, 9]], [(0, 1), (2, 0), (2, 1)])]
    assert feedback.accuracy_of(None, None, comparisons) == (0.75, 4)
    assert feedback.accuracy_of(None, None, [([1], [[2], [3]], [])]) == (None, 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlhf") / "base"
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "vocab": 300, "batch": 4, "steps": 3, "context": 160}
    path = folder.parent / "text.txt"
    path.write_text("What does it do? Return the name of the file.\n" * 400)
    pretrain.pretrain(sizes | {"data": [str(path)], "out": str(folder)})
    return folder


def command(*arguments):
    environment = {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "rlhf.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=200)


def test_the_whole_chain_in_seconds(base, tmp_path, capsys):
    feedback.main(["--init", str(base), "--out", str(tmp_path / "out"), "--minutes", "0.1"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 <= summary["reward_model_accuracy"] <= 1 and 0 <= summary["reward_model_accuracy_noisy"] <= 1
    assert list(summary["methods"]) == ["ppo", "dpo", "grpo"]
    assert summary.keys() == {*ALWAYS, "methods", "over_optimisation"} and summary["over_optimisation"]
    assert all(point.keys() == {"kl", "proxy_reward", "true_reward"} for point in summary["over_optimisation"])
    for name, method in summary["methods"].items():
        low, high = method["win_rate_95"]
        assert 0 <= low <= method["win_rate"] <= high <= 1 and method["seconds"] > 0 and method["answer_length"] >= 1
        assert method.keys() == {*MEASURED} | ({"sampling_share"} if name != "dpo" else set())
        assert name == "dpo" or 0 < method["sampling_share"] < 1
        params, config = model.load(tmp_path / "out" / name)
        assert "score.weight" not in params
    assert (tmp_path / "out" / "overoptimisation.png").stat().st_size > 1000
    assert "talk to one" in capsys.readouterr().out


def test_a_human_is_asked_and_an_interrupted_session_goes_on(base, tmp_path, capsys, monkeypatch):
    def session(keys):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        feedback.main(["--human", "--init", str(base), "--out", str(tmp_path / "out"), "--minutes", "0.05"])
        return [json.loads(line) for line in path.read_text().splitlines()]

    path = tmp_path / "out" / "comparisons.jsonl"
    made = session("1x2=")  # and the input ends; x is no answer
    assert [c["chosen"] for c in made] == [0, 1, None]
    assert all(len(c["answers"]) == len(c["tokens"]) == 2 for c in made)
    assert "learned from 2 comparisons" in capsys.readouterr().out
    with path.open("a") as file:
        file.write('{"question": "cut off')
    again = session("2q")
    assert again[:3] == made and len(again) == 4 and len({c["question"] for c in again}) == 4
    model.load(tmp_path / "out" / "human")
    assert bpe.load(tmp_path / "out" / "human" / "tokenizer.json").special


@pytest.mark.parametrize("bad", [["--minutes", "0"], ["--init", "nowhere"], ["--threads", "0"], ["--seed", "-1"]])
def test_bad_input_is_one_sentence(bad, tmp_path):
    done = command(*bad, "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(base, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = command("--init", base, "--out", tmp_path)
    assert done.returncode == 1 and "holds something already" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]
