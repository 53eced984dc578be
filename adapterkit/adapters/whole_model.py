"""A whole model as what is merged into its base: each tensor's change is the model's values less the base's.

So models fine-tuned from one base are merged by the same rules, in the same stream and with the same proofs as adapters:
``W + sum of w_k (W_k - W)``, or what a combination rule makes of the differences (task arithmetic: arXiv:2212.04089).
Both are read block by block; the difference is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.change import Change, Replacement
from adapterkit.adapters.config import AdapterConfig
from adapterkit.adapters.method import Edit
from adapterkit.adapters.target import Piece, Target
from adapterkit.adapters.ties import is_tied, same_bytes
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.dtypes import BF16, F16, F32, F64
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor

KIND = "MODEL"  # in the place of a peft_type
_FLOATS = (BF16, F16, F32, F64)
# What a config says of how a model is stored or was trained, and not of what it answers; a tie is told by the weights.
_HARMLESS = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "quantization_config", "tie_word_embeddings", "torch_dtype"),
        *("transformers_version", "use_cache", "unsloth_version", "unsloth_fixed", "_commit_hash"),
        *("attention_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"),
    }
)


@dataclass(frozen=True)
class WholeModel(Adapter):
    """A model in the place of an adapter.

    Attributes:
        checkpoint: as opened; its tensors, decoded where it is quantized, are the adapter's.
    """

    checkpoint: Checkpoint | None = None

    @property
    def whole(self) -> bool:
        return True


def as_adapter(model: Checkpoint) -> WholeModel:
    """An open model as one.

    Args:
        model: of any stored format; quantized weights are decoded.
    """
    view = dequantized(model)
    return WholeModel(
        model.ref,
        AdapterConfig({"peft_type": KIND}, f"{model.ref}/config.json"),
        view.tensors,
        model.sources[0],
        commit=model.commit,
        notes=view.notes,
        shards=tuple(model.sources[1:]),
        checkpoint=view,
    )


def model_edits(model: Adapter, names: Names, base: Checkpoint) -> list[Edit]:
    """The edit of every tensor.

    Args:
        names: of the base.

    Raises:
        TargetError: the model is of another type than the base, one of both has a tensor that the other has not, or not in
            that size, or one that is no floating tensor and differs.
    """
    assert isinstance(model, WholeModel)
    assert model.checkpoint is not None
    kind, other = base.config.get("model_type"), model.checkpoint.config.get("model_type")
    if kind != other:
        raise TargetError(f"{model.ref} is a {other} and the base a {kind}", "models are merged onto their common base")
    shapes = names.checkpoint_shapes
    edits = []
    for name, tensor in model.tensors.items():
        target = _target(name, tensor, model, names, shapes)
        if target is not None and tensor.dtype in _FLOATS:
            edits.append(Edit(target, _change(tensor)))
        elif target is not None:
            _check_same(name, tensor, model, base)
    missing = []
    for name in (one for one in shapes if one not in model.checkpoint.tensors):
        twin = _twin(name, names, model)
        if twin is None:
            missing.append(name)
        elif twin in model.tensors and not (twin in base and same_bytes(base[name], base[twin])):
            # The base has two tensors where the model has one for both.
            edits.append(Edit(_whole(name, shapes[name]), _change(model.tensors[twin])))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise TargetError(
            f"{model.ref} has no '{missing[0]}', which the base has{more}",
            "models are merged onto their common base, all in one layout of names",
        )
    return edits


def _target(
    name: str, tensor: Tensor, model: WholeModel, names: Names, shapes: Mapping[str, tuple[int, ...]]
) -> Target | None:
    """Where a tensor of the model belongs; None for one that only repeats another of the model."""
    if name in shapes:
        if shapes[name] != tensor.shape:
            raise TargetError(
                f"{model.ref}: '{name}' is {list(tensor.shape)} and the base's is {list(shapes[name])}",
                "give models of one size and one vocabulary",
            )
        return _whole(name, tensor.shape)
    shared = names.tied(name)
    found = None if shared is None else names.find(shared)
    if found is None or shared is None:
        raise TargetError(
            f"{model.ref}: the base has no '{name}'",
            "models are merged onto their common base, all in one layout of names",
        )
    twin = next((one for one in found.tensors if one in model.tensors), None)
    if twin is not None and same_bytes(model.tensors[twin], tensor):
        return None
    return Target(name, found.shape, found.pieces)


def _whole(name: str, shape: tuple[int, ...]) -> Target:
    """All rows of a stored tensor."""
    return Target(name, shape, (Piece(name, shape[0] if shape else 1),))


def _twin(name: str, names: Names, model: WholeModel) -> str | None:
    """The tensor of the model that stands for this one too, where its config ties them; None where nothing does."""
    assert model.checkpoint is not None
    held = model.checkpoint.tensors
    twins = [one for pair in names.declared_ties() if name in pair for one in pair if one in held]
    return twins[0] if twins and is_tied(model.checkpoint.config) else None


def _check_same(name: str, tensor: Tensor, model: WholeModel, base: Checkpoint) -> None:
    """Refuse a tensor that is no floating one, which has no difference to weigh, and is not the base's.

    Raises:
        TargetError
    """
    if name in base and not same_bytes(base[name], tensor):
        raise TargetError(
            f"{model.ref}: '{name}' holds {tensor.dtype} and is not the base's; such values cannot be weighed",
            "give models whose tables and buffers are the base's",
        )


def _change(tensor: Tensor) -> Change:
    return Change("model", lambda weights: Replacement(tensor, weights.shape[1]), tensor.nbytes, 0)


def config_notes(model: Adapter, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Which settings of the model the base's config does not share: the result has the base's."""
    assert isinstance(model, WholeModel)
    assert model.checkpoint is not None
    own = model.checkpoint.config
    other = sorted(key for key in {*own, *config} - _HARMLESS if own.get(key) != config.get(key))
    if not other:
        return ()
    words = ", ".join(f"{key} {own.get(key)!r} (base {config.get(key)!r})" for key in other[:3])
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    return (f"{model.ref} has {words}{more}; the result has the base's",)


__all__ = ["KIND", "WholeModel", "as_adapter", "config_notes", "model_edits"]
