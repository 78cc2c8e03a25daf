"""The numbers, flags and names of a call as one word, which a torch operator takes in the time of one argument.

    softplus_beta=1.0 softplus_threshold=20.0 use_qk_l2norm_in_kernel state_layout=vk max_seqlen=8 backend=triton

Fields in this order, as the op's arguments are named: flags that are off and arguments that are None are left out,
numbers are written as Python writes them, so that they come back exactly. Each call has one such word, and no other is
read. Graphs are saved with these words: what one release writes later ones must read.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from torch.compiler import is_dynamo_compiling

from ....errors import ArgumentValueError

__all__ = ["Settings", "parse_settings", "settings_of"]

_LAYOUTS = ("kv", "vk")
_WORD = re.compile(
    r"softplus_beta=(\S+) softplus_threshold=(\S+)(?: scale=(\S+))?( use_qk_l2norm_in_kernel)? state_layout=(kv|vk)"
    r"( is_kda)?(?: lower_bound=(\S+))?( allow_neg_eigval)?(?: max_seqlen=(\S+))?(?: backend=(.*))?",
    re.DOTALL,  # a backend's name is the rest, whatever is in it
)


class Settings(NamedTuple):
    """What of a call is no tensor, as the op's ``__call__`` takes it; a tuple, since it is unpacked in every call."""

    softplus_beta: float
    softplus_threshold: float
    scale: float | None
    use_qk_l2norm_in_kernel: bool
    state_layout: str
    is_kda: bool
    lower_bound: float | None
    allow_neg_eigval: bool
    max_seqlen: int | None
    backend: str | None


def settings_of(
    softplus_beta: float,
    softplus_threshold: float,
    scale: float | None,
    use_qk_l2norm_in_kernel: bool,
    state_layout: str,
    is_kda: bool,
    lower_bound: float | None,
    allow_neg_eigval: bool,
    max_seqlen: int | None,
    backend: str | None,
) -> str | None:
    """The word for these arguments; None where one is no constant of Python's own types: a number that a compiled
    graph takes as an input, say. ``torch.compile`` may trace this.
    """
    for number in (softplus_beta, softplus_threshold, scale, lower_bound):
        if number is not None and (type(number) is not float or not _is_constant(number)):
            return None
    if max_seqlen is not None and (type(max_seqlen) is not int or not _is_constant(max_seqlen)):
        return None
    flags: tuple[object, ...] = (use_qk_l2norm_in_kernel, is_kda, allow_neg_eigval)
    for flag in flags:
        if type(flag) is not bool:
            return None
    if softplus_beta is None or softplus_threshold is None or state_layout not in _LAYOUTS:
        return None  # for the op to refuse
    if backend is not None and type(backend) is not str:
        return None
    word = f"softplus_beta={softplus_beta} softplus_threshold={softplus_threshold}"
    if scale is not None:
        word += f" scale={scale}"
    if use_qk_l2norm_in_kernel:
        word += " use_qk_l2norm_in_kernel"
    word += f" state_layout={state_layout}"
    if is_kda:
        word += " is_kda"
    if lower_bound is not None:
        word += f" lower_bound={lower_bound}"
    if allow_neg_eigval:
        word += " allow_neg_eigval"
    if max_seqlen is not None:
        word += f" max_seqlen={max_seqlen}"
    if backend is not None:
        word += f" backend={backend}"
    return word


def _is_constant(number: float) -> bool:
    """Whether a float or an int is one: while dynamo traces, inputs of the graph have these types too."""
    if not is_dynamo_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


@lru_cache(maxsize=256)
def parse_settings(settings: str) -> Settings:
    """The arguments that ``settings_of`` made this word of; the same objects each time, as the hot path likes them.

    Raises:
        ArgumentValueError: it is not a word that ``settings_of`` writes.
    """
    found = _WORD.fullmatch(settings)
    if found is not None:
        beta, threshold, scale, l2norm, layout, kda, bound, neg_eigval, longest, backend = found.groups()
        try:
            made = Settings(
                float(beta),
                float(threshold),
                None if scale is None else float(scale),
                l2norm is not None,
                layout,
                kda is not None,
                None if bound is None else float(bound),
                neg_eigval is not None,
                None if longest is None else int(longest),
                backend,
            )
        except ValueError:
            pass  # no number: refused below, like numbers that are not written as Python writes them
        else:
            if settings_of(*made) == settings:
                return made
    expected = "the word for a call's numbers, flags and names, as torch_settings.py writes it"
    raise ArgumentValueError("settings", expected, repr(settings))
