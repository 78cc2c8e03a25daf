"""The report: one file, self-contained, that says what the store says; on a store made up for it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isokern.autotune import html_report_plots
from isokern.autotune.html_report import Coverage, CoverageLine, render_report, unfinished_runs, write_report
from isokern.autotune.html_report_data import format_margin, format_percent, format_us, sections
from isokern.autotune.html_report_quality import load_quality
from isokern.cache import CandidateRecord, Entry, Journal, Layer, Store
from isokern.cache.environment import Environment
from isokern.cache.silicon import CpuSilicon, CudaSilicon
from isokern.cli import app, console  # noqa: F401 - the command line is importable without running
from isokern.errors import StoreError

H100 = Environment(
    "cuda",
    CudaSilicon("9.0", 132, 80),
    0,
    "13.0",
    (("torch", "2.11.0"), ("triton", "3.6.0")),
    "3.12",
    (("product", "NVIDIA H100"),),
)
CPU = Environment("cpu", CpuSilicon("x86_64", 8, ("avx2",)), 8, "", (("torch", "2.13.0"),), "3.11")
DECLINED = frozenset({"mode", "device"})
NASTY = 'off by 3 <script>alert("x")</script> & more'


def key(n=4, tokens=4, longest=1, length_class="decode", mode="eager", **more):
    shape = {"h": 16, "hv": 32, "k": 128, "v": 128, "io_dtype": "bfloat16", "state_dtype": "float32", "is_kda": False}
    profile = {"n": n, "tokens": tokens, "longest": longest, "length_class": length_class}
    return {**shape, "mode": mode, "device": "cuda", "intermediates": "none", "update": "in_place", **profile, **more}


def candidate(backend, us, code=None, reason=None, samples=8, **config):
    times = tuple(us * (1 + 0.01 * i) for i in range(samples)) if us else ()
    status = "ok" if code is None else "rejected"
    return CandidateRecord(backend, config, status, code, reason, us, times, "f", ("repeatable",) if us else ())


def entry(problem, candidates, chosen=0, environment=H100, runner_up=0.25, default=0.5):
    won = candidates[chosen]
    measured = {
        "policy": problem["mode"],
        "method": "a stopwatch",
        "launches": 9,
        "seconds": 30.0,
        "created": "2026-01-01T00:00:00+00:00",
        "isokern": "0",
    }
    rule = f"fastest: {won.label}"
    return Entry(
        "fused_sigmoid_gating", 1, problem, won.backend, won.config, runner_up, default, rule, tuple(candidates),
        measured, environment.hash,
    )  # fmt: skip


def field(winner="cupy", us=10.0):
    return [
        candidate(winner, us, tile=16),
        candidate("triton", 1.25 * us),
        candidate("torch_chunked", 20 * us, "slow", "20x the best"),
        candidate("numba_cuda", None, "wrong", NASTY, tile=64),
        candidate("torch_reference", None, "mode", "not in a graph"),
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Decode in a line, uniform prompts in a grid, both launch modes, and one entry of a CPU."""
    found = Store([Layer("user", tmp_path_factory.mktemp("store"), writable=True)])
    for mode in ("eager", "graph"):
        for n in (1, 4, 64):
            found.put(entry(key(n, n, mode=mode), field("cupy" if n < 64 else "numba", n * 3.0)), H100)
    for n, tokens, longest in ((1, 256, 256), (1, 1024, 1024), (4, 1024, 256)):
        found.put(entry(key(n, tokens, longest, "uniform"), field("triton_fast", tokens * 1.0)), H100)
    found.put(entry(key(device="cpu"), field("numba_cpu"), environment=CPU), CPU)
    return found


@pytest.fixture(scope="module")
def page(store):
    return render_report(store.entries(), where="user store /somewhere")


# ---- what is shown


def test_each_environment_is_a_section_the_fullest_first(store):
    found = sections(store.entries(), DECLINED)
    assert [s.name for s in found] == ["NVIDIA H100", "a x86_64 CPU with 8 logical cores"]
    assert [s.summary.problems for s in found] == [9, 1]


def test_candidates_are_told_apart_by_what_became_of_them(store):
    summary = sections(store.entries(H100), DECLINED)[0].summary
    assert (summary.candidates, summary.slower, summary.refused, summary.declined) == (36, 9, 9, 9)
    assert dict(summary.winners) == {"cupy": 4, "triton_fast": 3, "numba": 2}
    assert summary.over_default == 0.5
    assert summary.seconds == 270.0


def test_problems_on_a_diagonal_are_a_line_and_others_a_grid(store):
    [layer] = sections(store.entries(H100), DECLINED)[0].layers
    maps = {(m.mode, m.length_class): m for m in layer.maps}
    assert [p.n for p in maps["eager", "decode"].strip] == [1, 4, 64]
    grid = maps["eager", "uniform"]
    assert grid.strip is None
    assert (grid.rows, grid.columns) == ((1, 4), (256, 1024))
    assert [[len(cell) for cell in row] for row in grid.cells] == [[1, 1], [0, 1]]


def test_regret_is_against_what_raced_and_is_right():
    problem = key()
    wrong_but_fast = candidate("cheat", None, "wrong", "no work done")
    faster = candidate("rival", 8.0)
    eliminated = candidate("proven_slower", 4.0, "slow", "eliminated: 20 % slower in 10 blocks, of calmer times")
    untimed = CandidateRecord("guess", {}, "rejected", "slow", "not gated", 1.0, (), "f")
    made = entry(problem, [candidate("kept", 10.0), faster, eliminated, wrong_but_fast, untimed])
    store = Store([])
    with pytest.warns(UserWarning, match="no writable layer"):
        store.put(made, H100)
    [section] = sections(store.entries(), DECLINED)
    [tuned] = section.problems
    assert tuned.regret == pytest.approx(0.25)
    assert section.summary.over_bar == 1


def test_of_two_layers_the_one_that_a_lookup_would_take_counts(tmp_path):
    upper = Store([Layer("user", tmp_path / "user", writable=True)])
    lower = Store([Layer("site", tmp_path / "site", writable=True)])
    upper.put(entry(key(), field("mine")), H100)
    lower.put(entry(key(), field("theirs")), H100)
    both = Store([*upper.layers, *lower.layers])
    [section] = sections(both.entries(), DECLINED)
    assert [p.backend for p in section.problems] == ["mine"]


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.25, "250 ns"), (9.5, "9.5 µs"), (417.3, "417 µs"), (4170.0, "4.17 ms"), (2.5e6, "2.5 s"), (None, "–")],
)
def test_times_have_the_unit_that_fits(us, text):
    assert format_us(us) == text


def test_margins_have_a_sign_and_become_factors():
    assert [format_margin(x) for x in (0.079, -0.13, 1.4, None)] == ["+7.9 %", "-13.0 %", "2.4×", "–"]
    assert format_percent(0.5) == "50.0 %"


# ---- the page


class Checker(HTMLParser):
    """Collects what a browser would complain about, or fetch."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self):
        super().__init__()
        self.open = []
        self.ids = []
        self.targets = []
        self.fetched = []
        self.faults = []
        self.tags = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        for name in ("src", "href", "xlink:href", "data", "poster"):
            value = given.get(name)
            if value and value.startswith("#"):
                self.targets.append(value[1:])
            elif value:
                self.fetched.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-3:]}")
        else:
            self.open.pop()


@pytest.fixture(scope="module")
def checked(page):
    checker = Checker()
    checker.feed(page)
    return checker


def test_the_page_is_well_formed_and_its_links_lead_somewhere(checked):
    assert not checked.faults
    assert not checked.open
    assert len(checked.ids) == len(set(checked.ids)), "ids are unique, those of the plots among them"
    assert set(checked.targets) <= set(checked.ids)


def test_nothing_is_loaded_and_nothing_runs(page, checked):
    assert not checked.fetched
    assert "script" not in checked.tags
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)


def test_a_reason_is_text_whatever_it_holds(page):
    assert NASTY not in page
    assert "&lt;script&gt;alert(" in page


def test_it_says_who_won_by_how_much_and_why_others_did_not(page):
    text = re.sub(r"\s+", " ", page)
    for wanted in (
        "NVIDIA H100",
        "torch 2.11.0",
        "16 key heads, 32 value heads of 128×128",
        "fastest: cupy[tile=16]",
        "20x the best",
        "not in a graph",
        "192 µs",
        "+25.0 %",
        "a stopwatch",
    ):
        assert wanted in text, wanted


def test_it_explains_its_words(page):
    words = page[page.index('id="words"') :]
    for word in ("backend", "problem", "length class", "launch", "median", "runner-up", "bar", "regret", "refused"):
        assert f"<dt>{word}" in words or f"{word}</dt>" in words or f"{word}, " in words, word


def test_it_knows_light_and_dark(page):
    assert "prefers-color-scheme: dark" in page
    assert "color-scheme: light dark" in page


def test_the_plots_take_their_colours_and_font_from_the_page(page):
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3 + 2, "times of two launch modes and margins; for the CPU, times of one and margins"
    for svg in drawings:
        assert "var(--ink)" in svg
        assert "var(--c0)" in svg
        assert not re.search(r"(?:fill|stroke): #(?!ffffff00)", svg), "a fixed colour would vanish on one background"
        assert "sans-serif" not in svg
        assert "<text" in svg, "text stays text"


def test_without_matplotlib_the_tables_are_there(store, monkeypatch):
    monkeypatch.setattr(html_report_plots, "available", lambda: False)
    page = render_report(store.entries())
    assert "<svg" not in page
    assert "Every problem, with all its candidates" in page


def test_an_empty_store_says_what_to_do():
    page = render_report([])
    assert "isokern warmup --model" in page
    checker = Checker()
    checker.feed(page)
    assert not checker.faults


def test_coverage_names_what_is_missing(store):
    lines = (CoverageLine("decode N=1", "graph", "N<=1", "cupy[default]"), CoverageLine("mixed", "graph", "N<=64", ""))
    page = render_report(store.entries(), coverage=Coverage("a model", "isokern warmup --model m --tp 2", lines))
    assert "1 of 2 problems have a choice" in re.sub(r"\s+", " ", page)
    assert "isokern warmup --model m --tp 2" in page
    assert "not tuned" in page


def test_interrupted_runs_are_listed(tmp_path):
    layer = Layer("user", tmp_path, writable=True)
    store = Store([layer])
    store.put(entry(key(), field()), H100)
    journal = Journal(layer.schema_root / H100.hash / "journal" / "fused_sigmoid_gating-0123.jsonl")
    journal.append({"kind": "start", "signature": "x"})
    journal.append({"kind": "verdict", "name": "a", "fingerprint": "f", "verdict": {"rejected": None}})
    journal.append({"kind": "verdict", "name": "b", "fingerprint": "f", "verdict": {"rejected": {"code": "wrong"}}})
    journal.append({"kind": "contest", "field": "x", "event": {"block": {"a": 1.0}}})
    lines = unfinished_runs(store)[H100.hash]
    assert lines == ["fused_sigmoid_gating-0123: 2 candidates judged (1 refused), 1 blocks of the race"]
    assert lines[0] in render_report(store.entries(), unfinished=unfinished_runs(store))


# ---- quality


def results(tmp_path: Path, **summary) -> Path:
    rows = [
        {"case": f"case {i}", "backend": "cupy", "config": "default", "extra": {"what": "held_out", "regret": 0.01 * i}}
        for i in range(3)
    ]
    meta = {"gpu": "NVIDIA H100", "cpu": "x", "threads": 1, "date": "2026-01-01", "summary": summary}
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({"meta": meta, "rows": rows}))
    return path


def test_quality_results_are_shown_worst_first(tmp_path, store):
    path = results(
        tmp_path,
        held_out={"count": 3, "mean": 0.01, "worst": 0.02},
        agreement={"runs": 20, "agreeing": 20, "problems": 2},
        modes={"pairs": 9, "differ": 4, "worst": 5.0},
        estimate={"ratio": 1.2, "text": "96 s for 80 s"},
    )
    quality = load_quality(path)
    assert [line.case for line in quality.lines] == ["case 2", "case 1", "case 0"]
    assert [tile.value for tile in quality.tiles] == ["1.0 %", "20 of 20", "4 of 9", "1.2×"]
    assert "Measured on NVIDIA H100" in render_report(store.entries(), quality=quality)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"meta": {"gpu": null}, "rows": []}'])
def test_a_file_that_is_no_result_is_a_typed_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StoreError, match=r"x\.json"):
        load_quality(tmp_path / "x.json")


# ---- the command


def run(*arguments):
    import typer

    from isokern.autotune.report_cli import report

    alone = typer.Typer()
    alone.command()(report)
    return CliRunner().invoke(alone, [str(a) for a in arguments])


def test_the_command_writes_one_file(store, tmp_path):
    root = store.layers[0].root
    done = run("--root", root, "--out", tmp_path / "deep" / "report.html")
    assert done.exit_code == 0, done.output
    assert "10 problems in" in done.output
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_the_command_says_what_is_wrong(store, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("--root", tmp_path / "nowhere"), "is not a directory"),
        (("--root", store.layers[0].root, "--out", tmp_path / "file" / "x.html"), "cannot write"),
        (("--root", store.layers[0].root, "--quality", tmp_path / "none.json"), "cannot read"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, StoreError)
        assert message in str(done.exception)


def test_writing_is_counted(store, tmp_path):
    assert write_report(tmp_path / "r.html", store) == (10, html_report_plots.available())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tp", "4"), ("--tier", "core"), ("--workloads", "x.yaml"), ("--device", "tpu"), ("--accuracy", "rounded")],
)
def test_what_is_about_a_model_is_refused_without_one(store, tmp_path, option, value):
    done = run("--root", store.layers[0].root, "--out", tmp_path / "x.html", option, value)
    assert done.exit_code != 0
    assert f"{option}: expected --model beside it" in str(done.exception)
    assert not (tmp_path / "x.html").exists()
