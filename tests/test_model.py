"""The model: gradients through all of it, generation with and without cache, and what checkpoints survive."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from gradcheck import check, close
from hypothesis import given, settings
from hypothesis import strategies as st

import architectures
import checkpoint
import model
from backend import to_numpy, xp

seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=20, deadline=None)
TINY = model.Config(
    model_type="llama",
    tie_word_embeddings=True,
    vocab_size=13,
    hidden_size=8,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=24,
    initializer_range=0.5,
)
VARIANTS = {
    "llama": {"rope_scaling": architectures.LLAMA3_SCALING},
    "qwen3": {"model_type": "qwen3", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": (1, 0)},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "window": {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 3},
    "bidirectional": {"causal": False},
}
variant = st.sampled_from(sorted(VARIANTS)).map(lambda name: dataclasses.replace(TINY, **VARIANTS[name]))
generative = variant.filter(lambda config: config.causal)


def tokens_of(seed, config, *shape):
    return xp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape))


@settings(max_examples=12, deadline=None)
@given(variant, seed)
def test_the_gradient_of_every_weight(config, seed):
    params = model.init(config, seed % 1000, np.float64)
    tokens, targets = tokens_of(seed, config, 2, 5), tokens_of(seed + 1, config, 2, 5)
    targets[0, 0] = -100
    options = {"coordinates": 3, "directions": 1, "tolerance": 1e-5}
    check(lambda params: model.loss(params, config, tokens, targets), params, **options)
    check(lambda params: model.forward(params, config, tokens), params, **options)


@fast
@given(variant, seed)
def test_gradients_have_the_names_shapes_and_dtype_of_the_weights(config, seed):
    params = model.init(config, seed)
    tokens = tokens_of(seed, config, 2, 6)
    loss, backward = model.loss(params, config, tokens, tokens)
    grads = backward()
    assert isinstance(loss, float) and list(grads) == list(params) == list(model.shapes(config))
    assert all(grads[n].shape == params[n].shape and grads[n].dtype == np.float32 for n in params)
    logits, _ = model.forward(params, config, tokens)
    assert logits.shape == (2, 6, config.vocab_size) and logits.dtype == np.float32


@fast
@given(generative, st.integers(1, 8), seed)
def test_no_token_sees_a_later_one_or_another_row(config, cut, seed):
    params, tokens = model.init(config, seed, np.float64), tokens_of(seed, config, 2, 9)
    other = tokens.copy()
    other[0, cut:] = (other[0, cut:] + 1) % config.vocab_size
    logits, changed = (model.forward(params, config, t)[0] for t in (tokens, other))
    close(changed[0, :cut], logits[0, :cut])
    close(changed[1], logits[1])
    assert abs(changed[0, cut:] - logits[0, cut:]).max() > 1e-9


def test_a_bidirectional_model_sees_later_tokens():
    config = dataclasses.replace(TINY, causal=False)
    params, tokens = model.init(config, 0), tokens_of(0, config, 1, 6)
    other = tokens.copy()
    other[0, -1] = (other[0, -1] + 1) % config.vocab_size
    assert abs(model.forward(params, config, tokens)[0] - model.forward(params, config, other)[0])[0, 0].max() > 1e-6


# --- generation ---


def greedy_without_cache(params, config, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = model.forward(params, config, xp.asarray(np.array([tokens])))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@fast
@given(generative, st.lists(st.integers(1, 9), min_size=1, max_size=4), seed)
def test_cached_batches_of_any_lengths_are_single_uncached_runs(config, lengths, seed):
    params = model.init(config, seed, np.float64)
    prompts = [to_numpy(tokens_of(seed + n, config, n)).tolist() for n in lengths]
    expected = [greedy_without_cache(params, config, prompt, 7) for prompt in prompts]
    together = np.stack(list(model.generate_batch(params, config, prompts, 7, stop=[])), axis=1)
    assert together.tolist() == expected
    assert list(model.generate(params, config, prompts[0], max_new_tokens=7, temperature=0)) == expected[0]


@fast
@given(seed)
def test_a_row_ends_with_its_stop_token(seed):
    params = model.init(TINY, seed)
    prompts = [[1, 2], [3], [4, 5, 6]]
    free = np.stack(list(model.generate_batch(params, TINY, prompts, 9, 1.0, stop=[])))
    stop = int(free[4, 0])
    stopped = np.stack(list(model.generate_batch(params, TINY, prompts, 9, 1.0, stop=[stop])))
    first = (free[:, 0] == stop).argmax()
    assert (stopped[: first + 1, 0] == free[: first + 1, 0]).all() and (stopped[first + 1 :, 0] == -1).all()
    config = dataclasses.replace(TINY, eos_token_id=stop)
    assert list(model.generate(params, config, prompts[0], 9)) == list(
        model.generate(params, TINY, prompts[0], 9, stop=[stop])
    )


def test_what_does_not_fit_into_the_context_window_is_refused_with_both_lengths():
    params = model.init(TINY, 0)
    assert len(list(model.generate(params, TINY, [1] * 20, 4))) == 4
    with pytest.raises(ValueError, match="20 tokens.* 5 .*24"):
        model.generate(params, TINY, [1] * 20, 5)
    for prompt, what in ([], "at least one token"), ([13], "vocabulary of 13"):
        with pytest.raises(ValueError, match=what):
            model.generate(params, TINY, prompt, 1)


@fast
@given(st.integers(2, 12), st.integers(1, 5), st.floats(0.05, 1), st.floats(0.1, 3), seed)
def test_sampling_keeps_to_the_likeliest(vocab, top_k, top_p, temperature, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(vocab)
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[:top_k]
    q = p[kept] / p[kept].sum()
    kept = kept[: 1 + int((np.cumsum(q) < top_p - 1e-12).sum())]
    drawn = model.sample(xp.asarray(np.tile(logits, (200, 1))), temperature, top_k, top_p, rng)
    assert set(drawn.tolist()) <= set(kept.tolist())
    assert model.sample(xp.asarray(logits[None]))[0] == order[0]


def test_sampling_follows_the_softmax():
    logits, rng = np.log(np.array([0.5, 0.3, 0.2])), np.random.default_rng(0)
    drawn = model.sample(xp.asarray(np.tile(logits, (20000, 1))), 1.0, rng=rng)
    assert abs(np.bincount(drawn) / 20000 - [0.5, 0.3, 0.2]).max() < 0.015


# --- checkpoints ---


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


def test_the_newer_config_form_is_the_older_one():
    old = dataclasses.replace(TINY, rope_scaling=architectures.LLAMA3_SCALING).to_dict()
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], **old["rope_scaling"]}
    assert model.Config.from_dict(new) == model.Config.from_dict(old)


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
    ],
)
def test_what_the_model_lacks_is_refused(field, value):
    published = TINY.to_dict() | {field: value}
    with pytest.raises(ValueError):
        config = model.Config.from_dict(published)
        model.forward(model.init(config), config, xp.zeros((1, 2), int))


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
        close(checkpoint.read_safetensors(tmp_path / "w")["w"].astype(np.float32), numbers)


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
    ],
)
def test_a_damaged_file_is_refused(tmp_path, data):
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(ValueError, match="/w"):
        checkpoint.read_safetensors(tmp_path / "w")


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


def test_published_sizes():
    sizes = {name: architectures.costs(config)["parameters"] for name, config in model.ARCHITECTURES.items()}
    assert sizes == {
        "llama3.2": 1_235_814_400,
        "qwen3": 4_022_468_096,
        "smollm3": 3_075_098_624,
        "qwen3-moe": 235_093_634_560,
        "deepseek-v3": 671_026_419_200,
        "kimi-k2": 1_026_408_232_448,
    }
