"""lab/reasoning.py and what it hands over to: what is tested on is new and the same for all, a short run is whole."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gradcheck import close
from hypothesis import given, settings
from hypothesis import strategies as st

import cot
import model
from engine import xp
from lab import controls, reasoning, thinking

ROOT = str(Path(__file__).parents[2])
# with a stand-in for CuPy, where there is one
PATHS = os.pathsep.join([ROOT, f"{ROOT}/tests", os.environ.get("PYTHONPATH", "")])
README = Path(ROOT, "README.md").read_text(encoding="utf-8")
RESULTS = Path(ROOT, "results", "cot.json")


def essence(task, question):
    """What a question asks to compute, from its text alone, without names and the order of who swaps."""
    if task == "permutations":
        moves, row = question[:-1].split(": ")
        return row, *("".join(sorted(move)) for move in moves.split(" "))
    return tuple(re.findall(r"has (\d+)|(finds \d+|loses \d+|doubles|halves)", question))


@pytest.mark.parametrize("task", cot.TASKS)
@pytest.mark.parametrize("harder", [0, 1])
def test_no_computation_is_for_training_and_for_tests(task, harder):
    difficulty = cot.TASKS[task][1][harder]
    exam = controls.exam(task, difficulty, 40)
    rng = np.random.default_rng(0)
    trained = {essence(task, cot.practice(task, difficulty, rng).question) for _ in range(3000)}
    asked = {essence(task, problem.question) for problem in exam}
    assert len(asked) == len(exam) >= (40 if harder else 2)
    assert not trained & asked
    assert controls.exam(task, difficulty, 40) == exam  # the same for every model
    if harder:
        draws = [cot.TASKS[task][0](difficulty, np.random.default_rng(seed)) for seed in range(3000)]
        share = np.mean(list(map(cot.held_out, draws)))
        assert 0.05 < share < 0.15


def test_chance_is_the_likeliest_answer_by_enumeration():
    ends = Counter()
    for moves in itertools.product(itertools.combinations(range(5), 2), repeat=4):
        row = list(range(5))
        for i, j in moves:
            row[i], row[j] = row[j], row[i]
        ends[tuple(row)] += 1
    assert controls.chance("permutations", 4) == pytest.approx(max(ends.values()) / 10**4)
    assert controls.chance("permutations", 1) == pytest.approx(1 / 10)
    # an even number of swaps reaches half of the 120 rows
    assert controls.chance("permutations", 60) == pytest.approx(1 / 60)

    def ends_of(total, length):
        if length == 0:
            return Counter({total: 1.0})
        moves, ends = cot.changes(total), Counter()
        for _, after in moves:
            for end, probability in ends_of(after, length - 1).items():
                ends[end] += probability / len(moves)
        return ends

    likeliest = [max(ends_of(start, 3).values()) for start in range(1, 11)]
    assert controls.chance("stories", 3) == pytest.approx(np.mean(likeliest))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 24), st.integers(0, 2**32), st.integers(1, 5))
def test_haste_leaves_steps_out_and_no_more(length, seed, most):
    problem = cot.permutations(length, np.random.default_rng(seed))
    hasty = thinking.in_haste(problem, np.random.default_rng(seed), most)
    assert hasty.question == problem.question and hasty.answer == problem.answer
    places = [problem.steps.index(step) for step in hasty.steps]
    jumps = np.diff([-1, *places])
    assert places[-1] == len(problem.steps) - 1 and min(jumps) >= 1 and max(jumps) <= most


# --- a run of seconds ---


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cot")
    code = "import programs, sys; from lab import reasoning; programs.small_chains(); reasoning.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--steps", "10", "--seeds", "1", "--out", str(folder / "out")],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_short_experiment_writes_what_it_promises(outcome):
    folder, printed = outcome
    summary = json.loads((folder / "out" / "seed-0" / "summary.json").read_text())
    assert list(summary["tasks"]) == ["permutations", "stories"]
    ways = {"permutations": ["direct", "direct_deep", "filler", "cot"], "stories": ["direct", "cot"]}
    for task, table in summary["tasks"].items():
        assert table["difficulty"] == [1, 2] and task in printed
        assert table["chance"] == [controls.chance(task, difficulty) for difficulty in table["difficulty"]]
        assert all(tokens > 0 for tokens in table["tokens_cot"] + table["tokens_direct"])
        for way in ways[task]:
            assert len(table[way]) == len(table[f"{way}_95"]) == len(table["difficulty"])
            assert all(low <= value <= high for value, (low, high) in zip(table[way], table[f"{way}_95"]))
    for way in "direct", "direct_deep", "filler":
        curve = summary["learning_curves"][f"permutations-{way}"]
        last = round(10 * controls.MODELS[f"permutations-{way}"][3])
        assert curve["steps"] == list(range(1, last + 1)) and len(curve["accuracy"]["2"]) == last
    for name in "before", "after", "rejection_sampling", "more_supervision":
        low, high = summary["grpo"][f"{name}_95"]
        assert 0 <= low <= summary["grpo"][name] <= high <= 1
    budget = summary["thinking_budget"]
    assert [len(curve) for curve in budget["accuracy"]] == [len(budget["budget"])] * len(budget["difficulty"])
    assert len(budget["needed"]) == len(budget["difficulty"])
    for name, ways in {"many_ways": ["majority", "likelihood", "verifier"], "one_way": ["majority"]}.items():
        found = summary["many_chains"][name]
        assert found["n"] == [1, 2, 4, 8, 16, 32] and 0 <= found["greedy"] <= 1
        assert all(len(found[way]) == len(found["tokens"]) == 6 for way in ways)
        assert found["tokens"][5] == pytest.approx(32 * found["tokens"][0])
    for name in "cot", "thinking_budget", "many_chains":
        assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000


def test_seeds_are_gathered(outcome, tmp_path, monkeypatch, capsys):
    folder, printed = outcome
    run = json.loads((folder / "out" / "seed-0" / "summary.json").read_text())
    results = json.loads((folder / "results" / "cot.json").read_text())
    assert results["seeds"] == [0] and results["command"] == "python cot.py --seeds 1"
    assert reasoning.markdown(results["runs"]) in printed and results["runs"] == [run]
    other = json.loads(json.dumps(run)) | {"seed": 1}
    run["tasks"]["permutations"]["cot"][1], other["tasks"]["permutations"]["cot"][1] = 1.0, 0.5
    monkeypatch.chdir(tmp_path)
    reasoning.gathered([run, other])
    results = json.loads((tmp_path / "results" / "cot.json").read_text())
    assert results["seeds"] == [0, 1] and results["runs"] == [run, other]
    assert "75 (50 to 100)" in capsys.readouterr().out


@given(
    st.lists(
        st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.lists(st.floats(0, 1), min_size=2, max_size=2)}),
        min_size=1,
    )
)
def test_one_summary_of_several(summaries):
    found = reasoning.over(max, summaries)
    assert found == {"a": max(s["a"] for s in summaries), "b": [max(s["b"][i] for s in summaries) for i in (0, 1)]}


@pytest.mark.parametrize("config", [cot.CONFIG, cot.DEEP])
def test_a_deeper_model_begins_with_what_a_shallow_one_computes(config):
    params, tokens = model.init(cot.CONFIG, 1), xp.arange(24).reshape(2, 12)
    deep = controls.deepened(params, config, 2)
    assert {name: w.shape for name, w in deep.items()} == {name: w.shape for name, w in model.init(config).items()}
    (shallow, _), (deeper, _) = model.forward(params, cot.CONFIG, tokens), model.forward(deep, config, tokens)
    close(deeper, shallow, 1e-5)
    _, backward = model.loss(deep, config, tokens, tokens)
    assert all(g.any() for name, g in backward().items() if name.endswith(("o_proj.weight", "down_proj.weight")))
    for w in deep.values():  # which is trained in place
        w *= 2
    close(model.forward(params, cot.CONFIG, tokens)[0], shallow, 0)


def test_the_digits_do_not_depend_on_the_number_of_threads(outcome, tmp_path):
    folder, _ = outcome
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        if hasattr(os, "sched_setaffinity")
        else ""
    )
    code += "import programs\nfrom engine.threads import thread_pool\nfrom lab import controls\n"
    code += "programs.small_chains()\n"
    code += f"with thread_pool(1) as pool:\n    controls.learned({str(tmp_path)!r}, 'stories-cot', 10, 0, 4)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True
    )
    alone, beside = (model.load(path)[0] for path in (tmp_path / "stories-cot", folder / "out/seed-0/stories-cot"))
    assert all((alone[name] == beside[name]).all() for name in alone)


def test_the_models_of_an_experiment_can_be_asked(outcome):
    folder = outcome[0] / "out" / "seed-0"
    for name in ["grpo", "permutations-hasty", *controls.MODELS]:
        params, config = model.load(folder / name)
        assert config.eos_token_id == cot.END and sum(w.size for w in params.values()) > 1000
    with pytest.raises(ValueError, match="chat"):
        reasoning.main(["--load", str(folder / "grpo"), "--question", "Why?"])


# --- what stands in results/ and in the README ---


def test_the_table_in_the_readme_is_that_of_the_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert reasoning.markdown(results["runs"]) in README and results["command"] in README


def test_steps_reach_what_no_control_does():
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    low, high = (reasoning.over(function, runs)["tasks"]["permutations"] for function in (min, max))
    others = [max(high[way][i] for way in ("direct", "direct_deep", "filler")) for i in range(len(low["cot"]))]
    assert any(steps >= 0.95 and other < 0.5 for steps, other in zip(low["cot"], others))


def test_many_chains_pick_as_they_say(monkeypatch):
    """With 32 chains of which each fourth is right and all others differ, by hand."""
    problem = cot.permutations(1, np.random.default_rng(0))
    ids = lambda answer: cot.TOKENIZER.encode(f"\n#{answer}") + [cot.END]
    chains = [ids(problem.answer) if i % 4 == 0 else ids(f"wrong {i}") for i in range(32)]

    def draw(params, config, problems, way, temperature=0.0, n=1, rng=None, parallel_map=map):
        return [chains if n == 32 else chains[1:2]]  # the likeliest one is wrong

    monkeypatch.setattr(thinking, "sample", draw)
    likes = {"model": lambda i: -i, "verifier": lambda i: float(i % 4 == 0)}
    verdicts = lambda who, config, problems, some, parallel_map: np.array([[likes[who](i) for i in range(32)]])
    monkeypatch.setattr(cot, "verdicts", verdicts)
    found = thinking.many_chains("model", "verifier", [problem], 1.0, None)
    assert found["majority"] == [0.25, 0.5, 1, 1, 1, 1]  # ties go to the first
    assert found["likelihood"] == [0.25, 0.5, 1, 1, 1, 1] and found["verifier"] == [0.25, 0.5, 1, 1, 1, 1]
    assert found["greedy"] == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--load", "somewhere"], "--load and --question go together"),
        (["--question", "Why?"], "--load and --question go together"),
        (["--load", "nowhere", "--question", "Why?"], "nowhere"),
        (["--init", "nowhere"], "--init and --reinforce go together"),
        (["--init", "nowhere", "--reinforce", "sums.jsonl"], "nowhere"),
        (["--steps", "0"], "--steps must be at least 10"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)) as error:
        reasoning.main(arguments)
    assert "\n" not in str(error.value)


def test_ctrl_c_is_heard_in_the_middle_of_a_phase(tmp_path):
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # even if the tests themselves do not
    arguments = [os.path.join(ROOT, "cot.py"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=hear)
    try:
        while not (tmp_path / "out").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)  # both threads are training by now
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and err == b""
