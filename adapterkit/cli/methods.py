"""Options of the combination methods, made from the methods' own signatures.

The table of methods is read when a command line asks for it (by ``--help`` or a name that is not known otherwise): most
merges have one adapter and no method to choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.complete import Choice

if TYPE_CHECKING:
    from adapterkit.ops.rules import CombinationRule, Parameter

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

LINEAR = "linear"
ROUTED = "arrow"
"""What `combine` does without a rule: the adapters stay apart (`adapterkit.verbs.arrow`)."""
_PLAIN = f"{__name__}.plain"  # of a context: this command line has no option of a method


def _table() -> dict[str, CombinationRule]:
    from adapterkit.ops.rules import RULES

    return RULES


class MethodCommand(click.Command):
    """A command that also takes an option for every parameter of every method, but for those in ``taken``.

    With ``combines`` false it has no methods.
    """

    def __init__(self, *args: Any, taken: tuple[str, ...] = (), combines: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plain, self._taken, self._combines = tuple(self.params), taken, combines

    def add_option(self, option: click.Option) -> None:
        """One more option that every command line has."""
        self._plain = (*self._plain, option)
        self.params.append(option)

    def is_of_methods(self, parameter: click.Parameter) -> bool:
        """Whether an option is a parameter of a method, or lists them."""
        return parameter.callback is show_methods or (parameter in self.params and parameter not in self._plain)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {name for parameter in self._plain for name in (*parameter.opts, *parameter.secondary_opts)}
        ctx.meta[_PLAIN] = all(not word.startswith("--") or word.partition("=")[0] in known for word in args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not ctx.meta.get(_PLAIN):
            self._extend()
        return super().get_params(ctx)

    def get_help(self, ctx: click.Context) -> str:
        self._extend()
        return super().get_help(ctx)

    def _extend(self) -> None:
        if self._combines and len(self.params) == len(self._plain):
            self.params = [*self._plain, *_options(self._taken)]


def _options(taken: tuple[str, ...]) -> list[click.Option]:
    owners: dict[str, list[str]] = {}
    parameters: dict[str, Parameter] = {}
    for row in _table().values():
        for parameter in row.parameters:
            if parameter.name not in taken:
                owners.setdefault(parameter.name, []).append(row.name)
                parameters.setdefault(parameter.name, parameter)
    return [_option(parameter, owners[name]) for name, parameter in parameters.items()]


def _option(parameter: Parameter, owners: list[str]) -> click.Option:
    text = f"{parameter.help[0].upper()}{parameter.help[1:]} ({', '.join(owners)})."
    if parameter.type is bool:
        flag = f"{parameter.option}/--no-{parameter.option.removeprefix('--')}"
        return click.Option([flag, parameter.name], default=None, help=text)
    kind: Any = click.Choice(parameter.choices) if parameter.choices else parameter.type
    return click.Option([parameter.option, parameter.name], type=kind, default=None, help=text)


class MethodName(_ParamType):
    """One of the names in the table; ``nested``: of the methods that align adapters for another rule."""

    name = "method"

    def __init__(self, nested: bool = False) -> None:
        self._nested = nested

    def _choice(self) -> click.Choice[str]:
        return Choice([row.name for row in _table().values() if row.nested or not self._nested])

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return "METHOD"  # there are thirty: the help names them, and --methods explains them

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == ROUTED and ctx is not None and ctx.info_name == "combine":
            return value
        return value if value == LINEAR and not self._nested else self._choice().convert(value, param, ctx)


def show_methods(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the table of methods and stop."""
    if not wanted:
        return
    width = max(map(len, _table()))
    for row in _table().values():
        click.echo(f"{row.name:<{width}}  {row.summary}")
        for parameter in row.parameters:
            default = "" if parameter.default is None else f" [{parameter.default}]"
            limits = f", {parameter.range}" if parameter.range is not None else ""
            click.echo(f"{'':<{width}}    {parameter.option}{default}: {parameter.help}{limits}")
        if row.url:
            click.echo(f"{'':<{width}}    {row.url}")
    if context.info_name == "combine":
        click.echo(
            f"{ROUTED:<{width}}  Keep the adapters apart, with the prototypes by which a router chooses for each token."
        )
        click.echo(f"{'':<{width}}    arXiv:2405.11157")
    context.exit(0)


def methods_flag() -> click.Option:
    """``--methods``: list them."""
    return click.Option(
        ["--methods"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show_methods,
        help="List the methods, their parameters and papers, and stop.",
    )


NAMES = MethodName()
SPACES = MethodName(nested=True)
