"""What a model needs of this machine, and how fast it can be there."""

from architectures import costs, shapes
from checkpoint import read_config
from engine import memory

CACHES = 2**25  # bytes, about those of a processor


def size(count):
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def describe(folder):
    """Prints what the model of a folder needs of this machine. Its weights are not read."""
    config, _ = read_config(folder)
    window = config.max_position_embeddings
    c, here = costs(config, window), memory.installed()
    weights, cache = 4 * c["parameters"], 4 * c["cache"] * window
    read = 4 * costs(config, 0)["forward"] // 2  # two operations with each weight, in a text that is still short
    print(f"{folder}: {config.model_type} of {c['parameters']:,} parameters, of which a token uses {c['active']:,}")
    print(f"memory     {size(weights)} for the weights, as float32, and {size(cache)} for the keys and values of")
    print(f"           {window:,} tokens, the whole context; this machine has {size(here)}")
    if weights > 0.9 * here:
        return print("           so it does not fit here")
    if read > CACHES:
        matrices = [shape for name, shape in shapes(config).items() if ".layers." in name and len(shape) == 2]
        speed = memory.bandwidth(matrices)
        print(f"speed      {speed / read:,.1f} tokens a second, or somewhat less: for each, {size(read)} are read,")
        print(f"           and of such matrices this machine reads {size(speed)} a second")
    else:
        print("speed      so small a model does not wait for memory")
    print(f'try        python model.py --load {folder} --prompt "The"')
