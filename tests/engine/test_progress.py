"""Progress: fractions that grow, and a bar for people only."""

import pytest

from engine.progress import counted


@pytest.mark.parametrize("label", [None, "learning"])
def test_a_fraction_for_each_step(label, capsys):
    assert list(counted(label, 4)) == [0, 0.25, 0.5, 0.75]
    assert capsys.readouterr() == ("", "")  # which is no terminal
