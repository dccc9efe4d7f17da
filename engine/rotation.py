"""RoPE's rotation at speed; posenc.textbook_rope is what it computes."""

from engine.backend import fused, np, xp


def turned(x, cos, sin, first, second):
    """The pairs (x[..., first], x[..., second]), as points in the plane, turned by their angles; what is behind them
    stays. first, second: slices, of as many numbers as cos and sin have.
    """
    return (_over_whole_vectors if xp is np else _pair_by_pair)(x, cos, sin, first, second)


def _over_whole_vectors(x, cos, sin, first, second):
    """Two products over whole vectors instead of four over halves, which NumPy takes longer for:
    x · (cos, cos) + (x₂, x₁) · (-sin, sin).
    """
    both = 2 * cos.shape[-1]
    cos_both, sin_both = (np.empty((*cos.shape[:-1], both), cos.dtype) for _ in range(2))
    cos_both[..., first], cos_both[..., second] = cos, cos
    sin_both[..., first], sin_both[..., second] = -sin, sin
    y = np.empty_like(x)
    y[..., first], y[..., second], y[..., both:] = x[..., second], x[..., first], x[..., both:]
    turning = y[..., :both]
    turning *= sin_both
    turning += x[..., :both] * cos_both
    return y


@fused
def _turned(x1, x2, cos, sin):
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


def _pair_by_pair(x, cos, sin, first, second):
    y = xp.empty(x.shape, x.dtype)
    y[..., first], y[..., second] = _turned(x[..., first], x[..., second], cos, sin)
    y[..., 2 * cos.shape[-1] :] = x[..., 2 * cos.shape[-1] :]
    return y
