"""A base whose first layer takes more inputs, as the control LoRAs of Flux are trained (Depth, Canny: 128 where it has 64).

The layer is widened with columns of zeros, and the factors are added to that.

Source: diffusers, loaders/lora_pipeline.py (`FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.checkpoint.pipeline import component_configs, with_component
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint

_FACTOR = re.compile(r"(?:.*[._])?(?:img_in|x_embedder)\.(?:lora_A|lora_down)\.weight")
_BLOCKS = ("double_blocks.0.", "single_blocks.0.", "transformer_blocks.0.", "single_transformer_blocks.0.")
# The layer in the original layout and in diffusers'.
_LAYER = re.compile(r"(?:.*\.)?(?:img_in|x_embedder)\.weight")


class Widened(Tensor):
    """A matrix ``[rows, columns]`` with columns of zeros behind its own: ``[rows, width]``."""

    def __init__(self, inner: Tensor, width: int) -> None:
        self.name, self.dtype, self.inner = inner.name, inner.dtype, inner
        self.shape = (inner.shape[0], width)

    @property
    def reads(self) -> int:
        return self.inner.reads

    @property
    def how(self) -> str:
        return f"{self.inner.shape[1]} inputs to {self.shape[1]}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._padded(start, stop, wide=False)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        return self._padded(start, stop, wide=True)

    def _padded(self, start: int, stop: int, *, wide: bool) -> torch.Tensor:
        from torch.nn.functional import pad

        width, columns = self.shape[1], self.inner.shape[1]
        first, last = start // width, -(-stop // width)
        read = self.inner.read_wide if wide else self.inner.read
        rows = pad(read(first * columns, last * columns).view(-1, columns), (0, width - columns))
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def release(self) -> None:
        self.inner.release()


def widened_base(base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[Checkpoint, list[str]]:
    """The base with as many inputs as its adapters were trained on, and a note; unchanged where they are the base's own.

    Only the first layer of a model of Flux' kind, and only to a multiple of its inputs: another width is another base.
    Of a pipeline, the config of the component says it.

    Raises:
        TargetError: a config of diffusers says another number of inputs than the layer has.
    """
    asked = max((_width(adapter) for adapter in adapters), default=0)
    if not asked or not any(block in name for name in base for block in _BLOCKS):
        return base, []
    names = [name for name in base if _LAYER.fullmatch(name)]
    if len(names) != 1 or len(base[names[0]].shape) != 2:
        return base, []
    (name,) = names
    columns = base[name].shape[1]
    if asked <= columns or asked % columns:
        return base, []
    inside, folder = component_configs(base.config), name.partition(".")[0]
    config = _wider(inside.get(folder, {}) if inside else base.config, columns, asked, f"{base.ref}: '{name}'")
    if inside:
        config = with_component(base.config, folder, config)
    note = f"'{name}' takes {asked} inputs in place of {columns}, as the adapter was trained; the new columns start as zeros"
    return replace(base, tensors={**base.tensors, name: Widened(base[name], asked)}, config=config), [note]


def _wider(config: Mapping[str, Any], columns: int, asked: int, where: str) -> dict[str, Any]:
    """A config that says as many inputs as were asked for; unchanged where it is no model's of diffusers and says none."""
    said = config.get("in_channels", columns if "_class_name" in config else None)
    if said == columns:
        # diffusers takes the number of outputs from that of inputs where it is not said.
        return {**config, "in_channels": asked, "out_channels": config.get("out_channels") or columns}
    if "_class_name" in config:
        raise TargetError(
            f"{where} has {columns} inputs, and its config.json says in_channels {said}, so it cannot be widened to {asked}",
            "correct config.json, or give the base that the adapter was trained on",
        )
    return dict(config)


def _width(adapter: Adapter) -> int:
    factors = (tensor for key, tensor in adapter.tensors.items() if _FACTOR.fullmatch(key))
    return max((tensor.shape[1] for tensor in factors if len(tensor.shape) == 2), default=0)
