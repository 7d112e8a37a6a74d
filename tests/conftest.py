"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    """Each test starts from the same random state and leaves the cores to its neighbors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and golden answers that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here: real data sets and golden answers are read in place, never shipped")
    return SHARED
