"""What a model needs of this machine, and how fast it can be there."""

from architectures import costs
from checkpoint import read_config
from engine import memory

GIB = 2**30


def describe(folder):
    """Prints what the model of a folder needs of this machine. Its weights are not read."""
    config, _ = read_config(folder)
    window = config.max_position_embeddings
    c, here = costs(config, window), memory.installed()
    weights, cache = 4 * c["parameters"], 4 * c["cache"] * window
    read = 4 * costs(config, 0)["forward"] / 2  # two operations with each weight, in a text that is still short
    print(f"{folder}: {config.model_type} of {c['parameters']:,} parameters, of which a token uses {c['active']:,}")
    print(
        f"memory     {weights / GIB:,.2f} GiB for the weights, as float32, and {cache / GIB:,.2f} GiB for the keys and"
    )
    print(f"           values of {window:,} tokens, the whole context; this machine has {here / GIB:,.1f} GiB")
    if weights > 0.9 * here:
        return print("           so it does not fit here")
    speed = memory.bandwidth()
    print(f"speed      at most {speed / read:,.1f} tokens a second: for each, {read / GIB:,.2f} GiB are read, and this")
    print(f"           machine reads {speed / GIB:,.1f} GiB a second")
    print(f'try        python model.py --load {folder} --prompt "The"')
