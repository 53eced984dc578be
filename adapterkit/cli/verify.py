"""`adapterkit verify`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, count, note, say, show_json
from adapterkit.cli.verification import OWN, check_compared, deliver
from adapterkit.cli.written import foretold
from adapterkit.errors import counted
from adapterkit.requests.verify import VerifyRequest
from adapterkit.requests.workers import WRITTEN_JOBS

if TYPE_CHECKING:
    from adapterkit.verbs.verify.report import VerifyReport


@command_of(VerifyRequest, name="verify", short_help="Prove that a merged model is the trained one.", own=OWN)
def command(request: VerifyRequest, as_json: bool, **asked: Any) -> int:
    """Compare MERGED with BASE and its adapters, tensor by tensor, and say what is wrong by name.

    Every tensor is recomputed and compared in a stream; nothing is loaded whole. Options of the merge are read from the
    adapterkit.json beside MERGED where it has one. The exit code is 3 when MERGED is not what was trained.

    \b
    Example:
      adapterkit verify merged --base meta-llama/Llama-3.2-1B --adapter ./my-adapter
      adapterkit verify merged-Q4_K_M.gguf --base Llama-3.2-1B-F16.gguf --adapter ./my-adapter --html report.html
      adapterkit verify merged --base BASE --adapter ./my-adapter --prompts prompts.txt --max-kl 0.01 --min-top1 0.99
      adapterkit verify s3://models/merged --base s3://models/base --adapter ./my-adapter --on ray --workers 8 -o report.json
    """
    from adapterkit.verbs.verify import verify

    check_compared(asked, request.writes and request.on not in WRITTEN_JOBS)
    with Progress("verifying", enabled=not as_json) as progress:
        named = {name: getattr(request, name) for name in request.named}
        report = verify(**named, progress=progress)
    if report.dry_run:
        _planned(report, request, as_json)
        return 0
    if request.out is not None:
        note(f"report written to {request.out}")
    deliver(report, **asked)
    if as_json:
        show_json(report)
    else:
        show(report)
    return 0 if report.ok else 3


def _planned(report: VerifyReport, request: VerifyRequest, as_json: bool) -> None:
    """What would be compared."""
    if request.save_plan is not None:
        note(f"plan written to {request.save_plan}")
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    say(f"would compare {report.merged} with {report.base} and {', '.join(report.adapters)}")
    foretold(report.forecast)


def show(report: VerifyReport) -> None:
    """The verdict, what is wrong, and the figures."""
    from adapterkit.verbs.verify.summary import distance

    for text in report.notes:
        note(f"note: {text}")
    tensors = report.tensors
    for one in report.findings:
        if one.severity == "note":
            note(f"note: {one.text}")
        else:
            say(f"{one.severity}: {one.kind}: {one.text}{'; ' + one.hint if one.hint else ''}")
    if tensors is not None:
        counts = ", ".join(f"{count(number)} {status}" for status, number in tensors.counts.items())
        say(f"tensors  {counts}; {count(tensors.touched)} of {count(tensors.total)} changed by adapters")
        say(
            f"         cosine {tensors.cosine:.5f} with the change, error beside it {tensors.error:.2g}, "
            f"{tensors.retention:.2%} of it is there (|d|/|W| {tensors.relative:.1e}, unmoved {tensors.unmoved:.1%}), "
            f"{tensors.seconds:.1f} s"
        )
    if report.pair is not None:
        pair = report.pair
        say(
            f"together with {report.residual}: cosine {pair.cosine:.5f}, error {pair.error:.2g}, "
            f"{pair.retention:.2%} of the change is there, {pair.seconds:.1f} s"
        )
    if report.layers is not None:
        layers = report.layers
        say(
            f"layers   outputs off by {layers.error:.1e}, where the adapter changes them by {layers.change:.1e}; "
            f"worst: {layers.worst}"
        )
    if report.model is not None:
        model = report.model
        say(f"model    {counted(model.tokens, 'token')} of {counted(len(model.prompts), 'prompt')} in {model.runtime}")
        say(f"         merged beside base + adapters: {distance(model.merged)}")
        say(f"         base beside base + adapters:   {distance(model.base)}")
        say("         perplexity: " + ", ".join(f"{name} {value:.3f}" for name, value in model.perplexity.items()))
    say(f"{'verified' if report.ok else 'not verified'}: {report.summary}")
