"""Options that several verbs have, each declared once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.experts import ORDERS
from adapterkit.errors import UsageError
from adapterkit.ops.device import CPU
from adapterkit.requests.option import (
    BYTES,
    CALL,
    DEVICE,
    DEVICES,
    FLAG,
    NUMBER,
    PAIRS,
    PARAMETERS,
    PATH,
    READ_THERE,
    REF,
    RUN,
    VALUES,
    WHOLE,
    WRITTEN_THERE,
    Request,
    opt,
)
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.bound_rule import BoundRule
    from adapterkit.bases import Trained
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.gguf.quantize import Quantization

    Ref = str | Path
    Base = str | Path | Checkpoint
    Adapters = str | Path | Adapter | Sequence[str | Path | Adapter]
    Progress = Callable[[int, int], None]

FLOAT_TYPES = ("auto", "bf16", "f16", "f32")
GRIDS = ("nf4", "fp4", "int8")

BASE, ADAPTERS, COMBINE, OUTPUT, GGUF_TYPES, BESIDE, RUNNING, THRESHOLDS = (
    *("Base", "Adapters", "Combining", "Output", "GGUF types", "Beside the output", "Run", "Thresholds"),
)


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class OntoBase(Request):
    """Which values of the base the adapters are folded onto."""

    as_trained: str | None = field(
        default=None,
        metadata=opt(
            "Fold onto the values that QLoRA training saw: the base quantized so and decoded again.",
            role=VALUES, group=BASE, choices=GRIDS, metavar="GRID", recipe="base.as-trained",
        ),
    )  # fmt: skip
    double_quant: bool = field(
        default=False,
        metadata=opt(
            "With --as-trained or --quant nf4: nested scales.", FLAG,
            role=VALUES, group=BASE, needs=("as_trained",), recipe="base.double-quant",
        ),
    )  # fmt: skip
    quant_dtype: str = field(
        default="auto",
        metadata=opt(
            "With --as-trained: the dtype in which training loaded the base.",
            role=VALUES, group=BASE, choices=FLOAT_TYPES, needs=("as_trained",), recipe="base.quant-dtype",
        ),
    )  # fmt: skip
    skip_modules: tuple[str, ...] | str | None = field(
        default=None,
        metadata=opt(
            "With --as-trained: a module that stayed in 16 bits; may be given again.",
            role=VALUES, group=BASE, many=True, flag="--skip-module", metavar="NAME", needs=("as_trained",),
            recipe="base.skip-modules",
        ),
    )  # fmt: skip
    base16: Base | None = field(
        default=None,
        metadata=opt(
            "The 16-bit original of a quantized BASE. Adapters are folded onto it.", REF,
            role=VALUES, group=BASE, metavar="REF", recipe="base.base16",
        ),
    )  # fmt: skip
    residual_base: bool = field(
        default=False,
        metadata=opt(
            "BASE is what training left behind (PiSSA, LoRA-GA), not the original model.", FLAG,
            role=VALUES, group=BASE, recipe="base.residual",
        ),
    )  # fmt: skip

    @property
    def trained(self) -> Trained:
        """How training quantized the base."""
        from adapterkit.bases import Trained

        skip = None if self.skip_modules is None else _words(self.skip_modules)
        return Trained(self.as_trained, self.double_quant, self.quant_dtype, skip)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OfAdapters(Request):
    """How adapters are read and weighed."""

    weights: Sequence[float] | float | None = field(
        default=None,
        metadata=opt(
            "How strongly an adapter counts, 1 by default; once for each adapter.", NUMBER,
            role=VALUES, group=ADAPTERS, many=True, flag="--weight", recipe="adapters.weight",
        ),
    )  # fmt: skip
    expert_order: str | None = field(
        default=None,
        metadata=opt(
            "How experts lie in a stacked lora_B whose config does not say: fastest as in PEFT, slowest as in Unsloth "
            "until 2026-09.",
            role=VALUES, group=ADAPTERS, choices=tuple(ORDERS), recipe="merge.expert-order",
        ),
    )  # fmt: skip
    conv1d: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "A module that keeps its weight as [in, out] (transformers' Conv1D), in a model whose class is not known; may be "
            "given again.",
            role=VALUES, group=ADAPTERS, many=True, metavar="NAME", recipe="merge.conv1d",
        ),
    )  # fmt: skip
    only: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "Of each adapter only this part of a pipeline (unet, te1), section (text, vision) or these modules (a "
            "pattern); may be given again.",
            role=VALUES, group=ADAPTERS, many=True, metavar="PART", recipe="merge.only",
        ),
    )  # fmt: skip
    skip: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "Leave this part, section or these modules of each adapter out; may be given again.",
            role=VALUES, group=ADAPTERS, many=True, metavar="PART", recipe="merge.skip",
        ),
    )  # fmt: skip
    allow_unknown: bool = field(
        default=False,
        metadata=opt(
            "Go on where an adapter's config has fields that are not known here.", FLAG,
            role=VALUES, group=ADAPTERS, recipe="merge.allow-unknown",
        ),
    )  # fmt: skip

    def told(self, adapter: Adapter) -> Adapter:
        """The adapter, read as these options say."""
        if self.expert_order is None and not self.conv1d:
            return adapter
        from adapterkit.adapters.told import as_told

        return as_told(adapter, self.expert_order, _words(self.conv1d))

    def narrowed(self, adapter: Adapter) -> Adapter:
        """What of an adapter is asked for.

        Raises:
            AdapterError: it has no such part, or nothing is left.
        """
        if not self.only and not self.skip:
            return adapter
        from adapterkit.adapters.formats.narrow import narrowed

        return narrowed(adapter, _words(self.only), _words(self.skip))

    @property
    def adapter_weights(self) -> tuple[float, ...] | None:
        """One weight per adapter; None where none was named."""
        return None if self.weights is None else tuple(self.weights)  # type: ignore[arg-type]


def _words(given: tuple[str, ...] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _methods() -> tuple[str, ...]:
    from adapterkit.ops.rules import RULES

    return tuple(RULES)


def _spaces() -> tuple[str, ...]:
    from adapterkit.ops.rules import RULES

    return tuple(row.name for row in RULES.values() if row.nested)


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class Ruled(Request):
    """How several deltas become one."""

    method: str = field(
        default="linear",
        metadata=opt(
            "How the deltas of several adapters become one; see --methods.",
            role=VALUES, group=COMBINE, choices=_methods, recipe="merge.method", open=True,
        ),
    )  # fmt: skip
    scale: float = field(
        default=1.0,
        metadata=opt(
            "Factor of the combined deltas.", NUMBER,
            role=VALUES, group=COMBINE, flag="--lambda", recipe="merge.lambda",
        ),
    )  # fmt: skip
    space: str | None = field(
        default=None,
        metadata=opt(
            "Align the adapters there; --method is the rule inside.",
            role=VALUES, group=COMBINE, choices=_spaces, recipe="merge.space", open=True,
        ),
    )  # fmt: skip
    parameters: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=opt(
            "Parameters of the method, as density=0.2; see --methods.", PARAMETERS,
            role=VALUES, group=COMBINE, recipe="merge.parameters",
            elsewhere={"cli": "each parameter is an option of its own"},
        ),
    )  # fmt: skip

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


def _types() -> Iterable[str]:
    from adapterkit.codecs.kinds import written
    from adapterkit.gguf.filetypes import FILE_TYPES

    return (*written(), "keep", *FILE_TYPES)


# The options that make a `Quantization`, and its fields where they have another name.
_TYPES = {"quant": "mix", "token_embd_type": "token_embedding_type"}


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class Types(Request):
    """The types of the tensors of an output.

    Attributes:
        quantization: these options as one value, a `Quantization` or the name of a mix.
    """

    quant: str | None = field(
        default=None,
        metadata=opt(
            "Types of a GGUF output, as llama-quantize gives them (Q4_K_M, Q8_0); several, as Q8_0,Q4_K_M, make a file for "
            "each in one pass. Of a folder: nf4, fp4, int8, fp8, or keep for the base's own format.",
            role=BYTES, group=OUTPUT, metavar="TYPE", choices=_types, open=True, recipe="output.quant",
        ),
    )  # fmt: skip
    imatrix: Ref | None = field(
        default=None,
        metadata=opt(
            "Importance matrix (GGUF or .dat).", PATH,
            role=BYTES, group=GGUF_TYPES, metavar="FILE", recipe="output.imatrix", store=READ_THERE,
        ),
    )  # fmt: skip
    pure: bool = field(
        default=False,
        metadata=opt(
            "Give every tensor the mix's default type.", FLAG, role=BYTES, group=GGUF_TYPES, recipe="output.pure"
        ),
    )
    tensor_types: Sequence[tuple[str, str] | str] | Mapping[str, str] = field(
        default=(),
        metadata=opt(
            "Type of the tensors that match; may be given again.", PAIRS,
            role=BYTES, group=GGUF_TYPES, flag="--tensor-type", metavar="REGEX=TYPE", recipe="output.tensor-types",
        ),
    )  # fmt: skip
    tensor_type_file: Ref | None = field(
        default=None,
        metadata=opt(
            "The same from a file of such lines; what --tensor-type says goes before it.", PATH,
            role=BYTES, group=GGUF_TYPES, metavar="FILE", recipe="output.tensor-type-file", store=READ_THERE,
            elsewhere={"record": "its lines are among the tensor types there"},
        ),
    )  # fmt: skip
    include_weights: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "Take the importance matrix for tensors with this in their name alone; may be given again.",
            role=BYTES, group=GGUF_TYPES, many=True, metavar="NAME", needs=("imatrix",), recipe="output.include-weights",
        ),
    )  # fmt: skip
    exclude_weights: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "Leave the importance matrix aside for tensors with this in their name; may be given again.",
            role=BYTES, group=GGUF_TYPES, many=True, metavar="NAME", needs=("imatrix",), recipe="output.exclude-weights",
        ),
    )  # fmt: skip
    output_type: str | None = field(
        default=None,
        metadata=opt(
            "Type of the output layer.", role=BYTES, group=GGUF_TYPES, metavar="TYPE", recipe="output.output-type"
        ),
    )
    token_embd_type: str | None = field(
        default=None,
        metadata=opt(
            "Type of the token embedding.",
            role=BYTES, group=GGUF_TYPES, metavar="TYPE", recipe="output.token-embd-type",
        ),
    )  # fmt: skip
    leave_output: bool = field(
        default=False,
        metadata=opt(
            "Do not quantize the output layer.", FLAG, role=BYTES, group=GGUF_TYPES, recipe="output.leave-output"
        ),
    )
    yes_lossy: bool = field(
        default=False,
        metadata=opt(
            "Go on although the change would hardly survive.", FLAG,
            role=BYTES, group=OUTPUT, recipe="output.yes-lossy",
        ),
    )  # fmt: skip
    quantization: InitVar[Quantization | str | None] = None

    def __post_init__(self, quantization: Quantization | str | None) -> None:
        if isinstance(quantization, str):
            object.__setattr__(self, "quant", self.quant or quantization)
        elif quantization is not None:
            for one in fields(quantization):
                name = next((option for option, other in _TYPES.items() if other == one.name), one.name)
                value = getattr(quantization, one.name)
                if value != one.default:
                    object.__setattr__(self, name, value)
        if isinstance(self.quant, str) and self.quant.upper() == "COPY":
            object.__setattr__(self, "quant", None)  # llama-quantize's word for what happens anyway
        super().__post_init__()

    @classmethod
    def taken(cls) -> frozenset[str]:
        return frozenset({"quantization"})

    @property
    def types(self) -> Quantization | None:
        """The types of a GGUF output; None where nothing was said of them.

        Raises:
            UsageError: no such type, or options that contradict each other.
        """
        names = [name for name in _TYPE_NAMES if name in self.options()]
        if not any(getattr(self, name) for name in (*names, "tensor_type_file")):
            return None
        from adapterkit.gguf.quantize import Quantization
        from adapterkit.gguf.types import ggml_type

        given = {_TYPES.get(name, name): getattr(self, name) for name in names}
        given["tensor_types"] = tuple((pattern, ggml_type(kind).name) for pattern, kind in given["tensor_types"])
        if self.tensor_type_file is not None:
            from adapterkit.gguf.said import read_pairs

            given["tensor_types"] += read_pairs(str(self.tensor_type_file))
        found = Quantization(**given)
        return None if found == Quantization() else found


_TYPE_NAMES = (
    *("quant", "imatrix", "pure", "tensor_types", "output_type", "token_embd_type", "leave_output"),
    *("include_weights", "exclude_weights"),
    *("keep_touched", "keep_below", "yes_lossy"),
)


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class KeepOptions(Request):
    """What of a GGUF output is kept wider, because an adapter changed it."""

    keep_touched: str | None = field(
        default=None,
        metadata=opt(
            "Give what adapters change at least this type of a GGUF file, or with --quant keep this dtype or fp8 of a folder.",
            role=BYTES, group=GGUF_TYPES, metavar="TYPE", recipe="output.keep-touched",
        ),
    )  # fmt: skip
    keep_below: float | None = field(
        default=None,
        metadata=opt(
            "Only where the change would come out with a cosine below X.", NUMBER,
            role=BYTES, group=GGUF_TYPES, metavar="X", low=0, high=1, recipe="output.keep-below",
        ),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class Limits(Request):
    """What of the change has to be there; see `adapterkit.ops.fidelity` for the figures."""

    min_cosine: float | None = field(
        default=None,
        metadata=opt(
            "Exit with 3 when the cosine of the change that is written with the one that was trained is less.", NUMBER,
            role=RUN, group=THRESHOLDS, metavar="X", low=0, high=1, recipe="verify.min-cosine",
        ),
    )  # fmt: skip
    max_error: float | None = field(
        default=None,
        metadata=opt(
            "Exit with 3 when |written - trained| / |change| is more, weighed by the importance matrix where there is one.",
            NUMBER, role=RUN, group=THRESHOLDS, metavar="X", low=0, recipe="verify.max-error",
        ),
    )  # fmt: skip
    min_retention: float | None = field(
        default=None,
        metadata=opt(
            "Exit with 3 when less than this share of the change survives; verify asks for 0.5 by default.", NUMBER,
            role=RUN, group=THRESHOLDS, metavar="X", low=0, high=1, recipe="verify.min-retention",
        ),
    )  # fmt: skip
    max_dead: int | None = field(
        default=None,
        metadata=opt(
            "Exit with 3 when more tensors than this have a cosine or a retention below 0.5.", WHOLE,
            role=RUN, group=THRESHOLDS, metavar="N", low=0, recipe="verify.max-dead",
        ),
    )  # fmt: skip

    @property
    def limited(self) -> bool:
        """Whether one of them was named."""
        return any(getattr(self, name) is not None for name in LIMITS)


LIMITS = ("min_cosine", "max_error", "min_retention", "max_dead")


def _with_file() -> Iterable[str]:
    from adapterkit.serving.servers import with_file

    return with_file()


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class GGUFOutput(Request):
    """What belongs to a GGUF output."""

    pre: str | None = field(
        default=None,
        metadata=opt(
            "The pre-tokenizer by llama.cpp's name, where it is not recognised.",
            role=BYTES, group=GGUF_TYPES, metavar="NAME", recipe="output.pre",
        ),
    )  # fmt: skip
    model_name: str | None = field(
        default=None,
        metadata=opt(
            "The model's name in the metadata (general.name).",
            role=BYTES, group=GGUF_TYPES, flag="--name", metavar="NAME", recipe="output.model-name",
        ),
    )  # fmt: skip
    metadata: Ref | None = field(
        default=None,
        metadata=opt(
            "A JSON file of metadata, its keys like general.author.", PATH,
            role=BYTES, group=GGUF_TYPES, metavar="FILE", recipe="output.metadata", store=READ_THERE,
        ),
    )  # fmt: skip
    override_kv: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "One key of the metadata, as llama.rope.freq_base=float:500000; may be given again.",
            role=BYTES, group=GGUF_TYPES, many=True, metavar="KEY=TYPE:VALUE", recipe="output.override-kv",
        ),
    )  # fmt: skip
    allow_approximate: tuple[str, ...] | str = field(
        default=(),
        metadata=opt(
            "A field of config.json that llama.cpp computes otherwise past a limit (sliding_window: texts longer than the "
            "window); write it all the same; may be given again.",
            role=VALUES, group=GGUF_TYPES, many=True, metavar="FIELD", recipe="output.allow-approximate",
        ),
    )  # fmt: skip
    as_reranker: bool = field(
        default=False,
        metadata=opt(
            "Write a Qwen3-Reranker as one: what llama-server's rerank endpoint asks, and the scores of yes and no alone.",
            FLAG, role=VALUES, group=GGUF_TYPES, recipe="output.as-reranker",
        ),
    )  # fmt: skip
    dense_modules: bool = field(
        default=False,
        metadata=opt(
            "EmbeddingGemma: also write the Dense layers of sentence-transformers that follow the pooling.", FLAG, role=VALUES,
            flag="--sentence-transformers-dense-modules", group=GGUF_TYPES, recipe="output.dense-modules",
        ),
    )  # fmt: skip
    mmproj: Ref | None = field(
        default=None,
        metadata=opt(
            "The tower (mmproj) to copy beside a GGUF output; auto makes it, with what adapters change in it.", PATH,
            role=BYTES, group=BESIDE, metavar="FILE|auto", recipe="output.mmproj", store=READ_THERE,
            elsewhere={"record": "a copy beside the output has no part in its bytes"},
        ),
    )  # fmt: skip
    server: str | None = field(
        default=None,
        metadata=opt(
            "Write what loads a GGUF output beside it: ollama (a Modelfile) or llama.cpp (llama-server's command).",
            role=RUN, group=BESIDE, flag="--for", choices=_with_file, metavar="SERVER", recipe="output.for",
        ),
    )  # fmt: skip

    @property
    def said(self) -> tuple[Any, ...]:
        """The metadata that options give, as entries of a GGUF file.

        Raises:
            NotFound, UsageError: see `adapterkit.gguf.said.said`.
        """
        if self.model_name is None and self.metadata is None and not self.override_kv:
            return ()
        from adapterkit.gguf.said import said

        return said(self.model_name, None if self.metadata is None else str(self.metadata), self.override_kv)

    @property
    def makes_tower(self) -> bool:
        """Whether the tower's file is made of the base, and not copied."""
        return str(self.mmproj) == "auto"

    def check(self) -> None:
        super().check()
        out = getattr(self, "out", None)
        if self.makes_tower and out is not None and Path(str(out)).suffix != ".gguf":
            raise UsageError("an mmproj file belongs beside a GGUF file", "name the output like OUT.gguf")
        if self.server is not None and out is not None and Path(str(out)).suffix != ".gguf":
            raise UsageError(f"--for {self.server} is for a GGUF output", "name it like OUT.gguf, or leave out --for")


MODEL_WHERE = "Where the model runs: cpu, cuda (of several cuda:1) or mps."
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


_OF_BUILD = "of build, since no byte depends on it"


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class Running(Request):
    """How a verb that writes is carried out. No byte depends on it."""

    jobs: int | None = field(
        default=None,
        metadata=opt(
            "Worker threads; the result does not depend on it.", WHOLE,
            group=RUNNING, low=1, elsewhere={"recipe": _OF_BUILD},
        ),
    )  # fmt: skip
    attest: bool = field(
        default=False,
        metadata=opt(
            "Write a SLSA provenance statement (in-toto) beside OUT, with every file's sha256.", FLAG,
            group=BESIDE,
            elsewhere={"recipe": "the lock holds every digest; adapterkit attest writes the statement"},
        ),
    )  # fmt: skip
    dry_run: bool = field(
        default=False,
        metadata=opt(
            "Show what would be done, from headers alone.", FLAG, group=RUNNING, elsewhere={"recipe": "build --plan"}
        ),
    )
    save_plan: Ref | None = field(
        default=None,
        metadata=opt(
            "Write the plan and stop.", PATH,
            group=RUNNING, metavar="FILE", store=WRITTEN_THERE,
            elsewhere={"recipe": "a plan is of one verb, carried out in parts"},
        ),
    )  # fmt: skip
    resume: bool = field(
        default=False,
        metadata=opt(
            "Continue an interrupted run; keep finished work if interrupted again.", FLAG,
            group=RUNNING, elsewhere={"recipe": _OF_BUILD},
        ),
    )  # fmt: skip
    force: bool = field(
        default=False,
        metadata=opt("Replace OUT if it exists.", FLAG, group=RUNNING, elsewhere={"recipe": _OF_BUILD}),
    )
    progress: Progress | None = field(
        default=None,
        metadata=opt(
            "Called now and then with bytes done and bytes in all.", CALL,
            group=RUNNING, elsewhere={"cli": "a bar on standard error", "recipe": "a bar on standard error"},
        ),
    )  # fmt: skip

    @property
    def writes(self) -> bool:
        """Whether something is written, and not only planned."""
        return not self.dry_run and self.save_plan is None


def without(request: Any, *names: str) -> Any:
    """The request with these options at their defaults."""
    known = {one.name: one for one in fields(request)}
    back = {name: known[name].default for name in names}
    return replace(request, **back)
