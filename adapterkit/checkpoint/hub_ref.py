"""Hub ids, as text: ``org/name[/sub/folder][@revision]``."""

from __future__ import annotations

import re

from adapterkit.places import address_of
from adapterkit.values import dataclass

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<sub>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubRef:
    """``org/name[/sub/folder][@revision]``."""

    repo: str
    subfolder: str = ""
    revision: str | None = None


def parse_hub(ref: str) -> HubRef | None:
    """The parts of a Hub id, or None when ``ref`` cannot be one."""
    found = _HUB.fullmatch(ref.removeprefix("hf://"))
    if found is None or ".." in ref or address_of(ref) is not None:  # the last: a bucket of the Hub
        return None
    return HubRef(found["repo"], found["sub"].strip("/"), found["revision"])
