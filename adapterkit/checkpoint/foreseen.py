"""What a job will ask of object stores, from its plan: the numbers of a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.stores.meter import Moved

if TYPE_CHECKING:
    from typing import Any


def foreseen(job: Any) -> Moved:
    return Moved()
