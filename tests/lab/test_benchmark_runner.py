"""The command line of evals.py, on a tiny model."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bpe
import model
from engine import to_numpy, xp
from engine.files import read_text
from lab import benchmark_runner, tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = bpe.train(read_text(f"{tasks.SAMPLES}/text.txt"), 300)
    config = model.Config(
        model_type="llama",
        tie_word_embeddings=True,
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    model.save(str(folder), model.init(config), config)
    tokenizer.save(str(folder))
    return str(folder)


def log_probabilities(folder, text, given):
    """Of the tokens of text after `given`, one by one, from the logits."""
    params, config = model.load(folder)
    tokenizer = bpe.load(f"{folder}/tokenizer.json")
    ids = tokenizer.bos + tokenizer.encode(given) + tokenizer.encode(text)
    logits = to_numpy(model.forward(params, config, xp.asarray([ids]))[0][0]).astype(float)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    start = len(ids) - len(tokenizer.encode(text))
    return [logits[i - 1, ids[i]] for i in range(max(1, start), len(ids))]


def test_the_likelihood_of_a_choice_and_of_a_text_is_that_of_the_logits(folder):
    known, rng = benchmark_runner.connect(folder), np.random.default_rng(0)
    for given_, text in ("The river", " comes down"), ("Where is it?\nAnswer:", " in the hills"), ("x", "y"):
        direct = sum(log_probabilities(folder, text, given_))
        assert known.loglikelihood(given_, text) == pytest.approx(direct, rel=1e-5)
    assert known.loglikelihood("x " * 200, "y") is None
    assert known.answers("x " * 200, tasks.TASKS["hle"], [(1, 0.0)], 1, rng) is None
    text = read_text(f"{tasks.SAMPLES}/text.txt")[:100]
    direct = log_probabilities(folder, text, "")
    measures, _ = tasks.score_text(known.windows(text, None), rng)
    tokenizer = bpe.load(f"{folder}/tokenizer.json")
    size = len(tokenizer.decode_bytes(tokenizer.encode(text)[1:]))
    assert measures["bits per byte"][0] == pytest.approx(-sum(direct) / math.log(2) / size, rel=1e-5)
    assert measures["perplexity"][0] == pytest.approx(math.exp(-np.mean(direct)), rel=1e-5)
    assert len(known.windows(text * 9, None)) > 1 and len(known.windows(text * 9, 1)) == 1
    assert sum(tokens for _, tokens, _ in known.windows(text * 9, None)) == len(tokenizer.encode(text * 9)) - 1


def run(*options):
    command = [sys.executable, "evals.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_every_task_ends_in_a_table(folder, tmp_path, capsys):
    for task in tasks.TASKS:
        out = tmp_path / f"{task}.json"
        options = ["--task", task, "--max-new-tokens", "4", "--limit", "2", "--out", str(out)]
        benchmark_runner.main(["--load", folder, *options])
        shown, result = capsys.readouterr().out, json.loads(out.read_text())
        assert shown.startswith(task) and all(name in shown for name in result["measures"])
        assert len(result["items"]) == (3 if task == "arena" else 2)
    benchmark_runner.main(["--load", folder, "--task", "hle", "--max-new-tokens", "4"])
    assert "do not fit into the context window" in capsys.readouterr().out


def test_the_same_seed_draws_the_same_programs(folder, tmp_path):
    def programs(seed):
        out = tmp_path / "out.json"
        options = ["--task", "humaneval", "--samples", "3", "--max-new-tokens", "5", "--limit", "1"]
        benchmark_runner.main(["--load", folder, *options, "--seed", str(seed), "--out", str(out)])
        return json.loads(out.read_text())["items"][0]["programs"]

    assert programs(1) == programs(1) != programs(2) and len(programs(1)) == 3


VOTE = '{"model_a": "a", "model_b": "b", "winner": "tie"}\n'
HLE = '{"question": "q", "answer": "a", "answer_type": "exactMatch"}\n'
CHOICE = '{"question": "q", "choices": ["a", "b"], "answer": 0}\n'
GRIDS = '{"input": [[1]], "output": [[2]]}'
BROKEN = [
    ("arena", "f.jsonl", VOTE + "{", "f.jsonl, line 2: not JSON"),
    ("arena", "f.jsonl", VOTE + "[" * 100_000, "f.jsonl, line 2: .*nested too deeply"),
    ("arena", "f.jsonl", VOTE + "9" * 5000, "f.jsonl, line 2: a number that is .*long"),
    ("arena", "f.jsonl", VOTE + VOTE.replace("a", "\\udc80", 1), "f.jsonl, line 2: half of a surrogate pair"),
    ("arena", "f.jsonl", "", "f.jsonl is empty"),
    ("arena", "f.jsonl", " \n", "f.jsonl is empty"),
    ("arena", "f.jsonl", VOTE + VOTE.replace("tie", "c"), "line 2: the winner 'c'"),
    ("arena", "f.jsonl", VOTE + VOTE.replace("tie", "c\\n" * 9999), r"line 2: the winner 'c\\nc"),
    ("arena", "f.jsonl", VOTE.replace("model_b", "model"), "line 1: the field 'model_b'"),
    ("arena", "f.jsonl", VOTE.replace('"b"', "7"), "line 1: the field 'model_b'"),
    ("arena", "f.jsonl", VOTE.replace('"b"', '"a"').replace('"a"', f'"{"a" * 999}"'), "itself"),
    ("arena", "f.jsonl", VOTE + VOTE.replace('"b"', '"c"').replace('"a"', '"d"'), "f.jsonl: .*groups of models"),
    ("arena", "f.jsonl", "".join(VOTE.replace('a"', f'{i}"') for i in range(99)).replace('"b"', '"c"'), "model_a"),
    ("arena", "f.jsonl", "[1]", "f.jsonl, line 1: not an object"),
    ("arena", "f.json", "{}", "f.json: not a list"),
    ("arena", "f.json", "[\n1 2]", "f.json, line 2: not JSON"),
    ("arena", "f.csv", "model_a,model_b\na,b\n", "f.csv, line 2: the field 'winner'"),
    ("arena", "f.csv", 'model_a,model_b,winner\n\na,b,"tie\na,b,tie\n', "f.csv, line 3: not CSV"),
    ("arena", "f.csv", "model_a,model_b,winner\na\0,b,tie\n", "f.csv, line 2: a NUL"),
    ("arena", "f.csv", 'model_a,text,model_b,winner\na,"x\nx",b,tie\na,x,b,none\n', "f.csv, line 4: the winner"),
    ("arena", "f.csv", b"model_a,model_b,winner\na,\xff,tie\n", "f.csv is not UTF-8 text: byte 25 is 0xff, in line 2"),
    ("arena", "f.jsonl.gz", b"x" * 100, "f.jsonl.gz is not packed by gzip"),
    ("arena", "f.jsonl.gz", gzip.compress(VOTE.encode(), mtime=0)[:-9], "f.jsonl.gz is not packed by gzip"),
    ("arc", "f.json", '{"train": [], "test": []}', "f.json, task 'f': not an ARC task: no train pairs"),
    ("arc", "f.json", f'{{"train": [{GRIDS}]}}', "not an ARC task: no test pairs"),
    ("arc", "f.json", f'{{"train": [{GRIDS.replace("2", "10")}], "test": [{GRIDS}]}}', "train pair 1 .*output"),
    ("arc", "f.json", f'{{"train": [{GRIDS}], "test": [{GRIDS.replace("2", "NaN")}]}}', "f.json: a number that is NaN"),
    (
        "arc",
        "f.json",
        f'{{"t": {{"train": [{GRIDS}], "test": [{{"input": [[1]]}}]}}}}',
        "'t': .*test pair 1 .*output",
    ),
    ("arc", "f.json", f'{{"train": [{GRIDS}, {{"output": [[1]]}}], "test": [{GRIDS}]}}', "train pair 2 .*input"),
    ("arc", "f.json", "[]", "not ARC tasks"),
    ("arc", "f.json", "{}", "no ARC tasks"),
    ("arc", "f.json", "[" * 100_000, "f.json: .*nested too deeply"),
    ("hle", "f.jsonl", '{"question": "q", "answer": "a", "answer_type": "essay"}', "line 1: the field 'answer_type'"),
    ("hle", "f.jsonl", HLE + HLE.replace("}", ', "image": NaN}'), "line 2: a number that is NaN"),
    ("hle", "f.jsonl", HLE + HLE.replace('"q"', '"\\ud800"'), "line 2: half of a surrogate pair"),
    ("hle", "f.jsonl", HLE.replace("}", ', "image": "x"}'), "f.jsonl: every question has an image"),
    ("humaneval", "f.jsonl", '{"task_id": "a", "prompt": 3}', "line 1: the field 'prompt'"),
    ("humaneval", "f.jsonl", "{" * 100_000, "line 1: not JSON"),
    ("choice", "f.jsonl", CHOICE + CHOICE.replace("0", '"E"'), "line 2: not a question"),
    ("choice", "f.jsonl", CHOICE.replace("0", "2"), "line 1: not a question"),
    ("choice", "f.jsonl", CHOICE.replace("0", "Infinity"), "line 1: a number that is .*infinite"),
    ("choice", "f.jsonl", CHOICE.replace('["a", "b"]', '{"text": "ab", "label": "ab"}'), "line 1: not a question"),
    ("text", "f.txt", "", "f.txt is empty"),
    ("text", "f.txt", b"a\n\xc3", "f.txt is not UTF-8 text: byte 2 is 0xc3, in line 2"),
    ("text", "f.txt.gz", gzip.compress(b"The river" * 99, mtime=0)[:30], "f.txt.gz is not packed .* cut off"),
]


@pytest.mark.parametrize("task, name, content, said", BROKEN)
def test_bad_input_is_one_sentence(task, name, content, said, folder, tmp_path, capsys):
    path, out = tmp_path / name, tmp_path / "out.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        benchmark_runner.main(["--load", folder, "--task", task, "--file", str(path), "--out", str(out)])
    assert str(path) in str(error.value) and len(str(error.value)) < 200 + len(str(path))
    assert str(error.value).isprintable() and not capsys.readouterr().out and not out.exists()


def test_a_model_s_name_cannot_break_the_table(tmp_path, capsys):
    (tmp_path / "f.jsonl").write_text(VOTE.replace('"b"', r'"b\n\u001b[2J"'))
    benchmark_runner.main(["--task", "arena", "--file", str(tmp_path / "f.jsonl")])
    shown = capsys.readouterr().out
    assert r"b\n\x1b[2J" in shown and all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_broken_file_is_one_line_on_standard_error(task, folder, tmp_path):
    """And nothing else: no table, no traceback, and exit status 1; the same for a folder, which ARC's tasks may be."""
    (tmp_path / "broken.json").write_bytes(b"[" * 100_000 + b"\xff")
    for path in tmp_path / "broken.json", tmp_path:
        ended = run("--load", folder, "--task", task, "--file", path)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr[:2000]
        assert ended.stderr.startswith(f"error: {path}") and len(ended.stderr) < 300


def test_the_command_line_ends_without_a_traceback(tmp_path):
    ended = run("--task", "arena", "--file", tmp_path / "none.jsonl")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "none.jsonl: No such file" in ended.stderr
    for options in ["--task", "arc"], ["--task", "arena", "--limit", "0"], ["--seed", "1"]:
        with pytest.raises(ValueError):
            benchmark_runner.main(options)
