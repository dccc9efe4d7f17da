"""Files that others wrote: text, JSON, and rows of JSON or CSV, each also packed by gzip. What cannot be read is one
ValueError that names the file and, where there is one, the line; it never shows the content at length.
"""

import csv
import gzip
import io
import json
import math
import os
import re
import reprlib
import zlib
from contextlib import suppress

from safetensors import SafetensorError

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def shown(value):
    """What a file says, cut so short that it can stand in a sentence."""
    return _brief.repr(value)[:80]


def refuse(condition, sentence):
    if condition:
        raise ValueError(sentence)


def read_text(path):
    """A UTF-8 file, .gz or not; ValueError with the place where it is not UTF-8, or if it is empty or cut off."""
    try:
        with (gzip.open if os.fspath(path).endswith(".gz") else open)(path, "rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path} is not packed by gzip, or is cut off") from None
    refuse(not data, f"{path} is empty")
    return decode(data, path)


def decode(data, path, start=0):
    """The text of bytes, which stand in a file from `start` on; ValueError with the place where they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        at = f"byte {start + error.start} is 0x{data[error.start]:02x}"
    if start:
        with open(path, "rb") as file:
            line += sum(file.read(min(1 << 20, start - done)).count(b"\n") for done in range(0, start, 1 << 20))
    raise ValueError(f"{path} is not UTF-8 text: {at}, in line {line}")


def parse_json(text, path, line=None):
    """The value of a JSON text, strictly: Python would also read NaN, infinity and half of a surrogate pair, which are
    no numbers and no text. ValueError with the place.

    line: its number in the file, where the text is that line alone.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of surrogate pairs: do they make whole ones?
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line, what = line or error.lineno, f"not JSON: {error.msg}"
    except RecursionError:
        what = "not JSON that can be read: nested too deeply"
    except UnicodeEncodeError:
        what = "half of a surrogate pair, which is no character"
    except ValueError:
        what = "a number that is NaN, infinite or thousands of digits long"
    raise ValueError(f"{path}: {what}" if line is None else f"{path}, line {line}: {what}")


def _finite(number):
    if not math.isfinite(value := float(number)):
        raise ValueError
    return value


def read_json(path):
    return parse_json(read_text(path), path)


def read_object(path):
    """The object in a JSON file, a dict; ValueError where there is none."""
    value = read_json(regular(path))
    refuse(not isinstance(value, dict), f"{path} holds no JSON object")
    return value


def regular(path):
    """The path; ValueError for a pipe or a device, of which reading may never end."""
    refuse(os.path.exists(path) and not os.path.isfile(path), f"{path} is not a file")
    return path


def json_lines(text, path):
    """Yields (where, value) of each line of a JSONL text that is not blank; where: file and line, for messages."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts at U+2028 too, which JSON may hold
        if line.strip():
            yield f"{path}, line {number}", parse_json(line, path, number)


def read_rows(path, fields):
    """The rows of a .json (a list), .jsonl or .csv file, or one of these as .gz, as (where, row) for error messages.

    fields: {name: type, or the values it may have}. Raises ValueError, with file and line, for a row without one.
    """
    form, text = os.fspath(path).removesuffix(".gz").rpartition(".")[2], read_text(path)
    if form == "json":
        content = parse_json(text, path)
        refuse(not isinstance(content, list), f"{path}: not a list of rows")
        rows = [(f"{path}, row {n}", row) for n, row in enumerate(content, 1)]
    else:
        rows = list(csv_lines(text, path) if form == "csv" else json_lines(text, path))
    refuse(not rows, f"{path} is empty")
    for where, row in rows:
        refuse(not isinstance(row, dict), f"{where}: not an object with fields")
        for name, kind in fields.items():
            is_type, value = isinstance(kind, type), row.get(name)
            fits, kinds = (isinstance(value, kind), "text") if is_type else (value in kind, " or ".join(kind))
            refuse(not fits, f"{where}: the field {name!r} is missing, or is not {kinds}")
    return rows


def csv_lines(text, path):
    """Yields (where, {name: text}) of each row of a CSV text; its first row are the names, and a row may have several
    lines. ValueError for quotes that do not close, and for the NUL of a file that is not text.
    """
    csv.field_size_limit(1 << 30)  # whole conversations
    reader, names, line = csv.reader(io.StringIO(text, newline=""), strict=True), None, 1
    before, nul, _ = text.partition("\0")
    refuse(nul, f"{path}, line {before.count(chr(10)) + 1}: a NUL, which no text has")
    try:
        for cells in reader:
            if names and cells:
                yield f"{path}, line {line}", dict(zip(names, cells))
            names, line = names or cells, reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV: {error}") from None


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def replace(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old file or the new, never a part of one.

    OSError where it cannot be written, such as for want of space; the old file is still there then.
    """
    temporary = f"{path}.new"
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # safetensors lets nobody else read its files
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)  # of what failed
