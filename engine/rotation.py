"""RoPE's rotation at speed: the numbers of posenc.textbook_rope."""

from engine.backend import fused, np, xp


def rotate(x, cos, sin, first, second):
    """Each pair of a number of x[..., first] and one of x[..., second], as a point in the plane, turned by its angle;
    components behind the pairs stay.

    x: (..., time, dim); cos, sin: (..., time, n), as they broadcast; first, second: slices of dim, of n each.
    Returns an array shaped like x.
    """
    return (_over_whole_vectors if xp is np else _pair_by_pair)(x, cos, sin, first, second)


def _over_whole_vectors(x, cos, sin, first, second):
    """x · (cos, cos) + (x₂, x₁) · (-sin, sin): NumPy is faster at two products over whole vectors than at four over
    halves.
    """
    both = 2 * cos.shape[-1]
    cos_both, sin_both = (np.empty((*cos.shape[:-1], both), cos.dtype) for _ in range(2))
    cos_both[..., first], cos_both[..., second] = cos, cos
    sin_both[..., first], sin_both[..., second] = -sin, sin
    y = np.empty_like(x)
    y[..., first], y[..., second], y[..., both:] = x[..., second], x[..., first], x[..., both:]
    pairs = y[..., :both]
    pairs *= sin_both
    pairs += x[..., :both] * cos_both
    return y


@fused
def _rotated(x1, x2, cos, sin):
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


def _pair_by_pair(x, cos, sin, first, second):
    y = xp.empty(x.shape, x.dtype)
    y[..., first], y[..., second] = _rotated(x[..., first], x[..., second], cos, sin)
    y[..., 2 * cos.shape[-1] :] = x[..., 2 * cos.shape[-1] :]
    return y
