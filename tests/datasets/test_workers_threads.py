from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from detpipe.datasets import workers
from detpipe.datasets.annotations import check_pixels
from detpipe.datasets.faults import Faults
from detpipe.datasets.workers import look_at_images

from .builders import picture


@pytest.fixture
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)


@pytest.mark.usefixtures("_two_cores")
def test_the_filters_of_warnings_are_left_alone() -> None:
    both, turn = threading.Barrier(2), threading.Lock()
    first: list[int] = []

    def look(_: int) -> None:
        """Two at a time: the first to come leaves while the second is still inside."""
        with turn:
            first.append(len(first))
            early = len(first) % 2 == 1
            context = warnings.catch_warnings()
            context.__enter__()
            warnings.simplefilter("ignore")
        both.wait(10)
        if early:
            context.__exit__(None, None, None)
        both.wait(10)
        if not early:
            context.__exit__(None, None, None)

    before = list(warnings.filters)
    assert list(look_at_images(look, range(10))) == [None] * 10
    assert list(warnings.filters) == before


@pytest.mark.usefixtures("_two_cores")
def test_results_come_in_order_whoever_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_AT_ONCE", 4)  # more images than are asked for at once
    threads = set()

    def look(row: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.01 * (row % 3 == 0))
        return row * row

    assert list(look_at_images(look, range(3, 21))) == [row * row for row in range(3, 21)]
    assert len(threads) == 2
    assert list(look_at_images(look, [])) == []


@pytest.mark.usefixtures("_two_cores")
def test_an_error_that_nobody_expects_comes_through() -> None:
    def look(row: int) -> int:
        return 1 // (row - 5)

    with pytest.raises(ZeroDivisionError):
        list(look_at_images(look, range(10)))


def test_faults_are_noted_in_the_order_of_the_images(tmp_path: Path) -> None:
    """Row 23, 25: whichever thread meets them first."""
    paths = [tmp_path / f"{row}.jpg" for row in range(40)]
    for row, path in enumerate(paths):
        picture(10 + (row % 5 == 1), 12).save(path)
        if row % 7 == 3:
            path.write_bytes(path.read_bytes()[:100])
    faults = Faults("collect")
    found = check_pixels(range(2, 40), lambda row: (paths[row], None), faults, np.tile([10, 12], (40, 1)))
    bad = [row for row in range(2, 40) if row % 7 == 3 or row % 5 == 1]
    assert found == bad
    assert [f"{row}.jpg" in fault.message for row, fault in zip(bad, faults.found, strict=True)] == [True] * len(bad)
    kinds = ["images: unreadable" if row % 7 == 3 else "images: size differs from the annotation" for row in bad]
    assert [fault.kind for fault in faults.found] == kinds
