"""Which type every tensor of a GGUF output gets, and the handles that give it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import NotFound, UsageError, counted, option
from adapterkit.gguf.checkpoint import SPLIT_KEYS, GGUFCheckpoint
from adapterkit.gguf.filetypes import FILE_TYPES, file_type
from adapterkit.gguf.metadata import Entry, kept, text, u32
from adapterkit.gguf.mixes import choose_types, compiled, fitting, needs_importance
from adapterkit.gguf.names import EMBEDDING
from adapterkit.gguf.tensors import Quantized, bits_per_weight, decoded, encoded, kind_of
from adapterkit.gguf.types import TYPES, ggml_type
from adapterkit.stores.files import reading

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.importance import Importance
    from adapterkit.places import Address

FILE_TYPE, QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"
GRID_BITS = 8  # below, a tensor's grid is coarser than what training changes


@dataclass(frozen=True)
class Quantization:
    """What types the user asked for.

    Attributes:
        mix: such as ``Q4_K_M``; None keeps every tensor's own type.
        imatrix: an importance matrix, GGUF or the older .dat.
        pure: every tensor the mix's default type.
        tensor_types: (regular expression, type) pairs that go before the mix.
        output_type, token_embedding_type: of those tensors.
        leave_output: ``output.weight`` keeps its type.
        include_weights, exclude_weights: parts of names of tensors that alone get, or do not get, their importance.
        keep_touched: the type of tensors that an adapter changed, unless the mix gives them more bits.
        keep_below: only of those whose change would come out with a cosine below this; None keeps all of them.
        yes_lossy: write tensors back onto coarse grids all the same.
    """

    mix: str | None = None
    imatrix: str | Path | Address | None = None
    pure: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    token_embedding_type: str | None = None
    leave_output: bool = False
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    keep_touched: str | None = None
    keep_below: float | None = None
    yes_lossy: bool = False

    def __post_init__(self) -> None:
        if self.include_weights and self.exclude_weights:
            raise UsageError(
                f"{option('include_weights')} and {option('exclude_weights')} contradict each other", "give one of them"
            )
        if self.keep_below is None:
            return
        if self.keep_touched is None:
            raise UsageError(
                f"{option('keep_below')} says which tensors are kept wider", f"add {option('keep_touched')}, as in Q8_0"
            )
        if not 0 < self.keep_below <= 1:
            raise UsageError(
                f"{option('keep_below')} {self.keep_below:g} is no cosine", "give a number between 0 and 1, as 0.5"
            )

    def request(self) -> dict[str, Any]:
        """The options as JSON, for a plan file."""
        found = {**self.__dict__, "tensor_types": [list(pair) for pair in self.tensor_types]}
        return {**found, "imatrix": None if self.imatrix is None else str(self.imatrix)}

    @classmethod
    def of_request(cls, data: Mapping[str, Any]) -> Quantization:
        return cls(
            **{
                **data,
                **{name: tuple(data.get(name, ())) for name in ("include_weights", "exclude_weights")},
                "tensor_types": tuple((a, b) for a, b in data["tensor_types"]),
            }
        )


def parse_tensor_type(given: str) -> tuple[str, str]:
    """``REGEX=TYPE``.

    Raises:
        UsageError: not of that form, or no such type.
    """
    pattern, equals, kind = given.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"'{given[:80]}' is not REGEX=TYPE", "write it like attn_v=Q8_0")
    return pattern, ggml_type(kind).name


@dataclass(frozen=True)
class Typed:
    """Handles as they will be written, the metadata beside them, and what to say about it."""

    tensors: tuple[Tensor, ...]
    entries: tuple[Entry, ...]
    types: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TypeInputs:
    """What the types of an output are chosen from.

    Attributes:
        arch: the architecture.
        hparams: ``n_layer``, ``n_expert``, ``n_head``, ``n_head_kv``.
        now: the type that each tensor has, or would have in a file that is not quantized.
        entries: key-values without those of the types.
        too_lossy: the changed tensors that are to be kept wider, where that was measured.
    """

    arch: str
    hparams: Mapping[str, Any]
    now: Mapping[str, str]
    entries: tuple[Entry, ...] = ()
    too_lossy: frozenset[str] | None = None


def typed(
    view: Mapping[str, Tensor],
    base: GGUFCheckpoint,
    asked: Quantization,
    touched: Sequence[str] = (),
    too_lossy: frozenset[str] | None = None,
) -> Typed:
    """Give every tensor of a view of ``base`` its type.

    Args:
        view: handles by name; those in ``touched`` give floats, the others are the base's own.
        base: where the tensors' present types and the metadata are.
        asked: the user's wishes.
        touched: tensors that an adapter changed.
        too_lossy: see `TypeInputs`.

    Raises:
        UsageError: a wish that cannot be met, or one that would lose what was trained.
    """
    # An output layer that got values of its own shared those of the embedding, and so its type.
    now = {name: kind_of(base[name if name in base else EMBEDDING]).name for name in view}
    hparams = {
        "n_layer": base.number("block_count"),
        "n_expert": base.number("expert_count"),
        "n_head": base.header.get(f"{base.arch}.attention.head_count", 0),
        "n_head_kv": base.header.get(f"{base.arch}.attention.head_count_kv", 0),
    }
    changed = [FILE_TYPE, QUANTIZATION_VERSION] if asked.mix is not None else []
    entries = kept(base.header, without=(*SPLIT_KEYS, *changed))
    found = typed_from(view, TypeInputs(base.arch, hparams, now, tuple(entries), too_lossy), asked, touched)
    if asked.mix is not None or QUANTIZATION_VERSION in base.header.keys:
        return found
    if any(TYPES[kind].is_quantized for kind in found.types):
        return replace(found, entries=(*found.entries, u32(QUANTIZATION_VERSION, 2)))
    return found


def typed_from(
    view: Mapping[str, Tensor], origin: TypeInputs, asked: Quantization, touched: Sequence[str] = ()
) -> Typed:
    """The same for a view whose types and metadata come from elsewhere."""
    wanted = _wanted(view, origin, asked)
    for name in touched if origin.too_lossy is None else sorted(origin.too_lossy):
        wanted[name] = _for_touched(wanted[name], view[name].shape[-1], asked)
    lost = _check_loss(wanted, origin.now, set(touched), asked, measured=origin.too_lossy is not None)
    matrix = _importance(asked, wanted)
    order = sorted(view, key=place) if asked.mix else list(view)
    tensors = [_tensor(view[name], TYPES[wanted[name]], matrix, name in touched) for name in order]
    counts: dict[str, int] = {}
    for name in order:
        counts[wanted[name]] = counts.get(wanted[name], 0) + 1
    return Typed(tuple(tensors), (*origin.entries, *_entries(asked, matrix)), counts, tuple(lost))


def _wanted(view: Mapping[str, Tensor], origin: TypeInputs, asked: Quantization) -> dict[str, str]:
    now = origin.now
    options = (asked.imatrix, asked.pure, asked.tensor_types, asked.output_type, asked.token_embedding_type)
    if asked.mix is None:
        if any((*options, asked.leave_output)):
            raise UsageError(
                "options of a quantization were given without one",
                f"add {option('quant')}, as in {option('quant', 'Q4_K_M')}",
            )
        return dict(now)
    mix, _ = file_type(asked.mix)
    lost = next((p for p, _ in asked.tensor_types if not any(compiled(p).search(name) for name in view)), None)
    if lost is not None:
        raise UsageError(f"this model has no tensor that '{lost}' names", "name it as a GGUF file does, like ffn_down")
    found = choose_types(
        [(name, tensor.shape, now[name]) for name, tensor in view.items()],
        mix,
        origin.arch,
        origin.hparams,
        has_imatrix=asked.imatrix is not None,
        pure=asked.pure,
        tensor_types=asked.tensor_types,
        output_type=asked.output_type,
        token_embedding_type=asked.token_embedding_type,
        leave_output=asked.leave_output,
    )
    if asked.imatrix is None:
        bare = next(
            (name for name, kind in found.items() if kind != now[name] and needs_importance(name, kind, mix)), None
        )
        if bare is not None:
            raise UsageError(
                f"'{bare}' as {found[bare]} needs an importance matrix", f"add {option('imatrix')}, or choose more bits"
            )
    return found


def _for_touched(kind: str, columns: int, asked: Quantization) -> str:
    if asked.keep_touched is None:
        return kind
    floor = TYPES[fitting(columns, ggml_type(asked.keep_touched).name)]
    return floor.name if bits_per_weight(floor) > bits_per_weight(TYPES[kind]) else kind


def _check_loss(
    wanted: Mapping[str, str], now: Mapping[str, str], touched: set[str], asked: Quantization, *, measured: bool
) -> list[str]:
    """Refuse, or with ``yes_lossy`` say, what a second coarse grid would lose."""

    def coarse(kind: str) -> bool:
        return bits_per_weight(TYPES[kind]) < GRID_BITS

    too_lossy = [name for name in touched if coarse(now[name]) and coarse(wanted[name]) and not measured]
    again = [name for name in wanted if name not in touched and coarse(now[name]) and wanted[name] != now[name]]
    if too_lossy and not asked.yes_lossy:
        first = sorted(too_lossy, key=place)[0]
        some = counted(len(too_lossy), "tensor that the adapter changes lies", "tensors that the adapter changes lie")
        raise UsageError(
            f"{some} on a grid coarser than what it learnt, as '{first}' in {now[first]}; "
            f"written back as {wanted[first]} most of the change would be rounded away",
            f"merge into the 16-bit or Q8_0 file, or add {option('keep_touched', 'Q8_0')}, or "
            f"{option('yes_lossy', True)} to do it all the same",
        )
    if again and not asked.yes_lossy:
        some = counted(len(again), "tensor is", "tensors are")
        raise UsageError(
            f"{some} quantized already, as '{again[0]}' in {now[again[0]]}, and would be a second time",
            f"start from the 16-bit or Q8_0 file, or add {option('yes_lossy', True)} to do it all the same",
        )
    notes = []
    if too_lossy:
        notes.append(
            f"{counted(len(too_lossy), 'changed tensor')} went back onto coarse grids; much of the change is rounded away"
        )
    if again:
        some = counted(len(again), "tensor was", "tensors were")
        notes.append(f"{some} quantized a second time, which loses more than once from 16 bits")
    return notes


def _importance(asked: Quantization, wanted: Mapping[str, str]) -> Importance | None:
    if asked.imatrix is None:
        return None
    from adapterkit.gguf.importance import load_importance

    with reading(asked.imatrix) as path:
        if not path.exists():
            raise NotFound(f"{path} does not exist", "give the file that llama-imatrix wrote")
        found = load_importance(path)
    if not any(name in found.values for name in wanted):
        raise UsageError(f"{asked.imatrix} names no tensor of this model", "use the one made for it")
    for parts, keep in ((asked.include_weights, True), (asked.exclude_weights, False)):
        lost = next((part for part in parts if not any(part in name for name in found.values)), None)
        if lost is not None:
            raise UsageError(f"{asked.imatrix} has no tensor with '{lost}' in its name", "correct it")
        if parts:
            kept = {name: value for name, value in found.values.items() if any(p in name for p in parts) is keep}
            found = replace(found, values=kept)
    return found


def _tensor(tensor: Tensor, kind: Any, matrix: Importance | None, touched: bool) -> Tensor:
    if not touched and tensor.dtype.code == kind.name:
        return tensor
    made = encoded(decoded(tensor), kind)
    if isinstance(made, Quantized) and matrix is not None:
        made.importance = matrix.of(made.name, made.shape)
    return made


def _entries(asked: Quantization, matrix: Importance | None) -> list[Entry]:
    """What llama-quantize sets, after the rest as it does."""
    entries = []
    if asked.mix is not None:
        number = FILE_TYPES[file_type(asked.mix)[0]].number
        entries += [u32(QUANTIZATION_VERSION, 2), u32(FILE_TYPE, number)]
    if matrix is not None:
        # llama-quantize writes the path as it was given; the folders are nobody's business.
        entries.append(text("quantize.imatrix.file", _short(Path(str(asked.imatrix)).name)))
        if matrix.dataset:
            entries.append(text("quantize.imatrix.dataset", _short(matrix.dataset)))
        entries.append(u32("quantize.imatrix.entries_count", len(matrix.values)))
        if matrix.chunks > 0:
            entries.append(u32("quantize.imatrix.chunks_count", matrix.chunks))
    return entries


def _short(value: str) -> str:
    """What llama-quantize keeps of a string that it adds to the metadata."""
    return value.encode("utf-8", "surrogateescape")[:127].decode("utf-8", "ignore")


def place(name: str) -> tuple[int, str]:
    """The order in which llama-quantize writes tensors: by layer, then by name."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)
