"""The table of formats that `convert` writes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.verbs.conversions.conversion import Conversion, ConvertOptions, Ref

Planner = Callable[["Ref", "ConvertOptions", int], "Conversion"]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: the word for ``--to``.
        where: module and function that plan the conversion from (source, options, jobs).
        what: one line for readers.
        takes: the options that mean something here.
        suffix: of an output's name that asks for this format.
    """

    name: str
    where: str
    what: str
    takes: frozenset[str]
    suffix: str = ""

    def planner(self) -> Planner:
        module, _, function = self.where.partition(":")
        found: Planner = getattr(importlib.import_module(f"adapterkit.verbs.conversions.{module}"), function)
        return found

    def check(self, options: ConvertOptions) -> None:
        """Refuse options that mean nothing here.

        Raises:
            UsageError: there is one.
        """
        strange = sorted(options.given() - self.takes)
        if strange:
            raise UsageError(f"{_WORDS.get(strange[0], strange[0])} mean nothing for {self.name}", "leave them out")


_SHARDS = frozenset({"max_shard_size"})
FORMATS = {
    row.name: row
    for row in (
        Format(
            "gguf",
            "gguf:plan",
            "a model as GGUF, or a GGUF model in other types",
            frozenset({"quantization", "max_shard_size", "dtype", "pre"}),
            ".gguf",
        ),
        Format("hf", "hf:plan", "a GGUF model as Hugging Face folder", frozenset({"max_shard_size", "dtype"})),
        Format("gguf-lora", "gguf_lora:plan", "an adapter as GGUF LoRA", frozenset({"base"})),
        Format("peft", "peft:plan", "an adapter as PEFT's", frozenset({"base", "plain", "rank", "energy"})),
        Format("mlx", "mlx:plan", "an adapter as mlx-lm's", frozenset({"base", "rank", "energy"})),
        *(Format(name, f"folder:{name}", "a plain folder of this dtype", _SHARDS) for name in ("bf16", "f16", "f32")),
        *(
            Format(
                name,
                f"folder:{name}",
                "a folder as bitsandbytes quantizes it",
                _SHARDS | {"double_quant", "skip_modules"},
            )
            for name in ("nf4", "fp4")
        ),
        Format("int8", "folder:int8", "a folder in LLM.int8 of bitsandbytes", _SHARDS | {"skip_modules"}),
        Format("fp8", "folder:fp8", "a folder in FP8 blocks as transformers has them", _SHARDS | {"skip_modules"}),
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
}
ADAPTERS = frozenset({"gguf-lora", "peft", "mlx"})
"""The formats of adapters; the others are of models."""
_WORDS = {
    "quantization": "options of a quantization",
    "max_shard_size": "parts of a size",
    "plain": "words about scalings",
    "rank": "ranks",
    "energy": "shares of the energy",
    "base": "bases",
    "double_quant": "nested scales",
    "skip_modules": "modules to keep",
    "calibration": "calibration texts",
    "compressor": "programs that have llm-compressor",
    "dtype": "dtypes",
    "pre": "names of pre-tokenizers",
}


def find_format(name: str | None, out: Ref | None) -> Format:
    """The format that was asked for, or that the suffix of ``out`` says.

    Raises:
        UsageError: there is none of that name, or nothing says it.
    """
    choices = f"one of {', '.join(FORMATS)}"
    if name is None:
        suffix = Path(out).suffix if out is not None else ""
        name = next((row.name for row in FORMATS.values() if suffix and row.suffix == suffix), None)
        if name is None:
            raise UsageError("the output does not say its format", f"add --to, {choices}")
    if name not in FORMATS:
        raise UsageError(f"'{name}' is no format to convert to", f"use {choices}")
    return FORMATS[name]
