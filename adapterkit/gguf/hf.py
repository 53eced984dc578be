"""The names that the parameters of a base have in GGUF, whatever the base's own format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import TargetError
from adapterkit.gguf.arch.back import mapper_of_gguf
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.table import spec_of
from adapterkit.gguf.arch.ties import mapper_of
from adapterkit.gguf.checkpoint import GGUFCheckpoint
from adapterkit.gguf.names import GGUFNames
from adapterkit.gguf.scales import scales_of

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint


def gguf_names(base: Checkpoint) -> GGUFNames:
    """The names that a base has, or would have, in GGUF.

    Raises:
        TargetError: an architecture or a tensor that is not known here.
        CheckpointError: a config that does not say what is needed.
    """
    if isinstance(base, GGUFCheckpoint):
        mapper = mapper_of_gguf(base)
        if mapper.spec.scaled:
            raise TargetError(
                f"{base.ref}: numbers of its config are multiplied into the weights of a GGUF {base.arch}, and no adapter "
                "was trained on those",
                "merge into the Hugging Face base: adapterkit merge BASE ADAPTER -o OUT.gguf",
            )
        return GGUFNames(mapper, mapper.hf_shapes(scales_of(base, mapper).shapes, base.ref), base.ref)
    view = dequantized(base)
    config = Config(view.config, base.ref)
    return GGUFNames(mapper_of(spec_of(config), config, view), view.shapes, base.ref)
