"""What llama.cpp is given: weights in its order, sizes, tokens; what it lacks; the file, where gguf is installed."""

import dataclasses
import math
import sys

import numpy as np
import pytest
from example_tokenizers import TOKENIZERS
from gradcheck import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import LATENT, TINY, VARIANTS

import architectures
import bpe
import model
import posenc
from engine import gguf_file, to_numpy, xp

fast = settings(max_examples=40, deadline=None)
YARN = architectures.ARCHITECTURES["deepseek-v3"].rope_scaling
WORDS = bpe.train("the cat sat on a mat and the dog ran to the red house " * 9, 270, special=("<|end|>", "<mask>"))
CONFIGS = {  # every kind of weight; in the first layers at least
    name: dataclasses.replace(TINY, vocab_size=WORDS.vocab_size + 3, eos_token_id=(0, 1), **VARIANTS[name])
    for name in ("llama", "experts", "latent", "mtp", "qwen3", "biases")
}
CONFIGS["smollm3"] = dataclasses.replace(
    CONFIGS["llama"], model_type="smollm3", rope_scaling=None, num_hidden_layers=4, no_rope_layers=(1, 1, 1, 0)
)


def rope_of(config):
    """What RoPE's frequencies are divided by, and the factor of cos and sin."""
    speed, factor = posenc.rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    return posenc.pair_frequencies(config.head_dim, config.rope_theta) / speed, factor


# --- weights ---


@fast
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pairs_beside_each_other_turn_as_the_halves_did(heads, half, time, seed):
    rng, dim = np.random.default_rng(seed), 2 * half
    weight, x = rng.standard_normal((heads * dim, 3)), rng.standard_normal((time, 3))
    cos, sin = posenc.rope_tables(xp.arange(time), posenc.pair_frequencies(dim), dtype=xp.float64)

    def turned(weight, interleaved):
        y = xp.asarray((x @ weight.T).reshape(1, time, heads, dim).swapaxes(1, 2))
        return to_numpy(posenc.rope(y, cos, sin, interleaved)[0])

    here, there = turned(weight, False), turned(gguf_file.pairs(weight, heads), True)
    scores = [y @ y.swapaxes(-1, -2) for y in (here, there)]
    close(*scores)
    assert gguf_file.pairs(weight[:, 0], heads).tolist() == gguf_file.pairs(weight, heads)[:, 0].tolist()  # a bias


@fast
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_queries_taken_to_the_compressed_keys_score_as_keys_taken_to_the_queries(heads, nope, v, rank, seed):
    random = np.random.default_rng(seed).standard_normal
    kv_b, c, q = random((heads * (nope + v), rank)), random((5, rank)), random((heads, 2, nope))
    keys, values = np.split((c @ kv_b.T).reshape(5, heads, nope + v), [nope], axis=-1)
    k_b, v_b = gguf_file.apart(kv_b, heads, nope)
    assert k_b.shape == (heads, rank, nope) and v_b.shape == (heads, v, rank)
    scores, outputs = np.einsum("hqn,khn->hqk", q, keys), np.einsum("khv->hkv", values)
    close(q @ k_b.swapaxes(1, 2) @ c.T, scores)
    close(c @ v_b.swapaxes(1, 2), outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_weight_is_there_once(name):
    config = CONFIGS[name]
    params = model.init(config, 0)
    known = {n: to_numpy(w) for n, w in params.items() if not n.startswith("model.layers.2.") or name == "smollm3"}
    found = dict(gguf_file.arranged(params, config, rope_of(config)[0]))
    stretch = found.pop("rope_freqs.weight", None)
    assert (stretch is not None) == (name == "llama")
    as_sorted = [np.sort(np.concatenate([w.ravel() for w in some.values()])) for some in (known, found)]
    assert as_sorted[0].tolist() == as_sorted[1].tolist()
    layer, experts = "model.layers.1.mlp.experts.", config.experts
    for part in ("gate_proj.weight", "down_proj.weight") if experts else ():
        for i in range(experts):
            assert (found[layer + part][i] == known[f"{layer}{i}.{part}"]).all()


def test_stretched_frequencies_are_the_plain_ones_divided():
    config = dataclasses.replace(CONFIGS["llama"], head_dim=64, rope_theta=5e5)
    stretch, _ = rope_of(config)
    (name, array), *_ = gguf_file.arranged({}, config, stretch)
    speed, _ = posenc.rope_frequencies(64, 5e5, config.rope_scaling, 24)
    assert name == "rope_freqs.weight" and array[0] == 1 and array[-1] == pytest.approx(32)
    close(posenc.pair_frequencies(64, 5e5) / xp.asarray(array), speed)


def test_only_matrices_lose_precision():
    for kind in gguf_file.TYPES:
        assert gguf_file.stored_as("model.norm.weight", (64,), kind) == "f32"
        assert gguf_file.stored_as("model.layers.0.mlp.gate.weight", (8, 64), kind) == "f32"
        assert gguf_file.stored_as("model.layers.0.mlp.gate_proj.weight", (8, 64), kind) == kind
    assert gguf_file.stored_as("lm_head.weight", (8, 40), "q8_0") == "f16"  # no whole block of 32
    assert gguf_file.stored_as("lm_head.weight", (8, 40), "f32") == "f32"


# --- sizes ---


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_published_architectures_can_be_said(name):
    config = architectures.ARCHITECTURES[name]
    stretch, factor = rope_of(config)
    gguf_file.refuse_what_is_not_there(config, factor)
    found = gguf_file.metadata(config, factor)
    (kind,) = {key.split(".")[0] for key in found}
    found = {key.removeprefix(f"{kind}."): value for key, value in found.items()}
    assert kind == {"llama3.2": "llama", "qwen3-moe": "qwen3moe", "kimi-k2": "deepseek2"}.get(name, kind)
    assert all(type(value) in (int, float, bool, str) for value in found.values())
    assert found["block_count"] == config.num_hidden_layers and found["rope.freq_base"] == config.rope_theta
    if name in ("deepseek-v3", "kimi-k2"):
        assert found["attention.head_count_kv"] == 1 and found["attention.key_length"] == 512 + 64
        assert found["attention.key_length_mla"] == 192 and found["attention.value_length_mla"] == 128
        assert found["expert_gating_func"] == 2 and found["expert_group_count"] == config.n_group
        assert found["rope.scaling.yarn_log_multiplier"] == 0.1 and found["rope.scaling.attn_factor"] == 1
    assert ("rope.scaling.type" in found) == (name in ("deepseek-v3", "kimi-k2"))


@pytest.mark.parametrize(
    "scaling",
    [
        YARN | {"mscale": None, "mscale_all_dim": None},
        YARN,
        YARN | {"mscale": 0.7, "mscale_all_dim": 0},
        YARN | {"attention_factor": 1.25},
        {"type": "yarn", "original_max_position_embeddings": 6},
    ],
)
def test_cos_and_sin_are_multiplied_as_here(scaling):
    """llama.cpp multiplies them by 1 + 0.1 ln(factor) and by attn_factor."""
    config = dataclasses.replace(TINY, rope_scaling=scaling)
    found = gguf_file.metadata(config, factor := rope_of(config)[1])
    by_itself = 1 + 0.1 * math.log(found["llama.rope.scaling.factor"])
    assert found["llama.rope.scaling.attn_factor"] * by_itself == pytest.approx(factor)
    assert found["llama.rope.scaling.factor"] == (scaling.get("factor") or 4)


def test_where_yarn_begins_and_ends_has_to_be_told_unless_it_is_as_usual():
    told = {name: gguf_file.to_be_told(config) for name, config in architectures.ARCHITECTURES.items()}
    assert told.pop("kimi-k2") == ["--yarn-beta-fast 1"] and not any(told.values())
    slow = dataclasses.replace(TINY, rope_scaling=YARN | {"beta_slow": 2.5, "beta_fast": None})
    assert gguf_file.to_be_told(slow) == ["--yarn-beta-slow 2.5"]


def test_linear_scaling_is_a_factor():
    config = dataclasses.replace(TINY, rope_scaling={"rope_type": "linear", "factor": 2})
    found = gguf_file.metadata(config, 1.0)
    assert found["llama.rope.scaling.type"] == "linear" and found["llama.rope.scaling.factor"] == 2.0


QWEN = VARIANTS["experts"]


@pytest.mark.parametrize(
    "fields, what",
    [
        (VARIANTS["bidirectional"], "both directions"),
        (VARIANTS["window"], "windows"),
        (VARIANTS["sparse"], "windows"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases in qwen3"),
        ({**LATENT, "attention_bias": True}, "biases in deepseek2"),
        ({"model_type": "smollm3", "no_rope_layers": (1, 0)}, "three of four"),
        ({"model_type": "qwen3", **VARIANTS["llama"]}, "Llama 3"),
        ({"rope_scaling": YARN | {"truncate": False}}, "not rounded"),
        ({**LATENT, "rope_scaling": YARN | {"mscale": 0.5}}, "mscale"),
        ({**LATENT, "rope_interleave": False}, "halves"),
        ({**QWEN, "mlp_only_layers": (0,)}, "dense layers"),
        ({**QWEN, "norm_topk_prob": False}, "add up to 1"),
        ({**LATENT, "n_shared_experts": None}, "shared experts"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(fields, what):
    config = dataclasses.replace(TINY, **fields)
    with pytest.raises(ValueError, match=f"llama.cpp has no .*{what}"):
        gguf_file.refuse_what_is_not_there(config, rope_of(config)[1])


# --- tokens ---


def test_tokens_have_their_kinds_and_merges_their_order():
    config = CONFIGS["llama"]
    added = bpe.FLAGS | {"id": WORDS.vocab_size, "content": "<think>", "special": False}
    tokenizer = bpe.Tokenizer(WORDS.config | {"added_tokens": [*WORDS.config["added_tokens"], added]})
    found = gguf_file.vocabulary(config, tokenizer)
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}
    assert found["model"] == "gpt2" and found["pre"] == "gpt-2"
    assert found["tokens"][:3] == ["<|end|>", "<mask>", "!"]
    assert found["tokens"][-3:] == ["<think>", "[PAD271]", "[PAD272]"]
    assert found["token_type"][:3] == [3, 3, 1] and found["token_type"][-4:] == [1, 4, 5, 5]
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    assert merges == [*map(tuple, WORDS.config["model"]["merges"])] and len(merges) == len(found["tokens"]) - 261
    assert (found["eos_token_id"], found["eot_token_id"]) == (0, 1) and "eom_token_id" not in found
    assert found["add_bos_token"] is False and "bos_token_id" not in found
    with pytest.raises(ValueError, match="270 tokens, and the model 269"):
        gguf_file.vocabulary(dataclasses.replace(config, vocab_size=269), WORDS)


PRE = {"gpt2": "gpt-2", "llama3": "smaug-bpe", "qwen": "qwen2", "Llama 3": "smaug-bpe", "Qwen": "qwen2"}
PRE |= {"ByteLevel": "gpt-2", "Digits one by one": "smollm", "NFC and added tokens": "gpt-2"}
PRE |= {"ignore_merges and a template": "llama-bpe", "bytes missing": "gpt-2", "bytes unknown": "gpt-2"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pre_tokenizer_has_its_name_there_or_is_refused(name):
    config = dataclasses.replace(TINY, vocab_size=1000)
    if name not in PRE:
        with pytest.raises(ValueError, match="no pre-tokenizer"):
            gguf_file.vocabulary(config, TOKENIZERS[name])
        return
    found = gguf_file.vocabulary(config, TOKENIZERS[name])
    assert found["tokenizer.ggml.pre"] == PRE[name]
    assert found["tokenizer.ggml.add_bos_token"] == found["tokenizer.ggml.add_eos_token"] == ("template" in name)
    assert found.get("tokenizer.ggml.bos_token_id") == (1 if "template" in name else None)


def test_deepseek_s_pre_tokenizer_is_three_patterns():
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cut = [split | {"pattern": {"Regex": pattern}} for pattern in gguf_file.DEEPSEEK]
    whole = {"type": "Sequence", "pretokenizers": [*cut, bpe.published("llama3")["pretokenizers"][-1]]}
    tokenizer = bpe.Tokenizer(WORDS.config | {"pre_tokenizer": whole})
    assert gguf_file.vocabulary(CONFIGS["llama"], tokenizer)["tokenizer.ggml.pre"] == "deepseek-v3"
    words = [*tokenizer.split("It's 12345日本語だ! #include\n\n")]
    assert "".join(words) == "It's 12345日本語だ! #include\n\n" and {"123", "45", "日本語だ", " #", "include"} <= {
        *words
    }


# --- the file ---


def test_without_the_package_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        gguf_file.write(tmp_path / "x.gguf", {}, TINY, WORDS, None, rope_of(TINY), "f32")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", gguf_file.TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_holds_it_all(name, kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    config, path = CONFIGS[name], tmp_path / "x.gguf"
    params, rope = model.init(config, 0), rope_of(config)
    gguf_file.write(path, params, config, WORDS, "{{ a template }}", rope, kind)
    assert [*tmp_path.iterdir()] == [path]
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items()}
    notes = gguf_file.metadata(config, rope[1]) | gguf_file.vocabulary(config, WORDS)
    assert said["general.architecture"] == next(iter(notes)).split(".")[0]
    assert said["tokenizer.chat_template"] == "{{ a template }}"
    for key, value in notes.items():
        assert said[key] == (pytest.approx(value) if type(value) is float else value)
    written = [gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors]
    for tensor, (_, array) in zip(reader.tensors, gguf_file.arranged(params, config, rope[0]), strict=True):
        assert tensor.shape.tolist() == [*array.shape[::-1]]
    for array, (_, wanted) in zip(written, gguf_file.arranged(params, config, rope[0])):
        close(array, wanted, 0 if kind == "f32" else 1e-3)
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"} <= names
    assert ("blk.1.exp_probs_b.bias" in names) == (name in ("latent", "mtp"))
