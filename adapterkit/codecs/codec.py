"""What a stored weight format is: a row of a table that finds its weights and decodes ranges of them.

Detection works on headers; only what a header cannot say (the JSON that bitsandbytes keeps in a tensor, a stored shape)
is read, as a few raw bytes. Decoding reads what a range needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.encode import Encoder
    from adapterkit.dtypes import DType

    Decode = Callable[[int, int], torch.Tensor]


class StoredTensor(Protocol):
    """A stored tensor, as far as a codec needs it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` of the flattened tensor."""

    def raw(self) -> bytes:
        """All bytes, without torch."""


Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Weight:
    """One logical weight, and the stored tensors that hold it.

    Attributes:
        name: of the weight when it is not quantized.
        shape: of the decoded weight, in the orientation of the 16-bit checkpoint.
        dtype: that the format's own library decodes to.
        parts: the stored tensors, all of them: what is not named here stays in the checkpoint.
        how: the format in a few words, as ``nf4 64``.
        grain: ranges of elements that ``decode`` takes start and stop at multiples of it (or stop at the end).
        load: reads what every range needs (scales, tables) and gives the decoder of ranges.
        memory: bytes that the decoder holds.
        encoder: what writes other values in the same layout; None where that is not known.
        upright: stored in the orientation of the 16-bit checkpoint, also where quantizers turn it (GPT-2's ``Conv1D``).
        others: the same by the rule of another library than the format's own, by its name: what training on the grid used.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    parts: tuple[StoredTensor, ...]
    how: str
    grain: int
    load: Callable[[], Decode] = field(repr=False)
    memory: int = 0
    encoder: Callable[[], Encoder] | None = field(default=None, repr=False)
    others: Mapping[str, Callable[[], Encoder]] = field(default_factory=dict, repr=False)
    upright: bool = False

    def resolved(self) -> tuple[Any, ...]:
        """What decides the values that it is decoded to. (An encoder is described where it is used.)"""
        return (self.name, self.shape, self.dtype, self.parts, self.how, self.grain, self.load, self.upright)


Leave = Callable[[dict[str, Any], Sequence[str], Sequence[str]], None]


def listed(key: str) -> Leave:
    """Modules that are not quantized stand in the list ``key``; without one, loaders leave their usual ones alone, which a
    list then has to name too."""

    def leave(config: dict[str, Any], names: Sequence[str], plain: Sequence[str]) -> None:
        before = config.get(key)
        config[key] = list(dict.fromkeys([*(plain if before is None else before), *names]))

    return leave


@dataclass(frozen=True)
class Layers:
    """What a ``quantization_config`` is written of.

    Attributes:
        dtype: torch's name of the dtype of the 16-bit weights.
        double: nested scales were asked for.
        skip: modules that were named to be left alone, as given; None where the usual ones are.
        left: linear layers and stacks of experts that stay in 16 bits.
    """

    dtype: str
    double: bool
    skip: tuple[str, ...] | None
    left: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A format that 16-bit weights can be written in.

    Attributes:
        name: the word that asks for it, a key of `adapterkit.codecs.kinds.written`.
        encoder: name, shape (as a linear layer), dtype of a weight, and whether scales are nested, to what writes it; None
            for a weight that does not fit.
        config: the ``quantization_config``.
        bits: per weight, without scales.
        already: `Weight.how` of weights that are stored so.
        together: the encoder is an `InStep`: weights that servers run as one share a scale.
        some: as ``encoder``, for some rows of a weight, to measure what the format does to them.
        what: one line for readers, of a codec in a file of its own.
        nested: its scales can be quantized too; of a codec in a file of its own.
        experts: experts that are stored one by one are written too, and layers of one output and routers are not.
        of_experts: what is said where experts are written, of programs that read them otherwise.
        of_experts_left: the same of experts that are stored one by one and stay in 16 bits.
        said: whether a ``quantization_config`` is of this kind, where the words for single weights do not tell: they may be
            written in several.
        program: that has names of its own for tensors, and a rule of its own for which of them are quantized; empty where it is
            transformers.
        models: model types whose published layout it is; for them it goes before another of the same name. Empty for all.
        stacks: it is of experts that are stored as one stack ``[experts, in, out]``, and of nothing else.
        conv1d: what loads it has GPT-2's ``Conv1D`` in this format too.
    """

    name: str
    encoder: Callable[[str, tuple[int, ...], DType, bool], Encoder | None] = field(repr=False)
    config: Callable[[Layers], dict[str, Any]] = field(repr=False)
    bits: float
    already: tuple[str, ...]
    together: bool = False
    some: Callable[[str, tuple[int, ...], DType, bool], Encoder | None] | None = field(default=None, repr=False)
    what: str = ""
    nested: bool = False
    experts: bool = False
    of_experts: str = ""
    of_experts_left: str = ""
    said: Callable[[Mapping[str, Any]], bool] | None = field(default=None, repr=False)
    program: str = ""
    models: tuple[str, ...] = ()
    stacks: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class Codec:
    """A stored weight format.

    Attributes:
        name: as shown to users.
        methods: values of ``quant_method`` in a ``quantization_config`` under which it is stored.
        marks: ends of tensor names that no 16-bit checkpoint has.
        find: the weights in a checkpoint, given its tensors and its ``quantization_config`` (``{}`` without one).
        alone: the tensors say everything, so that a missing ``quantization_config`` does not matter.
        source: where the layout is published.
        what: which variants are read, for readers.
        leave: writes names of modules into a ``quantization_config`` that are stored in 16 bits beside the others; takes the
            config, those names, and the linear modules that are in 16 bits already. None: loaders go by the tensors alone.
        fused: servers look for their own name of a fused module (``qkv_proj``) where ``leave`` writes.
        kinds: how it is written anew.
        elsewhere: targets of ``convert`` that another program writes in this format.
        test: the tests that hold it against the library that defines it, or against the published layout.
    """

    name: str
    methods: tuple[str, ...]
    marks: tuple[str, ...]
    find: Callable[[Parts, Mapping[str, Any]], Iterator[Weight]] = field(repr=False)
    alone: bool
    source: str
    what: str
    test: str
    leave: Leave | None = field(default=None, repr=False)
    fused: bool = False
    kinds: tuple[Kind, ...] = ()
    elsewhere: tuple[str, ...] = ()

    @property
    def writes(self) -> tuple[str, ...]:
        """Targets of ``convert`` that give this format."""
        return (*(kind.name for kind in self.kinds), *self.elsewhere)


AGAIN = "download or save it again"


def stems(parts: Parts, mark: str) -> Iterator[str]:
    """What comes before ``mark`` in the names that end with it, in order."""
    return (name.removesuffix(mark) for name in parts if name.endswith(mark))


def companion(parts: Parts, name: str, of: str, what: str) -> StoredTensor:
    """A tensor that must be there.

    Raises:
        CheckpointError: it is not.
    """
    if name not in parts:
        raise CheckpointError(f"'{of}' is stored as {what} and its '{name}' is missing", AGAIN)
    return parts[name]


def check_shape(part: StoredTensor, shape: tuple[int, ...], what: str) -> StoredTensor:
    """``part``, whose shape must be ``shape``; a dimension of -1 is not compared.

    Raises:
        CheckpointError: it is not.
    """
    if len(part.shape) != len(shape) or any(want not in (-1, got) for want, got in zip(shape, part.shape, strict=True)):
        shown = "x".join("*" if size < 0 else str(size) for size in shape)
        raise CheckpointError(f"'{part.name}' is {list(part.shape)} where {what} needs {shown}", AGAIN)
    return part


def check_dtype(part: StoredTensor, codes: tuple[str, ...], what: str) -> StoredTensor:
    """``part``, whose dtype must be one of ``codes`` (of safetensors headers).

    Raises:
        CheckpointError: it is not.
    """
    if part.dtype.code not in codes:
        raise CheckpointError(f"'{part.name}' is {part.dtype}, which {what} does not have there", AGAIN)
    return part


FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def setting(config: Mapping[str, Any], key: str, *kinds: type, default: Any = None) -> Any:
    """A value of a ``quantization_config``: of one of ``kinds``, or ``default`` where there is none.

    Raises:
        CheckpointError: it is something else.
    """
    found = config.get(key)
    if found is None:
        return default
    if type(found) not in kinds:
        raise CheckpointError(f"'{key}' of the quantization_config is {json.dumps(found)[:60]}", AGAIN)
    return found


def block_size(config: Mapping[str, Any], key: str) -> list[tuple[int, int]]:
    """The rows and columns of a block that a ``quantization_config`` names: one pair, or none.

    Raises:
        CheckpointError: it is no such pair.
    """
    found = setting(config, key, list, default=[])
    if not found or found == [None, None]:
        return []
    if len(found) != 2 or not all(type(size) is int and size > 0 for size in found):
        raise CheckpointError(f"'{key}' of the quantization_config is {json.dumps(found)[:60]}", AGAIN)
    return [(found[0], found[1])]


def whole(part: StoredTensor) -> torch.Tensor:
    """All of a stored tensor, in its shape."""
    count = 1
    for size in part.shape:
        count *= size
    return part.read(0, count).view(part.shape)


def check_scales(scales: torch.Tensor, part: StoredTensor) -> torch.Tensor:
    """Scales of a weight, once none is NaN or infinite.

    Raises:
        CheckpointError: one is; every weight under it would be.
    """
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"'{part.name}' holds scales that are NaN or infinite", AGAIN)
    return scales


def zero_scale(name: str) -> CheckpointError:
    """A scale of zero stands for zeros; over other numbers it would erase them."""
    return CheckpointError(f"a scale of '{name}' is zero where its numbers are not", AGAIN)


def check_index(part: StoredTensor, count: int) -> torch.Tensor:
    """A stored tensor of indices below ``count``, flat.

    Raises:
        CheckpointError: one of them is not.
    """
    found = whole(part).view(-1).long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < count:
        raise CheckpointError(f"'{part.name}' names group {int(found.max())} of {count}", AGAIN)
    return found
