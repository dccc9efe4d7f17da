"""Checkpoints: what is saved is loaded, published formats are read, and damaged files are refused."""

import dataclasses
import json
import mmap
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import assert_one_sentence, damaged
from gradcheck import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import LATENT, TINY, VARIANTS, variant

import architectures
import checkpoint
import model
import train
from checkpoint import config_from_json, config_to_json
from engine import safetensors, to_numpy, xp

seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=20, deadline=None)


@fast
@given(variant, seed)
def test_saved_is_loaded(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("checkpoint")
    params = model.init(config, seed)
    model.save(folder, params, config)
    loaded, loaded_config = model.load(folder)
    loaded["model.norm.weight"] += 0  # may be trained on
    assert loaded_config == config and list(loaded) == list(params)
    assert all((loaded[name] == params[name]).all() and loaded[name].dtype == np.float32 for name in params)


def stored(dtype, shape, data, offsets=None):
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets or [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_half_precision_is_read(tmp_path):
    numbers = np.array([[1.0, -2.5], [0.0, 65280.0]], np.float32)
    for dtype, data in (
        ("BF16", numbers.view("<u2")[:, 1::2].tobytes()),
        ("F16", numbers.astype("<f2").tobytes()),
    ):
        (tmp_path / "w").write_bytes(stored(dtype, [2, 2], data))
        close(safetensors.read(tmp_path / "w")["w"].astype(np.float32), numbers)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"w": {}}',
        stored("F32", [2], b"\x00" * 4),
        stored("F32", [2], b"\x00" * 8)[:-1],
        stored("F32", [2], b"\x00" * 8, [8, 16]),
        stored("F32", [2], b"\x00" * 8, [-8, 0]),
        stored("F32", [-2, -1], b"\x00" * 8),
        stored("F32", [2**40, 2**40], b"\x00" * 8),
        stored("I64", [1], b"\x00" * 8),
        stored("F32", [True], b"\x00" * 4),
        stored("F32", [1] * 70, b"\x00" * 4),
        stored("F32", [1], b"\x00" * 4) + b"\x00",
        stored("F32", [1], b"\x00" * 8),
        stored("F32", [1], b"\x00" * 8, [4, 8]),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        (lambda entry: struct.pack("<Q", 2 * len(entry) - 1) + entry[:-1] + b"," + entry[1:] + b"\x00" * 4)(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, data):
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(ValueError, match="/w"):
        safetensors.read(tmp_path / "w")


def test_eight_bit_floats_are_read(tmp_path):
    (tmp_path / "w").write_bytes(stored("F8_E4M3", [256], bytes(range(256))))
    numbers = safetensors.read(tmp_path / "w")["w"]
    assert numbers[:4].tolist() == [0, 2**-9, 2 * 2**-9, 3 * 2**-9] and numbers[8] == 2**-6
    assert numbers[0x38] == 1 and numbers[0x3C] == 1.5 and numbers[0x7E] == 448 and np.isnan(numbers[0x7F])
    assert (numbers[129:255] == -numbers[1:127]).all() and (np.diff(numbers[:127]) > 0).all()


def test_deepseeks_blocks_are_scaled_and_its_mtp_layer_layer_is_read_or_left_out(tmp_path):
    from safetensors.numpy import save_file

    config = dataclasses.replace(TINY, **VARIANTS["mtp"])
    params = {name: to_numpy(value) for name, value in model.init(config, 0).items()}
    name, mtp_layer = "model.layers.0.mlp.gate_proj.weight", "model.layers.2."
    published = checkpoint.config_to_json(config) | {"num_nextn_predict_layers": 1}
    published["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 3]}
    (tmp_path / "config.json").write_text(json.dumps(published))
    scale = np.arange(9, dtype=np.float32).reshape(3, 3) + 1  # a matrix (10, 8) has 3 by 3 blocks of (4, 3)
    copies = {f"{mtp_layer}embed_tokens.weight": params["lm_head.weight"]}
    copies[f"{mtp_layer}shared_head.head.weight"] = params["lm_head.weight"]
    save_file(params | copies | {f"{name}_scale_inv": scale}, tmp_path / "model.safetensors")
    loaded, loaded_config = model.load(tmp_path)
    assert loaded_config == config and list(loaded) == list(params)
    rows, columns = np.arange(10)[:, None] // 4, np.arange(8) // 3
    close(loaded[name], params[name] * scale[rows, columns], 1e-6)

    main = {n: value for n, value in params.items() if not n.startswith(mtp_layer)}
    save_file(main, tmp_path / "model.safetensors")
    loaded, loaded_config = model.load(tmp_path)
    assert list(loaded) == list(main) and loaded_config.num_nextn_predict_layers == 0

    (tmp_path / "model.safetensors").write_bytes(stored("F8_E4M3", [1], b"\x00"))
    with pytest.raises(ValueError, match="without a scale"):
        model.load(tmp_path)
    save_file(main | {f"{name}_scale_inv": scale.T[:2]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="scales"):
        model.load(tmp_path)


def test_what_is_stored_as_it_is_used_stays_in_the_file(tmp_path):
    params = model.init(TINY, 0)
    model.save(tmp_path, params, TINY)
    if xp is not np:
        pytest.skip("a GPU has its own memory")
    assert not any(isinstance(base_of(value), mmap.mmap) for value in model.load(tmp_path)[0].values())
    loaded, _ = model.load(tmp_path, mapped=True)
    assert all(isinstance(base_of(value), mmap.mmap) for value in loaded.values())
    assert all((loaded[name] == params[name]).all() for name in params)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded["model.norm.weight"][:] = 7
    assert (tmp_path / "model.safetensors").read_bytes() == before
    halves, _ = model.load(tmp_path, np.float16)
    assert all(value.dtype == np.float16 for value in halves.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_loading_takes_the_memory_of_the_weights_once(tmp_path):
    config = dataclasses.replace(TINY, num_hidden_layers=24, hidden_size=256, intermediate_size=1024)
    params = model.init(config, 0)
    model.save(tmp_path, params, config)
    script = """
import re, sys, checkpoint
most = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = most()
params, _ = checkpoint.load(sys.argv[1], mapped=False)
print((most() - before) * 2**10)
"""
    env = os.environ | {"BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, env=env, check=True)
    assert int(done.stdout) < 1.4 * sum(w.nbytes for w in params.values())


def base_of(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def test_a_checkpoint_in_shards(tmp_path):
    from safetensors.numpy import save_file

    params = model.init(TINY, 0)
    model.save(tmp_path, params, TINY)
    (tmp_path / "model.safetensors").unlink()
    names = list(params)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: to_numpy(params[name]) for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded, _ = model.load(tmp_path)
    assert all((loaded[name] == params[name]).all() for name in params)
    copy = tmp_path / "model-3.safetensors"
    save_file({names[0]: to_numpy(params[names[0]])}, copy)
    index["weight_map"]["copy"] = copy.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="in two files"):
        model.load(tmp_path)
    changed = params | {"model.norm.weight": params["model.norm.weight"] + 1}
    index_before = (tmp_path / "model.safetensors.index.json").read_text()
    model.save(tmp_path, changed, TINY)
    assert (model.load(tmp_path)[0]["model.norm.weight"] == changed["model.norm.weight"]).all()
    (tmp_path / "model.safetensors.index.json").write_text(index_before)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside"):
        model.load(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    params = model.init(TINY, 0)
    with pytest.raises(ValueError, match="not a folder"):
        model.load(tmp_path / "missing")
    with pytest.raises(OSError):
        model.load(tmp_path)
    for change, what in [
        (lambda p: p.pop("model.norm.weight"), "no weight model.norm.weight"),
        (lambda p: p.update({"model.norm.weight": xp.zeros(3, np.float32)}), "shape"),
        (lambda p: p.update({"extra.weight": xp.zeros(3, np.float32)}), "extra.weight"),
    ]:
        changed = dict(params)
        change(changed)
        model.save(tmp_path, changed, TINY)
        with pytest.raises(ValueError, match=what):
            model.load(tmp_path)
    model.save(tmp_path, params, TINY)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        model.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        model.load(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder for each variant, and what its files of JSON hold."""
    folders = {}
    for name, changes in VARIANTS.items():
        folder, config = tmp_path_factory.mktemp(name), dataclasses.replace(TINY, **changes)
        params = model.init(config, 0)
        model.save(folder, params, config)
        folders[folder] = {
            "config.json": json.loads((folder / "config.json").read_text()),
            "generation_config.json": {"eos_token_id": [1, 2]},
            "model.safetensors.index.json": {"weight_map": dict.fromkeys(params, "model.safetensors")},
        }
    return folders


@settings(max_examples=600, deadline=None)
@given(seed)
def test_damaged_json_is_read_or_is_one_sentence(published, seed):
    rng = random.Random(seed)
    folder = rng.choice(list(published))
    name = rng.choice(list(published[folder]))
    for other, content in published[folder].items():
        (folder / other).write_text(json.dumps(content))
    (folder / name).write_bytes(damaged(published[folder][name], rng))
    try:
        _, config = model.load(folder)
        json.dumps(checkpoint.config_to_json(config))
    except (ValueError, OSError) as error:
        assert_one_sentence(error, folder)


def test_a_name_of_a_published_model_is_answered_with_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M"):
        model.load("HuggingFaceTB/SmolLM2-135M")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="^runs/7 is not a folder with a checkpoint$"):
        model.load("runs/7")


def test_going_on_with_a_damaged_config_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": "many"}))
    with pytest.raises(ValueError, match="max_position_embeddings") as refusal:
        train.complete(train.Training(init=str(tmp_path)))
    assert_one_sentence(refusal.value, tmp_path)


# --- config.json ---


@settings(max_examples=30, deadline=None)
@given(variant)
def test_a_config_survives_its_json(config):
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_a_router_says_how_it_scores_and_chooses():
    """By the names that llama.cpp reads: without them it takes a softmax."""
    latent = config_to_json(dataclasses.replace(TINY, **LATENT))
    assert (latent["scoring_func"], latent["topk_method"]) == ("sigmoid", "noaux_tc")
    assert "scoring_func" not in config_to_json(TINY)


def test_the_newer_config_form_is_the_older_one():
    old = config_to_json(dataclasses.replace(TINY, rope_scaling=architectures.ARCHITECTURES["llama3.2"].rope_scaling))
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], **old["rope_scaling"]}
    assert config_from_json(new) == config_from_json(old)


def test_the_newer_names_of_experts_are_the_older_ones():
    for name, other in (
        ("experts", {"num_experts": "num_local_experts"}),
        (
            "mtp",
            {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        ),
    ):
        config = dataclasses.replace(TINY, **VARIANTS[name])
        newer = {other.get(key, key): value for key, value in config_to_json(config).items()}
        assert config_from_json(newer) == config


@pytest.mark.parametrize("sparse", [{"stride": 0}, {"strides": 3}, {"block": "x"}, {"kind": "window"}])
def test_a_pattern_that_is_none_is_refused(sparse):
    published = config_to_json(dataclasses.replace(TINY, **VARIANTS["sparse"]))
    config_from_json(published)
    with pytest.raises(ValueError):
        config_from_json(published | {"sparse_attention": sparse})


def test_what_is_null_or_switched_off_is_not_the_default():
    latent = config_to_json(dataclasses.replace(TINY, **LATENT))
    for name in "norm_topk_prob", "rope_interleave":
        config = config_from_json(latent | {name: None})
        assert getattr(config, name) is False and config_from_json(config_to_json(config)) == config
    for name, default in ("bos_token_id", 0), ("eos_token_id", 1):
        left_out = {key: value for key, value in latent.items() if key != name}
        assert getattr(config_from_json(left_out), name) == default
        assert getattr(config_from_json(latent | {name: None}), name) is None
    experts = config_to_json(dataclasses.replace(TINY, **VARIANTS["experts"]))
    config = config_from_json(experts | {"sliding_window": 4, "use_sliding_window": False})
    assert config.sliding_window is None and config_to_json(config)["use_sliding_window"] is False
    config = config_from_json(experts | {"sliding_window": 4, "use_sliding_window": True})
    assert [config.window(i) for i in range(2)] == [4, 4] and config_from_json(config_to_json(config)) == config


def test_kimi_k2_is_deepseek_v3_under_another_name():
    config = dataclasses.replace(TINY, **LATENT)
    assert config_from_json(config_to_json(config) | {"model_type": "kimi_k2"}) == config


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("use_sliding_window", True),
        ("rope_scaling", {"rope_type": "longrope", "factor": 4.0}),
        ("num_key_value_heads", 3),
        ("hidden_size", None),
        ("no_rope_layers", [1]),
        ("layer_types", ["full_attention", "spiral_attention"]),
        ("layer_types", ["strided_attention"]),
    ],
)
def test_what_the_model_lacks_is_refused(field, value):
    published = config_to_json(TINY) | {field: value}
    with pytest.raises(ValueError):
        config = config_from_json(published)
        model.forward(model.init(config), config, xp.zeros((1, 2), int))


@pytest.mark.parametrize(
    "field, value",
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("num_nextn_predict_layers", 2),
        ("n_group", 3),
        ("topk_group", 5),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 5),
        ("moe_intermediate_size", 0),
        ("kv_lora_rank", 0),
        ("q_lora_rank", 0),
        ("qk_rope_head_dim", 3),
        ("v_head_dim", -1),
        ("n_routed_experts", "8"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, 128]}),
        ("decoder_sparse_step", 2),
        ("num_hidden_layers", 10_001),
        ("n_routed_experts", 100_004),
        ("qk_rope_head_dim", 10**9),
        ("max_position_embeddings", None),
        ("model_type", []),
        ("rope_theta", 10**400),
        ("rope_theta", 1),
        ("rope_theta", float("nan")),
        ("rms_norm_eps", -1.0),
        ("hidden_size", True),
        ("eos_token_id", [1.5]),
        *(
            ("rope_scaling", architectures.ARCHITECTURES["deepseek-v3"].rope_scaling | {name: value})
            for name in ("factor", "beta_fast", "mscale", "mscale_all_dim", "attention_factor")
            for value in ("x", -1, float("nan"), 10**400)
        ),
    ],
)
def test_experts_and_latents_that_do_not_fit_are_refused(field, value):
    published = config_to_json(dataclasses.replace(TINY, **LATENT))
    config_from_json(published)
    with pytest.raises(ValueError):
        config_from_json(published | {field: value})


def test_smollm3_skips_rope_in_every_fourth_layer_or_as_often_as_it_says():
    published = config_to_json(dataclasses.replace(TINY, model_type="smollm3", num_hidden_layers=9))
    layers = lambda **more: config_from_json(published | more).no_rope_layers
    assert layers() == (1, 1, 1, 0, 1, 1, 1, 0, 1)
    assert layers(no_rope_layer_interval=3) == (1, 1, 0) * 3
    assert layers(no_rope_layer_interval=1) == (0,) * 9
    assert layers(no_rope_layers=[1] * 9) == (1,) * 9


def test_weights_beyond_a_quarter_of_the_memory_stay_in_the_file(tmp_path, monkeypatch):
    if xp is not np:
        pytest.skip("a GPU has its own memory")
    params = model.init(TINY, 0)
    model.save(tmp_path, params, TINY)
    size = sum(w.nbytes for w in params.values())
    for pages, mapped in (4 * size, False), (4 * size - 1, True):
        monkeypatch.setattr(checkpoint.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
        loaded, _ = model.load(tmp_path)
        assert isinstance(base_of(next(iter(loaded.values()))), mmap.mmap) == mapped
