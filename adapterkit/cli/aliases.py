"""`adapterkit tag`, `adapterkit policy`, `adapterkit untag`, `adapterkit remove`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import say, show_json
from adapterkit.errors import counted

if TYPE_CHECKING:
    from adapterkit.registry.refs import Move

_EXPECT = "Only if it is at this version now (0: nowhere)."


_WHY = "Why; kept with the move."


@click.command(name="tag", short_help="Point an alias such as prod to a version, if what is asked for holds.")
@click.argument("ref")
@click.argument("alias")
@click.option(
    "--require", default="", metavar="CONDITIONS", help="Only if these hold, beside the policy of the alias; or a file."
)
@click.option("--why", default="", metavar="TEXT", help=_WHY)
@click.option("--expect", type=click.IntRange(0), help=_EXPECT)
@click.option("--dry-run", is_flag=True, help="Say whether the conditions hold, and move nothing.")
@click.option("--rollback", is_flag=True, help="Take the last move of the alias back; REF is the name alone.")
@click.option("--history", "show_history", is_flag=True, help="Show every move of the alias, and move nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def tag(
    ref: str,
    alias: str,
    require: str,
    why: str,
    expect: int | None,
    dry_run: bool,
    rollback: bool,
    show_history: bool,
    as_json: bool,
) -> None:
    """Point ALIAS to the version that REF means, in one step, with history.

    A condition compares a figure with a number, a word, or the same figure of base, zeros, shuffled (null adapters) or
    current (where the alias is now): acc>=0.7, acc>=base-0.01, acc>shuffled+2se, tickets/acc[lang=de]>=0.6, acc[*]>=0.5 for
    every slice, acc.n>=200, kl<=0.02, verification=held. What was never measured does not hold.

    Exits with 3 when a condition does not hold, or when the alias is somewhere else than --expect says.

    \b
    Example:
      adapterkit tag my-adapter@3 prod --require 'verification=held, acc>=base-0.01, kl<=0.02' --why "tickets of May"
      adapterkit tag my-adapter@4 prod --expect 3
      adapterkit tag my-adapter prod --rollback --why "it answers in Latin"
      adapterkit tag my-adapter prod --history
    """
    from adapterkit.registry import verbs
    from adapterkit.registry.policies import read_policy
    from adapterkit.registry.refs import ANY

    if sum((rollback, show_history, dry_run)) > 1:
        raise click.UsageError("--rollback, --history and --dry-run are three different things; give one.")
    if (rollback or show_history) and require:
        raise click.UsageError(f"--require does not go with {'--rollback' if rollback else '--history'}.")
    if rollback and "@" in ref:
        raise click.UsageError("--rollback takes the name alone: the history says which version was there before.")
    expected = ANY if expect is None else expect
    if show_history:
        moves = verbs.history(ref.partition("@")[0], alias)
        if as_json:
            keys = ("version", "digest", "at", "by", "why", "held", "undoes")
            show_json([{key: getattr(move, key) for key in keys} for move in moves])
            return
        for before, move in zip((None, *moves), moves, strict=False):
            _say_move(move, before.version if before is not None else 0)
        return
    if rollback:
        found = verbs.rollback(ref, alias, expected=expected, why=why)
    else:
        found = verbs.tag(ref, alias, expected=expected, why=why, require=read_policy(require), dry_run=dry_run)
    if as_json:
        show_json(found)
        return
    for sentence in found.held:
        say(f"holds: {sentence}")
    if dry_run:
        say(f"{found.name}@{found.version} may become {found.alias}; nothing was moved")
        return
    before_said = f", before at version {found.before}" if found.before and found.moved else ""
    say(f"{found.name}@{found.alias} is version {found.version}{before_said}{'' if found.moved else ', as it was'}")


def _say_move(move: Move, before: int) -> None:
    what = f"version {move.version}" if move.version else "taken off"
    came = f" (from {before})" if before and move.version else ""
    back = " by rollback" if move.undoes else ""
    held = f"; {counted(len(move.held), 'condition')} held" if move.held else ""
    say(f"{move.at}  {what}{came}{back}{f', {move.by}' if move.by else ''}{f': {move.why}' if move.why else ''}{held}")


@click.command(name="policy", short_help="Keep what an alias asks of a version before it may point there.")
@click.argument("name")
@click.argument("alias")
@click.option("--require", default="", metavar="CONDITIONS", help="Ask for these from now on; or a file with them.")
@click.option("--clear", is_flag=True, help="Ask for nothing more.")
@click.option("--why", default="", metavar="TEXT", help="Why; kept with the change.")
@click.option("--history", "show_history", is_flag=True, help="Show every policy that was kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def policy(name: str, alias: str, require: str, clear: bool, why: str, show_history: bool, as_json: bool) -> None:
    """Show or change what ALIAS of NAME asks for; a NAME of '*' is that alias of every name. Conditions are those of tag.

    The file is text with one condition a line, or TOML with a list `require`. The policy for every name and that of a name
    hold together. A rollback asks nobody.

    \b
    Example:
      adapterkit policy my-adapter prod --require 'verification=held, acc>=base-0.01, acc>shuffled'
      adapterkit policy '*' prod --require gate.toml --why "release rules of May"
      adapterkit policy my-adapter prod
    """
    from adapterkit.registry import policies
    from adapterkit.registry.policy import parse_policy

    if clear and require:
        raise click.UsageError("--require and --clear contradict each other; give one.")
    if clear or require:
        policies.keep_policy(name, alias, "" if clear else policies.read_policy(require), why=why)
    if show_history:
        found = policies.policy_history(name, alias)
    elif name == policies.EVERY:
        found = policies.policy_history(name, alias)[-1:]
    else:
        found = policies.kept_policies(name, alias)
    if as_json:
        show_json([one.__dict__ for one in found])
        return
    if not any(one.text for one in found) and not show_history:
        say(f"{name}@{alias} asks for nothing")
        return
    for one in found:
        said = f"{f', {one.by}' if one.by else ''}{f': {one.why}' if one.why else ''}"
        say(f"{one.name}@{one.alias} since {one.at}{said}")
        for condition in parse_policy(one.text) if one.text else ():
            say(f"  {condition.text}")
        if not one.text:
            say("  nothing")


@click.command(name="untag", short_help="Take an alias off.")
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=click.IntRange(1), help="Only if it is at this version now.")
@click.option("--why", default="", metavar="TEXT", help=_WHY)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def untag(name: str, alias: str, expect: int | None, why: str, as_json: bool) -> None:
    """Take ALIAS off NAME; its history stays. Exits with 7 when there is no such alias.

    \b
    Example:
      adapterkit untag my-adapter staging
    """
    from adapterkit.registry import verbs
    from adapterkit.registry.refs import ANY

    found = verbs.untag(name, alias, expected=ANY if expect is None else expect, why=why)
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
