"""Strict mypy on the package as users install it: build a wheel, install it into a scratch folder, check that."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        dist, site = Path(scratch, "dist"), Path(scratch, "site")
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
            wheel.extractall(site)
        config = ROOT / "pyproject.toml"
        command = [sys.executable, "-m", "mypy", "--config-file", str(config), "-p", "isokern"]
        # Run from the scratch folder: in the repository the root package would be found twice.
        return subprocess.run(command, check=False, cwd=scratch, env={**os.environ, "MYPYPATH": str(site)}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
