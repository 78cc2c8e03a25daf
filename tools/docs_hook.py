"""What mkdocs calls while it builds the site: generated pages, plots, links. mkdocs.yml names this file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from isokern.tools.docs_drawing import figure
from isokern.tools.docs_pages import local_links, plots_in, quick_start, with_plots
from isokern.tools.docs_plots import PLOTS
from isokern.tools.docs_reference import PAGES, stage

ROOT = Path(__file__).resolve().parent.parent
#: mkdocs.yml tells the documentation tool to read sources from here.
STAGED = ROOT / "build" / "docs"
#: Markup of docstrings that Markdown does not know: a name's role, and the second colon before a block of code.
_FOREIGN = re.compile(r":(?:func|class|meth|mod|attr):(?=<code>)|(?<=:):(?=</p>)")


def on_startup(*, command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Lay out the package for the API reference."""
    stage(ROOT, STAGED)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made: the quick start, from README, and the API reference."""
    files.append(File.generated(config, "quickstart.md", content=quick_start((ROOT / "README.md").read_text())))
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page.markdown()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/ become paths."""
    if page.file.generated_by:
        return markdown
    return local_links(markdown, f"docs/{page.file.src_uri}", f"docs/{page.file.src_uri}")


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings without what only other tools read."""
    return _FOREIGN.sub("", html)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Plots, last, so that the search does not find numbers on axes.

    Raises:
        PluginError: the page asks for a plot that does not exist.
    """
    names = plots_in(output)
    if unknown := set(names) - set(PLOTS):
        raise PluginError(f"{page.file.src_uri} asks for {', '.join(sorted(unknown))}; plots: {', '.join(PLOTS)}")
    return with_plots(output, {name: figure(PLOTS[name]()) for name in names})
