"""Adapters to other installed libraries, each a backend that declines what its library ignores or gets wrong.

Nothing here imports a library before its kernel is bound. See docs/external.md.
"""
