"""The table of formats that `convert` writes.

The formats that come with the package are listed here, so that ``--help`` imports no planner. A format in a file of its own
has its row there, as ``FORMAT``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from adapterkit.codecs.kinds import nested, written
from adapterkit.errors import UsageError, nearest
from adapterkit.places import Address
from adapterkit.rows import handed_in
from adapterkit.values import dataclass


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: the word for ``--to``.
        planner: module of `adapterkit.verbs.conversions` and the function in it that plans the conversion.
        what: one line for readers.
        takes: the options that mean something here, beside those of every conversion.
        suffix: of an output's name that asks for this format.
        adapter: it is a format of adapters; the others are of models.
        single: it is one file, so that an output may be named ``NAME.safetensors``.
    """

    name: str
    planner: str
    what: str
    takes: frozenset[str]
    suffix: str = ""
    adapter: bool = False
    single: bool = False


_SHARDS = frozenset({"max_shard_size"})
_SAID = frozenset({"model_name", "metadata", "override_kv"})
_GGUF = (
    frozenset({"pre", "mmproj", "allow_approximate", "as_reranker", "dense_modules", "prune_layers", "vocab_only"})
    | _SAID
)
_TYPES = frozenset(
    {"quant", "imatrix", "pure", "tensor_types", "output_type", "token_embd_type", "leave_output", "yes_lossy"}
    | {"tensor_type_file", "include_weights", "exclude_weights"}
)


def _listed() -> tuple[Format, ...]:
    return (
        Format(
            "gguf",
            "gguf:plan",
            "a model as GGUF, or a GGUF model in other types",
            _TYPES | _SHARDS | _GGUF | {"dtype", "device"},
            ".gguf",
        ),
        Format(
            "mmproj",
            "mmproj:plan",
            "the tower of a model that sees or hears, as llama.cpp loads it beside the text",
            _TYPES | _SAID | {"dtype", "device"},
        ),
        Format("hf", "hf:plan", "a GGUF model as Hugging Face folder", _SHARDS | {"dtype"}),
        Format(
            "gguf-lora",
            "gguf_lora:plan",
            "an adapter as GGUF LoRA",
            frozenset({"base", "dtype", "quant"}),
            adapter=True,
        ),
        Format(
            "peft", "peft:plan", "an adapter as PEFT's", frozenset({"base", "plain", "rank", "energy"}), adapter=True
        ),
        Format("mlx", "mlx:plan", "an adapter as mlx-lm's", frozenset({"base", "rank", "energy"}), adapter=True),
        *(
            Format(name, f"single:{name}", what, frozenset({"base", "rank", "energy"}), adapter=True, single=True)
            for name, what in (
                ("diffusers", "a LoRA, or a whole denoiser, as diffusers loads it"),
                ("kohya", "a LoRA as sd-scripts, A1111 and Forge load it"),
                ("comfyui", "a LoRA, or a whole denoiser, as ComfyUI names its modules"),
                ("lycoris", "a LoRA as LyCORIS' wrapper names its modules"),
            )
        ),
        *(Format(name, f"folder:{name}", "a plain folder of this dtype", _SHARDS) for name in ("bf16", "f16", "f32")),
        *(
            Format(
                name,
                f"folder:{name}",
                what,
                _SHARDS
                | {"skip_modules", "rounding", "calibration", "device"}
                | ({"double_quant"} if name in nested() else set()),
            )
            for name, what in written().items()
        ),
        *(
            Format(
                name,
                f"compressor:{name}",
                "a folder that llm-compressor calibrated",
                frozenset({"calibration", "compressor", "skip_modules"}),
            )
            for name in ("awq", "gptq")
        ),
    )


@cache
def formats() -> Mapping[str, Format]:
    """Every format by its name."""
    return {row.name: row for row in (*_listed(), *handed_in("formats"))}


def find_format(name: str | None, out: str | Path | Address | None) -> Format:
    """The format that was asked for, or that the suffix of ``out`` says.

    Raises:
        UsageError: there is none of that name, or nothing says it.
    """
    choices = f"one of {', '.join(formats())}"
    if name is None:
        suffix = "" if out is None else out.suffix if isinstance(out, Address) else Path(out).suffix
        name = next((row.name for row in formats().values() if suffix and row.suffix == suffix), None)
        if name is None:
            raise UsageError("the output does not say its format", f"add --to, {choices}")
    if name not in formats():
        raise UsageError(f"'{name}' is no format to convert to", nearest(name, formats(), f"use {choices}"))
    return formats()[name]
