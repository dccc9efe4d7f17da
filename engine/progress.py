"""How much of a training is done, where its budget is steps, or time."""

import itertools
from time import perf_counter

from tqdm import tqdm


def clock(label, seconds, steps=1):
    """Yields the fraction done, 0 to 1, until both the seconds from now and the least number of steps are over.

    label: of a progress bar; None for none. There is none either where standard error is no terminal.
    """
    began = perf_counter()

    def ticks():
        bar_format = "{desc:30}{percentage:3.0f}%|{bar}| {elapsed}"
        with tqdm(total=1.0, desc=label, disable=True if label is None else None, bar_format=bar_format) as bar:
            for step in itertools.count():
                done = min((perf_counter() - began) / seconds, step / steps)
                if done >= 1:
                    break
                bar.update(done - bar.n)
                yield done
            bar.update(1 - bar.n)

    return ticks()


def counted(label, steps):
    """Yields the fraction done, 0 to 1, once a step. label: of a progress bar; None for none."""
    with tqdm(total=steps, desc=label, disable=True if label is None else None) as bar:
        for step in range(steps):
            yield step / steps
            bar.update()
