"""Counts what a training multiplies."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cupyep.network import Network


class Counter:
    """Counts the operations of all products of a network's edges: those that are launched, and those in CUDA graphs."""

    PRODUCTS = ("drive", "linear_drive", "topdown", "add_gradient")

    def __init__(self, network: Network):
        self.operations = 0
        if network.device.graphs is not None:
            network.device.graphs.capture = self._capturing(network.device.graphs.capture)
        for edge in network.layers:
            for name in self.PRODUCTS:
                setattr(edge, name, self._counted(getattr(edge, name), edge.flops()))

    def _counted(self, product: Callable[..., None], operations: int) -> Callable[..., None]:
        def counted(s: Any, *arguments: Any, **more: Any) -> None:
            after = self.operations + operations * len(s)
            product(s, *arguments, **more)
            self.operations = after  # once, though a dense edge's drive calls its linear drive

        return counted

    def _capturing(self, capture: Callable[..., Any]) -> Callable[..., Any]:
        """Return `capture` for graphs that count, at every launch, what they hold: nobody calls an edge then."""

        def captured(work: Callable[[], None]) -> Any:
            before = self.operations
            graph = capture(work)
            held, self.operations = self.operations - before, before  # recorded, not done

            def launch() -> None:
                self.operations += held
                graph.launch()

            return None if graph is None else SimpleNamespace(launch=launch)

        return captured
