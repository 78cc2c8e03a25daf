"""Launches the kernel up to the driver: Triton's own launch path, compiling for sm_90, on a machine without a GPU.

Not a test module: it puts a stand-in for the driver into Triton, so ``test_triton_launch`` runs it in a process of its
own. Prints, as JSON, how many kernels each series of launches compiled.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from isokern.backends.triton.configs import configs
from isokern.backends.triton.kernel import recurrent
from isokern.backends.triton.launcher import Launcher
from isokern.backends.triton.resources import PROBLEMS, problem_of
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial


class NoGpu:
    """What Triton asks a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True


_PACKED, _TREE = PROBLEMS["prompts vk"], PROBLEMS["tree vk"]
_BATCH = _PACKED.but(varlen=False)
SERIES = {
    "lengths and their number": [_PACKED.but(lengths=n) for n in ((9, 4), (16,), (1, 7, 33, 2, 2), (32,) * 3, (1,))],
    "slots": [_PACKED, _PACKED.but(extra_slots=40), _PACKED.but(padded=(1,))],
    "batches": [_BATCH.but(lengths=n) for n in ((3, 3), (16, 16), (1,), (5, 5, 5))],
    "trees": [_TREE.but(lengths=n) for n in ((9, 4), (15, 4), (16,), (1, 3))],
    "dtypes": [_PACKED, _PACKED.but(index_dtype="int64")],
}


def main():
    driver.set_active(NoGpu())
    launch = recurrent.run
    kernels = []

    def compile_only(*args, grid, warmup, **kwargs):
        kernels.append(launch(*args, grid=grid, warmup=True, **kwargs))

    recurrent.run = compile_only
    compiled = {}
    for name, specs in SERIES.items():
        kernels.clear()
        config = configs(problem_of(specs[0]))[0]
        for spec in specs:
            Launcher.of(problem_of(spec), config)(Trial.of(spec).call)
        assert not any(kernel.metadata.enable_fp_fusion for kernel in kernels)
        compiled[name] = len({kernel.hash for kernel in kernels})
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
