"""LoRA as GGUF, as llama.cpp loads it beside a model.

Tensors ``<weight>.lora_a`` ``[r, in]`` and ``<weight>.lora_b`` ``[out, r]`` (with experts in front for stacks; for the
token embedding ``[vocabulary, r]`` and ``[width, r]``), applied with ``alpha / r`` (llama-adapter.cpp). One alpha serves
all tensors, so every other scaling is folded into ``lora_b``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.adapters.change import Weights
from adapterkit.adapters.config import AdapterConfig
from adapterkit.adapters.edits import adapter_edits
from adapterkit.adapters.write_peft import Factor
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.dtypes import F16, F32
from adapterkit.errors import UnsupportedAdapter, counted
from adapterkit.gguf.filetypes import FILE_TYPES
from adapterkit.gguf.metadata import Entry, array, f32, text, u32
from adapterkit.gguf.names import EMBEDDING, OUTPUT, GGUFNames
from adapterkit.gguf.quantize import place
from adapterkit.gguf.reader import U32
from adapterkit.gguf.tensors import encoded
from adapterkit.gguf.text_part import text_part
from adapterkit.gguf.types import TYPES, GGMLType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.change import Kernel
    from adapterkit.adapters.factors import Slot
    from adapterkit.adapters.method import Edit
    from adapterkit.adapters.target import Piece, Target

    Pair = tuple[torch.Tensor, torch.Tensor]

ALPHA, A, B = "adapter.lora.alpha", ".lora_a", ".lora_b"
INVOCATION = "adapter.alora.invocation_tokens"
FACTOR_TYPES = ("F32", "F16", "BF16", "Q8_0")


class PlannedFactor(Tensor):
    """A small tensor that was computed while planning: the factor of an adapter."""

    dtype = F32

    def __init__(self, name: str, values: torch.Tensor, how: str) -> None:
        self.name, self.shape, self._how = name, tuple(values.shape), how
        self._values = values.float().contiguous().view(-1)

    @property
    def how(self) -> str:
        return self._how

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._values[start:stop]


class _NoWeights(Weights):
    """What a low-rank change may ask of W: its shape. A change that asks for values depends on the base."""

    def __init__(self, target: Target) -> None:
        self.shape, self.dtype = target.matrix, F32

    def read(self, start: int, stop: int) -> torch.Tensor:
        raise _NeedsBaseError

    def other(self, target: Target) -> Weights:
        return _NoWeights(target)


class _NeedsBaseError(Exception):
    """The change is computed from the values of W."""


@dataclass
class _Part:
    """Rows of one GGUF matrix that get ``left @ right``: ``rows`` within the matrix ``index`` of its stack."""

    index: int
    rows: range
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    columns: slice


def lora_tensors(
    adapter: Adapter, names: GGUFNames, *, allow_unknown: bool = False, kind: str = "F32"
) -> tuple[list[Tensor], list[Entry], tuple[str, ...]]:
    """The tensors and the metadata of an adapter as GGUF LoRA, and notes.

    Args:
        adapter: LoRA in any scaling (rsLoRA, alpha and rank patterns), on linear layers, embeddings, experts.
        names: of the base.
        allow_unknown: go on where the config has fields that are not known here.
        kind: the type of the factors: F32, F16, BF16 or Q8_0; one whose rows do not fill the blocks of Q8_0 becomes F16.

    Raises:
        UnsupportedAdapter: it changes what a LoRA file cannot hold; the sentence names the road that works.
        TargetError, AdapterError: see `adapter_edits`.
    """
    adapter, left = text_part(adapter)
    invocation = adapter.config.get("alora_invocation_tokens")
    if invocation:
        # llama-server applies the file from these tokens on.
        plain = {key: value for key, value in adapter.config.raw.items() if key != "alora_invocation_tokens"}
        adapter = replace(adapter, config=AdapterConfig(plain, adapter.config.where))
    edits = adapter_edits(adapter, names, names.config, allow_unknown=allow_unknown)
    shapes = names.shapes
    parts: dict[str, list[_Part]] = {}
    notes = list(left)
    for edit in edits:
        new = edit.change.replaced
        embedding = set(edit.target.tensors) <= {EMBEDDING, OUTPUT}
        if embedding and edit.override and new is not None and new.shape == edit.target.shape:
            # PEFT saves embeddings that it did not train beside a LoRA on them; the model has them already.
            notes.append(f"{edit.target.parameter} was saved with the adapter and not trained; it is left out")
            continue
        ignored = next((tensor for tensor in edit.target.tensors if ignores(tensor, names.no_lora)), None)
        if ignored is not None:
            raise UnsupportedAdapter(
                f"{adapter.ref} changes {edit.target.parameter}, and llama.cpp applies no LoRA to '{ignored}' in a "
                f"{names.arch} as it was trained",
                "merge it instead: adapterkit merge BASE ADAPTER -o merged.gguf",
            )
        kernel = _kernel(edit, adapter, names)
        for piece in edit.target.pieces:
            shape = shapes[piece.tensor]
            found = _turned(piece, kernel, edit.target, shape) if piece.transposed else _parts(piece, kernel, shape)
            parts.setdefault(piece.tensor, []).extend(found)
    alpha = float(adapter.config.number("lora_alpha", 0)) or 1.0
    tensors: list[Tensor] = []
    for name in sorted(parts, key=place):
        a, b = names.adjusted(name, *_factors(parts[name], shapes[name], alpha))
        if name == EMBEDDING:
            a, b = b, a.T  # looked up by row: the factor with the vocabulary is called A
        tensors += [PlannedFactor(name + A, a, "lora a"), PlannedFactor(name + B, b, "lora b")]
    written = [encoded(tensor, _fitting(tensor, kind)) for tensor in tensors]
    entries = lora_entries(names.arch, alpha, kind, adapter.config.base or "", invocation)
    return written, entries, tuple(notes)


def _fitting(tensor: Tensor, kind: str) -> GGMLType:
    """The type of a factor; its rows have to fill whole blocks."""
    found = TYPES[kind]
    return found if tensor.shape[-1] % found.block == 0 else TYPES["F16"]


def ignores(tensor: str, ends: Sequence[str]) -> bool:
    """Whether llama.cpp multiplies a weight without looking for a LoRA, by the ends of such weights' names."""
    return any(tensor == end or tensor.endswith("." + end) for end in ends)


def _kernel(edit: Edit, adapter: Adapter, names: GGUFNames) -> Kernel:
    road = "merge it instead: adapterkit merge BASE.gguf ADAPTER -o merged.gguf"
    parameter, how = edit.target.parameter, edit.change.how
    try:
        kernel = edit.change.load(_NoWeights(edit.target)) if edit.change.replaced is None else None
    except _NeedsBaseError:
        kernel = None
    matrices = all(len(names.shapes[tensor]) > 1 for tensor in edit.target.tensors)
    if kernel is None or not matrices or kernel.parts(range(1)) is None:
        raise UnsupportedAdapter(f"{adapter.ref}: a LoRA file cannot hold what it does to {parameter} ({how})", road)
    if EMBEDDING in edit.target.tensors and OUTPUT not in names.shapes:
        raise UnsupportedAdapter(
            f"{adapter.ref} changes {parameter}, and this model uses one tensor for the embedding and the output layer, "
            "on which llama.cpp cannot apply a LoRA",
            road,
        )
    return kernel


def _parts(piece: Piece, kernel: Kernel, shape: tuple[int, ...]) -> Iterable[_Part]:
    """The low-rank parts of one piece, by the matrix of the stack that they lie in."""
    height = shape[-2] if len(shape) > 1 else shape[0]
    rows = range(piece.row, piece.row + piece.count * piece.row_step, piece.row_step)
    found = kernel.parts(rows)
    assert found is not None
    for where, left, right, scale in found:
        held = range(piece.at, piece.at + piece.count * piece.at_step, piece.at_step)[where]
        while len(held):
            index, first = divmod(held[0], height)
            inside = min(len(held), -((first - height) // held.step))
            at = range(first, first + inside * held.step, held.step)
            yield _Part(index, at, left[:inside], right, scale, slice(None))
            held, left = held[inside:], left[inside:]


def _turned(piece: Piece, kernel: Kernel, target: Target, shape: tuple[int, ...]) -> Iterable[_Part]:
    """A piece whose tensor lies on its side, in a matrix or in one of a stack: the factors change places."""
    rows = range(piece.row, piece.row + piece.count * piece.row_step, piece.row_step)
    found = kernel.parts(rows)
    assert found is not None
    columns = piece.held_columns(target.matrix[1])
    width = piece.columns or target.matrix[1]
    index, at = divmod(piece.at, shape[-2])
    for where, left, right, scale in found:
        beside = range(piece.row_at, piece.row_at + piece.count)[where]
        yield _Part(
            index,
            range(at, at + width),
            right[:, columns].T,
            left.T,
            scale,
            slice(beside.start, beside.stop, beside.step),
        )


def _factors(parts: list[_Part], shape: tuple[int, ...], alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[.., r, in]`` and B ``[.., out, r]``; parts with the same right factor share its place.

    B holds ``scale * r / alpha`` besides, for the runtime multiplies with ``alpha / r``.
    """
    import torch

    matrices = shape[0] if len(shape) > 2 else 1
    groups: list[dict[tuple[int, ...], list[_Part]]] = [{} for _ in range(matrices)]
    for part in parts:
        key = (part.right.data_ptr(), part.right.shape[0], part.columns.start or 0)
        groups[part.index].setdefault(key, []).append(part)
    rank = max(sum(same[0].right.shape[0] for same in group.values()) for group in groups)
    a, b = torch.zeros(matrices, rank, shape[-1]), torch.zeros(matrices, shape[-2], rank)
    for index, group in enumerate(groups):
        at = 0
        for same in group.values():
            size = same[0].right.shape[0]
            a[index, at : at + size, same[0].columns] = same[0].right
            for part in same:
                where = slice(part.rows.start, part.rows[-1] + 1, part.rows.step)
                b[index, where, at : at + size] = part.left * (part.scale * rank / alpha)
            at += size
    return (a, b) if len(shape) > 2 else (a[0], b[0])


def lora_entries(
    arch: str, alpha: float, kind: str = "F32", base: str = "", invocation: Sequence[int] | None = None
) -> list[Entry]:
    """The metadata of a LoRA file.

    Args:
        arch: of the model.
        alpha: each tensor is applied with ``alpha / r``.
        kind: the type of the factors.
        base: what the model is called.
        invocation: the tokens of an aLoRA.
    """
    entries = [
        text("general.architecture", arch),
        text("general.type", "adapter"),
        text("adapter.type", "lora"),
        f32(ALPHA, alpha),
        u32("general.file_type", FILE_TYPES[kind].number),
    ]
    if invocation:
        entries.append(array(INVOCATION, U32, [int(token) for token in invocation]))
    if base:
        entries += [u32("general.base_model.count", 1), text("general.base_model.0.name", base)]
    return entries


def factor_tensors(ranks: Mapping[Slot, int], read: Callable[[Slot], Sequence[Pair]]) -> list[Tensor]:
    """The tensors of a LoRA file for slots that are tensors of a GGUF model, F16, in the order of such files.

    Args:
        ranks: of the slots; the factors of each are filled up with zeros.
        read: gives B ``[m, r]`` and A ``[r, n]`` of a slot, one pair for each matrix of a stack.
    """
    found: list[Tensor] = []
    for slot in sorted(ranks, key=lambda one: place(one.parameter)):
        rank, (m, n) = ranks[slot], slot.shape
        front = (slot.count,) if slot.kind == "stacked" else ()
        found.append(Factor(slot.parameter + A, F16, (*front, rank, n), partial(_stack, slot, rank, 1, read)))
        found.append(Factor(slot.parameter + B, F16, (*front, m, rank), partial(_stack, slot, rank, 0, read)))
    return found


def _stack(slot: Slot, rank: int, side: int, read: Callable[[Slot], Sequence[Pair]]) -> torch.Tensor:
    """One side of all pairs of a slot, filled up to a rank."""
    import torch

    pad = torch.nn.functional.pad
    pairs = read(slot)
    if side == 0:
        return torch.stack([pad(b, (0, rank - b.shape[1])) for b, _ in pairs])
    return torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for _, a in pairs])


def norms_of(tensors: Iterable[str]) -> list[str]:
    """The norms in a LoRA file, which llama.cpp reads over."""
    return [name for name in tensors if name.endswith("_norm.weight")]


def left_out(tensors: Iterable[str]) -> tuple[str, ...]:
    """What to say of tensors of a LoRA file that do nothing."""
    norms = norms_of(tensors)
    return (
        (f"left out, as llama.cpp does: {counted(len(norms), 'norm')} of the file, as '{norms[0]}'",) if norms else ()
    )


def lora_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of a GGUF LoRA by the weight they change.

    Raises:
        UnsupportedAdapter: a tensor that is no factor, or a factor without its partner.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    norms = norms_of(tensors)
    for name in tensors:
        if name in norms:
            continue
        stem = name.removesuffix(A).removesuffix(B)
        if stem == name or stem + A not in tensors or stem + B not in tensors:
            raise UnsupportedAdapter(f"'{name}' is no pair of LoRA factors", "convert the adapter again")
        pairs[stem] = (tensors[stem + A], tensors[stem + B])
    return pairs
