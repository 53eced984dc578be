"""What a verb computes on a device: its handles are told so before they are read, and the record says it afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError
from adapterkit.ops.device import CPU, opened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.checkpoint.tensor import Tensor

AGREES = "equal to the CPU's, or within one rounding"


def place(tensors: Iterable[Tensor], device: str) -> None:
    """Have tensors be encoded on a device."""
    if device != CPU:
        for tensor in tensors:
            tensor.place_on(device)


def device_of(request: Mapping[str, Any]) -> str:
    """The device that the request of a plan names."""
    return str(request.get("device", CPU))


def computed_on(device: str, tensors: Iterable[Tensor] = ()) -> dict[str, Any]:
    """Evidence for a record, when the weights are finished: where they were computed, and what was not; none of the CPU.

    Args:
        tensors: that were computed.
    """
    if device == CPU:
        return {}
    try:
        found = opened(device).said()
    except UsageError:  # workers have it, and this machine, which makes the end of it, has not
        found = {"device": device, "by": "workers"}
    stayed = sorted(frozenset[str]().union(*(tensor.on_cpu for tensor in tensors)))
    return {"computed_on": {**found, "bytes": AGREES, **({"on_the_cpu": stayed} if stayed else {})}}


def said(device: str, tensors: Iterable[Tensor] = ()) -> tuple[str, ...]:
    """The same in a sentence, for a report."""
    facts = computed_on(device, tensors).get("computed_on")
    if facts is None:
        return ()
    name = f" ({facts['name']})" if "name" in facts else ""
    stayed = f"; on the CPU: {', '.join(facts['on_the_cpu'])}" if "on_the_cpu" in facts else ""
    return (f"computed on {device}{name}: bytes are {AGREES}{stayed}",)
