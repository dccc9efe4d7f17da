"""LoRA: what adapters add to a matrix, their gradients, and that training begins at the weights as they are."""

import dataclasses

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
import model
from engine import to_numpy, xp

fast = settings(max_examples=30, deadline=None)
seed = st.integers(0, 2**32 - 1)
size = st.integers(1, 7)
CONFIG = model.Config(
    model_type="qwen3_moe",
    tie_word_embeddings=True,
    vocab_size=11,
    hidden_size=8,
    intermediate_size=10,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    initializer_range=0.5,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    norm_topk_prob=True,
    decoder_sparse_step=1,
)


def weights_of(seed, out, into):
    return {"a.weight": normal(seed, out, into), "b.weight": normal(seed + 1, into, out), "norm.weight": xp.ones(into)}


def adapters_of(params, rank, seed):
    """Adapters somewhere in training, when no part of them is 0."""
    adapters = lora.init(params, rank)
    return {name: normal(seed + i, *w.shape) for i, (name, w) in enumerate(adapters.items())}


@fast
@given(size, size, st.integers(1, 4), st.floats(0.5, 32), seed)
def test_what_is_merged_is_the_formula(out, into, rank, alpha, seed):
    params = weights_of(seed, out, into)
    adapters = adapters_of(params, rank, seed + 2)
    merged, _ = lora.merge(params | adapters, alpha)
    assert merged.keys() == params.keys()
    for name in "a", "b":
        product = adapters[name + ".lora_B.weight"] @ adapters[name + ".lora_A.weight"]
        close(merged[name + ".weight"], params[name + ".weight"] + alpha / rank * product)
        difference = to_numpy(merged[name + ".weight"] - params[name + ".weight"])
        assert np.linalg.matrix_rank(difference, tol=1e-9) <= rank
    assert merged["norm.weight"] is params["norm.weight"]


@fast
@given(size, size, st.integers(1, 4), st.floats(0.5, 32), seed)
def test_gradients(out, into, rank, alpha, seed):
    params = weights_of(seed, out, into)

    def merged(adapters):
        weights, backward = lora.merge(params | adapters, alpha)
        return tuple(weights.values()), lambda *dweights: backward(dict(zip(weights, dweights)))

    check(merged, adapters_of(params, rank, seed + 2), seed=seed)


def test_the_gradient_of_a_whole_model():
    params = model.init(CONFIG, 0, np.float64)
    tokens, targets = xp.asarray(np.random.default_rng(0).integers(0, 11, (2, 2, 5)))

    def loss(adapters):
        weights, merge_backward = lora.merge(params | adapters)
        value, backward = model.loss(weights, CONFIG, tokens, targets)
        return value, lambda: merge_backward(backward())

    adapters = {name: 0.1 * w for name, w in adapters_of(params, 2, 1).items()}
    check(loss, adapters, coordinates=3, directions=1, tolerance=1e-5)


@fast
@given(st.integers(1, 9), st.booleans(), seed)
def test_training_begins_at_the_weights_as_they_are(rank, tied, seed):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = model.init(config, seed)
    adapters = lora.init(params, rank, seed)
    matrices = {name.removesuffix(".weight") for name, w in params.items() if w.ndim == 2}
    assert adapters.keys() == {name + part for name in matrices for part in (".lora_A.weight", ".lora_B.weight")}
    for name in matrices:
        out, into = params[name + ".weight"].shape
        a, b = adapters[name + ".lora_A.weight"], adapters[name + ".lora_B.weight"]
        assert a.shape == (rank, into) and b.shape == (out, rank) and a.dtype == b.dtype == np.float32
        assert not b.any() and a.any()
    merged, backward = lora.merge(params | adapters)
    assert list(merged) == list(params) and all((merged[name] == w).all() for name, w in params.items())
    grads = backward({name: xp.ones_like(w) for name, w in params.items()})
    assert grads.keys() == adapters.keys()  # and of the weights themselves none
    assert any(g.any() for name, g in grads.items() if name.endswith("lora_B.weight"))
    assert not any(g.any() for name, g in grads.items() if name.endswith("lora_A.weight"))  # as B is 0


def test_the_first_a_has_variance_one_over_its_columns_and_depends_on_the_seed():
    params = {"a.weight": xp.zeros((3, 400), np.float32)}
    a = lora.init(params, 50, seed=1)["a.lora_A.weight"]
    assert float(a.var()) == pytest.approx(1 / 400, rel=0.05)
    assert not (a == lora.init(params, 50, seed=2)["a.lora_A.weight"]).any()


def test_without_adapters_nothing_is_merged():
    params = weights_of(0, 3, 4)
    merged, backward = lora.merge(params)
    assert merged is params and backward(params) is params


def test_merging_changes_neither_weights_nor_adapters():
    params = weights_of(0, 3, 4)
    params |= adapters_of(params, 2, 1)
    before = {name: w.copy() for name, w in params.items()}
    lora.merge(params)
    assert all((params[name] == w).all() for name, w in before.items()) and params.keys() == before.keys()
