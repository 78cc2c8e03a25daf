"""Hopper's products run on by themselves: ptxas neither waits after each of them nor moves their accumulators."""

from __future__ import annotations

import pytest

from isokern.backends.cupy.resources import compiler_log
from isokern.backends.cupy_chunked.backend import CupyChunked, CupyChunkedBf16
from isokern.backends.cupy_chunked.compiling import source, target
from isokern.backends.cupy_chunked.configs import configs, cut_configs
from isokern.backends.cupy_chunked.resources import problems
from isokern.backends.cupy_chunked.specialization import Specialization


@pytest.mark.parametrize("backend", [CupyChunked, CupyChunkedBf16])
@pytest.mark.parametrize("warps", [4, 8])
def test_products_of_four_warps_are_not_serialised(backend: type[CupyChunked], warps: int) -> None:
    problem = problems(90)["bf16 vk"]
    config = next(c for c in configs(problem, backend.pieces) if c["group"] and c["warps"] == warps)
    special = Specialization.of(problem, config, backend.pieces)
    log = compiler_log(source("scan"), "scan.cu", special.options("scan", wide=True), target("scan", special, 90))
    assert "Used" in log  # it is the report that would say so
    assert "serialized" not in log
    assert "warpgroup.wait is injected" not in log


@pytest.mark.parametrize("backend", [CupyChunked, CupyChunkedBf16])
@pytest.mark.parametrize("local", [4, 8])
def test_nor_are_those_of_segments(backend: type[CupyChunked], local: int) -> None:
    problem = problems(90)["bf16 vk"]
    config = next(c for c in cut_configs(problem, backend.pieces) if c["group"] and c["local"] == local)
    special = Specialization.of(problem, config, backend.pieces)
    log = compiler_log(source("local"), "scan.cu", special.options("local", wide=True), target("local", special, 90))
    assert "Used" in log
    assert "serialized" not in log
    assert "warpgroup.wait is injected" not in log
