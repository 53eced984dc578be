"""What a shell completes: the values of options, names of the registry, and paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.errors import AdapterkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from click.shell_completion import CompletionItem

    _Choice = click.Choice[Any]
    _ParamType = click.ParamType[Any]
else:
    _Choice = click.Choice
    _ParamType = click.ParamType


class Listed(_ParamType):
    """A text of which the shell knows the usual values.

    Args:
        name: what stands for the value in ``--help``.
        values: gives them, when the shell asks.
    """

    def __init__(self, name: str, values: Callable[[], Iterable[str]]) -> None:
        self.name, self._values = name, values

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(value) for value in self._values() if value.startswith(incomplete)]


class Choice(_Choice):
    """One of some words; of another, the sentence says which of them is meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        from adapterkit.errors import most_like

        said = super().get_invalid_choice_message(value, ctx)
        meant = most_like(str(value), [str(one) for one in self.choices])
        return f"{said.rstrip('.')}. Did you mean '{meant}'?" if meant else said


class Reference(_ParamType):
    """A path, a name of the registry or a Hub id: the shell completes the first two."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name) for name in registered() if name.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, type="file")]


def registered() -> list[str]:
    """The names in the registry; none where there is no registry, or one that cannot be read."""
    from adapterkit.registry.home import open_home

    try:
        return sorted(open_home(None).names())
    except (AdapterkitError, OSError):
        return []


REFERENCE = Reference()
