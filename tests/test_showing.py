"""What objects show of themselves: short, true, no arrays. Oracle: sizes put in, losses; the notebook's own cells."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from quadrants import quadrant_data
from small import batch_of, network

import cupyep as ep
from cupyep.data import Split

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def shown(value):
    """Return the facts, after a look at both forms in which they are shown."""
    text, rows = repr(value), ElementTree.fromstring(value._repr_html_())
    assert text.startswith(f"{type(value).__name__}(")
    assert len(text) < 300
    assert "array(" not in text
    assert "\n" not in text
    facts = value.facts()
    assert {row[0].text: row[1].text for row in rows.iter("tr")} == facts
    return facts


def test_a_data_set():
    data = quadrant_data()
    assert shown(data) == {"name": "quadrants", "images": "16x16x3", "train": "40", "test": "20",
                           "classes": "2 (up, down)"}  # fmt: skip
    assert shown(data.train) == {"train": "40 images", "size": "16x16x3"}
    odd = Split("train", np.zeros((1, 2, 3, 1), np.uint8), np.zeros(1, np.int64))
    many = ep.Dataset("<a & b>", tuple(map(str, range(100))), odd, odd, np.zeros(1, np.float32), np.ones(1, np.float32))
    assert shown(many)["classes"] == "100 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"
    assert shown(many)["name"] == "<a & b>"


def test_states_say_how_they_settled():
    net = network("dense")
    batch = batch_of(net, 3)
    free = net.settle(batch, steps=40, tolerance=1e-3)
    facts = shown(free)
    assert facts["samples"] == "3"
    assert facts["layers"] == ", ".join(str(s.shape[1]) for s in free.layers)
    assert facts["steps"] == str(free.stats.steps)
    assert facts["residual"] == f"{free.stats.residual.max():.1e}, settled"
    assert shown(free.stats)["residual"] == facts["residual"]
    with pytest.warns(ep.ConvergenceWarning):
        assert shown(net.settle(batch, steps=1, tolerance=1e-9))["residual"].endswith(", not settled")
    assert "settled" not in shown(net.settle(batch, steps=1))["residual"]
    assert "residual" not in shown(free.part(slice(0, 1)))
    nudged = net.settle(batch, net.settle(batch, steps=5), targets=batch, beta=0.1, nudge="deviation", steps=3)
    assert shown(nudged)["form"] == "deviations from the free state"
    learner = ep.EquilibriumPropagation(net)
    alone = learner.settle_nudged(batch, learner.settle_free(batch), [0.5, -0.5], net.nudges(batch))
    assert shown(alone)["samples"] == "6"
    assert shown(alone)["layers"] == facts["layers"]
    assert "samples: 0" in repr(ep.State([]))
    for nothing in (alone, ep.State([])):
        with pytest.raises(ep.ConfigurationError, match="the start state has 0 samples in 0 layers, the batch 3 in 3"):
            net.settle(batch, nothing)


@pytest.mark.parametrize("kind", ["ep", "bptt", "bp"])
def test_learners_and_their_steps(kind):
    net = network("dense")
    learner = {
        "ep": lambda: ep.EquilibriumPropagation(net, beta=0.25, free_steps=8, signals=[ep.LocalError("all")]),
        "bptt": lambda: ep.BackpropagationThroughTime(net, 6, 4),
        "bp": lambda: ep.Backpropagation(net),
    }[kind]()
    facts = shown(learner)
    count = sum(p.size for p in learner.parameters().values())
    assert facts["network"] == f"{net.depth} layers, {count:,} parameters"
    assert (facts.get("beta"), facts.get("signals")) == (("0.25", "LocalError") if kind == "ep" else (None, None))
    assert facts.get("free steps") == {"ep": "8", "bptt": "6", "bp": None}[kind]
    result = learner.step(batch_of(net, 5))
    facts = shown(result)
    assert (facts["loss"], facts["correct"]) == (f"{float(result.loss):.4f}", f"{int(result.correct)} of 5")
    assert ("nudged phase" in facts) == (kind == "ep")


def test_a_notebook_shows_figures():
    """They belong to no backend, so Jupyter would show their sizes; the picture is there after a copy, too."""
    pytest.importorskip("matplotlib")
    from cupyep.commands.plots.style import plain_axes

    figure, _ = plain_axes(1)
    for one in (figure, pickle.loads(pickle.dumps(figure))):
        assert one._repr_png_().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_notebook_has_bars(monkeypatch):
    """Where its output is no terminal; elsewhere only a terminal has them."""
    from cupyep.training import display

    assert not display.Display()._has_bars()
    monkeypatch.setattr(display, "NOTEBOOK", True)
    assert display.Display()._has_bars()
    assert not display.Display(quiet=True)._has_bars()
    assert not display.JsonDisplay()._has_bars()


# --- the notebook ----------------------------------------------------------------------------------------------------


def test_the_notebook_is_executed_and_small():
    page = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2
    assert "text/html" in kinds
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """In a process and a folder of its own; what it shows is what the page has, but for times and pictures."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import notebook; page = json.loads(notebook.PAGE.read_text"
        "(encoding='utf-8')); notebook.run(page['cells']); open('out.json', 'w').write(json.dumps(page))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings"
    old, new = (json.loads(path.read_text(encoding="utf-8"))["cells"] for path in (NOTEBOOK, tmp_path / "out.json"))
    for one, two in zip(old, new, strict=True):
        assert one["source"] == two["source"]
        assert [output.get("data", {}).keys() for output in one.get("outputs", [])] == [
            output.get("data", {}).keys() for output in two.get("outputs", [])
        ]
