"""How much of a training is done."""

from tqdm import tqdm


def counted(label, steps):
    """Yields the fraction done, 0 to 1, once a step.

    label: of a progress bar; None for none. There is none either where standard error is no terminal.
    """
    for step in tqdm(range(steps), desc=label, disable=True if label is None else None, leave=False):
        yield step / steps
