"""Markdown that is read in the repository, made fit for the site: README as a page, links that lead out of docs/."""

from __future__ import annotations

import posixpath
import re

__all__ = ["local_links", "plots_in", "quick_start", "with_plots"]

#: Sections of README that are the site's front page and navigation.
_ELSEWHERE = ("How fast, on a CPU", "Read on")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_PLOT = re.compile(r"<!-- plot: (\w+) -->")


def quick_start(readme: str) -> str:
    """README as the page docs/quickstart.md, without what the site has elsewhere."""
    _, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    kept = [part for part in sections if part.partition("\n")[0].removeprefix("## ") not in _ELSEWHERE]
    return "# Quick start\n\n" + local_links("".join(kept), "README.md", "docs/quickstart.md")


def local_links(markdown: str, written: str, page: str) -> str:
    """Links as the site needs them; those to files of the repository that are no pages become paths, as text.

    Args:
        written: the file that holds the text, a path from the repository's root: what its links start from.
        page: the file below docs/ that the site takes the text for.
    """

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        path, mark, anchor = target.partition("#")
        if ":" in target or not path:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(written), path))
        if not file.startswith("docs/"):
            return f"`{file}`" if posixpath.basename(file) == posixpath.basename(text) else f"{text} (`{file}`)"
        if path.endswith("/"):
            file += "/README.md"
        return f"{picture}[{text}]({posixpath.relpath(file, posixpath.dirname(page))}{mark}{anchor})"

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def plots_in(text: str) -> list[str]:
    """Names of the plots that a page asks for."""
    return _PLOT.findall(text)


def with_plots(page: str, figures: dict[str, str]) -> str:
    """The page with each figure in place of its mark. KeyError: no such figure."""
    return _PLOT.sub(lambda mark: figures[mark[1]], page)
