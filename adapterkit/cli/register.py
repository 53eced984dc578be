"""`adapterkit register`"""

from __future__ import annotations

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import file_count, note, say, show_json, size
from adapterkit.requests.register import RegisterRequest


@command_of(
    RegisterRequest, name="register", short_help="Add a folder or file to the registry, as a new version of a name."
)
def command(request: RegisterRequest, as_json: bool) -> None:
    """Add PATH to the registry as a version of NAME; the same files again give the version that exists.

    The registry is a folder, $ADAPTERKIT_HOME or one in your data folder. With --kind base, PATH may be a Hub id, and only
    its identity is kept.

    \b
    Example:
      adapterkit register ./my-adapter --name my-adapter --base meta-llama/Llama-3.2-1B --meta dataset=tickets-v3
      adapterkit merge meta-llama/Llama-3.2-1B my-adapter@1 -o merged
    """
    from adapterkit.provenance.register import register

    found = register(**{name: getattr(request, name) for name in request.named})
    record = found.record
    for text in found.warnings:
        note(f"warning: {text}")
    if as_json:
        left = list(found.skipped)
        show_json(
            {"ref": record.ref, "new": found.new, "stored": found.stored, "left_out": left, "record": record.to_json()}
        )
        return
    if found.skipped:
        note(f"note: left out: {', '.join(found.skipped[:8])}{' ...' if len(found.skipped) > 8 else ''}")
    about = " ".join(part for part in (record.kind, record.method) if part)
    base_said = f", base {record.base.label}" if record.base else ""
    state = f"{size(found.stored)} stored" if found.new else "was there already"
    if found.new and (dropped := sum(file.size for file in record.files if not file.stored)) and record.kind != "base":
        state += f", {size(dropped)} kept as the recipe"
    say(f"{record.ref}: {about}, {file_count(len(record.files))}, {size(record.size)}{base_said}; {state}")
