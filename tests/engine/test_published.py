"""What a published config.json may not say of RoPE; tests/test_architectures.py has the rest."""

import pytest

from engine.published import check_rope

EXTENSION = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "scaling, named",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "longrope"}, "longrope"),
        ({"type": "linear"}, "'linear' needs 'factor'"),
        ({"rope_type": "yarn", "factor": 0.0}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": True}, "original_max"),
        ({"rope_type": "llama3", "factor": 8.0} | EXTENSION | {"high_freq_factor": None}, "high_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0} | EXTENSION | {"high_freq_factor": 1}, "must be below"),
    ],
)
def test_unknown_scaling_is_refused_by_name(scaling, named):
    with pytest.raises(ValueError, match=named):
        check_rope(1e4, scaling)


def test_what_is_left_out_is_fine_and_so_is_a_zero_that_means_none():
    check_rope(1e4, None)
    check_rope(1e4, {"rope_type": "default", "factor": "x"})
    check_rope(1e4, {"rope_type": "yarn", "mscale": 0, "beta_fast": 0, "factor": 4})
    check_rope(5e5, {"rope_type": "llama3", "factor": 8.0} | EXTENSION)
    with pytest.raises(ValueError, match="rope_theta"):
        check_rope(1.0, None)
