"""The architectures: what a config.json means, what is refused, and what the published ones weigh."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from test_model import EXPERTS, LATENT, TINY, VARIANTS, variant

import architectures
import model
from checkpoint import config_from_json, config_to_json
from engine import flash, xp


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
