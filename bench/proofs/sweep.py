"""Every architecture of the installed transformers: does adapterkit find the tensors, and merge what PEFT merges?

    python -m bench proofs sweep                                  # all types, a markdown table on stdout
    python -m bench proofs sweep --only qwen3_moe --only gpt2     # some types, with tracebacks
    python -m bench proofs sweep --write docs/architectures.md    # the published table

For each model type a tiny random model (`zoo`) is saved; PEFT puts a LoRA on all its linear layers and stacked experts,
except those that share their memory with another one: there PEFT adds both changes to the one tensor. Types that could
not be built give the error in the last column. `encodec` and `wavtokenizer_encoder` have no linear layer, so PEFT adapts none.

* names: each adapted parameter, put together from the tensors that `Names.find` gives, equals the parameter in memory;
* old on new: each tensor that has another name or shape in a file of the module tree's own format (version 5 of
  transformers) is found there by its old name, likewise;
* f32: the largest difference to PEFT's merged model, as a part of the largest change; untouched tensors byte-identical;
* bf16: "equal" when all tensors are bit-equal to PEFT's; "nearest" when each number is PEFT's or what PEFT's merge in
  float64 rounds to, give or take float32's own error just at a rounding boundary (PEFT rounds the change of stacked
  experts to bfloat16 before it adds it, so it rounds twice).

The last bit of a float32 product depends on the processor, PEFT's as well as ours. On another machine than that of this table
errors of 1e-7 stood in the place of some zeros, and eight types (`dac`, `neucodec`, `rf_detr`, `sam3`, `sam3_video`,
`swin2sr`, `swinv2`, `xcodec2`) were "nearest" where "equal" stands here; the rest came out the
same (types that need timm were not run).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common import results

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from adapterkit.adapters.target import Target

# what PEFT does not adapt in models with a Mamba block
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
EXPERTS = ("gate_up_proj", "down_proj", "up_proj", "gate_proj")


@dataclass
class Row:
    """What was found out about one model type."""

    type: str
    kind: str
    tensors: int = 0
    adapted: int = 0
    found: int = 0
    old_on_new: str = ""
    f32: str = ""
    bf16: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cells(self) -> list[str]:
        names = f"{self.found}/{self.adapted}" if self.tensors else "-"
        return [
            self.type,
            self.kind,
            str(self.tensors),
            names,
            self.old_on_new,
            self.f32,
            self.bf16,
            "; ".join(self.notes),
        ]


HEADER = ["type", "kind", "tensors", "names", "old on new", "f32 error", "bf16", "note"]


def run_merge(base_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
    """The merge under test."""
    import adapterkit

    adapterkit.merge(str(base_dir), [str(adapter_dir)], str(out_dir))


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def config(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return parsed


def assemble(target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
    """The parameter that ``target`` describes, from the tensors themselves."""
    import torch

    rows, columns = target.matrix
    made = torch.zeros(rows, columns, dtype=tensors[target.tensors[0]].dtype)
    times = torch.zeros(rows, dtype=torch.int32)
    for piece in target.pieces:
        tensor = tensors[piece.tensor]
        if piece.transposed:
            block = tensor.reshape(-1, tensor.shape[-1])[piece.at : piece.at + columns].T
            made[piece.row : piece.row + piece.count] = block[piece.row_at : piece.row_at + piece.count]
        else:
            stored = tensor.reshape(-1, columns)[piece.at :: piece.at_step][: piece.count]
            made[piece.row :: piece.row_step][: piece.count] = stored
        times[piece.row :: piece.row_step][: piece.count] += 1
    assert bool((times == 1).all()), f"{target.parameter}: rows left out, or given twice"
    return made.reshape(target.shape)


def same(name: str, names: Any, files: Mapping[str, Tensor], expected: Tensor) -> bool:
    """Whether ``name`` is found, and is ``expected`` when put together."""
    import torch

    target = names.find(name)
    if target is None or not expected.numel():
        return target is not None
    made = assemble(target, files)
    return made.shape == expected.shape and torch.equal(made, expected)


def adapted(model: Any) -> Iterator[tuple[str, str]]:
    """``(adapter name in PEFT, parameter name in the module tree)`` of everything that PEFT put a LoRA on."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            yield path, f"{plain}.{leaf}"


def targets(model: Any) -> list[str]:
    """Every linear layer but the output layer (as "all-linear"), without what PEFT refuses; else every convolution."""
    import torch
    from transformers.pytorch_utils import Conv1D

    try:
        output = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        output = None
    try:
        model.get_input_embeddings()
    except NotImplementedError:  # PEFT asks every model
        model.get_input_embeddings = torch.nn.Module
    refused = {"out_proj", "conv1d"} if model.config.model_type in MAMBA else set()
    shared = tied_parameters(model)
    found: dict[bool, list[str]] = {True: [], False: []}
    for path, module in model.named_modules():
        if f"{path}.weight" in shared:
            continue
        linear = isinstance(module, (torch.nn.Linear, Conv1D))
        conv = type(module) in (torch.nn.Conv1d, torch.nn.Conv2d) and module.groups == 1
        if (linear or conv) and module is not output and path.rsplit(".", 1)[-1] not in refused:
            found[linear].append(path)
    return found[True] or found[False]


def tied_parameters(model: Any) -> set[str]:
    """Parameters that share their memory with another one: PEFT adds both changes to what is one tensor."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter.data_ptr(), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


def lora(model: Any) -> Any:
    """``model`` with a random LoRA on every linear layer and every stacked expert."""
    import torch
    from peft import LoraConfig, get_peft_model

    shared = tied_parameters(model)
    experts = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 1)[-1] in EXPERTS and name not in shared
    ]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets(model), target_parameters=experts or None)
    wrapped = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return wrapped


def compare(base: Path, out: Path, wanted: Path) -> tuple[float, bool, list[str]]:
    """``(largest difference / largest change, all bit-equal, what else is wrong)`` of ``out`` against ``wanted``."""
    import torch

    before, ours, theirs = read(base), read(out), read(wanted)
    wrong = []
    if set(ours) != set(theirs):
        wrong.append(f"tensors differ from PEFT's: {sorted(set(ours) ^ set(theirs))[:3]}")
    change = error = 0.0
    equal = True
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if name in before and torch.equal(before[name], b) and not torch.equal(a.view(-1), b.view(-1)):
            wrong.append(f"{name} was touched")
        equal = equal and a.dtype == b.dtype and torch.equal(a, b)
        if a.is_floating_point() and a.shape == b.shape and a.numel():
            error = max(error, (a.double() - b.double()).abs().max().item())
            if name in before:
                change = max(change, (b.double() - before[name].double()).abs().max().item())
    if not change:
        wrong.append("nothing changed")
    return error / max(change, 1e-30), equal, wrong


def nearest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> bool:
    """Whether each number of ``ours`` is that of ``theirs`` or what ``exact`` rounds to."""
    for name, a in ours.items():
        best = exact[name]
        if not a.is_floating_point():
            continue
        slack = 1e-6 * (best.abs().max() if best.numel() else 0)
        near = (a >= (best - slack).to(a.dtype)) & (a <= (best + slack).to(a.dtype))
        if not bool((near | (a == theirs[name])).all()):
            return False
    return True


def examine(model_type: str, kind: str, merge: bool = True, verbose: bool = False) -> Row:
    """Everything about one type; never raises."""
    import torch

    from bench.common import zoo

    torch.set_num_threads(1)
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    row = Row(model_type, kind)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            for dtype in ("float32", "bfloat16") if merge else ("float32",):
                model, _ = zoo.build(model_type)
                _examine(row, model.to(getattr(torch, dtype)), Path(folder) / dtype, dtype, merge, verbose)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        row.notes.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    row.seconds = time.perf_counter() - started
    gc.collect()
    return row


def _examine(row: Row, model: Any, folder: Path, dtype: str, merge: bool, verbose: bool) -> None:
    import torch

    from adapterkit.adapters.names import Names
    from bench.common import zoo

    base = folder / "base"
    model.save_pretrained(base)
    if dtype == "float32":
        memory = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        files = read(base)
        row.tensors = len(files)
        names = Names({name: tuple(tensor.shape) for name, tensor in files.items()}, config(base))
        row.old_on_new = _old_on_new(model, folder / "new", files, verbose)
        lost = [
            name
            for name, tensor in memory.items()
            if tensor.is_floating_point()
            and not same(name, names, files, tensor)
            and not _tied(name, names, files, tensor)
        ]
        if lost and verbose:
            print("not found:", *lost[:12], sep="\n  ")
        if lost:
            row.notes.append(f"{len(lost)} of {len(memory)} parameters not found ({lost[0]})")
        strange = _without_head(model, folder / "inner", names, files)
        if strange:
            row.notes.append(f"{len(strange)} names of the model with and without its head not found ({strange[0]})")
    wrapped = lora(model)
    if dtype == "float32":
        places = list(adapted(wrapped))
        row.adapted = len(places)
        row.found = sum(
            same(name, names, files, memory[name]) or _tied(name, names, files, memory[name]) for _, name in places
        )
    if not merge:
        return
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    wrapped.merge_and_unload().save_pretrained(folder / "wanted")
    run_merge(base, folder / "adapter", folder / "out")
    error, equal, wrong = compare(base, folder / "out", folder / "wanted")
    row.notes += [f"{dtype}: {text}" for text in wrong[:2]]
    if dtype == "float32":
        row.f32 = f"{error:.1e}"
        return
    row.bf16 = "equal" if equal else f"{error:.1e}"
    if not equal:
        exact, _ = zoo.build(row.type)
        lora(exact.to(torch.bfloat16).double()).merge_and_unload().save_pretrained(folder / "exact")
        if nearest(read(folder / "out"), read(folder / "wanted"), read(folder / "exact")):
            row.bf16 = "nearest"


def _tied(name: str, names: Any, files: Mapping[str, Tensor], expected: Tensor) -> bool:
    other = names.tied(name)
    return other is not None and same(other, names, files, expected)


def _old_on_new(model: Any, folder: Path, files: Mapping[str, Tensor], verbose: bool) -> str:
    """How many tensors of ``files`` are found by their names in a file of the module tree's own format."""
    from adapterkit.adapters.names import Names

    model.save_pretrained(folder, save_original_format=False)
    new = read(folder)
    names = Names({name: tuple(tensor.shape) for name, tensor in new.items()}, config(folder))
    moved = [name for name in files if name not in new or new[name].shape != files[name].shape]
    lost = [name for name in moved if not same(name, names, new, files[name])]
    if lost and verbose:
        print("old names not found:", *lost[:12], sep="\n  ")
    return f"{len(moved) - len(lost)}/{len(moved)}" if moved else ""


def _without_head(model: Any, folder: Path, names: Any, files: Mapping[str, Tensor]) -> list[str]:
    """Names of the inner model not found in the file of the whole, and the other way round."""
    from adapterkit.adapters.names import Names

    inner = model.base_model
    if inner is model or not hasattr(inner, "save_pretrained"):
        return []
    memory = inner.state_dict()
    try:
        inner.save_pretrained(folder)
    except RuntimeError:  # some inner models share weights and do not say so
        return []
    small = read(folder)
    few = Names({name: tuple(tensor.shape) for name, tensor in small.items()}, config(folder))
    outer = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in memory.items()}
    lost = [n for n, t in memory.items() if not same(n, names, files, t) and not _tied(n, names, files, t)]
    return lost + [n for n, t in outer.items() if not same(n, few, small, t) and not _tied(n, few, small, t)]


def _counted(rows: list[Row]) -> dict[str, int]:
    built = [row for row in rows if row.tensors]
    merged = [row for row in built if row.f32]
    return {
        "built": len(built),
        "found": sum(row.found == row.adapted for row in built),
        "merged": len(merged),
        "same_f32": sum(float(row.f32) <= 2e-6 for row in merged),
        "same_bf16": sum(row.bf16 == "equal" for row in merged),
    }


def table(rows: list[Row]) -> str:
    """The rows as markdown, and a summary line."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows]
    found = _counted(rows)
    summary = f"{len(rows)} types, {found['built']} built, {found['found']} with every adapted parameter found"
    if found["merged"]:
        summary += f", {found['same_f32']} merged as PEFT does in float32, {found['same_bf16']} bit-equal in bfloat16"
    return "\n".join([*lines, "", summary + "."])


def main() -> int:
    from bench.common import zoo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a model type (may be given more than once)")
    parser.add_argument("--kind", action="append", default=[], choices=list(zoo.KINDS))
    parser.add_argument("--names-only", action="store_true", help="do not merge")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--write", type=Path, help="markdown file to write the table to")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON; what it holds is not run again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    todo = [
        (model_type, kind)
        for kind, types in zoo.kinds().items()
        for model_type in types
        if (not arguments.only or model_type in arguments.only) and (not arguments.kind or kind in arguments.kind)
    ]
    rows: list[Row] = []
    if arguments.json and arguments.json.exists():
        kept = {
            (row["type"], row["kind"]): Row(**row) for row in json.loads(arguments.json.read_text(encoding="utf-8"))
        }
        rows = [kept[item] for item in todo if item in kept]
        todo = [item for item in todo if item not in kept]
    work = partial(_work, merge=not arguments.names_only, verbose=bool(arguments.only))
    with ProcessPoolExecutor(arguments.jobs) if arguments.jobs > 1 else nullcontext() as pool:
        for row in pool.map(work, todo) if pool else map(work, todo):
            rows.append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
            print(f"{len(rows)}/{len(todo)} {row.seconds:5.1f}s", *row.cells, file=sys.stderr, flush=True)
    order = list(zoo.kinds())
    rows.sort(key=lambda row: (order.index(row.kind), row.type))
    text = table(rows)
    print(text)
    results.note(types=len(rows), **_counted(rows))
    if arguments.write:
        write(arguments.write, text)
    return 0


def _work(item: tuple[str, str], merge: bool, verbose: bool) -> Row:
    return examine(*item, merge, verbose)


def write(path: Path, text: str) -> None:
    """The published page: what was run, the summary, what the columns mean, the table."""
    from importlib.metadata import PackageNotFoundError, version

    packages = []
    for name in ("transformers", "peft", "torch", "timm"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    rows, _, summary = text.rpartition("\n\n")
    start = (__doc__ or "").index("For each model type")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# Architectures\n\nWritten by `bench/proofs/sweep.py --write` with {', '.join(packages)}.\n\n**{summary}**\n\n"
        f"{(__doc__ or '')[start:]}\n{rows}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    raise SystemExit(main())
