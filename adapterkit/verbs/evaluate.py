"""`evaluate`: lm-evaluation-harness on a version, on its base, and on adapters that say nothing.

The harness runs in a process of its own, once for all of them: a model that brings it down does not bring us down, and its
libraries are imported once. Its results are read as `evidence add` reads them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.load import is_adapter
from adapterkit.checkpoint.files import seen
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.checkpoint.listing import LocalFolder
from adapterkit.checkpoint.open import locate
from adapterkit.checkpoint.pipeline import MODEL_INDEX
from adapterkit.disk import open_regular, read_regular
from adapterkit.errors import AdapterkitError, NotFound, UnsupportedAdapter, UsageError, how_it_ended, option
from adapterkit.ops.device import check_there
from adapterkit.packages import need
from adapterkit.places import address_of
from adapterkit.registry.evaluation import BASE, SELF, SHUFFLED, ZEROS
from adapterkit.requests.call import takes
from adapterkit.requests.evaluate import EvaluateRequest

if TYPE_CHECKING:
    from adapterkit.registry.evaluation import Score
    from adapterkit.registry.evidence import Attached
    from adapterkit.registry.record import Record

SEED = 1234

# Reads what to do from a file; writes the results of each model to a file of its own.
CONFIG = "adapter_config.json"
MOST_CONFIG = 64 << 20  # bytes
_CHILD = """
import json, sys, time
asked = json.load(open(sys.argv[1]))
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=asked["include_path"])
for one in asked["models"]:
    print("MODEL " + one["subject"], file=sys.stderr, flush=True)
    found = lm_eval.simple_evaluate(
        model="hf", model_args=one["args"], tasks=asked["tasks"], task_manager=manager, log_samples=False, **asked["options"]
    )
    found["date"] = time.time()
    found["lm_eval_version"] = getattr(lm_eval, "__version__", "")
    found.pop("samples", None)
    found["config"] = {key: value for key, value in (found.get("config") or {}).items() if key == "limit"}
    found["chat_template_sha"] = asked["options"]["apply_chat_template"]  # stands in files of the harness, not in this
    with open(one["out"], "w") as file:
        json.dump(found, file, default=str)
"""


@dataclass(frozen=True)
class EvaluateReport:
    """What was measured.

    Attributes:
        ref: of what.
        subjects: whose figures were taken, in order.
        measured: all figures.
        attached: where they are kept now; None where they are not.
    """

    ref: str
    subjects: tuple[str, ...]
    measured: tuple[Score, ...]
    attached: Attached | None


@dataclass(frozen=True)
class _Model:
    """One model for the harness: a subject, and the arguments of transformers that load it."""

    subject: str
    args: Mapping[str, Any]


@takes(EvaluateRequest)
def evaluate(request: EvaluateRequest) -> EvaluateReport:
    """Run lm-evaluation-harness and keep its figures as evidence.

    Raises:
        UsageError: the harness is not installed, there is no such device, or a base is not given that is needed.
        UnsupportedAdapter: transformers cannot load such an adapter; or no null adapter can be made of it.
        CheckpointError: a file changed while the harness ran.
        CheckFailed: the bytes of a base from the Hub are not those of its commit.
        AdapterkitError: the harness failed; the sentence has its last line.
        NotFound, RegistryError: see `adapterkit.registry.evidence.attach_evaluation`.
    """
    from adapterkit.registry.evidence import attach_evaluation
    from adapterkit.results import read_results

    check_there(request.device)  # the harness would run on another one
    need("lm_eval", what="evaluate runs the tasks of lm-evaluation-harness", tried=False)
    home = request.folder
    record, path = _found(request.ref, home)
    with tempfile.TemporaryDirectory(prefix="adapterkit-evaluate-") as folder:
        before = seen(path)
        models = _models(Path(folder), path, record, request)
        links = {Path(place, name) for place, *names in os.walk(folder) for name in (*names[0], *names[1])}
        before += tuple(one for link in links if link.is_symlink() for one in seen(link.resolve()))
        options = {
            "limit": request.limit,
            "num_fewshot": request.num_fewshot,
            "batch_size": request.batch,
            "device": request.device,
            "apply_chat_template": request.chat_template,
            "random_seed": SEED,
        }
        asked = {
            "include_path": request.tasks_folder,
            "tasks": request.names,
            "options": {key: value for key, value in options.items() if value is not None},
            "models": [
                {"subject": one.subject, "args": dict(one.args), "out": str(Path(folder) / f"{one.subject}.json")}
                for one in models
            ],
        }
        _run(Path(folder), asked, request.say or _silent)
        for one in before:
            one.check_unchanged()  # what was measured is what is named
        found = [
            figure
            for one in models
            for figure in read_results(Path(folder) / f"{one.subject}.json", subject=one.subject)
        ]
    attached = None
    if request.attach and (record is not None or _has_record(path)):
        attached = attach_evaluation(record.ref if record is not None else path, found, home=home)
    subjects = tuple(one.subject for one in models)
    return EvaluateReport(record.ref if record is not None else str(request.ref), subjects, tuple(found), attached)


def _silent(text: str) -> None:
    """Say nothing."""


def _has_record(path: Path) -> bool:
    from adapterkit.registry.beside import beside_path

    return beside_path(path).is_file()


def _found(ref: str | Path, home: Path | None) -> tuple[Record | None, Path]:
    """The record of a registered version, and its files."""
    from adapterkit.provenance.register import registered
    from adapterkit.registry import finder

    record = registered(ref, home=home)
    if record is None:
        if address_of(ref) is not None:
            raise UsageError(
                f"the harness loads files of this machine, and {ref} is in a store",
                "register it, then evaluate its name",
            )
        path = Path(ref).expanduser()
        if not path.exists():
            raise NotFound(f"{ref} does not exist", "give a folder, a GGUF file or a registry name")
        return None, path.resolve()
    found = finder.find(record.ref, home=home)
    if found is None or found.folder is None:
        raise NotFound(f"{record.ref} has no bytes here", "pull it, or give the files themselves")
    return record, found.file or found.folder


def _models(folder: Path, path: Path, record: Record | None, request: EvaluateRequest) -> list[_Model]:
    base, home = request.base, request.folder
    plain = {"dtype": request.dtype}
    if path.is_dir() and is_adapter(path):
        _check_peft(path)
        under = {**plain, **_base_args(folder, path, record, base, home)}
        found = [] if request.no_base else [_Model(BASE, under)]
        found.append(_Model(SELF, {**under, "peft": _linked(folder, "adapter", path)}))
        if request.null:
            for subject in (ZEROS, SHUFFLED):
                made = folder / f"adapter-{subject}"
                _null_adapter(path, made, subject)
                found.append(_Model(subject, {**under, "peft": str(made)}))
        return found
    if request.null:
        raise UsageError("only an adapter has null adapters to be held against", f"leave {option('null', True)} out")
    found = []
    if base is not None and not request.no_base:
        found.append(_Model(BASE, {**plain, **_pretrained(folder, "base", base, home)}))
    found.append(_Model(SELF, {**plain, **_loaded(folder, "model", path)}))
    return found


def _base_args(
    folder: Path, path: Path, record: Record | None, base: str | Path | None, home: Path | None
) -> dict[str, Any]:
    if base is not None:
        return _pretrained(folder, "base", base, home)
    if record is not None and record.base is not None and record.base.id:
        return _from_hub(folder, record.base.id, record.base.commit)
    config = _config(path)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UsageError("the adapter does not say which base it is evaluated on", f"give {option('base')}")
    return _from_hub(folder, named, str(config.get("revision") or ""))


def _pretrained(folder: Path, name: str, ref: str | Path, home: Path | None) -> dict[str, Any]:
    """What loads a base: a folder or file here, or a Hub id."""
    from adapterkit.provenance.register import registered
    from adapterkit.registry import finder

    path = Path(ref).expanduser()
    if path.exists():
        return _loaded(folder, name, path.resolve())
    record = registered(ref, home=home)
    if record is None:
        repo, _, revision = str(ref).partition("@")
        return _from_hub(folder, repo, revision)
    found = finder.find(record.ref, home=home)
    if found is not None and found.folder is not None:
        return _loaded(folder, name, found.file or found.folder)
    repo, _, revision = (found.hub or "" if found is not None else "").partition("@")
    return _from_hub(folder, repo, revision)


def _from_hub(folder: Path, repo: str, revision: str) -> dict[str, Any]:
    """What a repository (or a folder that a config names) is loaded by: its files, held against the commit's digests as in
    every verb. One that has pickles only, or a name without an organization, is left to the harness.

    Raises:
        NotFound, CheckFailed, AuthError, HubError
    """
    ref = f"{repo}@{revision}" if revision and not Path(repo).expanduser().is_dir() else repo
    # What is neither a folder nor named by an organization (as `gpt2`) only the harness knows.
    listing = locate(ref) if parse_hub(ref) is not None or Path(repo).expanduser().is_dir() else None
    if isinstance(listing, LocalFolder) and any(name.endswith(".safetensors") for name in listing.names):
        return {"pretrained": _linked(folder, "base", listing.path.resolve())}
    return {"pretrained": repo, **({"revision": revision} if revision else {})}


def _loaded(folder: Path, name: str, path: Path) -> dict[str, Any]:
    if (path / MODEL_INDEX).is_file():
        raise UsageError(
            f"{path} is a pipeline of several models, and lm-evaluation-harness takes one language model",
            "give the folder of a component that is one",
        )
    if path.is_dir():
        return {"pretrained": _linked(folder, name, path)}
    if path.suffix == ".gguf":
        # transformers reads a GGUF file beside which nothing else lies: its config and tokenizer come out of it.
        place = folder / name
        place.mkdir()
        os.symlink(path, place / "model.gguf")
        return {"pretrained": str(place), "gguf_file": "model.gguf"}
    raise UsageError(f"{path} is neither a folder nor a GGUF file", "give the folder of the model")


def _linked(folder: Path, name: str, path: Path) -> str:
    """A name without commas and other marks for a folder, so that nothing in its path is read as an argument."""
    os.symlink(path, folder / name, target_is_directory=True)
    return str(folder / name)


def _config(path: Path) -> dict[str, Any]:
    """An adapter's config.

    Raises:
        CheckpointError, UnsafeError, NotFound: it is no JSON of a size and shape that one has, or no plain file.
    """
    found = parse_json(read_regular(path / CONFIG, MOST_CONFIG), f"{path.name}/{CONFIG}")
    return found if isinstance(found, dict) else {}


def _check_peft(path: Path) -> None:
    for file in path.glob("adapter_model*"):
        os.close(open_regular(file))  # the harness would wait for a pipe
    if not os.path.lexists(path / CONFIG) or "peft_type" not in _config(path):
        raise UnsupportedAdapter(
            f"{path.name} is no folder of PEFT, and the harness loads no other", "convert it to peft first"
        )


def _null_adapter(path: Path, target: Path, subject: str) -> None:
    """An adapter that has learned nothing: its change set to zero, or the values of each tensor shuffled.

    Raises:
        UnsupportedAdapter: zeros in its tensors are not no change.
    """
    import numpy as np

    from adapterkit.checkpoint.header import parse_header

    weights = sorted(path.glob("adapter_model*.safetensors"))
    config = _config(path)
    if not weights:
        raise UnsupportedAdapter("null adapters are made of safetensors files, and it has none", "save it again")
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("modules_to_save")
    if subject == ZEROS and not plain:
        raise UnsupportedAdapter(
            f"zeros are no adapter that changes nothing for {config.get('peft_type')} with DoRA or whole modules",
            "leave the null adapters out, or measure them yourself and add the results as evidence of zeros",
        )
    target.mkdir()
    (target / CONFIG).write_bytes(json.dumps(config).encode())
    generator = np.random.default_rng(SEED)
    for file in weights:
        data = bytearray(file.read_bytes())
        header = parse_header(partial(_slice, bytes(data)), len(data), str(file))
        for name in sorted(header.tensors):
            info = header.tensors[name]
            if subject == ZEROS:
                data[info.start : info.stop] = bytes(info.nbytes)  # zero bytes are 0.0 in every float dtype
            elif count := math.prod(info.shape):
                values = np.frombuffer(data, np.uint8, info.nbytes, info.start).reshape(count, -1)
                data[info.start : info.stop] = values[generator.permutation(count)].tobytes()
        (target / file.name).write_bytes(data)


def _slice(data: bytes, offset: int, length: int) -> bytes:
    return data[offset : offset + length]


def _run(folder: Path, asked: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The harness, in a process of its own that ends with this one."""
    plan = folder / "asked.json"
    plan.write_text(json.dumps(asked))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(plan)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )
    last = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("MODEL "):
                say(line.removeprefix("MODEL ").strip())
            elif line.strip():
                last = line.strip()
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
    if code or not all(Path(one["out"]).is_file() for one in asked["models"]):
        how = f"ended with {code}: {last[:400] or 'it said nothing'}" if code >= 0 else f"failed: {how_it_ended(code)}"
        raise AdapterkitError(
            f"lm-evaluation-harness {how}",
            "run lm_eval itself on the same model to see more",
        )
