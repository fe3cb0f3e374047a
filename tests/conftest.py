"""What every test gets: no network, one thread, a seed on demand. The environment is set before Hugging Face loads."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """Python, NumPy and torch seeded; the seed itself, for generators of the test's own."""
    set_seed(0)
    return 0
