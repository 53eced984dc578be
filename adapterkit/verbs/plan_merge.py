"""`plan_merge`: a merge that is planned, and can be looked at before it is carried out."""

from __future__ import annotations

from dataclasses import replace

from adapterkit.requests.call import takes
from adapterkit.requests.merge_plan import MergePlanRequest
from adapterkit.verbs.merge import Merge, planned
from adapterkit.verbs.pinned import pinned_plan


@takes(MergePlanRequest)
def plan_merge(request: MergePlanRequest) -> Merge:
    """Plan a merge from headers alone.

    With ``headers_only`` a base or adapter on the Hub is not downloaded, so the plan can be shown but not executed.
    ``fingerprints`` of the inputs let `execute` see whether they changed.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, UsageError, UnsafeError, AuthError, HubError
    """
    made = planned(request, headers_only=request.headers_only, fingerprints=request.fingerprints)
    if not request.fingerprints:
        return made
    plan = pinned_plan(made.plan, made.sources)
    return replace(made, output=replace(made.output, plan=plan))
