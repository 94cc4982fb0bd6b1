#!/usr/bin/env python3
"""Run the cells of docs/notebook.ipynb and write what they show into it, without Jupyter."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cupyep.files import write_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"


def run(cells: list[dict[str, Any]]) -> None:
    """Run code cells one after the other, as Jupyter does, and put their outputs into them."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((c for c in cells if c["cell_type"] == "code"), start=1):
        printed, body = io.StringIO(), ast.parse("".join(cell["source"]))
        last = ast.Expression(end.value) if isinstance(end := body.body[-1], ast.Expr) else None
        body.body = body.body[:-1] if last else body.body
        with contextlib.redirect_stdout(printed):
            exec(compile(body, f"cell {number}", "exec"), space)
            value = None if last is None else eval(compile(last, f"cell {number}", "eval"), space)
        cell["execution_count"], cell["outputs"] = number, []
        if text := printed.getvalue():
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
        if value is not None:
            shown = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data(value)}
            cell["outputs"].append(shown)


def data(value: Any) -> dict[str, Any]:
    """Return how a notebook shows a value, by kind."""
    kinds: dict[str, Any] = {"text/plain": repr(value).splitlines(True)}
    if hasattr(value, "_repr_png_"):
        kinds["image/png"] = base64.b64encode(value._repr_png_()).decode()
    elif hasattr(value, "_repr_html_"):
        kinds["text/html"] = [value._repr_html_()]
    return kinds


def main() -> None:
    if sys.argv[1:]:
        sys.exit("usage: python tools/notebook.py")
    page = json.loads(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run(page["cells"])
        os.chdir(PAGE.parent)
    write_file(PAGE, (json.dumps(page, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
