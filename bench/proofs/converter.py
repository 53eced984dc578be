"""Our files beside those of llama.cpp's own converter, tensor by tensor and key by key.

    python -m bench proofs converter --converter LLAMA_CPP/convert_hf_to_gguf.py --python PYTHON [KIND ...]

PYTHON is one that has what the converter wants (``requirements/requirements-convert_hf_to_gguf.txt`` beside it: torch,
transformers 4.57, sentencepiece). For each architecture of the table a tiny random model is made as the Hub has such models
(`converter_zoo`), and converted by both to F32, F16 and BF16, and once more from a BF16 checkpoint, whose type is kept.
Compared are the set of tensors, and of each its shape, its type and its bytes; and every key with its type and value, the
tokenizer's among them, except what a file is called. `converter_differs` lists the differences that are meant, with the
reason of each. Exits with 1 if there are others. The table sums the four files of each model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.common import results

ROOT = Path(__file__).resolve().parents[2]
TYPES = ("f32", "f16", "bf16")
# What a model is called and how large it is; from the name of the folder here.
NAMES = ("name", "basename", "finetune", "version", "organization", "size_label")


@dataclass
class Compared:
    """Two files.

    Attributes:
        tensors, keys: how many there are in either, and how many are equal.
        found: the differences: where, ours, theirs.
    """

    tensors: int = 0
    equal_tensors: int = 0
    keys: int = 0
    equal_keys: int = 0
    arch: str = ""
    found: list[tuple[str, str, str]] = field(default_factory=list)


def compare(ours: Path, theirs: Path) -> Compared:
    """Everything that two files say, but their names."""
    import gguf
    import numpy as np

    one, two = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    result = Compared(arch=str(two.fields["general.architecture"].contents()))
    left, right = ({t.name: t for t in reader.tensors} for reader in (one, two))
    for name in sorted({*left, *right}):
        result.tensors += 1
        told = [_tensor(side.get(name)) for side in (left, right)]
        if told[0] != told[1]:
            result.found.append((name, *told))
        elif not np.array_equal(left[name].data.view(np.uint8), right[name].data.view(np.uint8)):
            result.found.append((name, *_bytes(left[name], right[name])))
        else:
            result.equal_tensors += 1
    fields = [_fields(reader) for reader in (one, two)]
    for key in sorted({*fields[0], *fields[1]}):
        result.keys += 1
        said = [side.get(key, "-") for side in fields]
        if said[0] == said[1]:
            result.equal_keys += 1
        else:
            result.found.append((key, *_brief(said[0], said[1])))
    return result


def _tensor(tensor: Any) -> str:
    return "-" if tensor is None else f"{tensor.tensor_type.name} {tensor.shape.tolist()}"


def _bytes(one: Any, two: Any) -> tuple[str, str]:
    import gguf
    import numpy as np

    left, right = (gguf.dequantize(t.data, t.tensor_type).astype(np.float64).ravel() for t in (one, two))
    off = np.flatnonzero(left != right)
    if not off.size:
        return "other bits", "of equal numbers"
    first = int(off[0])
    return f"{left[first]:.9g} at {first}, {off.size} of {left.size} differ", f"{right[first]:.9g}"


def _fields(reader: Any) -> dict[str, Any]:
    skip = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", *(f"general.{name}" for name in NAMES)}
    return {
        key: ([kind.name for kind in one.types], one.contents())
        for key, one in reader.fields.items()
        if key not in skip
    }


def _brief(ours: Any, theirs: Any) -> tuple[str, str]:
    if (
        isinstance(ours, tuple)
        and isinstance(theirs, tuple)
        and isinstance(ours[1], list)
        and isinstance(theirs[1], list)
    ):
        pairs = list(zip(ours[1], theirs[1], strict=False))
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        return tuple(f"{s[0]} of {len(s[1])}, [{at}] = {s[1][at : at + 1]!r}" for s in (ours, theirs))  # type: ignore[return-value]
    return str(ours)[:160], str(theirs)[:160]


def bf16_copy(folder: Path, out: Path) -> None:
    """The same folder with weights in BF16, as most are published."""
    from models import read_tensors
    from safetensors.torch import save_file

    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    packed = config.get("quantization_config", {}).get("quant_method") not in (None, "mxfp4")
    tensors = {n: t if packed or not t.is_floating_point() else t.bfloat16() for n, t in read_tensors(folder).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if not packed:
        (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=2))


def run(kinds: list[str], at: Path, options: Any) -> list[dict[str, Any]]:
    """Make, convert both ways, compare."""
    from transformers.utils import logging

    from adapterkit.gguf.metadata import text
    from adapterkit.gguf.vocab import Vocab
    from adapterkit.verbs.convert import convert
    from bench.proofs import converter_zoo as zoo

    def none(rows: int) -> Vocab:
        return Vocab((text("tokenizer.ggml.model", "none"),), rows)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    jobs, rows = [], []

    def bare(*args: Any, **more: Any) -> None:
        with patch("adapterkit.gguf.vocab.read_vocab", lambda files, config, *, kind, rows, pre=None: none(rows)):
            convert(*args, **more)

    for kind in kinds:
        folder = at / kind
        pre = zoo.make(kind, folder)
        bf16_copy(folder, at / f"{kind}-bf16")
        rows.append({"kind": kind, "files": {}})
        for one in (*TYPES, "kept"):
            source = at / f"{kind}-bf16" if one == "kept" else folder
            out = at / "out" / f"{kind}-{one}.gguf"
            out.parent.mkdir(exist_ok=True)
            said = ""
            try:
                converted = bare if pre is None else convert
                converted(source, out.with_suffix(".ours.gguf"), **({} if one == "kept" else {"dtype": one}))
            except Exception as error:  # one row of a table must not lose the others
                said = f"{type(error).__name__}: {error}"
            rows[-1]["files"][one] = {"out": str(out), "ours": said, "theirs": "not run"}
            job = {"folder": str(source), "out": str(out), "type": "auto" if one == "kept" else one, "pre": pre}
            jobs.append({**job, "flags": zoo.FLAGS.get(kind, [])})
    (at / "jobs.json").write_text(json.dumps(jobs))
    worker = [
        str(options.python),
        str(ROOT / "bench" / "proofs" / "_converter_worker.py"),
        str(options.converter),
        str(at / "jobs.json"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (at / "converter.log").open("w") as log:
        done = subprocess.run(worker, stdout=subprocess.PIPE, stderr=log, text=True, check=False, env=environment)
    answers = {one["out"]: one["error"] for one in map(json.loads, done.stdout.splitlines())}
    for row in rows:
        for file in row["files"].values():
            file["theirs"] = answers.get(file["out"], file["theirs"])
            if not file["ours"] and not file["theirs"]:
                out = Path(file["out"])
                file["compared"] = compare(out.with_suffix(".ours.gguf"), out)
    return rows


def main() -> None:
    """Run the comparison."""
    import arch_zoo as zoo

    from bench.proofs.converter_zoo import EXTRA, VARIANTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--converter", type=Path, required=True, help="convert_hf_to_gguf.py of a llama.cpp")
    parser.add_argument("--python", type=Path, required=True, help="a Python with what it requires")
    parser.add_argument("--keep", type=Path, help="leave folders, files and the converter's log here")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kinds = options.kinds or [*zoo.ZOO, *EXTRA, *zoo.ENCODERS, *zoo.DISGUISES, *VARIANTS]
    with tempfile.TemporaryDirectory(prefix="converter-") as folder:
        at = options.keep or Path(folder)
        at.mkdir(exist_ok=True)
        rows = run(kinds, at, options)
    print(f"{options.converter.name}, with {_version(options)}\n")
    lines, meant, left = table(rows)
    print("\n".join([*lines, "", *(f"{number}. {why}" for why, number in meant.items())]))
    print(f"\n{len(rows)} models, {len(left)} differences that no row explains")
    print("\n".join(left))
    results.note(models=len(rows), unexplained=len(left))
    sys.exit(1 if left else 0)


def _version(options: Any) -> str:
    show = "import torch, transformers; print(f'transformers {transformers.__version__}, torch {torch.__version__}')"
    return subprocess.run([str(options.python), "-c", show], capture_output=True, text=True, check=False).stdout.strip()


def table(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, int], list[str]]:
    """Lines of Markdown, the reasons of meant differences with their numbers, and the other differences."""
    from bench.proofs.converter_differs import reason, refusal

    lines = ["| model | GGUF | tensors equal | keys equal | differences |", "|---|---|---|---|---|"]
    meant: dict[str, int] = {}
    left: list[str] = []
    for row in rows:
        kind, notes = row["kind"], []
        done = [file["compared"] for file in row["files"].values() if "compared" in file]
        for one, file in row["files"].items():
            if "compared" not in file:
                why = None if file["ours"] else refusal(kind, file["theirs"])
                if why is None:
                    left.append(f"{kind} {one}: ours: {file['ours'] or 'ok'}; theirs: {file['theirs'] or 'ok'}"[:400])
                notes.append(why or "not compared")
                continue
            for where, ours, theirs in file["compared"].found:
                why = reason(kind, where, ours, theirs)
                if why is None:
                    left.append(f"{kind} {one} {where}: {ours} | {theirs}")
                notes.append(why or "unexplained")
        counts = {
            name: f"{sum(getattr(d, f'equal_{name}') for d in done)}/{sum(getattr(d, name) for d in done)}"
            if done
            else ""
            for name in ("tensors", "keys")
        }
        shown = [str(meant.setdefault(why, len(meant) + 1)) for why in dict.fromkeys(notes)]
        arch = next((d.arch for d in done), "")
        lines.append(f"| {kind} | {arch} | {counts['tensors']} | {counts['keys']} | {', '.join(shown)} |")
    return lines, meant, left


if __name__ == "__main__":
    main()
