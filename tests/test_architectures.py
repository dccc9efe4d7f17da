"""The architectures: what the published ones weigh and cost, and their small siblings."""

import dataclasses

import numpy as np
import pytest
from test_model import EXPERTS, LATENT, TINY, VARIANTS

import architectures
import model
from engine import flash


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


def test_a_token_costs_what_its_experts_cost():
    few = architectures.costs(dataclasses.replace(TINY, model_type="qwen3_moe", num_experts=4, **EXPERTS))
    many = architectures.costs(dataclasses.replace(TINY, model_type="qwen3_moe", num_experts=40, **EXPERTS))
    routers = 36 * TINY.hidden_size * TINY.num_hidden_layers  # has a row more for each expert more
    assert many["active"] - few["active"] == routers and many["forward"] - few["forward"] == 2 * routers
    assert many["parameters"] - few["parameters"] == routers + 36 * 3 * 6 * 8 * TINY.num_hidden_layers


def test_the_cost_of_a_dense_token_by_hand():
    c = architectures.costs(TINY, context=10)
    layer = 2 * 8 * 16 + 2 * 8 * 8 + 3 * 8 * 10  # q and o, k and v, gate and up and down
    assert c["forward"] == 2 * (2 * layer + 13 * 8) + 2 * 2 * 4 * (4 + 4) * 5  # a token sees 5 of 10 on average
    assert c["training"] == 3 * c["forward"] and c["cache"] == 2 * 2 * 2 * 4
    assert c["parameters"] == c["active"] == 2 * (layer + 2 * 8) + 13 * 8 + 8


def test_latents_make_the_cache_small():
    c = architectures.costs(dataclasses.replace(TINY, **LATENT))
    assert c["cache"] == TINY.num_hidden_layers * (5 + 4)


# --- siblings ---

SIZES = {"layers": 4, "hidden": 128, "heads": 2, "kv_heads": 1, "context": 256, "feed_forward": None, "attention": None}
SIZES |= {"experts": 8, "experts_per_token": 2}


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("arch", [name for name, c in model.ARCHITECTURES.items() if c.experts])
def test_any_number_of_experts_fits_the_sibling(arch, experts):
    config = architectures.sibling(arch, 300, **SIZES | {"experts": experts, "experts_per_token": 1})
    if arch == "deepseek-v3":  # groups of at least two, half of which are used
        assert (config.n_group, config.topk_group) == {8: (4, 2), 12: (6, 3), 2: (1, 1)}.get(experts, (1, 1))
    assert config.experts == experts and not config.norm_topk_prob  # which would leave the router without a gradient


@pytest.mark.parametrize("attention, exponent", [("sliding", 2), ("strided", 1.5), ("fixed", 1.5), ("bigbird", 1)])
def test_the_work_of_sparse_attention_grows_as_the_docstring_says(attention, exponent):
    """Keys that are looked at, as the context of a sibling grows; a sliding window is a fixed share of it."""
    work = []
    for context in 1024, 16384:
        config = architectures.sibling("qwen3", 300, **SIZES | {"attention": attention, "context": context})
        mask = model.layer_options(config, np.zeros((1, context), int), np.float32)[0].mask
        plan = flash.plan(mask, context, context, 16, 16, 16)
        work.append(sum((rows.stop - rows.start) * sum(flash.length(c) for c, _ in columns) for rows, columns in plan))
    assert np.log(work[1] / work[0]) / np.log(16) == pytest.approx(exponent, abs=0.1)


def test_siblings_keep_what_makes_each_architecture_what_it_is():
    made = {name: architectures.sibling(name, 300, **SIZES) for name in model.ARCHITECTURES}
    for name, config in made.items():
        published = model.ARCHITECTURES[name]
        assert (config.model_type, config.rope_scaling) == (published.model_type, published.rope_scaling)
        assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (300, 4, 128)
        assert (config.max_position_embeddings, config.intermediate_size) == (256, 352)  # 8/3 of 128, in steps of 32
        assert config.no_rope_layers == ((1, 1, 1, 0) if name == "smollm3" else None)
    assert (made["qwen3"].head_dim, made["qwen3"].num_key_value_heads) == (64, 1)
    v3 = made["deepseek-v3"]
    assert (v3.head_dim, v3.qk_rope_head_dim, v3.qk_nope_head_dim, v3.v_head_dim) == (32, 32, 64, 64)
    assert (v3.q_lora_rank, v3.kv_lora_rank, v3.num_key_value_heads) == (96, 32, 2)
    assert (v3.moe_intermediate_size, v3.first_k_dense_replace) == (128, 1)  # 352 / (2 + 1 shared), in steps of 16
    assert (made["qwen3-moe"].moe_intermediate_size, made["qwen3-moe"].norm_topk_prob) == (176, True)
    one = architectures.sibling("kimi-k2", 300, **SIZES | {"layers": 1, "experts": 4, "feed_forward": 64})
    assert (one.first_k_dense_replace, one.moe_intermediate_size, one.intermediate_size) == (0, 32, 64)
    nine = architectures.sibling("smollm3", 300, **SIZES | {"layers": 9, "causal": False})
    assert nine.no_rope_layers == (1, 1, 1, 0, 1, 1, 1, 0, 1) and not nine.causal
    sizes = {name: value for name, value in SIZES.items() if not name.startswith("experts")}
    usual = architectures.sibling("qwen3-moe", 300, **sizes)
    assert (usual.num_experts, usual.num_experts_per_tok) == (8, 2)


def test_sparse_siblings_have_every_other_layer_sparse():
    config = architectures.sibling("qwen3", 300, **SIZES | {"attention": "sliding"})
    assert config.layer_types == ("sliding_attention", "full_attention") * 2
    assert [config.window(i) for i in range(5)] == [65, None, 65, None, None]  # the fifth is that of mtp.py
    for attention, stride in ("strided", 4), ("fixed", 4), ("bigbird", 2):
        config = architectures.sibling("qwen3", 300, **SIZES | {"attention": attention})
        assert config.sparse_attention == {"block": 16, "stride": stride} and config.pattern(0).grain == 16
        assert config.pattern(1) is None and config.pattern(4) is None and config.sliding_window is None
    assert (
        architectures.sibling("qwen3", 300, **SIZES | {"attention": "fixed", "context": 8}).sparse_attention["stride"]
        == 1
    )


def test_which_layers_have_experts_and_rope():
    experts = dataclasses.replace(TINY, model_type="qwen3_moe", num_hidden_layers=6, num_experts=4, **EXPERTS)
    every_other = dataclasses.replace(experts, decoder_sparse_step=2, mlp_only_layers=(3,), first_k_dense_replace=2)
    assert [experts.has_experts(i) for i in range(7)] == [True] * 7 and not TINY.has_experts(0)
    assert [every_other.has_experts(i) for i in range(7)] == [False] * 5 + [True, True]  # the last is that of mtp.py
    smollm3 = model.ARCHITECTURES["smollm3"]
    assert [smollm3.uses_rope(i) for i in (0, 2, 3, 7, 36)] == [True, True, False, False, True]


def test_the_published_stretching_of_rope():
    """config.json of Llama 3.2 1B, DeepSeek V3 and Kimi K2."""
    scaling = {name: config.rope_scaling for name, config in model.ARCHITECTURES.items()}
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
    yarn |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
    assert scaling["llama3.2"] == llama3 | {"original_max_position_embeddings": 8192}
    assert scaling["deepseek-v3"] == yarn and scaling["kimi-k2"] == yarn | {"factor": 32.0, "beta_fast": 1.0}
    assert scaling["qwen3"] is scaling["smollm3"] is scaling["qwen3-moe"] is None
    v3 = model.ARCHITECTURES["deepseek-v3"]  # 0.1 ln 40 + 1 for queries and for keys
    assert v3.attention_scale() == pytest.approx((0.1 * np.log(40) + 1) ** 2 / 192**0.5)
    assert dataclasses.replace(v3, rope_scaling=None).attention_scale() == pytest.approx(192**-0.5)


def test_defaults_are_those_of_the_published_configs():
    config = architectures.Config("llama", 10, 8, 16, 2, 2, 1, 4, 32)
    assert (config.rms_norm_eps, config.rope_theta, config.initializer_range) == (1e-6, 10000.0, 0.02)
    assert config.causal and not (config.attention_bias or config.mlp_bias or config.tie_word_embeddings)
    assert config.experts == config.shared == 0


def test_costs_of_experts_windows_and_latents_by_hand():
    config = dataclasses.replace(TINY, layer_types=("sliding_attention", "full_attention"), sliding_window=3)
    full, some = (architectures.costs(c, context=10)["forward"] for c in (TINY, config))
    assert full - some == 2 * TINY.num_attention_heads * 2 * TINY.head_dim * (5 - 3)
    assert architectures.costs(TINY)["forward"] == architectures.costs(TINY, 4096)["forward"]
    latent = dataclasses.replace(TINY, **LATENT)
    scores = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    near, far = (architectures.costs(latent, context)["forward"] for context in (10, 20))
    assert far - near == 2 * latent.num_attention_heads * scores * 5 * latent.num_hidden_layers
    untied = architectures.costs(dataclasses.replace(TINY, tie_word_embeddings=False))  # one table is looked up only
    assert untied["parameters"] - architectures.costs(TINY)["parameters"] == 13 * 8
    assert untied["forward"] == architectures.costs(TINY)["forward"]
    mtp = dataclasses.replace(TINY, **VARIANTS["mtp"])
    assert architectures.costs(mtp) == architectures.costs(dataclasses.replace(mtp, num_nextn_predict_layers=0))


def test_a_table_is_read_cell_by_cell():
    table = architectures.read_table("""
        a    b
    x   1    -
    y   2.5  1e4
    z   yes  word
    """)
    assert table == {"a": {"x": 1, "y": 2.5, "z": True}, "b": {"y": 1e4, "z": "word"}}
