"""Options of the combination methods, made from the methods' own signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.ops.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.ops.methods import Parameter


def method_options(command: Callable[..., Any], taken: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Add an option for every parameter of every method but those ``taken``; what is not given stays out of the call."""
    owners: dict[str, list[str]] = {}
    parameters: dict[str, Parameter] = {}
    for row in METHODS.values():
        for parameter in row.parameters:
            if parameter.name not in taken:
                owners.setdefault(parameter.name, []).append(row.name)
                parameters.setdefault(parameter.name, parameter)
    for name, parameter in reversed(parameters.items()):
        command = _option(parameter, owners[name])(command)
    return command


def _option(parameter: Parameter, owners: list[str]) -> Any:
    text = f"{parameter.help[0].upper()}{parameter.help[1:]} ({', '.join(owners)})."
    if parameter.type is bool:
        flag = f"{parameter.option}/--no-{parameter.option.removeprefix('--')}"
        return click.option(flag, parameter.name, default=None, help=text)
    kind: Any = click.Choice(parameter.choices) if parameter.choices else parameter.type
    return click.option(parameter.option, parameter.name, type=kind, default=None, help=text)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The parameters that were given."""
    return {name: value for name, value in options.items() if value is not None}


def show_methods(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the table of methods and stop."""
    if not wanted:
        return
    width = max(map(len, METHODS))
    for row in METHODS.values():
        click.echo(f"{row.name:<{width}}  {row.summary}")
        for parameter in row.parameters:
            default = "" if parameter.default is None else f" [{parameter.default}]"
            limits = f", {parameter.range}" if parameter.range is not None else ""
            click.echo(f"{'':<{width}}    {parameter.option}{default}: {parameter.help}{limits}")
        if row.url:
            click.echo(f"{'':<{width}}    {row.url}")
    context.exit(0)


def methods_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--methods``: list them."""
    return click.option(
        "--methods",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show_methods,
        help="List the methods, their parameters and papers, and stop.",
    )(command)


NAMES = click.Choice(list(METHODS))
SPACES = click.Choice([row.name for row in METHODS.values() if row.nested])
