"""Words that people bring from other tools: which verb, option or value here does the same."""

from __future__ import annotations

import click

# Verbs of PEFT, mergekit, llama.cpp, unsloth and of other command lines.
VERBS: dict[str, tuple[str, ...]] = {
    "merge": (
        "merge-and-unload",
        "fuse",
        "fold",
        "bake",
        "apply",
        "export-lora",
        "mergekit-yaml",
        "save-pretrained-merged",
    ),
    "convert": (
        "quantize",
        "quantise",
        "gguf",
        "to-gguf",
        "save-pretrained-gguf",
        "llama-quantize",
        "convert-hf-to-gguf",
    ),
    "combine": ("add-weighted-adapter", "mix", "blend", "stack", "ties", "dare"),
    "extract": ("extract-lora", "mergekit-extract-lora", "unmerge"),
    "inspect": ("info", "print", "describe", "view", "cat", "stat", "print-trainable-parameters"),
    "check": ("validate", "lint", "compatible"),
    "verify": ("test", "compare"),
    "push": ("upload", "publish", "push-to-hub"),
    "pull": ("download", "fetch", "from-pretrained"),
    "register": ("add", "save", "save-pretrained", "commit"),
    "list": ("ls", "versions"),
    "show": ("log", "history"),
    "remove": ("rm", "delete", "del"),
    "serve-args": ("serve", "vllm", "ollama", "modelfile"),
    "evaluate": ("eval", "lm-eval", "benchmark"),
    "doctor": ("env", "status", "config", "diagnose"),
    "resize": ("rank", "svd", "prune", "truncate"),
    "imatrix": ("llama-imatrix",),
    "build": ("make",),
    "tag": ("alias", "promote", "release"),
}

# Options, by the flags here that do the same; those of them that the verb at hand has are named.
OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("-o", "--out"): (
        "output",
        "out-dir",
        "output-dir",
        "outdir",
        "output-path",
        "out-path",
        "outfile",
        "output-file",
        "save-path",
        "save-dir",
        "save-directory",
        "out-file",
        "dst",
        "to-path",
        "merged-model",
    ),
    ("--quant", "--to"): (
        "quantization",
        "quantize",
        "quantization-method",
        "quant-type",
        "qtype",
        "ftype",
        "save-method",
        "bits",
        "q",
    ),
    ("--dtype",): ("torch-dtype", "precision", "out-dtype"),
    ("--quant", "--dtype"): ("outtype", "output-dtype"),
    ("--weight",): ("weights", "scale", "scaling", "lora-scale", "lora-scaled"),
    ("--method",): ("merge-method", "combination-type"),
    ("--rank",): ("r", "svd-rank", "max-rank", "lora-rank", "rank-r"),
    ("--force",): ("overwrite", "f"),
    ("--dry-run",): ("plan", "noop", "n"),
    ("--max-shard-size",): ("shard-size", "out-shard-size", "split-max-size"),
    ("--text",): ("file", "calibration-file", "calibration-data"),
    ("--jobs",): ("threads", "num-threads", "workers", "j", "t"),
    ("--base16",): ("base-model-16bit",),
}
BASE = (
    "base",
    "base-model",
    "model",
    "model-name",
    "model-id",
    "model-name-or-path",
    "base-model-name-or-path",
    "m",
    "model-path",
    "base-model-path",
)
ADAPTERS = (
    "adapter",
    "adapters",
    "lora",
    "loras",
    "peft-model",
    "peft",
    "lora-path",
    "adapter-path",
    "lora-model",
    "adapter-name",
    "peft-model-id",
    "lora-weights",
)


def command_for(word: str) -> str:
    """The command that does what a verb of another tool does, or tells about it; empty where none is known."""
    if word in ("help", "version"):
        return f"adapterkit --{word}"
    verb = _of(word.lower().replace("_", "-"), VERBS)
    return f"adapterkit {verb} --help" if verb else ""


def option_for(command: click.Command, name: str) -> str:
    """What to say of an option that other tools have: a sentence; empty where nothing is known of it."""
    word = name.lstrip("-").replace("_", "-").lower()
    flags = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("-")}
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    for ours, theirs in OPTIONS.items():
        found = [flag for flag in ours if flag in flags]
        if word in theirs and found:
            return f"Here it is {' or '.join(found)}."
    for words, names in ((BASE, ("base", "model", "src")), (ADAPTERS, ("adapters", "adapter"))):
        if word in words and any(one.name in names for one in arguments):
            shown = " ".join(one.make_metavar(click.Context(command)) for one in arguments)
            return f"It is given without an option: adapterkit {command.name} {shown}"
    return ""


def _of(word: str, table: dict[str, tuple[str, ...]]) -> str:
    return next((ours for ours, theirs in table.items() if word in theirs), "")
