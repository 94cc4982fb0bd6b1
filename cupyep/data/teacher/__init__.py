"""The teacher file, version 1: logits of a teacher network for every sample and view of a data set, in HDF5.

Root attributes: ``format`` "cupyep-teacher", ``version`` 1, ``dataset``, ``classes`` (names), ``teacher`` (free text),
``views`` (of "identity", "hflip"). Groups ``train`` and ``test``, each with ``logits`` (V, N, C) float32 or float16,
raw (no temperature); ``labels`` (N,), the data set's own, so that a misaligned file is found out; the attribute
``accuracy`` (of the identity view, 0 to 1); optionally ``features/<layer>`` (V, N, H, W, C). Row n is sample n of the
data set in its canonical order. N may be smaller than the data set when the file was made from its first samples.
Chunks and compression are free; nothing may lie in another file or behind a link. What cupyep writes begins with a
checksum (`cupyep.persistence.hdf5`), which files from elsewhere need not have.
"""

from cupyep.data.teacher.reader import TeacherFile
from cupyep.data.teacher.writer import TeacherWriter

__all__ = ["TeacherFile", "TeacherWriter"]
