"""LoRA and DoRA of Megatron (Megatron-Bridge, NeMo 2) under the names and in the rows of Hugging Face.

``y = W x + alpha / dim * linear_out linear_in x`` with ``linear_in [dim, in]`` and ``linear_out [out, dim]``: PEFT's A and B.
DoRA has ``weight_magnitude [out]``. What differs from PEFT:

- Layers of one kind stand in one tensor ``[layers, ...]`` under a name without a number, experts in ``[experts, ...]``.
- ``linear_qkv`` is fused. Its rows stand per query group: its query heads (behind them their gates, where attention
  has an output gate), its key head, its value head. ``linear_fc1`` is the gate, then up, or up alone.
- ``CanonicalLoRA`` trains one adapter for each of q, k, v, gate and up (``adapter_q`` and so on), in their own rows.
- One adapter serves all grouped experts of a layer.
- Below tensor parallelism, what is saved by halves of a rank (`_by_halves`) or by ranks (`_by_ranks`) is put in order again.

Source: megatron-bridge 0.3.1 (Apache-2.0), ``peft/`` and ``models/conversion/peft_bridge.py``, ``param_mapping.py``
(``split_qkv_weights``); megatron-core 0.16.1, ``transformer/transformer_block.py``, ``transformer/mlp.py``
(``apply_swiglu_sharded_factory``), ``transformer/moe/experts.py``; nemo_toolkit 2.4.1. Read for the format only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.formats.views import FunctionTensor
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Tensor

IN, OUT, MAGNITUDE = "linear_in", "linear_out", "weight_magnitude"
_LEAD = re.compile(r"(?:(?:model|module)\.){0,4}")
_KEY = re.compile(
    r"(?P<part>(?:llava_model\.)?(?:language_model\.)?)"
    r"(?:decoder\.layers\.(?:(?P<layer>\d{1,6})\.)?(?P<module>[A-Za-z][\w.]*?)|(?P<head>output_layer))"
    r"(?:\.adapter(?:\.adapter_(?P<own>q|k|v|gate|up))?)?"
    r"\.(?:(?P<leaf>linear_in|linear_out)\.weight(?P<piece>_w|_v|\.(?:z|x|B|C|dt))?|(?P<magnitude>weight_magnitude))"
)
_EXPERT = re.compile(r"experts\.(?:local_experts\.)?(\d{1,6})\.")
_PIECES = (("_w", "_v"), (".z", ".x", ".B", ".C", ".dt"))  # in the order of the whole

# Where a transformers model keeps its layers.
_LAYERS = ("model.layers", "model.language_model.layers", "language_model.model.layers", "backbone.layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Module of Megatron -> what it may be in transformers; several of one row stand one below the other in it.
_ONE: dict[str, tuple[str, ...]] = {
    "self_attention.linear_proj": ("self_attn.o_proj", "mixer.o_proj"),
    "self_attention.linear_q_proj": ("self_attn.q_proj",),
    "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
    "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
    "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
    "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
    "self_attention.out_proj": ("linear_attn.out_proj",),
    "mixer.in_proj": ("mixer.in_proj",),
    "mixer.out_proj": ("mixer.out_proj",),
    "mlp.linear_fc2": ("mlp.down_proj", "mixer.down_proj"),
    "mlp.router": ("mlp.gate", "mixer.gate", "block_sparse_moe.gate"),
    "mlp.shared_experts.linear_fc2": (
        "mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "mixer.shared_experts.down_proj",
    ),
    "mlp.experts.linear_fc2": (
        "mlp.experts.{}.down_proj", "mixer.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2",
    ),
}  # fmt: skip
_QKV, _QKV_LEAVES, _QKV_OWN = "self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj"), ("q", "k", "v")
_ATTENTION = ("self_attn", "mixer")
_GATED: dict[str, tuple[tuple[str, ...], ...]] = {
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.up_proj",), ("mixer.up_proj",)),
    "mlp.shared_experts.linear_fc1": (
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mixer.shared_experts.up_proj",),
    ),
    "mlp.experts.linear_fc1": (
        ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        ("mixer.experts.{}.up_proj",),
    ),
}


@dataclass(frozen=True)
class MegatronRun:
    """What the config of a run says of its adapter.

    Attributes:
        where: the file that says it.
        alpha: numerator of the scale; it is in no tensor.
        dim: the rank; 0 where it says none.
        dora: it is DoRA.
        expert_parallel: ranks that each train their own adapter of grouped experts; 0 where nothing says how many.
        ranks_differ: experts have a rank of their own.
        heads: ``num_attention_heads``, ``num_query_groups`` and ``kv_channels`` of the model, as far as it says them.
    """

    where: str
    alpha: float
    dim: int = 0
    dora: bool = False
    expert_parallel: int = 1
    ranks_differ: bool = False
    heads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Rows ``start`` to ``stop`` of a tensor that is seen as a matrix."""

    tensor: Tensor
    start: int
    stop: int


@dataclass
class _Module:
    """One adapted module of Megatron: its tensors by leaf, as the pieces that make the whole."""

    layer: int | None
    module: str
    own: str
    expert: int | None
    leaves: dict[str, list[_Rows]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        at = "" if self.layer is None else f"layer {self.layer}: "
        return at + self.module + (f".adapter_{self.own}" if self.own else "")


def is_megatron(name: str) -> bool:
    """Whether a tensor's name is one of an adapter of Megatron."""
    return _KEY.fullmatch(name, _LEAD.match(name).end()) is not None  # type: ignore[union-attr]


def as_peft(
    stored: Mapping[str, Tensor], parts: Mapping[str, int], run: MegatronRun, names: Names, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of the same adapter as PEFT saves it.

    Args:
        stored: the tensors of the checkpoint.
        parts: in how many pieces the rows of a tensor were saved.
        names: of the base.
        config: the base's.

    Raises:
        UnsupportedAdapter: a module that has no counterpart with the same rows.
        TargetError: the base has another size.
        AdapterError: a factor is missing, or the config of the run contradicts the tensors.
    """
    reader = _Reader(run, names, config)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in _modules(stored, parts, run):
        for path, a, b, norm in reader.placed(module):
            if path in ranks:
                raise AdapterError(f"{run.where}: two adapters for {path}", "save the checkpoint again")
            ranks[path] = sum(one.stop - one.start for one in a)
            tensors[f"base_model.model.{path}.lora_A.weight"] = _view(f"base_model.model.{path}.lora_A.weight", a)
            tensors[f"base_model.model.{path}.lora_B.weight"] = _view(f"base_model.model.{path}.lora_B.weight", b)
            if norm:
                name = f"base_model.model.{path}.lora_magnitude_vector"
                tensors[name] = _view(name, norm)
    rank = run.dim or max(ranks.values())
    made: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(run.alpha) if run.alpha == int(run.alpha) else run.alpha,
        "target_modules": sorted(ranks),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "use_dora": run.dora,
        "inference_mode": True,
    }
    other = {path: found for path, found in ranks.items() if found != rank}
    if other:
        made["rank_pattern"] = other
    return made, tensors


def _modules(stored: Mapping[str, Tensor], parts: Mapping[str, int], run: MegatronRun) -> Iterator[_Module]:
    """The adapted modules of a checkpoint, layer by layer and expert by expert."""
    found: dict[tuple[Any, ...], _Module] = {}
    wholes: dict[tuple[int | None, bool, str, str, int | None, str], dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        key = _KEY.fullmatch(name, _LEAD.match(name).end())  # type: ignore[union-attr]
        if key is None:
            raise UnsupportedAdapter(
                f"'{name}' is of a part of the model for which no rule is known (known are the layers of the decoder)",
                "export it with the tool that trained it",
            )
        if key["magnitude"] and not run.dora:
            raise AdapterError(f"'{name}' is of DoRA, and {run.where} says LoRA", "give the config of this run")
        layer = None if key["layer"] is None else int(key["layer"])
        module = (key["module"] or key["head"]).replace("experts.experts.", "experts.")
        one = _EXPERT.search(module)
        at = (layer, key["module"] is not None and layer is None, _EXPERT.sub("experts.", module))
        leaf = key["leaf"] or key["magnitude"]
        pieces = wholes.setdefault((*at, key["own"] or "", int(one[1]) if one else None, leaf), {})
        pieces[key["piece"] or ""] = tensor
    for (layer, stacked, module, own, one_expert, leaf), several in wholes.items():
        order = next((row for row in (("",), *_PIECES) if set(row) == set(several)), None)
        if order is None:
            raise AdapterError(f"'{next(iter(several.values())).name}' stands alone", "save the checkpoint again")
        tensors = [several[piece] for piece in order]
        own_dims = 1 if leaf == MAGNITUDE else 2
        leads = [tensor.shape[: max(len(tensor.shape) - own_dims, 0)] for tensor in tensors]
        per_expert = module.startswith("mlp.experts.") and one_expert is None and len(leads[0]) > stacked
        if len(set(leads)) > 1 or any(len(t.shape) != stacked + per_expert + own_dims for t in tensors):
            raise AdapterError(
                f"'{tensors[0].name}' is {list(tensors[0].shape)}, no factor", "save the checkpoint again"
            )
        lead = leads[0]
        for index in range(prod(lead)):
            at_layer = index // prod(lead[1:]) if stacked else layer
            expert = index % lead[-1] if per_expert else one_expert
            slot = found.setdefault((at_layer, module, own, expert), _Module(at_layer, module, own, expert))
            rows = [tensor.shape[len(lead)] for tensor in tensors]
            slot.leaves[leaf] = [_Rows(t, index * n, (index + 1) * n) for t, n in zip(tensors, rows, strict=True)]
            slot.parts[leaf] = sum(parts.get(tensor.name, 1) for tensor in tensors)
    yield from found.values()


class _Reader:
    """Places the modules of Megatron in a base."""

    def __init__(self, run: MegatronRun, names: Names, config: Mapping[str, Any]) -> None:
        self._run, self._names = run, names
        inner = config.get("text_config") or config.get("llm_config")
        self._config: Mapping[str, Any] = inner if isinstance(inner, dict) else config
        self._known = frozenset(names.parameters())

    def placed(self, module: _Module) -> Iterator[tuple[str, list[_Rows], list[_Rows], list[_Rows]]]:
        """Every module of the base that one of Megatron's is: path, rows of A, of B and of the magnitude.

        Raises:
            UnsupportedAdapter, TargetError, AdapterError
        """
        missing = next((leaf for leaf in (IN, OUT) if leaf not in module.leaves), None)
        if missing is not None or (self._run.dora and MAGNITUDE not in module.leaves):
            raise AdapterError(f"{module.name} has no {missing or MAGNITUDE}", "save the checkpoint again")
        a, b, norm = (module.leaves.get(leaf, []) for leaf in (IN, OUT, MAGNITUDE))
        rank = _count(a)
        of_expert = module.module.startswith("mlp.experts.")
        if self._run.dim and rank != self._run.dim and not (of_expert and self._run.ranks_differ):
            raise AdapterError(
                f"{module.name} has rank {rank}, and {self._run.where} says {self._run.dim}",
                "give the config of this run",
            )
        for expert in self._experts(module) if of_expert else (None,):
            paths, order, halves = self._of(module, expert, _count(b))
            whole = _by_halves(b, module.parts[OUT], module.name) if halves else b
            norms = norm
            if norm and "linear_fc1" in module.module and not module.own and len(paths) == 2:
                norms = _by_ranks(norm, module.parts[MAGNITUDE], module.name)
            for path, rows in zip(paths, order, strict=True):
                own_b, own_norm = _taken(whole, rows), _taken(norms, rows)
                self._fits(path, (_count(own_b), a[0].tensor.shape[-1]), rank, b)
                if norm and _count(own_norm) != _count(own_b):
                    raise AdapterError(
                        f"{module.name}: its magnitudes are of another size", "save the checkpoint again"
                    )
                yield path, a, own_b, own_norm

    def _of(
        self, module: _Module, expert: int | None, rows: int
    ) -> tuple[list[str], list[list[tuple[int, int]]], bool]:
        """The modules of the base, the rows of each, and whether they are saved by halves of a rank."""
        name = module.module
        if name == "output_layer":  # its rows are filled up to a multiple of the ranks
            path = self._first(("lm_head",), None, module)
            return [path], [[(0, min(rows, self._size(path)[0]))]], False
        if name == _QKV:
            found = [self._first([f"{one}.{leaf}" for one in _ATTENTION], module.layer, module) for leaf in _QKV_LEAVES]
            if module.own:
                if module.own not in _QKV_OWN:
                    raise self._nowhere(module, ())
                return [found[_QKV_OWN.index(module.own)]], [[(0, rows)]], False
            return found, self._groups(found, rows, module), False
        if name in _GATED:
            several = [tuple(one.format(expert) for one in row) for row in _GATED[name]]
            row = next((row for row in several if all(self._find(one, module.layer) for one in row)), None)
            if row is None:
                raise self._nowhere(module, several[0])
            paths = [str(self._find(one, module.layer)) for one in row]
            if module.own:
                if module.own in _QKV_OWN or (len(paths) == 1 and module.own == "gate"):
                    raise self._nowhere(module, several[0])
                return [paths[0] if module.own == "gate" else paths[-1]], [[(0, rows)]], True
            if len(paths) == 1:
                return paths, [[(0, rows)]], True
            half = rows // 2
            return paths, [[(0, half)], [(half, rows)]], False
        if name in _ONE and not module.own:
            path = self._first([one.format(expert) for one in _ONE[name]], module.layer, module)
            if name == "mixer.in_proj" and len(module.leaves[OUT]) == 1:
                raise UnsupportedAdapter(
                    f"{module.name} is saved in one piece, whose order depends on the ranks",
                    "save it with megatron-core",
                )
            return [path], [[(0, rows)]], False
        raise self._nowhere(module, ())

    def _groups(self, paths: Sequence[str], rows: int, module: _Module) -> list[list[tuple[int, int]]]:
        """The rows of q, k and v in a fused tensor."""
        heads, groups = self._number("num_attention_heads"), self._number("num_key_value_heads")
        groups = groups or heads
        width = self._number("head_dim") or (self._number("hidden_size") // heads if heads else 0)
        sizes = [self._size(path)[0] for path in paths]
        gated = sizes[0] == 2 * heads * width
        fits = heads and groups and heads % groups == 0 and sizes[1] == sizes[2] == groups * width
        if not fits or sizes[0] not in (heads * width, 2 * heads * width) or sum(sizes) != rows:
            raise TargetError(
                f"{module.name} has {rows} rows, and in the base q, k and v have {sizes} ({heads} heads of {width} in {groups} "
                "groups)",
                "give the base it was trained on",
            )
        told = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": width}
        for name, value in self._run.heads.items():
            if told.get(name, value) != value:
                raise TargetError(
                    f"{self._run.where} says {name} {value}, and the base has {told[name]}",
                    "give the base it was trained on",
                )
        each = heads // groups
        step = (each * (1 + gated) + 2) * width
        q: list[tuple[int, int]] = []
        for group in range(groups):
            at = group * step
            if not gated:
                q.append((at, at + each * width))
                continue
            for head in range(each):  # transformers has each head's gate behind its query
                q += [(at + (head + side * each) * width, at + (head + side * each + 1) * width) for side in (0, 1)]
        ends = [(group + 1) * step for group in range(groups)]
        k = [(end - 2 * width, end - width) for end in ends]
        v = [(end - width, end) for end in ends]
        return [q, k, v]

    def _experts(self, module: _Module) -> Sequence[int]:
        """The experts that an adapter serves: one, or all of its layer."""
        if module.expert is not None:
            return (module.expert,)
        if self._run.expert_parallel > 1:
            raise UnsupportedAdapter(
                f"{self._run.where} says expert_model_parallel_size {self._run.expert_parallel}: every rank trained an adapter "
                "of its own for its experts, and a checkpoint holds the first one's",
                "export the adapter from the running model (AutoBridge.export_adapter_weights)",
            )
        if not self._run.expert_parallel:
            raise UnsupportedAdapter(
                f"{module.name} is one adapter for all experts, and {self._run.where} does not say whether the run had several "
                "ranks of expert parallelism, each with an adapter of its own",
                "put the run's run_config.yaml (NeMo: context/model.yaml) beside the checkpoint",
            )
        count = next((number for name in _EXPERTS if (number := self._number(name))), 0)
        if not count:
            raise self._nowhere(module, ("mlp.experts.0",))
        return range(count)

    def _number(self, name: str) -> int:
        value = self._config.get(name)
        return value if type(value) is int and 0 < value < 1 << 20 else 0

    def _find(self, leaf: str, layer: int | None) -> str | None:
        """The path of a module of the base."""
        heads = ("", "model.", "language_model.") if layer is None else tuple(f"{one}.{layer}." for one in _LAYERS)
        paths = [head + leaf for head in heads]
        exact = next((path for path in paths if f"{path}.weight" in self._known), None)
        return exact or next((path for path in paths if self._names.find(f"{path}.weight") is not None), None)

    def _first(self, leaves: Sequence[str], layer: int | None, module: _Module) -> str:
        for leaf in leaves:
            path = self._find(leaf, layer)
            if path is not None:
                return path
        raise self._nowhere(module, leaves)

    def _size(self, path: str) -> tuple[int, int]:
        target = self._names.find(f"{path}.weight")
        assert target is not None
        return target.matrix

    def _fits(self, path: str, shape: tuple[int, int], rank: int, b: Sequence[_Rows]) -> None:
        size = self._size(path)
        if shape != size or any(one.tensor.shape[-1] != rank for one in b):
            raise TargetError(
                f"the adapter of {path} is for a weight of {list(shape)}, and the base's is {list(size)}",
                "give the base it was trained on",
            )

    def _nowhere(self, module: _Module, leaves: Sequence[str]) -> UnsupportedAdapter:
        looked = f" ({', '.join(leaves)})" if leaves else ""
        return UnsupportedAdapter(
            f"{module.name}: the base has no module with the same rows{looked}",
            "give the base it was trained on, or export it with the tool that trained it",
        )


def _count(rows: Sequence[_Rows]) -> int:
    return sum(one.stop - one.start for one in rows)


def _taken(rows: Sequence[_Rows], ranges: Sequence[tuple[int, int]]) -> list[_Rows]:
    """Some rows of what several pieces make together."""
    found = []
    for start, stop in ranges:
        at = 0
        for one in rows:
            size = one.stop - one.start
            low, high = max(start - at, 0), min(stop - at, size)
            if low < high:
                found.append(_Rows(one.tensor, one.start + low, one.start + high))
            at += size
    return found


def _by_halves(rows: list[_Rows], parts: int, name: str) -> list[_Rows]:
    """What was saved as a gate and an up though it is one matrix: the first halves of all ranks, then the second halves."""
    if parts in (1, 2):
        return rows
    ranks, odd = divmod(parts, 2)
    size, over = divmod(_count(rows), parts)
    if odd or over:
        raise _cut(name, parts)
    order = [rank + half * ranks for rank in range(ranks) for half in (0, 1)]
    return _taken(rows, [(one * size, (one + 1) * size) for one in order])


def _by_ranks(rows: list[_Rows], parts: int, name: str) -> list[_Rows]:
    """What was saved rank by rank, each its gate and its up: all gates, then all ups."""
    size, over = divmod(_count(rows), 2 * parts)
    if over:
        raise _cut(name, parts)
    order = [2 * rank + half for half in (0, 1) for rank in range(parts)]
    return _taken(rows, [(one * size, (one + 1) * size) for one in order])


def _cut(name: str, parts: int) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"{name} was saved in {parts} parts, whose order is not known", "save it from one rank of tensor parallelism"
    )


def _view(name: str, rows: Sequence[_Rows]) -> Tensor:
    """These rows as a tensor."""
    first = rows[0].tensor
    columns = () if name.endswith("magnitude_vector") else first.shape[-1:]
    width = prod(columns)

    def make() -> torch.Tensor:
        import torch

        return torch.cat([one.tensor.read(one.start * width, one.stop * width) for one in rows])

    shape = (_count(rows), *columns)
    return FunctionTensor(name, first.dtype, shape, make, "rows of an adapter of Megatron", first.dtype.nbytes(shape))
