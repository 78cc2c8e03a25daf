"""The contract's version, apart from what implements it: whoever looks up what is stored for it needs nothing else."""

from __future__ import annotations

__all__ = ["CONTRACT_VERSION"]

#: Changes whenever the meaning of a call does; stored results of other versions are misses.
CONTRACT_VERSION = 1
