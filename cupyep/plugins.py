"""Code of the user's own, imported because its name was given, and for no other reason; and what it registers.

A plugin is a Python module that calls `register_architecture`, `register_activation` or `register_signal` when it is
imported. Its names are names like others then. A run keeps the plugin's name as a text: whoever opens the run must give
it again (``--plugin``), for a folder may come from anybody, and must not name what is run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cupyep import activations, models
from cupyep.activations import ACTIVATIONS, Activation
from cupyep.errors import ConfigurationError, foreign_code, instance, items, number, one_line, require, shown
from cupyep.files import expanded
from cupyep.models import TABLE, Architecture, architecture
from cupyep.signals import Augmenter

BUILT_IN = ("none", "le", "kd")
#: Values of the option ``aug``: makers of the signals, None of the package's own.
SIGNALS: dict[str, Callable[..., Augmenter] | None] = dict.fromkeys(BUILT_IN)


def register_architecture(
    name: str, layers: str | Callable[[tuple[int, ...], float, str], Sequence[Any]], **defaults: Any
) -> None:
    """Let an architecture be known by `name`, to `build` and to ``--arch``.

    Parameters
    ----------
    name : str
        Letters, digits, ``-`` and ``_``, a letter first. One that was registered before is replaced.
    layers : str or callable
        Layers as a text (`cupyep.models`); or a function of `input_shape` (H, W, C), `width` and `pooling` that returns
        what `Network` takes: Edges, Connections in any order, or a Graph, without the readout.
    **defaults
        ``activation``, ``weights``, ``readout_pool``, ``gains``: see `cupyep.models.Architecture`.

    Raises
    ------
    ConfigurationError
        If the name is one of the package's own, or no name, or the layers are no layers.
    """
    _check_name(name, models.ARCHITECTURES)
    require(isinstance(layers, str) or callable(layers), f"layers must be a text or a function, not {shown(layers)}")
    if isinstance(layers, str):
        layers = architecture(layers).layers
    else:
        layers = _reported(f"architecture {name}", layers)
    known = ("activation", "weights", "readout_pool", "gains")
    wrong = next((key for key in defaults if key not in known), None)
    require(wrong is None, f"an architecture has the defaults {', '.join(known)}, not '{wrong}'")
    gains = [number("gains", gain, above=0) for gain in items("gains", defaults.get("gains", (1, 1)))]
    require(len(gains) == 2, f"gains are two, of strong and of weak feedback, not {len(gains)}")
    TABLE[name] = Architecture(layers, **defaults)


def register_activation(activation: Activation) -> None:
    """Let an activation be known by its `name`, to networks and to ``--activation``; see `register_architecture`."""
    _check_name(instance("activation", activation, Activation).name, activations.BUILT_IN)
    ACTIVATIONS[activation.name] = activation


def register_signal(name: str, maker: Callable[..., Augmenter]) -> None:
    """Let a signal be known by `name`, to ``--aug``.

    Parameters
    ----------
    name : str
        See `register_architecture`.
    maker : callable
        Takes `layers`, `kappa` and `annealing` by name, as a class of `Augmenter` does, and returns an Augmenter.
    """
    _check_name(name, BUILT_IN)
    require(callable(maker), f"maker must be a function or a class, not {shown(maker)}")
    SIGNALS[name] = _reported(f"signal {name}", maker)


def _reported(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call` with its exceptions in one line that begins with `what`."""

    @functools.wraps(call, updated=())
    def reported(*args: Any, **options: Any) -> Any:
        with foreign_code(what):
            return call(*args, **options)

    return reported


def _check_name(name: str, taken: Sequence[str]) -> None:
    right = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,39}", name)
    require(bool(right), f"a name is up to 40 letters, digits, - and _, a letter first, not {shown(name)}")
    require(name not in taken, f"'{name}' is a name of the package's own; choose another")


def load_plugin(text: str) -> None:
    """Import the plugin ``package.module`` or ``folder/file.py``, once in a process.

    Call it for what a person gave, never for what a file says: it runs the code.

    `ConfigurationError` if there is no such module or file; `CupyepError` if its code raises anything.
    """
    what = f"--plugin {text}"
    with working_folder(), foreign_code(what):
        if not text.endswith(".py"):
            require(is_module_name(text), f"{what}: neither a module (package.module) nor a file that ends in .py")
            imported(text, what)
            return
        path = expanded(text).resolve()
        require(path.is_file(), f"{what}: there is no such file")
        # Under a name that no module has; one that is imported twice registers the same names twice.
        name = f"cupyep_plugin_{path.stem}"
        if getattr(sys.modules.get(name), "__file__", None) == str(path):
            return
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # the name ends in .py
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise


@contextlib.contextmanager
def working_folder() -> Iterator[None]:
    """Let modules be found in the folder where the command was started."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def imported(name: str, what: str, attribute: str | None = None) -> Any:
    """Return the module ``package.module``, or an attribute of it; a message calls it `what`.

    `ConfigurationError` if there is no such module or attribute.
    """
    try:
        module = importlib.import_module(name)
        return module if attribute is None else getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        text = f"{what}: {one_line(error)}; run from the folder that holds {name.split('.')[0]}"
        raise ConfigurationError(text) from error


def is_module_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
