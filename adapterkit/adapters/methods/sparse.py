"""Methods that train single entries of W: SHiRA, Super-Tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterkit.adapters.change import LowRank, RowMap, matrix, raw
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import check_shape, dims, edit, oriented, take, weight_of
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.config import AdapterConfig


class Entries:
    """Values to add at places of a matrix, sorted by row."""

    def __init__(
        self, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], where: str
    ) -> None:
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= shape[0] or int(columns.max()) >= shape[1]):
            raise TargetError(f"{where}: it names entries past {shape[0]} x {shape[1]}", "check that this is its base")
        self._rows, order = rows.sort(stable=True)
        self._columns, self._values = columns[order], values[order]

    def add(self, w: torch.Tensor, here: range) -> torch.Tensor:
        """``w`` with the entries of these rows added; several at one place add up."""
        import torch

        out = w.clone()
        low, high = torch.searchsorted(self._rows, torch.tensor([here.start, here[-1] + 1])).tolist()
        rows = self._rows[low:high] - here.start
        mine = rows % here.step == 0
        places = (rows[mine] // here.step, self._columns[low:high][mine])
        return out.index_put_(places, self._values[low:high][mine], accumulate=True)


def _shira(module: Module, context: Context) -> Iterator[Edit]:
    values, indices = take(module, context, "shira_weight", "shira_indices")
    (count,) = dims(values, 1, "shira_weight", module, context)
    check_shape(indices, (2, count), "shira_indices", module, context)
    target = weight_of(module, context)
    shape = oriented(module, context, target.matrix).matrix
    key = f"{context.where}: '{module.path}.shira_indices'"

    def load(weights: Weights) -> Kernel:
        places = raw(indices).long()
        return RowMap(Entries(places[0], places[1], matrix(values), shape, key).add)

    yield edit(target, f"shira n={count}", load, (values, indices), 5 * count)


_FACTORS = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def _supertuning(module: Module, context: Context) -> Iterator[Edit]:
    values, indices = take(module, context, "supertuning_values", "supertuning_indices")
    (count,) = dims(values, 1, "supertuning_values", module, context)
    check_shape(indices, (count,), "supertuning_indices", module, context)
    target = weight_of(module, context)
    rows, columns = target.matrix
    key = f"{context.where}: '{module.path}.supertuning_indices'"
    factors = take(module, context, *_FACTORS) if _FACTORS[0] in module.tensors else ()
    scale = 0.0
    if factors:
        rank = int(context.config.number("r"))
        check_shape(factors[0], (rank, columns), _FACTORS[0], module, context)
        check_shape(factors[1], (rows, rank), _FACTORS[1], module, context)
        scale = context.config.number("lora_alpha") / rank

    def load(weights: Weights) -> Kernel:
        flat = raw(indices).long()
        entries = Entries(flat // columns, flat % columns, matrix(values), (rows, columns), key)
        if not factors:
            return RowMap(entries.add)
        added = LowRank(matrix(factors[1]), matrix(factors[0]), scale)
        return RowMap(lambda w, here: added.new(entries.add(w, here), here))

    yield edit(target, f"supertuning n={count}", load, (values, indices, *factors), 5 * count)


def _refuse(config: AdapterConfig, residual_base: bool) -> tuple[str, str] | None:
    if config.get("save_precomputed_indices", True):
        return None
    return (
        "its indices were not saved, and which of several equal entries of W were chosen depends on the machine",
        "save it again with save_precomputed_indices=True where it was trained",
    )


METHODS = (
    Method(
        peft_type="SHIRA",
        title="SHiRA",
        formula="W' = W + sparse(indices, values)",
        source="arXiv:2406.13175",
        suffixes=("shira_weight", "shira_indices"),
        edits=_shira,
        fields=frozenset({"r", "mask_type", "random_seed", "fan_in_fan_out"}),
    ),
    Method(
        peft_type="SUPERTUNING",
        title="Super-Tuning",
        formula="W' = W + sparse(indices, values) + alpha/r B A",
        source="arXiv:2607.09287",
        suffixes=("supertuning_values", "supertuning_indices", *_FACTORS),
        edits=_supertuning,
        fields=frozenset({"sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "save_precomputed_indices"}),
        refuse=_refuse,
        notes="without saved indices it is refused: ties among equal entries are broken differently elsewhere",
    ),
)
