"""Figures: the file they become, and what every one of them shows."""

import pytest

from engine.figure import figure


def test_a_figure_is_written_with_its_folder_legends_and_grids(tmp_path):
    path = tmp_path / "new" / "a.png"
    with figure(path, 1, 3) as (labelled, plain, image):
        labelled.plot([0, 1], label="a")
        plain.plot([0, 1])
        image.imshow([[0, 1]])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert labelled.get_legend() and not plain.get_legend() and not image.get_legend()
    assert labelled.xaxis.get_gridlines()[0].get_visible() and not image.xaxis.get_gridlines()[0].get_visible()
    with figure(tmp_path / "b.png", legends=False) as axes:
        axes.plot([0, 1], label="b")
    assert not axes.get_legend() and (tmp_path / "b.png").exists()


def test_a_figure_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "a.png"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
