"""The table of servers: one file here is one row, a value named ``SERVER``.

`check --for`, `serve-args`, ``--for`` of `merge`, `convert` and recipes, and the choices they offer all read this table.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import TYPE_CHECKING

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.serving.server import Server


@cache
def servers() -> Mapping[str, Server]:
    """Every server by its name, in the order of the names."""
    rows = [import_module(f"adapterkit.serving.servers.{module.name}").SERVER for module in iter_modules(__path__)]
    return MappingProxyType({row.name: row for row in sorted(rows, key=lambda row: str(row.name))})


def startable() -> list[str]:
    """The servers that `serve-args` can start."""
    return [name for name, row in servers().items() if row.launch is not None]


def with_file() -> list[str]:
    """The servers that want a file beside a GGUF model."""
    return [name for name, row in servers().items() if row.file is not None]


def find(name: str) -> Server:
    """The server of that name.

    Raises:
        UsageError: there is none.
    """
    row = servers().get(name)
    if row is None:
        raise UsageError(f"'{name}' is no server that is known here", f"known: {', '.join(servers())}")
    return row
