"""Near matches for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest what a misspelt name could have been, or return an empty string where nothing known is near.

    Example:
        >>> did_you_mean("reducton", ["reduction", "depth"])
        "; did you mean 'reduction'?"
    """
    known = list(known)
    same = [other for other in known if other.lower() == name.lower()]  # but for capitals
    near = same or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
