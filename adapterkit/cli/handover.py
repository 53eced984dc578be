"""The option that writes what serves a GGUF output beside it, shared by the verbs that write one."""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.output import note

for_option = click.option(
    "--for",
    "server",
    type=click.Choice(["ollama", "llama.cpp"]),
    help="Of a GGUF output: write the Modelfile, or llama-server's command, beside it.",
)


def checked(server: str | None, out: Path | None) -> None:
    """Refuse the option for an output that neither serves, before anything is done."""
    if server is not None and (out is None or out.suffix != ".gguf"):
        raise click.UsageError(f"--for {server} is for a GGUF output: name it like OUT.gguf")


def handed(server: str | None, out: Path, source: str) -> None:
    """Write it; ``source`` is the model that the output was made from."""
    if server is None:
        return
    from adapterkit.serving.handover import write_handover

    folder = Path(source).expanduser()
    found = write_handover(out, server, beside=folder if folder.is_dir() else None)
    for text in found.notes:
        note(f"note: {text}")
    start = f"ollama create NAME -f {found.path}" if server == "ollama" else found.path
    note(f"{found.path} written; start it with: {start}")
