"""README and docs are true: every snippet runs, every command works, every generated table is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import isokern

ROOT = Path(isokern.__file__).parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(document: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(document.read_text()) if kind == language]


def commands() -> list[tuple[Path, str]]:
    return [(d, line) for d in DOCUMENTS for body in blocks(d, "sh") for line in body.splitlines() if line.strip()]


def identity(value):
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else None


def environment(tmp_path: Path) -> dict[str, str]:
    """The reader's machine, except for where the store lies and how much `make` is told to do."""
    scripts = str(Path(sys.executable).parent)
    # A `make` that runs these tests would hand its own variables down.
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES")}
    return {**clean, "ISOKERN_CACHE": str(tmp_path), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=identity)
def test_the_snippets_of_a_page_run_in_order(document, tmp_path):
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(blocks(document, "python")))
    env = environment(tmp_path / "store")
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "toml")], ids=identity)
def test_toml_snippets_parse(document):
    for body in blocks(document, "toml"):
        tomllib.loads(body)


def test_every_command_works(tmp_path):
    """In the order of the pages, with one store, as a reader would run them."""
    env = environment(tmp_path)
    done: dict[str, int] = {}
    for document, line in commands():
        if line in done and not line.startswith("isokern warmup"):
            continue
        more = {}
        if line == "make warmup":
            more = {
                "ARGS": "--tier smoke"
            }  # the real thing takes minutes; this takes the same path on four small cases
        elif line == "make test":
            more = {"ARGS": "--collect-only --quiet tests/test_package.py"}
        run = subprocess.run(
            line, shell=True, cwd=ROOT, env={**env, **more}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{document.name}: {line}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
        done[line] = run.returncode
    assert {"make warmup", "make test"} <= set(done)


def test_only_known_languages_are_fenced():
    kinds = {kind for d in DOCUMENTS for kind, _ in FENCE.findall(d.read_text())}
    assert kinds <= {"python", "sh", "toml", "yaml", "text"}, "a block no test executes must say so: ```text"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_generated_tables_are_up_to_date():
    check = [sys.executable, ROOT / "tools" / "tables.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
