"""The documentation site: it builds without a warning, leaves nothing out, and shows the numbers that were measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mkdocs.exceptions import PluginError

import isokern
from isokern import errors, registry
from isokern.registry.ops.fused_sigmoid_gating.hot import HotPath
from isokern.tools import docs_hook
from isokern.tools.docs_drawing import COLOURS, draw, series_id
from isokern.tools.docs_pages import local_links, plots_in, quick_start
from isokern.tools.docs_plots import FLOOR, PLOTS
from isokern.tools.docs_reference import PAGES, stage

ROOT = Path(isokern.__file__).parent
WRITTEN = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
PAGES_OF_THE_SITE = WRITTEN | set(PAGES) | {"quickstart.md"}
US = {"us per call": 1.0, "us of host time": 1.0, "ms per call": 1e-3}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site, and what was said while it was made."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return SimpleNamespace(site=site, done=done, said=done.stdout + done.stderr)


@pytest.fixture(scope="module")
def pages(built):
    """Each page's HTML, by the path of its source."""
    assert built.done.returncode == 0, built.said
    return {source: (built.site / html_of(source)).read_text() for source in PAGES_OF_THE_SITE}


def html_of(source: str) -> str:
    return re.sub(r"(^|/)README$", r"\1index", source.removesuffix(".md")) + ".html"


class Rows(HTMLParser):
    """The rows of a page's tables: the text of their cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][-1] += data


# The build


def test_it_builds_without_a_warning(built):
    assert built.done.returncode == 0, built.said
    assert "WARNING -" not in built.said, built.said


def test_every_page_is_in_the_navigation_once(pages):
    def paths(entries):
        for entry in entries:
            for target in entry.values():
                yield from [target] if isinstance(target, str) else paths(target)

    named = list(paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(named) == sorted(PAGES_OF_THE_SITE)


def test_nothing_is_loaded_from_elsewhere(pages):
    for source, page in pages.items():
        assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*', page), source


def test_what_the_repository_shows_as_a_list_or_table_is_one_on_the_site(pages):
    for source, page in pages.items():
        assert not re.findall(r"<p>[^<]*\n(?:[-*] |\|).*", page), source


# The front page and the quick start


def test_readmes_tables_stand_on_the_site_cell_for_cell(pages):
    readme = (ROOT / "README.md").read_text()
    rows = Rows(pages["index.md"]).rows + Rows(pages["quickstart.md"]).rows
    shown = [[cell.strip() for cell in row] for row in rows]
    lines = [line for line in readme.splitlines() if line.startswith("|") and not line.startswith("| --- ")]
    assert len(lines) > 20
    for line in lines:
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        assert cells in shown, line


def test_the_front_page_has_the_two_commands_one_plot_and_the_measured_table():
    front = (ROOT / "docs" / "index.md").read_text()
    assert "make warmup\nmake test\n" in front
    assert plots_in(front) == ["decode"]
    assert re.findall(r"<!-- table: (\w+) -->", front) == ["cpu"]


def test_the_quick_start_is_readmes_own_text_with_links_that_fit():
    page = quick_start(
        "# x\n\nintro\n\n## Use\n\n[a](docs/varlen.md#rules), [b](docs/performance/)\n\n## Read on\n\nmore\n"
    )
    assert page == "# Quick start\n\n## Use\n\n[a](varlen.md#rules), [b](performance/README.md)\n\n"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[bounds](../conformance.md#bounds)", "[bounds](../conformance.md#bounds)"),
        ("[here](prefill.md)", "[here](prefill.md)"),
        ("[the results](../../benchmarks/results/)", "the results (`benchmarks/results`)"),
        ("[cpu.py](../../benchmarks/cpu.py)", "`benchmarks/cpu.py`"),
        ("[below](#there)", "[below](#there)"),
        ("[home](https://example.org/a.md)", "[home](https://example.org/a.md)"),
        ("```text\n[x](../../cli.py)\n```", "```text\n[x](../../cli.py)\n```"),
    ],
)
def test_links_lead_to_pages_or_become_paths(written, shown):
    page = "docs/performance/note.md"
    assert local_links(written, page, page) == shown


# Plots


def test_every_plot_is_on_a_page_and_every_page_has_its_plots(pages):
    wanted = {name for source in WRITTEN for name in plots_in((ROOT / "docs" / source).read_text())}
    assert wanted == set(PLOTS)
    for source in WRITTEN:
        for name in plots_in((ROOT / "docs" / source).read_text()):
            assert draw(PLOTS[name]()) in pages[source]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_shows_what_was_measured_and_marks_every_point(name):
    plot = PLOTS[name]()
    file = ROOT / plot.source.rpartition("; ")[2]
    rows = json.loads(file.read_text())["rows"]
    measured = {
        round(row[column] * US[plot.unit], 6)
        for row in rows
        for column in ("graph_us", "eager_us", "floor_us")
        if row[column] is not None
    }
    svg = draw(plot)
    for number, panel in enumerate(plot.panels):
        assert len(panel.series) >= 2
        for index, series in enumerate(panel.series):
            assert {round(point.value, 6) for point in series.points} <= measured
            assert f">{series.label}</text>" in svg
            group = series_id(plot, number, index)
            if plot.kind == "bars":
                assert len(re.findall(rf'id="{group}-\d+"', svg)) == len(series.points)
            else:
                drawn = re.search(rf'<g id="{group}">.*?(?=<g id="{plot.name}-|<g>\s*<path|$)', svg, re.DOTALL)[0]
                assert drawn.count("<use ") == len(series.points)


def test_the_plots_of_decode_have_the_floor_and_every_kernel():
    for name in ("decode", "decode_bfloat16"):
        for panel in PLOTS[name]().panels:
            assert panel.series[0].label == FLOOR
            assert {"cupy", "triton", "numba_cuda"} <= {series.label for series in panel.series}
            for series in panel.series:
                assert [point.at for point in series.points][:3] == [1, 4, 16]


def test_a_plot_takes_the_newest_file_and_leaves_out_what_was_not_timed(tmp_path):
    def write(date, us):
        row = {"implementation": "cupy", "backend": "cupy", "eager_us": 9.0, "floor_us": 1.0, "extra": {}}
        rows = [{**row, "case": f"decode N={n} H=16 HV=32 float32", "graph_us": t} for n, t in ((1, us), (4, None))]
        meta = {"date": date, "gpu": "a GPU"}
        (tmp_path / f"{date}_x_gpu_suite.json").write_text(json.dumps({"meta": meta, "rows": rows}))

    write("2030-01-01", 2.0)
    write("2031-01-01", 3.0)
    floor, cupy = PLOTS["decode"](tmp_path).panels[0].series
    assert [(point.at, point.value) for point in cupy.points] == [(1, 3.0)]
    assert [(point.at, point.value) for point in floor.points] == [(1, 1.0)]
    assert "2031-01-01" in PLOTS["decode"](tmp_path).source


def test_plots_are_read_on_light_and_on_dark_pages():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in COLOURS:
        for page in ("#ffffff", "#1e2129"):  # the theme's two
            low, high = sorted((luminance(colour), luminance(page)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, page)
    for make in PLOTS.values():
        svg = draw(make())
        # Axes, text and the floor have the page's own colour.
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= set(COLOURS)
        assert "currentColor" in svg


def test_plots_on_one_page_share_no_id(pages):
    for source, page in pages.items():
        ids = re.findall(r' id="([^"]+)"', "".join(re.findall(r"<figure.*?</figure>", page, re.DOTALL)))
        assert len(ids) == len(set(ids)), source


def test_an_unknown_plot_is_refused():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    with pytest.raises(PluginError, match=r"a\.md asks for speed; plots: decode"):
        docs_hook.on_post_page("<!-- plot: speed -->", page=page, config=None)


# The API reference


def test_the_reference_names_what_users_call_and_catch(pages):
    def documented(source):
        return set(re.findall(r'id="isokern\.([\w.]+)"', pages[source]))

    assert {f"errors.{name}" for name in errors.__all__} <= documented("reference/errors.md")
    op = documented("reference/op.md")
    assert {f"registry.ops.fused_sigmoid_gating.op.FusedSigmoidGating.{name}" for name in ("explain", "prepare")} <= op
    parameters = HotPath.__call__.__code__.co_varnames[1 : HotPath.__call__.__code__.co_argcount]
    assert len(parameters) > 10
    for name in parameters:
        assert re.search(rf"\b{name}\b", pages["reference/op.md"]), name
    methods = {name for name, value in vars(registry).items() if getattr(value, "__self__", None) is registry.default}
    assert {f"registry.core.Registry.{name}" for name in methods} <= documented("reference/registry.md")


def test_docstrings_reach_the_page_without_other_tools_markup(pages):
    for source in PAGES:
        assert not re.search(r":(?:func|class|meth|mod):|::</p>", pages[source]), source


def test_the_reference_reads_every_module_of_the_package_and_nothing_else(tmp_path):
    stage(ROOT, tmp_path)
    stage(ROOT, tmp_path)  # again, over what is there
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    expected = {
        Path(*package.split("."), module.name)
        for package in packages
        for module in ROOT.joinpath(*package.split(".")[1:]).glob("*.py")
    }
    assert {file.relative_to(tmp_path) for file in tmp_path.rglob("*.py")} == expected
