"""`verify`: proof that a merged model is the trained one.

Four levels, each as deep as asked: *load* lets transformers build the model that MERGED's folder is, without weights;
*tensors* recomputes every weight from base and adapters and compares, without a model; *layers* feeds the same inputs
through base with adapters and through MERGED, one module at a time; *model* lets both answer prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.ops.device import check_there
from adapterkit.requests.call import takes
from adapterkit.requests.verify import LEVELS, VerifyRequest
from adapterkit.verbs.verify.report import Finding, VerifyReport

if TYPE_CHECKING:
    from adapterkit.places import Address
    from adapterkit.verbs.verify.in_parts import VerifyJob


@takes(VerifyRequest)
def verify(request: VerifyRequest) -> VerifyReport:
    """Whether MERGED is the base with these adapters folded in.

    Options of the merge that are not named are taken from the record beside MERGED, where there is one.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, UsageError, UnsafeError, AuthError, HubError
    """
    from adapterkit.verbs.verify.opened import opened

    started = time.monotonic()
    if request.planned:
        from adapterkit.verbs.verify.in_parts import carried_out

        return carried_out(request, opened(request), started)
    check_there(request.device)
    made = opened(request)
    judged = made.compared(request.jobs, request.progress) if made.by_tensors else ()
    return made.report(judged, started, request.jobs, request.progress)


def replan(data: Mapping[str, Any], out: Path | Address | None) -> VerifyJob:
    """The comparison of a saved plan, planned again."""
    from adapterkit.verbs.verify.in_parts import VerifyJob
    from adapterkit.verbs.verify.opened import opened

    given = {name: value for name, value in data.items() if name in VerifyRequest.options()}
    request = VerifyRequest.bound({**given, "out": out})
    return VerifyJob(opened(request), request.target)


def html(report: VerifyReport, *, command: str = "", when: str = "") -> str:
    """The evidence as one page; see `adapterkit.verbs.verify.page`."""
    from adapterkit.verbs.verify.page import html as page

    return page(report, command=command, when=when)


def markdown(report: VerifyReport) -> str:
    """The evidence as a summary for a job; see `adapterkit.verbs.verify.summary`."""
    from adapterkit.verbs.verify.summary import markdown as summary

    return summary(report)


__all__ = ["LEVELS", "Finding", "VerifyReport", "verify"]
