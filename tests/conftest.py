import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing downloads anything
torch.set_num_threads(1)  # two threads on two busy cores are many times slower than one


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    """Undo what a test sets: diffusers keeps the attention backend for the whole process."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        yield
