"""The sources that work ahead of training, by the names that commands and stores use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detpipe.proposals.dense_grid import DenseGrid
from detpipe.proposals.edge_boxes import EdgeBoxes
from detpipe.proposals.from_detector import FromDetector
from detpipe.proposals.image_source import ImageProposals
from detpipe.proposals.opencv_selective_search import OpenCVSelectiveSearch
from detpipe.proposals.selective_search import SelectiveSearch
from detpipe.proposals.superpixels import Superpixels
from detpipe.proposals.union import Union
from detpipe.support.errors import UsageError
from detpipe.support.suggest import did_you_mean

OfflineSource = ImageProposals | DenseGrid | Union
SOURCES: dict[str, Callable[..., ImageProposals | DenseGrid]] = {
    source.name: source
    for source in (SelectiveSearch, OpenCVSelectiveSearch, Superpixels, EdgeBoxes, DenseGrid, FromDetector)
}


def find_class(name: str) -> Callable[..., ImageProposals | DenseGrid]:
    """Find a source by its name, such as "selective_search"; a UsageError lists those that there are."""
    if name not in SOURCES:
        raise UsageError(
            f"unknown proposal source {name!r}: expected one of {', '.join(SOURCES)}, or several joined by +"
            f"{did_you_mean(name, SOURCES)}"
        )
    return SOURCES[name]


def make_source(names: str) -> OfflineSource:
    """Make a source with its default settings, or of several names joined by "+" their union; a UsageError if one is unknown."""
    sources = [find_class(name)() for name in names.split("+")]
    return sources[0] if len(sources) == 1 else Union(sources)


def remake_source(name: str, settings: dict[str, Any]) -> OfflineSource:
    """Make a source again from its name and `settings`, as a store remembers them; a UsageError if that cannot be."""
    try:
        if name == Union.name:
            parts = [remake_source(part["source"], part["settings"]) for part in settings["sources"]]
            return Union(parts, **{key: value for key, value in settings.items() if key != "sources"})
        return find_class(name)(**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be made with the settings {settings}: {error}") from error
