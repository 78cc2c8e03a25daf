"""Launcher: a bound runner over machine code. A call is packed once; repeated, it costs addresses and one driver call.

Several GPUs: a runner serves tensors on any device of the architecture it was bound for. Kernels are loaded onto a
device when a call for it is first pinned; a launch makes the tensors' device current if it is not.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import lru_cache, partial

import torch

from ...errors import BackendFailedError, NotPreparedError
from ...registry.backend import Config, Pinned
from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from . import forks
from .compiler import Compiler, Layout, Variant
from .driver import Driver, DriverError, Kernel, gpu
from .image import Image
from .pinned import Prepared, pinned, step_of

__all__ = ["MOST_PINNED", "Launcher", "Runner"]

_OP = "fused_sigmoid_gating"
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
#: Forms kept for calls that come unpinned; beyond, the oldest go.
MOST_PINNED = 64


class Runner(ABC):
    """A bound runner that keeps the forms of calls it has seen. Safe to call from several threads and streams."""

    def __init__(self) -> None:
        self._forms: dict[Hashable, Pinned] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def prepared(self, call: Call) -> Prepared:
        """The launches of calls like ``call``. Compiles and loads what ``call`` itself needs; keeps no tensor of it."""

    def pin(self, call: Call) -> Pinned:
        """The form for calls like ``call``: its launches on torch's current stream."""
        return pinned(self.prepared(call), _OP)

    def __call__(self, call: Call) -> torch.Tensor:
        """Launch on torch's current stream of the tensors' device. An output that is not given is allocated."""
        out = call.out
        if out is None:
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
            call = call.replace(out=out)
        key = _kind(call)
        run = self._forms.get(key)
        if run is None:
            run = self.pin(call)
            with self._lock:
                if len(self._forms) >= MOST_PINNED:
                    del self._forms[next(iter(self._forms))]
                self._forms[key] = run
        run(tuple([getattr(call, name) for name in TENSORS]))
        return out


class Launcher(Runner):
    """The bound runner of one problem and config: one launch.

    ``runner(call)`` finds the form pinned to such calls, or pins one; ``runner.pin(call)`` gives that form (see
    ``registry.backend.Pinnable``).

    Attributes:
        backend, problem, config: what it was bound to.
        compiler: says how a call's arguments lie, and makes the machine code.

    Raises:
        BackendFailedError: from the constructor and from calls; a failed call has written nothing. Stages: ``compile``
            (in the compiler's words), ``load`` and ``launch`` (in the driver's).
        NotPreparedError: something would have to be compiled or loaded while a CUDA graph is captured.
        ForkedProcessError: in a child of a process that had loaded kernels.
    """

    def __init__(
        self, backend: str, problem: Problem, config: Config, compiler: Compiler, driver: Driver | None = None
    ) -> None:
        super().__init__()
        self.backend, self.problem, self.config, self.compiler = backend, problem, config, compiler
        self._kernels: dict[Variant, Kernel] = {}
        self._refuse_forked()
        try:
            self._driver = gpu() if driver is None else driver
        except (OSError, RuntimeError) as error:
            raise self._failed("load", str(error)) from error
        for variant in compiler.expected():
            self._ahead(variant)

    def prepared(self, call: Call) -> Prepared:
        layout = self.compiler.layout(call)
        if 0 in layout.grid:
            return Prepared((), 0, call.q.device, self._driver)
        if any(blocks > most for blocks, most in zip(layout.grid, _LARGEST_GRID, strict=True)):
            raise self._failed("launch", "more blocks than a grid holds", layout)
        device = call.q.device.index

        def kernel(aligned: bool) -> Kernel:
            return self._kernel(Variant(layout.key, aligned), device)

        vectors = [getattr(call, TENSORS[index]) for index in layout.vectors]
        kernel(layout.wide and all(t.data_ptr() % 16 == 0 for t in vectors))
        step = step_of(layout, device, self._driver, kernel, partial(self._failed, "launch", layout=layout))
        return Prepared((step,), 0, call.q.device, self._driver)

    def _ahead(self, variant: Variant) -> None:
        """Load onto the current device, if it is one that the code is for: calls may have their tensors on another."""
        kernel = self._known(variant)
        try:
            kernel.prepare(self._driver.device())
        except DriverError as error:
            if not error.image_refused:  # else a call with tensors there says so
                raise self._unloadable(kernel, error) from error

    def _kernel(self, variant: Variant, device: int | None) -> Kernel:
        """The loaded kernel, ready on ``device``."""
        kernel = self._kernels.get(variant)
        if kernel is not None and kernel.ready(device):
            return kernel
        kernel = self._known(variant)
        try:
            kernel.prepare(device)
        except DriverError as error:
            raise self._unloadable(kernel, error) from error
        return kernel

    def _known(self, variant: Variant) -> Kernel:
        """The kernel, compiled and read by the driver."""
        self._refuse_forked()
        if self._driver.capturing():
            raise NotPreparedError(_OP, self.backend, self.config.label, self.problem.label)
        with self._lock:
            kernel = self._kernels.get(variant) or self._loaded(variant)
            self._kernels[variant] = kernel
        return kernel

    def _unloadable(self, kernel: Kernel, error: DriverError) -> BackendFailedError:
        image = kernel.image
        needs = f"{image.threads} threads and {image.shared} bytes of dynamic shared memory per block"
        return self._failed("load", f"{error} (the kernel takes {needs})")

    def _loaded(self, variant: Variant) -> Kernel:
        image = self._image(variant)
        try:
            return _load(self._driver, image)
        except DriverError as error:
            again = self._image(variant, fresh=True) if error.image_refused else image
            if again == image:
                raise self._failed("load", str(error)) from error
        try:  # the file was wrong
            return _load(self._driver, again)
        except DriverError as error:
            raise self._failed("load", str(error)) from error

    def _image(self, variant: Variant, fresh: bool = False) -> Image:
        try:
            return self.compiler.image(variant, fresh)
        except self.compiler.errors() as error:
            raise self._failed("compile", f"{type(error).__name__}: {error}") from error

    def _refuse_forked(self) -> None:
        if forks.process.forked:
            raise forks.error(_OP)

    def _failed(self, stage: str, message: str, layout: Layout | None = None) -> BackendFailedError:
        where = "" if layout is None else "grid {}x{}x{}: ".format(*layout.grid)
        return BackendFailedError(_OP, self.backend, self.config.label, self.problem.label, stage, where + message)


@lru_cache(maxsize=1024)
def _load(driver: Driver, image: Image) -> Kernel:
    """One handle per kernel, however many problems it serves."""
    return Kernel(driver, image)


def _kind(call: Call) -> Hashable:
    """What a layout follows from: equal for calls that one form serves.

    Of shapes only those that a problem leaves open: the rest of a tensor's shape is in no kernel's parameters.
    """
    tensors = [None if (t := getattr(call, name)) is None else (t.stride(), t.dtype) for name in TENSORS]
    sizes = (call.q.shape, call.v.shape, call.n, None if call.parents is None else call.parents.shape)
    flags = (call.state_layout, call.use_qk_l2norm, call.is_kda, call.allow_neg_eigval)
    scalars = (call.scale, call.softplus_beta, call.softplus_threshold, call.lower_bound)
    return (*tensors, sizes, flags, scalars, call.q.device)
