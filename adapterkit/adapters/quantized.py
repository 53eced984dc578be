"""`quantized`: a 16-bit view as transformers and the format's own library would save it quantized."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.as_trained import quantized_targets
from adapterkit.adapters.linear import is_named
from adapterkit.adapters.unstacked import unstacked
from adapterkit.adapters.wider import fused_with
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.encoded import encoded
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.tensor import Transposed
from adapterkit.codecs.codec import Layers
from adapterkit.codecs.conv1d import is_conv1d
from adapterkit.codecs.encode import InStep
from adapterkit.codecs.kinds import nested
from adapterkit.codecs.table import KINDS, find_kind, kinds_of, quantization
from adapterkit.dtypes import BF16, F16, F32
from adapterkit.errors import UsageError, counted, option

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.adapters.kept import FedInto
    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.codecs.codec import Kind

CONFIG = "config.json"


def quantized(
    checkpoint: Checkpoint,
    kind: str,
    *,
    double_quant: bool = False,
    skip: Iterable[str] | None = None,
    fed: FedInto | None = None,
) -> Checkpoint:
    """A view in which the linear layers are quantized, and the config says so.

    Args:
        checkpoint: a view of floating weights.
        kind: a key of `adapterkit.codecs.table.KINDS`, as ``nf4`` or ``fp8``.
        double_quant: with nested scales, where the format has them.
        skip: modules to keep in 16 bits, in the place of the output layer; names or patterns, as ``llm_int8_skip_modules``.
        fed: see `adapterkit.adapters.kept.kept`.

    Raises:
        UsageError: there is no such kind, the view is quantized, a layer is stored in pieces, or is a ``Conv1D``, which
            transformers does not load in this kind.
    """
    find_kind(kind)
    form = kinds_of(checkpoint.config)[kind]
    if form.stacks and not any(_STACK.fullmatch(name) and len(t.shape) == 3 for name, t in checkpoint.items()):
        form = find_kind(kind)  # its experts are stored one by one
    if quantization(checkpoint.config) is not None:
        raise UsageError(f"{checkpoint.ref} is quantized already", "dequantize it first")
    if double_quant and kind not in nested():
        raise UsageError(f"{kind} has no double quantization", "leave it out, or use nf4")
    if form.program == "mlx":
        from adapterkit.adapters.mlx_view import as_mlx_model

        if fed is not None:
            raise UsageError(
                f"{kind} is written to the nearest value alone, as mlx-lm does", f"leave out {option('rounding')}"
            )
        return as_mlx_model(checkpoint, form, skip)
    skip = None if skip is None else tuple(skip)
    if form.stacks:
        return _stacked(checkpoint, form, skip, fed)
    apart = False
    if form.experts:
        before, checkpoint = checkpoint, unstacked(checkpoint, partial(_to_split, form, skip))
        apart = checkpoint is not before
    routers = _routers(checkpoint) if form.experts else set()
    # Some routers are plain linear layers: what the config leaves alone must not be written.
    targets = [
        target
        for target in quantized_targets(checkpoint, skip)
        if routers.isdisjoint(name.removesuffix(".weight") for name in target.tensors)
    ]
    # Tensors that hold a whole matrix, and what that is called.
    whole = {target.pieces[0].tensor: target.parameter for target in targets if _is_whole(target, checkpoint)}
    split = next((t.parameter for t in targets if t.pieces[0].tensor not in whole), None)
    if split is not None:
        raise UsageError(f"'{split}' is stored in pieces, which {kind} cannot be", "write 16 bits")
    experts = _experts_of(checkpoint, form, skip) if form.experts else []
    if fed is not None and experts:
        raise UsageError(
            f"{option('rounding', 'feedback')} needs what goes into each layer, and the experts of {checkpoint.ref} run as one",
            f"leave out {option('rounding')}",
        )
    whole.update({name: name for name in experts})
    peaks = _peaks(whole, checkpoint) if form.together else {}
    kept: list[str] = []
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        linear = Transposed(tensor) if is_conv1d(name, checkpoint.config) else tensor
        # A layer without values has no scale.
        fits = name in whole and linear.numel and not (form.experts and linear.shape[0] == 1)
        encoder = form.encoder(name, linear.shape, linear.dtype, double_quant) if fits else None
        if encoder is not None and linear is not tensor and not form.conv1d:
            raise UsageError(
                f"'{name}' of {checkpoint.ref} is a Conv1D, which transformers does not load in {kind}",
                f"write {', '.join(one.name for one in KINDS.values() if one.conv1d)}, 16 bits or GGUF",
            )
        if isinstance(encoder, InStep):
            encoder.largest = peaks[name].value
        if encoder is not None and fed is not None:
            encoder = fed(name, encoder, linear.shape, kind)
        if name in whole and encoder is None:
            kept.append(whole[name].removesuffix(".weight"))
        for made in [tensor] if encoder is None else encoded(linear, encoder):
            tensors[made.name] = made
            shards[made.name] = checkpoint.shards.get(name, "model.safetensors")
    if len(kept) == len(whole):
        raise UsageError(f"{checkpoint.ref} has no linear layer that {kind} fits", "write 16 bits")
    dtype = next(iter(checkpoint[name] for name in whole)).dtype.torch_name
    modules = {target.parameter.removesuffix(".weight") for target in targets}
    left = sorted({*kept, *_left(checkpoint, modules, set(experts)), *routers})
    layers = Layers(dtype, double_quant, skip, tuple(left))
    words = f"{kind} double" if double_quant else kind
    notes = (
        *_experts(checkpoint, left, form),
        f"{counted(len(whole) - len(kept), 'linear layer')} written in {words}",
        *((f"{len(experts)} of them are experts, each with scales of its own",) if experts else ()),
        *((form.of_experts,) if experts and form.of_experts else ()),
        *(
            ("stacks of experts are taken apart: transformers and servers read single experts of this format",)
            if apart
            else ()
        ),
    )
    return _with(checkpoint, tensors, shards, form.config(layers), notes)


def _with(
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    shards: dict[str, str],
    said: dict[str, Any],
    notes: tuple[str, ...],
) -> Checkpoint:
    """The checkpoint with these tensors, and a config that says how they are quantized."""
    config = {**checkpoint.config, "quantization_config": said}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    side_files = tuple(file for file in checkpoint.side_files if file.name != CONFIG)
    return replace(
        checkpoint,
        tensors=tensors,
        shards=shards,
        config=config,
        side_files=(*side_files, SideFile(CONFIG, BytesFile(CONFIG, text.encode()))),
        notes=(*checkpoint.notes, *notes),
    )


_STACK = re.compile(r"(.*\bexperts)\.(?!.*bias)\w+(?:\.weight)?")  # all experts of a layer in one tensor


def _stacked(checkpoint: Checkpoint, form: Kind, skip: tuple[str, ...] | None, fed: FedInto | None) -> Checkpoint:
    """Experts that are stored as stacks, in the layout that models of this type are published in. Of a layer all or none.

    Raises:
        UsageError: none can be written.
    """
    layers: dict[str, list[str]] = {}
    for name, tensor in checkpoint.items():
        found = _STACK.fullmatch(name)
        if found is not None and len(tensor.shape) == 3:
            layers.setdefault(found[1], []).append(name)
    left = []
    for stem, names in layers.items():
        fit = all(
            (tensor := checkpoint[name]).numel
            and tensor.dtype in (BF16, F16, F32)
            and form.encoder(name, tensor.shape, tensor.dtype, False) is not None
            for name in names
        )
        if not fit or any(is_named(pattern, module) for pattern in skip or () for module in (stem, *names)):
            left.append(stem)
    chosen = {name for stem, names in layers.items() if stem not in left for name in names}
    if not chosen:
        raise UsageError(f"{checkpoint.ref} has no stack of experts that {form.name} fits", "write 16 bits")
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.items():
        encoder = form.encoder(name, tensor.shape, tensor.dtype, False) if name in chosen else None
        if encoder is not None and fed is not None:
            encoder = fed(name, encoder, tensor.shape, form.name)
        for made in [tensor] if encoder is None else encoded(tensor, encoder):
            tensors[made.name] = made
            shards[made.name] = checkpoint.shards.get(name, "model.safetensors")
    dtype = checkpoint[next(iter(chosen))].dtype.torch_name
    model = checkpoint.config.get("model_type")
    notes = [
        f"{counted(len(chosen), 'stack')} of experts written in {form.name}, as {model} is published; all else stays in 16 bits"
    ]
    if left:
        stays = f"the experts of {counted(len(left), 'layer')} stay in 16 bits, as '{left[0]}'"
        notes.append(f"{stays}: vLLM takes all experts as quantized, so it does not load these; transformers does")
    return _with(checkpoint, tensors, shards, form.config(Layers(dtype, False, skip, tuple(left))), tuple(notes))


def _experts(checkpoint: Checkpoint, left: Iterable[str], form: Kind) -> list[str]:
    """What is said of experts that stay in 16 bits: they may be most of a model."""
    found = [module for module in left if ".experts" in module]
    if not found:
        return []
    single = any(_ONE.fullmatch(name) and name.startswith(tuple(found)) for name in checkpoint)
    if not form.experts:
        why = f"{form.name} is written for linear layers alone"
    elif single:
        why = f"the experts of a layer are written in {form.name} only if each of them fits it and none is skipped"
    else:
        why = f"{form.name} is written only for experts that are stored one by one"
    said = [f"the experts stay in 16 bits ({counted(len(found), 'module')}, as '{found[0]}'): {why}"]
    return [*said, form.of_experts_left] if single and form.of_experts_left else said


_ONE = re.compile(r"(.*\bexperts)\.\d+\.[\w.]+\.weight")  # a matrix of one expert
# Last words of their modules; the longer ones are those of DBRX and JetMoE, of Hunyuan, of Switch and NLLB.
ROUTERS = ("gate", "router", "shared_expert_gate", "router.layer", "gate.wg", "router.classifier")


def _experts_of(checkpoint: Checkpoint, form: Kind, skip: tuple[str, ...] | None) -> list[str]:
    """Experts that are stored one by one and can be written, as llm-compressor stores them and servers load them.

    Of a layer all or none: servers run them as one.
    """
    layers: dict[str, list[str]] = {}
    for name in checkpoint:
        if (found := _ONE.fullmatch(name)) is not None:
            layers.setdefault(found[1], []).append(name)
    chosen: list[str] = []
    called = _called(checkpoint) if skip else {}
    for stem, names in layers.items():
        modules = {stem, *(name.removesuffix(".weight") for name in names)}
        # What transformers calls them counts too: `mlp.experts` of a Mixtral, whose file says `block_sparse_moe.experts`.
        modules |= {one for name in names for one in called.get(name, ())}
        skipped = any(is_named(pattern, module) for pattern in skip or () for module in modules)
        fit = all(_fits(checkpoint[name], form) for name in names)
        if fit and not skipped:
            chosen += names
    return chosen


def _called(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Of each tensor the parameters that it is part of, and their modules, by the names in the model."""
    from adapterkit.adapters.names import Names

    names = Names(checkpoint.shapes, checkpoint.config)
    found: dict[str, set[str]] = {}
    for parameter in names.parameters():
        target = names.find(parameter)
        for tensor in target.tensors if target is not None else ():
            found.setdefault(tensor, set()).update((parameter, parameter.rpartition(".")[0]))
    return found


def _to_split(form: Kind, skip: tuple[str, ...] | None, stem: str, matrices: Sequence[Tensor]) -> bool:
    """Whether the experts of a layer that are stored as stacks are written one by one: all of them or none."""
    modules = {
        stem,
        f"{stem}.gate_up_proj",
        f"{stem}.down_proj",
        *(one.name.removesuffix(".weight") for one in matrices),
    }
    skipped = any(is_named(pattern, module) for pattern in skip or () for module in modules)
    return not skipped and all(_fits(one, form) for one in matrices)


def _fits(tensor: Tensor, form: Kind) -> bool:
    """Whether the matrix of an expert can be written; one of one row is left, as linear layers of one output are."""
    matrix = len(tensor.shape) == 2 and tensor.shape[0] > 1 and tensor.numel and tensor.dtype in (BF16, F16, F32)
    return bool(matrix) and form.encoder(tensor.name, tensor.shape, tensor.dtype, False) is not None


def _routers(checkpoint: Checkpoint) -> set[str]:
    """Modules that choose experts: some servers make linear layers of them, which the config has to leave alone."""
    ends = tuple(f".{name}.weight" for name in ROUTERS)
    return {
        n.removesuffix(".weight") for n, tensor in checkpoint.items() if n.endswith(ends) and len(tensor.shape) == 2
    }


class _Peak:
    """The largest magnitude of some weights, found when the first of them is written."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._lock = threading.Lock()
        self._found: float | None = None

    def value(self) -> float:
        with self._lock:
            if self._found is None:
                self._found = 0.0
                for tensor in self.tensors:
                    for start in range(0, tensor.numel, tensor.block):
                        values = tensor.read_wide(start, min(start + tensor.block, tensor.numel))
                        self._found = max(self._found, float(values.abs().max()))
            return self._found


def _peaks(whole: Mapping[str, str], checkpoint: Checkpoint) -> dict[str, _Peak]:
    """For each weight the peak that it shares with those that servers run as one with it."""
    shared: dict[str, _Peak] = {}
    found = {}
    for name, parameter in whole.items():
        groups = fused_with(parameter)
        peak = shared.setdefault(groups[0] if groups else name, _Peak())
        peak.tensors.append(checkpoint[name])
        found[name] = peak
    return found


def _is_whole(target: Target, checkpoint: Checkpoint) -> bool:
    piece = target.pieces[0]
    return len(target.pieces) == 1 and not piece.transposed and checkpoint[piece.tensor].shape == target.shape


def _left(checkpoint: Checkpoint, modules: set[str], written: set[str]) -> set[str]:
    """Linear layers and stacks of experts that stay in 16 bits: a list given to transformers replaces its own.

    Args:
        modules: linear layers that are not among them.
        written: tensors of experts that are not.
    """
    from adapterkit.adapters.linear import linear_modules
    from adapterkit.adapters.names import Names

    names = Names(checkpoint.shapes, checkpoint.config)
    targets = {name: target for name in names.parameters() if (target := names.find(name)) is not None}
    shapes: Mapping[str, tuple[int, ...]] = {name: target.shape for name, target in targets.items()}
    left = {module for module in linear_modules(shapes, checkpoint.config) if module not in modules}
    experts = {
        name.rpartition(".")[0]
        for name, target in targets.items()
        if len(target.shape) == 3 and ".experts." in name and not written.issuperset(target.tensors)
    }
    # Experts that no class is known to stack are there one by one.
    alone = {
        name.removesuffix(".weight")
        for name, tensor in checkpoint.items()
        if name.endswith(".weight") and ".experts." in name and len(tensor.shape) == 2 and name not in written
    }
    return left | experts | {m for m in alone - modules if f"{m.partition('.experts.')[0]}.experts" not in experts}
