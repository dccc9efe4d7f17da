"""Layers: gradients against central differences, and the properties that define each."""

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import layers
from engine import scatter_add, to_numpy, xp

size = st.integers(1, 6)
lead = st.lists(st.integers(1, 3), max_size=3)
seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=30, deadline=None)


def some_targets(seed, vocab, *shape):
    """Targets of which about a third are ignored."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, vocab, shape)
    return xp.asarray(np.where(rng.random(shape) < 0.3, layers.IGNORE, targets))


@fast
@given(lead, size, size, st.booleans(), seed)
def test_linear(lead, into, out, has_bias, seed):
    x, weight, bias = normal(seed, *lead, into), normal(seed + 1, out, into), normal(seed + 2, out)
    arguments = (x, weight, bias) if has_bias else (x, weight)
    y, _ = layers.linear(*arguments)
    close(y, xp.einsum("...i,oi->...o", x, weight) + (bias if has_bias else 0))
    check(layers.linear, *arguments, seed=seed)


@fast
@given(lead, size, seed)
def test_sigmoid(lead, dim, seed):
    x = normal(seed, *lead, dim)
    close(layers.sigmoid(x)[0], 1 / (1 + xp.exp(-x)))
    check(layers.sigmoid, x, seed=seed)


def test_no_dropout_changes_nothing():
    x, dy = normal(0, 2, 3), normal(1, 2, 3)
    y, backward = layers.keep_all(x)
    close(y, x, 0)
    close(backward(dy), dy, 0)


@fast
@given(size, lead, st.floats(0, 0.9), seed)
def test_dropout_is_one_product_for_value_and_gradient(batch, rest, rate, seed):
    x = normal(seed, batch, *rest, 3)
    dropped = lambda x: layers.dropout(x, rate, list(map(np.random.default_rng, range(seed, seed + batch))))
    y, _ = dropped(x)
    assert y.dtype == x.dtype
    kept = to_numpy(y) != 0
    close(to_numpy(y)[kept], to_numpy(x)[kept] / (1 - rate))
    close(y[-1:], layers.dropout(x[-1:], rate, [np.random.default_rng(seed + batch - 1)])[0])  # whatever is beside it
    check(dropped, x, seed=seed)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_leaves_out_as_many_as_it_says_and_keeps_the_mean(rate):
    y, _ = layers.dropout(xp.ones((300, 300), xp.float32), rate, list(map(np.random.default_rng, range(300))))
    y = to_numpy(y)
    assert (y == 0).mean() == pytest.approx(rate, abs=0.01) and y.mean() == pytest.approx(1, abs=0.01)
    assert y.dtype == np.float32 and (y[:, 0] == 0).any() and (y[0] == 0).any()


@fast
@given(lead, size, size, seed)
def test_embedding_is_linear_on_one_hot_vectors(lead, vocab, dim, seed):
    tokens, weight = (
        xp.asarray(np.random.default_rng(seed).integers(0, vocab, lead)),
        normal(seed, vocab, dim),
    )
    y, _ = layers.embedding(tokens, weight)
    close(y, layers.linear((tokens[..., None] == xp.arange(vocab)).astype(float), weight.T)[0])
    check(lambda weight: layers.embedding(tokens, weight), weight)


@fast
@given(st.lists(st.integers(0, 4), max_size=20), size, seed)
def test_scatter_add_counts_every_repetition(index, dim, seed):
    rows, target = normal(seed, len(index), dim), normal(seed + 1, 5, dim)
    expected = target.copy()
    for i, row in zip(index, rows, strict=True):
        expected[i] += row
    scatter_add(target, xp.asarray(np.array(index, int)), rows)
    close(target, expected)


@fast
@given(lead, st.integers(2, 6), seed)
def test_norms(lead, dim, seed):
    x, weight, bias = normal(seed, *lead, dim), normal(seed + 1, dim), normal(seed + 2, dim)
    # near 0, or where features are nearly equal, a small eps bends the curve too much for central differences
    check(lambda *a: layers.rms_norm(*a, eps=0.1), x, weight, seed=seed, tolerance=1e-5)
    check(lambda *a: layers.layer_norm(*a, eps=0.1), x, weight, bias, seed=seed, tolerance=1e-5)
    one, zero = xp.ones(dim), xp.zeros(dim)
    y, _ = layers.rms_norm(x, one, eps=0)
    close((y * y).mean(axis=-1), xp.ones(y.shape[:-1]))
    y, _ = layers.layer_norm(x, one, zero, eps=0)
    close(y.mean(axis=-1), xp.zeros(y.shape[:-1]))


@fast
@given(lead, size, st.sampled_from([1e-4, 1e-2, 1.0]), seed)
def test_norms_are_their_formulas_with_the_papers_eps(lead, dim, length, seed):
    x, weight, bias = length * normal(seed, *lead, dim), normal(seed + 1, dim), normal(seed + 2, dim)
    mean = x.mean(axis=-1, keepdims=True)
    close(layers.rms_norm(x, weight)[0], weight * x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6))
    expected = weight * (x - mean) / xp.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + 1e-5) + bias
    close(layers.layer_norm(x, weight, bias)[0], expected)


@fast
@given(lead, size, st.floats(0.1, 10), seed)
def test_rms_norm_ignores_the_length_of_its_input(lead, dim, factor, seed):
    x, weight = normal(seed, *lead, dim), normal(seed + 1, dim)
    close(layers.rms_norm(factor * x, weight, eps=0)[0], layers.rms_norm(x, weight, eps=0)[0], 1e-9)


@fast
@given(lead, size, st.booleans(), seed)
def test_swiglu(lead, hidden, has_bias, seed):
    x, weights = normal(seed, *lead, 4), {}
    for i, (name, out, into) in enumerate([("gate", hidden, 4), ("up", hidden, 4), ("down", 4, hidden)]):
        weights[f"{name}_proj.weight"] = normal(seed + 1 + i, out, into)
        if has_bias:
            weights[f"{name}_proj.bias"] = normal(seed + 4 + i, out)
    check(layers.swiglu, x, weights, seed=seed)


def test_silu_far_from_zero():
    with np.errstate(all="raise"):
        y, backward = layers.silu(xp.array([-1e4, -1.0, 0.0, 1.0, 1e4]))
    close(y, [0, -1 / (1 + np.e), 0, np.e / (1 + np.e), 1e4])
    close(backward(xp.ones(5))[[0, 2, 4]], [0, 0.5, 1])


@fast
@given(lead, size, st.floats(-1e3, 1e3), seed)
def test_softmax_is_a_distribution_that_a_shift_leaves_alone(lead, dim, shift, seed):
    x = normal(seed, *lead, dim)
    p, _ = layers.softmax(x)
    close(p.sum(axis=-1), xp.ones(p.shape[:-1]))
    close(layers.softmax(x + shift)[0], p)
    check(layers.softmax, x, seed=seed)


def test_softmax_of_nothing_to_choose_is_zero():
    p, backward = layers.softmax(xp.array([[0.0, -xp.inf], [-xp.inf, -xp.inf]]))
    close(p, [[1, 0], [0, 0]])
    close(backward(xp.ones((2, 2))), xp.zeros((2, 2)))


@fast
@given(lead, st.integers(1, 9), seed)
def test_cross_entropy(lead, vocab, seed):
    logits, targets = normal(seed, *lead, vocab), some_targets(seed, vocab, *lead)
    check(lambda logits: layers.cross_entropy(logits, targets), logits, seed=seed)
    _, backward = layers.cross_entropy(logits, targets)
    close(backward(), backward(1.0), 0)  # the loss itself is what is differentiated where nothing else is said
    loss, _ = layers.cross_entropy(xp.zeros((*lead, vocab)), targets)
    assert loss == pytest.approx(np.log(vocab) if (targets != layers.IGNORE).any() else 0)


@fast
@given(lead, st.integers(2, 9), size, st.integers(1, 30), seed)
def test_linear_cross_entropy_is_both_in_one(lead, vocab, dim, chunk, seed):
    x, weight, targets = (
        normal(seed, *lead, dim),
        normal(seed + 1, vocab, dim),
        some_targets(seed, vocab, *lead),
    )
    logits, linear_backward = layers.linear(x, weight)
    loss, loss_backward = layers.cross_entropy(logits, targets)
    fused, backward = layers.linear_cross_entropy(x, weight, targets, chunk=chunk)
    assert fused == pytest.approx(loss)
    for ours, textbook in zip(backward(0.7), linear_backward(loss_backward(0.7)), strict=True):
        close(ours, textbook)
    for ours, textbook in zip(backward(), linear_backward(loss_backward()), strict=True):
        close(ours, textbook)


@fast
@given(lead, st.integers(2, 9), size, st.integers(1, 30), seed)
def test_linear_log_likelihood_is_the_textbook_of_each_target(lead, vocab, dim, chunk, seed):
    x, weight, targets = normal(seed, *lead, dim), normal(seed + 1, vocab, dim), some_targets(seed, vocab, *lead)
    log_p, backward = layers.linear_log_likelihood(x, weight, targets, chunk)
    assert log_p.shape == targets.shape and not log_p[targets == layers.IGNORE].any()
    dlog_p = normal(seed + 2, *lead)
    dx, dweight = backward(dlog_p)
    expected_dweight = xp.zeros_like(weight)
    for place in np.ndindex(*lead):
        logits, linear_backward = layers.linear(x[place], weight)
        loss, loss_backward = layers.cross_entropy(logits, targets[place])
        assert float(log_p[place]) == pytest.approx(-loss)
        row, more = linear_backward(loss_backward(-float(dlog_p[place])))
        close(dx[place], row)
        expected_dweight += more
    close(dweight, expected_dweight)


@fast
@given(lead, st.integers(2, 9), size, st.integers(1, 30), seed)
def test_linear_log_likelihood_gradients(lead, vocab, dim, chunk, seed):
    x, weight, targets = normal(seed, *lead, dim), normal(seed + 1, vocab, dim), some_targets(seed, vocab, *lead)
    check(lambda x, weight: layers.linear_log_likelihood(x, weight, targets, chunk), x, weight, seed=seed)


def test_the_likelihood_of_what_is_all_but_impossible_is_finite():
    log_p, backward = layers.linear_log_likelihood(xp.array([[1000.0]]), xp.array([[1.0], [-1.0]]), xp.array([1]))
    close(log_p, [-2000.0])
    close(backward(xp.ones(1))[1], [[-1000.0], [1000.0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_do_not_overflow(dtype):
    logits, targets = xp.array([[1e4, 0, -1e4], [-1e4, -2e4, -1e4]], dtype), xp.array([1, 0])
    with np.errstate(over="raise", invalid="raise"):
        loss, backward = layers.cross_entropy(logits, targets)
        log_p, _ = layers.linear_log_likelihood(xp.eye(2, dtype=dtype), logits.T.copy(), targets)
    assert loss == pytest.approx((1e4 + np.log(2)) / 2)
    close(backward(2.0), [[1, -1, 0], [-0.5, 0, 0.5]], 1e-6)
    close(log_p, [-1e4, -np.log(2)], 1e-3 if dtype == np.float32 else 1e-9)


def test_linear_cross_entropy_never_holds_all_logits():
    import tracemalloc

    rows, vocab = 8192, 16384
    x, weight = normal(0, rows, 8, dtype=xp.float32), normal(1, vocab, 8, dtype=xp.float32)
    targets = some_targets(0, vocab, rows)
    if xp is not np:
        pytest.skip("tracemalloc sees main memory only")
    tracemalloc.start()
    _, backward = layers.linear_cross_entropy(x, weight, targets)
    backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**24 < rows * vocab * 4 / 4  # logits, softmax, gradient and the last softmax: 16 MiB each


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_keep_their_dtype(dtype):
    x, table = normal(0, 2, 3, 4, dtype=dtype), normal(1, 6, 4, dtype=dtype)
    w, targets = normal(2, 4, dtype=dtype), xp.zeros((2, 3), int)
    weights = {f"{name}_proj.weight": normal(3, 4, 4, dtype=dtype) for name in ("gate", "up", "down")}
    for function, arguments in [
        (layers.linear, (x, table)),
        (layers.rms_norm, (x, w)),
        (layers.layer_norm, (x, w, w)),
        (layers.silu, (x,)),
        (layers.swiglu, (x, weights)),
        (layers.softmax, (x,)),
        (lambda x: layers.linear_cross_entropy(x, table, targets), (x,)),
        (lambda x: layers.linear_log_likelihood(x, table, targets), (x,)),
        (lambda x: layers.cross_entropy(x, targets), (x,)),
    ]:
        y, backward = function(*arguments)
        grads = backward() if isinstance(y, float) else backward(y)
        flat = [g for d in (grads if isinstance(grads, tuple) else (grads,)) for g in _arrays(d)]
        assert all(to_numpy(g).dtype == dtype for g in flat)
        assert isinstance(y, float) or y.dtype == dtype


def _arrays(d):
    return d.values() if isinstance(d, dict) else [d]
