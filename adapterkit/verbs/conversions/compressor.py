"""To AWQ and GPTQ, which need calibration: llm-compressor does it, in a process of its own.

It loads the whole model, so this is the one conversion that needs the memory for it. What comes out are W4A16 weights in the
layout of compressed-tensors, which vLLM and transformers load; they are read back by headers before they get their name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.plan import plan_file
from adapterkit.errors import AdapterkitError, CheckpointError, NotFound, UsageError
from adapterkit.verbs.conversions import oneshot
from adapterkit.verbs.conversions.conversion import ConvertOptions, Ref, Run, count_types
from adapterkit.verbs.conversions.folder import CONFIG, FolderConversion, open_folder

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint

OUTPUT_LAYER = "lm_head"
MOST_TEXT = 64 << 20  # bytes of calibration text


@dataclass(frozen=True)
class Compressed(FolderConversion):
    """A conversion by llm-compressor. What it will write is known when it is done, so the plan has no bytes.

    Attributes:
        options: the calibration text, the Python that has llm-compressor, the modules to keep.
    """

    options: ConvertOptions = field(kw_only=True)

    def write(self, out: Path, run: Run) -> dict[str, Any]:
        from adapterkit.bases import open_model
        from adapterkit.checkpoint.publish import check_target, publish, staging

        if run.resume:
            raise UsageError("llm-compressor cannot continue an interrupted run", "leave out --resume")
        room = sum(tensor.nbytes for tensor in self.opened.values())
        inputs = [source.path.parent for source in self.sources if source.path is not None]
        check_target(out, inputs, room, force=run.force)
        with staging(out, resume=False) as folder, tempfile.TemporaryDirectory() as lent:
            self._lend(Path(lent))
            self._run(Path(lent), folder)
            made = open_model(folder)
            self._check(made)
            for file in self.opened.side_files:
                if file.name != CONFIG:
                    disk.write_inside(folder, file.name, file.bytes())
            record = run.record or self.record()
            for name, data in (record(folder) if record is not None else {}).items():
                disk.write_inside(folder, name, data)
            measured = {
                "files": tuple(sorted({made.shards[name] for name in made})),
                "nbytes": sum(source.size for source in made.sources),
                "tensors": len(made),
                "types": count_types(made.tensors),
                "notes": (*self.notes, dequantized(made).notes[-1].replace("decoded", "wrote")),
            }
            publish(folder, out, keep={entry.name for entry in os.scandir(folder)}, force=run.force)
        return measured

    def _lend(self, folder: Path) -> None:
        """The source as one folder, whatever it was named by: links to its weights, and its side files."""
        from adapterkit.checkpoint.plan import plan_safetensors
        from adapterkit.checkpoint.write import index_json

        for name, tensor in self.opened.items():
            link, extent = folder / self.opened.shards[name], tensor.extent
            if extent is not None and extent.source.path is not None and not link.exists():
                link.symlink_to(extent.source.path.resolve())
        for file in self.opened.side_files:
            disk.write_inside(folder, file.name, file.bytes())
        if len(set(self.opened.shards.values())) > 1:
            plan = plan_safetensors(self.opened)
            disk.write_inside(folder, plan.index_name, index_json(plan))

    def _run(self, source: Path, folder: Path) -> None:
        skip = list(self.options.skip_modules) or [OUTPUT_LAYER]
        asked = {
            "src": str(source),
            "out": str(folder.resolve()),
            "kind": self.to,
            "calibration": str(_calibration(self.options).resolve()),
            "skip": skip,
        }
        command = [*_python(self.options), oneshot.__file__, json.dumps(asked)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=_quiet(), cwd=folder)
        except OSError as error:
            raise UsageError(f"{command[0]} could not be run ({error.strerror})", "give another --compressor") from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1] if lines else f"it ended with {done.returncode}"
            raise AdapterkitError(
                f"llm-compressor could not make {self.to} of {self.src}: {said}",
                "give a causal language model in 16 bits with its tokenizer, and layers of whole groups of 128 inputs",
            )

    def _check(self, made: Checkpoint) -> None:
        """The result, decoded, must have the tensors of the source."""
        decoded = dequantized(made)
        wrong = sorted(name for name in self.opened.shapes if decoded.shapes.get(name) != self.opened.shapes[name])
        if wrong and not (
            wrong == [f"{OUTPUT_LAYER}.weight"] and wrong[0] not in decoded
        ):  # a tie that was saved twice
            raise CheckpointError(f"llm-compressor left '{wrong[0]}' out, or in another shape", "report it")
        if decoded is made:
            raise CheckpointError(f"llm-compressor quantized nothing of {self.src}", "name fewer modules to keep")


def _planned(kind: str, src: Ref, options: ConvertOptions, jobs: int) -> Compressed:
    opened = open_folder(src, options, kind)
    _calibration(options)
    if dequantized(opened) is not opened:
        raise UsageError(f"{opened.ref} is quantized, and {kind} starts from 16 bits", "convert it --to bf16 first")
    if not any("token" in file.name for file in opened.side_files):
        raise NotFound(f"{opened.ref} has no tokenizer, which calibration needs", "copy the base's beside it")
    _has_compressor(options)
    asked = {"verb": "convert", "to": kind, "skip_modules": list(options.skip_modules)}
    notes = (*opened.notes, f"{kind} by llm-compressor: the whole model is loaded")
    nothing = plan_file("nothing", [], {})
    return Compressed(
        opened.ref, kind, nothing, {}, opened.sources, {}, {}, notes,
        opened=opened, kind="quantized", asked=asked, options=options,
    )  # fmt: skip


def _calibration(options: ConvertOptions) -> Path:
    """The calibration text.

    Raises:
        UsageError: none was given, or it is no text.
        NotFound: it does not exist.
    """
    if options.calibration is None:
        raise UsageError("awq and gptq need a text to calibrate on", "add --calibration FILE")
    path = Path(options.calibration)
    if not path.is_file():
        raise NotFound(f"the calibration text {path} does not exist", "name a text file")
    data = path.read_bytes() if path.stat().st_size <= MOST_TEXT else b"\xff"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if not text.strip():
        raise UsageError(f"{path} is not a text of at most {MOST_TEXT >> 20} MB in UTF-8", "give plain text")
    return path


def _python(options: ConvertOptions) -> list[str]:
    """The interpreter, isolated: what lies beside the script or in PYTHONPATH is not imported."""
    return [str(options.compressor or sys.executable), "-I"]


def _has_compressor(options: ConvertOptions) -> None:
    """Ask the interpreter whether it has llm-compressor.

    Raises:
        UsageError: it has not, or is none.
    """
    ask = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    command = [*_python(options), "-c", ask]
    try:
        found = subprocess.run(command, capture_output=True, env=_quiet()).returncode == 0
    except OSError:
        found = False
    if not found:
        raise UsageError(
            f"awq and gptq are made by llm-compressor, which {command[0]} does not have",
            "install adapterkit[llmcompressor], or name another environment's Python with --compressor",
        )


def _quiet() -> dict[str, str]:
    """The environment of the child: no network, no bars."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


awq, gptq = partial(_planned, "awq"), partial(_planned, "gptq")
