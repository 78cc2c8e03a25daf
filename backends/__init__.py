"""Implementations. Nothing here is imported before the registry loads an op's backends."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["BUILTIN_BACKENDS"]

#: Backends that come with isokern, by op, as ``module:class``; loading one imports no optional framework.
BUILTIN_BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fused_sigmoid_gating": (
            "isokern.backends.torch_native.backends:TorchReference",
            "isokern.backends.torch_native.backends:TorchVectorized",
            "isokern.backends.torch_native.backends:TorchChunked",
            "isokern.backends.numba_cpu.backend:NumbaCpu",
            "isokern.backends.triton.backend:Triton",
            "isokern.backends.cupy.backend:Cupy",
            "isokern.backends.numba_cuda.backend:NumbaCuda",
            "isokern.backends.cupy_chunked.backend:CupyChunked",
            "isokern.backends.cupy_chunked.backend:CupyChunkedBf16",
            "isokern.backends.cupy_chunked.backend:CupyCut",
            "isokern.backends.cupy_chunked.backend:CupyCutBf16",
            "isokern.backends.triton_chunked.backend:TritonChunked",
            "isokern.backends.composite.backend:Composite",
            "isokern.backends.composite.backend:CompositeBf16",
            "isokern.backends.external.fla:FlaRecurrent",
            "isokern.backends.external.fla:FlaChunk",
            "isokern.backends.external.flashinfer:FlashInferDecode",
            "isokern.backends.external.flashinfer:FlashInferMtp",
            "isokern.backends.external.flashinfer:FlashInferPrefill",
            "isokern.backends.external.flashqla:FlashQla",
            "isokern.backends.external.sglang:SglangTriton",
            "isokern.backends.external.sglang:SglangCuteDsl",
            "isokern.backends.external.sglang:SglangChunk",
        ),
    }
)
