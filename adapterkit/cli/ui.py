"""`adapterkit ui`"""

from __future__ import annotations

import gc

import click

from adapterkit.cli.output import note, say, show_json


@click.command(name="ui", short_help="Look at the registry in a browser.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=None, help="Default: 8484, or any free one if it is taken."
)
@click.option("--open", "open_", is_flag=True, help="Open it in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print the address as JSON.")
def command(port: int | None, open_: bool, as_json: bool) -> None:
    """Serve the registry as read-only pages on this machine (127.0.0.1) until interrupted.

    Versions by base, aliases, lineage, fidelity and verification, and the command to use each. Nothing is changed and
    nothing is fetched from elsewhere.

    \b
    Example:
      adapterkit ui --open
    """
    from adapterkit.errors import OutputError
    from adapterkit.ui.server import PORT, PageServer

    try:
        server = PageServer(PORT if port is None else port)
    except OutputError:
        if port is not None:
            raise
        server = PageServer(0)
    with server:
        if as_json:
            show_json({"url": server.url, "home": str(server.home.root)})
        else:
            say(server.url)
            note(f"the registry in {server.home.root}; Ctrl+C stops")
        if open_:
            import webbrowser

            if not webbrowser.open(server.url):
                note("no browser could be opened; go to the address yourself")
        # What lives long must look for garbage more often than a verb that builds a plan (see `adapterkit.cli.ending.run`).
        gc.set_threshold(1_000, 10, 10)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            note("stopped")
