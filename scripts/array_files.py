"""Arrays in .npy and .safetensors files, of which parts are read and written on demand.

A .safetensors file is, by its documentation, 8 bytes with the length of a header, the header, and the numbers. The package of
that name hands bfloat16 to NumPy only with the help of others, and does not write parts of an array.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from files import regular

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of .safetensors
LONGEST_HEADER = 100_000_000  # bytes, of .safetensors


class FileArray(NamedTuple):
    """An array in a file."""

    numbers: np.ndarray  # a memory map; bfloat16 as its bits
    dtype: str  # one of CODES

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.numbers.shape

    def part(self, *index: slice) -> np.ndarray:
        """A part in memory, contiguous and in native byte order."""
        part = self.numbers[index]
        return np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("="))

    def part_as_float64(self, *index: slice) -> np.ndarray:
        """A part as float64."""
        part = self.part(*index)
        return (part.astype(np.uint32) << 16).view(np.float32).astype(float) if self.dtype == "bfloat16" else part.astype(float)


def stored_dtype(dtype: str) -> np.dtype:
    """How NumPy holds a dtype."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def open_array(path: str, name: str, dtype: str | None = None) -> FileArray:
    """The array in a file.

    Parameters
    ----------
    path : str
        A .npy file, or a .safetensors file that holds one array, or several, of which `name` is taken.
    name : str
        What the array is called.
    dtype : {None, "bfloat16"}
        "bfloat16" if .npy files hold its bits: they cannot say so.

    Raises
    ------
    OSError, ValueError
        With the path and what is wrong.
    """
    read = {".npy": _read_npy, ".safetensors": _read_safetensors}.get(Path(path).suffix)
    if read is None:
        raise ValueError(f"{path}: the file name must end in .npy or .safetensors")
    regular(path)
    try:
        array = read(path, name)
        if dtype is not None and array.dtype in ("uint16", "void16"):
            array = FileArray(array.numbers.view(np.uint16), dtype)
        if array.dtype not in CODES:
            hint = "; for bfloat16 give --dtype bfloat16" if array.dtype in ("uint16", "void16") else ""
            raise ValueError(f"holds {array.dtype}, supported are {', '.join(CODES)}{hint}")
        if dtype not in (None, array.dtype):
            raise ValueError(f"holds {array.dtype}, not {dtype}")
    except Exception as error:  # a broken file can break its reader anywhere
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason}") from error
    return array


def _read_npy(path: str, _: str) -> FileArray:
    numbers = np.lib.format.open_memmap(path, mode="r")
    return FileArray(numbers, numbers.dtype.name)


def _read_safetensors(path: str, name: str) -> FileArray:
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError("not a .safetensors file: it does not start with the length of a header")
        try:
            entries = dict(json.loads(file.read(length)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not a .safetensors file: {error}") from error
    entries.pop("__metadata__", None)
    if name not in entries and len(entries) != 1:
        raise ValueError(f"holds {', '.join(entries) or 'nothing'}, but no array named {name}")
    entry: dict[str, Any] = entries[name] if name in entries else next(iter(entries.values()))
    code, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtypes = [dtype for dtype, known in CODES.items() if known == code]
    if not dtypes:
        raise ValueError(f"holds {code}, supported are {', '.join(CODES.values())}")
    stored = stored_dtype(dtypes[0])
    fits = min(shape, default=0) >= 0 and math.prod(shape) * stored.itemsize == last - first
    if not fits or not 0 <= first <= last <= size - 8 - length:
        raise ValueError(f"bytes {first} to {last} are not an array of shape {shape} and dtype {code}, or not in the file")
    return FileArray(map_array(path, dtypes[0], tuple(shape), 8 + length + first, "r"), dtypes[0])


def header(suffix: str, name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """The start of a file with one array, after which its numbers come."""
    if suffix == ".npy":
        start = io.BytesIO()
        described = {"descr": stored_dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(start, described)
        return start.getvalue()
    size = math.prod(shape) * stored_dtype(dtype).itemsize
    text = json.dumps({name: {"dtype": CODES[dtype], "shape": shape, "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def map_array(path: str | Path, dtype: str, shape: tuple[int, ...], offset: int, mode: str) -> np.ndarray:
    """The numbers in a file as a memory map."""
    if 0 in shape:  # of which there is nothing to map
        return np.empty(shape, stored_dtype(dtype))
    return np.memmap(path, stored_dtype(dtype), mode, offset, shape)
