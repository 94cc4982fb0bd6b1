"""What README.md promises: its Python block learns; its markers and those of docs/contributing.md feed the gate."""

import re

import pytest
from documents import ROOT, run_python

import cupyep as ep

README = ROOT / "README.md"


def test_class_api_learns():
    pytest.importorskip("sklearn")
    names = run_python(README)
    data, trained = names["data"], names["net"]
    fresh = ep.vgg(7, classes=10, input_shape=data.image_shape, width=0.125, feedback=0.1, seed=0, device="cpu")
    test = next(iter(ep.Loader(data, "test", 360, fresh.device, fresh.dtype)))
    before, after = (
        (net.predict(test.images, steps=2, schedule="sweeps") == test.labels).mean() for net in (fresh, trained)
    )
    assert before < 0.3 < after


@pytest.mark.parametrize("marker", ["install", "tests", "kernels", "first-run"])
def test_the_gate_finds_its_commands(marker):
    text = "".join(page.read_text(encoding="utf-8") for page in (README, ROOT / "docs" / "contributing.md"))
    (block,) = re.findall(rf"<!-- ci: {marker} -->\n```sh\n((?:.+\n)+)```", text)
    assert all(line.startswith(("python3 -m venv", ".venv/bin/")) for line in block.splitlines())
