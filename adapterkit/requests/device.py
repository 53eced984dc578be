"""The option of every verb that computes: where."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from adapterkit.ops.device import CPU
from adapterkit.requests.groups import RUNNING
from adapterkit.requests.option import BYTES, DEVICE, DEVICES, opt

WHERE = "Where blocks are computed: cpu, cuda (of several cuda:1) or mps."


def device_option(more: str = "", *, role: str = BYTES, recipe: str = "output.device", **elsewhere: str) -> Any:
    """The field ``device``.

    Args:
        more: what a verb has to say beside what is said of all.
        role, recipe, elsewhere: see `adapterkit.requests.option.Option`.
    """
    words = f"{WHERE} {more}".strip()
    said = opt(words, DEVICE, role=role, group=RUNNING, metavar=DEVICES, recipe=recipe, elsewhere=elsewhere)
    return field(default=CPU, kw_only=True, metadata=said)
