"""Names that still work and will go: one row each, one sentence, and a test that knows them all.

A row says since when a name is old and in which version it goes. `tools/release_check.py` refuses to release that version while
the row, and with it the old name, is still there.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Deprecation:
    """A name that has a new one.

    Attributes:
        since: the version that had both for the first time.
        removed: the version that will not have the old one any more.
    """

    old: str
    new: str
    since: str
    removed: str

    @property
    def sentence(self) -> str:
        """What is told to whoever uses the old name."""
        return f"{self.old} is now {self.new}; the old name goes in {self.removed}"


DEPRECATIONS: dict[str, Deprecation] = {
    row.old: row
    for row in (
        Deprecation("adapterkit.MergeOptions", "adapterkit.MergeRequest", "0.1.0", "0.3.0"),
        Deprecation("adapterkit.ConvertOptions", "adapterkit.ConvertRequest", "0.1.0", "0.3.0"),
        Deprecation("python -m adapterkit.folders", "python -m adapterkit.lint", "0.1.0", "0.3.0"),
    )
}


def deprecated(old: str, *, stacklevel: int = 2) -> str:
    """Warn whoever called the caller that a name is old; the new name.

    Args:
        old: a name of the table.
        stacklevel: of `warnings.warn`, counted from the caller.

    Raises:
        KeyError: the table does not have the name: every old name has its row.
    """
    row = DEPRECATIONS[old]
    warnings.warn(row.sentence, DeprecationWarning, stacklevel=stacklevel + 1)
    return row.new
