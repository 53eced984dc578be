"""The wheel in clean environments: every Python here x every extra, with every verb run.

    python tools/clean_envs.py [--python PATH]... [--extra NAME]... [--wheel FILE] [--work FOLDER]

Builds the wheel from the sdist, makes a virtual environment for each Python and set of extras, installs the wheel as a
stranger does, and runs every verb in it by the scenarios of ``tests/without.py``. Each must end as it should: exit code 0, or
one sentence that says which extra to install. Writes `bench/results/clean_envs.json` and, from it, the table of
`docs/installing.md`. Environments are removed again; one takes up to 6 GB where only torch with CUDA is to be had.

Run it with the Python of a full environment (`make test` makes one): it writes the inputs of the scenarios.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from adapterkit.packages import CPU_INDEX, EXTRAS  # noqa: E402

RESULTS = ROOT / "bench/results/clean_envs.json"
# Sets of extras: none, and each that users are told of.
SETS = ("", *(extra.name for extra in EXTRAS), "all")
# What must not be found by chance, and addresses where nobody listens: there, exit code 5 is the right one.
ELSEWHERE = {
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
    "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=one;AccountKey=b25l;BlobEndpoint=http://127.0.0.1:9/one",
}
NOBODY = {"push", "pull", "inspect of Google's store", "inspect of Azure's store", "inspect of a Hub bucket"}
# `evaluate` of a published task needs the Hub; the one in the inputs stands for it.
LEFT_OUT = {"evaluate"}
SENTENCE = re.compile(r"^error: .*; (uv )?pip install '?[\w\[\]-]+'?", re.MULTILINE)


def pythons() -> list[str]:
    """Every Python from 3.10 that is on this machine, by its version."""
    found: dict[str, str] = {}
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    for folder in folders:
        for path in sorted(Path(folder).glob("python3.*")):
            match = re.fullmatch(r"python(3\.(\d+))", path.name)
            if match and int(match[2]) >= 10 and match[1] not in found and _works(path):
                found[match[1]] = str(path)
    return [found[version] for version in sorted(found, key=lambda text: int(text.partition(".")[2]))]


def _works(path: Path) -> bool:
    done = subprocess.run([path, "-c", "import venv, ensurepip, ssl"], capture_output=True, check=False)
    return done.returncode == 0


def build(work: Path) -> Path:
    """The wheel, made from the sdist: what is missing there is missing in the wheel."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", work / "dist"], cwd=ROOT, check=True
    )
    (archive,) = (work / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, work / "unpacked", filter="data")
    (folder,) = (work / "unpacked").iterdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", work / "dist"], cwd=folder, check=True
    )
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def megabytes(folder: Path) -> int:
    """Size of a folder; what two names share counts once."""
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            state = path.stat()
            seen[state.st_dev, state.st_ino] = state.st_size
    return round(sum(seen.values()) / 1e6)


@contextmanager
def a_store(inputs: Path, work: Path) -> Iterator[dict[str, str]]:
    """What the environment must say of a server of S3 on loopback that holds the base of the inputs."""
    from store_server import KEY, SECRET, client_of, serving

    folder = work / "store"
    shutil.rmtree(folder, ignore_errors=True)
    with serving(folder) as endpoint:
        client = client_of(endpoint)
        client.create_bucket(Bucket="bucket")
        for name in ("base", "model"):
            for path in (inputs / "base").iterdir():
                client.upload_file(str(path), "bucket", f"{name}/{path.name}")
        yield {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, **ELSEWHERE}


def try_one(python: str, extras: str, wheel: Path, inputs: Path, work: Path, around: dict[str, str]) -> dict[str, Any]:
    """Install and run; what came of it. ``around`` is what the environment says of stores."""
    version = subprocess.check_output([python, "-c", "import platform; print(platform.python_version())"], text=True)
    row: dict[str, Any] = {"python": version.strip(), "extras": extras or "none"}
    env = work / "env"
    shutil.rmtree(env, ignore_errors=True)
    subprocess.run([python, "-m", "venv", env], check=True)
    pip = [str(env / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    began = time.time()
    # The build without CUDA where its index or a local wheel has it; else what the usual index has, as for anybody.
    without = subprocess.run(
        [*pip, "--retries", "1", "--index-url", CPU_INDEX, "torch"], capture_output=True, check=False
    )
    row["torch"] = "cpu" if without.returncode == 0 else "usual index"
    wanted = f"{wheel}[{extras}]" if extras else str(wheel)
    done = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
    row["install_s"] = round(time.time() - began)
    if done.returncode != 0:
        return row | {"failed": done.stderr.strip().splitlines()[-1][:300]}
    row["torch"] = subprocess.check_output(
        [env / "bin/python", "-c", "import torch; print(torch.__version__)"], text=True
    ).strip()
    row["megabytes"] = megabytes(env)
    place = work / "scenarios"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(inputs, place / "inputs")
    shutil.copy(ROOT / "tests/without.py", place / "without.py")
    import without as scenarios

    names = [name for name in scenarios.SCENARIOS | scenarios.REFUSED | scenarios.ADDED if name not in LEFT_OUT]
    asked = json.dumps({"folder": str(place / "inputs"), "names": {"": names}})
    began = time.time()
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    told = subprocess.run(
        [env / "bin/python", place / "without.py", asked],
        capture_output=True, text=True, check=False, cwd=place, env={**clean, **around, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    row["verbs_s"] = round(time.time() - began)
    if told.returncode != 0:
        return row | {"failed": told.stderr.strip()[-300:]}
    results = json.loads(told.stdout.strip().splitlines()[-1])[""]
    return row | judged(results)


def judged(results: dict[str, Any]) -> dict[str, Any]:
    """How many scenarios worked, which said what to install, and which did neither."""
    works, says, wrong = [], {}, {}
    for name, result in results.items():
        if result["code"] == 0 or (name in NOBODY and result["code"] == 5):
            works.append(name)
        elif result["code"] == 2 and (found := SENTENCE.search(result["err"])) and "Traceback" not in result["err"]:
            says[name] = found[0].rpartition("; ")[2].strip()
        else:
            wrong[name] = {"code": result["code"], "err": result["err"][-500:]}
    return {"works": len(works), "says": says, "wrong": wrong}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| Python | extras | torch | MB | install, s | work | say what to install | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["python"], row["extras"], row.get("torch", ""), row.get("megabytes", ""), row.get("install_s", "")]
        cells += ["not installed", "", ""] if "failed" in row else [row["works"], len(row["says"]), len(row["wrong"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def store(rows: list[dict[str, Any]]) -> None:
    """Write the stored result, sorted, in the form that `tools/figures.py` reads."""
    from bench.common import results

    names = [name or "none" for name in SETS]
    rows.sort(key=lambda one: ([int(part) for part in one["python"].split(".")], names.index(one["extras"])))
    bare = [row for row in rows if row["extras"] == "none" and "megabytes" in row]
    small = [row["megabytes"] for row in bare if "+cpu" in row["torch"]]
    large = [row["megabytes"] for row in bare if "+cpu" not in row["torch"]]
    result = {
        "script": "tools/clean_envs.py",
        "command": "python tools/clean_envs.py --work FOLDER",
        "measured": results.where(),
        "figures": {
            "scenarios": max(row.get("works", 0) + len(row.get("says", ())) for row in rows),
            **({"cpu_gb": round(min(small) / 1000, 1)} if small else {}),
            **({"cuda_gb": round(min(large) / 1000, 1)} if large else {}),
        },
        "tables": {"main": results.parsed(table(rows))},
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append")
    parser.add_argument("--extra", action="append", choices=[name or "none" for name in SETS])
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    wheel = asked.wheel or build(asked.work)
    inputs = asked.work / "inputs"
    if not inputs.exists():
        inputs.mkdir()
        subprocess.run(
            [sys.executable, ROOT / "tests/without.py", "prepare", inputs],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    stored: list[dict[str, Any]] = []
    wanted = [name for name in SETS if not asked.extra or (name or "none") in asked.extra]
    with a_store(inputs, asked.work) as around:
        for python, extras in product(asked.python or pythons(), wanted):
            row = try_one(python, extras, wheel, inputs, asked.work, around)
            print(json.dumps(row), flush=True)
            # Read anew: another Python may be tried beside this one, as in a container that has it.
            stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
            stored = [one for one in stored if (one["python"], one["extras"]) != (row["python"], row["extras"])] + [row]
            store(stored)
    shutil.rmtree(asked.work / "env", ignore_errors=True)
    print(table(stored))
    return 1 if any(row.get("failed") or row.get("wrong") for row in stored) else 0


if __name__ == "__main__":
    sys.exit(main())
