"""Objects that are followed from frame to frame, by the library trackers (extra ``track``).

Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box", 2022, arXiv 2110.06864.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from detpipe.support.errors import UsageError
from detpipe.types import Detection


class Tracker:
    """Follow the objects of one video.

    Args:
        rate: frames a second, by which it is decided how long a lost object is looked for.

    Raises:
        UsageError: the library is not installed.
    """

    def __init__(self, rate: float) -> None:
        try:
            import supervision
            from trackers import ByteTrackTracker  # pyright: ignore[reportMissingImports] (an extra apart)
        except ImportError as error:
            raise UsageError(f"--track needs trackers ({error}): pip install 'detpipe[track]'") from error
        self._detections = supervision.Detections
        self._tracker = ByteTrackTracker(frame_rate=rate)

    def follow(self, found: Detection, seconds: float) -> list[int | None]:
        """Tell which track each detection of the next frame belongs to, from 1 on; None for one that is not followed (yet)."""
        rows = np.arange(len(found["scores"]))
        given: Any = self._detections(
            xyxy=found["boxes"].numpy().astype(np.float64),
            confidence=found["scores"].numpy().astype(np.float64),
            class_id=found["labels"].numpy(),
            data={"row": rows},
        )
        known = self._tracker.update(given, timestamp=seconds)
        tracks: list[int | None] = [None] * len(rows)
        if len(known):  # an answer without detections lacks the columns too
            for row, track in zip(known.data["row"].tolist(), known.tracker_id.tolist(), strict=True):
                tracks[row] = track + 1 if track >= 0 else None
        return tracks
