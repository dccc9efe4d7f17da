"""Positional encodings: their gradients, the properties that define them, and published configurations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check, close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from engine import to_numpy, xp

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rope.json").read_text())["cases"]

even = st.integers(1, 8).map(lambda pairs: 2 * pairs)
size = st.integers(1, 5)
seed = st.integers(0, 2**32 - 1)
fast = settings(max_examples=30, deadline=None)


def tables(positions, dim, dtype=xp.float64, **keywords):
    return posenc.rope_tables(positions, posenc.pair_frequencies(dim), dtype=dtype, **keywords)


# --- sinusoidal ---


def test_sinusoidal_is_the_papers_formula():
    pe = posenc.sinusoidal(range(50), 6, dtype=xp.float64)
    for p in (0, 1, 49):
        for i in range(6):
            angle = p / 10000 ** (2 * (i // 2) / 6)
            assert float(pe[p, i]) == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-12)


@fast
@given(st.lists(size, max_size=2), size, even, st.sampled_from([xp.float32, xp.float64]))
def test_sinusoidal_shape_and_dtype(lead, time, dim, dtype):
    positions = xp.zeros((*lead, time), dtype=int)
    assert posenc.sinusoidal(positions, dim).dtype == xp.float32
    pe = posenc.sinusoidal(positions, dim, dtype=dtype)
    assert pe.shape == (*lead, time, dim) and pe.dtype == dtype


@fast
@given(even, st.integers(-500, 500), st.floats(2, 1e6))
def test_a_shift_of_position_is_one_rotation(dim, shift, base):
    positions = xp.arange(40)
    here, there = (posenc.sinusoidal(p, dim, base, xp.float64) for p in (positions, positions + shift))
    rotation = xp.zeros((dim, dim))
    for j in range(dim // 2):
        angle = shift / base ** (2 * j / dim)
        c, s = math.cos(angle), math.sin(angle)
        rotation[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = xp.asarray([[c, s], [-s, c]])
    close(here @ rotation.T, there)


# --- learned ---


@fast
@given(st.data(), size, size, seed)
def test_learned_gradient_with_repeated_positions(data, length, dim, seed):
    positions = data.draw(st.lists(st.lists(st.integers(0, length - 1), min_size=3, max_size=3), max_size=3))
    positions = xp.asarray(positions, dtype=int).reshape(-1, 3)
    table = normal(seed, length, dim)
    y, _ = posenc.learned(positions, table)
    assert y.shape == (*positions.shape, dim)
    assert all((y[i] == table[positions[i]]).all() for i in np.ndindex(positions.shape))
    check(lambda table: posenc.learned(positions, table), table)


@pytest.mark.parametrize("positions, named", [([0, 7], "0 to 7"), ([-1, 2], "-1 to 2")])
def test_learned_names_position_and_table(positions, named):
    with pytest.raises(ValueError, match=f"{named} .* 7 positions"):
        posenc.learned(xp.asarray(positions), xp.zeros((7, 2)))


# --- rope ---


@fast
@given(size, size, size, even, st.integers(0, 3), st.booleans(), st.booleans(), st.booleans(), seed)
def test_rope_gradient_shape_and_layout(batch, heads, time, dim, rest, interleaved, own_positions, transposed, seed):
    positions = xp.arange(batch * time).reshape(batch, 1, time) if own_positions else xp.arange(time)
    cos, sin = tables(positions, dim, attention_factor=1.3)
    if transposed:
        x = normal(seed, batch, time, heads, dim + rest).transpose(0, 2, 1, 3)
    else:
        x = normal(seed, batch, heads, time, dim + rest)
    check(lambda x: posenc.rope(x, cos, sin, interleaved), x, directions=1, coordinates=8)
    y, backward = posenc.rope(x.astype(xp.float32), cos.astype(xp.float32), sin.astype(xp.float32), interleaved)
    assert y.shape == x.shape and y.dtype == backward(y).dtype == xp.float32
    close(y[..., dim:], x[..., dim:].astype(xp.float32), 0)  # partial rotary


@fast
@given(even, st.booleans(), seed)
def test_rope_turns_each_pair_by_its_angle(dim, interleaved, seed):
    x, positions = normal(seed, 2, 3, 4, dim), [0, 1, 7, 1000]
    y, _ = posenc.rope(x, *tables(positions, dim), interleaved)
    for j in range(dim // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + dim // 2)
        turn = xp.exp(1j * xp.asarray(positions) * 10000.0 ** (-2 * j / dim))
        close(y[..., a] + 1j * y[..., b], (x[..., a] + 1j * x[..., b]) * turn)


@fast
@given(even, st.integers(1, 9), st.booleans(), seed)
def test_rope_is_the_textbook_rope(dim, time, own_positions, seed):
    positions = xp.arange(2 * time).reshape(2, 1, time) if own_positions else xp.arange(time) + 5
    x, (cos, sin) = normal(seed, 2, 3, time, dim), tables(positions, dim)
    close(posenc.rope(x, cos, sin)[0], posenc.textbook_rope(x, cos, sin), 1e-14)


@fast
@given(even, st.integers(-1000, 100_000), st.booleans(), seed)
def test_rope_scores_depend_on_relative_positions_only(dim, shift, interleaved, seed):
    q, k = normal(seed, 2, 1, 2, 6, dim)

    def scores(start):
        cos, sin = tables(start + xp.arange(6), dim)
        return posenc.rope(q, cos, sin, interleaved)[0] @ posenc.rope(k, cos, sin, interleaved)[0].swapaxes(-1, -2)

    close(scores(0), scores(shift), 1e-8)


@fast
@given(even, st.booleans(), seed)
def test_rope_is_undone_by_its_backward_and_keeps_norms(dim, interleaved, seed):
    x = normal(seed, 2, 2, 5, dim)
    y, backward = posenc.rope(x, *tables(xp.arange(5) + 3, dim), interleaved)
    close(backward(y), x)
    close(xp.linalg.norm(y, axis=-1), xp.linalg.norm(x, axis=-1))


@fast
@given(even, seed)
def test_half_split_is_interleaved_permuted(dim, seed):
    x, (cos, sin) = normal(seed, 2, 2, 5, dim), tables(xp.arange(5), dim)
    order = xp.arange(dim).reshape(2, -1).T.ravel()  # 0, n, 1, n + 1, ...
    half_split, _ = posenc.rope(x, cos, sin)
    interleaved, _ = posenc.rope(x[..., order], cos, sin, interleaved=True)
    close(half_split[..., order], interleaved)


def test_angles_are_exact_at_long_range():
    frequencies = posenc.pair_frequencies(8)
    cos, sin = posenc.rope_tables([1_000_003], frequencies, attention_factor=2.0)
    angles = [1_000_003 * float(f) for f in frequencies]
    assert cos.dtype == sin.dtype == xp.float32
    close(cos[0], [2 * math.cos(a) for a in angles], 1e-6)
    close(sin[0], [2 * math.sin(a) for a in angles], 1e-6)


# --- context extension ---

EXTENSION = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_frequencies_agree_with_transformers(case):
    frequencies, attention_factor = posenc.rope_frequencies(
        case["dim"], case["base"], case["scaling"], case["max_position_embeddings"]
    )
    assert frequencies.dtype == xp.float64
    # transformers computes in float32
    np.testing.assert_allclose(to_numpy(frequencies), case["frequencies"], rtol=1e-6)
    assert attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)


@fast
@given(st.sampled_from(["linear", "llama3", "yarn"]), even, st.floats(100, 1e6))
def test_factor_one_changes_nothing(kind, dim, base):
    frequencies, attention_factor = posenc.rope_frequencies(dim, base, {"rope_type": kind, "factor": 1.0} | EXTENSION)
    close(frequencies, posenc.rope_frequencies(dim, base)[0], 1e-15)
    assert attention_factor == 1


@fast
@given(even, st.floats(1, 64), st.sampled_from(["type", "rope_type"]))
def test_linear_scaling_divides_positions(dim, factor, key):
    positions = xp.arange(100)
    frequencies, _ = posenc.rope_frequencies(dim, scaling={key: "linear", "factor": factor, "rope_theta": 7.0})
    for one, other in zip(
        posenc.rope_tables(positions, frequencies), tables(positions / factor, dim, xp.float32), strict=True
    ):
        close(one, other, 1e-6)


@fast
@given(st.sampled_from(["llama3", "yarn"]), even, st.floats(100, 1e6), st.floats(1, 64))
def test_every_frequency_lies_between_none_and_linear(kind, dim, base, factor):
    plain, _ = posenc.rope_frequencies(dim, base)
    frequencies, _ = posenc.rope_frequencies(dim, base, {"rope_type": kind, "factor": factor} | EXTENSION)
    assert (frequencies <= plain * (1 + 1e-12)).all() and (frequencies >= plain / factor * (1 - 1e-12)).all()
    close(frequencies[0], plain[0])  # the fastest pair, six tokens a turn, is never slowed


@pytest.mark.parametrize(
    "factor, mscale, expected",
    [(40, 1.0, 1 + 0.1 * math.log(40)), (40, 0.707, 1 + 0.0707 * math.log(40)), (1.5, 1.0, 1 + 0.1 * math.log(1.5)),
     (40, 0, 1), (40, None, 1), (1, 1.0, 1), (0.5, 1.0, 1)],
)  # fmt: skip
def test_the_temperature_of_yarn_is_the_papers_and_that_of_a_shorter_context_is_one(factor, mscale, expected):
    assert posenc.yarn_mscale(factor, mscale) == pytest.approx(expected, rel=1e-12)
    if mscale == 1:
        assert posenc.yarn_mscale(factor) == posenc.yarn_mscale(factor, 1.0)


def test_yarn_keeps_from_32_turns_on_and_stretches_below_one_where_nothing_else_is_said():
    """Peng et al. 2023, section 3.2: α = 1 and β = 32."""
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False}
    frequencies, _ = posenc.rope_frequencies(128, 1e4, scaling)
    close(frequencies, posenc.rope_frequencies(128, 1e4, scaling | {"beta_fast": 32, "beta_slow": 1})[0], 0)
    speed = posenc.pair_frequencies(128)
    turns = 4096 * speed / (2 * math.pi)
    assert ((frequencies == speed) == (turns >= 32)).all()
    assert ((abs(frequencies * 8 / speed - 1) < 1e-12) == (turns <= 1)).all()


# --- alibi ---


@pytest.mark.parametrize(
    "heads, exponents",
    [
        (1, [8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [k / 2 for k in range(1, 17)]),
    ],
)
def test_alibi_slopes_are_the_published_ones(heads, exponents):
    slopes = posenc.alibi_slopes(heads)
    assert slopes.dtype == xp.float32
    np.testing.assert_allclose(to_numpy(slopes), [2.0**-e for e in exponents], rtol=1e-6)


@fast
@given(st.integers(1, 40), size, st.integers(0, 5))
def test_alibi_bias_is_minus_slope_times_distance(heads, queries, past):
    keys = past + queries
    bias = posenc.alibi(heads)(xp.arange(past, keys)[:, None], xp.arange(keys)[None])
    assert bias.shape == (heads, queries, keys) and bias.dtype == xp.float32
    slopes = posenc.alibi_slopes(heads)
    assert len(set(slopes.tolist())) == heads
    for i, j in np.ndindex(queries, keys):
        close(bias[:, i, j], -slopes * abs(past + i - j), 1e-6)


# --- the gradient checker itself ---


def cube(x, slope=3.0):
    return x**3, lambda dy: slope * x**2 * dy


def spends_what_it_captured(x):
    saved = 3 * x**2
    return x**3, lambda dy: xp.multiply(saved, dy, out=saved)


def writes_into_its_argument(x):
    saved = 3 * x**2
    return x**3, lambda dy: xp.multiply(saved, dy, out=x).copy()


def test_gradcheck_accepts_right_gradients():
    x = normal(0, 3, 2)
    check(cube, x)
    check(
        lambda x, w: ((x * w["a"]).sum(), lambda: (w["a"] + 0 * x, {"a": x.copy()})),
        x,
        {"a": normal(1, 3, 2)},
    )
    check(lambda x: ((x[0], x[1] ** 2), lambda da, db: xp.stack([da, 2 * x[1] * db, 0 * da])), x)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: cube(x, 3.001), "argument.0. along"),
        (lambda x: (x**3, lambda dy: (3 * x**2 * dy)[:1]), "shape"),
        (lambda x: (x**3, lambda dy: (dy, dy)), "gradients for"),
        (lambda x: (x**3, lambda dy: xp.multiply(dy, 3 * x**2, out=dy)), "changed its cotangent"),
        (spends_what_it_captured, "another result"),
        (writes_into_its_argument, "changed an argument"),
        (lambda x: (x + 1e-3 * (xp.arange(6) == 4).reshape(3, 2) * x, lambda dy: dy), "coordinate .2, 0."),
    ],
)
def test_gradcheck_refuses_wrong_gradients(function, message):
    with pytest.raises(AssertionError, match=message):
        check(function, normal(0, 3, 2), directions=0 if "coordinate" in message else 3)
