"""GGUF files of image and video models: the original checkpoint's own tensors, under its own names.

Source: city96/ComfyUI-GGUF (tools/convert.py), which writes them: nothing is renamed or permuted; a tensor whose dimensions
ggml does not hold is flattened, and ``comfy.gguf.orig_shape.NAME`` keeps its shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.names import Names
from adapterkit.gguf.names import EMBEDDING

if TYPE_CHECKING:
    from adapterkit.gguf.arch.maps import Strided
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

# `general.architecture` of such files, as far as ComfyUI-GGUF reads them.
ARCHS = frozenset(
    {"flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image"}
)
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def is_diffusion(base: GGUFCheckpoint) -> bool:
    """Whether a GGUF file holds an image or video model."""
    return base.arch in ARCHS and EMBEDDING not in base


class DiffusionNames(Names):
    """The parameters of an image or video model in GGUF: its tensors as they are.

    Args:
        base: the file.
    """

    always_tied = False

    def __init__(self, base: GGUFCheckpoint) -> None:
        super().__init__(base.shapes, base.config)
        self._flat = {
            key.removeprefix(ORIGINAL_SHAPE) for key in base.header.keys if key.startswith(ORIGINAL_SHAPE)
        } & base.shapes.keys()

    def moved(self, tensor: str) -> bool:
        return False

    def columns_of(self, tensor: str) -> Strided | None:
        return None

    def check(self, touched: list[str], ref: str) -> None:
        """Whether each of the changed tensors has its own dimensions in the file.

        Raises:
            TargetError: one was flattened.
        """
