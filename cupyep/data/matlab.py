"""A reader for arrays of integers in MATLAB 5 files, in bounded time and memory.

SciPy's reader takes what a file says for true: values of an unknown type, one wrong byte, end the process (segmentation
fault, SciPy 1.17), a quarter of a megabyte becomes 256 of them, and a negative size in the older format sets it reading
the same place for ever. Source: MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np

HEADER = 128
INTEGERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 12: "i8", 13: "u8"}  # how values are stored
CLASSES = {8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32", 14: "int64", 15: "uint64"}
OTHER_CLASSES = {1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 6: "float64", 7: "float32"}
MATRIX, COMPRESSED = 14, 15
VARIABLES = 64  # a file holds at most


@dataclass(frozen=True)
class Variable:
    """One array of a file: `kind` is its class in NumPy's words, `values` None where these are no integers."""

    shape: tuple[int, ...]
    kind: str
    values: np.ndarray | None


def read_matlab(content: bytes, limit: int) -> dict[str, Variable]:
    """Return the arrays in the MATLAB 5 file `content` by name.

    Parameters
    ----------
    content : bytes
    limit : int
        Size of all arrays together, decompressed, in bytes.

    Raises
    ------
    ValueError, struct.error, zlib.error
        If it is no such file, is damaged, or holds more.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[HEADER - 2 : HEADER])
    if order is None or struct.unpack(f"{order}H", content[HEADER - 4 : HEADER - 2])[0] >> 8 != 1:
        raise ValueError("not in the format of MATLAB 5")
    rest, variables, count = memoryview(content)[HEADER:], {}, 0
    while rest:
        kind, data, rest = _element(rest, order, padded=False)
        if kind == COMPRESSED:
            inflated = _inflated(data, limit)
            limit -= len(inflated)
            kind, data, _ = _element(inflated, order)
        count += 1
        if kind != MATRIX or count > VARIABLES:
            raise ValueError("it holds something else than a few arrays")
        name, variable = _variable(data, order)
        variables[name] = variable
    return variables


def _inflated(data: memoryview, limit: int) -> memoryview:
    stream = zlib.decompressobj()
    content = stream.decompress(data, limit + 1)
    if not stream.eof or len(content) > limit:
        raise ValueError(f"an array in it is cut short, or has more than {limit} bytes")
    return memoryview(content)


def _element(content: memoryview, order: str, padded: bool = True) -> tuple[int, memoryview, memoryview]:
    """Return type and data of the element that `content` begins with, and what follows it."""
    kind, size = struct.unpack_from(f"{order}II", content)
    start = 8
    if kind >> 16:  # up to four bytes share the place of the size
        kind, size, start = kind & 0xFFFF, kind >> 16, 4
    end = start + size
    if end > (8 if start == 4 else len(content)):
        raise ValueError("an element of it ends too early")
    following = end + -end % 8 if padded or kind == MATRIX else end
    return kind, content[start:end], content[following:]


def _variable(content: memoryview, order: str) -> tuple[str, Variable]:
    _, flags, content = _element(content, order)
    _, dimensions, content = _element(content, order)
    _, name, content = _element(content, order)
    code = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
    shape = tuple(int(n) for n in np.frombuffer(dimensions, f"{order}i4"))
    label = bytes(name).decode("latin1")
    if code not in CLASSES:
        return label, Variable(shape, OTHER_CLASSES.get(code, f"class {code}"), None)
    stored, data, _ = _element(content, order)
    if stored not in INTEGERS:
        raise ValueError(f"array '{label}' stores its integers as type {stored}")
    values = np.frombuffer(data, f"{order}{INTEGERS[stored]}")
    if min(shape, default=0) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"array '{label}' holds {values.size} values, not those of its shape {shape}")
    return label, Variable(shape, CLASSES[code], values.reshape(shape, order="F"))
