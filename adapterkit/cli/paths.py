"""The type of what the command line takes for a path here: an address of anything else is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from adapterkit.places import Address, address_of, local, writable


class LocalPath(click.Path):
    """A path of this machine, or ``file://``. Click would make ``s3://bucket/x`` a path in a folder called ``s3:``."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """
        Raises:
            UsageError: an address of a store, a registry or a server.
        """
        text = os.fspath(value)
        return super().convert(local(text, _named(param)), param, ctx)


class StoredPath(click.Path):
    """A path of this machine, or an address in a store.

    Args:
        what: ``file``, or ``folder`` of an output, for the error.
    """

    def __init__(self, what: str = "file") -> None:
        super().__init__(path_type=Path)
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """
        Raises:
            UsageError: an address of anything else.
        """
        return writable(value, _named(param), self.what)


class TargetPath(LocalPath):
    """A path of this machine, an address of a store, or a name of the registry."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """
        Raises:
            UsageError: an address of anything else.
        """
        found = value if address_of(value) is None else writable(os.fspath(value), _named(param))
        return found if isinstance(found, Address) else super().convert(value, param, ctx)


def _named(param: click.Parameter | None) -> str:
    """What an error calls a parameter."""
    if param is None:
        return "this"
    return param.opts[0] if param.param_type_name == "option" else param.human_readable_name.strip("[]")


FILE = LocalPath(path_type=Path)
TARGET = TargetPath()
FILE_THERE = StoredPath()
OUT_THERE = StoredPath("folder")
