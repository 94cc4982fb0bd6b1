"""How objects show themselves: one short line in a terminal, a small table in a notebook."""

from __future__ import annotations

import html


class Shown:
    """Shows what `facts` says of an object, and never its arrays."""

    def facts(self) -> dict[str, str]:
        """Return what there is to say, in words, by name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}: {text}' for name, text in self.facts().items())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self.facts().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"
