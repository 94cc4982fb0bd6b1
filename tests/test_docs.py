"""Every code block of README.md and docs/ is true: Python runs, commands are understood, and run where a test can."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import click
import numpy as np
import pytest
from documents import PAGES, ROOT, blocks, run_python

import cupyep as ep
from cupyep.cli import main
from cupyep.cli.shared import chosen_config
from cupyep.training.config import OPTIONS

LANGUAGES = {"python", "sh", "text", "toml", "json", "mermaid"}
PROGRAMS = {"cupyep", "python", "pip", "python3", "mpirun", "eval", ".ci/run"}
PROGRAMS |= {"CUPYEP_REQUIRE_GPU=1", "CUPYEP_REQUIRE_NVRTC=1"}
IDS = [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_blocks_say_what_they_are(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}: a block without a language: {block.text[:60]!r}"
    assert page.read_text(encoding="utf-8").count("\n```") % 2 == 0


@pytest.mark.parametrize("page", PAGES[1:], ids=IDS[1:])  # README.md has its own test
def test_python_blocks_run(page, tmp_path, monkeypatch):
    if not blocks(page, "python"):
        pytest.skip("no Python on this page")
    if any(block.needs for block in blocks(page, "python")):
        pytest.skip("a test of its own has what this page needs")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    run_python(page)


def parsed(command, words, name):
    """Return the context of a click command line, subcommand included; fails as the command would."""
    context = command.make_context(name, list(words))
    if isinstance(command, click.Group) and words:
        sub_name, sub, rest = command.resolve_command(context, list(words))
        return parsed(sub, rest, sub_name)
    return context


def understood(words):
    """Fail unless the options and names of a command line are known, and its configuration is a valid one."""
    if words[:2] == ["mpirun", "-n"]:
        words = words[3:]
    if words[:2] == ["python", "-c"]:
        compile(words[2], "python -c", "exec")
        return
    if words[:2] == ["python", "-m"] or words[0] not in ("cupyep", "python"):
        return
    if words[0] == "python":
        path = ROOT / words[1]
        assert path.is_file(), words
        if path.parent.name == "tools":
            parsed(importlib.import_module(path.stem).main, words[2:], path.name)
        return
    context = parsed(main, words[1:], "cupyep")
    given = {name: value for name, value in context.params.items() if name in OPTIONS and value is not None}
    if context.info_name == "train" and not context.params["resume"]:
        chosen_config(given, context.params["recipe"])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh"):
        for program, *rest in block.commands():
            words = [program.removeprefix(".venv/bin/"), *rest]
            assert words[0] in PROGRAMS, f"{page.name}: what is '{words[0]}'?"
            understood(words)


RUNNABLE = [page for page in PAGES[1:] if any(not block.needs for block in blocks(page, "sh"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=[page.name for page in RUNNABLE])
def test_commands_run(page, tmp_path):
    """In an empty folder, in their order, with the files of the repository's tools at hand."""
    pytest.importorskip("sklearn")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("cupyep", "-m cupyep.cli"), ("python", "")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(ROOT / "tools", work / "tools")
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUPYEP_DATA": str(tmp_path / "data"),
    }
    for block in blocks(page, "sh"):
        if not block.needs:
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", block.text], cwd=work, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-500:]}\n{done.stderr[-1000:]}"


def test_own_signal_activation_and_layer(tmp_path, monkeypatch):
    """What docs/extending.md defines is what it says."""
    monkeypatch.chdir(tmp_path)
    names = run_python(ROOT / "docs" / "extending.md")
    net, rng = names["net"], np.random.default_rng(0)
    edge, s = net.layers[1], rng.standard_normal((2, 4, 4, 16)).astype(np.float32)
    out, back = np.empty((2, 20), np.float32), np.empty_like(s)
    ops = net.memory.workspace(2).ops[1]
    edge.drive(s, out, None, ops)
    np.testing.assert_allclose(out, 0.5 * s.reshape(2, -1) @ edge.weight + edge.bias, rtol=1e-4, atol=1e-5)
    t = rng.standard_normal((2, 20)).astype(np.float32)
    edge.topdown(t, None, back, ops)
    np.testing.assert_allclose((back * s).sum(), (t * (out - edge.bias)).sum(), rtol=1e-4)
    signal = names["Sparsity"](layers=[1, 2], kappa=0.1, annealing="constant")
    result = ep.EquilibriumPropagation(net, signals=[signal], schedule="synchronous").step(names["x"], names["y"])
    plain = ep.EquilibriumPropagation(net, schedule="synchronous").step(names["x"], names["y"])
    assert not np.allclose(result.gradients["layers.1.weight"], plain.gradients["layers.1.weight"], rtol=1e-3)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "tests" / "README.md"], ids=[*IDS, "tests/README.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
