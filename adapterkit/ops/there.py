"""Deltas on a device: factors moved there whole, rows as they are asked for; and what was made of them, back again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.ops.lowrank import Factors, Truncated

if TYPE_CHECKING:
    import torch

    from adapterkit.ops.device import Device
    from adapterkit.ops.rows import DeltaRows


@dataclass(frozen=True, eq=False)
class RowsThere:
    """Rows that are computed on the CPU, on a device."""

    delta: DeltaRows
    device: Device

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def place(self) -> torch.device:
        return self.device.place

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.device.up(self.delta.rows(start, stop))


def there(device: Device, delta: DeltaRows) -> DeltaRows:
    """A delta on a device: what is computed of it is computed there."""
    if device.here:
        return delta
    if isinstance(delta, Factors):
        return Factors(device.up(delta.b), device.up(delta.a))
    return RowsThere(delta, device)


def back(device: Device, found: Truncated) -> Truncated:
    """A truncated delta on the CPU."""
    if device.here:
        return found
    factors = Factors(device.down(found.factors.b), device.down(found.factors.a))
    return replace(found, factors=factors, spectrum=device.down(found.spectrum))
