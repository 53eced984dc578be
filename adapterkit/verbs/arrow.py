"""`combine --method arrow`: adapters that stay apart, and the prototypes by which a router chooses between them for each token.

Arrow (arXiv:2405.11157) routes a token to the adapters whose *prototype* is most like it: the first right singular
vector of the adapter's delta in that layer, up to its sign. PEFT's ``create_arrow_model`` loads the adapters of the
folder, once they have one rank and the same modules (``peft/tuners/lora/arrow.py``,
``check_loaded_lora_compatibility_arrow``), and computes the same vectors by power iteration. Here they are computed
from the factors, and written for routers that are not PEFT.

    task_0/, task_1/, ...        the adapters, plain LoRA of one rank, every scaling in the factors
    prototypes.safetensors       for each module [adapters, inputs], float32
    arrow.json                   the order of the adapters, what each was made of, top_k and temperature
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.plan import plan_file
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.checkpoint.write import Writing, write_together
from adapterkit.dtypes import F32
from adapterkit.errors import UnsupportedAdapter, UsageError, option
from adapterkit.places import Address
from adapterkit.provenance.record import adapter_parent, recorder
from adapterkit.verbs.report import AdapterUse, CombineReport

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.requests.adapters import CombineRequest

METHOD = "arrow"
WEIGHTS, CONFIG, PROTOTYPES, SAID = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "prototypes.safetensors",
    "arrow.json",
)
_TOP, _TEMPERATURE = 3, 1.0
"""PEFT's own defaults (``ArrowConfig``)."""
_FITS = (
    "adapters",
    "out",
    "base",
    "residual_base",
    "allow_unknown",
    "method",
    "force",
    "jobs",
    "progress",
    "parameters",
)
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Padded(Tensor):
    """A factor with rows or columns of zeros added, up to a common rank."""

    def __init__(self, inner: Tensor | None, name: str, shape: tuple[int, ...]) -> None:
        self.inner, self.name, self.dtype, self.shape = inner, name, F32, shape

    @property
    def block(self) -> int:
        return max(1, self.numel)

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        found = torch.zeros(self.shape)
        if self.inner is not None:
            rows, columns = self.inner.shape
            found[:rows, :columns] = self.inner.read(0, self.inner.numel).view(rows, columns).float()
        return found.view(-1)[start:stop]


def arrow(
    request: CombineRequest,
    alone: Callable[..., CombineReport],
    opened: Callable[[Any, CombineRequest], Adapter],
) -> CombineReport:
    """Write the folder.

    Args:
        alone: `combine` itself, which makes plain LoRA of each adapter.
        opened: opens an adapter as the request says.

    Raises:
        UsageError: fewer than two adapters, or an option that Arrow has no use for.
        UnsupportedAdapter: an adapter that holds more than factors of two-dimensional weights.
        OutputError, NotFound, AdapterError, TargetError, ...: as `combine`.
    """
    started = time.monotonic()
    asked: Any = request.adapters  # several, or what `open_family` made of them
    given = list(asked if isinstance(asked, (tuple, list)) else asked.adapters)
    top, temperature = _parameters(request, len(given))
    out = request.target
    if isinstance(out, Address):
        raise UsageError(
            f"{METHOD} makes a folder of adapters, and {out} is in a store", "write it to a folder, then copy that"
        )
    with disk.writing(str(out), out.parent), disk.staging(out, resume=False) as folder:
        plain = []
        for number, adapter in enumerate(given):
            one = replace(
                request,
                adapters=(adapter,),
                out=folder / f".plain-{number}",
                method="linear",
                parameters={},
                force=False,
            )
            plain.append(alone(**one.given()))
        refs = [row.ref for report in plain for row in report.adapters]
        views = [_view(folder / f".plain-{number}", refs[number]) for number in range(len(given))]
        shapes = _shapes(views, refs)
        rank = max(view[key].shape[0] for view in views for key in view if key.endswith(_A))
        nbytes = 0
        for number, view in enumerate(views):
            nbytes += _write(view, shapes, rank, folder / f".plain-{number}", folder / f"task_{number}")
        _prototypes(views, shapes, folder)
        for number in range(len(given)):
            shutil.rmtree(folder / f".plain-{number}")
        said = {
            "method": METHOD,
            "top_k": top,
            "router_temperature": temperature,
            "rank": rank,
            "adapters": [{"name": f"task_{number}", "made_of": Path(ref).name} for number, ref in enumerate(refs)],
        }
        disk.write_file(folder / SAID, (json.dumps(said, indent=2) + "\n").encode())
        made_of = [adapter_parent(opened(adapter, request)) for adapter in given]
        stated = {"method": METHOD, "top_k": top, "router_temperature": temperature}
        for name, data in recorder("combine", "combined", stated, made_of, method=METHOD)(folder).items():
            disk.write_file(folder / name, data)
        disk.sync_tree(folder)
        disk.publish(
            folder, out, keep={name for name in os.listdir(folder) if not name.startswith(".")}, force=request.force
        )
    notes = [f"PEFT loads it: create_arrow_model(model, [the folders of {out.name}], ArrowConfig(top_k={top}))"]
    return CombineReport(
        out=str(request.out),
        method=METHOD,
        space="",
        scale=1.0,
        parameters={"top_k": top, "temperature": temperature},
        adapters=tuple(
            AdapterUse(row.ref, row.method, 1.0, row.commit, row.base) for one in plain for row in one.adapters
        ),
        base=plain[0].base,
        rank=rank,
        own_ranks=False,
        modules=(),
        carried=(),
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        peak_memory=max(one.peak_memory for one in plain),
        notes=tuple(dict.fromkeys([*(note for one in plain for note in one.notes), *notes])),
    )


def _parameters(request: CombineRequest, count: int) -> tuple[int, float]:
    """
    Raises:
        UsageError
    """
    if count < 2:
        raise UsageError("arrow chooses between adapters, and one was given", "give two or more")
    other = [name for name in request.given() if name not in _FITS]
    if other:
        raise UsageError(f"arrow keeps adapters apart, so {request.spelled(other[0])} has no meaning", "leave it out")
    said = dict(request.parameters)
    top, temperature = said.pop("top_k", min(_TOP, count)), said.pop("temperature", _TEMPERATURE)
    if said:
        raise UsageError(f"arrow has no parameter {next(iter(said))}", "it has top_k and temperature")
    if type(top) is not int or not 1 <= top <= count:
        raise UsageError(f"top_k is {top}, and there are {count} adapters", f"give 1 to {count}")
    if not isinstance(temperature, (int, float)) or temperature <= 0:
        raise UsageError(f"temperature is {temperature}", "give a number above 0")
    return top, float(temperature)


def _view(folder: Path, ref: str) -> Checkpoint:
    """
    Raises:
        UnsupportedAdapter: it holds something that Arrow cannot route.
    """
    from adapterkit.checkpoint.files import LocalFile
    from adapterkit.checkpoint.folder import read_file

    view = read_file(LocalFile(folder / WEIGHTS), {})
    odd = [key for key, tensor in view.items() if not key.endswith((_A, _B)) or len(tensor.shape) != 2]
    if odd:
        raise UnsupportedAdapter(
            f"{ref} holds {odd[0]}, and arrow routes between factors of linear layers alone",
            f"fold it in first, with merge, or leave out {option('method', METHOD)}",
        )
    return view


def _shapes(views: Sequence[Checkpoint], refs: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every module that any adapter has.

    Raises:
        UnsupportedAdapter: two of them disagree.
    """
    found: dict[str, tuple[int, int]] = {}
    for view, ref in zip(views, refs, strict=True):
        for key in view:
            if key.endswith(_A):
                module = key.removesuffix(_A)
                shape = view[module + _B].shape[0], view[key].shape[1]
                if found.setdefault(module, shape) != shape:
                    raise UnsupportedAdapter(f"{ref} has other shapes in {module}", "give adapters of one base")
    return found


def _write(view: Checkpoint, shapes: Mapping[str, tuple[int, int]], rank: int, plain: Path, out: Path) -> int:
    """One adapter with every module and one rank; what it lacks is zeros, so it changes nothing there."""
    tensors: dict[str, Tensor] = {}
    for module, (outputs, inputs) in sorted(shapes.items()):
        for ending, shape in ((_A, (rank, inputs)), (_B, (outputs, rank))):
            tensors[module + ending] = Padded(view.get(module + ending), module + ending, shape)
    config = json.loads((plain / CONFIG).read_text())
    names = sorted({module.removeprefix("base_model.model.") for module in shapes})
    config |= {"r": rank, "lora_alpha": rank, "target_modules": names, "rank_pattern": {}, "alpha_pattern": {}}
    return _file(tensors, out, WEIGHTS, {CONFIG: (json.dumps(config, indent=2) + "\n").encode()})


def _file(tensors: Mapping[str, Tensor], folder: Path, name: str, side: Mapping[str, bytes]) -> int:
    """A folder with one safetensors file of small tensors; how many bytes that has."""
    plan = plan_file(name, list(tensors.values()), {"format": "pt"})
    write_together([Writing(plan, tensors, (), folder, side)], force=[False])
    return plan.nbytes


def _prototypes(views: Sequence[Checkpoint], shapes: Mapping[str, tuple[int, int]], folder: Path) -> None:
    from adapterkit.adapters.write_peft import InMemory

    tensors: dict[str, Tensor] = {}
    for module in sorted(shapes):
        tensors[module] = InMemory(module, _of_module(views, module, shapes[module][1]))
    _file(tensors, folder / ".prototypes", PROTOTYPES, {})
    os.replace(folder / ".prototypes" / PROTOTYPES, folder / PROTOTYPES)
    shutil.rmtree(folder / ".prototypes")


def _of_module(views: Sequence[Checkpoint], module: str, inputs: int) -> torch.Tensor:
    """``[adapters, inputs]``: the first right singular vector of each ``B A``, of length 1, its largest entry positive."""
    import torch

    rows = torch.zeros(len(views), inputs)
    for number, view in enumerate(views):
        if module + _A not in view:
            continue
        a, b = (_matrix(view[module + ending]) for ending in (_A, _B))
        q, r = torch.linalg.qr(a.T)  # A = R' Q', so B A = (B R') Q' and its right singular vectors lie in Q
        _, values, right = torch.linalg.svd(b @ r.T, full_matrices=False)
        if values.numel() and values[0] > 0:
            vector = q @ right[0]
            rows[number] = (vector * torch.sign(vector[vector.abs().argmax()])).float()
    return rows


def _matrix(tensor: Tensor) -> torch.Tensor:
    return tensor.read(0, tensor.numel).view(tensor.shape).double()
