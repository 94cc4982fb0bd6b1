"""Changes to HDF5 files that no damage to their bytes would make: other types, shapes, links, names."""

from __future__ import annotations

import contextlib

import h5py
import numpy as np
from fuzzing import in_child
from hypothesis import strategies as st

from cupyep.persistence import hdf5

TEXTS = ["", "x" * 2000, "two\nlines \x1b[31m", "[" * 100000, "null", "[]", "1e999", '{"a": NaN}', "{}", '{"data": {}}']
NUMBERS = [0, -1, 3, 1 << 62, np.uint64((1 << 64) - 1), np.nan, np.inf, -np.inf, 0.5, np.float16(2), True, 1j]
ARRAYS = [np.zeros(shape, kind) for shape in ((0,), (1,), (2, 2), (70000,)) for kind in ("f4", "i8", "u1", "S3")]
KINDS = ["f4", "f8", "f2", ">f4", "i1", "u8", "S5", "c8", "b1", [("a", int)], h5py.string_dtype(), h5py.ref_dtype]
SHAPES = [(), (0,), (1,), (2, 2), (2, 23, 3), (1 << 60,), (1 << 30, 1 << 30), (2, 1 << 40, 3), (1, 2, 3, 4, 5, 6)]
LAYOUTS = [{}, {"chunks": True}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}]
ERRORS = (KeyError, ValueError, TypeError, OSError, RuntimeError, AttributeError, OverflowError)
LINKS = ["loop", "itself", "soft", "type", "virtual", "storage", "file", "pipe"]
NAMES = [b"two\nlines", b"\x1b[31m", b"x" * 300, "ü".encode(), b"\xff\xfe"]


def places(path):
    """Return the names of all groups and arrays of a file, and (place, name) of all attributes."""
    names = []
    with h5py.File(path) as file:
        file.visit(names.append)
        attributes = [(place, name) for place in ["/", *names] for name in file[place].attrs]
    return names, attributes


def hdf5_edits(path, elsewhere):
    """Lists of changes, for `apply_edits`, to a file like the one at `path`; links lead into the folder `elsewhere`."""
    names, attributes = places(path)
    place, both = st.sampled_from(names), st.sampled_from(attributes)
    value = st.sampled_from(TEXTS) | st.sampled_from(NUMBERS) | st.sampled_from(ARRAYS) | st.just(h5py.Empty("f"))
    filled = st.booleans()
    set_ = st.tuples(st.just(set_attribute), both, value)
    array = st.tuples(
        *(st.just(new_array), place, st.sampled_from(KINDS), st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), filled)
    )
    edit = st.one_of(
        set_,
        set_,
        array,
        array,
        st.tuples(st.just(drop_attribute), both),
        st.tuples(st.just(drop), place),
        st.tuples(st.just(other_kind), place, st.sampled_from(["f2", "f4", "f8", "i4", "u8"])),
        st.tuples(st.just(one_value), place, st.sampled_from([np.nan, np.inf, -1, 1 << 62])),
        st.tuples(st.just(exchange), place, place),
        st.tuples(st.just(link), place, st.sampled_from(LINKS), st.just(elsewhere)),
        st.tuples(st.just(rename), place, st.sampled_from(NAMES)),
    )
    return st.lists(edit, min_size=1, max_size=3)


def apply_edits(path, edits, sealed=True):
    """Change the file at `path`; afterwards its seal holds again, or it has none."""
    content = path.read_bytes()
    # In a child process: writing odd things, too, can crash the HDF5 library.
    if in_child(lambda: _edit(path, edits)) != "ok":
        path.write_bytes(content)
    if sealed:
        hdf5.seal(path)
    else:
        content = path.read_bytes()
        path.write_bytes(bytes(hdf5.SEAL_BYTES) + content[hdf5.SEAL_BYTES :])


def _edit(path, edits):
    with h5py.File(path, "r+", libver="latest") as file, np.errstate(all="ignore"):
        for change, *arguments in edits:
            # What HDF5 will not do, or what an earlier change made impossible, is left out.
            with contextlib.suppress(*ERRORS):
                change(file, *arguments)


def drop_attribute(file, both):
    del file[both[0]].attrs[both[1]]


def set_attribute(file, both, value):
    file[both[0]].attrs[both[1]] = value


def drop(file, place):
    del file[place]


def new_array(file, place, kind, shape, layout, filled):
    del file[place]
    array = file.create_dataset(place, shape, kind, **(layout if shape else {}))
    if filled and array.size < 1000 and array.dtype.kind in "fiu":
        array[...] = np.ones(shape)


def other_kind(file, place, kind):
    values = file[place][...]
    del file[place]
    file[place] = values.astype(kind)


def one_value(file, place, value):
    file[place][(0,) * file[place].ndim] = value


def exchange(file, one, other):
    file.move(one, "exchanged")
    file.move(other, one)
    file.move("exchanged", other)


def rename(file, place, name):
    file.move(place, b"/".join([*place.encode().split(b"/")[:-1], name]))


def link(file, place, kind, elsewhere):
    parent, shape = file[place].parent, getattr(file[place], "shape", (3,))
    del file[place]
    if kind == "virtual":
        virtual = h5py.VirtualLayout(shape, "f4")
        virtual[...] = h5py.VirtualSource(str(elsewhere / "other.h5"), place, shape)
        file.create_virtual_dataset(place, virtual)
    elif kind == "storage":
        file.create_dataset(place, (4,), "u1", external=[(str(elsewhere / "other.h5"), 0, 4)])
    else:
        file[place] = {
            "loop": h5py.SoftLink(f"/{place}"),
            "itself": parent,
            "soft": h5py.SoftLink("/"),
            "type": np.dtype("f4"),
            "file": h5py.ExternalLink(str(elsewhere / "other.h5"), place),
            "pipe": h5py.ExternalLink(str(elsewhere / "pipe"), place),
        }[kind]
