"""What verbs compute on a GPU, beside the same on the CPU in one run: seconds, memory, and how far the outputs agree.

    python -m bench speed gpu --shape 1b --most 420

One call gives all figures in at most 8 minutes on a machine with a GPU that has nothing but this package: merges, encoders,
extract, resize, combine, imatrix, verify. Each case runs in a process of its own, first on the device and then on the CPU;
start-up is left out by the same verb on a tiny model first. A case that fails says why in its row, and the others run on.
When ``--most`` seconds have gone, no further case is begun; the most telling ones come first.

"memory" is that of the process, "on the device" the most that torch held there. "equal" is the share of the outputs' tensors
with the same bytes; of factors, which have a sign and a basis of their own, of products. "apart" is how far the others are: in
steps of bfloat16 where tensors are that, else the largest distance beside the largest value. Without a GPU it says so and
ends with 2; ``--device cpu`` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import adapterkit
from adapterkit.adapters.quantized import quantized
from adapterkit.errors import AdapterkitError
from adapterkit.ops.device import check_there, opened
from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, write_adapter, write_base
from bench.speed.one_pass import tokenizer

RUN = (
    HIGH_WATER
    + """
import json, sys, time
import torch
import adapterkit
verb, tiny, root, out, given = sys.argv[1:]
given = json.loads(given)
def run(root, out):
    named = lambda value: f"{root}/{value[1:]}" if isinstance(value, str) and value.startswith("@") else value
    deep = lambda value: [deep(one) for one in value] if isinstance(value, list) else named(value)
    places = [deep(value) for value in given["places"]]
    words = {name: deep(value) for name, value in given["options"].items()}
    if verb == "verify":
        return adapterkit.verify(*places, **words)
    if verb == "imatrix":
        from adapterkit.verbs.imatrix import imatrix
        return imatrix(*places, out, **words)
    return getattr(adapterkit, verb)(*places, out, **words)
suffix = given["suffix"]
run(tiny, f"{tiny}/out{suffix}")
if torch.cuda.is_available():
    torch.cuda.reset_peak_memory_stats()
start = time.monotonic()
report = run(root, out)
seconds = time.monotonic() - start
card = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
figure = report.tensors.retention if verb == "verify" else None
print(json.dumps({"seconds": seconds, "memory": high_water(), "card": card, "figure": figure}))
"""
)


@dataclass(frozen=True)
class Case:
    """What is measured: a verb, what it is given (``@`` stands for the folder of inputs), and how outputs are compared."""

    name: str
    verb: str
    places: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""
    alike: str = "tensors"


_LOSSY = {"yes_lossy": True}
CASES = (
    Case("merge, LoRA", "merge", ("@base", ["@lora"])),
    Case("extract, rank 16", "extract", ("@base", "@tuned"), {"rank": 16}, alike="products"),
    Case("merge, to Q4_K_M", "merge", ("@base", ["@lora"]), {"quant": "Q4_K_M", **_LOSSY}, ".gguf"),
    Case("resize, rank 8", "resize", ("@lora",), {"rank": 8}, alike="products"),
    Case("combine, rank 16", "combine", (["@lora", "@dora"],), {"rank": 16, "base": "@base"}, alike="products"),
    Case("verify, tensors", "verify", ("@tuned",), {"base": "@base", "adapters": ["@lora"]}, alike="figures"),
    Case("convert, to nf4", "convert", ("@base",), {"to": "nf4"}),
    Case("convert, to nvfp4", "convert", ("@base",), {"to": "nvfp4"}),
    Case("convert, to int4", "convert", ("@base",), {"to": "int4"}),
    Case("imatrix", "imatrix", ("@base", "@text.txt"), {"chunk": 64, "chunks": 4}, ".gguf"),
    Case("merge, DoRA", "merge", ("@base", ["@dora"])),
    Case("merge, LoRA on NF4", "merge", ("@nf4", ["@lora"])),
    Case("merge, LoRA to nf4", "merge", ("@base", ["@lora"]), {"quant": "nf4", **_LOSSY}),
    Case("convert, to fp8-block", "convert", ("@base",), {"to": "fp8-block"}),
    Case("convert, to mxfp4", "convert", ("@base",), {"to": "mxfp4"}),
    Case("convert, to Q8_0", "convert", ("@base",), {"quant": "Q8_0"}, ".gguf"),
    Case("convert, to Q6_K", "convert", ("@base",), {"quant": "Q6_K"}, ".gguf"),
    Case("convert, to IQ4_XS", "convert", ("@base",), {"quant": "IQ4_XS"}, ".gguf"),
    Case(
        "verify, model",
        "verify",
        ("@tuned",),
        {"base": "@base", "adapters": ["@lora"], "level": "model", "prompts": "@text.txt"},
        alike="figures",
    ),
)


def prepare(root: Path, shape: str) -> None:
    """A base, the same in NF4, a LoRA, a DoRA, their merge and a text; and all of that for a tiny shape."""
    shutil.rmtree(root, ignore_errors=True)
    for folder, name in ((root, shape), (root / "tiny", "tiny")):
        write_base(folder / "base", SHAPES[name])
        tokenizer(folder / "base")
        write_adapter(folder / "lora", SHAPES[name])
        _as_dora(folder / "dora", name)
        adapterkit.save(quantized(adapterkit.open(folder / "base"), "nf4"), folder / "nf4")
        adapterkit.merge(folder / "base", [folder / "lora"], folder / "tuned")
        (folder / "text.txt").write_text("A text like what the model will see, abab, in bytes.\n" * 40)


def _as_dora(folder: Path, shape: str) -> None:
    write_adapter(folder, SHAPES[shape], use_dora=True)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(tensors[name].shape[0])
    save_file(tensors, path, metadata={"format": "pt"})


def measured(root: Path, case: Case, device: str, out: Path, limit: float) -> dict[str, Any]:
    """One run in a process of its own; ``failed`` says why there is none."""
    shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
    tiny = root / "tiny" / f"of-{out.name}"
    shutil.rmtree(tiny, ignore_errors=True)
    given = {"places": case.places, "options": {**case.options, "device": device}, "suffix": case.suffix}
    tiny.mkdir()
    for inside in ("base", "nf4", "lora", "dora", "tuned", "text.txt"):
        (tiny / inside).symlink_to(root / "tiny" / inside)
    words = [case.verb, str(tiny), str(root), str(out), json.dumps(given)]
    try:
        done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [str(done.returncode)])[-1][:160]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _files(out: Path) -> list[tuple[str, torch.Tensor]]:
    """Tensors of a folder of safetensors, or of a GGUF file as it stores them."""
    if out.is_dir():
        found = []
        for path in sorted(out.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found += [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
        return found
    return [(name, tensor.read(0, tensor.numel)) for name, tensor in adapterkit.open(out).items()]


def _products(out: Path) -> list[tuple[str, torch.Tensor]]:
    tensors = dict(_files(out))
    ends = [name for name in tensors if name.endswith("lora_A.weight")]
    return [(n, tensors[n.replace("lora_A", "lora_B")].float() @ tensors[n].float()) for n in ends[:8]]


def agreement(first: Path, second: Path, read: Callable[[Path], list[tuple[str, torch.Tensor]]]) -> tuple[float, str]:
    """The share of tensors with the same bytes, and how far the others are."""
    equal = count = 0
    steps, far = 0, 0.0
    for (_, one), (_, other) in zip(read(first), read(second), strict=True):
        count += 1
        if torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
            equal += 1
        elif one.dtype == torch.bfloat16:
            steps = max(steps, int((_ordered(one) - _ordered(other)).abs().max()))
        elif one.is_floating_point() and one.element_size() > 1:
            size = float(one.abs().max()) or 1.0
            far = max(far, float((one.double() - other.double()).abs().max()) / size)
        else:
            far = max(
                far, float((one.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)).float().mean())
            )
    words = [f"{steps} steps"] * bool(steps) + [f"{far:.1e}"] * bool(far)
    return equal / max(count, 1), " ".join(words) or "0"


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 values as whole numbers in the same order, neighbours one apart."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many alone")
    parser.add_argument("--most", type=float, default=420.0, help="seconds after which no further case is begun")
    options = parser.parse_args()
    try:
        check_there(options.device)
    except AdapterkitError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from None
    start = time.monotonic()
    said = opened(options.device).said()
    results.note(**{name: value for name, value in said.items() if isinstance(value, (int, float, str))})
    prepare(options.dir, options.shape)
    heads = ("Case", f"{options.device}, s", "CPU, s", "times", "memory", "on the device", "equal", "apart")
    results.head(*heads)
    for case in CASES[: options.cases]:
        left = options.most - (time.monotonic() - start)
        if left <= 0:
            print(f"{case.name}: not run, {options.most:g} s are over", file=sys.stderr)
            continue
        try:
            results.row(*row(options.dir, case, options.device, left))
        except Exception as error:  # one case must not take the figures of the others with it
            results.row(case.name, "", "", "", "", "", "", f"{type(error).__name__}: {error}"[:160].replace("|", "/"))
    shutil.rmtree(options.dir)


def row(root: Path, case: Case, device: str, left: float) -> tuple[str, ...]:
    """A line of the table."""
    outs = [root / f"out-{place}{case.suffix}" for place in ("device", "cpu")]
    runs = [measured(root, case, name, out, left) for name, out in zip((device, "cpu"), outs, strict=True)]
    failed = [f"{name}: {run['failed']}" for name, run in zip((device, "CPU"), runs, strict=True) if "failed" in run]
    if failed:
        shown = [f"{run['seconds']:.2f}" if "seconds" in run else "" for run in runs]
        return case.name, *shown, "", "", "", "", "; ".join(failed).replace("|", "/")
    there, here = runs
    if case.alike == "figures":
        off = abs(there["figure"] - here["figure"])
        equal, apart = float(off == 0), f"{off:.1e}"
    else:
        equal, apart = agreement(*outs, _products if case.alike == "products" else _files)
    return (
        case.name,
        f"{there['seconds']:.2f}",
        f"{here['seconds']:.2f}",
        f"{here['seconds'] / there['seconds']:.1f}",
        f"{there['memory'] / 1e6:.0f} MB",
        f"{there['card'] / 1e6:.0f} MB",
        f"{equal:.3f}",
        apart,
    )


if __name__ == "__main__":
    main()
