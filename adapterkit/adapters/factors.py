"""From an adapter to the delta of each module: factors where it has them, rows of W' - W where it has not.

Every scaling is folded in (alpha/r, rsLoRA, patterns), so a delta stands for itself. Deltas are in the module's own
orientation, ``[out, in]``; those of an embedding are ``[tokens, dimensions]``; stacked experts give one delta each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from adapterkit.adapters.change import Weights
from adapterkit.adapters.edits import WRAPPED, adapter_edits, check_config, group_modules, is_shared, settle
from adapterkit.adapters.linear import linear_modules
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.method import Context
from adapterkit.adapters.methods.lora import EMBEDDING_A, EMBEDDING_B, MAGNITUDE, A, B, times_applied
from adapterkit.adapters.methods.tokens import ALONE, KEY, token_indices
from adapterkit.adapters.names import Names
from adapterkit.errors import AdapterError, UnsupportedAdapter, UsageError, option
from adapterkit.ops.lowrank import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.change import Change, Kernel
    from adapterkit.adapters.method import Edit, Method, Module
    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType
    from adapterkit.ops.rows import DeltaRows

Kind = Literal["linear", "conv", "embedding", "parameter", "stacked"]


@dataclass(frozen=True)
class Slot:
    """A place where a LoRA adapter can act.

    Attributes:
        parameter: its name in the module tree.
        module: the module's path.
        kind: how PEFT stores factors there; ``parameter`` and ``stacked`` are its ``target_parameters``.
        shape: of one delta.
        count: how many deltas there are: experts.
        kernel: what a convolution's A has after its input channels.
        swapped: of a stack, that ``lora_A`` lies along the first inner dimension.
        applied: how often PEFT adds the delta.
    """

    parameter: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    count: int = 1
    kernel: tuple[int, ...] = ()
    swapped: bool = False
    applied: int = 1

    @property
    def largest_rank(self) -> int:
        return min(self.shape)


@dataclass(frozen=True)
class ModuleDelta:
    """What one adapter does to one slot; nothing is read before `load`."""

    slot: Slot
    adapter: Adapter
    change: Change
    weights: Weights

    def load(self) -> tuple[DeltaRows, ...]:
        """The deltas, one per expert; `Factors` where the method has them.

        Raises:
            AdapterError: NaN, or infinite entries.
            UsageError: the method needs the base and there is none.
        """
        rows = self.slot.shape[0]
        try:
            kernel = self.change.load(self.weights)
            return tuple(self._matrix(kernel, range(i * rows, (i + 1) * rows)) for i in range(self.slot.count))
        except AdapterError as error:
            # Of several adapters, the sentence must say which.
            raise AdapterError(f"{self.adapter.ref}: {self.slot.parameter}: {error.message}", error.hint) from None

    def _matrix(self, kernel: Kernel, rows: range) -> DeltaRows:
        parts = kernel.parts(rows)
        if parts is None:
            return StreamedDelta(self, kernel, rows)
        scaled = [(left if scale == 1 else (left.double() * scale).float(), right) for _, left, right, scale in parts]
        if len(scaled) == 1:
            ((left, right),) = scaled
            return Factors(left.contiguous(), right.contiguous())
        # Each run of rows has factors of its own (GraLoRA): side by side, they are one product.
        import torch

        left = torch.block_diag(*(left for left, _ in scaled))  # type: ignore[no-untyped-call]
        return Factors(left, torch.cat([right for _, right in scaled]))


class StreamedDelta:
    """Rows of W' - W, for methods whose change is no low-rank product."""

    def __init__(self, delta: ModuleDelta, kernel: Kernel, rows: range) -> None:
        self.shape = delta.slot.shape
        self._delta, self._kernel, self._rows = delta, kernel, rows

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` in float32."""
        rows = self._rows[start:stop]
        w = self._delta.weights.read(rows.start, rows.stop)
        found = self._kernel.new(w, rows) - w
        if not bool(found.isfinite().all()):
            raise AdapterError(
                f"{self._delta.adapter.ref}: {self._delta.slot.parameter}: the change has NaN or infinite entries",
                "use an earlier checkpoint",
            )
        return found


class NoWeights(Weights):
    """In the place of a base that was not given: says so when a method asks for it."""

    def __init__(self, adapter: Adapter, how: str, target: Target) -> None:
        from adapterkit.dtypes import F32

        self._adapter, self._how, self.target = adapter, how, target
        self.shape: tuple[int, int] = target.matrix
        self.dtype: DType = F32

    def read(self, start: int, stop: int) -> torch.Tensor:
        raise self._error()

    def other(self, target: Target) -> Weights:
        raise self._error()

    def _error(self) -> UsageError:
        return UsageError(
            f"{self._adapter.ref} changes {self.target.parameter} by what depends on its weights ({self._how})",
            f"add {option('base', 'BASE')}",
        )


@dataclass(frozen=True)
class Parts:
    """An adapter taken apart.

    Attributes:
        deltas: by parameter.
        biases: trained ``lora_B.bias`` by module, with the scaling it is stored for.
        whole: tensors that are whole parameters, by key.
        tokens: token rows by module: their ids and the tensor.
        magnitudes: DoRA's vectors by module, where they were asked to be left out of the deltas.
    """

    adapter: Adapter
    deltas: Mapping[str, ModuleDelta]
    biases: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)


def take_apart(
    adapter: Adapter,
    base: Checkpoint | None = None,
    names: Names | None = None,
    *,
    residual_base: bool = False,
    allow_unknown: bool = False,
    bare: bool = False,
) -> Parts:
    """The deltas of an adapter and what else it brings, from headers.

    Args:
        adapter: of any method; without a base, of one whose factors tell the shapes.
        base: the base, floating weights.
        names: those of the base.
        residual_base, allow_unknown: see `adapter_edits`.
        bare: leave DoRA's magnitudes out of the deltas and give them separately.

    Raises:
        AdapterError, TargetError, UnsupportedAdapter: see `adapter_edits`.
        UsageError: the base is needed.
    """
    if base is not None and names is None:
        names = Names(base.shapes, base.config)
    adapter = settle(adapter, names, {} if base is None else base.config)
    method = check_config(adapter, residual_base=residual_base, allow_unknown=allow_unknown)
    config: Mapping[str, Any] = {} if base is None else base.config
    if base is None:
        names = Names(_shapes(adapter), {})
    assert names is not None
    if base is not None:
        # Everything that a merge would refuse is refused here too.
        adapter_edits(adapter, names, config, residual_base=residual_base, allow_unknown=allow_unknown)
    modules, whole = group_modules(adapter, method)
    if not adapter.tensors:
        raise AdapterError(f"{adapter.source.name} holds no tensors", "save the adapter again")
    shared = {key: tensor for key, tensor in adapter.tensors.items() if is_shared(key, method)}
    context = Context(adapter, names, str(config.get("model_type", "")), residual_base, modules, shared)
    taken = _Taker(context, method, base, whole, bare)
    for module in modules:
        taken.add(module)
    return Parts(adapter, taken.deltas, taken.biases, taken.whole, taken.tokens, taken.magnitudes)


class _Taker:
    """Goes through the modules of an adapter and collects what they hold."""

    def __init__(
        self, context: Context, method: Method, base: Checkpoint | None, whole: Mapping[str, Tensor], bare: bool
    ) -> None:
        self._context, self._method, self._base, self._bare = context, method, base, bare
        self._kinds = _Kinds(context.names, {} if base is None else base.config)
        self.deltas: dict[str, ModuleDelta] = {}
        self.biases: dict[str, tuple[Tensor, float]] = {}
        self.whole: dict[str, Tensor] = dict(whole)
        self.tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self.magnitudes: dict[str, Tensor] = {}

    def add(self, module: Module) -> None:
        context = self._context
        rows = next((module.tensors[key] for key in (KEY, ALONE) if key in module.tensors), None)
        if rows is not None:
            self.tokens[module.path] = (tuple(token_indices(context.config, module.path)), rows)
        left = {name: tensor for name, tensor in module.tensors.items() if name not in (KEY, ALONE)}
        if self._bare and MAGNITUDE in left:
            self.magnitudes[module.path] = left.pop(MAGNITUDE)
        if not left.keys() - {f"{WRAPPED}.weight", f"{WRAPPED}.bias"}:
            return
        bias = left.get("lora_B.bias")
        for edit in self._method.edits(replace(module, tensors=left), context):
            change, target = edit.change, edit.target
            if change.replaced is not None:
                self.whole[target.parameter] = change.replaced
            elif bias is not None and change.how == "lora bias":
                self.biases[module.path] = (bias, change.scale)
            elif target.matrix[1] == 1 and len(target.shape) < 2:
                raise UnsupportedAdapter(
                    f"{context.adapter.ref} changes the vector '{target.parameter}' ({change.how}), which a LoRA cannot "
                    "hold",
                    "fold it into the base with merge",
                )
            else:
                slot = _slot(module, edit, context, self._kinds)
                weights = _weights(edit, context.adapter, self._base, module)
                self.deltas[target.parameter] = ModuleDelta(slot, context.adapter, change, weights)


def _weights(edit: Edit, adapter: Adapter, base: Checkpoint | None, module: Module) -> Weights:
    if base is None:
        return NoWeights(adapter, edit.change.how, edit.target)
    tensors = dict(base.tensors)
    own = module.tensors.get(f"{WRAPPED}.weight")  # a vocabulary that was resized for training stands for the base's
    if own is not None:
        tensors[edit.target.pieces[0].tensor] = own
        return StoredWeights(edit.target, tensors, (own.shape[0], edit.target.matrix[1]))
    return StoredWeights(edit.target, tensors)


def _slot(module: Module, edit: Edit, context: Context, kinds: _Kinds) -> Slot:
    target = edit.target
    name = target.parameter
    if EMBEDDING_A in module.tensors:
        a, b = module.tensors[EMBEDDING_A], module.tensors[EMBEDDING_B]
        return Slot(name, module.path, "embedding", (a.shape[1], b.shape[0]))
    if target.stacked and len(target.shape) == 3:
        swapped = context.names.turned(name)
        return Slot(
            name,
            name.rpartition(".")[0],
            "stacked",
            (target.shape[1], target.shape[2]),
            target.shape[0],
            swapped=swapped,
        )
    named = context.config.names("target_parameters")
    if A in module.tensors and any(name == one or name.endswith("." + one) for one in named):
        return Slot(name, module.path, "parameter", target.matrix)
    if len(target.shape) > 2:
        return Slot(name, module.path, "conv", target.matrix, kernel=target.shape[2:])
    if A in module.tensors:
        # One of several matrices that one pair of factors is for (experts) is a module of its own.
        path = module.path if name.startswith(f"{module.path}.") else name.rpartition(".")[0]
        return Slot(name, path, "linear", target.matrix, applied=times_applied(module, context))
    return Slot(name, module.path, kinds.of(module.path), target.matrix)


class _Kinds:
    """Whether a module that a method other than LoRA changes is a linear layer or a table, from the architecture."""

    def __init__(self, names: Names, config: Mapping[str, Any]) -> None:
        self._names, self._config = names, config
        self._linear: frozenset[str] | None = None

    def of(self, module: str) -> Kind:
        if self._linear is None:
            targets = {name: self._names.find(name) for name in self._names.parameters()}
            shapes = {name: target.shape for name, target in targets.items() if target is not None}
            self._linear = frozenset(linear_modules(shapes, self._config))
        return "linear" if module in self._linear or "embed" not in module.rpartition(".")[2] else "embedding"


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The base as the factors of a LoRA adapter tell of it: the shape of every parameter that it changes.

    Raises:
        UsageError: they do not tell.
    """
    config = adapter.config
    what = next((word for word in ("target_parameters", "use_bdlora", "use_qalora") if config.get(word)), "")
    if config.peft_type not in ("LORA", "ADALORA", "TRAINABLE_TOKENS") or what:
        raise UsageError(
            f"{adapter.ref} does not say the shapes of what it changes ({what or config.peft_type})",
            f"add {option('base', 'BASE')}",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for key, tensor in adapter.tensors.items():
        for a, b in ((A, B), (EMBEDDING_A, EMBEDDING_B), ("lora_A", "lora_B")):
            if not key.endswith("." + a) or not tensor.shape:
                continue
            parameter = _module(key.removesuffix("." + a)) + ".weight"
            other = adapter.tensors.get(key.removesuffix(a) + b)
            if other is None or not other.shape:
                continue
            if len(tensor.shape) == 3 and len(other.shape) == 3 and tensor.shape[1] == other.shape[2]:
                raise UsageError(
                    f"{adapter.ref} holds factors of experts in three dimensions", f"add {option('base', 'BASE')}"
                )
            if a == EMBEDDING_A:
                shapes[parameter] = (tensor.shape[-1], other.shape[0])
            else:
                shapes[parameter] = (other.shape[0], *tensor.shape[1:])
        if key.endswith(".lora_B.bias"):
            shapes[_module(key.removesuffix(".lora_B.bias")) + ".bias"] = tensor.shape
    return shapes


def _module(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != WRAPPED)
