"""What only a CUDA device can show; where there is none, all of it is skipped.

python -m pytest tests -m cuda        these, and what tests/ runs on both kinds of device
"""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.fixture
def little_memory(cuda):
    """Let this process have so many bytes of the device at most."""
    total = torch.cuda.get_device_properties(cuda).total_memory

    def limit(nbytes):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(nbytes / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
