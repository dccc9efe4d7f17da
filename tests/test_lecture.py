"""The lecture's claims: each that takes a second or less, on two seeds; the index of slides; the page and the table."""

import ast
import html.parser
import inspect
import json
import re
from pathlib import Path

import pytest

import lecture
from engine import np, xp
from engine.threads import thread_pool
from lab import claims, feedback, formulas, page, results, show, tables
from lab.claims import Finding, attention, evaluation, experts, language, reasoning, tokenizer, training

ROOT = Path(__file__).parents[1]
CLAIMS = {claim: function for slide in lecture.SLIDES.values() for claim, function in slide.claims.items()}
LONG = {  # more than a second, or a small training
    "alibi_goes_on_where_learned_positions_fail",
    "a_trained_model_attends_to_what_it_needs",
    "a_text_is_its_own_answer",
    "a_gap_is_filled_from_both_sides",
    "an_instruct_model_follows_instructions",
    "programs_are_judged_by_their_tests",
    "hostile_programs_fail",
    "sparse_attention_is_faster",
    "flash_attention_needs_linear_memory",
    "more_experts_cost_a_token_no_more",
    "full_attention_is_quadratic",
    "sparse_attention_is_cheaper",
    "balancing_spreads_the_load",
    "a_larger_vocabulary_makes_shorter_texts",
}
STORED = {claim.__name__ for name in ("rlhf", "reasoning") for claim in lecture.SLIDES[name].claims}
STORED |= {"the_six_learn_from_the_same_text"}
QUICK = [claim for claim in CLAIMS if claim.__name__ not in LONG | STORED]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("claim", QUICK, ids=lambda claim: claim.__name__)
def test_quick_claims_hold(claim, seed):
    finding = claim(seed)
    assert finding.holds, f"{finding.says}: {finding.number} is not within {finding.least} and {finding.most}"
    assert abs(finding.least) < np.inf or abs(finding.most) < np.inf, "a claim that no number could refute"


SMALL = {
    tokenizer.a_larger_vocabulary_makes_shorter_texts: {"sizes": (300, 1000)},
    attention.full_attention_is_quadratic: {"sizes": (64, 128, 256)},
    attention.sparse_attention_is_cheaper: {"sizes": (256, 512, 1024)},
    experts.balancing_spreads_the_load: {},
    experts.more_experts_cost_a_token_no_more: {"counts": (2, 32), "times": 1},
}


@pytest.mark.parametrize("claim", SMALL, ids=lambda claim: claim.__name__)
def test_longer_claims_hold_at_a_small_size(claim):
    finding = claim(1, **SMALL[claim])
    assert finding.holds, finding.says


def test_claims_of_trained_models_run_at_a_small_size(monkeypatch):
    """After three steps nothing is learned yet, but everything is measured."""
    few = lambda objective, seed: language.trained.__wrapped__(objective, seed, steps=3)
    for module in attention, training:
        monkeypatch.setattr(module, "trained", few)
    whole = training.assistant.__wrapped__
    monkeypatch.setattr(training, "assistant", lambda seed: whole(seed, steps=2, tuning=2, held=2))
    with thread_pool(1) as pool:
        found = lambda claim, **sizes: pool.submit(claim, 1, **sizes).result().number
        assert 0 <= found(attention.a_trained_model_attends_to_what_it_needs) <= 1
        assert found(training.a_text_is_its_own_answer) < 1
        assert -1 <= found(training.a_gap_is_filled_from_both_sides, asked=5) <= 1
        assert found(training.an_instruct_model_follows_instructions) == 0
        assert found(lecture.positions.alibi_goes_on_where_learned_positions_fail, trained=12, steps=2) is not None


@pytest.mark.skipif(xp is not np, reason="measures a CPU")
def test_costs_are_measured():
    """Of so small sizes only that they are: times and memory of a few milliseconds say nothing."""
    faster = attention.sparse_attention_is_faster(sizes=(64, 128))
    memory = attention.flash_attention_needs_linear_memory(sizes=(64, 128))
    assert faster.number > 0 and memory.number < 2
    assert len(faster.lines) == 6 and len(memory.lines) == 3


def test_the_index_is_whole():
    """Every claim that is written belongs to a slide, and is shown with a function of an idea file."""
    modules = [attention, evaluation, experts, lecture.models, lecture.positions, reasoning, tokenizer, training]
    written = {
        function
        for module in modules
        for function in vars(module).values()
        if inspect.isfunction(function) and function.__module__ == module.__name__
        if "return Finding(" in inspect.getsource(function) and [*inspect.signature(function).parameters][0] == "seed"
    }
    assert len(CLAIMS) >= 50 and written <= {*CLAIMS}
    for claim, function in CLAIMS.items():
        assert claims.sentence(claim).endswith(".") and claims.title(claim)[0].islower()
        file, line, code = page.code_of(function)
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert any(function.__name__ in text for text in source[line - 1 : line + 1]) and function.__name__ in code
    for slide in lecture.SLIDES.values():
        assert slide.claims and all((ROOT / file).is_file() for file in slide.files.split())


def test_nothing_imports_the_front_door():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("lab/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not isinstance(node, (ast.Import, ast.ImportFrom)) or "lecture" not in names, path
    assert len((ROOT / "lecture.py").read_text(encoding="utf-8").splitlines()) < 200


# --- what the stored results say ---


def rlhf_result(gain, seeds=(0, 1)):
    share = lambda tuned, **more: {k: 0.5 + gain * tuned for k in ("useful", "honest", "safe", "win_rate")} | {
        "true_reward": gain, "win_rate_at_matched_length": 0.5 + gain * tuned, "kl": 8.0
    } | more  # fmt: skip
    methods = {name: share(False) for name in feedback.UNTUNED}
    methods |= {name: share(True, sampled=share(True)) for name in feedback.TUNED}
    runs = [{"reward_model_accuracy": 0.5 + gain, "methods": methods} for _ in seeds]
    return {"command": "python rlhf.py --seeds 2", "machine": "a machine", "seeds": [*seeds], "runs": runs}


def cot_result(last):
    task = {"difficulty": [1, 24], "direct": [0.9, 0.1], "direct_deep": [0.9, 0.2], "filler": [0.9, 0.1]}
    tasks = {"permutations": task | {"cot": [1.0, last], "chance": [0.5, 0.01]}}
    run = {"tasks": tasks, "thinking_budget": {"difficulty": [2, 20], "needed": [15, 200 * last]}}
    return {"command": "python cot.py", "machine": "a machine", "seeds": [0], "runs": [run]}


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", str(tmp_path))
    return tmp_path


HUMAN = [*lecture.SLIDES["rlhf"].claims]


@pytest.mark.parametrize("claim", [*HUMAN, *lecture.SLIDES["reasoning"].claims], ids=lambda claim: claim.__name__)
def test_what_is_not_stored_is_not_failed(claim, results_folder):
    finding = claim(0)
    assert finding.holds is None and "python" in finding.says


def test_human_feedback_is_read_from_its_results(results_folder):
    for gain, holds in (0.3, True), (-0.1, False):
        (results_folder / "rlhf.json").write_text(json.dumps(rlhf_result(gain)))
        assert [claim(0).holds for claim in HUMAN] == [holds] * len(HUMAN)
    assert "| PPO, greedy | 0.80 " in tables.of_rlhf(rlhf_result(0.3))


def test_reasoning_is_read_from_its_results(results_folder):
    for last, holds in (0.98, True), (0.1, False):
        (results_folder / "cot.json").write_text(json.dumps(cot_result(last)))
        assert reasoning.steps_before_the_answer_solve_more(0).holds is holds
        assert reasoning.harder_problems_take_longer(0).holds is holds
    assert reasoning.a_quick_answer_is_for_easy_problems(0).holds
    assert "| cot | 100% | 10% |" in tables.text()


def test_the_six_are_measured_and_read(results_folder, monkeypatch, capsys):
    tiny = {"layers": 2, "hidden": 32, "heads": 2, "vocab": 300, "batch": 2, "context": 32}
    monkeypatch.setattr(tables, "ARCHITECTURES", ["qwen3", "kimi-k2"])
    monkeypatch.chdir(results_folder)
    monkeypatch.setattr(results, "FOLDER", "results")
    text = results_folder / "text.txt"
    text.write_text("once upon a time " * 500)
    tables.measure_architectures(3, 0, data=[str(text)], **tiny)
    found = lecture.models.the_six_learn_from_the_same_text(0)
    assert found.number is not None and "kimi-k2" in found.lines[2]
    assert "--measure architectures --steps 3" in tables.text()


def test_the_long_tables_are_those_of_the_stored_results():
    if (ROOT / "RESULTS.md").exists():
        assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == tables.text()


# --- table, page, command line ---


class Balanced(html.parser.HTMLParser):
    """Every element that is opened is closed, and nothing comes from outside."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.images = [], 0

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link")
        if tag == "img":
            self.images += 1
            assert dict(attributes)["src"].startswith("data:image/png;base64,") and dict(attributes)["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_slide_is_shown_with_all_its_numbers_and_as_a_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pygments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "FIGURES", str(tmp_path / "figures"))
    lecture.main(["positions", "--page"])
    printed = capsys.readouterr().out
    assert "3 claims hold, 0 do not" in printed and "largest error" in printed
    assert len([*(tmp_path / "figures").iterdir()]) == 2
    text = (tmp_path / "lecture.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.images == 2 and not re.search(r'(?:src|href)="https?:', text)
    assert "def</span>" in text and "sinusoidal" in text and "<mfrac>" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_what_does_not_hold_is_said(capsys):
    def nothing_is_true(seed):
        """Nothing is true."""
        return Finding(2.0, "it is 2", most=1)

    slides = {"a": lecture.Slide("A", "model.py", {nothing_is_true: show.run})}
    show.run(slides)
    assert "DOES NOT HOLD" in (printed := capsys.readouterr().out) and "0 claims hold, 1 do not" in printed


def test_the_colours_of_tokens_are_for_terminals_only(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "FIGURES", str(tmp_path))
    show.run(lecture.SLIDES, "tokenizer")
    assert "\033" not in capsys.readouterr().out
    assert "\033" in tokenizer.coloured(["agot", "ado"])


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a / b", "<mfrac><mi>a</mi><mi>b</mi></mfrac>"),
        ("x_1^2", "<msup><msub><mi>x</mi><mn>1</mn></msub><mn>2</mn></msup>"),
        ("√{ab}", "<msqrt><mrow><mi>ab</mi></mrow></msqrt>"),
        ("Σ_j s", '<munder><mo stretchy="false">Σ</mo><mi>j</mi></munder><mi>s</mi>'),
        ("f(x) / 2", "<mfrac><mrow><mi>f</mi><mrow>"),
        ("a < b", "&lt;"),
    ],
)
def test_formulas(text, shown):
    assert shown in formulas.mathml(text)
