"""A reader for the pickled CIFAR batches, and for nothing else.

Python's own unpickler calls what a file names. Kept from that, it can still be made to crash (a million tuples in each
other as a key), to compute for ever (a key of tuples that hold each other twice) or to fill the memory (a memo of 2^32
places). This reader is the part of its stack machine that these files need: numbers, text, lists, dictionaries and
tuples, and uint8 arrays, rebuilt here. It calls nothing, and it makes nothing larger than the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.errors import DataError, one_line

# The opcodes of protocols 2 to 5 that these files need, by the byte that stands for them.
NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
TEXTS = {b"U": ("<B", "latin1"), b"X": ("<I", "utf-8"), b"\x8c": ("<B", "utf-8"), b"\x8d": ("<Q", "utf-8")}
LONG = b"\x8a"
BYTES = {b"T": "<I", b"B": "<I", b"C": "<B", b"\x8e": "<Q"}  # T: the pixels, as Python 2 wrote them
CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
EMPTY: dict[bytes, Callable[[], Any]] = {b"]": list, b"}": dict, b")": tuple}
TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
PUT, GET = {b"q": "<B", b"r": "<I"}, {b"h": "<B", b"j": "<I"}
MEMOIZE, MARK, STOP, GLOBAL, STACK_GLOBAL, REDUCE, BUILD = b"\x94", b"(", b".", b"c", b"\x93", b"R", b"b"
APPEND, APPENDS, SETITEM, SETITEMS, LIST, TUPLE, DICT = b"a", b"e", b"s", b"u", b"l", b"t", b"d"
FUNCTIONS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)
SKIPPED = {b"\x80": 1, b"\x95": 8}  # the protocol's number; the length of a frame
STEPS = 1_000_000  # twice what the largest of the files takes


class Array:
    """Stands for ``numpy.ndarray``; `array` is the uint8 array once its state was given."""

    array: np.ndarray | None = None


class _Dtype:
    """Stands for ``numpy.dtype`` uint8, the only one."""


@dataclass(frozen=True)
class _Function:
    name: str


def load_pickle(content: bytes | memoryview, where: str) -> Any:
    """Return what the pickle of a CIFAR batch holds; text is `str`, arrays are `Array`.

    Raises
    ------
    DataError
        If it is damaged or holds anything else; the message begins with `where`.
    """
    try:
        return _Machine(memoryview(content)).run()
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"{where}: is not a readable CIFAR pickle ({one_line(error)}); get the original file"
        ) from error


class _Machine:
    def __init__(self, content: memoryview):
        self.content = content
        self.place = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = len(content)  # bytes that may still be encoded: one text could be, again and again

    def run(self) -> Any:
        for _ in range(STEPS):
            code = bytes(self._read(1))
            if code == STOP:
                return self.stack[-1]
            if code in NUMBERS:
                self.stack.append(self._number(NUMBERS[code]))
            elif code in TEXTS:
                size, encoding = TEXTS[code]
                self.stack.append(str(self._read(self._number(size)), encoding))
            elif code in BYTES:
                self.stack.append(self._read(self._number(BYTES[code])))
            elif code == LONG:
                self.stack.append(int.from_bytes(self._read(self._number("<B")), "little", signed=True))
            elif code in CONSTANTS:
                self.stack.append(CONSTANTS[code])
            elif code in EMPTY:
                self.stack.append(EMPTY[code]())
            elif code in TUPLES:
                self.stack.append(tuple(self._take(len(self.stack) - TUPLES[code])))
            elif code in PUT or code == MEMOIZE:
                self.memo[len(self.memo) if code == MEMOIZE else self._number(PUT[code])] = self.stack[-1]
            elif code in GET:
                self.stack.append(self.memo[self._number(GET[code])])
            elif code in SKIPPED:
                self._read(SKIPPED[code])
            else:
                self._combine(code)
        raise ValueError(f"it takes more than {STEPS} steps")

    def _read(self, size: int) -> memoryview:
        self.place += size
        if self.place > len(self.content):
            raise ValueError("it ends too early")
        return self.content[self.place - size : self.place]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def _combine(self, code: bytes) -> None:
        """Do what takes something from the stack."""
        stack = self.stack
        if code == MARK:
            self.marks.append(len(stack))
        elif code in (APPEND, APPENDS):
            items = self._take(self.marks.pop() if code == APPENDS else len(stack) - 1)
            _checked(stack[-1], list).extend(items)
        elif code in (SETITEM, SETITEMS):
            items = self._take(self.marks.pop() if code == SETITEMS else len(stack) - 2)
            _checked(stack[-1], dict).update(_pairs(items))
        elif code in (LIST, TUPLE, DICT):
            items = self._take(self.marks.pop())
            stack.append({LIST: list, TUPLE: tuple, DICT: _pairs}[code](items))
        elif code == GLOBAL:
            stack.append(self._function(self._line(), self._line()))
        elif code == STACK_GLOBAL:
            stack.append(self._function(*(_checked(part, str) for part in self._take(len(stack) - 2))))
        elif code == REDUCE:
            function, arguments = self._take(len(stack) - 2)
            stack.append(self._call(_checked(function, _Function).name, *_checked(arguments, tuple)))
        elif code == BUILD:
            item, state = self._take(len(stack) - 2)
            self._build(item, state)
            stack.append(item)
        else:
            raise ValueError(f"it holds the opcode {code!r}, which no CIFAR file needs")

    def _line(self) -> str:
        line = bytes(self.content[self.place : self.place + 100]).partition(b"\n")[0]
        self._read(len(line) + 1)
        return line.decode()

    def _take(self, start: int) -> list[Any]:
        """Remove and return what lies on the stack from `start` on."""
        if start < 0:
            raise ValueError("it takes more from its stack than is there")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _function(self, module: str, name: str) -> _Function:
        if f"{module}.{name}" not in FUNCTIONS:
            raise ValueError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return _Function(name)

    def _call(self, name: str, *arguments: Any) -> Any:
        if name == "encode":
            return self._encode(*arguments)
        if name == "dtype":
            if arguments[0] not in ("u1", b"u1"):
                raise ValueError("array is not of dtype uint8")
            return _Dtype()
        return Array()

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"text in encoding '{_checked(encoding, str)}', expected latin1")
        self.budget -= len(_checked(text, str))
        if self.budget < 0:
            raise ValueError("it encodes the same text more than once")
        return text.encode("latin1")

    def _build(self, item: Any, state: Any) -> None:
        if isinstance(item, _Dtype):
            return  # byte order and alignment mean nothing for one-byte items
        _, shape, dtype, fortran, raw = _checked(state, tuple)
        if not isinstance(item, Array) or not isinstance(dtype, _Dtype):
            raise ValueError("array is not plain uint8")
        raw = self._encode(raw, "latin1") if isinstance(raw, str) else _checked(raw, bytes, memoryview)
        if not all(type(length) is int and 0 <= length <= len(raw) for length in _checked(shape, tuple)):
            raise ValueError("its array has an odd shape")
        item.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran is True else "C")


def _checked(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"it has a {type(value).__name__} in the place of a {kinds[0].__name__}")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Return keys and values that follow one another as a dictionary; other keys could be hashed for ever."""
    if not all(type(key) in (str, bytes, int) for key in items[::2]) or len(items) % 2:
        raise ValueError("a dictionary in it has an odd key")
    return dict(zip(items[::2], items[1::2], strict=True))
