"""Checkpoints: a model in a folder, as it is published.

    config.json          the sizes and switches, see architectures.Config
    model.safetensors    the weights, by name; large models come in several such files and an index of them

A checkpoint is somebody else's file. Whatever its header claims is checked before it is used, and what does not fit
is refused with one sentence. A checkpoint that is written replaces its forerunner whole or not at all.
"""

import dataclasses
import json
import math
import os

import numpy as np

from architectures import Config, is_block_fp8, shapes
from backend import to_numpy, xp

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


def read_safetensors(path):
    """The arrays of a safetensors file: {name: array}, memory-mapped where NumPy has the dtype. Changing them does
    not change the file.

    Raises ValueError for a damaged file, OSError where there is none.
    """
    return {name: _as_float(*entry) for name, entry in _mapped(path).items()}


def _mapped(path):
    """The arrays of a safetensors file as they are stored: {name: (memory-mapped array, name of its format)}.

    The file: the header's length in 8 bytes, a JSON header {name: {dtype, shape, data_offsets}}, the data,
    without gaps.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(f"{path} is truncated or no safetensors file")
        try:
            header = json.loads(file.read(start - 8), object_pairs_hook=_without_duplicates)
            header.pop("__metadata__", None)
            entries = [(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()]
            entries.sort(key=lambda entry: entry[3:])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} has a damaged safetensors header") from None
    arrays, expected = {}, 0
    for name, kind, shape, *offsets in entries:
        if kind not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {kind}, which is not one of {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[kind])
        whole = len(offsets) == 2 and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
        if (
            not whole
            or offsets != [expected, expected + dtype.itemsize * math.prod(shape)]
            or start + offsets[1] > size
        ):
            raise ValueError(f"{path} is truncated or damaged at {name}")
        begin, expected = offsets
        empty = begin == expected  # which cannot be mapped
        array = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "c", start + begin, shape).view(np.ndarray)
        arrays[name] = array, kind
    if start + expected != size:
        raise ValueError(f"{path} has {size - start - expected:,} bytes that belong to no weight")
    return arrays


def _without_duplicates(pairs):
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _as_float(array, kind):
    """float32 numbers for the formats that NumPy lacks; others as they are."""
    if kind == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    if kind == "F8_E4M3":  # a sign, 4 bits of exponent and 3 of fraction (Micikevicius et al. 2022): 256 numbers
        sign, exponent, fraction = (-1.0) ** np.arange(2), np.arange(16)[:, None], np.arange(8) / 8
        positive = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0)).ravel()
        positive[-1] = np.nan
        return np.outer(sign, positive).ravel().astype(np.float32)[array]
    return array


def load(folder, dtype=np.float32):
    """Reads config.json and *.safetensors, in one file or in shards with an index: (params, config).

    Weights stored as dtype are mapped from the file, so that loading takes no time and they take no memory until
    they are used; bfloat16, float16 and DeepSeek's 8-bit floats are converted to it.
    Raises ValueError or OSError, with one sentence, where something is missing, damaged or does not fit.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder with a checkpoint")
    published = read_json(os.path.join(folder, "config.json"))
    generation = os.path.join(folder, "generation_config.json")  # knows all the tokens that end an answer
    if os.path.exists(generation):
        published["eos_token_id"] = read_json(generation).get("eos_token_id", published.get("eos_token_id"))
    config = Config.from_dict(published)
    stored = _mapped_shards(folder)
    scales = {name.removesuffix("_scale_inv"): stored.pop(name) for name in list(stored) if name.endswith("_scale_inv")}
    if scales and not is_block_fp8(published.get("quantization_config")):
        raise ValueError(f"{folder} has scales for {min(scales)}, and config.json has no quantization_config for them")

    further = f"model.layers.{config.num_hidden_layers}."  # the layer for the token after the next
    if config.num_nextn_predict_layers:
        if not any(name.startswith(further) for name in stored):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
        for name in "embed_tokens.weight", "shared_head.head.weight":  # copies of the model's own
            stored.pop(further + name, None)
    wanted = shapes(config)
    for name, shape in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder} has no weight {name}")
        if stored[name][0].shape != shape:
            raise ValueError(f"{folder}: {name} has shape {stored[name][0].shape}, and config.json makes it {shape}")
    unknown = set(stored) - set(wanted) - {"lm_head.weight"}  # a tied head is sometimes stored a second time
    if unknown:
        raise ValueError(f"{folder} has a weight {min(unknown)}, which this model does not have")

    def number(name):
        value = _as_float(*stored[name])
        return _scaled(name, value, _as_float(*scales[name]), published) if name in scales else value

    # Generating a token takes as long as reading all weights. Those that are converted lie in one large array, whose
    # memory pages are large too, and along the longer side of each matrix (a fifth to a third faster for SmolLM2).
    as_stored = {name for name in wanted if stored[name][0].dtype == dtype and name not in scales}
    memory = xp.empty(sum(math.prod(shape) for name, shape in wanted.items() if name not in as_stored), dtype)
    params, start = {}, 0
    for name, shape in wanted.items():
        if name in as_stored:
            params[name] = xp.asarray(stored[name][0])
            continue
        part = memory[start : start + math.prod(shape)]
        start += part.size
        along = len(shape) == 2 and shape[0] >= shape[1]
        params[name] = part.reshape(shape[::-1]).T if along else part.reshape(shape)
        params[name][...] = xp.asarray(number(name))
    return params, config


def _mapped_shards(folder):
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from names to files")
        files = sorted(set(weight_map.values()))
    stored = {}
    for file in files:
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise ValueError(f"{index} names a file outside its folder")
        arrays = _mapped(os.path.join(folder, file))
        if stored.keys() & arrays.keys():
            raise ValueError(f"{folder} has the weight {min(stored.keys() & arrays.keys())} in two files")
        stored |= arrays
    return stored


def _scaled(name, matrix, scale, published):
    """The matrix with each block multiplied by its scale (DeepSeek-AI 2024, section 3.3)."""
    block = published["quantization_config"]["weight_block_size"]
    if matrix.ndim != 2 or scale.shape != tuple(-(-n // b) for n, b in zip(matrix.shape, block, strict=True)):
        raise ValueError(f"the scales of {name} do not fit it")
    for axis, b in enumerate(block):
        scale = scale.repeat(b, axis=axis)
    return matrix * scale[: matrix.shape[0], : matrix.shape[1]]


def save(folder, params, config):
    """Writes config.json and model.safetensors, which transformers loads too; each replaces its forerunner whole."""
    from safetensors.numpy import save_file

    os.makedirs(folder, exist_ok=True)
    arrays = {name: np.ascontiguousarray(to_numpy(value)) for name, value in params.items()}
    weights = os.path.join(folder, "model.safetensors")
    replace(weights, lambda path: save_file(arrays, path, metadata={"format": "pt"}))
    replace(
        os.path.join(folder, "config.json"),
        lambda path: write_text(path, json.dumps(config.to_dict(), indent=2) + "\n"),
    )


def read_json(path):
    """The object in a JSON file; ValueError where there is none."""
    with open(path, encoding="utf-8") as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def replace(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old file or the new, never a part of one."""
    temporary = f"{path}.new"
    write(temporary)
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
