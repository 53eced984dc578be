"""Let the disk fail at every call of every verb that writes, or kill the run there, and count what is left.

    python -m bench proofs faults [--only VERB] [--json FILE]

Each run works in a forked child on tiny inputs. At the n-th ``pwrite``, ``write``, ``fsync``, ``rename``, ``link`` or
``mkdir`` the call fails with EIO, ENOSPC or EDQUOT, is interrupted (EINTR, which Python repeats by itself when the system
says so; here it is raised, so it counts as a failure), or the process gets SIGKILL. Then: the target is absent or has the
right bytes; a run that was not killed left nothing beside it and ended with an error of ours; and the next run gives the
right bytes and leaves nothing either.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.disk import calls as system
from adapterkit.errors import AdapterkitError
from adapterkit.registry.bundle import export_bundle
from adapterkit.registry.checkout import checkout
from adapterkit.registry.fsck import fsck
from adapterkit.registry.register import register
from bench.common import results

CODES = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "KILL")
CALLS = ("pwrite", "write", "fsync", "rename", "replace", "rename_new", "link", "mkdir")
MOST = 400  # of one call


def inputs(folder: Path) -> tuple[Path, Path]:
    """A base of two layers and an adapter."""
    torch.manual_seed(0)
    names = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(2) for leaf in "qkv"]
    tensors = {f"{name}.weight": torch.randn(16, 16).bfloat16() for name in names}
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 16)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(16, 2)
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def verbs(base: Path, adapter: Path, home: Path) -> dict[str, Callable[[Path], object]]:
    return {
        "merge": lambda out: adapterkit.merge(base, [adapter], out, jobs=1),
        "merge --force": lambda out: adapterkit.merge(base, [adapter], out, jobs=1, force=True),
        "merge --quant nf4": lambda out: adapterkit.merge(base, [adapter], out, jobs=1, quant="nf4"),
        "convert": lambda out: adapterkit.convert(base, out, to="f16", jobs=1),
        "combine": lambda out: adapterkit.combine([adapter, adapter], out, jobs=1),
        "resize": lambda out: adapterkit.resize(adapter, out, rank=1, jobs=1),
        "export": lambda out: export_bundle(("x",), out, home=home),
        "checkout": lambda out: checkout("x", to=out, home=home),
    }


def state(out: Path) -> str | None:
    """A digest of everything at the target."""
    if not os.path.lexists(out):
        return None
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(out.parent)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def child(work: Callable[[], object], call: str, code: str, nth: int) -> int:
    """0: done; 1: an error of ours; 2: the call does not happen so often; 3: another error; -9: killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        end = 3
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 2)
            end = _inject(work, call, code, nth)
        finally:
            os._exit(end)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _inject(work: Callable[[], object], call: str, code: str, nth: int) -> int:
    where: Any = system if call == "rename_new" else os
    real, seen = getattr(where, call), 0

    def fails(*args: Any, **more: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == nth:
            if code == "KILL":
                os.kill(os.getpid(), 9)
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number))
        return real(*args, **more)

    setattr(where, call, fails)
    try:
        work()
    except AdapterkitError:
        return 1
    except BaseException:
        return 3
    return 0 if seen >= nth else 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, wrong = {}, []
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        base, adapter = inputs(top)
        home = top / "home"
        register(adapter, "x", home=home)
        todo = verbs(base, adapter, home)
        for name, verb in todo.items():
            if given.only not in (None, name):
                continue
            verb(top / "right")
            right = state(top / "right" if name != "x" else top)
            shutil.rmtree(top / "right") if (top / "right").is_dir() else (top / "right").unlink()
            rows[name] = run(name, verb, top, right, wrong)
            print(f"{name:<18} {json.dumps(rows[name])}", flush=True)
        if given.only in (None, "register"):
            rows["register"] = registered(adapter, top, wrong)
            print(f"{'register':<18} {json.dumps(rows['register'])}", flush=True)
    for line in wrong:
        print("WRONG", line)
    results.note(**{f"{name}: {what}": row[what] for name, row in rows.items() for what in ("wrong",)})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    raise SystemExit(1 if wrong else 0)


def run(name: str, verb: Callable[[Path], object], top: Path, right: str | None, wrong: list[str]) -> dict[str, int]:
    row = {"faults": 0, "kills": 0, "refused": 0, "done": 0, "wrong": 0}
    place = top / "place"
    out = place / "right"
    for call in CALLS:
        for code in CODES:
            for nth in range(1, MOST):
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                before = None
                if name == "merge --force":
                    out.mkdir()
                    (out / "old").write_text("old")
                    before = state(out)
                ended = child(lambda: verb(out), call, code, nth)
                if ended == 2:
                    break
                row["kills" if code == "KILL" else "faults"] += 1
                row["refused"] += ended == 1
                row["done"] += ended == 0
                said = f"{name}: {code} at {call} {nth}: ended {ended}, left {sorted(os.listdir(place))}"
                bad = ended == 3 or (code != "KILL" and set(os.listdir(place)) - {out.name})
                # Between two renames of a replacement the next look puts it right.
                from adapterkit.disk import recover

                recover(out)
                bad = bad or state(out) not in (before, right) or (ended == 0 and state(out) != right)
                if state(out) is None or before is not None:
                    bad = bad or child(lambda: verb(out), "mkdir", "EIO", 10**6) not in (0, 2)
                if os.path.lexists(out) and (name != "merge --force" or ended == 0):
                    verb_again = [entry for entry in os.listdir(place) if entry != out.name]
                    bad = bad or (bool(verb_again) and code != "KILL")
                bad = bad or state(out) != right
                if bad:
                    row["wrong"] += 1
                    wrong.append(said)
    return row


def registered(adapter: Path, top: Path, wrong: list[str]) -> dict[str, int]:
    """The registry after faults and kills of its first registration: clean, or made whole by the next."""
    row = {"faults": 0, "kills": 0, "refused": 0, "done": 0, "wrong": 0}
    home = top / "born"
    for call in CALLS:
        for code in CODES:
            for nth in range(1, MOST):
                shutil.rmtree(home, ignore_errors=True)
                ended = child(lambda: register(adapter, "y", home=home), call, code, nth)
                if ended == 2:
                    break
                row["kills" if code == "KILL" else "faults"] += 1
                row["refused"] += ended == 1
                row["done"] += ended == 0
                bad = ended == 3 or (code != "KILL" and home.exists() and bool(fsck(home=home).problems))
                register(adapter, "y", home=home)
                if bad or fsck(home=home).problems:
                    row["wrong"] += 1
                    wrong.append(f"register: {code} at {call} {nth}: ended {ended}")
    return row


if __name__ == "__main__":
    main()
