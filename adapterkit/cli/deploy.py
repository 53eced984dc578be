"""`adapterkit deploy`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.options import was_given
from adapterkit.cli.output import note, say, show_json
from adapterkit.cli.paths import FILE, LocalPath
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.verbs.deployed import DeploymentState

_OF_A_SERVER = ("kind", "base", "copy", "seen_as", "token_env")
_USED = {"off": ("to", "timeout"), "status": ("to",), "add_server": _OF_A_SERVER, "remove_server": ()}
"""What else each of these takes; whatever else was given would be dropped, and is refused."""


def _prompt(text: str) -> str | list[int]:
    """``ids:1,5,17`` as ids of tokens; anything else as it is."""
    if not text.startswith("ids:"):
        return text
    try:
        return [int(word) for word in text[4:].split(",")]
    except ValueError:
        raise UsageError(f"'{text}' holds no ids", "give --probe ids:1,5,17") from None


@click.command(name="deploy", short_help="Bring a running server to what an alias says, and see that it serves it.")
@click.argument("ref", required=False, metavar="[REF]")
@click.option("--to", default="", metavar="URL|NAME", help="The server: its address, or its name in the registry.")
@click.option("--kind", default="", metavar="SERVER", help="What runs there: vllm, sglang, lorax, llama.cpp or tgi.")
@click.option("--base", default="", help="The base that it serves: a registered name, folder, Hub id or GGUF file.")
@click.option(
    "--copy",
    default="",
    type=LocalPath(),
    metavar="DIR",
    help="Copy versions to this folder, which the server can read.",
)
@click.option("--seen-as", default="", metavar="DIR", help="What the server calls that folder, or the registry's.")
@click.option("--token-env", default="", metavar="VARIABLE", help="The environment variable with the server's token.")
@click.option("--probe", default="", metavar="TEXT", help="What to ask it afterwards; ids:1,5,17 for token ids.")
@click.option("--allow-same", is_flag=True, help="Take an answer that is exactly that of the base or the old version.")
@click.option(
    "--canary",
    type=click.FloatRange(0, 1, min_open=True),
    help="The share of requests it gets, where the server routes.",
)
@click.option(
    "--restart-file",
    type=FILE,
    help="Write the script that starts the server with it, if it must be.",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, help="Seconds to load."
)
@click.option("--off", is_flag=True, help="Take the name REF off the server.")
@click.option("--status", is_flag=True, help="Show what runs where, and whether it still does.")
@click.option(
    "--add-server", nargs=2, metavar="NAME URL", help="Name a server, with --kind and what else holds for it."
)
@click.option("--remove-server", default="", metavar="NAME", help="Forget a server; its history stays.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    ref: str | None,
    to: str,
    probe: str,
    allow_same: bool,
    canary: float | None,
    restart_file: Path | None,
    timeout: float,
    off: bool,
    status: bool,
    add_server: tuple[str, str] | None,
    remove_server: str,
    as_json: bool,
    **of_server: Any,
) -> int:
    """Bring a running server to the version that REF means: an alias, a number or a digest.

    First the adapter is held against the server's limits and its base. Then it is loaded under the name NAME@DIGEST, the server
    is asked what it serves, and answers a prompt; what was served before stays until then. Where anything fails, what was
    loaded is unloaded again, and neither the record nor the alias moves.

    Exits with 2 when the command makes no sense, 3 when the adapter does not suit the server, the server refuses it or answers
    as if it were not there, or (with --status) something is not served as it should be; 4 without the right token, 5 when the
    server cannot be reached or not in time, 7 when something does not exist.

    \b
    Example:
      adapterkit deploy --add-server gpu1 http://gpu1:8000 --kind vllm
      adapterkit deploy tickets@prod --to gpu1
      adapterkit deploy --status
    """
    asked = [bool(ref), status, bool(add_server), bool(remove_server)]
    if sum(asked) != 1:
        raise UsageError(
            "deploy does one thing at a time", "give REF, or one of --status, --add-server and --remove-server"
        )
    asked_for = {"off": off, "status": status, "add_server": add_server, "remove_server": remove_server}
    for one in (name for name, given in asked_for.items() if given):
        _only(one, ("ref", "as_json", one, *_USED[one]))
    if status:
        return _status(to, as_json)
    if add_server or remove_server:
        return _servers(add_server, remove_server, of_server, as_json)
    assert ref is not None
    if not to:
        raise UsageError("nobody said which server", "give it with --to: its address, or its name")
    from adapterkit.verbs.deploy import PROBE, deploy, undeploy

    if off:
        found = undeploy(ref.partition("@")[0], to, timeout=timeout)
    else:
        found = deploy(
            ref,
            to,
            probe=_prompt(probe) if probe else PROBE,
            allow_same=allow_same,
            canary=canary,
            restart_file=restart_file,
            timeout=timeout,
            **of_server,
        )
    if as_json:
        show_json(found)
        return 0
    for text in found.notes:
        note(f"note: {text}")
    if off:
        say(f"{found.ref} is no longer served by {found.server}, where it was {found.before}")
        return 0
    before = f", before {found.before}" if found.before and found.before != found.ref else ""
    say(f"{found.server} serves {found.ref} as {found.served}{before}{'' if found.new else ', as it did'}")
    if found.answer:
        say(f"it answered: {' '.join(found.answer.split())[:200]}")
    return 0


def _only(one: str, used: tuple[str, ...]) -> None:
    """
    Raises:
        UsageError: an option was given that has no meaning with ``one``.
    """
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        if name not in used and was_given(context, name):
            raise UsageError(f"{option.opts[0]} has no meaning with --{one.replace('_', '-')}", "leave it out")


def _status(server: str, as_json: bool) -> int:
    from adapterkit.verbs.deployed import status

    found = status(server=server)
    if as_json:
        show_json({"deployments": [{**_fields(one), "ok": one.ok} for one in found]})
    else:
        for one in found:
            alias = f" [{one.alias}]" if one.alias else ""
            moved = f"; {one.alias} is at version {one.alias_version} now" if one.behind and one.alias_version else ""
            gone = f"; the alias {one.alias} was taken off" if one.behind and not one.alias_version else ""
            why = f" ({one.said})" if one.said else ""
            say(f"{one.server}  {one.ref}{alias}  {one.state}{why}{moved}{gone}  since {one.at} by {one.by}")
        if not found:
            note("nothing is deployed")
    return 0 if all(one.ok for one in found) else 3


def _fields(one: DeploymentState) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(one)


def _servers(add: tuple[str, str] | None, remove: str, of_server: dict[str, Any], as_json: bool) -> int:
    from adapterkit.verbs.deploy import add_server, remove_server

    if add:
        endpoint = add_server(add[0], add[1], **of_server)
        if as_json:
            show_json(endpoint)
        else:
            say(f"{endpoint.name} is {endpoint.kind} at {endpoint.url}")
        return 0
    changed = remove_server(remove)
    if as_json:
        show_json({"name": remove, "changed": changed})
    else:
        say(f"{remove} is forgotten" if changed else f"{remove} was not known")
    return 0
