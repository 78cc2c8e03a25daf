"""SGLang's Triton kernel for the same op, if it is there to be measured. Nothing of it is part of this package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["NAME", "load"]

#: What its rows are called.
NAME = "sgl_triton"
_MODULE = "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent"
_FUNCTION = "fused_sigmoid_gating_delta_rule_update"


def load(folder: Path) -> Callable[[Call], torch.Tensor]:
    """Its op from the package ``sglang`` in ``folder``, taking our calls (layout vk only).

    Raises ImportError if it is not there.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    update: Callable[..., torch.Tensor] = getattr(importlib.import_module(_MODULE), _FUNCTION)

    def launch(call: Call) -> Any:
        return update(
            call.A_log,
            call.a,
            call.dt_bias,
            call.softplus_beta,
            call.softplus_threshold,
            call.q,
            call.k,
            call.v,
            call.b,
            call.pool,
            call.read_slots,
            use_qk_l2norm_in_kernel=call.use_qk_l2norm,
            cu_seqlens=call.cu_seqlens,
        )

    return launch
