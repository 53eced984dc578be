"""From the name of a parameter in a module tree to the rows of GGUF tensors that hold it.

The names are those of the Hugging Face checkpoint that the GGUF is, or would be made from; where each of its tensors lies
in GGUF is what the index maps of the table of architectures say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.layout import Layout, UnmappableError
from adapterkit.adapters.names import LONGEST, Names
from adapterkit.adapters.target import Piece, Target
from adapterkit.gguf.arch.maps import Array, Box, MapError, Strided

if TYPE_CHECKING:
    import torch

    from adapterkit.gguf.arch.mapping import Mapper

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
_LISTED = re.compile(r"(?P<stack>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)s\.(?P<expert>\d+)")
_ONE = {"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",), "gate_up_proj": ("gate", "up")}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class GGUFNames(Names):
    """The parameters of a model, by the names that adapters give them, in the tensors of its GGUF.

    Args:
        mapper: of its architecture.
        shapes: of the tensors of the Hugging Face checkpoint.
        ref: what the base is called.

    Raises:
        TargetError, CheckpointError: see `Mapper.to_gguf`.
    """

    def __init__(self, mapper: Mapper, shapes: Mapping[str, tuple[int, ...]], ref: str) -> None:
        super().__init__(shapes, mapper.config.raw)
        self._mapper = mapper
        self._mapped = mapper.to_gguf(shapes, ref)
        self._found: dict[str, Target | None] = {}

    @property
    def arch(self) -> str:
        return self._mapper.spec.arch

    @property
    def no_lora(self) -> tuple[str, ...]:
        """Ends of names of weights that the runtime applies no LoRA to."""
        return self._mapper.spec.no_lora

    @property
    def always_tied(self) -> bool:
        """Whether the architecture has no output layer of its own."""
        return self._mapper.spec.tied

    def followers(self) -> list[tuple[str, str]]:
        return []  # no flag says what is tied: an output layer that is there is used

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the GGUF tensors, by name."""
        return {name: array.shape for name, array in self._mapped.arrays.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def arrays(self) -> Mapping[str, Array]:
        """What each GGUF tensor is made of."""
        return self._mapped.arrays

    def find(self, parameter: str) -> Target | None:
        if parameter not in self._found:
            found = super().find(parameter) if len(parameter) <= LONGEST else None
            self._found[parameter] = found or self._expert(parameter) or self._spelled(parameter)
        return self._found[parameter]

    def stored_name(self, parameter: str, beside: str) -> str:
        found = self._mapper.match(super().stored_name(parameter, beside))
        if found is None or len(found.rule.gguf) != 1:
            return parameter
        return found.rule.gguf[0].replace("{i}", str(found.layer)) + found.suffix

    def moved(self, tensor: str) -> bool:
        """Whether a GGUF tensor has other values, or columns in another order, than what an adapter was trained on."""
        array = self._mapped.arrays.get(tensor)
        return array is not None and any(box.values or not _all_columns(box) for box in array.boxes)

    def adjusted(
        self, tensor: str, a: torch.Tensor, b: torch.Tensor, *, undo: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors ``[.., r, in]`` and ``[.., out, r]`` after what the index map of a GGUF tensor does beside choosing rows.

        Columns are put in GGUF's order, rows multiplied with the map's numbers; ``undo`` is the way back.
        """
        import torch

        from adapterkit.gguf.arch.views import numbers

        if not self.moved(tensor):
            return a, b
        scales = []
        for box in self._mapped.arrays[tensor].boxes:
            factor = 1.0
            for value in box.values:
                factor *= value.number if value.kind == "scale" else 1.0
            scales.append(torch.full((box.height, 1), 1 / factor if undo else factor))
        first = self._mapped.arrays[tensor].boxes[0]
        if not first.turned and not _all_columns(first):
            order = numbers(first.columns)
            a = a[..., order.argsort() if undo else order]
        return a, b * torch.cat(scales).view(*b.shape[:-1], 1)

    def _whole(self, name: str, lead: int) -> Layout:
        """A tensor of the checkpoint, its rows by where they lie in GGUF."""
        shape = self._shapes[name]
        tensors = self._mapped.sources.get(name, ())
        pieces: list[Piece] = []
        for tensor in tensors:
            at = 0
            for box in self._mapped.arrays[tensor].boxes:
                if box.tensor == name:
                    pieces += _pieces(tensor, box, at, shape)
                at += box.height
        columns = 1
        for size in shape[lead:]:
            columns *= size
        if not pieces or columns != (shape[-1] if len(shape) > 1 else 1):
            raise UnmappableError
        return Layout(tuple(shape), lead, tuple(sorted(pieces, key=lambda piece: (piece.row, piece.column))))

    def columns_of(self, tensor: str) -> Strided | None:
        """Column permutation from a GGUF tensor to the checkpoint's matrix, or None if the order is the same."""
        array = self._mapped.arrays.get(tensor)
        box = array.boxes[0] if array is not None and len(array.boxes) == 1 else None
        return box.columns if box is not None and not box.values and not _all_columns(box) else None

    def _spelled(self, parameter: str) -> Target | None:
        """A parameter of another module tree of the same architecture, such as one that has two projections in one."""
        found = self._mapper.match(parameter)
        if found is None or found.item is not None or not found.rule.gguf:
            return None
        names = [name.replace("{i}", str(found.layer)) + found.suffix for name in found.rule.gguf]
        if any(name not in self._mapped.arrays for name in names):
            return None
        back = [self._mapped.arrays[name].shape for name in names]
        try:
            for op in reversed(found.rule.ops):
                back = op.back(back, self._mapper.config)
            arrays = [Array.stored(parameter, back[0])]
            for op in found.rule.ops:
                arrays = op.run(arrays, self._mapper.config)
            pieces = []
            for name, array in zip(names, arrays, strict=True):
                at = 0
                for box in array.boxes:
                    pieces += _pieces(name, box, at, back[0])
                    at += box.height
        except (MapError, UnmappableError):
            return None
        ordered = tuple(sorted(pieces, key=lambda piece: (piece.row, piece.column)))
        return Target(parameter, tuple(back[0]), ordered, stacked=len(back[0]) > 2)

    def _expert(self, parameter: str) -> Target | None:
        """A matrix of one expert, where the checkpoint has a stack of them on its side."""
        stem, _, leaf = parameter.rpartition(".")
        match = _EXPERT.fullmatch(stem) or _LISTED.fullmatch(stem)
        layer = _LAYER.search(parameter)
        if match is None or layer is None or match["leaf"] not in _ONE or len(parameter) > LONGEST:
            return None
        parts = [f"blk.{layer[1]}.ffn_{part}_exps.{leaf}" for part in _ONE[match["leaf"]]]
        arrays = [self._mapped.arrays[part] for part in parts if part in self._mapped.arrays]
        number = int(match["expert"])
        if len(arrays) != len(parts) or number >= arrays[0].shape[0]:
            return None
        heights = [array.shape[1] for array in arrays]
        alternating = len(parts) > 1 and any(box.columns.strides[-1] == 2 for box in arrays[0].boxes)
        pieces = tuple(
            Piece(
                name,
                height,
                row=index if alternating else sum(heights[:index]),
                row_step=len(parts) if alternating else 1,
                at=number * height,
            )
            for index, (name, height) in enumerate(zip(parts, heights, strict=True))
        )
        return Target(parameter, (sum(heights), *arrays[0].shape[2:]), pieces)


def _all_columns(box: Box) -> bool:
    """Whether an upright box has its columns in order."""
    return box.turned or box.columns.is_plain


def _pieces(tensor: str, box: Box, at: int, shape: tuple[int, ...]) -> list[Piece]:
    """The rows of a checkpoint's tensor that a box of a GGUF tensor holds."""
    if box.turned:
        every = box.columns.is_plain and box.columns.count == shape[-1]
        if len(box.columns.sizes) != 1 or not box.rows.is_plain:
            raise UnmappableError
        return [
            Piece(
                tensor,
                box.rows.count,
                row=box.rows.at,
                at=at,
                transposed=True,
                column=box.columns.at,
                column_step=box.columns.strides[0],
                columns=None if every else box.columns.count,
            )
        ]
    if box.rows.is_plain:
        return [Piece(tensor, box.rows.count, row=box.rows.at, at=at)]
    return _runs(tensor, box.rows, at)


def _runs(tensor: str, rows: Strided, at: int) -> list[Piece]:
    """Runs of consecutive rows of a strided set; ``at`` is where its first one lies in the GGUF tensor."""
    steps = [1] * len(rows.sizes)
    for axis in range(len(rows.sizes) - 2, -1, -1):
        steps[axis] = steps[axis + 1] * rows.sizes[axis + 1]
    inner = next((axis for axis, stride in enumerate(rows.strides) if stride == 1 and rows.sizes[axis] > 1), None)
    if inner is None:
        inner = min(range(len(rows.sizes)), key=lambda axis: rows.strides[axis])
    outer = [axis for axis in range(len(rows.sizes)) if axis != inner]
    places = [(rows.at, at)]
    for axis in outer:
        places = [
            (row + index * rows.strides[axis], to + index * steps[axis])
            for row, to in places
            for index in range(rows.sizes[axis])
        ]
    count, stride, step = rows.sizes[inner], rows.strides[inner], steps[inner]
    if stride != 1 and count > 1:
        return [Piece(tensor, 1, row=row + i * stride, at=to + i * step) for row, to in places for i in range(count)]
    return [Piece(tensor, count, row=row, at=to, at_step=step) for row, to in places]
