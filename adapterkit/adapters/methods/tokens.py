"""Trainable tokens: some rows of an embedding, trained alone.

PEFT calls the tensor ``trainable_tokens_delta``, but it holds the new rows, not a difference (measured against PEFT
0.21's merge). The token ids are in the config only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from adapterkit.adapters.change import Change, RowReplacement, matrix
from adapterkit.adapters.method import GIVE_BASE, Context, Edit, Method, Module
from adapterkit.errors import AdapterError, TargetError, counted

if TYPE_CHECKING:
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.checkpoint.tensor import Tensor

KEY = "token_adapter.trainable_tokens_delta"  # as an option of LoRA
ALONE = "trainable_tokens_delta"  # as a method of its own


def token_indices(config: AdapterConfig, module: str) -> list[int]:
    """The token ids that ``module`` trains: one list for all, or a map from module name to list.

    Raises:
        AdapterError: there are none, or they are not token ids.
    """
    field = "token_indices" if config.peft_type == "TRAINABLE_TOKENS" else "trainable_token_indices"
    found: list[int] | Mapping[str, list[int]] = config.get(field, [])
    if isinstance(found, Mapping):
        found = next((ids for name, ids in found.items() if module == name or module.endswith("." + name)), [])
    plain = isinstance(found, list) and all(type(index) is int and index >= 0 for index in found)
    if not isinstance(found, list) or not plain or not found or len(set(found)) != len(found):
        raise AdapterError(
            f"{config.where}: '{field}' has no plain list of token ids for {module}", "correct the config"
        )
    return found


def token_change(indices: list[int], rows: Tensor) -> Change:
    """The change that puts ``rows`` in the place of the given rows of an embedding."""
    return Change(
        f"{counted(len(indices), 'token row')} replaced",
        lambda weights: RowReplacement(indices, matrix(rows, weights.dtype)),
        rows.nbytes,
        rows.numel * 4,
        stored=rows,
        some_rows=True,
    )


def token_edits(module: Module, context: Context) -> Iterator[Edit]:
    """The edit of an embedding's (or output layer's) rows."""
    for key in (KEY, ALONE):
        if key not in module.tensors:
            continue
        rows = module.tensors[key]
        indices = token_indices(context.config, module.path)
        target = context.target(f"{module.path}.weight", f"{module.path}.{key}")
        if rows.shape != (len(indices), target.matrix[1]):
            raise TargetError(
                f"{context.where}: '{module.path}.{key}' is {list(rows.shape)} for {counted(len(indices), 'token')} of "
                f"{target.matrix[1]} dimensions",
                GIVE_BASE,
            )
        if max(indices) >= target.matrix[0]:
            raise TargetError(
                f"{context.where}: token {max(indices)} is past the {target.matrix[0]} rows of {target.parameter}",
                "give the base whose vocabulary was extended before training",
            )
        yield Edit(target, token_change(indices, rows))


def _edits(module: Module, context: Context) -> Iterable[Edit]:
    return token_edits(module, context)


METHODS = (
    Method(
        peft_type="TRAINABLE_TOKENS",
        title="Trainable tokens",
        formula="W'[ids] = rows",
        source="PEFT 0.21, tuners/trainable_tokens",
        suffixes=(ALONE,),
        edits=_edits,
        fields=frozenset({"token_indices", "target_modules", "init_weights"}),
    ),
)
