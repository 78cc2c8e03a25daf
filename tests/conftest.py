"""Shared by all tests."""

from __future__ import annotations

import torch

# The tensors are small: handing them to several threads costs more than it brings, above all on a busy machine.
# Tests about threads set their own number.
torch.set_num_threads(1)
