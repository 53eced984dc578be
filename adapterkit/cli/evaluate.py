"""`adapterkit evaluate`"""

from __future__ import annotations

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import note, say, show_json
from adapterkit.requests.evaluate import EvaluateRequest


@command_of(
    EvaluateRequest,
    name="evaluate",
    short_help="Run lm-evaluation-harness on a version, its base and null adapters.",
)
def command(request: EvaluateRequest, as_json: bool) -> None:
    """Measure REF (an adapter, a merged model or a GGUF file) with lm-evaluation-harness, and add the figures to its record.

    Of an adapter, the base is measured with it and without it. Tasks of your own work without a network. A GGUF file's
    values are computed with in transformers, and not in llama.cpp. Needs: pip install 'adapterkit[eval]'.

    \b
    Example:
      adapterkit evaluate my-adapter@3 --tasks tickets --include-path ./tasks --base ./base --null
      adapterkit tag my-adapter@4 prod --require 'acc>base+2se, acc>shuffled'
    """
    from adapterkit.registry.evaluation import sentence
    from adapterkit.verbs.evaluate import evaluate

    given = {name: getattr(request, name) for name in request.named}
    report = evaluate(**given, say=lambda subject: note(f"measuring {subject}"))
    attached = report.attached
    kept = "" if attached is None else attached.ref or str(attached.path)
    if as_json:
        show_json({"ref": report.ref, "attached": kept, "measured": [one.to_json() for one in report.measured]})
        return
    for one in report.measured:
        say(f"{one.key}: {sentence(one)}")
    say(f"{kept} carries these figures" if kept else "these figures were not kept")
