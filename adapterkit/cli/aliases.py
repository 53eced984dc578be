"""`adapterkit tag`, `adapterkit untag`, `adapterkit remove`"""

from __future__ import annotations

import click

from adapterkit.cli.output import say, show_json

_EXPECT = "Only if it is at this version now (0: nowhere)."


@click.command(name="tag", short_help="Point an alias such as prod to a version.")
@click.argument("ref")
@click.argument("alias")
@click.option("--expect", type=click.IntRange(0), help=_EXPECT)
@click.option("--history", "show_history", is_flag=True, help="Show every move of the alias, and move nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def tag(ref: str, alias: str, expect: int | None, show_history: bool, as_json: bool) -> None:
    """Point ALIAS to the version that REF means, in one step, with history.

    Exits with 3 when it is somewhere else than --expect says.

    \b
    Example:
      adapterkit tag my-adapter@3 prod
      adapterkit tag my-adapter@4 prod --expect 3
    """
    from adapterkit.registry import verbs
    from adapterkit.registry.refs import ANY

    if show_history:
        moves = verbs.history(ref.partition("@")[0], alias)
        if as_json:
            show_json([{"version": move.version, "digest": move.digest, "at": move.at} for move in moves])
            return
        for move in moves:
            say(f"{move.at}  {f'version {move.version}' if move.version else 'taken off'}")
        return
    found = verbs.tag(ref, alias, expected=ANY if expect is None else expect)
    if as_json:
        show_json(found)
        return
    before = f", before at version {found.before}" if found.before and found.moved else ""
    say(f"{found.name}@{found.alias} is version {found.version}{before}{'' if found.moved else ', as it was'}")


@click.command(name="untag", short_help="Take an alias off.")
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=click.IntRange(1), help="Only if it is at this version now.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def untag(name: str, alias: str, expect: int | None, as_json: bool) -> None:
    """Take ALIAS off NAME; its history stays. Exits with 7 when there is no such alias.

    \b
    Example:
      adapterkit untag my-adapter staging
    """
    from adapterkit.registry import verbs
    from adapterkit.registry.refs import ANY

    found = verbs.untag(name, alias, expected=ANY if expect is None else expect)
    if as_json:
        show_json(found)
    else:
        say(f"{found.name}@{found.alias} was taken off version {found.before}")


@click.command(name="remove", short_help="Take a version out of sight, or bring it back.")
@click.argument("ref")
@click.option("--reason", default="", help="Why; kept with the mark.")
@click.option("--restore", is_flag=True, help="Bring a removed version back into sight.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def remove(ref: str, reason: str, restore: bool, as_json: bool) -> None:
    """Take REF out of sight. Nothing is deleted until gc is asked to; until then --restore brings it back.

    \b
    Example:
      adapterkit remove my-adapter@2 --reason "trained on the wrong split"
      adapterkit remove my-adapter@2 --restore
    """
    from adapterkit.registry import verbs

    found = verbs.restore(ref) if restore else verbs.remove(ref, reason=reason)
    if as_json:
        show_json(found)
        return
    state = "back in sight" if restore else "out of sight"
    say(f"{found.name}@{found.version} is {state}{'' if found.changed else ', as it was'}")
