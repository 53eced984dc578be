"""8-bit floats that are the numbers themselves: no scale beside them and no ``quantization_config``.

Checkpoints for ComfyUI are often cast so (``weight.to(torch.float8_e4m3fn)``), biases and norms with the others. Every
16-bit float holds such a number as it is, so that widening loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.codecs.codec import Parts, StoredTensor, Weight
from adapterkit.codecs.encode import Encoder, TensorSpec
from adapterkit.codecs.fp8 import FLOAT8, find, unpack_floats
from adapterkit.dtypes import F32
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode

HOW = "plain"


def plain_weights(parts: Parts, where: str) -> Iterator[Weight]:
    """Every float8 tensor of a checkpoint that has no scales.

    Args:
        parts: the tensors of a checkpoint whose config says nothing of quantization, by name.
        where: what to call it in an error.

    Raises:
        CheckpointError: something beside a tensor is called a scale, and how it is meant is not known.
    """
    narrow = [part for part in parts.values() if part.dtype.code in FLOAT8]
    matrices = {part.name: part for part in narrow if len(part.shape) > 1}
    for name, part in parts.items():
        module, _, leaf = name.rpartition(".")
        if "scale" not in leaf or name in matrices:
            continue
        of = (f"{module}.weight", module, re.split(r"[._]?scale", name, maxsplit=1)[0])
        beside = next((matrices[one] for one in of if one in matrices), None)
        if beside is not None and part is not beside:
            raise CheckpointError(
                f"{where}: '{beside.name}' is {beside.dtype}, and how '{name}' scales it is not known here",
                "give the 16-bit base",
            )
    for part in narrow:
        yield _plain(part)


def bare_vectors(parts: Parts, found: Sequence[Weight]) -> Iterator[Weight]:
    """Float8 biases and norms beside scaled weights, which have no scale: they are the numbers themselves."""
    used = {part.name for weight in found for part in weight.parts}
    for name, part in parts.items():
        module, _, leaf = name.rpartition(".")
        lone = part.dtype.code in FLOAT8 and len(part.shape) == 1 and name not in used and leaf in ("bias", "weight")
        if lone and not any(
            f"{stem}{end}" in parts for stem in (name, module) for end in ("_scale", "_scale_inv", ".scale")
        ):
            yield _plain(part)


def is_scaled(parts: Parts) -> bool:
    """Whether a checkpoint without a ``quantization_config`` has scales beside its float8 weights that are known here."""
    return any(part.dtype.code in FLOAT8 for part in parts.values()) and (
        any(name.endswith("scaled_fp8") for name in parts) or next(iter(find(parts, {})), None) is not None
    )


class Rounded(Encoder):
    """Numbers rounded to the nearest float8, as ``weight.to(torch.float8_e4m3fn)`` does; those of float8 stay as they are."""

    unit = unit_codes = 1

    def __init__(self, part: StoredTensor) -> None:
        self.made = (TensorSpec(part.name, part.dtype, part.shape),)

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        import torch

        (made,) = self.made
        most = torch.finfo(made.dtype.torch).max
        found = new.to(made.dtype.torch)
        over = new.isfinite() & ((new.abs() > most) | ~unpack_floats(found).isfinite())
        if bool(over.any()):
            raise CheckpointError(
                f"'{made.name}' holds {new[over].abs().max().item():.6g}, more than {made.dtype} can ({most:g})",
                "leave out keep: 16 bits",
            )
        return (found,)

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {}

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return unpack_floats(encoded[0])


def _plain(part: StoredTensor) -> Weight:
    def load() -> Decode:
        def decode(start: int, stop: int) -> torch.Tensor:
            return unpack_floats(part.read(start, stop))

        return decode

    return Weight(
        part.name, part.shape, F32, (part,), f"{part.dtype} {HOW}", 1, load, 0, partial(Rounded, part), upright=True
    )
