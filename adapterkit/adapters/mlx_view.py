"""`as_mlx_model`: a 16-bit view as `mlx_lm.convert -q` would save it: its names, its stacks of experts, its layers."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.linear import is_named
from adapterkit.adapters.mlx_models import MlxModel, rows
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.encoded import encoded
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.tensor import BLOCK, Renamed, Tensor
from adapterkit.codecs.codec import Layers
from adapterkit.codecs.mlx import MlxNumbers, new
from adapterkit.errors import CheckpointError, UsageError, counted, option

if TYPE_CHECKING:
    import torch

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.codecs.codec import Kind

CONFIG = "config.json"
# Stored beside weights and part of no layer; mlx-lm computes or drops them.
_DROPPED = ("rotary_emb.inv_freq",)


class ExpertStack(Tensor):
    """Tensors of one shape, one after the other along a new first dimension."""

    def __init__(self, name: str, parts: list[Tensor]) -> None:
        first = parts[0]
        self.name, self.dtype, self.shape, self.parts = name, first.dtype, (len(parts), *first.shape), parts
        self._starts = [index * first.numel for index in range(len(parts))]

    @property
    def block(self) -> int:
        """One part, where that is small; its own grid where it fills whole blocks."""
        one = self.parts[0]
        return one.numel if one.numel <= 4 * BLOCK or one.numel % one.block else one.block

    @property
    def reads(self) -> int:
        return sum(part.reads for part in self.parts)

    @property
    def memory(self) -> int:
        return max(part.memory for part in self.parts)

    @property
    def how(self) -> str:
        words = {part.how for part in self.parts}
        return "experts stacked" if words == {"copy"} else next(iter(sorted(words - {"copy"}))) + ", stacked"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._read(start, stop, wide=False)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        return self._read(start, stop, wide=True)

    def _read(self, start: int, stop: int, *, wide: bool) -> torch.Tensor:
        import torch

        found = []
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            at = start - self._starts[index]
            end = min(stop - self._starts[index], self.parts[index].numel)
            one = self.parts[index]
            found.append(one.read_wide(at, end) if wide else one.read(at, end))
            start = self._starts[index] + end
        return found[0] if len(found) == 1 else torch.cat(found)

    def release(self) -> None:
        for part in self.parts:
            part.release()


def made_of(tensor: Tensor) -> list[str]:
    """The tensors of the model that one under mlx-lm's name was made of."""
    if isinstance(tensor, ExpertStack):
        return [part.name for part in tensor.parts]
    return [tensor.inner.name if isinstance(tensor, Renamed) else tensor.name]


def as_mlx_model(checkpoint: Checkpoint, form: Kind, skip: Iterable[str] | None = None) -> Checkpoint:
    """A view in which layers are quantized as mlx-lm does, and the config says so.

    Layers that mlx-lm would quantize are: linear ones, the output layer, embeddings and stacks of experts, where their rows are
    whole groups; some it leaves alone or writes in 8 bits, by the type of the model.

    Args:
        checkpoint: a view of floating weights, of Hugging Face or of MLX.
        form: the format.
        skip: modules to keep in 16 bits; names or patterns.

    Raises:
        UsageError: mlx-lm has no such model, or its tensors are other than those of the file.
        CheckpointError: the experts of a layer are not all there.
    """
    model = _row(checkpoint)
    skip = None if skip is None else tuple(skip)
    tensors, came = mlx_named(checkpoint, model)
    config = form.config(Layers("", False, skip, ()))
    size = config["group_size"]
    tied = bool(_said(checkpoint.config, "tie_word_embeddings", default=False))
    found: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    count, apart = 0, 0
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        # mlx-lm drops an output layer that is tied to the embeddings, by its weight's name.
        numbers = False if tied and module == "lm_head" else model.numbers(name)
        named = _around(module, *(one.removesuffix(".weight") for one in came[name]))
        if any(is_named(pattern, one) for pattern in skip or () for one in named):
            numbers = False
        fits = numbers is not False and len(tensor.shape) > 1 and tensor.numel and tensor.shape[-1] % size == 0
        encoder = None
        if fits and numbers is True:
            encoder = form.encoder(name, tensor.shape, tensor.dtype, False)
        elif fits and isinstance(numbers, Mapping):
            # What a layer has of its own is affine, whatever the mode of the rest.
            own = MlxNumbers(numbers.get("bits", 4), numbers.get("group_size", 64))
            encoder = new(name, tensor.shape, tensor.dtype, False, numbers=own)
            if encoder is not None:
                config[module], apart = dict(numbers), apart + 1
        count += encoder is not None
        for made in [tensor] if encoder is None else encoded(tensor, encoder):
            found[made.name] = made
            shards[made.name] = _shard(checkpoint.shards.get(came[name][0], "model.safetensors"))
    if not count:
        raise UsageError(
            f"{checkpoint.ref} has no layer whose rows are whole groups of {size}", "write 16 bits, or another group"
        )
    said = {**checkpoint.config, "quantization": config, "quantization_config": config}
    if "lm_head.weight" in tensors and not tied:
        # Classes of mlx-lm take a config that does not say it for a tied one, transformers' for another.
        said.setdefault("tie_word_embeddings", False)
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    side_files = tuple(file for file in checkpoint.side_files if file.name != CONFIG)
    stacks = sum(isinstance(tensor, ExpertStack) for tensor in tensors.values())
    return replace(
        checkpoint,
        tensors=found,
        shards=shards,
        config=said,
        metadata={**checkpoint.metadata, "format": "mlx"},
        side_files=(*side_files, SideFile(CONFIG, BytesFile(CONFIG, text.encode()))),
        notes=(
            *checkpoint.notes,
            f"{counted(count, 'layer')} written in {form.name}, for mlx-lm"
            + (f"; {apart} of them in other bits or groups, as mlx-lm has them for this type" if apart else ""),
            *((f"experts are stacked, as mlx-lm has them ({stacks} stacks)",) if stacks else ()),
        ),
    )


def _around(*modules: str) -> set[str]:
    """These modules and those around them: a stack is skipped where its experts are."""
    found: set[str] = set()
    for name in modules:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def _row(checkpoint: Checkpoint) -> MlxModel:
    name = str(checkpoint.config.get("model_type"))
    if name in rows():
        return rows()[name]
    raise UsageError(
        f"{checkpoint.ref} is of type '{name}', whose tensors mlx-lm does not take as they are, or has no model for",
        "write 16 bits and convert that with mlx_lm.convert or mlx_vlm.convert; what they make is a base for "
        f"{option('quant', 'keep')}",
    )


def _said(config: Mapping[str, Any], key: str, default: Any) -> Any:
    inner = config.get("text_config")
    return config.get(key, inner.get(key, default) if isinstance(inner, Mapping) else default)


def _shard(file: str) -> str:
    """mlx-lm loads `model*.safetensors` alone."""
    return file if file.startswith("model") else f"model-{file}"


def mlx_named(checkpoint: Checkpoint, model: MlxModel | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors by mlx-lm's names, experts stacked, and what each was made of.

    Raises:
        UsageError: see `as_mlx_model`.
        CheckpointError: a stack lacks an expert, or its experts are not of one shape and dtype.
    """
    model = model or _row(checkpoint)
    tensors: dict[str, Tensor] = {}
    came: dict[str, list[str]] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(_DROPPED):
            continue
        other, expert = model.called(name)
        came.setdefault(other, []).append(name)
        if expert is None:
            tensors[other] = tensor if other == name else Renamed(other, tensor)
        else:
            stacks.setdefault(other, {})[expert] = tensor
            tensors.setdefault(other, tensor)  # its place in the order
    for name, experts in stacks.items():
        parts = [experts[index] for index in sorted(experts)]
        wrong = next((one for one in parts if (one.shape, one.dtype) != (parts[0].shape, parts[0].dtype)), None)
        if sorted(experts) != list(range(len(experts))) or wrong is not None or len(came[name]) != len(experts):
            what = "experts of several shapes or dtypes" if wrong is not None else "not all of its experts"
            raise CheckpointError(
                f"{checkpoint.ref} has {what} under '{came[name][0]}', of which mlx-lm makes one stack",
                "download or save it again",
            )
        assert prod(parts[0].shape) == parts[0].numel
        tensors[name] = ExpertStack(name, parts)
    return tensors, came
