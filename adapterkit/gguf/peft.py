"""A GGUF LoRA as the PEFT adapter that does the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.change import matrix
from adapterkit.adapters.keys import PREFIX
from adapterkit.adapters.names import Names
from adapterkit.errors import TargetError, UsageError, counted, option
from adapterkit.gguf.checkpoint import GGUFCheckpoint
from adapterkit.gguf.hf import gguf_names
from adapterkit.gguf.lora import ALPHA, INVOCATION, PlannedFactor, lora_of
from adapterkit.gguf.names import EMBEDDING, GGUFNames
from adapterkit.gguf.tensors import decoded

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor

LAYOUT = "0.21.2"  # the PEFT whose layout of stacked experts is written


@dataclass
class _Module:
    """What one parameter gets: per matrix of its stack A ``[r, in]`` and B ``[out, r]``, its scaling in B."""

    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    stacked: bool
    turned: bool = False  # a stack whose factors PEFT keeps the other way round

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def path(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def pattern(self) -> str:
        return self.parameter if self.stacked else self.path


def to_peft(lora: GGUFCheckpoint, base: Checkpoint) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors and the config of a PEFT adapter.

    Args:
        lora: a GGUF LoRA.
        base: the model that it belongs to, a Hugging Face one or a GGUF; only its names and shapes are looked at.

    Raises:
        UsageError: ``lora`` is not one.
        TargetError: it belongs to another model.
    """
    if lora.header.get("adapter.type") != "lora":
        raise UsageError(
            f"{lora.ref} is not a GGUF LoRA", f"give the file that was made with {option('to', 'gguf-lora')}"
        )
    return peft_of(lora, gguf_names(base), base.ref)


def peft_of(lora: GGUFCheckpoint, names: GGUFNames, base: str = "the base") -> tuple[list[Tensor], dict[str, Any]]:
    """The same for a base whose names are known; ``base`` is what it is called.

    Raises:
        TargetError: the LoRA belongs to another model.
    """
    if lora.arch != names.arch:
        raise TargetError(f"{lora.ref} is made for '{lora.arch}', and {base} is '{names.arch}'", "give its own base")
    pairs = {
        stem: names.adjusted(stem, _values(a), _values(b), undo=True) for stem, (a, b) in lora_of(lora.tensors).items()
    }
    alpha = float(lora.header.get(ALPHA, 0.0))
    modules = []
    used: set[str] = set()
    for parameter in Names(names.checkpoint_shapes, names.config).parameters():
        target = names.find(parameter)
        if target is None or not set(target.tensors) & set(pairs):
            continue
        used |= set(target.tensors) & set(pairs)
        module = _module(target, pairs, alpha, lora.ref)
        on_side = any(piece.transposed for piece in target.pieces)
        modules.append(replace(module, turned=target.stacked and on_side != names.turned(parameter)))
    unused = sorted(set(pairs) - used)
    if unused:
        raise TargetError(
            f"{lora.ref}: '{unused[0]}' has no module in {base} ({counted(len(unused), 'tensor')})", "give its own base"
        )
    config = _config(lora, base, modules, alpha)
    tensors: list[Tensor] = []
    for module in modules:
        b = module.b * (module.rank / config["lora_alpha"])
        for key, value in _stored(module, b, modules).items():
            tensors.append(PlannedFactor(PREFIX + key, value, "from gguf"))
    return tensors, config


def _values(tensor: Tensor) -> torch.Tensor:
    return matrix(decoded(tensor))


def _module(target: Target, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float, where: str) -> _Module:
    """The factors of one parameter from those of the tensors that hold it; equal A's are taken once."""
    import torch

    matrices = target.shape[0] if target.stacked else 1
    height, columns = target.matrix[0] // matrices, target.matrix[1]
    rows = height
    if any(piece.transposed for piece in target.pieces):
        rows, columns = columns, rows  # on its side: the factors are those of the matrix as GGUF has it
    places: list[tuple[torch.Tensor, int]] = []
    rank = 0
    offsets = {}
    for tensor in target.tensors:
        if tensor not in pairs:
            continue
        a, b = pairs[tensor]
        if tensor == EMBEDDING:
            a, b = b.T, a
        fits = a.shape[-1] == columns and a.ndim == b.ndim == (3 if target.stacked else 2)
        if not fits or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
            raise TargetError(
                f"{where}: the factors of '{tensor}' are {list(a.shape)} and {list(b.shape)}, and {target.parameter} is "
                f"{list(target.shape)}",
                "give the base it was trained on",
            )
        same = next((at for other, at in places if other.shape == a.shape and torch.equal(other, a)), None)
        offsets[tensor] = rank if same is None else same
        if same is None:
            places.append((a, rank))
            rank += a.shape[-2]
    left = torch.zeros(matrices, rows, rank)
    for piece in target.pieces:
        if piece.tensor not in pairs:
            continue
        a, b = pairs[piece.tensor]
        b = a if piece.tensor == EMBEDDING else b
        size, at = b.shape[-1], offsets[piece.tensor]
        scale = alpha / size if alpha else 1.0
        index, first = divmod(piece.at, b.shape[-2])
        held = piece.held_columns(rows)
        step, count = (1, len(range(rows)[held])) if piece.transposed else (piece.at_step, piece.count)
        if first + (count - 1) * step >= b.shape[-2]:
            raise TargetError(
                f"{where}: '{piece.tensor}' has {b.shape[-2]} rows, too few for {target.parameter}",
                "give the base it was trained on",
            )
        found = (b[index] if b.ndim == 3 else b)[first : first + (count - 1) * step + 1 : step]
        matrix_index, row = divmod(piece.row, height)
        place = held if piece.transposed else slice(row, row + count)
        left[matrix_index, place, at : at + size] = found * scale
    right = torch.cat([a.reshape(-1, *a.shape[-2:]).expand(matrices, -1, -1) for a, _ in places], 1)
    return _Module(target.parameter, right, left, target.stacked)


def _stored(module: _Module, b: torch.Tensor, modules: list[_Module]) -> dict[str, torch.Tensor]:
    """A and B by key, as PEFT lays them out."""
    path = module.path
    if module.stacked:
        # A has the experts slowest, B fastest. Of two parameters of one module, the first is wrapped first.
        beside = sorted(one.parameter for one in modules if one.stacked and one.path == path)
        inner = len(beside) > 1 and module.parameter.endswith("gate_up_proj")
        key = path + (".base_layer" if inner else "")
        first, last = (b.mT, module.a.mT) if module.turned else (module.a, b)
        stored_b = last.permute(1, 2, 0).reshape(last.shape[1], -1)
        return {f"{key}.lora_A.weight": first.reshape(-1, first.shape[-1]), f"{key}.lora_B.weight": stored_b}
    a, b = module.a[0], b[0]
    if path.endswith(("embed_tokens", "wte", "embed_in")):
        return {f"{path}.lora_embedding_A": b.T, f"{path}.lora_embedding_B": a.T}
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def _config(lora: GGUFCheckpoint, base: str, modules: list[_Module], alpha: float) -> dict[str, Any]:
    common = Counter(module.rank for module in modules).most_common(1)[0][0]
    # The scaling of all modules is alpha / r; without an alpha in the file it is 1 and lies in B.
    number = alpha or float(common)
    leaves = sorted({module.path for module in modules if not module.stacked})
    tokens = lora.header.get(INVOCATION)
    activated = {"alora_invocation_tokens": [int(token) for token in tokens]} if tokens else {}
    return {
        "peft_type": "LORA",
        "peft_version": LAYOUT,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.header.get("general.base_model.0.name", base),
        "inference_mode": True,
        "r": common,
        "lora_alpha": int(number) if number.is_integer() else number,
        "rank_pattern": {module.pattern: module.rank for module in modules if module.rank != common},
        "alpha_pattern": {},
        "target_modules": leaves,
        "target_parameters": sorted(module.parameter for module in modules if module.stacked) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": lora.arch == "gpt2",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        **activated,
    }
