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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit import disk
from adapterkit.adapters.skipped import check_skipped, skipped_modules
from adapterkit.bases import open_model
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.plan import plan_file
from adapterkit.checkpoint.write import Room, Writing
from adapterkit.errors import (
    AdapterkitError,
    CheckpointError,
    MissingPackage,
    NotFound,
    UsageError,
    how_it_ended,
    option,
)
from adapterkit.packages import command as install
from adapterkit.places import Address
from adapterkit.requests.convert import ConvertRequest
from adapterkit.stores.files import brought
from adapterkit.verbs.conversions import oneshot
from adapterkit.verbs.conversions.conversion import Conversion, count_types
from adapterkit.verbs.conversions.folder import CONFIG, folder_recorder, open_folder

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint

OUTPUT_LAYER = "lm_head"
MOST_TEXT = 64 << 20  # bytes of calibration text


@dataclass(frozen=True)
class Compressor:
    """A conversion by llm-compressor. What it will write is known when it is done, so the plan has no bytes.

    Attributes:
        opened: the source as it is stored.
        to: ``awq`` or ``gptq``.
        asked: the calibration text, the Python that has llm-compressor, the modules to keep.
        notes: of the plan.
    """

    opened: Checkpoint
    to: str
    asked: ConvertRequest
    notes: tuple[str, ...]

    def run(self, room: Room) -> Writing:
        """Make the folder, and read it back by its headers."""
        if any(source.path is None for source in self.opened.sources):
            raise UsageError(f"llm-compressor reads a folder, and {self.opened.ref} is in a store", "download it first")
        if room.resume:
            raise UsageError("llm-compressor cannot continue an interrupted run", f"leave out {option('resume', True)}")
        with tempfile.TemporaryDirectory() as lent:
            self._lend(Path(lent))
            self._run(Path(lent), room.folder)
        made = open_model(room.folder)
        self._check(made)
        side = {file.name: file.bytes() for file in self.opened.side_files if file.name != CONFIG}
        facts = {
            "files": tuple(sorted({made.shards[name] for name in made})),
            "nbytes": sum(source.size for source in made.sources),
            "tensors": len(made),
            "types": count_types(made.tensors),
            "notes": (*self.notes, dequantized(made).notes[-1].replace("decoded", "wrote")),
        }
        stated = {"verb": "convert", "to": self.to, "skip_modules": list(self.asked.skip_modules)}
        record = folder_recorder(self.opened, self.to, "quantized", stated)
        names = frozenset(entry.name for entry in os.scandir(room.folder))
        target = self.asked.target
        assert isinstance(target, Path)
        return Writing(NOTHING, {}, (), target, side, record, made=names, facts=facts)

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
        # llm-compressor takes whole names; one that is not stored (a tied output layer) stays as it was given.
        asked = list(self.asked.skip_modules)
        skip = list(dict.fromkeys([*asked, *skipped_modules(self.opened, asked)])) or [OUTPUT_LAYER]
        words = {
            "src": str(source),
            "out": str(folder.resolve()),
            "kind": self.to,
            "calibration": str(_calibration(self.asked).resolve()),
            "skip": skip,
        }
        command = [*_python(self.asked), oneshot.__file__, json.dumps(words)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=_quiet(), cwd=folder)
        except OSError as error:
            raise UsageError(
                f"{command[0]} could not be run ({error.strerror})", f"give another {option('compressor')}"
            ) from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1] if lines and done.returncode > 0 else how_it_ended(done.returncode)
            raise AdapterkitError(
                f"llm-compressor could not make {self.to} of {self.opened.ref}: {said}",
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
            raise CheckpointError(
                f"llm-compressor quantized nothing of {self.opened.ref}", "name fewer modules to keep"
            )


NOTHING = plan_file("nothing", [], {})


def _planned(kind: str, asked: ConvertRequest, jobs: int) -> Conversion:
    many = next((name for name in ("on", "workers") if getattr(asked, name) is not None), None)
    if many is not None:  # said before what may be missing here, which would not help
        from adapterkit.verbs.execute import no_parts

        raise no_parts(replace(NOTHING, request={"to": kind}), f"leave out {option(many)}")
    opened = open_folder(asked, kind)
    _calibration(asked)
    if dequantized(opened) is not opened:
        raise UsageError(
            f"{opened.ref} is quantized, and {kind} starts from 16 bits",
            f"convert it with {option('to', 'bf16')} first",
        )
    if not any("token" in file.name for file in opened.side_files):
        raise NotFound(f"{opened.ref} has no tokenizer, which calibration needs", "copy the base's beside it")
    check_skipped(opened, asked.skip_modules)
    if isinstance(asked.target, Address):
        words = f"llm-compressor writes a folder, and {asked.target} is in a store"
        raise UsageError(words, "write it to a folder, then copy that to the store")
    _has_compressor(asked)
    notes = (*opened.notes, f"{kind} by llm-compressor: the whole model is loaded")
    stage = Compressor(opened, kind, asked, notes).run
    return Conversion(opened.ref, kind, NOTHING, {}, opened.sources, {}, {}, notes, stage=stage)


def _calibration(asked: ConvertRequest) -> Path:
    """The calibration text.

    Raises:
        UsageError: none was given, or it is no text.
        NotFound: it does not exist.
    """
    if asked.calibration is None:
        raise UsageError("awq and gptq need a text to calibrate on", f"add {option('calibration', 'FILE')}")
    path = brought(asked.calibration)
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


def _python(asked: ConvertRequest) -> list[str]:
    """The interpreter, isolated: what lies beside the script or in PYTHONPATH is not imported."""
    return [str(asked.compressor or sys.executable), "-I"]


def _has_compressor(asked: ConvertRequest) -> None:
    """Ask the interpreter whether it has llm-compressor.

    Raises:
        UsageError: it has not, or is none.
    """
    ask = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    command = [*_python(asked), "-c", ask]
    try:
        found = subprocess.run(command, capture_output=True, env=_quiet()).returncode == 0
    except OSError:
        found = False
    if not found:
        raise MissingPackage(
            f"awq and gptq are made by llm-compressor, which {command[0]} does not have",
            f"{install('llmcompressor')}, or name another environment's Python with {option('compressor')}",
        )


def _quiet() -> dict[str, str]:
    """The environment of the child: no network, no bars."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


awq, gptq = partial(_planned, "awq"), partial(_planned, "gptq")
