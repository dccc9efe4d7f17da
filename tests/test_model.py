"""The model: gradients through all of it, and generation with and without cache."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
from gradcheck import check, close
from hypothesis import given, settings
from hypothesis import strategies as st

import architectures
import layers
import model
import mtp
from engine import to_numpy, xp

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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "norm_topk_prob": True}
LATENT = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "rope_interleave": True,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
VARIANTS = {
    "llama": {"rope_scaling": architectures.ARCHITECTURES["llama3.2"].rope_scaling},
    "experts": {"model_type": "qwen3_moe", "num_experts": 5, **EXPERTS, "decoder_sparse_step": 1},
    "latent": {**LATENT, "rope_scaling": architectures.ARCHITECTURES["deepseek-v3"].rope_scaling},
    "mtp": {**LATENT, "num_nextn_predict_layers": 1, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": (1, 0)},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "window": {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 3},
    "sparse": {
        "layer_types": ("strided_attention", "bigbird_attention"),
        "sparse_attention": {"block": 2, "stride": 2, "random_blocks": 1},
    },
    "bidirectional": {"causal": False},
}
variant = st.sampled_from(sorted(VARIANTS)).map(lambda name: dataclasses.replace(TINY, **VARIANTS[name]))
generative = variant.filter(lambda config: config.causal)


def options(config, tokens, dtype=np.float64, **around):
    return model.layer_options(config, tokens, dtype, **around)


def tokens_of(seed, config, *shape):
    return xp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape))


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_new_weights_keep_the_variance_of_the_residual_stream(layers):
    """Radford et al. 2019: what writes into it is smaller by √(2 layers)."""
    config = dataclasses.replace(
        TINY, vocab_size=300, hidden_size=96, intermediate_size=128, num_hidden_layers=layers, head_dim=24,
        attention_bias=True, initializer_range=0.03,
    )  # fmt: skip
    params = model.init(config)
    for name, w in params.items():
        assert w.dtype == np.float32
        if w.ndim == 1:
            assert (w == (1 if "norm" in name else 0)).all()
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert float(w.std()) == pytest.approx(0.03 / (2 * layers) ** 0.5 if writes else 0.03, rel=0.05), name
        assert abs(float(w.mean())) < 0.002
    first, same, other = (model.init(config, s)["model.embed_tokens.weight"] for s in (0, 0, 1))
    close(first, params["model.embed_tokens.weight"], 0)
    close(first, same, 0)
    assert (first != other).any()


@fast
@given(variant, st.integers(1, 3), seed)
def test_with_the_count_of_the_batch_its_parts_add_up(config, cut, seed):
    params, (tokens, targets) = (
        model.init(config, seed, np.float64),
        (tokens_of(seed + i, config, 4, 5) for i in (0, 1)),
    )
    targets[0, :3] = -100
    whole, backward = model.loss(params, config, tokens, targets)
    rows = slice(cut), slice(cut, 4)
    parts = [model.loss(params, config, tokens[r], targets[r], count=17) for r in rows]
    assert whole == pytest.approx(sum(value for value, _ in parts))
    grads, (one, other) = backward(), (part_backward() for _, part_backward in parts)
    for name, g in grads.items():
        close(g, one[name] + other[name])


# the numbers are fixed because a step of a central difference may carry a token over the edge between two experts
@settings(max_examples=24, deadline=None, derandomize=True)
@given(variant, seed)
def test_the_gradient_of_every_weight(config, seed):
    params = model.init(config, seed % 1000, np.float64)
    tokens, targets = tokens_of(seed, config, 2, 5), tokens_of(seed + 1, config, 2, 5)
    targets[0, 0] = -100
    options = {"coordinates": 1, "directions": 1, "tolerance": 1e-5}
    check(lambda params: model.forward(params, config, tokens), params, **options)
    around = {"balance": 0.1}
    terms = [mtp.term(0.3, **around)] if config.num_nextn_predict_layers else []
    check(lambda params: model.loss(params, config, tokens, targets, terms, **around), params, **options)

    def dropped(params):
        rngs = list(map(np.random.default_rng, range(2)))  # the same numbers are left out each time
        dropout = lambda x: layers.dropout(x, 0.3, rngs)
        return model.loss(params, config, tokens, targets, dropout=dropout)

    check(dropped, params, **options)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(variant, seed)
def test_the_gradient_of_the_log_likelihood(config, seed):
    params = model.init(config, seed % 1000, np.float64)
    tokens, targets = tokens_of(seed, config, 2, 5), tokens_of(seed + 1, config, 2, 5)
    targets[0, :2] = -100
    log_p, _ = model.log_likelihood(params, config, tokens, targets)
    loss, _ = model.loss(params, config, tokens, targets)
    assert log_p.shape == (2, 5) and not log_p[0, :2].any() and float(log_p.sum()) == pytest.approx(-8 * loss)
    options = {"coordinates": 1, "directions": 1, "tolerance": 1e-5}
    check(lambda params: model.log_likelihood(params, config, tokens, targets), params, **options)


# --- several texts in a row ---

# sparse patterns count blocks from where the row begins, and a text begins anywhere
packable = generative.filter(lambda config: not config.sparse_attention)


@fast
@given(packable, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3), seed)
def test_texts_in_one_row_are_texts_in_rows_of_their_own(config, lengths, spare, seed):
    """Logits, losses and gradients; the load-balancing loss apart, which is of a whole batch."""
    params, total = model.init(config, seed, np.float64), sum(lengths) + spare
    tokens, targets = tokens_of(seed, config, 1, total), tokens_of(seed + 1, config, 1, total)
    numbers = [number for number, n in enumerate(lengths, 1) for _ in range(n)] + [0] * spare
    documents = xp.asarray(np.array([numbers]))
    targets[documents == 0] = -100
    places = [documents[0] == number for number in range(1, len(lengths) + 1)]
    for place in places:  # the first tokens of a conversation say who speaks, and are no targets
        targets[0, place.argmax()] = -100
    counts = [max(1, int((t != -100).sum())) for t in (targets, targets[:, 1:])]

    def loss_of(tokens, targets, documents=None):
        observe = {}
        terms = [mtp.term(0.3, counts[1], documents)] if config.num_nextn_predict_layers else []
        _, backward = model.loss(
            params, config, tokens, targets, terms, counts[0], documents=documents, observe=observe
        )
        return np.array([observe["losses"][name] for name in ("cross_entropy", *["mtp"][: len(terms)])]), backward()

    hidden, _ = model.transformer(params, config, tokens, options(config, tokens, documents=documents))
    losses, grads = loss_of(tokens, targets, documents)
    sums, expected = 0.0, {name: xp.zeros_like(w) for name, w in params.items()}
    for place in places:
        alone, own = tokens[:, place], targets[:, place]
        close(hidden[:, place], model.transformer(params, config, alone)[0], 1e-9)
        own_losses, own_grads = loss_of(alone, own)
        sums = sums + own_losses
        for name, g in own_grads.items():
            expected[name] += g
    np.testing.assert_allclose(losses, sums, rtol=1e-9)
    for name in params:
        close(grads[name], expected[name], 1e-9)


@fast
@given(packable.filter(lambda config: config.experts), st.integers(2, 7), st.integers(0, 3), seed)
def test_padding_is_sent_to_no_expert(config, length, spare, seed):
    """Neither in a packed row, with the layer of the token after the next, nor on the left of a prompt."""
    params, observed = model.init(config, seed, np.float64), {}
    tokens = tokens_of(seed, config, 1, length + spare)
    documents = xp.asarray(np.array([[1] * length + [0] * spare]))
    around = {"documents": documents, "observe": observed}
    terms = [mtp.term(0.3, **around)] if config.num_nextn_predict_layers else []
    model.loss(params, config, tokens, tokens, terms, **around)
    del observed["losses"]
    for layer, seen in observed.items():
        real = length if layer < config.num_hidden_layers else min(length, length + spare - 1)
        assert "load" not in seen or int(seen["load"].sum()) == real * config.num_experts_per_tok
    observed = {}
    left = documents[:, ::-1] > 0
    model.transformer(params, config, tokens, options(config, tokens, real=left, observe=observed))
    loads = [int(seen["load"].sum()) for seen in observed.values() if "load" in seen]
    assert loads and set(loads) == {length * config.num_experts_per_tok}


@fast
@given(packable, seed)
def test_another_text_in_the_row_changes_nothing(config, seed):
    params, tokens = model.init(config, seed, np.float64), tokens_of(seed, config, 1, 9)
    around, other = options(config, tokens, documents=xp.asarray(np.array([[1] * 4 + [2] * 5]))), tokens.copy()
    other[0, :4] = (other[0, :4] + 1) % config.vocab_size
    hidden, changed = (model.transformer(params, config, t, around)[0] for t in (tokens, other))
    close(changed[0, 4:], hidden[0, 4:])
    assert abs(changed[0, :4] - hidden[0, :4]).max() > 1e-9


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


def test_what_is_not_asked_for_costs_and_changes_nothing():
    config = dataclasses.replace(TINY, **VARIANTS["mtp"])
    params, tokens = model.init(config, 0), tokens_of(0, config, 2, 6)
    around = {"observe": {}, "balance": 0.1}
    loss, backward = model.loss(params, config, tokens, tokens, [mtp.term(0.3, **around)], **around)
    plain_loss, plain_backward = model.loss(params, config, tokens, tokens)
    losses = around["observe"]["losses"]
    assert losses["cross_entropy"] == plain_loss and losses["balance"] > 0 and losses["mtp"] > 0
    assert loss == pytest.approx(sum(losses.values()))
    plain, weighted, double = plain_backward(), backward(), backward(2.0)
    for name in params:
        close(double[name], 2 * weighted[name])
        if name.startswith("model.layers.2."):  # the layer for the token after the next
            assert not plain[name].any()
    moved = {name for name in params if abs(weighted[name] - plain[name]).max() > 1e-6}
    assert {name for name in params if "correction_bias" not in name and ".experts." not in name} <= moved


def test_every_layer_observes_its_heads_and_experts():
    config = dataclasses.replace(TINY, **VARIANTS["mtp"])
    params, tokens = model.init(config, 0), tokens_of(0, config, 2, 6)
    observed = {}
    model.loss(params, config, tokens, tokens, [mtp.term(0.3, observe=observed)], observe=observed)
    del observed["losses"]
    assert sorted(observed) == [0, 1, 2] and all(seen["max_logits"].shape == (4,) for seen in observed.values())
    assert "load" not in observed[0]  # a dense layer
    assert [int(observed[i]["load"].sum()) for i in (1, 2)] == [2 * 12, 2 * 10]


@pytest.mark.parametrize("name", ["experts", "latent", "llama"])
def test_the_balance_of_a_loss_is_that_of_its_layers_with_experts(name):
    config, observed = dataclasses.replace(TINY, **VARIANTS[name]), {}
    params, tokens = model.init(config, 0), tokens_of(0, config, 2, 6)
    loss, _ = model.loss(params, config, tokens, tokens, observe=observed, balance=0.1)
    losses = observed.pop("losses")
    balances = [seen["balance"] for seen in observed.values() if "balance" in seen]
    assert len(balances) == {"experts": 2, "latent": 1, "llama": 0}[name]  # the first layer of latent is dense
    assert losses["balance"] == pytest.approx(0.1 * sum(balances)) and loss == pytest.approx(sum(losses.values()))


def test_a_token_keeps_to_one_group_of_experts_where_a_config_does_not_say_of_how_many():
    config = dataclasses.replace(TINY, **VARIANTS["latent"])
    params, tokens = model.init(config, 0), tokens_of(0, config, 4, 6)
    silent, one, two = (
        model.forward(params, dataclasses.replace(config, topk_group=n), tokens)[0] for n in (None, 1, 2)
    )
    close(silent, one, 0)
    assert abs(silent - two).max() > 1e-6


def test_a_bidirectional_model_sees_later_tokens():
    config = dataclasses.replace(TINY, causal=False)
    params, tokens = model.init(config, 0), tokens_of(0, config, 1, 6)
    other = tokens.copy()
    other[0, -1] = (other[0, -1] + 1) % config.vocab_size
    assert abs(model.forward(params, config, tokens)[0] - model.forward(params, config, other)[0])[0, 0].max() > 1e-6


@fast
@given(st.sampled_from([1, 2]), st.lists(st.integers(0, 12), min_size=1, max_size=24), seed)
def test_gaps_are_filled_with_the_likeliest_token_but_the_gap_itself(layers, tokens, seed):
    config, mask_id = dataclasses.replace(TINY, causal=False, num_hidden_layers=layers), 5
    params = model.init(config, seed)
    filled = model.fill(params, config, tokens, mask_id)
    logits = to_numpy(model.forward(params, config, xp.asarray(np.array([tokens])))[0])[0]
    others = np.delete(np.arange(13), mask_id)
    for before, after, row in zip(tokens, filled, logits, strict=True):
        assert after == (others[row[others].argmax()] if before == mask_id else before)


def test_the_whole_context_window_can_be_filled():
    config = dataclasses.replace(TINY, causal=False)
    assert model.fill(model.init(config), config, [1] * 24, 0) == [1] * 24


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="trained to continue"):
        model.fill(model.init(TINY), TINY, [1], 0)
    config = dataclasses.replace(TINY, causal=False)
    with pytest.raises(ValueError, match="25 tokens .* 24"):
        model.fill(model.init(config), config, [1] * 25, 0)
    with pytest.raises(ValueError, match="fill gaps"):
        model.generate(model.init(config), config, [1], 1)


# --- generation ---


def greedy_without_cache(params, config, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = model.forward(params, config, xp.asarray(np.array([tokens])))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@fast
@given(generative, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 9), seed)
def test_cached_batches_of_any_lengths_are_single_uncached_runs(config, lengths, part, seed):
    """However a prompt is read, in parts or all at once."""
    params = model.init(config, seed, np.float64)
    if config.sparse_attention:
        lengths = lengths[:1] * len(lengths)
    prompts = [to_numpy(tokens_of(seed + n, config, n)).tolist() for n in lengths]
    expected = [greedy_without_cache(params, config, prompt, 7) for prompt in prompts]
    with mock.patch("model.PROMPT_PART", part):
        together = np.stack(list(model.generate_batch(params, config, prompts, 7, stop=[])), axis=1)
    assert together.tolist() == expected
    assert list(model.generate(params, config, prompts[0], max_new_tokens=7, temperature=0)) == expected[0]


@fast
@given(st.sampled_from([1, 3]), st.none() | st.integers(1, 4), seed)
def test_a_model_of_any_number_of_layers_generates(layers, window, seed):
    config = dataclasses.replace(TINY, num_hidden_layers=layers)
    if window:
        config = dataclasses.replace(config, layer_types=("sliding_attention",) * layers, sliding_window=window)
    params, prompts = model.init(config, seed, np.float64), [[1, 2], [3], [4, 5, 6, 7, 8]]
    expected = [greedy_without_cache(params, config, prompt, 6) for prompt in prompts]
    together = np.stack(list(model.generate_batch(params, config, prompts, 6, stop=[])), axis=1)
    assert together.tolist() == expected


@fast
@given(seed)
def test_a_row_ends_with_its_stop_token(seed):
    params = model.init(TINY, seed)
    prompts = [[1, 2], [3], [4, 5, 6]]
    free = np.stack(list(model.generate_batch(params, TINY, prompts, 9, temperature=1.0, stop=[])))
    stop = int(free[4, 0])
    stopped = np.stack(list(model.generate_batch(params, TINY, prompts, 9, temperature=1.0, stop=[stop])))
    first = (free[:, 0] == stop).argmax()
    assert (stopped[: first + 1, 0] == free[: first + 1, 0]).all() and (stopped[first + 1 :, 0] == -1).all()
    config = dataclasses.replace(TINY, eos_token_id=stop)
    assert list(model.generate(params, config, prompts[0], 9)) == list(
        model.generate(params, TINY, prompts[0], 9, stop=[stop])
    )


def test_a_layer_sees_what_its_pattern_sees():
    config = dataclasses.replace(
        TINY, layer_types=("window_attention",) * 2, sparse_attention={"block": 2, "stride": 1}
    )
    params, tokens = model.init(config, 0), tokens_of(0, config, 1, 6)
    other = tokens.copy()
    other[0, 1] = (other[0, 1] + 1) % config.vocab_size
    difference = abs(model.forward(params, config, tokens)[0] - model.forward(params, config, other)[0])[0].max(axis=-1)
    assert difference[1] > 1e-6 and (difference[2:] == 0).all()  # the first block of two tokens alone


def test_sparse_attention_refuses_prompts_of_different_lengths():
    config = dataclasses.replace(TINY, **VARIANTS["sparse"])
    with pytest.raises(ValueError, match="one length"):
        model.generate_batch(model.init(config), config, [[1], [1, 2]], 3)


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


@fast
@given(st.sampled_from([0.5, 1.0, 1.3, 5.0]), st.lists(st.integers(1, 9), min_size=1, max_size=3), seed)
def test_tokens_that_were_there_are_penalised_whatever_their_sign(penalty, lengths, seed):
    """Each row by its own tokens, its prompt's and those it drew, and never by the padding."""
    params = model.init(TINY, seed, np.float64)
    prompts = [to_numpy(tokens_of(seed + n, TINY, n)).tolist() for n in lengths]
    rows = [list(prompt) for prompt in prompts]
    for row in rows:
        for _ in range(8):
            logits = to_numpy(model.forward(params, TINY, xp.asarray([row]))[0][0, -1])
            for token in {*row}:
                logits[token] /= penalty if logits[token] > 0 else 1 / penalty
            row.append(int(logits.argmax()))
    drawn = np.stack(list(model.generate_batch(params, TINY, prompts, 8, repetition_penalty=penalty, stop=[])), axis=1)
    assert drawn.tolist() == [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def test_likeliest_of_all_is_drawn_where_nothing_else_is_said():
    params, prompt = model.init(TINY, 3), [1, 2, 3]
    assert list(model.generate(params, TINY, prompt, 9)) == greedy_without_cache(params, TINY, prompt, 9)
    drawn = [list(model.generate(params, TINY, prompt, 9, temperature=2.0, **more)) for more in (
        {}, {"rng": np.random.default_rng(0)}, {"rng": np.random.default_rng(1)})]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_logits_of_any_size_and_a_temperature_near_zero_can_be_drawn_from():
    logits = xp.asarray(np.array([[1e4, 1e4 - 1, -1e4], [-1e4, 0, 1e4], [-1e4, -1e4, -1e4]]))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for keep in {}, {"top_k": 2}, {"top_p": 0.9}:
            drawn = [model.sample(logits, 1.0, rng=np.random.default_rng(s), **keep) for s in range(50)]
            assert {row[1] for row in drawn} == {2} and {row[0] for row in drawn} == {0, 1}
        assert {model.sample(logits, 1e-3, rng=np.random.default_rng(s))[0] for s in range(50)} == {0}


@pytest.mark.parametrize("top_p, kept", [(0.1, 1), (0.25, 1), (0.3, 2), (0.5, 2), (0.75, 3), (0.8, 4), (1.0, 4)])
def test_the_nucleus_is_the_fewest_that_have_the_probability(top_p, kept):
    logits = xp.asarray(np.tile([-np.inf, 0.0, 0.0, 0.0, 0.0], (500, 1)))  # exactly a quarter each
    draws = model.sample(logits, 1.0, top_p=top_p, rng=np.random.default_rng(0))
    assert sorted(set(draws.tolist())) == list(range(1, 1 + kept))


def test_sampling_follows_the_softmax():
    logits, rng = np.log(np.array([0.5, 0.3, 0.2])), np.random.default_rng(0)
    drawn = model.sample(xp.asarray(np.tile(logits, (20000, 1))), 1.0, rng=rng)
    assert abs(np.bincount(drawn) / 20000 - [0.5, 0.3, 0.2]).max() < 0.015
