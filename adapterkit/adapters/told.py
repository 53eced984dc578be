"""What the user says of adapters that their files do not: the order of experts, and which modules are Conv1D."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.experts import in_order
from adapterkit.adapters.orientation import with_conv1d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.adapters.adapter import Adapter


def as_told(adapter: Adapter, expert_order: str | None = None, conv1d: Sequence[str] = ()) -> Adapter:
    """The adapter, read so.

    Args:
        expert_order: see `adapterkit.adapters.experts.in_order`.
        conv1d: see `adapterkit.adapters.orientation.with_conv1d`.

    Raises:
        UsageError: no such order.
    """
    return with_conv1d(in_order(adapter, expert_order), conv1d)
