"""The environment that a measurement holds for. Its hash names a directory of the store, so that a changed
environment finds an empty directory instead of wrong entries, and going back finds the old ones again."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from ..errors import ArgumentValueError
from .codec import InvalidRecordError, digest, read
from .compare import Differences, differences
from .silicon import CpuSilicon, CudaSilicon, cuda_driver, cuda_kernel_module, read_cpu, read_cuda

__all__ = ["Environment", "current_environment", "local_environments"]

#: Libraries whose version can change a kernel or its host cost, with the distributions that provide each.
#: A device lists only its own: installing CuPy must not orphan what was tuned for the CPU.
_LIBRARIES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"torch": ("torch",), "numba": ("numba",)},
    "cuda": {
        "torch": ("torch",),
        "triton": ("triton", "pytorch-triton", "triton-windows"),
        "cupy": ("cupy-cuda12x", "cupy-cuda13x", "cupy"),
        "numba": ("numba",),
        "numba-cuda": ("numba-cuda",),
    },
}


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything outside the op and its key that a choice depends on.

    The measurement policy (``eager`` or ``graph``) is deliberately not here: one engine needs both, side by
    side, so it is a field of each entry's key.

    The Python version is here because the ``eager`` policy times the whole call, and between minor versions
    the interpreter's share of a 10 us call moves by more than the tuner's threshold.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        silicon: the processor, without its product name.
        threads: torch's intra-op threads on the CPU; 0 on CUDA, where they decide nothing.
        driver: CUDA version of the user-mode driver; "" on the CPU.
        versions: (library, version) of what is installed and matters on this device, sorted.
        python: ``"3.11"``.
        labels: (name, text) for people: product names, full driver version. In neither hash nor comparison.
        hash: 16 hex digits over all fields but ``labels``.
    """

    device: str
    silicon: CpuSilicon | CudaSilicon
    threads: int
    driver: str
    versions: tuple[tuple[str, str], ...]
    python: str
    labels: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    hash: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        expected = {"cpu": CpuSilicon, "cuda": CudaSilicon}.get(self.device)
        if expected is None or not isinstance(self.silicon, expected):
            raise InvalidRecordError(f"device {self.device!r} with {type(self.silicon).__name__}")
        object.__setattr__(self, "versions", tuple(sorted(self.versions)))
        object.__setattr__(self, "hash", digest(self._identity()))

    def _identity(self) -> dict[str, Any]:
        silicon = dataclasses.asdict(self.silicon)
        if isinstance(self.silicon, CpuSilicon):
            silicon["isa"] = list(self.silicon.isa)  # as JSON gives it back
        return {
            "device": self.device,
            "silicon": silicon,
            "threads": self.threads,
            "driver": self.driver,
            "versions": dict(self.versions),
            "python": self.python,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, labels included."""
        return {**self._identity(), "labels": dict(self.labels)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Environment:
        """The inverse of :meth:`to_dict`.

        Raises:
            InvalidRecordError: a field is missing or of the wrong type.
        """
        device = read(record, "device", str)
        parts = read(record, "silicon", dict)
        silicon: CpuSilicon | CudaSilicon
        if device == "cuda":
            silicon = CudaSilicon(
                read(parts, "capability", str), read(parts, "sm_count", int), read(parts, "memory_gib", int)
            )
        else:
            silicon = CpuSilicon(
                read(parts, "arch", str),
                read(parts, "logical_cores", int),
                tuple(str(flag) for flag in read(parts, "isa", list)),
            )
        return cls(
            device=device,
            silicon=silicon,
            threads=read(record, "threads", int),
            driver=read(record, "driver", str),
            versions=_pairs(record, "versions"),
            python=read(record, "python", str),
            labels=_pairs(record, "labels"),
        )

    def describe(self) -> str:
        """The device in a few words: its product name if it is known, else what tells its silicon apart."""
        product = dict(self.labels).get("product")
        if product:
            return product
        if isinstance(self.silicon, CudaSilicon):
            return f"a CUDA device of capability {self.silicon.capability} with {self.silicon.memory_gib} GiB"
        return f"a {self.silicon.arch} CPU with {self.silicon.logical_cores} logical cores"

    def diff(self, other: Environment) -> Differences:
        """``{"versions.torch": (mine, theirs), ...}`` for each hashed field that differs; empty if equal."""
        return differences(self._identity(), other._identity())


def _pairs(record: dict[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    found = read(record, name, dict)
    return tuple((str(key), read(found, key, str)) for key in sorted(found))


def _labels(**texts: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, text) for name, text in texts.items() if text))


def _installed(device: str) -> tuple[tuple[str, str], ...]:
    """Versions from package metadata: importing the libraries takes seconds and may initialise CUDA."""
    found = {}
    for library, distributions in _LIBRARIES[device].items():
        for distribution in distributions:
            try:
                version = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            # cupy-cuda12x and cupy-cuda13x of one version bring different compilers
            found[library] = version if distribution == library else f"{version} ({distribution})"
            break
    return tuple(sorted(found.items()))


def current_environment(device: str, threads: int | None = None) -> Environment:
    """The environment of this process on ``device``.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the current device) or ``"cuda:N"``.
        threads: torch's intra-op thread count. If None it is asked of torch, which imports it. Ignored on
            CUDA.

    Raises:
        ArgumentValueError: another device string.
        StoreError: no such CUDA device.
    """
    kind, _, index = device.partition(":")
    if kind not in _LIBRARIES or (index and (kind == "cpu" or not index.isdecimal())):
        raise ArgumentValueError("device", "'cpu', 'cuda' or 'cuda:N'", repr(device))
    versions, python = _installed(kind), f"{sys.version_info.major}.{sys.version_info.minor}"
    if kind == "cpu":
        if threads is None:
            import torch

            threads = torch.get_num_threads()
        cpu, model = read_cpu()
        return Environment(kind, cpu, threads, "", versions, python, labels=_labels(product=model))
    cuda, product = read_cuda(int(index) if index else None)
    labels = _labels(kernel_module=cuda_kernel_module(), product=product)
    return Environment(kind, cuda, 0, cuda_driver(), versions, python, labels=labels)


def local_environments() -> tuple[Environment, ...]:
    """The CPU's environment and one per visible CUDA device. Imports torch."""
    import torch

    found = [current_environment("cpu")]
    if torch.cuda.is_available():
        found += [current_environment(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    return tuple(found)
