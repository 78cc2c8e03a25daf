"""``python -m isokern.tools.gpu_test``."""

from __future__ import annotations

from .cli import app

if __name__ == "__main__":
    app()
