"""``python -m isokern``."""

from .cli import main

main()
