"""A stand-in for a GPU without one: arrays that refuse to be mixed with NumPy's, on a device of their own.

A `DeviceArray` wraps a NumPy array and shows it to nobody. It computes through its operators, its methods and the
functions of its namespace `XP`; a NumPy function applied to one, an operation of one with a host array, or (within
`no_host_reads`) an implicit read by the host, as in ``if a:``, ``float(a)``, ``a.item()``, raises, where CuPy would
raise too or silently wait for the GPU. The crossings are those of a device: ``asarray`` and ``to_numpy``. Scalars of
Python and NumPy mix freely, as they do with CuPy.

While a `Tape` records, as a stream does that is being captured, operations are noted down and not done.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np

from cupyep import Device


class MixedDevices(TypeError):
    """Host and device arrays met outside of a crossing."""


_host_reads_allowed = [True]


@contextlib.contextmanager
def no_host_reads():
    """Within it, every implicit read of a device array by the host raises."""
    _host_reads_allowed[0] = False
    try:
        yield
    finally:
        _host_reads_allowed[0] = True


class RefusedWhileRecording(RuntimeError):
    """What a captured stream cannot do, or what a replay would not repeat."""


class Tape:
    """Operations on the memory of arrays, to be done later, as often as one likes.

    Attributes
    ----------
    touched : list of ndarray
        Every operand that an operation reads or writes, as a view of its memory.
    """

    current = None  # the one that records

    def __init__(self):
        self.operations, self.touched = [], []

    def __enter__(self):
        assert Tape.current is None
        Tape.current = self

    def __exit__(self, *error):
        Tape.current = None

    def play(self):
        for operation in self.operations:
            operation()


def do(operation, *operands):
    """Do what a device does: now, or where a tape records, later."""
    if Tape.current is None:
        operation()
        return
    Tape.current.operations.append(operation)
    Tape.current.touched += [array for array in operands if isinstance(array, np.ndarray)]


VIEWS = {"reshape", "transpose", "ravel", "view", "as_strided"}


def _recorded(function, args, kwargs):
    """Note a call down; views are made at once, as they are no work of the device's. A new array has no memory yet."""
    name = getattr(function, "__name__", str(function))
    if name in VIEWS:
        result = function(*args, **kwargs)
        if result.size and not np.may_share_memory(result, args[0]):
            raise RefusedWhileRecording(f"'{name}' would allocate a copy while a graph is captured")
        return result
    if kwargs.get("out") is None and name != "copyto":
        raise RefusedWhileRecording(f"'{name}' would allocate its result while a graph is captured")
    do(lambda: function(*args, **kwargs), *args, *kwargs.values())
    return kwargs.get("out")


def _unwrap(value):
    """Return the NumPy arrays in device arrays, inside containers too; a host array among them raises."""
    if isinstance(value, DeviceArray):
        return value._host
    if isinstance(value, (list, tuple)):
        return type(value)([_unwrap(v) for v in value])
    if isinstance(value, dict):
        return {name: _unwrap(v) for name, v in value.items()}
    if isinstance(value, np.ndarray):
        raise MixedDevices(f"a host array of shape {value.shape} meets a device array")
    return value


def _wrap(value):
    """Return NumPy's arrays and scalars as device arrays: CuPy's reductions return arrays of no dimension."""
    return DeviceArray(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def _call(function, *args, **kwargs):
    given = _unwrap(args), _unwrap(kwargs)
    result = function(*given[0], **given[1]) if Tape.current is None else _recorded(function, *given)
    return _wrap(result) if kwargs.get("out") is None else kwargs["out"]


class _Namespace:
    """The functions of NumPy that may be used on device arrays: CuPy has all of them."""

    # fmt: off
    FUNCTIONS = {
        "abs", "absolute", "add", "arange", "arctanh", "argmax", "argsort", "as_strided", "ascontiguousarray",
        "bitwise_and", "concatenate", "copysign", "copyto", "divide", "dot", "empty", "empty_like", "equal", "exp",
        "expm1", "full", "greater", "greater_equal", "isfinite", "isnan", "less", "log", "log1p", "matmul", "max",
        "maximum", "mean", "min", "minimum", "multiply", "ones", "ones_like", "right_shift", "sign", "sqrt", "stack",
        "subtract", "sum", "take", "tanh", "where", "zeros", "zeros_like",
    }
    # fmt: on

    def __init__(self, module):
        self._module = module
        self.__name__ = "strict"

    def __getattr__(self, name):
        if name in ("lib", "stride_tricks"):
            return _Namespace(getattr(self._module, name))
        if name not in self.FUNCTIONS:
            raise AttributeError(f"no function '{name}' on the device: use what CuPy has too, and add it to the list")
        function = getattr(self._module, name)
        return lambda *args, **kwargs: _call(function, *args, **kwargs)

    def asarray(self, array, dtype=None, order=None):
        """The crossing from the host; unless told otherwise CuPy keeps the order of what is Fortran-contiguous."""
        _refuse_while_recording("a transfer")
        host = np.asarray(array._host if isinstance(array, DeviceArray) else array)
        order = order or ("F" if host.flags.f_contiguous else "C")
        return DeviceArray(np.array(host, dtype=dtype, order=order))

    def asnumpy(self, array):
        """The crossing to the host."""
        _refuse_while_recording("a transfer")
        return np.array(array._host if isinstance(array, DeviceArray) else array)


def _refuse_while_recording(what):
    if Tape.current is not None:
        raise RefusedWhileRecording(f"{what} while a graph is captured")


XP = _Namespace(np)


class DeviceArray:
    """See the module."""

    array_module = XP

    def __init__(self, host):
        self._host = host

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method == "__call__" and any(isinstance(value, np.generic) for value in inputs):
            return _call(ufunc, *inputs, **kwargs)  # a NumPy scalar on the left of an operator
        raise MixedDevices(f"numpy.{ufunc.__name__} applied to a device array")

    def __array_function__(self, function, types, args, kwargs):
        raise MixedDevices(f"numpy.{function.__name__} applied to a device array")

    def __array__(self, *args, **kwargs):
        raise MixedDevices("implicit conversion of a device array to the host")

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __len__(self):
        return len(self._host)

    def __getitem__(self, key):
        result = self._host[_unwrap(key)]
        if Tape.current is not None and np.size(result) and not np.may_share_memory(result, self._host):
            _refuse_while_recording("indexing that copies")
        return _wrap(result)

    def __setitem__(self, key, value):
        key, value = _unwrap(key), _unwrap(value)
        do(lambda: self._host.__setitem__(key, value), self._host, value)

    @property
    def data(self):
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def flags(self):
        return self._host.flags

    @property
    def device(self):
        return SimpleNamespace(id=0)


def _attribute(name):
    return property(lambda self: _wrap(getattr(self._host, name)))


def _method(name):
    return lambda self, *args, **kwargs: _call(getattr(np.ndarray, name), self, *args, **kwargs)


def _in_place(name):
    def method(self, other):
        other = _unwrap(other)
        do(lambda: getattr(self._host, name)(other), self._host, other)
        return self

    return method


def _read(name):
    def method(self, *args):
        if not _host_reads_allowed[0]:
            raise MixedDevices("the host reads a device array where it must not wait for the device")
        _refuse_while_recording("the host reads a device array")
        return getattr(self._host, name)(*args)

    return method


for _name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "T"):
    setattr(DeviceArray, _name, _attribute(_name))
METHODS = "sum mean std var max min argmax all any astype copy reshape transpose ravel view clip"
for _name in METHODS.split():
    setattr(DeviceArray, _name, _method(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul", "mod", "and", "or"):
    setattr(DeviceArray, f"__{_name}__", _method(f"__{_name}__"))
    setattr(DeviceArray, f"__r{_name}__", _method(f"__r{_name}__"))
    setattr(DeviceArray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ("__neg__", "__abs__", "__invert__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
    setattr(DeviceArray, _name, _method(_name))
for _name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist"):
    setattr(DeviceArray, _name, _read(_name))


class StrictDevice(Device):
    """A device on which only `DeviceArray` lives."""

    def __init__(self):
        super().__init__("cpu")  # not a GPU: kernels written in CUDA would be chosen for one
        self.name, self.xp = "strict", XP

    def to_numpy(self, array):
        return XP.asnumpy(array)

    def synchronize(self):
        """Nothing runs behind the host's back here."""
