"""The example of a recipe: on fresh clones of its folder it gives the same bytes, and those of its verbs and of PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import read_bytes, read_tensors

from adapterkit.recipe.lock import read_lock
from adapterkit.recipe.run import build

EXAMPLE = Path(__file__).parents[2] / "examples/recipe"
COMMITTED = ("adapterkit.toml", "make_inputs.py", "adapterkit.lock")


def clone(where: Path) -> Path:
    """What a clone has, and the inputs that the example makes for itself."""
    where.mkdir()
    for name in COMMITTED:
        shutil.copy(EXAMPLE / name, where / name)
    subprocess.run([sys.executable, "make_inputs.py"], cwd=where, check=True, timeout=900)
    return where


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two clones: one built with its lock written anew, the other held against that lock, on other threads."""
    root = tmp_path_factory.mktemp("clones")
    one, other = clone(root / "one"), clone(root / "other")
    build(one / "adapterkit.toml", jobs=1)
    shutil.copy(one / "adapterkit.lock", other / "adapterkit.lock")
    build(other / "adapterkit.toml", jobs=3, locked=True)
    return one, other


def test_two_clones_hold_the_same_bytes(clones: tuple[Path, Path]) -> None:
    one, other = (read_bytes(clone / "build", record=True) for clone in clones)
    assert {"tiny-Q8_0.gguf", "tiny-Q8_0.gguf.llama-server.sh", "tiny-Q8_0.gguf.adapterkit.json"} <= set(one)
    assert one == other


def test_the_committed_lock_knows_these_inputs(clones: tuple[Path, Path]) -> None:
    committed, made = read_lock(EXAMPLE / "adapterkit.lock"), read_lock(clones[0] / "adapterkit.lock")
    assert committed is not None
    assert made is not None
    assert committed.inputs == made.inputs
    assert committed.recipe == made.recipe
    assert set(committed.outputs) == set(made.outputs)


def test_a_second_run_is_done_in_a_moment(clones: tuple[Path, Path]) -> None:
    """The command as a user runs it, Python's own start included."""
    command = [sys.executable, "-m", "adapterkit", "build", "--locked", "--json"]
    took = []
    for _ in range(3):
        started = time.process_time()
        before = sum(_children())
        report = json.loads(subprocess.check_output(command, cwd=clones[0], timeout=900))
        took.append(sum(_children()) - before + time.process_time() - started)
        assert report["changed"] == 0
    assert min(took) < 1.0  # seconds of a processor: other work on the machine is not counted


def _children() -> tuple[float, float]:
    import os

    times = os.times()
    return times.children_user, times.children_system


def test_the_merge_is_what_the_formula_says(clones: tuple[Path, Path]) -> None:
    folder = clones[0]
    base, merged = read_tensors(folder / "inputs/base"), read_tensors(folder / "build/merged")
    deltas: dict[str, torch.Tensor] = {}
    for name, weight in (("style", 1.0), ("facts", 0.5)):
        factors = read_tensors(folder / "inputs" / name)
        for key in factors:
            if key.endswith("lora_A.weight"):
                b = factors[key.replace("lora_A", "lora_B")].double()
                target = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                deltas[target] = 2.0 * weight * b @ factors[key].double()
    assert len(deltas) == 6
    for name, tensor in base.items():
        wanted = (tensor.double() + deltas[name]).to(tensor.dtype) if name in deltas else tensor
        off = (merged[name].double() - wanted.double()).abs()
        assert off.max() <= wanted.double().abs().max() * 2**-8, (
            name
        )  # one step of bfloat16 where float32 rounds otherwise
        assert (off > 0).double().mean() < 0.001, name


def test_a_gguf_is_what_the_folder_becomes(clones: tuple[Path, Path], tmp_path: Path) -> None:
    """One pass from base to Q8_0 rounds once; through the 16-bit folder it rounds twice, and lands within a step."""
    from gguf import GGUFReader, dequantize

    read = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(clones[0] / "build/tiny-Q8_0.gguf").tensors}
    merged = read_tensors(clones[0] / "build/merged")
    for layer in range(2):
        wanted = merged[f"model.layers.{layer}.mlp.down_proj.weight"].float().numpy()
        found = read[f"blk.{layer}.ffn_down.weight"]
        assert abs(found - wanted).max() < abs(wanted).max() / 127


def test_the_digest_of_an_output_is_that_of_its_files(clones: tuple[Path, Path]) -> None:
    lock = read_lock(clones[0] / "adapterkit.lock")
    assert lock is not None
    for locked in lock.outputs.values():
        place = clones[0] / locked.path
        root = place if place.is_dir() else place.parent
        for name, digest in locked.files.items():
            assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
