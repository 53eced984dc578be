"""What adapterkit takes from other packages: what it always needs, what each extra adds, and the sentence when one is missing.

`pyproject.toml` says the same to installers; ``tests/test_packages.py`` holds the two together.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from adapterkit.errors import MissingPackage

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes the builds without CUDA; PyPI has the one with CUDA for Linux."""


@dataclass(frozen=True)
class Package:
    """A package from elsewhere.

    Attributes:
        name: as installers know it.
        module: as Python imports it.
        least: the oldest version that works.
    """

    name: str
    module: str
    least: str

    def installed(self) -> str:
        """Its version; empty where it is not installed."""
        from importlib.metadata import PackageNotFoundError, version  # here, as it takes 10 ms to import

        try:
            return version(self.name) if find_spec(self.module) is not None else ""
        except (PackageNotFoundError, ValueError):
            return ""

    def is_recent(self, found: str) -> bool:
        """Whether a version is recent enough."""
        return _numbers(found) >= _numbers(self.least)


@dataclass(frozen=True)
class Extra:
    """Packages that are installed together by ``adapterkit[name]``, and what they add."""

    name: str
    packages: tuple[Package, ...]
    adds: str


CORE = (
    Package("click", "click", "8.2"),
    Package("huggingface-hub", "huggingface_hub", "1.0"),
    Package("numpy", "numpy", "1.26"),
    Package("pyyaml", "yaml", "6"),
    Package("regex", "regex", "2024.4.16"),
    *([Package("tomli", "tomli", "2")] if sys.version_info < (3, 11) else []),
    Package("torch", "torch", "2.6"),
    Package("xxhash", "xxhash", "3.4"),
)

EXTRAS = (
    Extra(
        "gguf",
        (Package("gguf", "gguf", "0.19"), Package("jinja2", "jinja2", "3.1"), Package("numba", "numba", "0.60")),
        "quantized GGUF files as a base, GGUF encoders at full speed, chat templates tried before they are written",
    ),
    Extra(
        "demo",
        (
            Package("peft", "peft", "0.18"),
            Package("tokenizers", "tokenizers", "0.20"),
            Package("transformers", "transformers", "4.57"),
        ),
        "the demo, imatrix, verify by the answers of models",
    ),
    Extra(
        "eval",
        (Package("accelerate", "accelerate", "1.0"), Package("lm-eval", "lm_eval", "0.4.9")),
        "evaluate: tasks of lm-evaluation-harness, run on a merged model or on an adapter",
    ),
    Extra(
        "stores",
        (
            Package("azure-storage-blob", "azure", "12.20"),
            Package("boto3", "boto3", "1.35"),
            Package("google-auth", "google", "2.30"),
            Package("hf-xet", "hf_xet", "1.8"),
            Package("obstore", "obstore", "0.8"),
        ),
        "models and outputs in S3 and other object stores",
    ),
    Extra("ray", (Package("ray", "ray", "2.40"),), "parts of a plan on the workers of Ray"),
    Extra("iq", (Package("xllamacpp", "xllamacpp", "2025.1"),), "the IQ types of GGUF; GGUF files that answer"),
    Extra("bnb", (Package("bitsandbytes", "bitsandbytes", "0.45"),), "NF4 bases decoded faster"),
    Extra(
        "sign",
        (Package("model-signing", "model_signing", "1.1"), Package("pyopenssl", "OpenSSL", "24")),
        "sign and verify-signature",
    ),
    Extra(
        "llmcompressor",
        (Package("llmcompressor", "llmcompressor", "0.14"),),
        "convert to awq and gptq; its own bounds are narrow, so it may need an environment of its own",
    ),
    Extra(
        "mlflow",
        (Package("mlflow", "mlflow", "3"),),
        "versions logged to MLflow, registered there, and imported from it",
    ),
    Extra(
        "wandb",
        (Package("wandb", "wandb", "0.19"),),
        "versions logged to W&B as artifacts, and imported from it",
    ),
)


def installer() -> str:
    """The command that installs into this environment: pip, or uv where the environment has no pip."""
    from importlib.metadata import distributions  # slow to import

    # By its metadata: asking the import system for pip makes setuptools take its hands off distutils, and says so.
    return "pip install" if any(True for _ in distributions(name="pip")) else "uv pip install"


def command(extra: str) -> str:
    """The one command that adds an extra."""
    return f"{installer()} 'adapterkit[{extra}]'"


def cpu_torch() -> str:
    """The command that puts the build of torch without CUDA in the place of the one that is there."""
    return f"{installer()} --force-reinstall torch --index-url {CPU_INDEX}"


def missing(module: str, what: str, extra: str = "") -> MissingPackage:
    """The one sentence about a package that is not installed.

    Args:
        module: as Python imports it; a module inside of it will do.
        what: what needs it, as the beginning of a sentence: ``imatrix runs the model in transformers``.
        extra: which extra brings it, where the package is none of the tables (a package that one of theirs needs).
    """
    top = module.partition(".")[0]
    named = next((row.name for row in EXTRAS if any(one.module == top for one in row.packages)), extra)
    if named:
        return MissingPackage(f"{what}, and {top} is not installed", command(named))
    known = next((one.name for one in CORE if one.module == top), "")
    if known:
        return MissingPackage(f"{known}, which adapterkit always needs, is not installed", f"{installer()} {known}")
    return MissingPackage(f"{what}, and {top} is not installed", f"{installer()} {top}")


def lacking(error: BaseException) -> MissingPackage | None:
    """The sentence for an error that a missing package of the tables ended in; None for any other error."""
    if isinstance(error, ModuleNotFoundError) and is_ours(error.name):
        return missing(error.name or "", "what was asked for needs another package")
    if isinstance(error, RuntimeError) and str(error) == "Numpy is not available":  # so torch says it
        return missing("numpy", "")
    return None


def need(*modules: str, what: str, extra: str = "", tried: bool = True) -> None:
    """Look for packages and import them, each by itself: a library that imports its parts late blames another one.

    Args:
        what, extra: as in `missing`.
        tried: import them; without it they are only looked for, as they will be imported by another process.

    Raises:
        MissingPackage: one is not installed.
    """
    for module in modules:
        if find_spec(module) is None:
            raise missing(module, what, extra)
        if tried:
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                raise missing(error.name or module, what, extra) from error


def is_ours(module: str | None) -> bool:
    """Whether a module belongs to a package of the tables above."""
    top = (module or "").partition(".")[0]
    return any(one.module == top for one in (*CORE, *(one for extra in EXTRAS for one in extra.packages)))


def _numbers(text: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0)"""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
