"""Dense layers that sentence-transformers has after the pooling, as tensors of the model before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.checkpoint.folder import read_folder
from adapterkit.checkpoint.open import locate
from adapterkit.checkpoint.pipeline import Component
from adapterkit.checkpoint.tensor import Stored
from adapterkit.errors import CheckpointError, TargetError, option
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.pooling import MODULES, modules
from adapterkit.gguf.arch.spec import Rule, rule

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint

NAMES = ("dense_2", "dense_3")
"""The layers that the runtime multiplies a pooled text with, one after the other; it adds no bias and applies no function."""
_LEAD = "sentence_transformers."
RULES: tuple[Rule, ...] = tuple(rule(f"{_LEAD}{name}", name) for name in NAMES)


def with_dense(base: Checkpoint) -> Checkpoint:
    """A model with the weights of the Dense modules that ``modules.json`` beside it names.

    Raises:
        TargetError: modules that the runtime has no place for.
        CheckpointError: there are none, or one is incomplete.
    """
    ref = base.ref
    read = Config(base.config, ref, {file.name: file.bytes() for file in base.side_files if file.name == MODULES})
    found = [str(one.get("path")) for one in modules(read) if str(one.get("type", "")).endswith("Dense")]
    if not found:
        raise CheckpointError(
            f"{ref} has no Dense modules of sentence-transformers", f"leave out {option('dense_modules', True)}"
        )
    if len(found) > len(NAMES):
        raise TargetError(
            f"{ref} has {len(found)} Dense modules, and llama.cpp has a place for {len(NAMES)}",
            "serve it with sentence-transformers",
        )
    listing = locate(ref)
    tensors, shards, sources = dict(base.tensors), dict(base.shards), list(base.sources)
    for name, path in zip(NAMES, found, strict=False):
        opened = read_folder(Component(listing, path))
        said = opened.config.get("activation_function", "torch.nn.modules.linear.Identity")
        if not str(said).endswith("Identity"):
            raise TargetError(
                f"{ref}: '{path}' applies {said}, and llama.cpp no function", "serve it with sentence-transformers"
            )
        if set(opened.tensors) != {"linear.weight"}:
            odd = min(set(opened.tensors) - {"linear.weight"}, default="no linear.weight")
            raise TargetError(
                f"{ref}: '{path}' has {odd}, and llama.cpp multiplies with one matrix there",
                "serve it with sentence-transformers",
            )
        weight = opened.tensors["linear.weight"]
        assert isinstance(weight, Stored)
        key = f"{_LEAD}{name}.weight"
        tensors[key] = Stored(key, weight.dtype, weight.shape, weight.source, weight.offset)
        shards[key] = f"{path}/{opened.shards['linear.weight']}"
        sources += opened.sources
    return replace(base, tensors=tensors, shards=shards, sources=tuple(sources))


def sizes(shapes: Mapping[str, Sequence[int]], width: int, ref: str) -> dict[str, int]:
    """The keys of the layers that are in a file: how many numbers go into each, and come out.

    Raises:
        CheckpointError: they do not fit each other, or the model.
    """
    there = [name for name in NAMES if f"{name}.weight" in shapes]
    found: dict[str, int] = {}
    wanted = width
    for name in there:
        out, into = shapes[f"{name}.weight"]
        if into != wanted:
            raise CheckpointError(f"{ref}: a Dense module takes {into} numbers and is given {wanted}", "correct it")
        found |= {f"{name}_feat_in": into, f"{name}_feat_out": out}
        wanted = out
    if there and wanted != width:
        raise CheckpointError(
            f"{ref}: its Dense modules give {wanted} numbers, and llama.cpp's embeddings have {width}",
            "serve it with sentence-transformers",
        )
    return found
