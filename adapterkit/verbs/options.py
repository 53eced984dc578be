"""What a merge was asked for: the one list of options that decide its output bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.fold import FLOATS
from adapterkit.dtypes import BY_LABEL, DType
from adapterkit.errors import CheckpointError, UsageError
from adapterkit.ops.device import CPU

if TYPE_CHECKING:
    from adapterkit.adapters.bound_rule import BoundRule
    from adapterkit.gguf.quantize import Quantization

FOLDER, GGUF = "folder", "gguf"


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge that decide what is written. A plan holds them, so that it can be made again and compared.

    Attributes:
        to: ``folder`` or ``gguf``; by default what the base is.
        weights: one per adapter, 1 each by default; may be negative.
        dtype: ``auto`` keeps every tensor's own; ``bf16``, ``f16`` or ``f32`` converts all floating tensors.
        max_shard_size: like ``5GB``; by default the base's own shards are kept.
        residual_base: the base is what training left behind (PiSSA, LoRA-GA, ...), not the original model.
        allow_unknown: go on where an adapter's config has fields that are not known here.
        base16: the original of a quantized base, to be folded onto in its place.
        as_trained: ``nf4``, ``fp4`` or ``int8``: fold onto the values that QLoRA training saw; see `open_base` for this
            and for ``double_quant``, ``quant_dtype`` and ``skip_modules``.
        quant: of a folder: write ``nf4``, ``fp4``, ``int8`` (bitsandbytes) or ``fp8`` as transformers does.
            ``keep``: as the base is stored.
        quant_double: with double quantization.
        keep_touched: with ``keep``: ``bf16``, ``f16`` or ``f32`` for changed weights, which leave the base's format.
        quantization: the types of a GGUF output; by default every tensor keeps its own.
        pre: the pre-tokenizer of a GGUF output, by llama.cpp's name; by default recognised.
        method: how deltas of several adapters become one, a row of `adapterkit.ops.rules.RULES`; nothing is
            truncated. Whole parameters, token rows and biases are not combined by it.
        scale, space, parameters: of the method, as in `combine`.
        expert_order: ``fastest`` (as PEFT) or ``slowest`` (Unsloth until 2026-09-17): how experts lie in a stacked lora_B
            of adapters whose config does not say.
        device: ``cpu``, ``cuda`` or ``cuda:1``: where blocks are computed. Another device may round last bits otherwise.
    """

    to: str | None = None
    weights: tuple[float, ...] | None = None
    dtype: str = "auto"
    max_shard_size: str | None = None
    residual_base: bool = False
    allow_unknown: bool = False
    base16: str | Path | None = None
    as_trained: str | None = None
    double_quant: bool = False
    quant_dtype: str = "auto"
    skip_modules: tuple[str, ...] | None = None
    quant: str | None = None
    quant_double: bool = False
    keep_touched: str | None = None
    quantization: Quantization | None = None
    pre: str | None = None
    method: str = "linear"
    scale: float = 1.0
    space: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    expert_order: str | None = None
    device: str = CPU

    @classmethod
    def of(cls, **given: Any) -> MergeOptions:
        """Options from keywords; sequences become tuples, None means the default.

        Raises:
            UsageError: a keyword that is no option.
        """
        known = {one.name for one in fields(cls)}
        strange = sorted(given.keys() - known)
        if strange:
            raise UsageError(f"a merge has no option '{strange[0]}'", f"it has {', '.join(sorted(known))}")
        for name, make in _SEQUENCES.items():
            values = given.get(name)
            given[name] = make(values) if values else None
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def floats(self) -> DType | None:
        """The dtype of all floating tensors; None where each keeps its own.

        Raises:
            UsageError: no dtype that a merge writes.
        """
        return parse_floats(self.dtype)

    @property
    def rule(self) -> BoundRule | None:
        """The method; None for the plain weighted sum, which needs none.

        Raises:
            UsageError: an unknown method, space or parameter, or a value out of range.
        """
        if (self.method, self.scale, self.space) == ("linear", 1.0, None) and not self.parameters:
            return None
        from adapterkit.adapters.bound_rule import BoundRule

        return BoundRule(self.method, self.space, self.scale, dict(self.parameters))

    def request(self) -> dict[str, Any]:
        """The options as JSON, for a plan file and a record."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return found | {
            "weights": list(self.weights or ()),
            "base16": None if self.base16 is None else str(self.base16),
            "skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "quantization": None if self.quantization is None else self.quantization.request(),
            "parameters": dict(self.parameters),
        }

    @classmethod
    def of_request(cls, data: Mapping[str, Any]) -> MergeOptions:
        """The options of a plan file.

        Raises:
            CheckpointError: one that is not known here.
        """
        given = {name: value for name, value in data.items() if name not in ("verb", "base", "adapters")}
        if given.get("quantization") is not None:
            from adapterkit.gguf.quantize import Quantization

            given["quantization"] = Quantization.of_request(given["quantization"])
        try:
            return cls.of(**given)
        except UsageError as error:
            raise CheckpointError(f"the plan is of another version: {error.message}", "make the plan again") from None


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def parse_floats(dtype: str) -> DType | None:
    """The dtype of all floating tensors; None for ``auto``.

    Raises:
        UsageError: no dtype that is written.
    """
    if dtype == "auto":
        return None
    if dtype not in BY_LABEL or BY_LABEL[dtype] not in FLOATS:
        raise UsageError(f"'{dtype}' is no output dtype", "use auto, bf16, f16 or f32")
    return BY_LABEL[dtype]


_SEQUENCES: dict[str, Any] = {"weights": _floats, "skip_modules": tuple}
