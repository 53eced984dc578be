"""`Decoded`: a quantized weight as the 16-bit tensor it stands for, and `dequantized`, a checkpoint of them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.checkpoint import Checkpoint, SideFile, StoredForm
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.tensor import BLOCK, Tensor, Transposed
from adapterkit.dtypes import BF16, F16, F32, DType
from adapterkit.errors import counted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    import torch

    from adapterkit.codecs.codec import Decode, Weight

CONFIG = "config.json"
DECODED = "decoded"  # what a note on decoded weights begins with
STALE = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json", "recipe.yaml")
_NAMED = {dtype.torch_name: dtype for dtype in (BF16, F16, F32)}


class Decoded(Tensor):
    """A quantized weight, decoded as it is read.

    Args:
        weight: where and how it is stored.
        dtype: to round to, where the format's own library decodes to float32.
    """

    def __init__(self, weight: Weight, dtype: DType | None = None) -> None:
        self.name, self.shape, self.weight = weight.name, weight.shape, weight
        self.dtype = weight.dtype if dtype is None or weight.dtype is not F32 else dtype
        self._lock = threading.Lock()
        self._decode: Decode | None = None

    @property
    def block(self) -> int:
        return max(1, BLOCK // self.weight.grain) * self.weight.grain

    @property
    def reads(self) -> int:
        return sum(part.dtype.nbytes(part.shape) for part in self.weight.parts)

    @property
    def memory(self) -> int:
        return self.weight.memory

    @property
    def how(self) -> str:
        return f"{self.weight.how} to {self.dtype}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.read_wide(start, stop).to(self.dtype.torch)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        grain = self.weight.grain
        low = start - start % grain
        high = min(-(-stop // grain) * grain, self.numel)
        return self._decoder()(low, high)[start - low : stop - low]

    def release(self) -> None:
        with self._lock:
            self._decode = None

    def _decoder(self) -> Decode:
        with self._lock:
            if self._decode is None:
                self._decode = self.weight.load()
            return self._decode


def dequantized(checkpoint: Checkpoint, dtype: DType | None = None) -> Checkpoint:
    """A view in which every quantized weight is one floating tensor and the config says nothing of quantization.

    A checkpoint without quantized weights is given back as it is.

    Args:
        checkpoint: of any format.
        dtype: of weights that the format's own library decodes to float32; by default the one that the config names.

    Raises:
        CheckpointError: a format that is not known, or weights that are incomplete.
    """
    if is_plain(checkpoint):
        return checkpoint
    from adapterkit.codecs.conv1d import is_conv1d
    from adapterkit.codecs.table import CACHE, absent_modules, find_weights, without_quantization

    weights = find_weights(checkpoint.tensors, checkpoint.config, checkpoint.ref)
    if not weights:
        return checkpoint
    used = {part.name for weight in weights for part in weight.parts}
    notes: tuple[str, ...] = ()
    if dtype is None and any(weight.dtype is F32 for weight in weights):
        dtype = config_dtype(checkpoint.config)
        if dtype is None:
            dtype = usual_dtype(checkpoint, used)
            notes = (f"config.json names no dtype; weights are decoded to {dtype}, as the other tensors are",)
    absent, _ = absent_modules(checkpoint.tensors, checkpoint.config)
    if absent:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        notes += (f"config.json leaves '{absent[0]}'{others} in 16 bits, which is not in the checkpoint",)
    decoded: dict[str, Tensor] = {}
    for weight in weights:
        handle = Decoded(weight, dtype)
        turned = is_conv1d(weight.name, checkpoint.config) and not weight.upright
        decoded[weight.parts[0].name] = Transposed(handle) if turned else handle
    used.update(name for name in checkpoint if name.endswith(CACHE))
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        new = decoded.get(name, tensor)
        if new is not tensor or name not in used:
            tensors[new.name] = new
            if name in checkpoint.shards:
                shards[new.name] = checkpoint.shards[name]
    config = without_quantization(checkpoint.config)
    side_files = tuple(file for file in checkpoint.side_files if file.name not in (CONFIG, *STALE))
    if checkpoint.side_file(CONFIG) is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        side_files += (SideFile(CONFIG, BytesFile(CONFIG, text.encode())),)
    counts = Counter(weight.how for weight in weights)
    shown = ", ".join(f"{counted(count, 'weight')} in {how}" for how, count in counts.items())
    return replace(
        checkpoint,
        tensors=tensors,
        shards=shards,
        config=config,
        side_files=side_files,
        notes=(*checkpoint.notes, *notes, f"{DECODED} {shown}"),
        stored=StoredForm(checkpoint, {weight.name: weight for weight in weights}),
    )


def usual_dtype(checkpoint: Checkpoint, quantized: AbstractSet[str] = frozenset()) -> DType:
    """The dtype of most of a checkpoint's floating numbers; bf16 where it has none.

    Args:
        checkpoint: of any format.
        quantized: tensors that are parts of quantized weights, which do not count.
    """
    counts: Counter[DType] = Counter()
    for name, tensor in checkpoint.items():
        if name not in quantized and tensor.dtype in _NAMED.values():
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else BF16


def is_plain(checkpoint: Checkpoint) -> bool:
    """Whether nothing can be quantized: wide floating tensors only, and a config that does not say otherwise.

    Most checkpoints are, and for them the table of formats need not be loaded.
    """
    parts = (checkpoint.config, *(value for value in checkpoint.config.values() if hasattr(value, "get")))
    said = any(key in part for part in parts for key in ("quantization_config", "compression_config"))
    return not said and all(t.dtype.is_float and t.dtype.bits >= 16 for t in checkpoint.tensors.values())


def config_dtype(config: Mapping[str, Any]) -> DType | None:
    """The dtype that ``config.json`` names, at the top or in its language model."""
    for part in (config, *(value for value in config.values() if hasattr(value, "get"))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in _NAMED:
                return _NAMED[part[key]]
    return None
