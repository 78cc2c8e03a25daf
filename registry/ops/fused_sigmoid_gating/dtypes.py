"""Names of the dtypes the op knows, and their unit roundoffs."""

from __future__ import annotations

import torch

__all__ = ["FLOAT_DTYPES", "INDEX_DTYPES", "dtype_name", "dtype_of", "smallest_step", "unit_roundoff"]

_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

#: Input and state dtypes. float64 serves gradient checks; only the torch backends take it.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
#: Half the spacing of the subnormals: the largest absolute error of rounding a value near zero.
_SMALLEST = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150, "float64": 2.0**-1075}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``; dtypes the op never accepts keep torch's own text."""
    return _NAMES.get(dtype, str(dtype))


def dtype_of(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``; ValueError for a name the op does not know."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, given {name!r}") from None


def unit_roundoff(name: str) -> float:
    """Largest relative error of rounding to nearest, e.g. 2**-8 for bfloat16."""
    return _ROUNDOFF[name]


def smallest_step(name: str) -> float:
    """Largest absolute error of rounding a subnormal value, e.g. 2**-25 for float16."""
    return _SMALLEST[name]
