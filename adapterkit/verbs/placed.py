"""What a verb computes on a device: its handles are told so before they are read, and the record says it afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError
from adapterkit.ops.device import CPU, opened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.checkpoint.tensor import Tensor

BYTES = "bytes are equal to the CPU's, or within one rounding"
FACTORS = "signs and bases may be others than the CPU's; products of factors are the CPU's but for rounding"
FIGURES = "figures are the CPU's but for rounding"


def place(tensors: Iterable[Tensor], device: str) -> None:
    """Have tensors be encoded on a device."""
    if device != CPU:
        for tensor in tensors:
            tensor.place_on(device)


def device_of(request: Mapping[str, Any]) -> str:
    """The device that the request of a plan names."""
    return str(request.get("device", CPU))


def computed_on(device: str, tensors: Iterable[Tensor] = (), agrees: str = BYTES) -> dict[str, Any]:
    """Evidence for a record, when the weights are finished: where they were computed, and what was not; none of the CPU.

    Facts of a device are those of the one that this process computed on. Workers, or a run that was resumed, may have had
    another of that name.

    Args:
        tensors: that were computed.
        agrees: how what came out is to what the CPU gives.
    """
    if device == CPU:
        return {}
    found: dict[str, Any] = {"device": device, "by_this_process": False}
    try:
        there = opened(device)
        found = there.said() if there.used else found
    except UsageError:
        pass  # workers have it, and this machine, which makes the end of it, has not
    stayed = sorted(frozenset[str]().union(*(tensor.on_cpu for tensor in tensors)))
    return {"computed_on": {**found, "agreement": agrees, **({"on_the_cpu": stayed} if stayed else {})}}


def said(device: str, tensors: Iterable[Tensor] = (), agrees: str = BYTES) -> tuple[str, ...]:
    """The same in a sentence, for a report."""
    facts = computed_on(device, tensors, agrees).get("computed_on")
    if facts is None:
        return ()
    if "by_this_process" in facts:
        return (f"this process computed nothing on {device}",)
    name = f" ({facts['name']})" if "name" in facts else ""
    stayed = f"; on the CPU: {', '.join(facts['on_the_cpu'])}" if "on_the_cpu" in facts else ""
    return (f"computed on {device}{name}: {agrees}{stayed}",)
