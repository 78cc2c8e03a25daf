"""The model catalogue: which shapes real models call this op with, on each rank of a tensor-parallel group.

The data is ``models.toml`` beside this file. Reading it is strict: a typing mistake there is a
:class:`CatalogueError` that names the table and the key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from ....errors import CatalogueError, UnknownNameError
from .strict_table import StrictTable

__all__ = ["Confidence", "Dtypes", "Gate", "Model", "Shard", "catalogue", "model", "parse_catalogue"]

_FILE = "models.toml"
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPES = tuple(_FLOAT_BYTES)
_LAYOUTS = ("kv", "vk")


class Gate(StrEnum):
    """What the decay is computed per."""

    GDN = "gdn"  # value head: a is [..., HV], dt_bias [HV]
    KDA = "kda"  # value head and key channel: a is [..., HV, K], dt_bias [HV, K]


class Confidence(StrEnum):
    """How a model's numbers are known."""

    PUBLISHED = "published"
    DERIVED = "derived"


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Dtype names of the op's tensors as an engine passes them, and common overrides of two of them."""

    q: str
    k: str
    v: str
    a: str
    b: str
    A_log: str
    dt_bias: str
    state: str
    dt_bias_alternatives: tuple[str, ...] = ()
    state_alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One layer's call on one rank: a model at tensor-parallel degree ``tp``.

    ``H`` and ``HV`` count this rank's heads; ``K`` and ``V`` are never split. ``linear_layers`` is how many
    such layers the model runs per step, None if unknown.
    """

    model: str
    tp: int
    H: int
    HV: int
    K: int
    V: int
    gate: Gate
    lower_bound: float | None
    allow_neg_eigval: bool
    qk_l2norm: bool
    linear_layers: int | None
    dtypes: Dtypes
    state_layout: str

    @property
    def is_kda(self) -> bool:
        return self.gate is Gate.KDA

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in one layer, in the default state dtype."""
        return self.HV * self.K * self.V * _FLOAT_BYTES[self.dtypes.state]


@dataclass(frozen=True, slots=True)
class Model:
    """One model's linear-attention layers before any split. See ``models.toml`` for what each field means.

    ``tensor_parallel`` lists the degrees that divide both head counts; ``aliases`` are more lower-case names.
    """

    name: str
    title: str
    org: str
    aliases: tuple[str, ...]
    H: int
    HV: int
    K: int
    V: int
    gate: Gate
    lower_bound: float | None
    allow_neg_eigval: bool
    qk_l2norm: bool
    linear_layers: int | None
    dtypes: Dtypes
    state_layout: str
    state_layout_alternatives: tuple[str, ...]
    tensor_parallel: tuple[int, ...]
    source: str
    confidence: Confidence

    def shard(self, tp: int = 1) -> Shard:
        """This model on one of ``tp`` ranks.

        Raises:
            CatalogueError: the head counts do not split ``tp`` ways; the message names the degrees that do.
        """
        if tp not in self.tensor_parallel:
            valid = ", ".join(map(str, self.tensor_parallel))
            raise CatalogueError(
                f"{self.name} cannot be split over {tp} ranks: it has H={self.H} and HV={self.HV} heads; "
                f"valid tensor-parallel degrees: {valid}"
            )
        shared = {f.name: getattr(self, f.name) for f in fields(Shard) if f.name not in ("model", "tp", "H", "HV")}
        return Shard(model=self.name, tp=tp, H=self.H // tp, HV=self.HV // tp, **shared)


@cache
def catalogue() -> Mapping[str, Model]:
    """Every known model by its lower-case name, in the file's order. Read once; the mapping is read-only.

    Raises:
        CatalogueError: the shipped file is invalid.
    """
    return parse_catalogue(files(__package__).joinpath(_FILE).read_text(encoding="utf-8"), _FILE)


def model(name: str) -> Model:
    """The model called ``name``, in any case, with or without its organisation, or by an alias.

    Raises:
        UnknownNameError: no such model; carries near matches.
    """
    models = catalogue()
    wanted = name.strip().lower()
    for entry in models.values():
        names = (entry.name, *entry.aliases)
        if wanted in names or wanted in (f"{entry.org.lower()}/{known}" for known in names):
            return entry
    raise UnknownNameError("model", wanted.rpartition("/")[2] or wanted, models)


def parse_catalogue(text: str, source: str) -> Mapping[str, Model]:
    """The models in a catalogue file's ``text``; ``source`` names the file in messages.

    Raises:
        CatalogueError: not TOML; a key missing, unknown, of the wrong type or impossible; a name used twice.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{source}: not valid TOML: {error}") from error
    top = StrictTable(source, "top level", document)
    degrees = top.list_of("tensor_parallel", int)
    if any(degree < 1 for degree in degrees):
        raise top.invalid("tensor_parallel", "degrees of one or more", degrees)
    defaults = top.take("defaults", dict, {})
    entries = top.take("models", dict)
    top.finish()
    shared = _dtypes_of(source, "defaults", defaults)

    models: dict[str, Model] = {}
    owners: dict[str, str] = {}
    for name, own in entries.items():
        where = f"models.{name}"
        if not isinstance(own, dict):
            raise CatalogueError(f"{source}: [{where}]: expected a table, given {own!r}")
        dtypes = {**shared, **_dtypes_of(source, where, own)}
        table = StrictTable(source, where, {**defaults, **own, "dtypes": dtypes})
        models[name] = _model(name, table, degrees)
        for known in (name, *models[name].aliases):
            if known != known.lower():
                raise CatalogueError(f"{source}: [{where}]: names are lower-case, given {known!r}")
            if known in owners:
                raise CatalogueError(f"{source}: [{where}]: {known!r} already names [models.{owners[known]}]")
            owners[known] = name
    return MappingProxyType(models)


def _dtypes_of(source: str, where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    value = table.get("dtypes", {})
    if not isinstance(value, dict):
        raise CatalogueError(f"{source}: [{where}] dtypes: expected a table, given {value!r}")
    return value


def _model(name: str, table: StrictTable, degrees: tuple[int, ...]) -> Model:
    heads = {key: table.positive(key) for key in ("H", "HV", "K", "V")}
    if heads["HV"] % heads["H"]:
        raise table.invalid("HV", f"a multiple of H={heads['H']}", heads["HV"])
    lower_bound = table.take("lower_bound", float, None)
    if lower_bound is not None and lower_bound >= 0:
        raise table.invalid("lower_bound", "a negative number", lower_bound)
    dtypes = StrictTable(table.source, f"{table.where}.dtypes", table.take("dtypes", dict))
    entry = Model(
        name=name,
        title=table.text("title"),
        org=table.text("org"),
        aliases=table.list_of("aliases", str, ()),
        **heads,
        gate=table.choice("gate", Gate),
        lower_bound=lower_bound,
        allow_neg_eigval=table.take("allow_neg_eigval", bool),
        qk_l2norm=table.take("qk_l2norm", bool),
        linear_layers=table.positive("linear_layers") if table.has("linear_layers") else None,
        dtypes=Dtypes(
            **{key: dtypes.one_of(key, _DTYPES) for key in ("q", "k", "v", "a", "b", "A_log", "dt_bias", "state")},
            dt_bias_alternatives=dtypes.some_of("dt_bias_alternatives", _DTYPES),
            state_alternatives=dtypes.some_of("state_alternatives", _DTYPES),
        ),
        state_layout=table.one_of("state_layout", _LAYOUTS),
        state_layout_alternatives=table.some_of("state_layout_alternatives", _LAYOUTS),
        tensor_parallel=tuple(d for d in degrees if heads["H"] % d == 0 and heads["HV"] % d == 0),
        source=table.text("source"),
        confidence=table.choice("confidence", Confidence),
    )
    dtypes.finish()
    table.finish()
    return entry
