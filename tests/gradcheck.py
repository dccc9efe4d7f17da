"""Gradient checking: a function that returns its value and its backward pass, against central differences.

    check(lambda x, weight: rms_norm(x, weight), x, weight)
    check(lambda params: loss(params, config, tokens, targets), params)

Gradient of ⟨dy, value⟩ along a direction u: (f(x + εu) - f(x - εu)) / 2ε, in float64.
"""

import inspect

import numpy as np

from engine import to_numpy, xp


def check(function, *arguments, seed=0, epsilon=1e-5, tolerance=1e-6, directions=3, coordinates=32):
    """Raises AssertionError, naming the argument, where a backward pass differs from central differences.

    function(*arguments) -> (value, backward). An argument is an array or a dict, list or tuple of them, at
    any depth, taken as float64; what has no gradient belongs in the function's closure. value is an array, a
    number or a tuple of them; backward takes one cotangent for each (or nothing, for a loss) and returns one
    gradient for each argument, bare if there is just one.
    Compared: structure and shapes of the gradients; for each array, `directions` random directions and every
    coordinate, or a sample of `coordinates` if it has more. And backward, called twice, must give the same
    twice and leave its cotangent and the arguments as they were.
    tolerance: largest difference, relative to the largest derivative compared in that array.
    """
    rng = np.random.default_rng(seed)
    arguments = _map(lambda array: xp.array(array, dtype=xp.float64), arguments)
    before = _map(xp.copy, arguments)

    value, backward = function(*arguments)
    several = isinstance(value, tuple)
    values = value if several else (value,)
    cotangents = tuple(xp.asarray(rng.standard_normal(xp.shape(v))) for v in values)
    if not inspect.signature(backward).parameters:  # a loss, whose own gradient is one
        cotangents = tuple(xp.ones(xp.shape(v)) for v in values)

    def pull_back():
        given = _map(xp.copy, cotangents)
        gradients = backward(*given) if inspect.signature(backward).parameters else backward()
        assert _equal(given, cotangents), "backward changed its cotangent"
        return gradients if isinstance(gradients, tuple) else (gradients,)

    gradients = pull_back()
    gradients = _map(xp.copy, gradients)
    assert _equal(pull_back(), gradients), "the second call of backward gave another result than the first"
    assert _equal(arguments, before), "forward or backward changed an argument"

    leaves, grads = dict(_leaves(arguments)), dict(_leaves(gradients))
    assert leaves.keys() == grads.keys(), (
        f"gradients for {', '.join(grads) or 'nothing'}, but arguments are {', '.join(leaves)}"
    )

    def objective():
        outputs = function(*arguments)[0]
        return sum(float((dy * v).sum()) for dy, v in zip(cotangents, outputs if several else (outputs,), strict=True))

    # below this, differences are rounding: ε⁻¹ times the float64 error of the sum
    rounding = 1e-14 / epsilon * sum(float(abs(dy * v).sum()) for dy, v in zip(cotangents, values, strict=True))

    for name, leaf in leaves.items():
        grad = grads[name]
        assert grad.shape == leaf.shape, f"gradient of {name} has shape {grad.shape}, the argument {leaf.shape}"
        probes = [("a random direction", xp.asarray(rng.standard_normal(leaf.shape))) for _ in range(directions)]
        for index in rng.permutation(leaf.size)[:coordinates]:
            one_hot = xp.zeros(leaf.size)
            one_hot[index] = 1
            where = tuple(int(i) for i in np.unravel_index(index, leaf.shape))
            probes.append((f"coordinate {where}", one_hot.reshape(leaf.shape)))

        original, found = leaf.copy(), []
        for where, direction in probes:
            sides = []
            for sign in (1, -1):
                leaf[...] = original + sign * epsilon * direction
                sides.append(objective())
            leaf[...] = original
            found.append((where, (sides[0] - sides[1]) / (2 * epsilon), float((grad * direction).sum())))

        scale = max((abs(numeric) for _, numeric, _ in found), default=0.0)
        for where, numeric, analytic in found:
            assert abs(numeric - analytic) <= tolerance * scale + rounding, (
                f"gradient of {name} along {where}: backward gives {analytic:.10g}, "
                f"central differences {numeric:.10g} (epsilon {epsilon:g})"
            )


def _leaves(tree, name="argument"):
    """Every array of a nested dict, list or tuple, with a name such as argument[0]['weight']."""
    if isinstance(tree, dict):
        children = sorted(tree.items())
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        return [(name, tree)]
    return [leaf for key, child in children for leaf in _leaves(child, f"{name}[{key!r}]")]


def _map(function, tree):
    if isinstance(tree, dict):
        return {key: _map(function, child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(function, child) for child in tree)
    return function(tree)


def _equal(one, other):
    return all(xp.array_equal(a, b) for (_, a), (_, b) in zip(_leaves(one), _leaves(other), strict=True))


def normal(seed, *shape, dtype=xp.float64):
    """Standard normal numbers, the same with every backend."""
    return xp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def close(one, other, tolerance=1e-10):
    """Raises AssertionError where two arrays differ by more than the tolerance, or in shape."""
    one, other = to_numpy(xp.asarray(one)), to_numpy(xp.asarray(other))
    assert one.shape == other.shape, f"shapes {one.shape} and {other.shape}"
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
