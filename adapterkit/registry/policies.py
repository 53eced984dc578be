"""Policies that a registry keeps: for an alias of one name, or (``*``) for that alias of every name. Both hold together.

A policy is kept with its history, as who changed it is as telling as who moved the alias.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.registry import chain, evaluation, figures, refs, store
from adapterkit.registry.figures import Figure
from adapterkit.registry.gathered import base_evidence, gathered
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.names import check_alias, check_name
from adapterkit.registry.policy import CURRENT, judge, parse_policy, require_held
from adapterkit.registry.record import Record
from adapterkit.registry.refs import Gate, Move

EVERY = "*"


@dataclass(frozen=True)
class KeptPolicy:
    """A policy as it is kept: for ``name`` (or ``*``) and ``alias``; an empty ``text`` asks for nothing."""

    name: str
    alias: str
    text: str
    at: str
    by: str
    why: str


def keep_policy(
    name: str, alias: str, text: str, *, why: str = "", by: str = "", home: Path | None = None
) -> KeptPolicy:
    """Keeps what an alias asks for from now on; an empty text takes the policy off.

    Raises:
        UsageError: a condition cannot be read.
    """
    at = open_home(home)
    path = _path(at, name, alias)
    if text:
        parse_policy(text)
    entry = chain.append(at, path, {"name": name, "alias": alias, "text": text}, by=by or chain.who(), why=why)
    return KeptPolicy(name, alias, text, entry.at, entry.by, entry.why)


def kept_policies(name: str, alias: str, *, home: Path | None = None) -> tuple[KeptPolicy, ...]:
    """What counts for an alias now: the policy for every name first, then that of its own."""
    found = []
    for scope in dict.fromkeys((EVERY, name)):
        history = policy_history(scope, alias, home=home)
        if history and history[-1].text:
            found.append(history[-1])
    return tuple(found)


def policy_history(name: str, alias: str, *, home: Path | None = None) -> tuple[KeptPolicy, ...]:
    """Every policy that was kept for a name (or ``*``) and alias, oldest first.

    Raises:
        RegistryError: what is kept is damaged.
    """
    at = open_home(home)
    return tuple(
        KeptPolicy(**one.said, at=one.at, by=one.by, why=one.why) for one in chain.read_chain(_path(at, name, alias))
    )


def read_policy(text: str) -> str:
    """Conditions as they were given: themselves, or the name of a file (text with a condition a line, or TOML with a list
    ``require``).

    Raises:
        UsageError: the file is no policy.
    """
    path = Path(text).expanduser()
    if any(sign in text for sign in "=<>") or not text.strip():
        return text
    from adapterkit.disk import read_regular

    data = read_regular(path, 1 << 20, f"the policy {path}").decode("utf-8", "replace")
    if path.suffix != ".toml":
        return "\n".join(line for line in (part.partition("#")[0].strip() for part in data.splitlines()) if line)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        value = tomllib.loads(data)
    except (ValueError, RecursionError) as error:  # a number of many digits is no TOML error
        raise UsageError(f"{path} is not TOML ({error})", 'write require = ["verification=held"]') from None
    found = value.get("require")
    if value.keys() != {"require"} or not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UsageError(f"{path} holds not exactly a list 'require'", 'write require = ["verification=held"]')
    return "\n".join(found)


def gate_of(home: Home, record: Record, alias: str, extra: str = "") -> Gate | None:
    """What decides whether an alias of ``record``'s name may move to it: kept policies and ``extra`` conditions; None
    where nothing is asked.

    The policies are read when the gate is asked, under the alias's lock.

    Raises:
        UsageError: a condition of ``extra`` cannot be read.
    """
    asked = parse_policy(extra) if extra.strip() else ()
    if not asked and not (home.root / "policies").is_dir():
        return None

    known: dict[str, Record] = {}
    with suppress(AdapterkitError):  # the gate tells
        # Records are read before the lock, where nobody waits; under it only what was added meanwhile.
        if asked or kept_policies(record.name, alias, home=home.root):
            known_figures(home, record, refs.get(home, record.name, alias), known)

    def gate(now: Move | None) -> Sequence[str]:
        kept = kept_policies(record.name, alias, home=home.root)
        conditions = [one for policy in kept for one in parse_policy(policy.text)] + list(asked)
        if not conditions:
            return ()
        own, others = known_figures(home, record, now, known)
        ref = record.ref or record.name
        return require_held(ref, f"{record.name}@{alias}", judge(conditions, own, others))

    return gate


def known_figures(
    home: Home, record: Record, now: Move | None, known: dict[str, Record] | None = None
) -> tuple[list[Figure], dict[str, Sequence[Figure] | None]]:
    """The figures of a version and of what it may be held against; None for an alias that points to nothing.

    Args:
        known: records by digest that need not be read again; what is read is added.
    """
    evidence = gathered(home, record, known)
    others: dict[str, Sequence[Figure] | None] = {
        subject: figures.figures(evidence, subject) for subject in evaluation.SUBJECTS if subject != evaluation.SELF
    }
    measured = {one.name for one in others[evaluation.BASE] or ()}
    of_base = figures.figures(base_evidence(home, record))
    others[evaluation.BASE] = [*(others[evaluation.BASE] or ()), *(one for one in of_base if one.name not in measured)]
    others[CURRENT] = None
    if now is not None:
        before = store.load_known(home, now.name, now.version)
        others[CURRENT] = figures.figures(gathered(home, before, known))
    return figures.figures(evidence), others


def _path(at: Home, name: str, alias: str) -> Path:
    scope = "_" if name == EVERY else check_name(name)
    return at.root / "policies" / f"{scope}@{check_alias(alias)}"
