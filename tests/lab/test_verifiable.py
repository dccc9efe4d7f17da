"""lab/verifiable.py: problems are read or refused in a sentence, rewards are what they say, and a run is whole."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import finetune
import model
from lab import pretrain, reasoning, talk, verifiable

ROWS = [{"question": f"What is {i} + 1?", "answer": f"It is\n#### {i + 1}"} for i in range(10)]


def written(tmp_path, rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_problems_are_read_as_gsm8k_writes_them(tmp_path):
    rows = [*ROWS, {"question": " Why? ", "answer": "so"}, {"question": "Many?", "answer": "#### 1,234"}]
    problems = verifiable.read_problems(written(tmp_path, rows))
    assert problems[:2] == [("What is 0 + 1?", "1"), ("What is 1 + 1?", "2")]
    assert problems[-2:] == [("Why?", "so"), ("Many?", "1234")]


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"question": "?"}, "line 11: the field 'answer' is missing, or is not text"),
        ({"question": "?", "answer": 3}, "line 11: the field 'answer' is missing, or is not text"),
        ({"question": "?", "answer": "so ####"}, "line 11: the answer is empty"),
        ({"question": " ", "answer": "so"}, "line 11: the question is empty"),
        (None, "line 11: not an object with fields"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path, row, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        verifiable.read_problems(written(tmp_path, [*ROWS, row]))


def test_too_few_problems_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has 9 problems, and 10 are the least"):
        verifiable.read_problems(written(tmp_path, ROWS[:9]))


def test_small_sums_are_right_and_differ(tmp_path):
    path = str(tmp_path / "sums.jsonl")
    verifiable.small_sums(path, 50, seed=1)
    problems = verifiable.read_problems(path)
    assert len(set(problems)) == 50
    assert all(eval(re.fullmatch(r"What is (.*)\?", question)[1]) == int(answer) for question, answer in problems)


@given(st.integers(-99, 99), st.integers(-99, 99), st.sampled_from(["{}", " {}\n", "{} coins", "It is {}.", "{}.0"]))
def test_the_answer_behind_the_thoughts_is_what_counts(right, said, form):
    text = f"first {right}, then{verifiable.ANSWER}{form.format(said)}"
    assert verifiable.reward(str(right), text) == (1, right == said)


@pytest.mark.parametrize(
    "text", [None, "", "7", "</think>7", "so</think>", "so</think> \n", "a</think>7</think>7", "<think>a</think>7"]
)
def test_what_is_not_in_the_format_earns_nothing(text):
    assert verifiable.reward("7", text) == (0, 0)


def test_words_are_answers_too():
    assert verifiable.reward("Paris", "France</think>paris.") == (1, 1)
    assert verifiable.reward("Paris", "France</think>Rome") == (1, 0)
    assert verifiable.reward("7", "so</think>7 or 8") == (1, 0)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    words = "one and two are three and four more are seven so What is it".split()
    (folder / "book.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 20000)))
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "so</think>7"}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    sizes = "--layers 1 --hidden 16 --heads 2 --kv-heads 1 --vocab 300 --batch 2 --context 384".split()
    base, tuned = str(folder / "base"), str(folder / "tuned")
    pretrain.main([*sizes, "--data", str(folder / "book.txt"), "--steps", "2", "--out", base])
    finetune.main(["--data", str(folder / "chats.jsonl"), "--init", base, "--steps", "2", "--out", tuned])
    return base, tuned


def test_a_run_is_whole(chat_model, tmp_path, capsys):
    out, path = tmp_path / "out", written(tmp_path, ROWS)
    words = "--rounds 2 --questions 2 --group 2 --budget 9 --held-out 2".split()
    reasoning.main(["--init", chat_model[1], "--reinforce", path, "--out", str(out), *words])
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["trained_on"], summary["held_out"], summary["rounds"]) == (8, 2, 2)
    printed = capsys.readouterr().out
    for name in "before", "grpo", "rejection_sampling":
        assert f"{name}: " in printed
        found = summary[name]
        assert 0 <= found["pass@1"] <= found["pass@8"] <= 1 and 1 <= found["tokens"] <= 9 and 0 <= found["format"] <= 1
    for name in "grpo", "rejection_sampling":
        params, _, tokenizer, _ = talk.opened(str(out / name))
        assert talk.asking(str(out / name), tokenizer)
        assert all(np.isfinite(w).all() for w in params.values())
    with pytest.raises(ValueError, match="holds something already"):
        reasoning.main(["--init", chat_model[1], "--reinforce", path, "--out", str(out), *words])


def test_a_model_without_a_chat_or_without_room_is_refused(chat_model, tmp_path):
    base, tuned = chat_model
    path, out = written(tmp_path, ROWS), str(tmp_path / "new")
    with pytest.raises(ValueError, match="was never in a chat"):
        reasoning.main(["--init", base, "--reinforce", path, "--out", out])
    with pytest.raises(ValueError, match="leaves no room for 350"):
        reasoning.main(["--init", tuned, "--reinforce", path, "--out", out, "--budget", "350"])


def test_right_chains_earn_more_than_well_formed_ones(chat_model):
    reasoner = verifiable.Reasoner(chat_model[1], 9)
    ids = lambda text: reasoner.tokenizer.encode(text) + [reasoner.stop[-1]]
    earned = [reasoner.reward(("?", "7"), ids(text)) for text in ("so</think>7", "so</think>8", "so 7")]
    assert earned == [1.2, 0.2, 0] and reasoner.reward(("?", "7"), ids("so</think>7")[:-1]) == 0
    prompt = reasoner.tokenizer.decode(reasoner.prompt("What is 1 + 1?"))
    assert prompt.endswith("<think>") and "What is 1 + 1?" in prompt


def test_the_model_is_asked_by_its_own_template(chat_model):
    params, config = model.load(chat_model[1])
    assert config.vocab_size == verifiable.Reasoner(chat_model[1], 9).config.vocab_size
