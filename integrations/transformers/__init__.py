"""isokern in models of transformers: one line turns it on, one line off.

    from isokern.integrations.transformers import enable
    enable(model)

Nothing global is changed: the forward of each linear-attention layer is replaced on that layer. docs/integrations.md
says what is served.
"""

from __future__ import annotations

from typing import Any

from ... import registry
from ...errors import IntegrationError, UnknownNameError
from .families import FAMILIES, Family, family_of
from .stock import check_layer, check_version

__all__ = ["disable", "enable"]

_OP = "fused_sigmoid_gating"


def enable(model_or_module: Any, *, backend: str | None = None) -> tuple[str, ...]:
    """Run every linear-attention layer of a model, or of a part of one, on isokern. Enabling again changes ``backend``.

    Args:
        model_or_module: a torch module of transformers: a model, or any module in one, a single layer included.
        backend: name of the backend to force; None leaves the choice to the registry.

    Returns:
        The names of the layers that now run on isokern, as ``named_modules()`` has them.

    Raises:
        IntegrationError: the installed version of transformers, or of a layer, is not known; something else has
            replaced a layer's forward; or there is no linear-attention layer. Nothing has been changed.
        UnknownNameError: no backend of that name. Nothing has been changed.
    """
    if backend is not None and backend not in registry.backends(_OP):
        raise UnknownNameError("backend", backend, registry.backends(_OP))
    check_version()
    from .forward import LayerForward
    from .packed import Layouts

    found = _layers(model_or_module)
    if not found:
        kinds = sorted({type(module).__name__ for module in model_or_module.modules()} - _plain_names())
        known = ", ".join(f"{family.layer} ({family.module})" for family in FAMILIES)
        raise IntegrationError("transformers", "layers", ", ".join(kinds[:16]) or "none of transformers' own", known)
    for _, layer, family in found:
        if not isinstance(vars(layer).get("forward"), LayerForward):
            check_layer(layer, family)
    layouts = Layouts()
    for _, layer, family in found:
        layer.forward = LayerForward(layer, family, backend, layouts)
    return tuple(name for name, _, _ in found)


def disable(model_or_module: Any) -> tuple[str, ...]:
    """Give every layer its own forward back. Returns the names of those that ran on isokern."""
    check_version()
    from .forward import LayerForward

    names = []
    for name, module in model_or_module.named_modules():
        if isinstance(vars(module).get("forward"), LayerForward):
            del module.forward
            names.append(name)
    return tuple(names)


def _layers(model: Any) -> list[tuple[str, Any, Family]]:
    return [(name, m, family) for name, m in model.named_modules() if (family := family_of(m)) is not None]


def _plain_names() -> set[str]:
    import torch

    return set(torch.nn.__dict__)
