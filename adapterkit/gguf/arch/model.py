"""A Hugging Face checkpoint as a GGUF model: its tensors under GGUF's names, as handles, and its metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.formats.narrow import TEXT, section_of
from adapterkit.adapters.merged import Merged, as_float32
from adapterkit.checkpoint.tensor import Renamed, Tensor
from adapterkit.dtypes import BF16, F16, F32
from adapterkit.errors import CheckpointError, TargetError, counted, option
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.contract import held, left_out_by_transformers, unread
from adapterkit.gguf.arch.dense_modules import sizes
from adapterkit.gguf.arch.fits import complete, fits, sound
from adapterkit.gguf.arch.hyper import hyper_entries, hyperparameters
from adapterkit.gguf.arch.mapping import EMBEDDING, Mapped
from adapterkit.gguf.arch.mxfp4 import Repacked, repacked
from adapterkit.gguf.arch.pooling import left_out
from adapterkit.gguf.arch.rerank import check_row, is_reranker, token_ids, with_prompt
from adapterkit.gguf.arch.rope import scaling
from adapterkit.gguf.arch.table import spec_of
from adapterkit.gguf.arch.ties import mapper_of
from adapterkit.gguf.arch.ties import note as tie_note
from adapterkit.gguf.arch.views import Constant, gathered
from adapterkit.gguf.filetypes import FILE_TYPES
from adapterkit.gguf.general import general, size_label
from adapterkit.gguf.metadata import Entry, u32
from adapterkit.gguf.towers.rows import has_tower

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.gguf.arch.mapping import Mapper
    from adapterkit.gguf.arch.spec import ArchSpec

# Tensors that stay in float32 whatever the file's type, beside vectors, norms and what is no weight: small ones that
# llama.cpp computes with directly. Source: prepare_tensors of llama.cpp's converter.
FLOAT32 = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "token_types.weight",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    "altup_correct_coef.weight",
    "altup_predict_coef.weight",
    "indexer.proj.weight",
    "indexer.q_proj.weight",
    "indexer.k_proj.weight",
    "time_mix_first.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
)


class Wide(Renamed):
    """A computed tensor before it is rounded to 16 bits, so that only the output's own type rounds it."""

    dtype = F32

    def __init__(self, inner: Tensor) -> None:
        super().__init__(inner.name, inner)
        self.dtype = F32

    @property
    def memory(self) -> int:
        return self.inner.memory

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_wide(start, stop).float()


@dataclass(frozen=True)
class Model:
    """A model in GGUF's terms.

    Attributes:
        spec: its row of the table.
        tensors: handles by GGUF name, in the order of the file.
        entries: key-values, without file type and tokenizer.
        hparams: what the choice of quantized types depends on.
        kinds: the type of each tensor in a file that is not quantized.
        mapped: which stored tensor went where.
        file_type: of such a file.
        notes: what llama.cpp computes otherwise.
    """

    spec: ArchSpec
    config: Config
    tensors: dict[str, Tensor]
    entries: tuple[Entry, ...]
    hparams: dict[str, Any]
    kinds: dict[str, str]
    mapped: Mapped
    file_type: str
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Of the embedding: as many tokens as the model knows."""
        found = self.tensors.get(EMBEDDING)
        return found.shape[0] if found is not None else 0


def as_gguf(
    view: Checkpoint,
    *,
    base: Checkpoint,
    config: Mapping[str, Any],
    adapters: Sequence[Adapter] = (),
    touched: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    plain: str | None = None,
    approximate: Collection[str] = (),
    elsewhere: Collection[str] = (),
    as_reranker: bool = False,
) -> Model:
    """A view of a Hugging Face checkpoint as a GGUF model.

    Args:
        view: its tensors, with adapters folded in or not.
        base: where it comes from, for its name.
        config: its ``config.json``, after what a merge changes in it.
        adapters, touched: what was folded in, and the tensors that it changed.
        files: side files by name.
        plain: the float type of a file that is not quantized; by default that of the first matrix.
        approximate: config fields that the runtime may compute otherwise past a limit; see `held`.
        elsewhere: tensors that another file holds, so that a change of them is not lost.
        as_reranker: of a language model that answers yes or no, the scores of these; see `adapterkit.gguf.arch.rerank`.

    Raises:
        TargetError: an architecture or a tensor that the table does not know, a change that GGUF has no place for, or a
            config that llama.cpp does not compute.
        CheckpointError: a config or tensors that are incomplete or do not fit each other.
    """
    if as_reranker:
        config = {**config, **token_ids(files or {}, base.ref)}
        if any(name.endswith("lm_head.weight") for name in view.shapes):
            config["tie_word_embeddings"] = False  # its rows count, whatever the config says
    read = Config(config, base.ref, files)
    spec = spec_of(read)
    if as_reranker:
        check_row(spec, base.ref)
    mapper = mapper_of(spec, read, base)
    mapped = mapper.to_gguf(view.shapes, base.ref)
    lost = [name for name in touched if not (name in mapped.sources or name in elsewhere or mapper.scalar(name))]
    towers = [name for name in lost if name in mapped.dropped and section_of(name) != TEXT]
    if len(lost) > len(towers) or (lost and len(lost) == len(touched)):  # or nothing of the change would be in the file
        lost = [name for name in lost if name not in towers] or lost
        raise TargetError(
            f"an adapter changes '{lost[0]}', which a GGUF {spec.arch} does not hold",
            "merge into a Hugging Face folder, or train the text model alone",
        )
    wide = floats_of(view)
    tensors = {}
    for name, array in mapped.arrays.items():
        floats = gathered(name, array, wide)
        tensors[name] = repacked(name, array, view.tensors, floats) or floats
    for one in spec.factors:
        factors = one.make(read)
        if factors is not None:
            tensors = {one.tensor: Constant(one.tensor, factors), **tensors}
    notes = held(spec, read, approximate)
    values = hyperparameters(spec, read) | _scalars(view, mapper)
    notes = (*((spec.note,) if spec.note else ()), *notes)
    notes = (
        *notes,
        *tie_note(mapper),
        *scaling(spec, read).notes,
        *left_out(read, dense="dense_2.weight" in tensors),
    )
    notes = (*notes, *_of_towers(towers, made=has_tower(config)), *left_out_by_transformers(read), *unread(read))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    sound(values, base.ref)
    complete(values, shapes, base.ref)
    if values.get("expert_used_count") and not _first(values.get("expert_count")):
        values["expert_used_count"] = 0  # llama.cpp stops where none of no experts are used
    values |= sizes(shapes, values["embedding_length"], base.ref)
    if not spec.encoder:  # whose configs may carry fields that no class of theirs reads, as num_key_value_heads
        fits(spec.arch, values, shapes, base.ref)
    label = size_label(shapes, _first(values.get("expert_count")))
    entries = [*general(base, adapters, files or {}, label, spec.arch), *hyper_entries(spec.arch, values)]
    own = plain or own_type(view, mapped)
    hparams = {
        "n_layer": values["block_count"],
        "n_expert": _first(values.get("expert_count")),
        "n_head": values.get("attention.head_count", 0),
        "n_head_kv": values.get("attention.head_count_kv", values.get("attention.head_count", 0)),
    }
    kinds = {name: kind_in_file(name, shape, own) for name, shape in shapes.items()}
    packed = {name: tensor.kind.name for name, tensor in tensors.items() if isinstance(tensor, Repacked)}
    kinds |= packed
    written = "MXFP4_MOE" if packed else own
    return Model(spec, read, tensors, tuple(entries), hparams, kinds, mapped, written, notes)


def _of_towers(names: Sequence[str], *, made: bool) -> tuple[str, ...]:
    if not names:
        return ()
    left = f"left out: the change of {counted(len(names), 'tensor')} of a tower, as '{names[0]}'"
    writes = f"({option('mmproj', 'auto')} writes the projector beside it)"
    road = writes if made else "(merge into a folder for the rest)"
    return (f"{left}; this file is the text part alone {road}",)


def _scalars(view: Checkpoint, mapper: Mapper) -> dict[str, Any]:
    """Keys whose values are small tensors of the checkpoint, one per layer.

    Raises:
        CheckpointError: a layer has none, or more than one number.
    """
    found: dict[str, dict[int, float]] = {one.key: {} for one in mapper.spec.scalars}
    for name, tensor in view.items() if found else ():
        at = mapper.scalar(name)
        if at is None:
            continue
        if tensor.numel != 1:
            raise CheckpointError(f"{mapper.config.ref}: '{name}' is not one number", "download it again")
        found[at[0].key][at[1]] = float(tensor.read(0, 1)[0])
    for key, values in found.items():
        if sorted(values) != list(range(mapper.layers)):
            raise CheckpointError(
                f"{mapper.config.ref}: the numbers that become '{key}' are there for {len(values)} of {mapper.layers} layers",
                "download it again",
            )
    return {key: [value for _, value in sorted(values.items())] for key, values in found.items()}


def kind_in_file(name: str, shape: Sequence[int], plain: str) -> str:
    """The type of a tensor in a file of floats."""
    small = len(shape) <= 1 or name.endswith(("_norm.weight", *FLOAT32)) or not name.endswith(".weight")
    return "F32" if small else plain


def file_type_entries(name: str) -> list[Entry]:
    """What says a file's type."""
    return [u32("general.file_type", FILE_TYPES[name].number), u32("general.quantization_version", 2)]


def floats_of(view: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a view, those that are computed before they are rounded to 16 bits."""
    return {name: _wide(tensor) for name, tensor in view.items()}


def _wide(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Merged):
        return as_float32(tensor) if tensor.dtype is not F32 else tensor
    return tensor if tensor.extent is not None else Wide(tensor)


def widened(view: Checkpoint) -> Checkpoint:
    """A view whose merged tensors are not rounded."""
    tensors = {n: as_float32(t) if isinstance(t, Merged) and t.dtype is not F32 else t for n, t in view.items()}
    return replace(view, tensors=tensors)


def own_type(view: Checkpoint, mapped: Mapped) -> str:
    """The float type of the first matrix that GGUF keeps."""
    for name, tensor in view.items():
        if name in mapped.sources and len(tensor.shape) > 1 and tensor.dtype in (BF16, F16, F32):
            return tensor.dtype.code
    return "F32"


def _first(value: Any) -> int:
    if isinstance(value, list):
        value = next((one for one in value if one), 0)
    return int(value) if isinstance(value, int) else 0


def vocabulary(
    model: Model, files: Mapping[str, bytes], config: Mapping[str, Any], pre: str | None
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """The key-values of the tokenizer, and notes.

    Raises:
        CheckpointError: it is missing, damaged or does not fit the embedding.
    """
    if model.spec.vocab == "none":
        return (), ()
    from adapterkit.gguf.vocab import read_vocab

    found = read_vocab(files, config, kind=model.spec.vocab, rows=model.rows, pre=pre)
    if found.size > model.rows:
        raise CheckpointError(
            f"{model.config.ref}: its tokenizer has {found.size} tokens and its embedding {model.rows} rows",
            "give the tokenizer of this model",
        )
    entries = with_prompt(found.entries) if is_reranker(model.spec) else found.entries
    return entries, found.notes
