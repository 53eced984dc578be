"""What a conversion is asked for."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.errors import UsageError, option
from adapterkit.ops.device import CPU
from adapterkit.places import Address
from adapterkit.requests.formats import Format, formats
from adapterkit.requests.groups import (
    ADAPTERS,
    FLOAT_TYPES,
    GGUF_TYPES,
    OUTPUT,
    RUNNING,
    GGUFOutput,
    Running,
    Types,
    device_option,
)
from adapterkit.requests.merge import FEEDBACK, NEAREST, ON_CPU, ROUNDING
from adapterkit.requests.option import (
    BYTES,
    FLAG,
    INPUT,
    NUMBER,
    OUTPUT_THERE,
    PATH,
    READ_THERE,
    REF,
    RUN,
    VALUES,
    WHOLE,
    opt,
)
from adapterkit.requests.workers import OnWorkers
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.requests.groups import Base, Ref


# Of convert_hf_to_gguf.py and convert_lora_to_gguf.py.
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")


def _formats() -> tuple[str, ...]:
    return tuple(formats())


@dataclass(frozen=True, eq=False, repr=False)
class ConvertRequest(Types, GGUFOutput, OnWorkers, Running):
    """A conversion. The row of a format says which of the options mean something for it; another one is an error."""

    VERB: ClassVar[str] = "convert"
    FIRST: ClassVar[tuple[str, ...]] = ("out", "to", "quant", "base", "dtype", "dry_run")

    src: Ref = field(metadata=opt("What to convert: a model or an adapter.", REF, role=INPUT, recipe="output.from"))
    out: Ref | Address | None = field(
        default=None,
        metadata=opt(
            "The file or folder to make; an address in a store (s3://bucket/folder) too.",
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
            "The format to write; by default what OUT's suffix says.",
            role=BYTES, group=OUTPUT, metavar="FORMAT", choices=_formats, open=True, recipe="output.to",
        ),
    )  # fmt: skip
    base: Base | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The adapter's base: a GGUF file or a Hugging Face folder.", REF,
            role=VALUES, group=ADAPTERS, recipe="base.ref",
        ),
    )  # fmt: skip
    plain: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "An adapter as plain LoRA: one rank, one alpha, whatever it was.", FLAG,
            role=BYTES, group=ADAPTERS, recipe="output.plain",
        ),
    )  # fmt: skip
    rank: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Of a change that has to be decomposed: at most this rank.", WHOLE,
            role=VALUES, group=ADAPTERS, low=1, recipe="output.rank",
        ),
    )  # fmt: skip
    energy: float | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Or the smallest rank that keeps this share of the squared norm.", NUMBER,
            role=VALUES, group=ADAPTERS, recipe="output.energy",
        ),
    )  # fmt: skip
    double_quant: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("Of nf4 and fp4: nested scales.", FLAG, role=BYTES, group=OUTPUT, recipe="output.double-quant"),
    )
    skip_modules: tuple[str, ...] | str = field(
        default=(),
        kw_only=True,
        metadata=opt(
            "Of a quantized folder: a module to keep in 16 bits; may be given again.",
            role=BYTES, group=OUTPUT, many=True, flag="--skip-module", metavar="NAME", recipe="output.skip-modules",
        ),
    )  # fmt: skip
    calibration: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "For awq, gptq and --rounding feedback: a text like what the model will see.", PATH,
            role=VALUES, group=OUTPUT, metavar="FILE", recipe="output.calibration", store=READ_THERE,
        ),
    )  # fmt: skip
    rounding: str = field(
        default=NEAREST,
        kw_only=True,
        metadata=opt(
            ROUNDING, role=BYTES, group=OUTPUT, choices=(NEAREST, FEEDBACK), recipe="output.rounding",
        ),
    )  # fmt: skip
    compressor: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The Python that has llm-compressor.", PATH,
            role=BYTES, group=OUTPUT, metavar="PYTHON", recipe="output.compressor",
        ),
    )  # fmt: skip
    max_shard_size: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Like 5GB: write several files of at most this size.",
            role=BYTES, group=OUTPUT, metavar="SIZE", recipe="output.max-shard-size",
        ),
    )  # fmt: skip
    dtype: str = field(
        default="auto",
        kw_only=True,
        metadata=opt(
            "Float type of a GGUF made from a Hugging Face model, and of a folder made from a GGUF file.",
            role=BYTES, group=OUTPUT, choices=FLOAT_TYPES, recipe="output.dtype",
        ),
    )  # fmt: skip
    outtype: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The type of a GGUF output or LoRA file, as llama.cpp's converters spell it; the same as --dtype or --quant.",
            role=BYTES, group=OUTPUT, metavar="TYPE", choices=OUTTYPES, recipe="output.outtype",
            elsewhere={"record": "dtype or quant has it there"},
        ),
    )  # fmt: skip
    device: str = device_option(ON_CPU)
    vocab_only: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Of a GGUF output: metadata and tokenizer, and no tensors.", FLAG,
            role=VALUES, group=GGUF_TYPES, recipe="output.vocab-only",
        ),
    )  # fmt: skip
    prune_layers: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Of a GGUF file: leave these layers out, as 3,5-8.",
            role=VALUES, group=GGUF_TYPES, metavar="LAYERS", recipe="output.prune-layers",
        ),
    )  # fmt: skip
    allow_pickle: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Load pickled weights (.bin), as tensors only, in another process.", FLAG,
            role=RUN, group=RUNNING, elsewhere={"recipe": "a pickle is converted once, by hand"},
        ),
    )  # fmt: skip

    @property
    def without_torch(self) -> bool:
        """Whether nothing may ask for torch: from GGUF to GGUF, compiled encoders take what is stored as it is."""
        return all(str(place).endswith(".gguf") for place in (self.src, self.out)) and self.device == CPU

    def __post_init__(self, quantization: Quantization | str | None) -> None:
        copied = self.quant is not None  # COPY among them, of which nothing is left below
        super().__post_init__(quantization)
        if self.outtype is None:
            return
        both = "quant" if copied else next((name for name in ("dtype", "quant") if name in self.given()), None)
        if both is not None:
            raise UsageError(f"{self.spelled('outtype')} and {self.spelled(both)} both name a type", "give one of them")
        if self.outtype in FLOAT_TYPES:
            object.__setattr__(self, "dtype", self.outtype)
        else:
            object.__setattr__(self, "quant", self.outtype.upper())
        object.__setattr__(self, "outtype", None)
        self.check()

    def check(self) -> None:
        super().check()
        if self.rounding == FEEDBACK and self.calibration is None:
            raise UsageError(
                f"{option('rounding', FEEDBACK)} needs a text that shows what goes into the layers",
                f"add {option('calibration', 'FILE')}",
            )

    @property
    def target(self) -> Path | Address | None:
        """Where the output goes."""
        return self.out if self.out is None or isinstance(self.out, Address) else Path(self.out)

    def need_base(self, form: str) -> Base:
        """The base.

        Raises:
            UsageError: none was given.
        """
        if self.base is None:
            raise UsageError(f"converting to {form} needs the base", "add --base BASE")
        return self.base

    @property
    def shard_size(self) -> int | None:
        """The bytes of tensors in each file of a set.

        Raises:
            UsageError: not a size.
        """
        from adapterkit.checkpoint.plan import parse_size

        return None if self.max_shard_size is None else parse_size(self.max_shard_size)

    def of_format(self) -> dict[str, Any]:
        """The options that a format may take or refuse: all that differ from their defaults and decide the output."""
        return {name: value for name, value in self.given(VALUES, BYTES).items() if name != "to"}

    def check_format(self, form: Format) -> None:
        """Refuse options that mean nothing for a format.

        Raises:
            UsageError: there is one.
        """
        for name in self.of_format():
            if name not in form.takes:
                raise UsageError(f"{self.spelled(name)} does not apply to --to {form.name}", "leave it out")

    def reading(self, src: Ref) -> ConvertRequest:
        """The same of another source."""
        return replace(self, src=src)


@dataclass(frozen=True, eq=False, repr=False)
class ConvertPlanRequest(ConvertRequest):
    """A conversion to be planned.

    Attributes:
        headers_only: a source on the Hub is not downloaded, so the plan can be shown but not executed.
    """

    headers_only: bool = field(default=True, kw_only=True)

    @classmethod
    def of(cls, request: ConvertRequest, *, headers_only: bool) -> ConvertPlanRequest:
        """The same conversion, to be planned."""
        return cls(**{name: getattr(request, name) for name in request.options()}, headers_only=headers_only)
