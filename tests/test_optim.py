"""The optimisers: what one step does, and that many of them arrive."""

import weakref

import numpy as np
import pytest
from gradcheck import close, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import block_weights
from test_latent import latent_weights

import optim
import posenc
from attention import Options, self_attention
from engine import xp
from latent import latent_attention

seed = st.integers(0, 2**32 - 1)
size = st.integers(1, 12)
fast = settings(max_examples=30, deadline=None)


@fast
@given(size, st.floats(1e-3, 1e3), seed)
def test_the_first_step_of_adamw_moves_every_number_by_the_learning_rate(n, scale, seed):
    w, g = normal(seed, n), normal(seed + 1, n) * scale
    before = w.copy()
    optim.adamw(w, g, {}, 1, lr=0.01, weight_decay=0.1, eps=0)
    close(w, before * (1 - 0.01 * 0.1) - 0.01 * xp.sign(g))


@fast
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_adamw_is_the_recurrence_of_the_paper(gradients):
    w, state = xp.array([0.5]), {}
    m = v = 0.0
    expected, lr, (b1, b2), eps, decay = 0.5, 0.1, (0.9, 0.95), 1e-8, 0.1
    for t, g in enumerate(gradients, 1):
        optim.adamw(w, xp.array([g]), state, t, lr, (b1, b2), eps, decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        expected -= lr * (m / (1 - b1**t) / ((v / (1 - b2**t)) ** 0.5 + eps) + decay * expected)
    close(w, [expected], 1e-8)


@fast
@given(size, size, st.floats(1e-3, 1e3), seed)
def test_orthogonalise_keeps_directions_and_levels_the_singular_values(rows, cols, scale, seed):
    u, _, vt = np.linalg.svd(np.random.default_rng(seed).standard_normal((rows, cols)), full_matrices=False)
    s = np.random.default_rng(seed).uniform(0.1, 1, len(vt))
    x = optim.orthogonalise(xp.asarray((u * s) @ vt * scale))
    inner = u.T @ np.asarray(x.tolist()) @ vt.T
    assert (0.6 < np.diag(inner)).all() and (np.diag(inner) < 1.3).all()
    assert abs(inner - np.diag(np.diag(inner))).max() < 1e-6


@fast
@given(size, size, st.floats(1e-2, 1e2), seed)
def test_muon_ignores_the_size_of_the_gradient(rows, cols, scale, seed):
    g, steps = normal(seed, rows, cols), []
    for factor in 1, scale:
        w = xp.zeros((rows, cols))
        optim.muon(w, g * factor, {}, lr=0.1)
        steps.append(w)
    close(*steps, 1e-5)


@fast
@given(size, size, seed)
def test_muon_looks_a_step_ahead_of_its_momentum(rows, cols, seed):
    w, state = normal(seed, rows, cols), {}
    expected, m, lr, momentum, decay = w.copy(), 0.0, 0.1, 0.95, 0.1
    for t in range(3):
        g = normal(seed + 1 + t, rows, cols)
        optim.muon(w, g, state, lr, momentum, decay)
        m = momentum * m + g
        expected *= 1 - lr * decay
        expected -= lr * 0.2 * max(rows, cols) ** 0.5 * optim.orthogonalise(g + momentum * m)
    close(w, expected)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_finds_the_least_squares_solution(kind):
    name = "model.layers.0.mlp.up_proj.weight"
    x, goal = normal(0, 64, 6), normal(1, 4, 6)
    params = {name: xp.zeros((4, 6)), "model.norm.weight": xp.ones(6)}
    optimizer = optim.Optimizer(kind, 0.05, weight_decay=0.0)
    for i in range(400):
        error = x @ (params[name] - goal).T
        grads = {name: error.T @ x / 64, "model.norm.weight": 2 * (params["model.norm.weight"] - 3)}
        optimizer.step(params, grads, optim.warm_up_and_decay(i / 400))
    close(params[name], goal, 0.02)
    close(params["model.norm.weight"], 3 * xp.ones(6), 0.05)
    assert set(optimizer.state[name]) == ({"m"} if kind == "muon" else {"m", "v"})


def test_norms_and_biases_do_not_decay():
    params = {"model.norm.weight": xp.ones(3), "model.embed_tokens.weight": xp.ones((3, 3))}
    optimizer = optim.Optimizer("muon", 0.1)
    optimizer.step(params, {name: xp.zeros_like(w) for name, w in params.items()})
    close(params["model.norm.weight"], xp.ones(3))
    close(params["model.embed_tokens.weight"], xp.full((3, 3), 0.99))


@fast
@given(st.lists(size, min_size=1, max_size=4), st.floats(0.1, 10), seed)
def test_clipping_bounds_the_common_norm(sizes, largest, seed):
    grads = {str(i): normal(seed + i, n) for i, n in enumerate(sizes)}
    before = xp.concatenate(list(grads.values()))
    norm = optim.clip(grads, largest)
    after = xp.concatenate(list(grads.values()))
    assert norm == pytest.approx(float(xp.linalg.norm(before)))
    close(after, before * min(1, largest / norm))


def test_the_schedule_rises_stays_and_falls_to_zero():
    values = [optim.warm_up_and_decay(p) for p in np.linspace(0, 1, 101)]
    assert values[0] == 0 and values[-1] == 0 and max(values) == 1
    top = values.index(1.0)
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)
    assert optim.warm_up_and_decay(1.5) == 0


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="sgd"):
        optim.Optimizer("sgd", 0.1)


def test_a_step_holds_few_gradients_however_many_it_adds():
    class Gradients(dict):  # which, unlike a dict, can be watched
        pass

    existing, most, params = 0, 0, {"w": xp.zeros(2)}

    def gone():
        nonlocal existing
        existing -= 1

    def part(x):
        nonlocal existing, most
        grads = Gradients(w=xp.full(2, float(x)))
        weakref.finalize(grads, gone)
        existing += 1
        most = max(most, existing)
        return grads

    optim.descend(part, range(9), params, optim.Optimizer("adamw", 0.1))
    assert most <= 3 and (params["w"] != 0).all()  # the sum, the last one added, and the next


# --- QK-clip ---


@fast
@given(st.integers(1, 4), st.booleans(), st.floats(0.1, 5), seed)
def test_clipped_heads_score_the_threshold_and_the_others_as_before(heads, low_rank, threshold, seed):
    nope, turning, v_dim, rank, x = 4, 2, 3, 5, normal(seed, 1, 7, 6)
    weights = latent_weights(seed, 6, heads, rank, nope, turning, v_dim, 4 if low_rank else None)
    tables = posenc.rope_tables(xp.arange(7), posenc.rope_frequencies(turning)[0], dtype=xp.float64)

    def largest():
        observed = {}
        latent_attention(x, weights, heads, v_dim, Options(rope=tables, observe=observed))
        return observed["max_logits"]

    before, values = largest(), weights["kv_b_proj.weight"].reshape(heads, nope + v_dim, rank)[:, nope:].copy()
    optim.qk_clip(weights, before, threshold)
    close(largest(), xp.minimum(before, threshold), 1e-8)
    close(weights["kv_b_proj.weight"].reshape(heads, nope + v_dim, rank)[:, nope:], values)


@fast
@given(st.integers(1, 2), st.integers(1, 3), st.booleans(), st.floats(0.1, 5), seed)
def test_heads_that_share_their_keys_are_clipped_by_their_queries(kv_heads, group, bias, threshold, seed):
    heads, x = kv_heads * group, normal(seed, 1, 7, 6)
    weights = block_weights(seed, 6, heads, kv_heads, 4, qk_norm=False, bias=bias)

    def largest():
        observed = {}
        self_attention(x, weights, heads, kv_heads, Options(observe=observed))
        return observed["max_logits"]

    before = largest()
    optim.qk_clip(weights, before, threshold)
    close(largest(), xp.minimum(before, threshold), 1e-8)


def test_descending_follows_the_sum_of_the_gradients_of_the_parts():
    params, expected = ({"w": normal(0, 3, 2)} for _ in range(2))
    optimizers = [optim.Optimizer("adamw", 0.1) for _ in range(2)]
    parts = [normal(i, 3, 2) * 0.01 for i in (1, 2, 3)]
    optim.descend(lambda part: {"w": part.copy()}, parts, params, optimizers[0], 0.5)
    optimizers[1].step(expected, {"w": sum(parts)}, 0.5)
    close(params["w"], expected["w"])
    optim.descend(lambda part: {"w": part.copy()}, parts, params, optimizers[0])
    optimizers[1].step(expected, {"w": sum(parts)})
    close(params["w"], expected["w"])
    assert optimizers[0].steps == 2


def test_the_defaults_are_those_of_the_papers():
    """AdamW as for large models (Brown et al. 2020), Muon (Jordan et al. 2024), QK-clip (Kimi Team 2025)."""
    w, g, params = normal(0, 3, 4), normal(1, 3, 4), []
    for options in {}, {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}:
        params.append((w.copy(), {}))
        for step in 1, 2, 3:
            optim.adamw(params[-1][0], step * g, params[-1][1], step, 0.1, **options)
    close(params[0][0], params[1][0], 0)
    params = [(w.copy(), {}) for _ in range(2)]
    for (value, state), options in zip(params, ({}, {"momentum": 0.95, "weight_decay": 0.1})):
        for step in 1, 2:
            optim.muon(value, step * g, state, 0.1, **options)
    close(params[0][0], params[1][0], 0)
    close(optim.orthogonalise(g), optim.orthogonalise(g, steps=5), 0)
    assert optim.Optimizer("muon", 0.01).weight_decay == 0.1 and optim.Optimizer("muon", 0.01).steps == 0
    grads = {"w": g.copy()}
    optim.clip(grads)
    assert float((grads["w"] ** 2).sum()) == pytest.approx(1)
    weights = [{"q_proj.weight": w.copy(), "k_proj.weight": w.copy()} for _ in range(2)]
    for some, threshold in zip(weights, ((), (100.0,))):
        optim.qk_clip(some, xp.asarray([200.0]), *threshold)
    close(weights[0]["q_proj.weight"], weights[1]["q_proj.weight"], 0)


def test_the_schedule_at_its_corners():
    factors = [optim.warm_up_and_decay(x) for x in (0, 0.025, 0.05, 0.4, 0.7, 1, 1.2)]
    np.testing.assert_allclose(factors, [0, 0.5, 1, 1, 0.5, 0, 0], atol=1e-12)


def test_the_cosine_rises_and_falls_to_a_tenth():
    factors = [optim.cosine(x) for x in (0, 0.025, 0.05, 0.525, 1, 1.2)]
    assert factors == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])
    falling = [optim.cosine(x) for x in np.linspace(0.05, 1, 50)]
    assert all(a > b for a, b in zip(falling, falling[1:]))
    assert optim.cosine(0.6, warm_up=0.2, least=0) == pytest.approx(0.5)
