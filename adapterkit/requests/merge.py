"""What a merge is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.codecs.kinds import nested, written
from adapterkit.dtypes import BY_LABEL, FLOATS, DType
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.places import Address
from adapterkit.requests.groups import (
    BASE,
    BESIDE,
    FLOAT_TYPES,
    LIMITS,
    OUTPUT,
    GGUFOutput,
    KeepOptions,
    Limits,
    OfAdapters,
    OntoBase,
    Ruled,
    Running,
    Types,
    device_option,
)
from adapterkit.requests.option import BYTES, FLAG, INPUT, OUTPUT_THERE, PATH, READ_THERE, REF, RUN, VALUES, WHOLE, opt
from adapterkit.requests.workers import OnWorkers
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.requests.groups import Adapters, Base, Ref

FOLDER, GGUF = "folder", "gguf"
CALIBRATED = ("awq", "gptq")
NEAREST, FEEDBACK = "nearest", "feedback"
ROUNDING = (
    "How values are put on the grid of a quantized folder: each to the nearest one, or with feedback (GPTQ's rule), which "
    "makes up for each column's error in the columns after it, by what goes into the layers on the text of --calibration. "
    "docs/quantized.md says for which formats a model was measured."
)
ON_CPU = "The record says what stays on the CPU all the same."


@dataclass(frozen=True, eq=False, repr=False)
class MergeRequest(OntoBase, OfAdapters, Ruled, Types, KeepOptions, GGUFOutput, Limits, OnWorkers, Running):
    """A merge: what is folded into what, and what is written of it."""

    VERB: ClassVar[str] = "merge"
    FIRST: ClassVar[tuple[str, ...]] = ("out", "quant", "weights", "method", "fidelity", "dry_run")

    base: Base = field(
        metadata=opt("The base: a folder, a safetensors or GGUF file, a registry name or a Hub id.", REF, role=INPUT,
                     recipe="base.ref")
    )  # fmt: skip
    adapters: Adapters = field(
        metadata=opt(
            "The adapters, in order; or whole models that were trained from the base.",
            REF,
            role=INPUT,
            many=True,
            recipe="output.adapters",
        )
    )
    out: str | Path | Address | None = field(
        default=None,
        metadata=opt(
            "The folder to make, or a .gguf file; an address in a store (s3://bucket/folder) too.",
            PATH,
            role=INPUT,
            short="-o",
            recipe="output.path",
            store=OUTPUT_THERE,
        ),
    )
    to: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "folder or gguf; by default what the suffix of OUT says, else what the base is.",
            role=BYTES, group=OUTPUT, choices=(FOLDER, GGUF), recipe="output.to",
            elsewhere={"cli": "the suffix of OUT says it"},
        ),
    )  # fmt: skip
    dtype: str = field(
        default="auto",
        kw_only=True,
        metadata=opt(
            "auto keeps every tensor's own dtype; bf16, f16 and f32 convert all floating tensors.",
            role=BYTES, group=OUTPUT, choices=FLOAT_TYPES, recipe="output.dtype",
        ),
    )  # fmt: skip
    max_shard_size: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Like 5GB; by default the base's own shards are kept.",
            role=BYTES, group=OUTPUT, metavar="SIZE", recipe="output.max-shard-size",
        ),
    )  # fmt: skip
    quant_double: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Of --quant nf4 and fp4: nested scales.", FLAG,
            role=BYTES, group=OUTPUT, flag="--double-quant", needs=("quant",), recipe="output.double-quant",
        ),
    )  # fmt: skip
    rounding: str = field(
        default=NEAREST,
        kw_only=True,
        metadata=opt(
            ROUNDING, role=BYTES, group=OUTPUT, choices=(NEAREST, FEEDBACK), recipe="output.rounding",
        ),
    )  # fmt: skip
    calibration: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "For --rounding feedback: a text like what the model will see.", PATH,
            role=BYTES, group=OUTPUT, metavar="FILE", needs=("rounding",), recipe="output.calibration",
            store=READ_THERE,
        ),
    )  # fmt: skip
    residual: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Also write OUT-residual: a LoRA of at most this rank that holds what rounding took.", WHOLE,
            role=BYTES, group=OUTPUT, metavar="RANK", low=1, recipe="output.residual",
        ),
    )  # fmt: skip
    device: str = device_option(ON_CPU)
    fidelity: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Measure, in the same pass, what of the change survives in the output.", FLAG,
            role=RUN, group=OUTPUT, elsewhere={"recipe": "verify measures it"},
        ),
    )  # fmt: skip
    full_record: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Hash every byte of BASE and OUT for the adapterkit.json beside it.", FLAG,
            role=RUN, group=BESIDE, recipe="output.full-record",
        ),
    )  # fmt: skip

    def check(self) -> None:
        if self.skip_modules is not None and self.as_trained is None and self.quant in written():
            raise UsageError(
                f"{self.spelled('skip_modules')} of a merge says what training left in 16 bits, not what the output does",
                f"merge to 16 bits, then convert that --to {self.quant} with {self.spelled('skip_modules')}",
            )
        super().check()
        if self.quant in CALIBRATED:
            raise UsageError(
                f"{self.quant} needs a calibration, which a merge has no text for",
                f"merge to 16 bits, then convert that --to {self.quant} --calibration FILE",
            )
        if self.quant_double and self.quant not in nested():
            raise UsageError(f"{self.quant} has no nested scales", "leave out --double-quant, or use --quant nf4")
        if self.residual is not None:
            self._check_residual()
        if self.rounding == FEEDBACK:
            self._check_feedback()
        if self.as_trained == "int8" and self.double_quant:
            raise UsageError("int8 has no nested scales", "leave out --double-quant, or use --as-trained nf4")

    def _check_residual(self) -> None:
        """
        Raises:
            UsageError: an option that has no meaning for an output with a residual beside it.
        """
        for name in LIMITS:
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{option(name)} is measured on the output alone, and {option('residual')} stands beside it",
                    f"merge without {option(name)}, then verify: that measures the two together",
                )
        if self.target is not None and self.target.suffix == ".safetensors":
            raise UsageError(
                f"{option('residual')} stands beside a folder or a GGUF file, which a server loads with it",
                "name a folder, without .safetensors",
            )

    def _check_feedback(self) -> None:
        """
        Raises:
            UsageError: no text, no grid, or an option that has no meaning beside feedback.
        """
        asked = option("rounding", FEEDBACK)
        if self.folder_format is None:
            raise UsageError(
                f"{asked} is of a folder on a grid", f"add {option('quant')} keep, nf4, fp8-block, mxfp4 or int4"
            )
        if self.calibration is None:
            raise UsageError(
                f"{asked} needs a text that shows what goes into the layers", f"add {option('calibration', 'FILE')}"
            )
        if self.keep_touched is not None:
            raise UsageError(
                f"{option('keep_touched')} takes what changed off the grid, so there is nothing to round",
                f"leave out {option('rounding')} or {option('keep_touched')}",
            )
        if self.residual is not None:
            raise UsageError(
                f"{option('residual')} holds less of what feedback takes than of what the nearest value does",
                f"leave out {option('rounding')} or {option('residual')}",
            )
        if self.measures and self.folder_format != "keep":
            raise UsageError(
                f"what survives of a new format is measured with the nearest values, and {asked} writes others",
                "merge without the limits, then verify",
            )

    @property
    def measures(self) -> bool:
        """Whether what survives is measured in the same pass."""
        return self.fidelity or self.limited

    @property
    def given_adapters(self) -> tuple[Any, ...]:
        """The adapters as a tuple."""
        assert isinstance(self.adapters, tuple)
        return self.adapters

    @property
    def target(self) -> Path | Address | None:
        """Where the output goes."""
        return self.out if self.out is None or isinstance(self.out, Address) else Path(self.out)

    @property
    def form(self) -> str | None:
        """``folder`` or ``gguf``; None where the base decides."""
        if self.to is not None or self.target is None:
            return self.to
        return GGUF if self.target.suffix == ".gguf" else FOLDER

    @property
    def folder_format(self) -> str | None:
        """The quantized format of a folder; None where ``quant`` is a type of a GGUF file, or not given."""
        return self.quant if self.quant is not None and self.quant in folder_formats() else None

    @property
    def gguf_types(self) -> Any:
        """The `Quantization` of a GGUF output; None where nothing was said, or a folder's format was."""
        if self.folder_format is None:
            return self.types
        return replace(self, quant=None, quant_double=False, yes_lossy=False, keep_touched=None, **_NEAREST).types

    @property
    def floats(self) -> DType | None:
        """The dtype of all floating tensors; None where each keeps its own."""
        return parse_floats(self.dtype)

    def stated(self) -> dict[str, Any]:
        """The options as JSON, for a plan file and a record.

        Records of version 1 always have the same keys; an option that came later is there when it was given.
        """
        types = self.gguf_types
        found = {
            "to": self.to,
            "weights": list(self.adapter_weights or ()),
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            "residual_base": self.residual_base,
            "allow_unknown": self.allow_unknown,
            "base16": None if self.base16 is None else str(getattr(self.base16, "ref", self.base16)),
            "as_trained": self.as_trained,
            "double_quant": self.double_quant,
            "quant_dtype": self.quant_dtype,
            "skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "quant": self.folder_format,
            "quant_double": self.quant_double,
            "quantization": None if types is None else types.request(),
            "pre": self.pre,
            "method": self.method,
            "scale": self.scale,
            "space": self.space,
            "parameters": dict(self.parameters),
            "expert_order": self.expert_order,
            "device": self.device,
        }
        inside = _IN_TYPES if self.folder_format is None else _IN_TYPES - {"keep_touched"}
        later = self.given(VALUES, BYTES).keys() - found.keys() - inside
        return found | {name: _plain(getattr(self, name)) for name in sorted(later)}

    @classmethod
    def of_stated(cls, data: Mapping[str, Any], **inputs: Any) -> MergeRequest:
        """The request of a plan file or a record.

        Raises:
            CheckpointError: an option that is not known here.
        """
        given = {name: value for name, value in data.items() if name not in ("verb", "base", "adapters")}
        if given.get("quantization") is not None:
            from adapterkit.gguf.quantize import Quantization

            given["quantization"] = Quantization.of_request(given["quantization"])
        try:
            found = cls.bound({**given, **inputs})
        except UsageError as error:
            raise CheckpointError(f"the plan is of another version: {error.message}", "make the plan again") from None
        assert isinstance(found, cls)
        return found


_IN_TYPES = {
    *(
        "imatrix",
        "pure",
        "tensor_types",
        "output_type",
        "token_embd_type",
        "leave_output",
        "keep_touched",
        "keep_below",
    ),
    *("yes_lossy", "mmproj", "tensor_type_file", "include_weights", "exclude_weights"),
}
"""Options that a record has inside ``quantization``, and the file beside, which has no part in the bytes."""


_NEAREST: dict[str, Any] = {"rounding": NEAREST, "calibration": None}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, (Path, Address)) else value


def folder_formats() -> tuple[str, ...]:
    """The quantized formats of a folder, and the base's own; every other value of ``quant`` is a type of a GGUF file."""
    return (*written(), "keep")


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


__all__ = ["BASE", "FOLDER", "GGUF", "MergeRequest", "folder_formats", "parse_floats"]
