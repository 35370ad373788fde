"""The documentation site, made from the Markdown pages as they are.

    sphinx-build -W -n -c docs . build/site        # then open build/site/index.html

The source folder is the repository, so a link between two pages works on a code host and on the site alike. A link to
any other file of the repository becomes a download. `docs/index.md` is the only list of pages: the side bar has its
headings and the links of its tables. The site loads nothing from other machines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "tropd_mcore"
author = "the tropd_mcore maintainers"
root_doc = "docs/index"
include_patterns = ["docs/*.md", "*.md", "benchmarks/README.md"]
extensions = ["myst_parser"]
myst_heading_anchors = 4
highlight_language = "none"
html_theme = "furo"
html_title = "tropd_mcore"
html_extra_path = ["site"]
html_copy_source = False
html_show_sphinx = False


def side_bar(index: str) -> str:
    """Return the toctree directives of an index page: one per bold heading, with the pages that its tables link to."""
    directives = []
    seen = set()
    for section in re.split(r"^(?=\*\*)", index, flags=re.MULTILINE):
        heading = re.match(r"\*\*(.+?)\*\*", section)
        targets = [target for target in re.findall(r"\]\(([\w./-]+\.md)\)", section) if target not in seen]
        seen.update(targets)
        caption = f":caption: {heading[1]}\n" if heading else ""
        entries = "\n".join(target.removesuffix(".md") for target in dict.fromkeys(targets))
        directives.append(f"```{{toctree}}\n:hidden:\n{caption}\n{entries}\n```")
    return "\n\n".join(directives)


def add_side_bar(_app: Any, page: str, source: list[str]) -> None:
    """Append the side bar to the index page while it is read; the file has none, because code hosts would show it."""
    if page == root_doc:
        source[0] += "\n\n" + side_bar(source[0])


def setup(app: Any) -> None:
    """Register the hook with Sphinx."""
    app.connect("source-read", add_side_bar)
