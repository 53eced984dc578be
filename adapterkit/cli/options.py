"""Click commands made from requests: every field of a request is an argument or an option, with its group in ``--help``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from adapterkit.cli.complete import REFERENCE, Choice, Listed
from adapterkit.cli.methods import NAMES, SPACES, MethodCommand, methods_flag
from adapterkit.cli.paths import FILE, FILE_THERE, OUT_THERE
from adapterkit.requests.option import (
    CLI,
    FLAG,
    INPUT,
    NUMBER,
    OUTPUT_THERE,
    PATH,
    REF,
    SWITCH,
    WHOLE,
    Option,
    Request,
    default_of,
    flag_of,
)

if TYPE_CHECKING:
    from dataclasses import Field

Callback = Callable[..., Any]
FIRST = "Needed first"
# The order of the headings in --help; what has none comes first.
GROUPS = (
    *(FIRST, "", "Output", "Combining", "Adapters", "Base", "GGUF types", "Thresholds", "Models", "Tasks"),
    *("Evidence", "Record", "Beside the output", "Workers", "Run"),
)
_TYPED = {"method": NAMES, "space": SPACES}


class RequestCommand(MethodCommand):
    """A command whose options are the fields of a request.

    Its callback gets ``request`` and what options it has of its own.
    """

    def __init__(self, *args: Any, request: type[Request], own: Sequence[click.Parameter] = (), **kwargs: Any) -> None:
        made, self._fields = _parameters(request)
        params = [*made, *own]
        taken = tuple(name for name in request.options() if name != "parameters")
        combines = "parameters" in request.options()
        super().__init__(*args, params=params, taken=taken, combines=combines, **kwargs)
        self._request = request
        self._own = frozenset(parameter.name for parameter in own)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; of an adapter without its base, an option that is missing or one of another tool, say what is meant."""
        alone = next((word for word in args if not word.startswith("-")), "")
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            if error.param is not None and error.param.name == "adapters" and _is_adapter(alone):
                message = (
                    f"{alone} is an adapter; its base comes first: adapterkit {ctx.info_name} {_base_of(alone)} {alone}"
                )
                raise click.UsageError(message, ctx) from None
            example = _example(str(ctx.info_name), alone)
            if example and isinstance(error.param, click.Option):
                said = error.format_message().rstrip(".")
                raise click.UsageError(f"{said}; as in: {example}", ctx) from None
            raise
        except click.NoSuchOption as error:
            from adapterkit.cli.foreign import option_for

            said = option_for(self, error.option_name)
            if said:
                raise click.UsageError(f"No such option '{error.option_name}'. {said}", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Make the request of what was given, and call the callback with it."""
        given = dict(ctx.params)
        own = {name: given.pop(name) for name in list(given) if name in self._own}
        named = {name: value for name, value in given.items() if was_given(ctx, name)}
        request = self._request.bound(_by_field(self._request, self._fields, named))
        ctx.params = {**own, "request": request}
        here = getattr(request, "writes", False) and getattr(request, "on", None) is None
        if here and not getattr(request, "without_torch", False):
            from adapterkit.ops.early import map_torch

            map_torch()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = self._request.options()
        rows: dict[str, list[tuple[str, str]]] = {}
        leading: dict[str, tuple[str, str]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                first = self._fields.get(parameter.name or "", ("",))[0]
                known = options.get(first)
                if known is not None and callable(known.choices):
                    record = (record[0], f"{record[1]} One of {', '.join(known.values())}.")
                group = known.group if known is not None else self._group_of(parameter)
                if first in self._request.FIRST:
                    leading[first] = record
                    continue
                rows.setdefault(group, []).append(record)
        if leading:
            rows[FIRST] = [leading[name] for name in self._request.FIRST if name in leading]
        for group in sorted(rows, key=lambda name: GROUPS.index(name) if name in GROUPS else len(GROUPS)):
            with formatter.section(group or "Options"):
                formatter.write_dl(rows[group])

    def _group_of(self, parameter: click.Parameter) -> str:
        """Options that are no fields: parameters of methods, and those about the command itself."""
        return "Combining" if self.is_of_methods(parameter) else "Run"


def command(
    request: type[Request], *, name: str, short_help: str, own: Sequence[click.Parameter] = (), json: bool = True
) -> Callable[[Callback], click.Command]:
    """Make a command of a function of ``request``.

    Args:
        own: options of the command line alone, which the function gets by their names.
        json: add ``--json``, which the function gets as ``as_json``.
    """
    beside = list(own)
    if json:
        beside.append(click.Option(["--json", "as_json"], is_flag=True, help="Print the report as JSON."))

    def decorate(function: Callback) -> click.Command:
        return RequestCommand(
            name=name, callback=function, help=function.__doc__, short_help=short_help, request=request, own=beside
        )

    return decorate


def _is_adapter(word: str) -> bool:
    return bool(word) and (Path(word).expanduser() / "adapter_config.json").is_file()


def _example(verb: str, word: str) -> str:
    """A whole line of the verb for what a word names, where it is a folder or file; empty where none is usual."""
    from adapterkit.cli.look import look
    from adapterkit.errors import AdapterkitError

    try:
        lines = look(word)[1] if word and Path(word).expanduser().exists() else []
    except (AdapterkitError, OSError):
        lines = []
    return next((line for line in lines if line.startswith(f"adapterkit {verb} ")), "")


def _base_of(word: str) -> str:
    """The base that an adapter names, as a word of a command line."""
    import shlex

    from adapterkit.adapters.load import load_adapter
    from adapterkit.errors import AdapterkitError

    try:
        return shlex.quote(load_adapter(word, headers_only=True).config.base or "BASE")
    except AdapterkitError:
        return "BASE"


def was_given(ctx: click.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _by_field(
    request: type[Request], fields: Mapping[str, tuple[str, ...]], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Values by field. A flag that stands for several fields goes to those for which it means something."""
    found: dict[str, Any] = {}
    options = request.options()
    for name, value in named.items():
        if name not in fields:
            found[name] = value  # a parameter of a method
            continue
        meant = [one for one in fields[name] if any(need in named for need in options[one].needs)]
        for one in meant if len(fields[name]) > 1 and meant else fields[name]:
            found[one] = value
    return found


def _parameters(request: type[Request]) -> tuple[list[click.Parameter], dict[str, tuple[str, ...]]]:
    """The parameters of a request, and the fields that each of them stands for."""
    made: list[click.Parameter] = []
    fields: dict[str, tuple[str, ...]] = {}
    flags: dict[str, str] = {}
    for name, option in request.options().items():
        if CLI in option.elsewhere:
            continue
        one = request._fields()[name]
        flag = option.flag or flag_of(name)
        if flag in flags:
            fields[flags[flag]] = (*fields[flags[flag]], name)
            continue
        if option.role == INPUT and not option.flag and not option.short:
            made.append(_argument(name, option, one))
        else:
            made.append(_option(name, option, one, flag))
            flags[flag] = name
        fields[name] = (name,)
    if "method" in request.options():
        at = next(i for i, parameter in enumerate(made) if parameter.name == "method")
        made.insert(at + 1, methods_flag())
    return made, fields


def _argument(name: str, option: Option, one: Field[Any]) -> click.Argument:
    required = _required(one)
    if option.many:
        word = f"{name.upper().removesuffix('S')}..."
        return click.Argument([name], nargs=-1, required=required, metavar=word, type=REFERENCE)
    return click.Argument([name], required=required, type=REFERENCE)


def _option(name: str, option: Option, one: Field[Any], flag: str) -> click.Option:
    default = default_of(one)
    spelled = [option.short] if option.short else []
    if option.kind == FLAG:
        return click.Option([*spelled, flag, name], is_flag=True, default=False, help=option.help)
    if option.kind == SWITCH:
        off = f"--no-{flag.removeprefix('--')}"
        return click.Option([f"{flag}/{off}", name], default=None, help=option.help)
    shown = isinstance(default, (str, int, float)) and default not in ("", 1.0) and not option.many
    # A default that is None is one too: an option that has to be given must have none at all.
    more: dict[str, Any] = {} if _required(one) else {"default": None if option.many or not shown else default}
    return click.Option(
        [*spelled, flag, name],
        type=_type(name, option),
        multiple=option.many or isinstance(default, tuple),
        required=_required(one),
        show_default=shown,
        metavar=option.metavar or None,
        help=option.help,
        **more,
        shell_complete=_completed(option) if callable(option.choices) else None,
    )


def _completed(option: Option) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What completes a value that is one of choices which are asked for late."""
    return lambda context, parameter, typed: [value for value in option.values() if value.startswith(typed)]


def _type(name: str, option: Option) -> Any:
    if name in _TYPED:
        return _TYPED[name]
    if option.kind == WHOLE:
        return click.IntRange(min=int(option.low)) if option.low is not None else click.INT
    if option.kind == NUMBER:
        return click.FLOAT
    if option.kind == PATH:
        return FILE if not option.store else OUT_THERE if option.store == OUTPUT_THERE else FILE_THERE
    if option.kind == REF:
        return REFERENCE
    if option.choices and not callable(option.choices) and not option.metavar:
        return Choice(option.choices)
    return Listed(option.metavar or "text", option.values) if option.choices else click.STRING


def _required(one: Field[Any]) -> bool:
    from dataclasses import MISSING

    return one.default is MISSING and one.default_factory is MISSING
