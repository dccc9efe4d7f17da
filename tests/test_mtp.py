"""Multi-token prediction: the formula, its gradients, and a term of the loss among others."""

import dataclasses

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import TINY, VARIANTS, tokens_of

import layers
import model
import mtp
import posenc
from engine import xp
from engine.weights import added, by_layer

seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=15, deadline=None)
EXPERTS = dataclasses.replace(TINY, **VARIANTS["mtp"])
DENSE = dataclasses.replace(TINY, num_nextn_predict_layers=1, rms_norm_eps=1e-3)
config = st.sampled_from([EXPERTS, DENSE, dataclasses.replace(DENSE, num_hidden_layers=1, tie_word_embeddings=False)])
PREFIX = "model.layers.2."  # the further layer of two


def new_weights(config, seed):
    """Norms other than one, so that none can be left out."""
    params = model.init(config, seed % 1000, np.float64)
    return {name: w + 0.1 * normal(seed, *w.shape) if w.ndim == 1 else w for name, w in params.items()}


def a_text(config, seed, *shape):
    return tokens_of(seed, config, *shape), tokens_of(seed + 1, config, *shape)


def states(config, seed, *shape):
    return normal(seed + 2, *shape, config.hidden_size)


# the numbers are fixed because a step of a central difference may carry a token over the edge between two experts
@settings(max_examples=10, deadline=None, derandomize=True)
@given(config, st.booleans(), seed)
def test_gradients(config, has_balance, seed):
    params, (tokens, targets) = new_weights(config, seed), a_text(config, seed, 2, 5)
    targets[0, 2] = -100
    term = mtp.term(0.3, balance=0.1 if has_balance else 0.0)

    def function(hidden, params):
        value, backward = term(params, config, tokens, targets, hidden)
        both = lambda: (lambda dhidden, grads: (dhidden, added(params, grads)))(*backward())
        return value, both

    options = {"coordinates": 1, "directions": 1, "tolerance": 1e-5}
    check(function, states(config, seed, 2, 5), params, **options)


@fast
@given(config, st.integers(2, 6), seed)
def test_the_term_is_its_formula(config, time, seed):
    params, (tokens, targets) = new_weights(config, seed), a_text(config, seed, 2, time)
    h = states(config, seed, 2, time)
    norm = lambda x, weight: layers.rms_norm(x, weight, config.rms_norm_eps)[0]
    own = by_layer(params)[config.num_hidden_layers]
    embedded = params["model.embed_tokens.weight"][tokens]
    joined = [norm(embedded[:, 1:], own["enorm"]["weight"]), norm(h[:, :-1], own["hnorm"]["weight"])]
    x = xp.concatenate(joined, axis=-1) @ own["eh_proj"]["weight"].T
    # as RoPE knows differences only, it makes no difference from where one counts
    x, _ = model.block(x, own, config, model.layer_options(config, tokens[:, 1:], np.float64)[-1])
    x = norm(x, own["shared_head"]["norm.weight"])
    logits = x @ params[model.head_name(config)].T
    expected, _ = layers.cross_entropy(logits, targets[:, 1:])
    value, backward = mtp.term(0.3)(params, config, tokens, targets, h)
    assert isinstance(value, float) and value == pytest.approx(0.3 * expected)
    dhidden, grads = backward()
    assert dhidden.shape == h.shape and not dhidden[:, -1].any() and abs(dhidden[:, :-1]).max() > 0
    prefix = f"model.layers.{config.num_hidden_layers}."
    assert set(grads) == {name for name in params if name.startswith(prefix)} | {
        "model.embed_tokens.weight",
        model.head_name(config),
    }


def test_the_first_token_that_is_read_is_at_position_one():
    seen, tokens = [], tokens_of(0, DENSE, 1, 5)
    with pytest.MonkeyPatch.context() as patch:
        recording = lambda x, weights, config, options: (
            seen.append(options),
            model.block(x, weights, config, options),
        )[1]
        patch.setattr(mtp, "block", recording)
        mtp.term(1.0)(new_weights(DENSE, 0), DENSE, tokens, tokens, states(DENSE, 0, 1, 5))
    expected = posenc.rope_tables(xp.arange(1, 5), posenc.pair_frequencies(4), dtype=xp.float64)
    for ours, table in zip(seen[0].rope, expected, strict=True):
        close(ours, table)


@fast
@given(config, st.floats(0.1, 3), seed)
def test_weight_multiplies_value_and_gradients(config, weight, seed):
    params, text, h = new_weights(config, seed), a_text(config, seed, 2, 5), states(config, seed, 2, 5)
    value, backward = mtp.term(weight)(params, config, *text, h)
    one, one_backward = mtp.term(1.0)(params, config, *text, h)
    assert value == pytest.approx(weight * one)
    (dhidden, grads), (one_dhidden, one_grads) = backward(), one_backward()
    close(dhidden, weight * one_dhidden)
    for name, g in one_grads.items():
        close(grads[name], weight * g)


@fast
@given(config, st.integers(2, 5), seed)
def test_with_the_count_of_the_batch_its_parts_add_up(config, time, seed):
    params, (tokens, targets) = new_weights(config, seed), a_text(config, seed, 3, time)
    h, targets[0, 1:] = states(config, seed, 3, time), -100
    whole, backward = mtp.term(0.3)(params, config, tokens, targets, h)
    term = mtp.term(0.3, count=2 * (time - 1))  # of the targets but the first of each row
    parts = [term(params, config, tokens[rows], targets[rows], h[rows]) for rows in (slice(1), slice(1, 3))]
    assert whole == pytest.approx(sum(value for value, _ in parts))
    (dhidden, grads), ((dhidden_0, grads_0), (dhidden_1, grads_1)) = backward(), (b() for _, b in parts)
    close(dhidden, xp.concatenate([dhidden_0, dhidden_1]))
    for name, g in grads.items():
        close(g, grads_0[name] + grads_1[name])


@fast
@given(config, st.integers(2, 5), st.integers(2, 5), st.integers(0, 2), seed)
def test_documents_in_one_row_are_rows_of_their_own(config, first, second, spare, seed):
    total = first + second + spare
    params, (tokens, targets) = new_weights(config, seed), a_text(config, seed, 1, total)
    h = states(config, seed, 1, total)
    documents = xp.asarray([[1] * first + [2] * second + [0] * spare])
    targets[0, 0] = targets[0, first] = targets[0, first + second :] = -100
    count, sums = first + second - 2, 0.0
    value, backward = mtp.term(0.3, count, documents)(params, config, tokens, targets, h)
    dhidden, grads = backward()
    expected = {name: xp.zeros_like(g) for name, g in grads.items()}
    for part in slice(first), slice(first, first + second):
        alone, alone_backward = mtp.term(0.3, count)(params, config, tokens[:, part], targets[:, part], h[:, part])
        alone_dhidden, alone_grads = alone_backward()
        close(dhidden[:, part], alone_dhidden)
        sums += alone
        for name, g in alone_grads.items():
            expected[name] += g
    assert value == pytest.approx(sums)
    for name, g in expected.items():
        close(grads[name], g)


def test_what_it_observes_is_its_layers_and_the_balance_joins_the_value():
    params, text, h = new_weights(EXPERTS, 0), a_text(EXPERTS, 0, 2, 6), states(EXPERTS, 0, 2, 6)
    observed = {}
    plain, _ = mtp.term(0.3, observe=observed)(params, EXPERTS, *text, h)
    seen = observed[2]
    assert seen["max_logits"].shape == (4,) and int(seen["load"].sum()) == 2 * 5 * EXPERTS.num_experts_per_tok
    assert plain == mtp.term(0.3)(params, EXPERTS, *text, h)[0]  # watching changes nothing
    for more in {}, {"observe": {}}:
        value, _ = mtp.term(0.3, balance=0.1, **more)(params, EXPERTS, *text, h)
        assert value == pytest.approx(plain + 0.1 * seen["balance"])


@pytest.mark.parametrize("config", [EXPERTS, DENSE], ids=["experts", "dense"])
def test_a_single_token_has_none_after_the_next_and_two_have_one(config):
    params, text = new_weights(config, 0), a_text(config, 0, 2, 1)
    h = states(config, 0, 2, 1)
    value, backward = mtp.term(0.3, balance=0.1)(params, config, *text, h)
    dhidden, grads = backward()
    assert value == 0 and grads == {} and dhidden.shape == h.shape and not dhidden.any()
    loss, loss_backward = model.loss(params, config, *text, [mtp.term(0.3)])
    assert loss == pytest.approx(model.loss(params, config, *text)[0])
    assert list(loss_backward()) == list(params)
    value, _ = mtp.term(0.3)(params, config, *a_text(config, 0, 2, 2), states(config, 0, 2, 2))
    assert value > 0


def test_the_token_after_the_next_is_predicted_from_the_tokens_before_it():
    params, tokens = model.init(EXPERTS, 0), tokens_of(0, EXPERTS, 1, 8)
    other = tokens.copy()
    other[0, 5] = (other[0, 5] + 1) % EXPERTS.vocab_size
    results = []
    for t in tokens, other:
        hidden, _ = model.transformer(params, EXPERTS, t)
        options = model.layer_options(EXPERTS, t[:, 1:], np.float64, start=1)[-1]
        results.append(mtp.next_hidden(params, EXPERTS, t, hidden, options)[0])
    difference = abs(results[0] - results[1]).max(axis=-1)[0]
    assert difference.shape == (7,) and (difference[:4] < 1e-6).all() and difference[4] > 1e-6


def test_a_model_without_the_term_gives_the_layer_no_gradient():
    params, text = new_weights(EXPERTS, 0), a_text(EXPERTS, 0, 2, 6)
    grads, with_it = (model.loss(params, EXPERTS, *text, terms)[1]() for terms in ((), [mtp.term(0.3)]))
    for name in params:
        if name.startswith(PREFIX):
            assert not grads[name].any()
            assert "correction_bias" in name or ".experts." in name or with_it[name].any()


def test_the_gradient_of_what_the_head_reads():
    params, tokens = new_weights(DENSE, 0), tokens_of(0, DENSE, 1, 5)
    options = model.layer_options(DENSE, tokens[:, 1:], np.float64, start=1)[-1]

    def read(hidden):
        y, backward = mtp.next_hidden(params, DENSE, tokens, hidden, options)
        return y, lambda dy: backward(dy)[0]

    check(read, states(DENSE, 0, 1, 5))
