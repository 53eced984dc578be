"""`adapterkit register`"""

from __future__ import annotations

import click

from adapterkit.cli.output import note, say, show_json, size


def pairs(given: tuple[str, ...]) -> dict[str, str]:
    """``KEY=VALUE`` options as a mapping."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"'{text}' is not KEY=VALUE", param_hint="--meta")
        found[key] = value
    return found


@click.command(name="register", short_help="Add a folder or file to the registry, as a new version of a name.")
@click.argument("path")
@click.option("--name", required=True, help="The name to register it under: a-z, 0-9, '.', '_' and '-'.")
@click.option("--base", metavar="REF", help="The base it was trained on or made from; identified by its weights.")
@click.option("--base-id", default="", metavar="ORG/NAME", help="The Hub id of a base that is a local folder.")
@click.option("--kind", default="", help="adapter, merged, combined, quantized, converted or base; else as told by it.")
@click.option("--method", default="", help="How it was made, like lora or Q4_K_M; else as its config tells.")
@click.option("--meta", multiple=True, metavar="KEY=VALUE", help="Free text to keep with it: run, dataset, licence ...")
@click.option("--full", is_flag=True, help="Read every byte of the base for the strongest identity.")
@click.option("--new-version", is_flag=True, help="Add a version even if nothing changed.")
@click.option("--link", is_flag=True, help="Hard links instead of copies; the files become read-only.")
@click.option("--ignore-record", is_flag=True, help="Do not use the adapterkit.json beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def command(
    path: str,
    name: str,
    base: str | None,
    base_id: str,
    kind: str,
    method: str,
    meta: tuple[str, ...],
    full: bool,
    new_version: bool,
    link: bool,
    ignore_record: bool,
    as_json: bool,
) -> None:
    """Add PATH to the registry as a version of NAME; the same files again give the version that exists.

    The registry is a folder, $ADAPTERKIT_HOME or one in your data folder. With --kind base, PATH may be a Hub id, and only
    its identity is kept.

    \b
    Example:
      adapterkit register ./my-adapter --name my-adapter --base meta-llama/Llama-3.2-1B --meta dataset=tickets-v3
      adapterkit merge meta-llama/Llama-3.2-1B my-adapter@1 -o merged
    """
    from adapterkit.provenance.register import register

    found = register(
        path,
        name,
        base=base,
        base_id=base_id,
        kind=kind,
        method=method,
        meta=pairs(meta),
        full=full,
        new_version=new_version,
        link=link,
        ignore_record=ignore_record,
    )
    record = found.record
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
    say(f"{record.ref}: {about}, {len(record.files)} files, {size(record.size)}{base_said}; {state}")
