"""Every verb, run as if a package were not installed: ``python without.py '{"folder": ..., "names": {PACKAGE: [...]}}'``.

A child process of ``test_without.py`` and of ``tools/clean_envs.py``. The package is hidden from imports, from ``find_spec``
and from the metadata of distributions, in this process and, by a ``sitecustomize``, in those that it starts. The last line of
stdout is JSON: per scenario the exit code, and what stood on stderr.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

PLACES = {
    "PyYAML": "yaml",
    "huggingface-hub": "huggingface_hub",
    "model-signing": "model_signing",
    "pyOpenSSL": "OpenSSL",
}


class Hidden(PathFinder):
    """Finds everything but one package."""

    name = ""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname.partition(".")[0] == cls.name else PathFinder.find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context: Any = None) -> Any:
        asked = getattr(context, "name", None)
        if asked is not None and asked.lower().replace("-", "_") in (cls.name.lower(), *_named(cls.name)):
            return iter(())
        return PathFinder.find_distributions(context) if context is not None else PathFinder.find_distributions()


def _named(module: str) -> list[str]:
    return [name.lower().replace("-", "_") for name, one in PLACES.items() if one == module]


def hide(name: str) -> None:
    """Take a package away from this process."""
    Hidden.name = name
    sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]


# What each is about, and the command line. Words in capitals are files of the folder.
SCENARIOS: dict[str, str] = {
    "inspect": "inspect my-adapter --base base",
    "inspect --health": "inspect my-adapter --health",
    "inspect --compare": "inspect math code --compare --html heat.html",
    "inspect of a GGUF": "inspect model-F16.gguf",
    "check": "check base my-adapter --for vllm",
    "merge --dry-run": "merge base my-adapter -o planned --dry-run",
    "merge --save-plan": "merge base my-adapter -o executed --save-plan plan.json",
    "execute": "execute plan.json -o executed",
    "merge": "merge base my-adapter -o merged",
    "merge --fidelity": "merge base my-adapter -o merged-f --fidelity",
    "merge by ties": "merge base math code -o both --method ties --density 0.5",
    "merge --as-trained": "merge base my-adapter -o trained --as-trained nf4",
    "merge of an NF4 base": "merge base-nf4 my-adapter -o from-nf4",
    "merge, kept NF4": "merge base-nf4 my-adapter -o kept-nf4 --quant keep --yes-lossy",
    "merge to Q8_0": "merge base my-adapter -o merged-Q8_0.gguf --quant Q8_0",
    "merge to Q4_K_M": "merge base my-adapter -o merged-Q4_K_M.gguf --quant Q4_K_M",
    "merge to IQ3_S": "merge base my-adapter -o merged-IQ3_S.gguf --quant IQ3_S --yes-lossy",
    "merge of a GGUF base": "merge model-F16.gguf my-adapter -o gguf-F16.gguf",
    "merge of a Q8_0 base": "merge model-Q8_0.gguf my-adapter -o gguf-Q8_0.gguf --quant Q8_0 --yes-lossy",
    "combine": "combine math code -o combined --method ties --density 0.5 --rank 8",
    "extract": "extract base finetune -o extracted --rank 8",
    "resize": "resize my-adapter -o resized --rank 4",
    "convert to gguf": "convert base -o converted-F16.gguf",
    "convert to hf": "convert model-Q8_0.gguf -o back --to hf",
    "convert to gguf-lora": "convert my-adapter -o lora.gguf --to gguf-lora --base base",
    "convert to nf4": "convert base -o as-nf4 --to nf4",
    "convert to fp8": "convert base -o as-fp8 --to fp8",
    "convert to awq": "convert base -o as-awq --to awq --calibration calibration.txt",
    "imatrix": "imatrix base --text calibration.txt -o measured.gguf --chunk 16",
    "verify": "verify finetune --base base --adapter math",
    "verify a GGUF": "verify model-Q8_0.gguf --base base --adapter math",
    "verify --level layers": "verify finetune --base base --adapter math --level layers",
    "verify --level model": "verify finetune --base base --adapter math --level model --prompts prompts.txt",
    "register": "register my-adapter --name mine --base base",
    "list": "list",
    "show": "show mine",
    "lineage": "lineage mine",
    "tag": "tag mine prod",
    "untag": "untag mine prod",
    "export": "export mine -o bundle.tar",
    "import": "import bundle.tar",
    "fsck": "fsck",
    "serve-args": "serve-args mine --for vllm --base base",
    "push": "push mine my-org/mine",
    "pull": "pull my-org/my-adapter",
    "remove": "remove mine@1",
    "gc": "gc",
    "build": "build recipe.toml",
    "attest": "attest finetune",
    "sign": "sign finetune --key private.pem",
    "verify-signature": "verify-signature signed --key public.pem",
    "ui": "ui --port 0",
    "doctor": "doctor",
    "demo": "demo demo",
}


# What only a run without its package can show here: else they would need a network.
REFUSED = {
    "evaluate": "evaluate my-adapter --base base --tasks arc_easy",
    "inspect of a store": "inspect s3://bucket/model",
    "inspect of Google's store": "inspect gs://bucket/model",
    "inspect of Azure's store": "inspect az://container/model",
    "inspect of a Hub bucket": "inspect hf://buckets/org/models/base",
    "run on Ray": "run plan.json -o by-ray --on ray",
}
# What else the extras add. Clean environments try it; `bucket` is one of a server that `tools/clean_envs.py` starts.
ADDED = {
    "merge out of a store": "merge s3://bucket/base my-adapter -o from-store",
    "merge into a store": "merge base my-adapter -o s3://bucket/merged --force",
    "evaluate a task": "evaluate my-adapter --base base --tasks colours --include-path tasks",
    "log to MLflow": "python mlflow",
    "log to W&B": "python wandb",
}
COLOURS = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: ROWS
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def prepare(folder: Path) -> None:
    """The files that the scenarios name; needs every package."""
    import importlib.util

    from adapterkit.provenance.signing import sign
    from adapterkit.verbs.convert import convert
    from adapterkit.verbs.merge import merge

    spec = importlib.util.spec_from_file_location(
        "make_inputs", Path(__file__).parents[1] / "examples/recipe/make_inputs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.write_base(folder / "base")
    for seed, (name, module) in enumerate({"my-adapter": "v_proj", "math": "q_proj", "code": "q_proj"}.items()):
        make.write_adapter(folder / name, [module], seed)
        config = folder / name / "adapter_config.json"
        config.write_text(config.read_text().replace("example/tiny-llama", "my-org/base"))
    merge(folder / "base", [folder / "math"], folder / "finetune")
    convert(folder / "base", folder / "model-F16.gguf", dtype="f16")
    merge(folder / "base", [folder / "math"], folder / "model-Q8_0.gguf", quant="Q8_0")
    convert(folder / "base", folder / "base-nf4", to="nf4")
    (folder / "calibration.txt").write_text("the sky is blue and the sea is calm\n" * 40)
    (folder / "prompts.txt").write_text("the sky is\n")
    (folder / "tasks").mkdir()
    (folder / "tasks/colours.yaml").write_text(COLOURS.replace("ROWS", str(folder / "tasks/rows.jsonl")))
    row = {"prompt": "the sky is", "choices": [" blue", " red"], "label": 0}
    (folder / "tasks/rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (folder / "recipe.toml").write_text(
        'base = "base"\nadapters.mine = "my-adapter"\noutputs.built = {path = "built"}\n'
    )
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "private.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (folder / "public.pem").write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    shutil.copytree(folder / "math", folder / "signed")
    sign(folder / "signed", folder / "private.pem")


def log_to(tracker: str) -> None:
    """Register an adapter and log it, by Python, as there is no verb for it."""
    from importlib import import_module

    from adapterkit.errors import AdapterkitError
    from adapterkit.provenance.register import register

    os.environ |= {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    try:
        register(Path("my-adapter"), f"for-{tracker}", base=Path("base"))
        import_module(f"adapterkit.integrations.{tracker}").log_version(f"for-{tracker}")
    except AdapterkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(words: list[str], within: float | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call; an interrupt ``within`` seconds ends what would run for ever."""
    from adapterkit.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    if within is not None:
        signal.setitimer(signal.ITIMER_REAL, within)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if words[0] == "python":
                log_to(words[1])
            else:
                main(words)
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:  # whatever comes through is what the test is about
        code = 99
        err.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        gc.unfreeze()
    return int(code or 0), out.getvalue(), err.getvalue()  # type: ignore[call-overload]


def run_all(folder: Path, names: list[str]) -> dict[str, Any]:
    """Run scenarios in a folder, in order."""
    os.chdir(folder)
    os.environ["ADAPTERKIT_HOME"] = str(folder / "home")
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there: exit code 5 is the right one
    found = {}
    for name in names:
        began = time.time()
        code, out, err = run((SCENARIOS | REFUSED | ADDED)[name].split(), 2.0 if name == "ui" else None)
        found[name] = {"code": code, "err": err[-3000:], "out": out[-3000:], "seconds": round(time.time() - began, 2)}
    return found


def children_too(name: str, folder: Path) -> None:
    """Hide the package from Python processes that this one starts."""
    place = folder / "hidden"
    place.mkdir(exist_ok=True)
    shutil.copy(__file__, place / "without.py")
    (place / "sitecustomize.py").write_text(f"import without\nwithout.hide({name!r})\n")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])


def apart(folder: Path, package: str, names: list[str]) -> dict[str, Any]:
    """Run scenarios without a package, in a copy of the folder and a child of this process."""
    place = folder.with_name(f"{folder.name}-{package or 'all'}")
    shutil.copytree(folder, place)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        found: dict[str, Any] = json.loads((place / "told.json").read_text())
        shutil.rmtree(place)
        return found
    try:
        if package:
            hide(package)
            children_too(package, place)
        (place / "told.json").write_text(json.dumps(run_all(place, names)))
    finally:
        os._exit(0)


def main(folder: Path, names: dict[str, list[str]], preload: list[str]) -> dict[str, Any]:
    """Results by package, of the scenarios named for each; ``preload`` is imported once, before the children."""
    for name in preload:
        __import__(name)
    if "torch" in preload:
        sys.modules["torch"].set_num_threads(1)
    return {package: apart(folder, package, mine) for package, mine in names.items()}


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        asked = json.loads(sys.argv[1])
        print(json.dumps(main(Path(asked["folder"]), asked["names"], asked.get("preload", []))))
