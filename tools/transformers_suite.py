"""The transformers package's own common tests of its linear-attention models, with isokern enabled in every model.

    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    python tools/transformers_suite.py transformers-5.23.0 [--stock] [-- pytest arguments]

Takes the unpacked source distribution of the installed version, which ships the tests that all its models share (what
it leaves out, the models' own files and the generation and export mixins, is not run). ``--stock`` leaves isokern out:
what fails then too is not ours. Needs parameterized.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["main", "pytest_configure"]

HERE = Path(__file__).resolve()

#: Small models of every family, written for the suite's ModelTesterMixin.
TESTS = """
import unittest

import torch
import transformers

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

SHARED = dict(
    vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    layer_types=["linear_attention", "full_attention"],
)
GDN = dict(head_dim=16, linear_key_head_dim=8, linear_value_head_dim=16, linear_num_key_heads=2,
           linear_num_value_heads=4, linear_conv_kernel_dim=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
OLMO = {k: v for k, v in GDN.items() if k != "head_dim"}
KIMI = dict(linear_head_dim=8, linear_num_heads=4, linear_conv_kernel_dim=2, kv_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MODELS = {
    "Qwen3Next": ("Qwen3NextConfig", "Qwen3NextModel", "Qwen3NextForCausalLM", {**GDN, **MOE}),
    "Qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5TextModel", "Qwen3_5ForCausalLM", GDN),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeTextModel", "Qwen3_5MoeForCausalLM", {**GDN, **MOE}),
    "OlmoHybrid": ("OlmoHybridConfig", "OlmoHybridModel", "OlmoHybridForCausalLM", OLMO),
    "KimiLinear": ("KimiLinearConfig", "KimiLinearModel", "KimiLinearForCausalLM", KIMI),
}


class Small:
    batch_size, seq_length, is_training, num_hidden_layers = 3, 13, True, 2
    hidden_size, num_attention_heads = 32, 2

    def __init__(self, parent, config_class, extra):
        self.parent, self.config_class, self.extra = parent, config_class, extra

    def get_config(self):
        return self.config_class(**SHARED, **self.extra)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 99)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def suite(name, config, base, causal, extra):
    class Suite(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (getattr(transformers, base), getattr(transformers, causal))
        all_generative_model_classes = ()
        has_attentions = False
        test_resize_embeddings = True

        def setUp(self):
            self.model_tester = Small(self, getattr(transformers, config), extra)

        def _get_conv_state_shape(self, batch_size, config):
            if hasattr(config, "linear_num_heads"):
                channels = 3 * config.linear_num_heads * config.linear_head_dim
            else:
                channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim
                channels += config.linear_num_value_heads * config.linear_value_head_dim
            return (batch_size, channels, config.linear_conv_kernel_dim)

    Suite.__name__ = Suite.__qualname__ = f"{name}Test"
    return Suite


for name, entry in MODELS.items():
    globals()[f"{name}Test"] = suite(name, *entry)
"""

#: Modules that the shared tests import and the source distribution leaves out.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
}


def pytest_configure(config: Any) -> None:
    """As a pytest plugin: each model enables isokern at the end of its construction."""
    if os.environ.get("ISOKERN_SUITE_STOCK"):
        return
    from transformers import PreTrainedModel

    from isokern.integrations.transformers import enable
    from isokern.integrations.transformers.families import family_of

    stock = PreTrainedModel.post_init

    def post_init(self: Any) -> None:
        stock(self)
        if any(family_of(module) is not None for module in self.modules()):
            enable(self)

    PreTrainedModel.post_init = post_init


def main(arguments: list[str]) -> int:
    """Run the tests; returns pytest's exit status."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    ours, theirs = arguments[:cut], arguments[cut + 1 :]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if "--stock" in ours:
        ours.remove("--stock")
        environment["ISOKERN_SUITE_STOCK"] = "1"
    if len(ours) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        tests = Path(scratch, "tests")
        shutil.copytree(Path(ours[0], "tests"), tests)
        for name, text in {"__init__.py": "", "test_isokern.py": TESTS, **STUBS}.items():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(text)
            (tests / name).parent.joinpath("__init__.py").touch()
        command = [sys.executable, "-m", "pytest", "-p", HERE.stem, "-q", "tests/test_isokern.py", *theirs]
        return subprocess.run(command, cwd=scratch, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
