"""Work that repeats is captured as a CUDA graph and replayed: one launch instead of dozens.

A graph holds addresses, not arrays: replaying it does the same operations on the same memory. So a piece of work comes
with a key that names everything it depends on, and only work of an equal key is replayed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from cupyep.errors import GraphWarning, require

VARIABLE = "CUPYEP_GRAPHS"


def graphs_wanted() -> bool:
    """Return whether the environment allows graphs: ``CUPYEP_GRAPHS=0`` switches them off."""
    value = os.environ.get(VARIABLE, "1")
    require(value in ("0", "1"), f"{VARIABLE} must be 0 (plain launches) or 1 (graphs where possible), not '{value}'")
    return value == "1"


class GraphCapture:
    """Captures work on one device, unless a capture has `failed`: none is tried from then on.

    Capturing takes a stream that is neither the default one nor waits for it. What CuPy allocates on the way (the
    temporaries of a reduction, say) comes from a memory pool of its own, kept as long as this object: nothing else may
    get that memory, because every replay writes to it.
    """

    def __init__(self, xp: Any, index: int):
        self._cuda = xp.cuda
        self._index = index
        self._stream: Any = None
        self.failed = False

    def capture(self, work: Callable[[], None]) -> Any:
        """Return the graph of `work`, which is recorded and not done; None where that fails.

        `work` must have been done before: compiling kernels and making handles is no work for a graph.

        Warns
        -----
        GraphWarning
            If it fails; with the reason.
        """
        if self.failed:
            return None
        try:
            return self._capture(work)
        except Exception as error:  # whatever it is: plain launches do the same, and raise what is wrong with them too
            self.failed = True
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            warnings.warn(
                f"CUDA graphs are off, kernels are launched one by one: {type(error).__name__}: {reason} "
                f"({VARIABLE}=0 switches graphs off without this warning)",
                GraphWarning,
                stacklevel=2,
            )
            return None

    def _capture(self, work: Callable[[], None]) -> Any:
        cuda = self._cuda
        with cuda.Device(self._index):
            if self._stream is None:
                self._stream = cuda.Stream(non_blocking=True)
                self._pool = cuda.MemoryPool()
            with cuda.using_allocator(self._pool.malloc), self._stream as stream:
                stream.begin_capture(cuda.runtime.streamCaptureModeRelaxed)
                try:
                    work()
                except BaseException:
                    with contextlib.suppress(Exception):  # a broken capture says so once more when it is ended
                        stream.end_capture()
                    raise
                return stream.end_capture()


class Replays:
    """Pieces of work by name: each is done plainly the first time, captured the second, and replayed from then on.

    Without a `capture` everything is done plainly.
    """

    def __init__(self, capture: GraphCapture | None):
        self._capture = capture
        self.graphs: dict[Hashable, Any] = {}  # None for what was done once

    def run(self, name: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, a function without result, or what it did before under this name."""
        if self._capture is None or self._capture.failed:
            work()
            return
        if name not in self.graphs:
            work()
            self.graphs[name] = None
            return
        graph = self.graphs[name]
        if graph is None:
            graph = self.graphs[name] = self._capture.capture(work)
        if graph is None:
            work()
        else:
            graph.launch()


class Replayer:
    """The replays of one workspace, apart for everything that they depend on."""

    KEPT = 32  # keys remembered, the least recently used goes first

    def __init__(self, capture: GraphCapture | None):
        self._capture = capture
        self._replays: OrderedDict[Hashable, Replays] = OrderedDict()

    def of(self, key: Hashable) -> Replays:
        """Return the replays of work that depends on `key`.

        It names all that the work depends on besides the content of arrays: sizes, settings, and the addresses of all
        arrays that do not live as long as this object. None: nothing is captured.
        """
        if key is None or self._capture is None:
            return Replays(None)
        if key not in self._replays:
            self._replays[key] = Replays(self._capture)
            if len(self._replays) > self.KEPT:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        return self._replays[key]

    def graphs(self) -> list[Any]:
        """Return the graphs that are held."""
        return [graph for replays in self._replays.values() for graph in replays.graphs.values() if graph is not None]
