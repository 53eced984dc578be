"""What a recipe says, as frozen values. `adapterkit.recipe.parse` reads TOML into them, by their fields.

A field's key is its name with hyphens for underscores (``metadata["key"]`` where it is another word). ``SHORT`` names the
field that a plain string in the place of a table means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adapterkit.adapters.experts import ORDERS
from adapterkit.ops.device import CPU

LEVELS = ("none", "tensors", "layers", "model")


def _choice(*values: str, default: str | None = None) -> Any:
    return field(default=default, metadata={"choices": values})


def _within(low: float, high: float | None = None) -> Any:
    return field(default=None, metadata={"range": (low, high)})


@dataclass(frozen=True)
class BaseChoice:
    """What adapters are folded onto.

    Attributes:
        ref: folder, file, registry name or Hub id; paths are relative to the recipe.
        base16, as_trained, double_quant, quant_dtype, skip_modules: see `adapterkit.bases.open_base`.
        residual: it is what training left behind (PiSSA, LoRA-GA, ...), not the original model.
    """

    SHORT: ClassVar[str] = "ref"
    ref: str
    base16: str | None = None
    as_trained: str | None = _choice("nf4", "fp4", "int8")
    double_quant: bool = False
    quant_dtype: str = _choice("auto", "bf16", "f16", "f32", default="auto")
    skip_modules: tuple[str, ...] = ()
    residual: bool = False


@dataclass(frozen=True)
class AdapterChoice:
    """One adapter: a reference, or what an output with ``to = "adapter"`` makes.

    Attributes:
        ref: folder, file, registry name or Hub id.
        from_: the name of the output that makes it.
        weight: how strongly it counts.
    """

    SHORT: ClassVar[str] = "ref"
    ref: str | None = None
    from_: str | None = field(default=None, metadata={"key": "from"})
    weight: float = 1.0


@dataclass(frozen=True)
class Combination:
    """How several deltas become one: see `adapterkit.ops.rules`.

    Attributes:
        expert_order: of experts in a stacked ``lora_B`` of adapters whose config does not say; see `MergeOptions`.
        allow_unknown: go on where an adapter's config has fields that are not known here.
    """

    method: str = "linear"
    scale: float = field(default=1.0, metadata={"key": "lambda"})
    space: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    expert_order: str | None = _choice(*ORDERS)
    allow_unknown: bool = False


@dataclass(frozen=True)
class Verification:
    """How deeply an output is verified, and what must hold.

    Attributes:
        level: ``tensors``, ``layers`` or ``model``.
        prompts: a file of prompts for the level ``model``.
        max_kl, min_top1, min_retention: thresholds; the build fails with 3 beyond them.
        html: a page with the evidence.
    """

    SHORT: ClassVar[str] = "level"
    level: str = _choice(*LEVELS, default="tensors")
    prompts: str | None = None
    max_kl: float | None = _within(0)
    min_top1: float | None = _within(0, 1)
    min_retention: float | None = _within(0, 1)
    html: str | None = None


@dataclass(frozen=True)
class Registration:
    """A version in the registry; ``alias`` is pointed to it."""

    SHORT: ClassVar[str] = "name"
    name: str
    alias: str | None = None
    base_id: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Publication:
    """A repository on the Hub."""

    SHORT: ClassVar[str] = "repo"
    repo: str
    private: bool = False
    tag: str | None = None
    create_pr: bool = False
    base_id: str = ""


@dataclass(frozen=True)
class Output:
    """One thing to make.

    Attributes:
        path: where, relative to the recipe.
        to: ``folder`` or ``gguf`` (a merge), ``adapter`` (a combination), or a format of `convert`; by default what the
            suffix of ``path`` says, ``folder`` without one.
        from_: another output that this one is converted from.
        adapters: the names of those that count here; by default all of them.
        base, merge, verify: in the place of the recipe's own.
        dtype, quant, double_quant, max_shard_size: as in `merge`.
        device, full_record: of a merge: where blocks are computed; hash every byte of base and output for its record.
        pre, mmproj: of a GGUF output: its pre-tokenizer, where it is not recognised; the vision tower to copy beside it.
        imatrix ... yes_lossy: of a GGUF output, as in `adapterkit.gguf.quantize.Quantization`; ``tensor_types`` maps
            regular expressions to types.
        skip_modules: of a quantized folder that is converted: modules that stay in 16 bits.
        calibration, compressor: of ``awq`` and ``gptq``: a text like the model's own, and the Python that has
            llm-compressor.
        plain, rank, energy, own_ranks: of an adapter that is made.
        for_: of a GGUF output: ``ollama`` or ``llama.cpp``, of which the Modelfile or the command is written beside it.
        register, push: what is done with it when it is there and verified.
    """

    SHORT: ClassVar[str] = "path"
    path: str
    to: str | None = None
    from_: str | None = field(default=None, metadata={"key": "from"})
    adapters: tuple[str, ...] | None = None
    base: BaseChoice | None = None
    merge: Combination | None = None
    dtype: str = _choice("auto", "bf16", "f16", "f32", default="auto")
    quant: str | None = None
    double_quant: bool = False
    max_shard_size: str | None = None
    device: str = CPU
    full_record: bool = False
    pre: str | None = None
    mmproj: str | None = None
    imatrix: str | None = None
    pure: bool = False
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    output_type: str | None = None
    token_embd_type: str | None = None
    leave_output: bool = False
    keep_touched: str | None = None
    keep_below: float | None = _within(0, 1)
    yes_lossy: bool = False
    for_: str | None = field(default=None, metadata={"key": "for", "choices": ("ollama", "llama.cpp")})
    skip_modules: tuple[str, ...] = ()
    calibration: str | None = None
    compressor: str | None = None
    plain: bool = False
    rank: int | None = field(default=None, metadata={"range": (1, None)})
    energy: float | None = _within(0, 1)
    own_ranks: bool = False
    verify: Verification | None = None
    register: Registration | None = None
    push: Publication | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe: a base, adapters and how they go together, and what is made of them."""

    outputs: Mapping[str, Output]
    base: BaseChoice | None = None
    adapters: Mapping[str, AdapterChoice] = field(default_factory=dict)
    merge: Combination = field(default_factory=Combination)
    verify: Verification | None = None
