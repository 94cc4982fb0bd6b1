"""Defects drawn at random: what may be changed in a module of the package, and which tests must notice.

Operators work on the syntax tree and change the text of one node, so that a mutant differs from the package in one
place. Annotations, strings, imports and what only words an error are left alone. `python tests/mutation.py --random N`
plants and judges them.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGE = Path(__file__).resolve().parent.parent / "cupyep"
FIRST = "test_random_networks"
SIGNALS = "test_signals test_heads test_losses"
KERNELS = "test_kernels test_layers test_winograd test_precision test_chunks test_micro_batch test_reduction"
TESTS = {  # what is concerned; the quick ones first, as the first failure ends a run
    "activations.py": "test_activations test_energy",
    "backend/threads.py": "test_threads",
    "data/own.py": "test_own_arrays test_own_files test_resident",
    "signals.py": f"{SIGNALS} test_custom test_rest_points",
    "phases.py": "test_residual test_rest_points test_schedules test_settling test_replay test_halves test_processes",
    "energy.py": "test_energy test_residual test_parts",
    "heads.py": f"{SIGNALS} test_replay test_plan test_cuda_head",
    "ops/cuda_conv.py": "test_cuda_kernels test_cuda_shim test_cuda_compile",
    "ops/head.py": f"{SIGNALS} test_cuda_head test_cuda_compile",
    "ops/launch.py": "test_cuda_kernels test_cuda_update test_cuda_head test_cuda_optimizer",
    "ops/linear.py": f"{KERNELS} test_cupy_host",
    "ops/optimizer.py": "test_optim test_cuda_optimizer test_cuda_compile",
    "ops/update.py": "test_rest_points test_schedules test_halves test_cuda_update test_cuda_compile",
    "ops/standardize.py": "test_weights",
    "ops/*.py": f"{KERNELS} test_plan test_cuda_kernels test_cupy_host",
    "layers.py": f"{KERNELS} test_replay test_stale_weights test_network",
    "graph.py": "test_residual test_network test_schedules test_random_graphs",
    "initialization.py": "test_initialization",
    "learning/backprop.py": "test_backprop test_parts test_halves test_micro_batch test_plan",
    "learning/bptt.py": "test_bptt test_parts test_halves test_micro_batch test_plan",
    "learning/check.py": "test_check test_custom",
    "learning/custom.py": "test_custom",
    "learning/equilibrium.py": "test_equilibrium test_micro_batch test_halves test_parts test_plan test_precision",
    "learning/operations.py": "test_benchmark test_experiments",
    "learning/learner.py": "test_learner test_micro_batch test_bptt test_signals test_plan test_halves test_parallel",
    "diagnostics/contraction.py": "test_pace",
    "diagnostics/pace.py": "test_pace",
    "diagnostics/probe.py": "test_probe test_diagnose",
    "losses.py": SIGNALS,
    "memory/*.py": "test_layout test_residual test_plan test_stale_weights test_replay test_memory test_network",
    "network.py": "test_network test_rest_points test_schedules test_replay test_learner test_processes",
    "optim.py": "test_optim test_cuda_optimizer test_training_build",
    "program.py": "test_schedules test_layout test_residual test_random_graphs",
    "settling.py": "test_settling test_schedules test_settle_cost test_replay test_halves test_micro_batch",
    "structure.py": "test_network test_processes test_network_file",
    "weights.py": "test_weights test_stale_weights",
    "training/divergence.py": "test_divergence",
    "training/sharing.py": "test_parallel",
    "training/schedules.py": "test_training test_divergence test_survival",
    "training/statistics.py": "test_training test_divergence test_survival",
}
WORDS = {"require", "choose", "warn"}  # their arguments but the first only word an error


def concerned(file: str) -> str:
    """Return the test files that concern a module, space separated; "" for one that is not numerical."""
    found = next((tests for pattern, tests in TESTS.items() if fnmatch(file, pattern)), "")
    return f"{FIRST} {found}" if found else ""


def modules() -> list[str]:
    """Return the numerical modules, as paths within the package."""
    files = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return [file for file in files if concerned(file)]


class Change(NamedTuple):
    """Text in place of a node."""

    operator: str
    node: ast.AST
    new: str


ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


def _copy(node: ast.AST, **fields: object) -> str:
    """Return the text of a node, some of its fields replaced."""
    return ast.unparse(type(node)(**(dict(ast.iter_fields(node)) | fields)))


def _arithmetic(node: ast.AST) -> Iterator[str]:
    """Swap + and -, * and /."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield _copy(node, op=ARITHMETIC[type(node.op)]())


def _comparison(node: ast.AST) -> Iterator[str]:
    """Swap < and <=, > and >=, == and !=, at one place of a chain."""
    for i, op in enumerate(node.ops if isinstance(node, ast.Compare) else []):
        if type(op) in COMPARISONS:
            yield _copy(node, ops=[*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]])


def _term(node: ast.AST) -> Iterator[str]:
    """Drop a term of a sum or a factor of a product."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield f"({ast.unparse(node.left)})"
        if isinstance(node.op, ast.Add | ast.Mult):
            yield f"({ast.unparse(node.right)})"


def _statement(node: ast.AST) -> Iterator[str]:
    """Drop a call whose value nobody takes, or an assignment to something that is there already."""
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    there = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript | ast.Attribute)
    if called or there or isinstance(node, ast.AugAssign):
        yield "pass"


def _number(node: ast.AST) -> Iterator[str]:
    """Multiply a number by 2; 0 becomes 1."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield repr(2 * node.value if node.value else type(node.value)(1))


def _condition(node: ast.AST) -> Iterator[str]:
    """Negate the condition of an if, a while or a conditional expression."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield f"(not ({ast.unparse(node.test)}))"


def _arguments(node: ast.AST) -> Iterator[str]:
    """Swap two neighbouring arguments."""
    args = node.args if isinstance(node, ast.Call) else []
    for i, (a, b) in enumerate(zip(args, args[1:])):  # noqa: B905
        if not {ast.Starred, ast.GeneratorExp} & {type(a), type(b)} and ast.dump(a) != ast.dump(b):
            yield _copy(node, args=[*args[:i], b, a, *args[i + 2 :]])


def _truth(node: ast.AST) -> Iterator[str]:
    """Swap True and False."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield repr(not node.value)


def _bound(node: ast.AST) -> Iterator[str]:
    """Move a bound of a slice or a range by one."""
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            if bound := getattr(node, name):
                yield _copy(node, **{name: ast.parse(f"({ast.unparse(bound)}) + 1", mode="eval").body})
                yield _copy(node, **{name: ast.parse(f"({ast.unparse(bound)}) - 1", mode="eval").body})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("range", "slice"):
        for i, arg in enumerate(node.args):
            for step in ("+ 1", "- 1"):
                moved = ast.parse(f"({ast.unparse(arg)}) {step}", mode="eval").body
                yield _copy(node, args=[*node.args[:i], moved, *node.args[i + 1 :]])


OPERATORS = {
    "arithmetic": _arithmetic,
    "comparison": _comparison,
    "term": _term,
    "statement": _statement,
    "number": _number,
    "condition": _condition,
    "arguments": _arguments,
    "truth": _truth,
    "bound": _bound,
}


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those below it that compute something."""
    skipped = ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom
    if isinstance(node, skipped) or (isinstance(node, ast.FunctionDef) and node.name == "__repr__"):
        return
    yield node
    name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
    if name in WORDS:
        yield from _code(node.args[0])
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _code(child)


def changes(source: str) -> list[Change]:
    """Return all changes that the operators can make to a module."""
    found = []
    for node in _code(ast.parse(source)):
        for name, operator in OPERATORS.items():
            place = node.test if name == "condition" and hasattr(node, "test") else node
            found += [Change(name, place, new) for new in operator(node)]
    return found


def apply(source: str, change: Change) -> str:
    """Return a module's text with one change; positions are counted in bytes of a line."""
    lines, node = source.encode().splitlines(keepends=True), change.node
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text = source.encode()
    return (text[:start] + change.new.encode() + text[end:]).decode()


class Mutant(NamedTuple):
    """A module with one change."""

    file: str
    operator: str
    source: str
    tests: str

    @property
    def diff(self) -> str:
        old = (PACKAGE / self.file).read_text().splitlines()
        lines = difflib.unified_diff(old, self.source.splitlines(), self.file, self.file, n=1, lineterm="")
        return "\n".join(list(lines)[2:])


def draw(count: int, seed: int, module: str = "") -> list[Mutant]:
    """Return so many different mutants of the numerical modules whose path contains `module`.

    An operator is drawn first and then its place, or numbers would be most of it.
    """
    rng, places = np.random.default_rng(seed), {}
    for file in modules():
        if module in file:
            for change in changes((PACKAGE / file).read_text()):
                places.setdefault(change.operator, []).append((file, change))
    drawn = []
    while places and len(drawn) < count:
        operator = str(rng.choice(sorted(places)))
        file, change = places[operator].pop(int(rng.integers(len(places[operator]))))
        if not places[operator]:
            del places[operator]
        drawn.append(Mutant(file, operator, apply((PACKAGE / file).read_text(), change), concerned(file)))
    return drawn
