"""What the plan of a merge is asked for; apart from the merge, which most runs need alone."""

from __future__ import annotations

from dataclasses import field

from adapterkit.requests.merge import MergeRequest
from adapterkit.values import dataclass


@dataclass(frozen=True, eq=False, repr=False)
class MergePlanRequest(MergeRequest):
    """A merge to be planned.

    Attributes:
        headers_only: a base or adapter on the Hub is not downloaded, so the plan can be shown but not executed.
        fingerprints: of the inputs, which let `execute` see whether they changed; a plan that is only shown can do
            without.
    """

    headers_only: bool = field(default=True, kw_only=True)
    fingerprints: bool = field(default=True, kw_only=True)
