"""Mixture of experts: chosen = all experts with gates of zero, the router's choice, and an even load."""

import gc
import sys

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moe
from engine import to_numpy, xp
from layers import swiglu

seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=40, deadline=None)
experts_and_k = st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def expert(seed, dim, inside):
    sizes = {"gate": (inside, dim), "up": (inside, dim), "down": (dim, inside)}
    return {f"{name}_proj.weight": normal(seed + i, *sizes[name]) for i, name in enumerate(sizes)}


def layer(seed, dim, experts, inside=3, shared=False, bias=False):
    """The weights of a mixture of experts, under their published names."""
    weights = {"gate.weight": normal(seed, experts, dim)}
    if bias:
        weights["gate.e_score_correction_bias"] = normal(seed + 1, experts)
    for i in range(experts):
        weights |= {f"experts.{i}.{name}": w for name, w in expert(seed + 2 + 3 * i, dim, inside).items()}
    if shared:
        weights |= {f"shared_experts.{name}": w for name, w in expert(seed + 2 + 3 * experts, dim, 4).items()}
    return weights


def any_choice(seed, tokens, experts, k):
    rng = np.random.default_rng(seed)
    return xp.asarray(np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]))


@fast
@given(experts_and_k, st.integers(1, 9), seed)
def test_chosen_experts_are_all_experts_with_gates_of_zero(sizes, tokens, seed):
    (experts, k), dim = sizes, 4
    chosen, gates, x = any_choice(seed, tokens, experts, k), normal(seed, tokens, k), normal(seed + 1, tokens, dim)
    weights = [expert(seed + 2 + 3 * i, dim, 3) for i in range(experts)]
    every_gate = xp.zeros((tokens, experts))
    every_gate[xp.arange(tokens)[:, None], chosen] = gates
    y, backward = moe.chosen_experts(x, chosen, gates, weights)
    expected, expected_backward = moe.every_expert(x, every_gate, weights)
    close(y, expected)
    (dx, dgates, dexperts), (dx2, dgates2, dexperts2) = backward(x), expected_backward(x)
    close(dx, dx2)
    close(dgates, dgates2[xp.arange(tokens)[:, None], chosen])
    for ours, textbook in zip(dexperts, dexperts2, strict=True):
        for name in textbook:
            close(ours[name], textbook[name])


@fast
@given(experts_and_k, seed)
def test_the_textbook_gradients(sizes, seed):
    experts, _ = sizes
    weights = [expert(seed + 3 * i, 4, 3) for i in range(experts)]
    check(moe.every_expert, normal(seed, 5, 4), normal(seed + 1, 5, experts), weights, coordinates=4)


@fast
@given(st.integers(1, 9), seed)
def test_one_expert_is_a_dense_layer(tokens, seed):
    weights, x = layer(seed, 4, 1), normal(seed, 1, tokens, 4)
    seen = {}
    y, backward = moe.mixture_of_experts(x, weights, 1, observe=seen, balance=1.0)
    dense, dense_backward = swiglu(x, {name.removeprefix("experts.0."): w for name, w in weights.items()})
    close(y, dense)
    assert seen["balance"] == pytest.approx(1)
    dx, dweights = backward(x)
    dense_dx, _ = dense_backward(x)
    close(dx, dense_dx)
    close(dweights["gate.weight"], xp.zeros((1, 4)))  # there is nothing to choose


# a step of a central difference may carry a token over the edge between two experts, so the numbers are fixed
@settings(max_examples=25, deadline=None, derandomize=True)
@given(experts_and_k, st.booleans(), st.booleans(), st.booleans(), seed)
def test_gradients_of_the_layer(sizes, bias, shared, normalise, seed):
    experts, k = sizes
    weights = layer(seed, 4, experts, 3, shared, bias)
    options = {"normalise": normalise, "scale": 1.7}
    dy = normal(seed + 98, 2, 3, 4)

    def function(x, weights):  # a loss of y, and of the balance
        seen = {}
        y, backward = moe.mixture_of_experts(x, weights, k, observe=seen, balance=0.3, **options)
        return float((dy * y).sum()) + 0.3 * seen["balance"], lambda: backward(dy)

    check(function, normal(seed + 99, 2, 3, 4), weights, coordinates=4, directions=1, seed=seed, tolerance=1e-5)


@fast
@given(experts_and_k, st.booleans(), st.booleans(), seed)
def test_the_gates_are_the_scores_of_the_chosen(sizes, bias, normalise, seed):
    (experts, k), x = sizes, normal(seed, 6, 4)
    weight = normal(seed + 1, experts, 4)
    shift = normal(seed + 2, experts) if bias else None
    (chosen, gates, p), _ = moe.route(x, weight, k, shift, normalise=normalise, scale=2.5)
    logits = to_numpy(x @ weight.T)
    scores = 1 / (1 + np.exp(-logits)) if bias else np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.argsort(-(scores + to_numpy(shift)) if bias else -scores, axis=1)[:, :k]
    assert (np.sort(to_numpy(chosen), axis=1) == np.sort(best, axis=1)).all()
    picked = np.take_along_axis(scores, to_numpy(chosen), axis=1)
    close(gates, 2.5 * picked / (picked.sum(axis=1, keepdims=True) if normalise else 1))
    close(p, scores / scores.sum(axis=1, keepdims=True))


@fast
@given(st.integers(1, 4), st.integers(2, 4), st.data(), seed)
def test_a_token_keeps_to_its_best_groups(groups, in_group, data, seed):
    used = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, used * in_group))
    scores = normal(seed, 5, groups * in_group)
    chosen = to_numpy(moe.choose(scores, k, groups, used))
    for row, numbers in zip(to_numpy(scores), chosen, strict=True):
        best_two = np.sort(row.reshape(groups, in_group), axis=1)[:, -2:].sum(axis=1)
        allowed = np.argsort(-best_two)[:used]
        candidates = [i for i in range(groups * in_group) if i // in_group in allowed]
        assert set(numbers) == set(sorted(candidates, key=lambda i: -row[i])[:k])


@fast
@given(st.integers(1, 20), st.sampled_from([60, 256, 3000]), seed)
@example(1, 3000, 0)
def test_of_many_experts_the_best_are_chosen(k, experts, seed):
    scores = normal(seed, 6, experts)
    chosen = to_numpy(moe.choose(scores, k))
    assert (np.sort(chosen) == np.sort(np.argsort(-to_numpy(scores))[:, :k])).all()


@fast
@given(experts_and_k, st.booleans(), seed)
def test_the_gradients_of_the_router(sizes, normalise, seed):
    (experts, k), x = sizes, normal(seed, 5, 4)

    def routed(x, weight):
        (_, gates, p), backward = moe.route(x, weight, k, normalise=normalise, scale=2.5)
        return (gates, p), backward

    check(routed, x, normal(seed + 1, experts, 4), seed=seed, tolerance=1e-5)


def test_a_token_keeps_to_one_group_where_nothing_else_is_said():
    scores, x, weight = normal(0, 50, 12), normal(1, 50, 4), normal(2, 12, 4)
    assert (xp.sort(moe.choose(scores, 3, 4)) == xp.sort(moe.choose(scores, 3, 4, 1))).all()
    (chosen, _, _), _ = moe.route(x, weight, 3, n_group=4)
    assert (xp.ptp(chosen // 3, axis=1) == 0).all()  # three experts a group


@fast
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 5), seed)
def test_divided_by_sum_has_a_sum_of_one_over_the_last_axis(lead, size, seed):
    a = abs(normal(seed, *lead, size)) + 0.1
    y, _ = moe.divided_by_sum(a)
    close(y, a / a.sum(axis=-1, keepdims=True))
    check(moe.divided_by_sum, a)


@fast
@given(experts_and_k, seed)
def test_the_order_of_the_tokens_and_other_sequences_do_not_matter(sizes, seed):
    (experts, k), x = sizes, normal(seed, 2, 5, 4)
    weights = layer(seed, 4, experts)
    order = np.random.default_rng(seed).permutation(5)
    seen, moved_seen, *seen_by_half = {}, {}, {}, {}
    y, _ = moe.mixture_of_experts(x, weights, k, observe=seen)
    moved, _ = moe.mixture_of_experts(x[:, order], weights, k, observe=moved_seen)
    close(moved, y[:, order])
    assert moved_seen["balance"] == pytest.approx(seen["balance"])
    halves = [moe.mixture_of_experts(x[i : i + 1], weights, k, observe=seen_by_half[i])[0] for i in range(2)]
    close(xp.concatenate(halves), y)
    assert seen["balance"] == pytest.approx(sum(half["balance"] for half in seen_by_half) / 2)


@fast
@given(experts_and_k, st.integers(1, 3), st.integers(1, 8), seed)
def test_the_auxiliary_loss_is_its_formula_and_one_for_an_even_load(sizes, batch, time, seed):
    (experts, k), p = sizes, abs(normal(seed, batch, time, sizes[0])) + 0.1
    p /= p.sum(axis=-1, keepdims=True)
    chosen = any_choice(seed, batch * time, experts, k).reshape(batch, time, k)
    loss, _ = moe.load_balancing_loss(p, chosen)
    by_hand = 0.0
    for row, numbers in zip(to_numpy(p), to_numpy(chosen), strict=True):
        for i in range(experts):
            by_hand += experts * (numbers == i).sum() / (time * k) * row[:, i].mean() / batch
    assert loss == pytest.approx(by_hand)
    check(lambda p: moe.load_balancing_loss(p, chosen), p)
    _, backward = moe.load_balancing_loss(p, chosen)
    close(backward(), backward(1.0), 0)
    even = xp.full((1, experts, experts), 1 / experts)
    each_once = (xp.arange(experts)[:, None] + xp.arange(k)) % experts
    assert moe.load_balancing_loss(even, each_once[None])[0] == pytest.approx(1)


@fast
@given(experts_and_k, st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans(), seed)
def test_padding_is_sent_to_no_expert_and_counts_for_nothing(sizes, shared, lengths, left, seed):
    """Rows with padding are the same rows without it."""
    (experts, k), time = sizes, max(lengths) + 2
    weights, x, dy = layer(seed, 4, experts, shared=shared), *(normal(seed + i, len(lengths), time, 4) for i in (1, 2))
    number = xp.arange(time)
    real = xp.stack([number >= time - n if left else number < n for n in lengths])
    observed = {}
    y, backward = moe.mixture_of_experts(x, weights, k, real, observed, 0.7)
    dx, dweights = backward(dy * real[:, :, None])
    alone_loss, load, sums = 0.0, 0, {}
    for row, n in enumerate(lengths):
        part, seen = slice(time - n, time) if left else slice(n), {}
        own = x[row : row + 1, part]
        alone, alone_backward = moe.mixture_of_experts(own, weights, k, None, seen, 0.7 / len(lengths))
        close(y[row : row + 1, part], alone)
        alone_loss, load = alone_loss + seen["balance"] / len(lengths), load + seen["load"]
        alone_dx, grads = alone_backward(dy[row : row + 1, part])
        close(dx[row : row + 1, part], alone_dx)
        sums = {name: sums.get(name, 0) + g for name, g in grads.items()}
    assert observed["balance"] == pytest.approx(alone_loss)
    close(observed["load"], load)
    for name, g in sums.items():
        close(dweights[name], g)


def test_the_bias_lifts_who_has_little_to_do():
    bias = xp.zeros(4)
    moe.adjust_bias(bias, xp.asarray([10, 2, 4, 0]), update_speed=0.1)
    close(bias, [-0.1, 0.1, 0, 0.1])
    moe.adjust_bias(bias, xp.asarray([10, 2, 4, 0]))  # at the speed of DeepSeek V3, 0.001
    close(bias, [-0.101, 0.101, 0, 0.101])


def test_the_balance_has_no_weight_where_none_is_given():
    weights, x = layer(0, 4, 5), normal(1, 2, 3, 4)
    grads = [moe.mixture_of_experts(x, weights, 2, observe={}, **more)[1](x)[1] for more in ({}, {"balance": 0.0})]
    close(grads[0]["gate.weight"], grads[1]["gate.weight"], 0)


@fast
@given(experts_and_k, st.integers(1, 3), seed)
def test_an_expert_without_tokens_computes_nothing(sizes, tokens, seed):
    (experts, k), calls = sizes, []
    chosen, x = any_choice(seed, tokens, experts, k), normal(seed, tokens, 4)
    weights = [expert(seed + 2 + 3 * i, 4, 3) for i in range(experts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "swiglu", lambda x, weights: (calls.append(len(x)), swiglu(x, weights))[1])
        moe.chosen_experts(x, chosen, normal(seed, tokens, k), weights)
    assert sorted(calls) == sorted(n for n in to_numpy(moe.loads(chosen, experts)).tolist() if n)


@pytest.mark.parametrize("way", ["auxiliary loss", "bias"])
def test_both_remedies_even_out_a_router_that_prefers_one_expert(way):
    weights, x = layer(0, 8, 6, bias=way == "bias"), normal(1, 4, 50, 8) + 2 * normal(0, 6, 8)[:1]
    weights["gate.weight"] *= 0.2
    busiest = []
    for _ in range(300):
        observed = {}
        _, backward = moe.mixture_of_experts(x, weights, 2, observe=observed, balance=1.0)
        busiest.append(float(observed["load"].max() / observed["load"].mean()))
        if way == "bias":
            moe.adjust_bias(weights["gate.e_score_correction_bias"], observed["load"], 0.01)
        else:
            _, dweights = backward(xp.zeros_like(x))
            weights["gate.weight"] -= 1.0 * dweights["gate.weight"]
    assert busiest[0] > 2.5 and np.mean(busiest[-20:]) < 1.5


def test_python_runs_once_an_expert_however_many_tokens_there_are():
    weights, counts = layer(0, 4, 8), []
    weights["gate.weight"] *= 0.1  # every expert has something to do
    for tokens in 500, 5000:
        x, calls = normal(0, 1, tokens, 4), []
        gc.disable()  # it calls back whoever asked to be told, such as hypothesis
        sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(event) if "call" in event else None)
        try:
            _, backward = moe.mixture_of_experts(x, weights, 2)
            backward(x)
        finally:
            sys.setprofile(None)
            gc.enable()
        counts.append(len(calls))
    assert counts[1] < 1.05 * counts[0]  # the rest is what NumPy calls by itself
