"""Figures: matplotlib without a screen, the look that all of them have, and the file that one becomes."""

import os
from contextlib import contextmanager

from engine.backend import np

# The palette of Okabe and Ito, which colour-blind people tell apart; in grey print its first colours differ, and
# lines have dashes of their own.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), "-"]


@contextmanager
def figure(path, rows=1, columns=1, size=(7, 4), legends=True, **how):
    """Yields the axes of a figure, as matplotlib's subplots returns them, and afterwards writes it, and its folder.

    size: in inches. legends: each of the axes that has labels shows them, beside its data. Images have no
    grid, nor have axes that are off.
    """
    import matplotlib
    from matplotlib.figure import Figure

    cycle = matplotlib.cycler(color=COLOURS, linestyle=DASHES)
    with matplotlib.rc_context({"axes.prop_cycle": cycle, "axes.titlesize": "medium", "legend.fontsize": "small"}):
        canvas = Figure(figsize=size, layout="constrained")
        yield (axes := canvas.subplots(rows, columns, **how))
        for each in np.ravel(axes):
            if each.axison and not each.images:
                each.spines[["top", "right"]].set_visible(False)
                each.grid(alpha=0.3)
            if legends and each.get_legend_handles_labels()[1]:
                each.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        canvas.savefig(path, dpi=120)
