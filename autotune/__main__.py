"""``python -m isokern.autotune``: the whole command line."""

from ..cli import main

main()
