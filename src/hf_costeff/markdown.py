"""Tables and quoted text for pages in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; cells stand as they are given.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def quoted(text: str) -> str:
    r"""Text that is shown as it is, in one line: no markup, link, image or cell of its own.

    >>> quoted("a <b> [c](d) | e")
    'a &lt;b&gt; \\[c\\](d) \\| e'
    """
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(" ".join(text.split()), quote=False))
