"""What base an adapter says it was trained on, where that base was quantized: QLoRA's values are not the original's.

Training on decode(encode(W)) teaches an adapter to correct a part of that rounding; on W it corrects what is not there. Who
trained wrote down what was done: the name of the base (``...-bnb-4bit``), PEFT's model card (the quantization config of
bitsandbytes), axolotl's config in its card, ms-swift's ``args.json``, LLaMA-Factory's ``training_args.yaml``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import option
from adapterkit.foreign import json_value
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint

_MOST = 1 << 20  # bytes of a small file that are looked at
_FILES = ("README.md", "args.json", "training_args.yaml")
_NAME = re.compile(
    r"(?:^|[-_./])(bnb[-_]?4bit|bnb[-_]?8bit|nf4|4bit|gptq|awq|fp8|nvfp4|mxfp4)(?=$|[-_./])", re.IGNORECASE
)
_OF_NAME = {"bnb4bit": "nf4", "4bit": "4 bits", "bnb8bit": "int8"}
_BITSANDBYTES = ("nf4", "fp4", "int8")
_FIELD = r"""(?:^|[\s{{,\-])["'`]?{}["'`]?\s*:\s*["'`]?([\w.]+)"""
SAMPLED = 4  # tensors whose rounding is measured
_ROWS = 1 << 18  # elements of each


@dataclass(frozen=True)
class TrainedBase:
    """A quantized base that an adapter says it was trained on.

    Attributes:
        grid: ``nf4``, ``fp4``, ``int8``, or the name of another format.
        double: scales were quantized too; None where nothing says it.
        where: what says so, in words.
    """

    grid: str
    double: bool | None
    where: str

    def __str__(self) -> str:
        return f"{self.grid}{' with nested scales' if self.double else ''}"


def trained_base(adapter: Adapter) -> TrainedBase | None:
    """What an adapter's small files and the name of its base say; None where nothing says that it was quantized."""
    for name, text in _texts(adapter.folder):
        found = _of_text(text, name)
        if found is not None:
            return found
    said = adapter.config.base or ""
    # A stranger wrote it: a home that is nobody's is left as it stands.
    config = Path(os.path.expanduser(said)) / "config.json"
    if said and config.is_file() and config.stat().st_size <= _MOST:
        return _of_base(config, said)
    named = _NAME.search(said)
    if named is None:
        return None
    word = named[1].lower().replace("-", "").replace("_", "")
    return TrainedBase(_OF_NAME.get(word, word), None, f"its config names {adapter.config.base}")


def _of_base(config: Path, said: str) -> TrainedBase | None:
    """What the config of a base that is a folder here says."""
    try:
        text = config.read_text(encoding="utf-8")
        read = json_value(text)
    except (OSError, ValueError):
        return None
    if "quant" not in text or not isinstance(read, dict):
        return None
    from adapterkit.codecs.table import method_of, quantization

    found = quantization(read)
    if found is None:
        return None
    where, method = f"its config names {said}", method_of(found)
    if method != "bitsandbytes":
        return TrainedBase(method, None, where)
    if found.get("load_in_8bit"):
        return TrainedBase("int8", None, where)
    return TrainedBase(
        str(found.get("bnb_4bit_quant_type") or "fp4"), bool(found.get("bnb_4bit_use_double_quant")), where
    )


def elsewhere(adapter: Adapter, base: Checkpoint, values: str = "") -> str | None:
    """In a sentence: that an adapter was trained on quantized values, and these are others. None where they are the same, or
    where nothing says so.

    Args:
        base: the view that is folded onto.
        values: which values of its own it has; see `adapterkit.bases.open_base`.
    """
    trained = trained_base(adapter)
    if trained is None:
        return None
    known = trained.grid in _BITSANDBYTES
    if values.startswith("as trained in "):
        words = values.removeprefix("as trained in ").split()
        if words[0] == trained.grid and trained.double in (None, "double" in words):
            return None
        here = f"the base is taken as {values.removeprefix('as ')}"
    elif base.stored is not None and not values.startswith("original"):
        formats = {weight.how.split()[0] for weight in base.stored.weights.values()}
        if trained.grid in formats or not known:
            return None
        here = f"the base is stored in {', '.join(sorted(formats))}"
    else:
        here = f"{base.ref} has its own values"
    road = ""
    if known and base.format != "gguf" and base.stored is None:
        nested = f" {option('double_quant', True)}" if trained.double else ""
        road = f"; {option('as_trained', trained.grid)}{nested} folds onto what training saw"
    return f"{adapter.ref} was trained on a base in {trained} ({trained.where}), and {here}{road}"


def already_coarse(folded: Folded) -> bool:
    """Whether the base's values lie on a grid of five bits or fewer: a folder that was decoded from one."""
    from adapterkit.adapters.fidelity import coarse_tensors

    return bool(coarse_tensors(folded, tensors=SAMPLED))


def how_far(folded: Folded, grid: str) -> float | None:
    """How far quantizing the base moves it beside what the adapters do: the median |W - decode(encode(W))| / |delta| of a few
    tensors; None where nothing can be measured, or where the base's values lie on a coarse grid already."""
    from adapterkit.adapters.fidelity import merged_tensors, through_format

    matrices = [tensor for tensor in merged_tensors(folded).values() if len(tensor.shape) == 2]
    if grid not in _BITSANDBYTES or not matrices or already_coarse(folded):
        return None
    found = []
    for index in range(min(SAMPLED, len(matrices))):
        tensor = matrices[index * len(matrices) // min(SAMPLED, len(matrices))]
        through = through_format(grid, tensor.shape)
        count = min(tensor.shape[0], max(1, _ROWS // tensor.shape[1])) * tensor.shape[1]
        old, new = tensor.base.read_wide(0, count).float(), tensor.read_wide(0, count).float()
        tensor.release()
        moved = float((new - old).norm())
        if through is not None and moved:
            rows = old.view(-1, tensor.shape[1])
            found.append(float((through(rows).float() - rows).norm()) / moved)
    return sorted(found)[len(found) // 2] if found else None


def _texts(folder: Path | None) -> Iterator[tuple[str, str]]:
    if folder is None:
        return
    for path in (folder / name for name in _FILES):
        try:
            if path.is_file() and path.stat().st_size <= _MOST:
                yield path.name, path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue


def _of_text(text: str, name: str) -> TrainedBase | None:
    """The fields of bitsandbytes' config, axolotl, ms-swift and LLaMA-Factory, whichever way they are written."""

    def said(key: str) -> str:
        found = re.search(_FIELD.format(re.escape(key)), text, re.MULTILINE)
        return found[1].lower() if found else ""

    where = f"its {name}"
    method = said("quant_method") or said("quantization_method")
    bits = said("quant_bits") or said("quantization_bit")
    four = said("load_in_4bit") == "true" or (bits == "4" and method in ("", "bnb", "bitsandbytes"))
    eight = said("load_in_8bit") == "true" or (bits == "8" and method in ("", "bnb", "bitsandbytes"))
    if not four and not eight:
        return None
    if eight and not four:
        return TrainedBase("int8", None, where)
    # axolotl and LLaMA-Factory take NF4 unless told otherwise, bitsandbytes itself FP4: its config always says it.
    kind = "fp4" if said("bnb_4bit_quant_type") == "fp4" else "nf4"
    double = said("bnb_4bit_use_double_quant") or said("double_quantization")
    return TrainedBase(kind, double == "true" if double in ("true", "false") else None, where)
