"""Fixtures that several test folders share."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BROWSER_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """Leave what there is before the first test out of every collection of cycles."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    """Each test starts from the same random state and leaves the cores to its neighbors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """No collection of cycles while the private memory of workers is measured.

    One in this process would write to all its objects; it gets copies then, and what it shared with a worker is the worker's own.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and golden answers that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here: real data sets and golden answers are read in place, never shipped")
    return SHARED


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny demo set lies, or will lie when a command has used it."""
    return tmp_path_factory.mktemp("data") / "demo"


@pytest.fixture(scope="session")
def trained(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny training; read it, do not write to it."""
    import runs

    from detpipe.cli import main

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", runs.CONFIG, "--output", str(folder), *runs.options(demo_root)]) == 0
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real browser for the tests of pages."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        yield opened
        opened.close()
