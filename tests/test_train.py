"""Training: the same gradient in any pieces, exact resumption, and bad input that harms nothing."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gradcheck import close
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import mtp
import train
from engine import flash, safetensors, to_numpy, xp
from layers import IGNORE

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
SMALL = ["--layers", "1", "--hidden", "16", "--heads", "2", "--kv-heads", "1", "--context", "16"]
SMALL += ["--vocab", "270", "--batch", "4", "--threads", "2"]


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
    with train.thread_pool(threads) as pool:
        split_loss, split_grads, split_observed = train.gradient(
            params, config, tokens, targets, micro_batch, pool.map, aux_weight=0.1, mtp_weight=0.3 * len(terms)
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
    split_loss, split_grads, _ = train.gradient(params, config, tokens, targets, micro_batch, segments=segments)
    assert split_loss == pytest.approx(loss)
    assert train.mean_loss(params, config, tokens, targets, segments, micro_batch) == pytest.approx(loss)
    for name in params:
        close(split_grads[name], grads[name])


def test_a_text_begins_with_the_token_that_its_tokenizer_begins_texts_with():
    known = train.bpe.train("the cat sat", 270, special=("<unk>", "<|endoftext|>"))
    assert train.to_tokens(["the", "cat"], known).tolist() == [1, *known.encode("the"), 1, *known.encode("cat")]
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    meaning = {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": list(first), "pair": [], "special_tokens": meaning}
    config = train.bpe.train("the cat sat", 270, special=("<unk>", "<|endoftext|>", "<s>")).config
    begun = train.bpe.Tokenizer(config | {"post_processor": processor})
    assert train.to_tokens(["the"], begun).tolist() == [2, *begun.encode("the")]
    bare = train.bpe.train("the cat sat", 270, special=("<unk>", "</s>"))
    for ends in 1, (1, 0):
        ended = dataclasses.replace(CONFIG, bos_token_id=None, eos_token_id=ends)
        assert train.to_tokens(["the"], bare, ended).tolist() == [1, *bare.encode("the")]
    begins = dataclasses.replace(CONFIG, bos_token_id=1, eos_token_id=None)
    assert train.to_tokens(["the"], bare, begins).tolist() == [1, *bare.encode("the")]
    with pytest.raises(ValueError, match="begins or ends a text"):
        train.to_tokens(["the"], bare, dataclasses.replace(begins, bos_token_id=None))


def test_the_causal_target_is_the_next_token():
    tokens = np.arange(100)
    inputs, targets = train.causal(tokens, np.array([3, 50]), 5, None, CONFIG)
    assert inputs.tolist() == [[3, 4, 5, 6, 7], [50, 51, 52, 53, 54]]
    assert (targets == inputs + 1).all()


def test_the_masked_objective_hides_what_it_asks_for():
    tokens = np.random.default_rng(0).integers(2, 300, 50000).astype(np.uint16)
    starts = np.arange(0, 49000, 100)
    inputs, targets = train.masked(tokens, starts, 100, np.random.default_rng(1), CONFIG)
    originals = tokens[starts[:, None] + np.arange(100)]
    asked = targets != IGNORE
    assert (targets[asked] == originals[asked]).all() and (inputs[~asked] == originals[~asked]).all()
    assert abs(asked.mean() - 0.15) < 0.01
    assert abs((inputs[asked] == train.MASK).mean() - 0.8) < 0.02
    assert abs((inputs[asked] == originals[asked]).mean() - 0.1) < 0.02


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
    windows = train.windows_of(tokens, 16, "causal", CONFIG)
    mean = train.mean_loss(params, CONFIG, *windows, micro_batch=micro_batch)
    assert mean == pytest.approx(total / (length - 1))


# --- the command line ---


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    words = "the cat sat on a mat and saw one dog run to his red house ".split(" ")
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=3000)))
    return path


def command(*arguments, **options):
    options |= {"env": {"BACKEND": "numpy"} | os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    program = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finished(*arguments):
    process = command(*arguments)
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


@pytest.fixture(scope="session")
def run(text, tmp_path_factory):
    """A finished run of 60 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finished("--data", text, "--steps", 60, "--out", folder, *SMALL)
    assert code == 0 and not err, err  # no progress bar where nobody looks
    return folder, out


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
    tokenizer = train.bpe.load(folder / "tokenizer.json")
    ids, nats = [train.END, *tokenizer.encode(text)], 0.0
    for start in range(0, len(ids) - 1, 16):
        window = xp.asarray(np.array([ids[start : start + 17]]))
        nats += model.loss(params, config, window[:, :-1], window[:, 1:])[0] * (window.shape[1] - 1)
    return nats / np.log(2) / len(text.encode())


def test_the_result_is_that_of_the_saved_weights_on_the_last_tenth_of_the_text(run, text):
    whole = text.read_text()
    last = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_bits_per_byte"] == pytest.approx(bits_per_byte(run[0], whole[len(whole) * 9 // 10 :]), rel=1e-4)


BY_HEART = ["--steps", "200", "--hidden", "64", "--vocab", "258", "--batch", "16", "--lr", "0.03"]


@pytest.fixture(scope="session")
def worse(tmp_path_factory):
    """A finished run that learned letters by heart which follow no rule."""
    letters, folder = tmp_path_factory.mktemp("data") / "letters.txt", tmp_path_factory.mktemp("runs") / "worse"
    letters.write_text("".join(random.Random(0).choices("abcdefgh", k=1000)))
    code, out, err = finished("--data", letters, "--steps", 60, "--out", folder, *SMALL, *BY_HEART)
    assert code == 0, err
    return folder, out, letters


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


@pytest.mark.parametrize("options", [[], BY_HEART])
def test_killed_twice_and_resumed_is_never_stopped(options, run, worse, text, tmp_path):
    folder, (whole, _, text) = tmp_path / "killed", worse if options else (*run, text)
    process = command("--data", text, "--steps", 60, "--save-seconds", 0, "--out", folder, *SMALL, *options)
    for step in 20, 40:
        wait_for_step(process, folder, step)
        process.kill()
        process.communicate()
        process = command("--resume", folder, "--threads", 1, "--data", text)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert weights(folder) == weights(whole) and steps_logged(folder) == steps_logged(whole)
    assert len({tuple(sorted(safetensors.metadata(x / "model.safetensors").items())) for x in (folder, whole)}) == 1


def test_a_time_that_is_over_before_the_first_step_is_a_run_of_one_step(text, tmp_path):
    code, _, errors = finished("--data", text, *SMALL, "--minutes", "0.00001", "--out", tmp_path / "run")
    assert code == 0, errors
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and {"train_loss", "val_loss", "test_loss"} <= last.keys()


def test_an_interrupt_saves_and_says_how_to_go_on(run, text, tmp_path):
    folder = tmp_path / "interrupted"
    process = command("--data", text, "--steps", 60, "--save-seconds", 1000, "--out", folder, *SMALL)
    wait_for_step(process, folder, 10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {folder}" in out and "Traceback" not in err
    assert train.read_progress(folder)["step"] >= 10
    assert finished("--out", folder, "--resume")[0] == 0
    assert weights(folder) == weights(run[0])


def test_a_finished_run_says_so_and_stays_as_it_is(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = finished("--resume", folder)
    assert code == 0 and "is finished, after 60 steps" in out and not err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_ended_in_its_first_save_can_begin_again(text, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert finished("--data", text, "--steps", 3, "--out", whole, *SMALL)[0] == 0
    given = dict(zip([name[2:].replace("-", "_") for name in SMALL[::2]], map(int, SMALL[1::2])))
    for name in "save_training", "save_tokenizer":
        folder, place = tmp_path / name, train if name == "save_training" else train.Run
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_: 1 / 0)
            run = train.Run(train.complete(given | {"data": [str(text)], "steps": 3}), folder)
            with pytest.raises(ZeroDivisionError):
                train.train(run)
        (folder / "training.safetensors.new").write_bytes(b"a part")
        assert "no run to go on with" in finished("--resume", folder)[2]
        assert finished("--data", text, "--steps", 3, "--out", folder, *SMALL)[0] == 0
        assert weights(folder) == weights(whole)


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(run, text, tmp_path):
    """The largest file that the process may write stands in for a disk without room."""
    folder = shutil.copytree(run[0], tmp_path / "copy")
    before = (folder / "training.safetensors").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    new = "--data", text, "--out", tmp_path / "new", *SMALL
    for arguments in ("--resume", folder, "--steps", 70), (*new, "--steps", 3):
        process = command(*arguments, preexec_fn=limit)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "cannot be written" in err and err.count("\n") == 1, err
    assert (folder / "training.safetensors").read_bytes() == before
    assert finished("--resume", folder, "--steps", 70)[0] == 0
    assert finished(*new, "--steps", 3)[0] == 0  # in the folder of the run that could not begin


def test_all_files_may_be_read_by_the_same_people(run):
    assert len({path.stat().st_mode for path in run[0].iterdir()}) == 1


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with train.thread_pool(8) as pool:
        folders = list(pool.map(lambda _: train.new_folder(), range(40)))
    assert sorted(folders) == sorted(f"runs/{i}" for i in range(1, 41)) and all(map(os.path.isdir, folders))


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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path):
    folder = tmp_path / "diverged"
    code, out, err = finished(
        "--data", text, "--steps", 60, "--lr", "1e38", "--save-seconds", 0, "--out", folder, *SMALL
    )
    assert code == 1 and "not finite at step" in err and "Traceback" not in err
    params, _ = model.load(folder)
    assert all(xp.isfinite(value).all() for value in params.values())


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


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("arch", [name for name, c in model.ARCHITECTURES.items() if c.experts])
def test_any_number_of_experts_fits_the_sibling(arch, experts):
    settings = {name: default for name, (_, default, _) in train.SETTINGS.items()}
    settings |= {"arch": arch, "experts": experts, "experts_per_token": 1}
    config = train.sibling(settings, SimpleNamespace(vocab_size=300))
    if arch == "deepseek-v3":  # groups of at least two, half of which are used
        assert (config.n_group, config.topk_group) == {8: (4, 2), 12: (6, 3), 2: (1, 1)}.get(experts, (1, 1))
    assert config.experts == experts and not config.norm_topk_prob  # which would leave the router without a gradient


@pytest.mark.parametrize("attention, exponent", [("sliding", 2), ("strided", 1.5), ("fixed", 1.5), ("bigbird", 1)])
def test_the_work_of_sparse_attention_grows_as_the_docstring_says(attention, exponent):
    """Keys that are looked at, as the context of a sibling grows; a sliding window is a fixed share of it."""
    work = []
    for context in 1024, 16384:
        settings = {name: default for name, (_, default, _) in train.SETTINGS.items()}
        config = train.sibling(settings | {"attention": attention, "context": context}, SimpleNamespace(vocab_size=300))
        mask = model.layer_options(config, np.zeros((1, context), int), np.float32)[0].mask
        plan = flash.plan(mask, context, context, 16, 16, 16)
        work.append(sum((rows.stop - rows.start) * sum(flash.length(c) for c, _ in columns) for rows, columns in plan))
    assert np.log(work[1] / work[0]) / np.log(16) == pytest.approx(exponent, abs=0.1)


def test_a_taken_folder_is_left_alone(run, text):
    folder, _ = run
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = finished("--data", text, "--steps", 3, "--out", folder, *SMALL)
    assert code == 1 and str(folder) in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


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


def test_resuming_what_cannot_be_resumed_is_one_sentence(run, text, tmp_path):
    for arguments, what in [
        (["--resume", tmp_path], "no run"),
        (["--resume"], "folder"),
        (["--resume", run[0], "--hidden", "32"], "--hidden"),
    ]:
        code, _, err = finished(*arguments)
        assert code == 1 and what in err and err.count("\n") == 1
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "training.safetensors").write_bytes((run[0] / "training.safetensors").read_bytes()[:1000])
    code, _, err = finished("--resume", damaged)
    assert code == 1 and "damaged" in err and err.count("\n") == 1


def set_in(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@pytest.mark.parametrize("value", [None, -1, 1.5, "x", [], [1], {}, True, float("nan"), [[]]])
def test_a_damaged_header_of_a_run_is_one_sentence(value, run, tmp_path):
    """Whatever stands where a number, a name or the settings should: the run goes on, or says what is wrong."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(run[0], tmp_path / "damaged")
    path = folder / "training.safetensors"
    progress, arrays = train.read_progress(folder), load_file(path)
    places = [[name] for name in progress] + [["settings", name] for name in progress["settings"]]
    for place in [["settings", "unknown"], *places]:
        changed = json.loads(json.dumps(progress))
        set_in(changed, place, value)
        save_file(arrays, path, {"progress": json.dumps(changed)})
        try:
            given = {name: default for name, (_, default, _) in train.SETTINGS.items()}
            train.Run(given | train.read_progress(folder)["settings"] | {"threads": 1}, folder, resume=True)
        except (ValueError, OSError) as error:
            assert len(str(error)) < 300 and "\n" not in str(error)


def test_weights_that_are_not_of_the_model_are_one_sentence(run, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(run[0], tmp_path / "damaged")
    path = folder / "training.safetensors"
    notes, arrays = safetensors.metadata(path), load_file(path)
    norm = "params/model.norm.weight"
    for changed in (
        {name: w for name, w in arrays.items() if name != norm},
        arrays | {norm: np.ones(3, np.float32)},
        arrays | {"x": np.ones(3, np.float32)},
        arrays | {"state/m/x": np.ones(3, np.float32)},
    ):
        save_file(changed, path, notes)
        code, _, err = finished("--resume", folder)
        assert code == 1 and "damaged" in err and err.count("\n") == 1, err


# --- fine-tuning ---

BASE = dataclasses.replace(CONFIG, vocab_size=270, max_position_embeddings=64, eos_token_id=train.END)
TUNING = ["--context", "64", "--batch", "4", "--threads", "1", "--lr", "0.02"]


@pytest.fixture(scope="session")
def base(text, tmp_path_factory):
    """A model that knows nothing yet, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save(folder, model.init(BASE, 0), BASE)
    train.bpe.train(text.read_text(), 270, special=train.SPECIAL).save(folder)
    return folder


def conversation(i):
    colour = ["red", "blue", "green"][i % 3]
    question = {"role": "user", "content": f"house {i}, {colour}?"}
    return [question, {"role": "assistant", "content": f"it is {colour}"}]


def write_chats(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", map(conversation, range(40)))


@pytest.fixture(scope="session")
def assistant(base, chats, tmp_path_factory):
    """A model fine-tuned for 50 steps, and one of which adapters were trained."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("tuned", "adapted")]
    for folder, options in zip(folders, ([], ["--lora", 3])):
        tuning = "--finetune", chats, "--init", base, "--steps", 50, "--out", folder, *TUNING, *options
        code, out, err = finished(*tuning)
        assert code == 0 and "--chat" in out and "bits per byte" not in out, err
    return folders


def run_of(tmp_path, **given):
    """A run in this process, at its first step."""
    return train.Run(train.complete({"steps": 3, "context": 64, "batch": 4, "threads": 1} | given), tmp_path / "run")


def stored(folder):
    """What a run goes on from: {"params/name": array, "state/key/name": array}."""
    arrays = safetensors.read(folder / "training.safetensors")
    return {name: np.array(value) for name, value in arrays.items()}


def test_the_targets_of_fine_tuning_are_the_answers(base, chats, tmp_path):
    run = run_of(tmp_path, finetune=[str(chats)], init=str(base))
    said = []
    for step in range(len(run.packed[0])):  # of four rows each: every row four times
        run.step = step
        inputs, targets, segments = run.batch()
        assert inputs.shape == targets.shape == segments.shape == (4, 64)
        said += run.tokenizer.decode(targets[targets != IGNORE].tolist()).split("<|im_end|>")[:-1]
    asked = [messages[1]["content"] for i, messages in enumerate(map(conversation, range(40))) if i % 10 < 8]
    assert sorted(said) == sorted(4 * asked)
    for part, first in ("val", 8), ("test", 9):
        (_, targets, _), _ = run.held_out[part]
        answers = run.tokenizer.decode(targets[targets != IGNORE].tolist())
        assert answers == "".join(conversation(i)[1]["content"] + "<|im_end|>" for i in range(first, 40, 10))


def test_every_row_comes_once_before_any_comes_again(base, chats, tmp_path):
    run = run_of(tmp_path, finetune=[str(chats)], init=str(base), batch=3)
    rows = len(run.packed[0])
    seen = []
    for step in range(2 * rows):
        run.step = step
        seen += [row.tobytes() for row in run.batch()[0]]
    for epoch in range(6):
        assert set(seen[epoch * rows : (epoch + 1) * rows]) == {row.tobytes() for row in run.packed[0]}
    assert seen[:rows] != seen[rows : 2 * rows]  # in another order


@pytest.mark.parametrize("adapted", [False, True])
def test_fine_tuning_learns_to_answer_and_to_stop(assistant, adapted):
    folder = assistant[adapted]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < (0.9 if adapted else 0.6) * lines[0]["train_loss"]
    assert "test_loss" in lines[-1] and not any("bits_per_byte" in name for line in lines for name in line)
    params, config = model.load(folder)
    tokenizer = train.bpe.load(folder / "tokenizer.json")
    end = train.chat.end_token(tokenizer)
    assert config.vocab_size == tokenizer.vocab_size == 272 and config.eos_token_id == (end, train.END)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["chat_template"] == train.chat.jinja(tokenizer)
    if not adapted:
        prompt = train.chat.prompt(tokenizer, conversation(9)[:1])
        answer = list(model.generate(params, config, prompt, 20))
        assert answer[-1] == end and tokenizer.decode(answer).startswith("it")


def test_adapters_alone_are_trained_and_what_is_saved_is_merged(assistant, base):
    folder = assistant[1]
    weights, _ = model.load(folder)
    kept = {name: value for name, value in stored(folder).items() if name.startswith("params/")}
    trained = {name.removeprefix("params/"): xp.asarray(value) for name, value in kept.items()}
    start, _ = model.load(base)
    assert trained.keys() - start.keys() == train.lora.init(start, 3).keys()
    assert all((trained[name][: len(w)] == w).all() for name, w in start.items())  # below are the new tokens
    merged, _ = train.lora.merge(trained)
    for name, w in weights.items():
        close(w, merged[name], 1e-6)
        assert (w[: len(start[name])] == start[name]).all() == (w.ndim == 1)
    moving = {name.split("/", 2)[2] for name in stored(folder) if name.startswith("state/")}
    assert moving == trained.keys() - start.keys()


@pytest.mark.parametrize("adapted", [False, True])
def test_fine_tuning_killed_and_resumed_is_never_stopped(adapted, assistant, base, chats, tmp_path):
    folder, options = tmp_path / "killed", ["--lora", 3] if adapted else []
    tuning = "--finetune", chats, "--init", base, "--steps", 50, "--out", folder, *TUNING, *options
    process = command(*tuning, "--save-seconds", 0)
    for step in 10, 30:
        wait_for_step(process, folder, step)
        process.kill()
        process.communicate()
        process = command("--resume", folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    whole = assistant[adapted]
    assert weights(folder) == weights(whole) and steps_logged(folder) == steps_logged(whole)
    for name, value in stored(whole).items():
        assert (stored(folder)[name] == value).all(), name
    for file in "config.json", "tokenizer.json", "tokenizer_config.json":
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_an_assistant_is_fine_tuned_again(assistant, chats, tmp_path):
    folder = tmp_path / "again"
    code, _, err = finished("--finetune", chats, "--init", assistant[0], "--steps", 3, "--out", folder, *TUNING)
    assert code == 0, err
    assert (folder / "tokenizer.json").read_bytes() == (assistant[0] / "tokenizer.json").read_bytes()
    assert (folder / "config.json").read_bytes() == (assistant[0] / "config.json").read_bytes()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]
    assert first < json.loads((assistant[0] / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "the cat"}],
        [{"role": "system", "content": "the mat"}, {"role": "assistant", "content": ""}],
        [{"role": role, "content": role} for role in ("user", "assistant", "assistant", "user")],
        [
            {"role": "user", "content": "the"},
            {"role": "assistant", "content": "the cat " * 99},
        ],  # more than the context
        [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "\0\u2028"}],
    ],
)
def test_any_conversation_with_an_answer_can_be_learned_from(messages, base, tmp_path):
    run = run_of(tmp_path, finetune=[str(write_chats(tmp_path / "x.jsonl", 3 * [messages]))], init=str(base), steps=4)
    assert np.isfinite(train.train(run)["test_loss"])
    _, config = model.load(run.folder)
    assert config.vocab_size == 272


def test_a_wide_model_is_tuned_with_a_lower_learning_rate(base, tmp_path):
    assert train.complete({})["lr"] == 0.01
    assert (
        train.complete({"init": str(base)})["lr"] == train.complete({"init": str(base), "finetune": []})["lr"] == 0.003
    )
    wide = shutil.copytree(base, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    for hidden, rate in (128, 0.003), (576, 0.00031), (2048, 4.7e-5):
        (wide / "config.json").write_text(json.dumps(config | {"hidden_size": hidden}))
        assert train.complete({"init": str(wide)})["lr"] == pytest.approx(rate, rel=0.02)
    assert train.complete({"init": str(wide), "lr": 0.5})["lr"] == 0.5


def test_a_text_of_one_character_is_too_little_for_a_model_to_go_on_with(base, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="too few"):
        run_of(tmp_path, data=[str(tmp_path / "a.txt")], init=str(base))


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


def test_qk_clip_reaches_the_model_of_init_and_its_adapters(base, text, tmp_path):
    for rank, folder in (None, tmp_path / "whole"), (2, tmp_path / "adapted"):
        folder.mkdir()
        run = run_of(folder, data=[str(text)], init=str(base), lora=rank, qk_clip=1e-3)
        run.params = {name: w + 0.1 for name, w in run.params.items()}
        before, _ = train.lora.merge(run.params)
        before = {name: w.copy() for name, w in before.items()}
        run.adjust(
            {0: {"max_logits": xp.array([1e-3, 4e-3])}}
        )  # heads of 8 rows; the second has to shrink to a quarter
        after, _ = train.lora.merge(run.params)
        name = "model.layers.0.self_attn.q_proj.weight"
        close(after[name][:8], before[name][:8], 1e-6)
        close(after[name][8:], before[name][8:] / 4, 1e-6)


@pytest.mark.parametrize(
    "options, what",
    [
        (["--finetune", "CHATS"], "--init"),
        (["--finetune"], "--init"),
        (["--lora", "4"], "--init"),
        (["--finetune", "CHATS", "--init", "BASE", "--data", "TEXT"], "--data"),
        (["--finetune", "CHATS", "--init", "BASE", "--objective", "masked"], "--objective"),
        (["--data", "TEXT", "--init", "BASE", "--objective", "masked"], "trained to continue"),
        (["--finetune", "CHATS", "--init", "BASE", "--hidden", "16"], "--hidden"),
        (["--data", "TEXT", "--init", "BASE", "--vocab", "300"], "--vocab"),
        (["--data", "TEXT", "--init", "BASE", "--kv-heads", "1"], "--kv-heads"),
        (["--data", "TEXT", "--init", "BASE", "--arch", "qwen3"], "--arch"),
        (["--finetune", "CHATS", "--init", "BASE", "--context", "65"], "64 tokens"),
        (["--finetune", "CHATS", "--init", "BASE", "--context", "8"], "--context"),
        (["--finetune", "CHATS", "--init", "BASE", "--lora", "0"], "--lora"),
        (["--finetune", "CHATS", "--init", "BASE", "--mtp", "0.3"], "--mtp"),
        (["--finetune", "CHATS", "--init", "NOWHERE"], "NOWHERE"),
        (["--finetune", "NOWHERE", "--init", "BASE"], "No such file"),
        (["--finetune", "TEXT", "--init", "BASE"], "line 1"),
        (["--finetune", "BAD", "--init", "BASE"], "line 3"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(options, what, base, chats, text, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*chats.read_text().splitlines()[:2], '{"messages": []}']))
    paths = {"CHATS": chats, "BASE": base, "TEXT": text, "BAD": bad, "NOWHERE": tmp_path / "NOWHERE"}
    small = [] if "--context" in options else ["--context", "64"]
    before = sorted(tmp_path.iterdir())
    code, out, err = finished(*[paths.get(x, x) for x in options], *small, "--steps", 3, "--out", tmp_path / "run")
    assert code == 1 and what in err and "Traceback" not in err and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before


def test_what_fine_tuning_began_with_cannot_change(assistant, base, chats, tmp_path):
    for options, what in [
        (["--lora", "4"], "--lora"),
        (["--init", tmp_path], "--init"),
        (["--finetune", tmp_path / "other"], "--finetune"),
    ]:
        code, _, err = finished("--resume", assistant[1], *options)
        assert code == 1 and what in err and err.count("\n") == 1
    changed = write_chats(tmp_path / "chats.jsonl", map(conversation, range(30)))
    folder = tmp_path / "run"
    assert finished("--finetune", changed, "--init", base, "--steps", 2, "--out", folder, *TUNING)[0] == 0
    write_chats(changed, map(conversation, range(31)))
    code, _, err = finished("--resume", folder, "--steps", 3)
    assert code == 1 and "is not what" in err and err.count("\n") == 1
