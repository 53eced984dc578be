"""The type of what the command line takes for a path here: an address of anything else is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from adapterkit.places import local


class LocalPath(click.Path):
    """A path of this machine, or ``file://``. Click would make ``s3://bucket/x`` a path in a folder called ``s3:``."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """
        Raises:
            UsageError: an address of a store, a registry or a server.
        """
        text = os.fspath(value)
        what = (
            "this"
            if param is None
            else param.opts[0]
            if param.param_type_name == "option"
            else param.human_readable_name
        )
        return super().convert(local(text, what), param, ctx)


FILE = LocalPath(path_type=Path)
