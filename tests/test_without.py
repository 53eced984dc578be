"""Every verb with each package taken away: it works, or one sentence says what to install, with exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import without

from adapterkit.packages import CORE, EXTRAS

ROOT = Path(__file__).parents[1]
ANSWERS = {"imatrix", "verify --level model", "demo"}
SIGNS = {"sign", "verify-signature"}
DECODES = {"merge of a Q8_0 base", "convert to hf", "verify a GGUF"}

# What each optional package is needed for. The last three are packages that those of an extra need themselves.
NEEDED: dict[str, set[str]] = {
    "gguf": DECODES,
    "jinja2": {"demo"},
    "numba": set(),
    "transformers": ANSWERS,
    "peft": {"demo"},
    "xllamacpp": {"merge to IQ3_S"},
    "bitsandbytes": set(),
    "model_signing": SIGNS,
    "OpenSSL": {"sign"},
    "llmcompressor": {"convert to awq"},
    "tokenizers": ANSWERS,
    "cryptography": SIGNS,
    "accelerate": set(),
    "lm_eval": {"evaluate"},
    "azure": {"inspect of Azure's store"},
    "boto3": {"inspect of a store"},
    # protobuf lies in this namespace too, and model-signing imports it
    "google": {"inspect of Google's store", "sign"},
    "hf_xet": {"inspect of a Hub bucket"},
    "obstore": {"inspect of a store"},
    "ray": {"run on Ray"},
    "mlflow": set(),  # integrations in Python, which no verb imports; their own tests hide them
    "wandb": set(),
}
READS = {
    *("inspect", "inspect of a GGUF", "check", "merge --dry-run", "merge --save-plan", "convert to awq"),
    *("register", "list", "show", "lineage", "tag", "untag", "export", "import", "fsck", "serve-args", "remove", "gc"),
    *("attest", "sign", "verify-signature", "ui"),
}
WITHOUT_CORE: dict[str, set[str]] = {
    "torch": READS,
    "numpy": READS,
    "huggingface_hub": READS,
    "yaml": READS,
    "regex": READS,
    "xxhash": READS - {"merge --save-plan"},  # a plan knows a local adapter by all its bytes
}
# Nobody answers at the Hub of the scenarios, and llm-compressor is in no environment of the tests.
ELSEWHERE = {"push": 5, "pull": 5, "convert to awq": 2}
SENTENCE = re.compile(r"^error: .*; (uv )?pip install '?[\w-]+", re.MULTILINE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "inputs"
    folder.mkdir()
    without.prepare(folder)
    return folder


def told(folder: Path, names: dict[str, list[str]], preload: list[str]) -> dict[str, Any]:
    """Results by package and scenario."""
    asked = json.dumps({"folder": str(folder), "names": names, "preload": preload})
    around = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, without.__file__, asked], capture_output=True, text=True, timeout=900, env=around
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def is_sentence(result: dict[str, Any], package: str) -> bool:
    lines = [line for line in result["err"].splitlines() if line.startswith("error: ")]
    said = lines[0] if len(lines) == 1 else ""
    return result["code"] == 2 and SENTENCE.search(said) is not None and "Traceback" not in result["err"]


def wrong(package: str, results: dict[str, Any], refused: set[str]) -> dict[str, Any]:
    """Scenarios that ended otherwise than they should."""
    found = {}
    for name, result in results.items():
        if name in refused:
            right = is_sentence(result, package) if name not in ELSEWHERE else result["code"] in (2, 5)
        else:
            right = result["code"] == ELSEWHERE.get(name, 0)
        if not right:
            found[name] = result
    return found


def test_without_each_optional_package(inputs: Path) -> None:
    """What needs the package says so at once; a merge needs none of them."""
    asked = {package: ["merge", "merge --save-plan", *sorted(needed)] for package, needed in NEEDED.items()}
    for package in ("transformers", "tokenizers", "accelerate"):
        asked[package].append("verify")  # with them it takes seconds to build a model
    found = told(inputs, asked, ["torch", "adapterkit.verbs.merge", "adapterkit.verbs.verify"])
    assert {package: bad for package, one in found.items() if (bad := wrong(package, one, NEEDED[package]))} == {}


def test_without_torch_headers_are_still_read(inputs: Path) -> None:
    found = told(inputs, {"torch": ["inspect", "check", "merge --dry-run", "list", "merge", "doctor"]}, [])["torch"]
    assert {name: result["code"] for name, result in found.items()} == {
        **dict.fromkeys(["inspect", "check", "merge --dry-run", "list"], 0),
        "merge": 2,
        "doctor": 3,
    }
    assert "error: torch, which adapterkit always needs, is not installed; pip install torch" in found["merge"]["err"]
    assert "torch is not installed: pip install torch" in found["doctor"]["err"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_verb_without_each_package(inputs: Path) -> None:
    # Where accelerate is missing, PEFT is too: it cannot be installed without it.
    names = {key: list(without.SCENARIOS) for key in NEEDED if key != "accelerate"}
    everything = told(inputs, names, ["torch"])
    assert {
        package: bad for package, found in everything.items() if (bad := wrong(package, found, NEEDED[package]))
    } == {}
    names = {key: list(without.SCENARIOS) for key in WITHOUT_CORE}
    names["xxhash"].remove("execute")  # there is no plan to execute
    core = told(inputs, names, [])
    for package, found in core.items():
        for name, result in found.items():
            if name in WITHOUT_CORE[package]:
                assert result["code"] == ELSEWHERE.get(name, 0), (package, name, result)
            elif result["code"] not in (0, ELSEWHERE.get(name, 0)):
                assert name == "doctor" or is_sentence(result, package), (package, name, result)


def test_every_package_of_the_tables_is_tried() -> None:
    assert {one.module for extra in EXTRAS for one in extra.packages} <= set(NEEDED)
    assert {one.module for one in CORE} - {"click", "tomli"} == set(WITHOUT_CORE)
