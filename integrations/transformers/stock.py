"""Whether an installed transformers is one whose layers are known: its version, and the layers' own source.

A layer's forward is replaced by one that does the same, so what it did must be known. Version numbers alone do not say
that: the sources of the forwards are compared with those that this integration was written against, as digests of their
tokens (comments and layout left out). A release that changes nothing there is served without a change here.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import tokenize
from collections.abc import Callable
from functools import cache
from typing import Any

from ...errors import IntegrationError
from .families import Family

__all__ = ["check_layer", "check_version", "digest"]

#: The first release with these layers and caches, and the last one that the digests were taken from.
FIRST, LAST = (5, 21), "5.23.0"

_LAYOUT = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})

#: First 16 hexadecimal digits of the digest of each forward, by "class.method".
KNOWN = {
    "Qwen3NextGatedDeltaNet.forward": frozenset({"6f03adf3175d410e", "648a16d28cb3ff1d"}),
    "Qwen3_5GatedDeltaNet.forward": frozenset({"c2c0e0ec84344577", "0042c5d66a12da9d"}),
    "Qwen3_5MoeGatedDeltaNet.forward": frozenset({"c2c0e0ec84344577", "0042c5d66a12da9d"}),
    "Qwen4ExpTextGatedDeltaNet.forward": frozenset({"c2c0e0ec84344577", "0042c5d66a12da9d"}),
    "OlmoHybridGatedDeltaNet.forward": frozenset({"70614ff777538389", "31faa7ee8201f2e3"}),
    "KimiLinearDeltaAttention.forward": frozenset({"050e7f24810eb602"}),
    "KimiLinearDeltaAttention.forget_gate.forward": frozenset({"50ffeece7d9457ef"}),
    "Glm5NextTextLinearAttention.forward": frozenset({"050e7f24810eb602"}),
    "Glm5NextTextLinearAttention.forget_gate.forward": frozenset({"260c1e7c59971fb3"}),
    "BailingHybridDeltaAttention.forward": frozenset({"3fabf523285ed8c6"}),
    "BailingHybridDeltaAttention.forget_gate.forward": frozenset({"fef83da7d8a2cf08"}),
}


def digest(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits that stand for the source of ``function``; empty where there is no source."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""
    source = inspect.cleandoc("\n" + source) + "\n"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = " ".join(token.string for token in tokens if token.type not in _LAYOUT)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


@cache
def check_version() -> None:
    """Raise IntegrationError where transformers is missing or older than :data:`FIRST`."""
    supported = f"transformers {'.'.join(map(str, FIRST))} or later 5.x"
    try:
        version = str(importlib.import_module("transformers").__version__)
    except ModuleNotFoundError as missing:
        raise IntegrationError("transformers", "version", "none installed", supported) from missing
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not FIRST <= numbers < (6,):
        raise IntegrationError("transformers", "version", version, supported)


def check_layer(layer: Any, family: Family) -> None:
    """Raise IntegrationError unless ``layer`` does what the stock layer of its family is known to do."""
    methods = {f"{family.layer}.forward": type(layer).forward}
    methods |= {f"{family.layer}.{part}.forward": type(getattr(layer, part)).forward for part in family.parts}
    for name, method in methods.items():
        _check_source(name, method)
    for name, module in layer.named_modules():
        where = f"{type(layer).__name__}{'.' if name else ''}{name}"
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            raise IntegrationError(
                "transformers",
                where,
                "a forward that something else has replaced (hooks of accelerate, a kernel)",
                f"the layer as transformers {LAST} defines it",
                "enable isokern on a model whose weights lie on one device, before other replacements",
            )


@cache
def _check_source(name: str, method: Callable[..., Any]) -> None:
    found = digest(method)
    if found not in KNOWN[name]:
        version = importlib.import_module("transformers").__version__
        raise IntegrationError(
            "transformers",
            name,
            f"another source than the known ones (transformers {version}, {method.__qualname__}, digest {found})",
            f"the layer as in transformers {LAST}",
        )
