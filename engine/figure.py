"""Figures: matplotlib without a screen, the look that all of them have, and the file that one becomes."""

import os
from contextlib import contextmanager

from engine.backend import np


@contextmanager
def figure(path, rows=1, columns=1, size=(7, 4), legends=True, **how):
    """Yields the axes of a figure, as matplotlib's subplots returns them, and afterwards writes it, and its folder.

    size: in inches. legends: each of the axes that has labels shows them. Images have no grid.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=size, layout="constrained")
    yield (axes := canvas.subplots(rows, columns, **how))
    for each in np.ravel(axes):
        if not each.images:
            each.spines[["top", "right"]].set_visible(False)
            each.grid(alpha=0.3)
        if legends and each.get_legend_handles_labels()[1]:
            each.legend(frameon=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    canvas.savefig(path, dpi=120)
