"""Whether an output layer that a config ties to the embedding is the embedding: by its values, not on the config's word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import TargetError
from adapterkit.gguf.arch.mapping import EMBEDDING, OUTPUT, Mapper

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Extent, Tensor
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.spec import ArchSpec

BLOCK = 1 << 20  # bytes or elements that are compared at a time


def mapper_of(spec: ArchSpec, config: Config, base: Checkpoint) -> Mapper:
    """The rules of an architecture for a Hugging Face checkpoint.

    transformers 5 keeps an output layer that is stored with values of its own although the config says tied; so does this.

    Raises:
        TargetError: such an output layer, in an architecture that has none in GGUF.
    """
    mapper = Mapper(spec, config)
    if not mapper.says_tied:
        return mapper
    names = {found.rule.gguf[0]: name for name in base.shapes if (found := mapper.match(name)) and found.rule.gguf}
    output, embedding = (names.get(one.removesuffix(".weight")) for one in (OUTPUT, EMBEDDING))
    if output is None or embedding is None or equal(base[output], base[embedding]):
        return mapper
    if spec.tied:
        raise TargetError(
            f"{base.ref}: '{output}' has values of its own, and llama.cpp's {spec.arch} uses the embedding in its place",
            "run it with transformers or vLLM",
        )
    return Mapper(spec, config, apart=True)


def note(mapper: Mapper) -> tuple[str, ...]:
    """What to say where the config and the tensors contradict each other."""
    if not mapper.apart:
        return ()
    said = "config.json ties the output layer to the embedding, and the checkpoint holds another"
    return (f"{said}; it is kept, as transformers does",)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; read in blocks up to the first difference."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and one.extent is not None and other.extent is not None:
        return _same_bytes(one.extent, other.extent)
    for start in range(0, one.numel, BLOCK):
        stop = min(start + BLOCK, one.numel)
        if not bool((one.read_wide(start, stop).float() == other.read_wide(start, stop).float()).all()):
            return False
    return True


def _same_bytes(one: Extent, other: Extent) -> bool:
    if one == other:
        return True
    return all(
        one.source.read(one.offset + start, min(BLOCK, one.nbytes - start))
        == other.source.read(other.offset + start, min(BLOCK, one.nbytes - start))
        for start in range(0, one.nbytes, BLOCK)
    )
