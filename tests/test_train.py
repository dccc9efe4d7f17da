"""Training: the same gradient in any pieces, objectives, and bad input that harms nothing."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gradcheck import close
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CONFIG, ROOT, SMALL, finished, weights

import bpe
import finetune
import model
import mtp
import train
from engine import cli, runs, xp
from engine.threads import thread_pool
from lab import pretrain
from layers import IGNORE

WITH_EXPERTS = dataclasses.replace(
    CONFIG,
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    norm_topk_prob=True,
    num_nextn_predict_layers=1,
)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([CONFIG, WITH_EXPERTS]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_the_gradient_in_pieces_over_threads_is_the_gradient_in_one(config, batch, micro_batch, threads, seed):
    rng = np.random.default_rng(seed)
    params = model.init(config, seed, np.float64)
    tokens, targets = rng.integers(0, 300, (2, batch, 7))
    targets[rng.random(targets.shape) < 0.4] = IGNORE
    observed, around = {}, {"balance": 0.1}
    around["observe"] = observed
    terms = [mtp.term(0.3, **around)] if config.num_nextn_predict_layers else []
    _, backward = model.loss(params, config, xp.asarray(tokens), xp.asarray(targets), terms, **around)
    grads, loss = backward(), observed.pop("losses")["cross_entropy"]
    with thread_pool(threads) as pool:
        split_loss, split_grads, split_observed = train.gradient(
            params, config, (tokens, targets, None), micro_batch, pool.map, aux=0.1, mtp=0.3 * len(terms)
        )
    assert split_loss == pytest.approx(loss)
    for name in params:
        close(split_grads[name], grads[name])
    assert observed.keys() == split_observed.keys()
    for layer, seen in observed.items():
        for name in seen.keys() - {"balance"}:
            close(split_observed[layer][name], seen[name])


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([CONFIG, WITH_EXPERTS]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_gradient_in_pieces_keeps_texts_of_one_row_apart(config, batch, micro_batch, seed):
    rng = np.random.default_rng(seed)
    params = model.init(config, seed, np.float64)
    tokens, targets = rng.integers(0, 300, (2, batch, 7))
    segments = np.sort(rng.integers(0, 3, (batch, 7)), axis=1)
    targets[rng.random(targets.shape) < 0.4] = IGNORE
    whole = [xp.asarray(array) for array in (tokens, targets, segments)]
    loss, backward = model.loss(params, config, *whole[:2], documents=whole[2])
    grads = backward()
    split_loss, split_grads, _ = train.gradient(params, config, (tokens, targets, segments), micro_batch)
    assert split_loss == pytest.approx(loss)
    assert train.mean_loss(params, config, (tokens, targets, segments), micro_batch) == pytest.approx(loss)
    for name in params:
        close(split_grads[name], grads[name])


def test_a_text_begins_with_the_token_that_its_tokenizer_or_its_model_begins_texts_with(tmp_path):
    def first(tokenizer, **tokens):
        """The first ids of a text to go on with."""
        model.save(tmp_path, model.init(CONFIG), dataclasses.replace(CONFIG, **tokens))
        tokenizer.save(tmp_path)
        (tmp_path / "text.txt").write_text("the cat sat " * 99)
        given = {"init": str(tmp_path), "data": [str(tmp_path / "text.txt")], "context": 8, "steps": 1}
        task = pretrain.Texts(runs.Run("train.py", pretrain.Settings, train.complete, given))
        length = len(tokenizer.encode("the cat"))
        assert task.tokens[0][1 : 1 + length].tolist() == tokenizer.encode("the cat")
        return task.tokens[0][0]

    none = {"bos_token_id": None, "eos_token_id": None}
    assert first(bpe.train("the cat sat", 270, special=("<unk>", "<|endoftext|>")), **none) == 1
    begins = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    meaning = {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": list(begins), "pair": [], "special_tokens": meaning}
    config = bpe.train("the cat sat", 270, special=("<unk>", "<|endoftext|>", "<s>")).config
    assert first(bpe.Tokenizer(config | {"post_processor": processor}), **none) == 2
    bare = bpe.train("the cat sat", 270, special=("<unk>", "</s>"))
    for ends in 1, (1, 0):
        assert first(bare, bos_token_id=None, eos_token_id=ends) == 1
    assert first(bare, bos_token_id=1, eos_token_id=None) == 1
    with pytest.raises(ValueError, match="begins or ends a text"):
        first(bare, **none)


def test_the_causal_target_is_the_next_token():
    tokens = np.arange(100)
    inputs, targets = train.causal(tokens, np.array([3, 50]), 5, None, 300)
    assert inputs.tolist() == [[3, 4, 5, 6, 7], [50, 51, 52, 53, 54]]
    assert (targets == inputs + 1).all()


def test_the_masked_objective_hides_what_it_asks_for():
    tokens = np.random.default_rng(0).integers(2, 300, 50000).astype(np.uint16)
    starts = np.arange(0, 49000, 100)
    inputs, targets = train.masked(tokens, starts, 100, np.random.default_rng(1), 300)
    originals = tokens[starts[:, None] + np.arange(100)]
    asked = targets != IGNORE
    assert (targets[asked] == originals[asked]).all() and (inputs[~asked] == originals[~asked]).all()
    assert abs(asked.mean() - 0.15) < 0.01
    assert abs((inputs[asked] == train.MASK).mean() - 0.8) < 0.02
    assert abs((inputs[asked] == originals[asked]).mean() - 0.1) < 0.02


def test_a_batch_comes_from_anywhere_in_the_text():
    inputs, targets = train.windows(np.arange(12), "causal", 8, 400, np.random.default_rng(0), 300)
    assert inputs.shape == (400, 8) and {*inputs[:, 0].tolist()} == {0, 1, 2, 3} and targets.max() == 11


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_what_dropout_leaves_out_does_not_depend_on_the_pieces(batch, micro_batch, seed):
    params, rows = model.init(CONFIG, 0, np.float64), np.random.default_rng(seed).integers(0, 300, (2, batch, 7))
    dropped = {"drop": 0.3, "seed": (seed, 5)}
    whole, grads, _ = train.gradient(params, CONFIG, (*rows, None), **dropped)
    loss, split, _ = train.gradient(params, CONFIG, (*rows, None), micro_batch, **dropped)
    assert loss == pytest.approx(whole)
    for name in grads:
        close(split[name], grads[name])
    for other in {"drop": 0.0}, {"drop": 0.3, "seed": (seed, 6)}:
        assert train.gradient(params, CONFIG, (*rows, None), **other)[0] != pytest.approx(whole, rel=1e-9)


def test_each_reading_of_the_text_adds_to_dropout(text, tmp_path, monkeypatch):
    rates, gradient = [], train.gradient
    monkeypatch.setattr(train, "gradient", lambda *a, **b: rates.append(a[8]) or gradient(*a, **b))
    small = {"data": [str(text)], "vocab": 258, "hidden": 8, "heads": 1, "layers": 1, "context": 64, "dropout": 0.05}
    pretrain.pretrain(small | {"steps": 60, "batch": 30, "out": str(tmp_path / "run")})
    assert rates == sorted(rates) and {*rates} == {0.0, 0.02, 0.04, 0.05}
    reading = rates.count(0.0) * 30 * 64  # tokens
    assert abs(rates.count(0.02) - rates.count(0.0)) <= 1 and 0.7 < reading / len(text.read_bytes()) < 1


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"context": 256, "batch": 8}, 2),
        ({"context": 256, "batch": 40}, 4),
        ({"context": 128, "batch": 20}, 5),
        ({"context": 128, "batch": 2}, 1),
        ({"context": 128, "batch": 20, "micro_batch": 3}, 3),
    ],
)
def test_a_micro_batch_has_at_most_1024_tokens_and_a_quarter_of_the_batch(given, expected, text, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def seen(params, config, batch, micro_batch, *rest):
        raise Seen(micro_batch, len(batch[0]))

    monkeypatch.setattr(train, "gradient", seen)
    monkeypatch.setattr(train, "TOKENS_AT_ONCE", 1024)  # as on a CPU
    monkeypatch.setattr(train, "MICRO_BATCHES", 4)
    small = {"data": [str(text)], "vocab": 258, "hidden": 8, "heads": 1, "layers": 1, "steps": 1}
    with pytest.raises(Seen) as caught:
        pretrain.pretrain(small | given | {"out": str(tmp_path / "run")})
    assert caught.value.args == (expected, given["batch"])


def test_what_is_not_given_is_found(base):
    small, tuned = train.complete(train.Training()), train.complete(train.Training(init=str(base), steps=9))
    assert (small.minutes, small.context, small.lr) == (3.0, 256, 0.01)
    assert (tuned.minutes, tuned.context, tuned.lr) == (None, 64, 0.003)  # its window
    assert train.complete(train.Training(minutes=1.0, steps=9)).minutes == 1.0
    assert finetune.complete(finetune.Settings(init=str(base))).minutes == 1.0


@settings(max_examples=15, deadline=None)
@given(st.integers(18, 90), st.integers(1, 4))
def test_evaluation_counts_every_token_once(length, micro_batch):
    tokens = np.random.default_rng(length).integers(0, 300, length).astype(np.uint16)
    params = model.init(CONFIG, 0, np.float64)
    total = 0.0
    for start in range(0, length - 1, 16):
        window = tokens[start : start + 17].astype(int)[None]
        loss, _ = model.loss(params, CONFIG, xp.asarray(window[:, :-1]), xp.asarray(window[:, 1:]))
        total += loss * (window.shape[1] - 1)
    windows = train.windows_of(tokens, 16, "causal", 300)
    mean = train.mean_loss(params, CONFIG, (*windows, None), micro_batch)
    assert mean == pytest.approx(total / (length - 1))


# --- the command line ---


def test_a_run_learns_and_writes_what_it_says(run, text):
    folder, out = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train_losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert train_losses[-1] < 0.8 * train_losses[0]
    assert all({"step", "seconds", "tokens_per_second"} <= line.keys() for line in lines[:-1])
    assert f"{lines[-1]['test_loss']:.3f}" in out and f"{lines[-1]['test_bits_per_byte']:.3f}" in out
    assert sum("test_loss" in line for line in lines) == 1
    validated = [line["step"] for line in lines if {"val_loss", "val_bits_per_byte"} <= line.keys()]
    assert validated == list(range(3, 61, 3))
    assert "xz" in out and "model.py --load" in out and (folder / "loss.png").stat().st_size > 1000
    params, config = model.load(folder)
    assert config.vocab_size == 270 and config.max_position_embeddings == 16


def bits_per_byte(folder, text):
    """Of the model in a folder, on a text that is cut into windows of 16 tokens."""
    params, config = model.load(folder)
    tokenizer = bpe.load(folder / "tokenizer.json")
    ids, nats = [train.END, *tokenizer.encode(text)], 0.0
    for start in range(0, len(ids) - 1, 16):
        window = xp.asarray(np.array([ids[start : start + 17]]))
        nats += model.loss(params, config, window[:, :-1], window[:, 1:])[0] * (window.shape[1] - 1)
    return nats / np.log(2) / len(text.encode())


def test_the_result_is_that_of_the_saved_weights_on_the_last_tenth_of_the_text(run, text):
    whole = text.read_text()
    last = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_bits_per_byte"] == pytest.approx(bits_per_byte(run[0], whole[len(whole) * 9 // 10 :]), rel=1e-4)


def test_the_weights_of_the_lowest_validation_loss_are_kept_and_tested(worse):
    folder, out, text = worse
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    assert best["step"] < 200 and lines[-1]["val_loss"] > 1.01 * best["val_loss"]
    assert f"weights of step {best['step']} of 200" in out and "then it rose" in out
    whole = text.read_text()
    test = len(whole) * 9 // 10
    validation = whole[test // 2 : test // 2 + test // 20]
    assert bits_per_byte(folder, validation) == pytest.approx(best["val_bits_per_byte"], rel=1e-4)
    assert bits_per_byte(folder, whole[test:]) == pytest.approx(lines[-1]["test_bits_per_byte"], rel=1e-4)


def test_a_seed_gives_the_same_run_on_any_number_of_threads(run, text, tmp_path):
    folder, _ = run
    options = [*SMALL[:-1], "1"]
    assert finished("--data", text, "--steps", 60, "--out", tmp_path / "again", *options)[0] == 0
    assert weights(tmp_path / "again") == weights(folder)
    assert finished("--data", text, "--steps", 60, "--seed", 1, "--out", tmp_path / "other", *options)[0] == 0
    assert weights(tmp_path / "other") != weights(folder)


@pytest.mark.parametrize("attention", ["sliding", "strided", "fixed", "bigbird"])
def test_sparse_attention_trains_and_generates(attention, text, tmp_path):
    folder, options = tmp_path / "run", ["--attention", attention, "--context", 64, "--layers", 2]
    code, _, err = finished("--data", text, "--steps", 20, "--out", folder, *SMALL, *options)
    assert code == 0, err
    params, config = model.load(folder)
    assert config.layer_types == (f"{attention}_attention", "full_attention")
    assert len(list(model.generate(params, config, [2, 3, 4], 50, stop=[]))) == 50


def test_the_masked_objective_trains_and_fills_gaps(text, tmp_path):
    folder = tmp_path / "masked"
    code, out, err = finished("--data", text, "--objective", "masked", "--steps", 40, "--out", folder, *SMALL)
    assert code == 0, err
    losses = [json.loads(line).get("train_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[3] < losses[0] and "bits per byte" not in out
    prompt = ["--load", folder, "--prompt", "the <mask> sat"]
    answer = subprocess.run(
        [sys.executable, ROOT / "model.py", *prompt], capture_output=True, text=True, timeout=60, check=True
    )
    assert "<mask>" not in answer.stdout and "sat" in answer.stdout


@pytest.mark.parametrize("arch", list(model.ARCHITECTURES))
def test_every_architecture_trains_with_its_features(arch, text, tmp_path):
    options = ["--mtp", "0.3", *(["--qk-clip", "0.001"] if "qwen" not in arch else [])]
    code, _, err = finished(
        "--data", text, "--arch", arch, "--steps", 30, "--out", tmp_path / "run", *SMALL, "--layers", 2, *options
    )
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.95 * lines[0]["train_loss"] and np.isfinite(lines[-1]["val_loss"])
    params, config = model.load(tmp_path / "run")
    published = model.ARCHITECTURES[arch]
    assert config.num_nextn_predict_layers == 1 and bool(config.experts) == bool(published.experts)
    assert (config.kv_lora_rank is None) == (published.kv_lora_rank is None)
    assert config.rope_scaling == published.rope_scaling and config.model_type == published.model_type
    bias = params.get("model.layers.1.mlp.gate.e_score_correction_bias")
    if bias is not None:  # every step moved it by the speed, up or down or not at all
        assert 0 < abs(bias).max() <= 30 * 0.001 + 1e-6
    observed, tokens = {}, xp.asarray(np.arange(2, 18)[None])
    model.transformer(params, config, tokens, model.layer_options(config, tokens, np.float32, observe=observed))
    if "--qk-clip" in options:  # clipped after the last step, on another text
        assert observed[0]["max_logits"].max() < 0.01


@pytest.mark.parametrize(
    "data, options, what",
    [
        (b"", [], "empty"),
        (b"tiny", [], "too few"),
        (b"a", [], "no text"),
        (b"caf\xe9 " * 1000, [], "UTF-8"),
        (None, [], "No such file"),
        (b"words " * 1000, ["--vocab", "255"], "--vocab"),
        (b"words " * 1000, ["--arch", "gpt5"], "gpt5"),
        (b"words " * 1000, ["--hidden", "15"], "--hidden"),
        (b"words " * 1000, ["--kv-heads", "3"], "--kv-heads"),
        (b"words " * 1000, ["--minutes", "-1"], "--minutes"),
        (b"words " * 1000, ["--steps", "0"], "--steps"),
        (b"words " * 1000, ["--micro-batch", "0"], "--micro-batch"),
        (b"words " * 1000, ["--context", "1"], "--context"),
        (b"words " * 1000, ["--lr", "nan"], "--lr"),
        (b"words " * 1000, ["--frobnicate"], "--frobnicate"),
        (b"words " * 1000, ["--arch", "qwen3", "--qk-clip", "100"], "--qk-clip"),
        (b"words " * 1000, ["--arch", "kimi-k2", "--experts", "2", "--experts-per-token", "3"], "3 of 2 experts"),
        (b"words " * 1000, ["--arch", "deepseek-v3", "--hidden", "12", "--heads", "6"], "--hidden"),
        (b"words " * 1000, ["--mtp", "-1"], "--mtp"),
        (b"words " * 1000, ["--mtp", "0.3", "--objective", "masked"], "--mtp"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, data, options, what):
    if data is not None:
        (tmp_path / "data.txt").write_bytes(data)
    code, out, err = finished(
        "--data", tmp_path / "data.txt", "--steps", 3, "--out", tmp_path / "run", *SMALL, *options
    )
    assert code != 0 and what in err and "Traceback" not in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_wide_model_is_tuned_with_a_lower_learning_rate(base, tmp_path):
    rate = lambda **given: train.complete(pretrain.Settings(**given)).lr
    assert rate() == 0.01 and rate(init=str(base)) == 0.003
    wide = shutil.copytree(base, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    for hidden, expected in (128, 0.003), (576, 0.00031), (2048, 4.7e-5):
        (wide / "config.json").write_text(json.dumps(config | {"hidden_size": hidden}))
        assert rate(init=str(wide)) == pytest.approx(expected, rel=0.02) == round(rate(init=str(wide)), 6)
    assert rate(init=str(wide), lr=0.5) == 0.5


def test_a_text_of_one_character_is_too_little_for_a_model_to_go_on_with(base, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="too few"):
        pretrain.pretrain({"data": [str(tmp_path / "a.txt")], "init": str(base), "out": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_init_goes_on_with_a_model(run, text, tmp_path):
    folder, more = run[0], tmp_path / "more"
    code, _, err = finished(
        "--data", text, "--init", folder, "--steps", 5, "--out", more, "--context", 16, "--lr", "1e-9", "--batch", 4
    )
    assert code == 0, err
    assert (more / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    before, after = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"] for path in (folder, more)
    )
    assert after == pytest.approx(before, rel=1e-3)
    assert (more / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    "options, what",
    [
        (["--objective", "masked"], "trained to continue"),
        (["--vocab", "300"], "--vocab"),
        (["--kv-heads", "1"], "--kv-heads"),
        (["--arch", "qwen3"], "--arch"),
        (["--context", "65"], "64 tokens"),
        (["--mtp", "0.3"], "--mtp"),
    ],
)
def test_what_a_model_to_go_on_with_cannot_do_is_one_sentence(options, what, base, text, tmp_path):
    size = [] if "--context" in options else ["--context", "64"]
    options = [*options, *size, "--data", text, "--init", base, "--steps", 3, "--out", tmp_path / "run"]
    code, _, err = finished(*options)
    assert code == 1 and what in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


MEASURED = """import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
sys.exit(code)"""


def test_a_text_larger_than_the_memory_that_is_used(text, tmp_path):
    """256 MB, of which two steps use no more than a piece to train on, and the parts that are held out."""
    words, large = text.read_bytes(), tmp_path / "large.txt"
    with open(large, "wb") as file:
        for _ in range(2**28 // len(words)):
            file.write(words)
    options = ["--data", large, "--steps", 2, "--out", tmp_path / "run", *SMALL, "--context", 128]  # few, long pieces
    program = [sys.executable, "-c", MEASURED, ROOT / "train.py", *map(str, options)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"peak (\d+)", done.stdout)[1]) < 2**18  # KiB, of the run and of the processes it begins
    assert (tmp_path / "run" / "tokens.bin").stat().st_size < 2**23
    tested = re.search(r"test, which chose nothing: .* \(262,144 of its ([0-9,]+) tokens, evenly spaced\)", done.stdout)
    assert int(tested[1].replace(",", "")) > 262_144 and "as many as the steps use" in done.stdout


def test_a_line_is_logged_every_ten_steps_and_at_each_validation(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({*range(10, 61, 10), *range(3, 61, 3)})


def test_settings_are_what_the_help_says(monkeypatch):
    s = train.Training()
    assert (s.batch, s.aux_loss, s.bias_update, s.mtp, s.optimizer) == (8, 0.001, 0.001, 0.0, "muon")
    assert (s.weight_decay, s.save_seconds, s.seed, s.qk_clip) == (0.1, 30.0, 0, None)
    assert train.SPECIAL[train.END] == "<|endoftext|>" and train.SPECIAL[train.MASK] == "<mask>"
    for name, least in {"context": 2, "batch": 1, "steps": 1, "threads": 1, "minutes": 0, "lr": 0, "seed": 0}.items():
        with pytest.raises(ValueError, match=f"--{name} must be at least {least}"):
            cli.check(dataclasses.replace(s, **{name: least - 1}))
        cli.check(dataclasses.replace(s, **{name: least}))


def test_the_learning_rate_is_that_of_the_middle_of_a_step(text, tmp_path, monkeypatch):
    done, factor = [], train.warm_up_and_decay
    monkeypatch.setattr(train, "warm_up_and_decay", lambda x: done.append(x) or factor(x))
    small = {"data": [str(text)], "vocab": 258, "hidden": 8, "heads": 1, "layers": 1, "steps": 4, "context": 8}
    pretrain.pretrain(small | {"out": str(tmp_path / "run")})
    assert done == [0.125, 0.375, 0.625, 0.875]
