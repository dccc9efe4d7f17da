"""The stand-in for CuPy: what it refuses, as CuPy does, and that it computes what NumPy computes."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin import cupy

HOST = np.arange(6.0).reshape(2, 3)
x = cupy.asarray(HOST)
one = cupy.ones((), int)

NO_ARRAY_OF_CUPY = {
    "arithmetic": lambda: x + HOST,
    "arithmetic, the other way round": lambda: HOST - x,
    "a matrix product": lambda: x.T @ HOST,
    "arithmetic in place": lambda: copy.copy(x).__iadd__(HOST),
    "a comparison": lambda: x < HOST,
    "a mask": lambda: x[0] & [True, False, True],
    "a ufunc": lambda: cupy.exp(HOST),
    "the place for a result": lambda: cupy.exp(x, out=np.empty_like(HOST)),
    "a list in a ufunc": lambda: cupy.maximum(x, [1, 2, 3]),
    "a function": lambda: cupy.sum(HOST),
    "a choice": lambda: cupy.where(x > 1, x, HOST),
    "a list of arrays": lambda: cupy.concatenate([x, HOST]),
    "a value to store": lambda: x.__setitem__(0, HOST[0]),
    "a value to add": lambda: cupy.add.at(copy.copy(x), one, HOST[0]),
    "a method": lambda: x.dot(HOST.T),
}
NO_NUMBER_AND_NO_NUMPY_ARRAY = {
    "a range": lambda: range(one),
    "an index of a list": lambda: [1, 2][one],
    "a slice": lambda: x[:one],
    "a shape": lambda: cupy.zeros((2, one)),
    "another shape": lambda: x.reshape(one, 6),
    "an axis": lambda: x.sum(axis=one),
    "a conversion": lambda: np.asarray(x),
    "a conversion in a list": lambda: np.array([x, x]),
    "a list of arrays and numbers": lambda: cupy.array([one, 1]),
    "a number of NumPy": lambda: np.float32(one),
    "a key": lambda: {x: 1},
}
NOT_AMONG_THE_PARAMETERS = {
    "where in a reduction": lambda: cupy.sum(x, where=x > 1),
    "where in a method": lambda: x.max(where=x > 1, initial=0),
    "where in a ufunc": lambda: cupy.exp(x, where=x > 1),
    "one argument too many": lambda: x.sum(0, None, None, True, 0),
    "one too few": lambda: cupy.take_along_axis(x, one),
    "out of einsum": lambda: cupy.einsum("ij->i", x, out=x[:, 0]),
    "a sort by name": lambda: cupy.sort(x, order="name"),
    "the numbers of a generator": lambda: cupy.random.default_rng(0).integers(3, where=1),
}


@pytest.mark.parametrize("group", [NO_ARRAY_OF_CUPY, NO_NUMBER_AND_NO_NUMPY_ARRAY, NOT_AMONG_THE_PARAMETERS])
def test_what_cupy_refuses_is_a_type_error(group):
    for name, refused in group.items():
        with pytest.raises(TypeError):
            refused()
            pytest.fail(f"{name} was accepted")
    np.testing.assert_array_equal(x.get(), HOST)


def test_other_refusals():
    for there in (
        lambda: cupy.permutation,
        lambda: cupy.random.default_rng(0).permutation(3),
        lambda: cupy.random.normal,
        lambda: x.ctypes,
        lambda: x.sums,
        lambda: setattr(x, "name", 1),
        lambda: cupy.sum(1.0),  # a number has no method sum
    ):
        with pytest.raises(AttributeError):
            there()
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.asarray(["text"])
    with pytest.raises(ValueError, match="stable"):
        cupy.argsort(x, kind="quicksort")
    with pytest.raises(NotImplementedError):
        cupy.logical_or.reduce(x)
    with pytest.raises(NotImplementedError):
        cupy.multiply.at(copy.copy(x), one, 1)
    with pytest.raises(NotImplementedError):
        cupy.RawModule(code="")


def test_storing_twice_at_one_index_is_refused_where_it_matters():
    stored, twice = cupy.zeros(3), cupy.asarray([1, 1, 2])
    stored[twice] = cupy.asarray([5.0, 5.0, 6.0])
    stored[twice] += 1
    assert stored.tolist() == [0, 6, 7]
    with pytest.raises(ValueError, match="twice"):
        stored[twice] = cupy.asarray([5.0, 4.0, 6.0])


def test_a_reduction_and_an_element_are_arrays_without_dimensions():
    for result in (x.sum(), cupy.max(x), x[1, 2], next(iter(x[0])), cupy.allclose(x, x), cupy.count_nonzero(x), -one):
        assert type(result) is cupy.ndarray and result.shape == ()
        assert float(result) == int(result) == result.item() == result.tolist()
        assert bool(result) == (result.item() != 0)
    changed = cupy.zeros(2)
    element = changed[1]
    element += 3  # a view
    assert changed.tolist() == [0, 3]


def test_an_array_is_a_copy_of_what_is_in_main_memory():
    host = np.zeros(2)
    array = cupy.asarray(host)
    host[0] = 1
    array.get()[1] = cupy.asnumpy(array)[1] = 1
    assert array.tolist() == [0, 0]
    shared = cupy.asarray(array)
    for other in (copy.copy(array), copy.deepcopy(array), pickle.loads(pickle.dumps(array)), cupy.array(array)):
        other += 1
    assert array.tolist() == [0, 0]
    shared += 1
    assert array.tolist() == [1, 1]


def test_what_is_not_yet_written_is_not_zero():
    assert cupy.isnan(cupy.empty((2, 3))).all() and cupy.empty_like(one) != 0


@given(st.lists(st.floats(-9, 9), min_size=6, max_size=6), st.floats(-9, 9), st.integers(0, 1))
def test_it_computes_what_numpy_computes(numbers, scalar, axis):
    host = np.array(numbers).reshape(2, 3)
    array = cupy.asarray(host)
    for f in (
        lambda np, x: x * scalar - np.exp(x) / 3,
        lambda np, x: HOST.dtype.type(scalar) * x,
        lambda np, x: 2 - x + np.float32(scalar),
        lambda np, x: np.sum(x, axis=0, keepdims=True) @ x.T if axis == 1 else x.std(axis=0),
        lambda np, x: np.where(x > 0, x, 0)[..., ::-1],
        lambda np, x: np.concatenate([x, x[:1]])[np.argsort(x[:, 0])],
        lambda np, x: np.stack([row * 2 for row in x]),
        lambda np, x: np.take_along_axis(x, np.argmax(x, axis=axis, keepdims=True), axis=axis),
        lambda np, x: np.linalg.norm(x, axis=axis).astype(np.float32),
        lambda np, x: np.einsum("ij,kj->ik", x, x),
        lambda np, x: x[x > scalar],
        lambda np, x: np.add.reduce(x, axis=axis),
        lambda np, x: divmod(x, 4)[1],
    ):
        found, expected = f(cupy, array), f(np, host)
        assert type(found) is cupy.ndarray and found.dtype == expected.dtype
        np.testing.assert_array_equal(found.get(), expected)
