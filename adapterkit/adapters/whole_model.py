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
# What a config says of how a model is stored, served or was trained, and not of what its weights compute.
_HARMLESS = frozenset(
    {
        *(
            "_name_or_path",
            "architectures",
            "bos_token_id",
            "dtype",
            "eos_token_id",
            "pad_token_id",
            "quantization_config",
        ),
        *("torch_dtype", "transformers_version", "use_cache", "unsloth_version", "unsloth_fixed", "_commit_hash"),
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


def model_edits(model: WholeModel, names: Names, config: Mapping[str, Any]) -> list[Edit]:
    """The edit of every tensor.

    Args:
        names, config: of the base.

    Raises:
        TargetError: the model is of another type than the base, or one of both has a tensor that the other has not, or
            not in that size.
    """
    assert model.checkpoint is not None
    kind, other = config.get("model_type"), model.checkpoint.config.get("model_type")
    if kind != other:
        raise TargetError(f"{model.ref} is a {other} and the base a {kind}", "models are merged onto their common base")
    shapes = names.checkpoint_shapes
    held = model.checkpoint.tensors
    targets = {name: _target(name, tensor, model, names, shapes) for name, tensor in model.tensors.items()}
    edits = [
        Edit(target, _change(model.tensors[name]))
        for name, target in targets.items()
        if target is not None and model.tensors[name].dtype in _FLOATS
    ]
    missing = [name for name in shapes if name not in held and not _shared(name, names, held)]
    if missing:
        raise TargetError(
            f"{model.ref} has no '{missing[0]}', which the base has (and {len(missing) - 1} more)",
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
        return Target(name, tensor.shape, (Piece(name, tensor.shape[0] if tensor.shape else 1),))
    shared = names.tied(name)
    found = None if shared is None else names.find(shared)
    if found is None or shared is None:
        raise TargetError(
            f"{model.ref}: the base has no '{name}'",
            "models are merged onto their common base, all in one layout of names",
        )
    twin = next((one for one in found.tensors if one in model.tensors), None)
    if twin is not None and _same(model.tensors[twin], tensor):
        return None
    return Target(name, found.shape, found.pieces)


def _same(one: Tensor, other: Tensor) -> bool:
    from adapterkit.adapters.ties import same_bytes

    return same_bytes(one, other)


def _shared(name: str, names: Names, held: Mapping[str, Tensor]) -> bool:
    """Whether the model holds this tensor under the name of the one it is tied to, as its base stores it twice."""
    twins = (pair for pair in names.declared_ties() if name in pair)
    return any(one in held for pair in twins for one in pair)


def _change(tensor: Tensor) -> Change:
    return Change(
        "model",
        lambda weights: Replacement(tensor, weights.shape[1]),
        reads=tensor.nbytes,
        memory=0,
    )


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
