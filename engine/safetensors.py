"""*.safetensors, the file that published weights come in: a header's length in 8 bytes, a JSON header {name: {dtype,
shape, data_offsets}}, the data, without gaps. Others wrote it, so whatever the header claims is checked.
"""

import json
import mmap
import os

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.backend import np
from engine.files import read_object, regular, replace, shown

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


def read(path):
    """The arrays of a safetensors file: {name: array}, memory-mapped where NumPy has the dtype. Changing them does
    not change the file. ValueError for a damaged file, OSError where there is none.
    """
    return {name: as_float(*entry) for name, entry in mapped(path).items()}


def metadata(path):
    """The texts in the header of a safetensors file, {name: text}. ValueError for a damaged file."""
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except SafetensorError:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file") from None


def mapped(path):
    """The arrays of a safetensors file as they are stored: {name: (memory-mapped array, name of its format)}.

    They are views of one map of the file: the library has no bfloat16 and no 8-bit floats for NumPy.
    """
    with open(regular(path), "rb") as file:
        metadata(path)  # the library checks that the header and the file fit each other
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8), object_pairs_hook=list)
    data, arrays = np.memmap(path, np.uint8, "c").view(np.ndarray)[start:], {}
    for name, entry in header:
        if name == "__metadata__":
            continue
        kind, shape, (begin, end) = map(dict(entry).get, ("dtype", "shape", "data_offsets"))
        if kind not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{path}: {shown(name)} is stored as {shown(kind)}, which is not one of {known}")
        if name in arrays:
            raise ValueError(f"{path} has the weight {shown(name)} twice")
        try:
            arrays[name] = data[begin:end].view(DTYPES[kind]).reshape(shape), kind
        except (ValueError, OverflowError):
            raise ValueError(f"{path} is damaged: {shown(name)} has a shape that no array has") from None
    return arrays


def release(array):
    """Takes no more memory for an array of `mapped`, which was not changed: whoever reads it again reads the file."""
    file = array.base  # the bytes of all of it
    begin = array.ctypes.data - file.ctypes.data
    page, end = mmap.PAGESIZE, begin + array.nbytes
    begin, end = -(-begin // page) * page, end // page * page
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        file.base.base.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def as_float(array, kind):
    """float32 numbers for the formats that NumPy lacks; others as they are."""
    if kind == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    if kind == "F8_E4M3":  # a sign, 4 bits of exponent and 3 of fraction (Micikevicius et al. 2022): 256 numbers
        exponent, fraction = np.arange(16)[:, None], np.arange(8) / 8
        positive = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0)).ravel()
        positive[-1] = np.nan
        return np.concatenate([positive, -positive]).astype(np.float32)[array]
    return array


def mapped_shards(folder):
    """The same of a folder: of model.safetensors, or of all the files that its index names."""
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from names to files")
        files = sorted({*weight_map.values()})
    stored = {}
    for file in files:
        if os.path.basename(file) != file or file in ("", ".", "..") or not file.isprintable() or len(file) > 200:
            raise ValueError(f"{index} names a file outside its folder, {shown(file)}")
        arrays = mapped(os.path.join(folder, file))
        if stored.keys() & arrays.keys():
            raise ValueError(f"{folder} has the weight {shown(min(stored.keys() & arrays.keys()))} in two files")
        stored |= arrays
    return stored


def scaled(name, matrix, scale, block):
    """The matrix with each block of (rows, columns) times its scale (DeepSeek V3, DeepSeek-AI 2024b, section 3.3)."""
    if matrix.ndim != 2 or scale.shape != tuple(-(-n // b) for n, b in zip(matrix.shape, block, strict=True)):
        raise ValueError(f"the scales of {name} do not fit it")
    for axis, b in enumerate(block):
        scale = scale.repeat(min(b, matrix.shape[axis]), axis=axis)
    return matrix * scale[: matrix.shape[0], : matrix.shape[1]]


def write(path, arrays, notes):
    """Writes NumPy arrays, {name: array}, and notes, {name: text}; the file that was there is replaced whole."""
    replace(path, lambda new: save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, new, metadata=notes))
