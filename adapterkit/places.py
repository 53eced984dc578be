"""What a place is called: a path here, or an address of something that is not read or written here."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from adapterkit.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def local(place: str | Path, what: str) -> str | Path:
    """A place without ``file://``; anything with another scheme is refused by name.

    Without this, ``s3://bucket/x`` would be taken for a folder called ``s3:``.

    Args:
        what: the option that names it.

    Raises:
        UsageError: an address of a store, a registry or a server.
    """
    found = _SCHEME.match(str(place))
    if found is None or Path(str(place).partition("/")[0]).exists():
        return place
    if found[1].lower() == "file":
        return unquote(re.sub(r"^file:/+", "/", str(place), flags=re.IGNORECASE))
    raise UsageError(
        f"{what} is {place}, and {found[1]}:// is neither read nor written here",
        "give a path, and copy from or to the store with its own tool",
    )
