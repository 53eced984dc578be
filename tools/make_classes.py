"""Write ``adapterkit/adapters/classes.json``: what a ``config.json`` has to say about weights, by model type and class.

The facts come from the installed ``transformers`` (Apache-2.0), and where it is asked for from a second installation with
version 4 (``--older PYTHON``), for what a folder means differs between the two:

* tasks: task type (as PEFT names it, or the auto class's own) -> model type -> class, from the auto classes;
* heads: what each of these classes has beside its base model (a name that ends with a dot is a whole module), which modules of
  its base model another base model of the type may be without (``inner``), and which dimensions count labels or tokens, from
  models on the meta device built with two numbers of labels and two vocabularies;
* flags: config keys other than ``tie_word_embeddings`` that decide whether embeddings are tied, from the config classes;
* untie: what else a class does with that flag. Every class that ties is built twice with the same numbers, tied and not,
  and run: the factor between both outputs, what stays tied although the flag is off, and tied parameters that have
  another shape then (``resized``);
* embedding_classes, embeddings: what embeddings do besides a lookup, and where they stand; see `embedding_kinds`.

Run it after a new release of transformers:

    python tools/make_classes.py [--older PYTHON] [--check]
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "adapterkit" / "adapters" / "classes.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

# Task types of PEFT's, then tasks for which an adapter says its class itself; each with transformers' table of classes.
TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "multiple-choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio-classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "audio-frame-classification": "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    "audio-xvector": "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "video-classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "semantic-segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "universal-segmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "object-detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "depth-estimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "document-question-answering": "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES",
    "visual-question-answering": "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES",
    "table-question-answering": "MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING_NAMES",
}
FLAG = "tie_word_embeddings"
POOLER = {"pooler."}  # a base model may be saved without one (``add_pooling_layer=False``) even if all classes have it
MOST = 20_000_000  # parameters of a model that is run


def quiet() -> None:
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)


def older_fields() -> None:
    """Let the zoo read the config classes of version 4, which are no dataclasses."""
    import dataclasses
    import inspect

    from bench.common import zoo

    newer = zoo.fields

    def fields(config_class: Any) -> dict[str, Any]:
        if dataclasses.is_dataclass(config_class):
            return newer(config_class)
        given = inspect.signature(config_class.__init__).parameters.values()
        return {one.name: one.default for one in given if one.default is not one.empty}

    zoo.fields = fields


def tasks() -> dict[str, dict[str, str]]:
    """task -> model type -> the class that its auto class makes (the first, where it names several)."""
    from transformers.models.auto import modeling_auto as auto

    return {
        task: {kind: name if isinstance(name, str) else name[0] for kind, name in getattr(auto, table).items()}
        for task, table in TASKS.items()
        if hasattr(auto, table)
    }


def tiny(cls: Any, **changes: Any) -> Any:
    """A tiny model of ``cls`` on the current device, `changes` in its config."""
    from bench.common import zoo

    try:
        return zoo.make(cls, **changes)
    except Exception:
        config = cls.config_class(**changes)
        if "meta" not in str(__import__("torch").get_default_device()):
            raise
        return cls(config)


def shapes(cls: Any, **changes: Any) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        model = tiny(cls, **changes)
    return {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}


def counted(cls: Any, key: str, one: int, two: int) -> list[list[Any]]:
    """``[parameter, dimension, factor, offset]`` of each dimension that is factor * (the number called ``key``) + offset."""
    try:
        first, second = shapes(cls, **{key: one}), shapes(cls, **{key: two})
    except Exception:
        return []
    found = []
    for name, shape in first.items():
        other = second.get(name, shape)
        for dim, (a, b) in enumerate(zip(shape, other, strict=False)):
            if a != b and not (b - a) % (two - one):
                factor = (b - a) // (two - one)
                found.append([name, dim, factor, a - factor * one])
    return found


def bare(cls: Any) -> set[str]:
    """The parameters of the bare model of a class's family; none where there is no such class, or it is this one."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    name = auto.MODEL_MAPPING_NAMES.get(cls.config_class.model_type)
    other = getattr(transformers, name if isinstance(name, str) else name[0], None) if name else None
    if other is None or other is cls:
        return set()
    try:
        return set(shapes(other))
    except Exception:
        return set()


def embedded(cls: Any) -> set[str]:
    """The weights of a class that are looked up."""
    import torch

    with torch.device("meta"):
        model = tiny(cls)
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}


def holds(own: list[str], parameter: str) -> bool:
    """Whether a parameter is one of these, or of a module that is named with a dot behind."""
    return parameter in own or any(one.endswith(".") and parameter.startswith(one) for one in own)


def heads(names: set[str]) -> dict[str, dict[str, Any]]:
    """Class -> its own parameters and what in them counts labels or tokens."""
    import transformers

    found: dict[str, dict[str, Any]] = {}
    held: dict[str, dict[str, set[str]]] = {}
    for name in sorted(names):
        cls = getattr(transformers, name, None)
        if cls is None:
            continue
        try:
            every = shapes(cls)
        except Exception as error:
            print(f"make_classes: {name} not built ({type(error).__name__}: {str(error)[:80]})", file=sys.stderr)
            continue
        prefix = cls.base_model_prefix
        own = sorted(key for key in every if not prefix or not key.startswith(prefix + "."))
        if len(own) in (0, len(every)):  # its base model stands beside the head, or the head inside of the base model
            inside = bare(cls)
            prefix = prefix if not own else ""
            own = sorted(key for key in every if inside and not {key, key.removeprefix(f"{prefix}.")} & inside)
            if 2 * len(own) > len(every):  # the bare model is another one
                own = []
        if len(own) > 40:
            own = sorted({key.partition(".")[0] + "." for key in own})
        row: dict[str, Any] = {"type": cls.config_class.model_type, "prefix": prefix}
        row["own"] = own
        row["labels"] = list(counted(cls, "num_labels", 5, 7))
        tokens = [one for one in counted(cls, "vocab_size", 97, 101) if one[3] >= 0]
        lookups = embedded(cls) if tokens and not own else set()
        row["tokens"] = [one for one in tokens if (one[0] not in lookups if not own else holds(own, one[0]))]
        found[name] = {key: value for key, value in row.items() if value}
        if prefix:
            held.setdefault(row["type"], {})[name] = inside_of(every, prefix)
    for several in held.values():
        always = set.intersection(*several.values())
        for name, modules in several.items():
            inner = modules - always | modules & POOLER
            if inner and "labels" in found[name]:
                found[name]["inner"] = sorted(inner)
    return found


def inside_of(every: Iterable[str], prefix: str) -> set[str]:
    """The modules of a base model, each with a dot behind."""
    rest = [key.removeprefix(f"{prefix}.") for key in every if key.startswith(f"{prefix}.")]
    return {one.partition(".")[0] + "." for one in rest if "." in one} - {"shared."}  # tied to what the others look up


def flags() -> dict[str, list[str]]:
    """Model type -> other config keys that decide the tie, from the source of the config classes."""
    import transformers.models

    found: dict[str, list[str]] = {}
    for file in sorted(Path(transformers.models.__file__).parent.glob("*/configuration_*.py")):
        text = file.read_text(encoding="utf-8")
        if not re.search(r'pop\("tie_(?!word_embeddings")\w+"|= self\.tie_(?!word)\w+', text):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for cls in vars(module).values():
            kind = getattr(cls, "model_type", None)
            if not isinstance(cls, type) or not kind or cls.__module__ != module.__name__:
                continue
            import inspect

            keys = set(re.findall(r'"(tie_\w+)"|self\.(tie_\w+)', inspect.getsource(cls)))
            names = sorted({one or other for one, other in keys} - {FLAG})
            if names:
                found[kind] = names
    return found


def tying(only: str = "") -> list[Any]:
    """Classes that declare tied weights, and whose name matches."""
    from make_names import model_classes

    classes = [cls for cls in model_classes().values() if re.search(only, cls.__name__)]
    return [cls for cls in classes if getattr(cls, "_tied_weights_keys", None)]


def places(model: Any) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter.data_ptr(), []).append(name)
    return found


def randomised(model: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.05, generator=generator)
    return model.float().eval()


def inner(cls: Any) -> dict[str, Any]:
    """The flag off in every config inside that of ``cls``."""
    return {key: {FLAG: False} for key in getattr(cls.config_class, "sub_configs", None) or ()}


def logits(model: Any) -> Any:
    """What a model answers to some tokens; None where it wants more than tokens."""
    import torch

    ids = torch.arange(4, 14)[None] % 90
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "decoder_input_ids": ids[:, :6]}):
        try:
            with torch.no_grad():
                out = model(**inputs)
        except Exception:
            continue
        for key in ("logits", "prediction_logits", "start_logits", "rel_logits"):
            if getattr(out, key, None) is not None:
                return getattr(out, key)
    return None


def probe(only: str = "") -> dict[str, dict[str, Any]]:
    """Class -> what else happens where the flag is off: ``scale`` (a field's power), ``stays`` tied, ``run`` or not."""
    import torch
    import transformers

    found: dict[str, dict[str, Any]] = {}
    for cls in tying(only):
        name = cls.__name__
        if not hasattr(transformers, name):
            continue
        try:
            if sum(math.prod(shape) for shape in shapes(cls).values()) > MOST:
                print(f"make_classes: {name} is not tiny and was not run", file=sys.stderr)
                continue
            torch.manual_seed(0)
            tied = randomised(tiny(cls, **{FLAG: True}))
            torch.manual_seed(0)
            apart = tiny(cls, **{FLAG: False}, **inner(cls)).float().eval()
        except Exception as error:
            print(f"make_classes: {name} not built ({type(error).__name__}: {str(error)[:80]})", file=sys.stderr)
            continue
        row: dict[str, Any] = {"type": cls.config_class.model_type}
        shared = {n for names in places(tied).values() if len(names) > 1 for n in names}
        still = sorted(n for names in places(apart).values() if len(names) > 1 for n in names if n in shared)
        if still:
            row["stays"] = still
        sizes = {n: tuple(p.shape) for n, p in tied.named_parameters(remove_duplicate=False) if n in shared}
        own = {n: tuple(p.shape) for n, p in apart.named_parameters(remove_duplicate=False)}
        resized = sorted(n for n, size in sizes.items() if own.get(n, size) != size)
        if resized:
            row["resized"] = resized
        try:
            values = dict(tied.state_dict(keep_vars=True).items())
            apart.load_state_dict({k: v.detach().clone() for k, v in values.items()}, strict=False)
            one, other = logits(tied), logits(apart)
        except Exception:
            one = other = None
        if one is None or other is None or one.shape != other.shape:
            row["run"] = False
        elif not torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max())):
            ratio = float((other.double() * one.double()).sum() / one.double().square().sum())
            off = float((other - ratio * one).abs().max() / other.abs().max())
            width = next((f for f in ("d_model", "hidden_size") if getattr(tied.config, f, None)), None)
            size = getattr(tied.config, width) if width else 0
            if off < 1e-4 and width and abs(ratio - size**0.5) < 1e-3 * ratio:
                row["scale"] = width
            else:
                row["other"] = f"ratio {ratio:.4g}, off by {off:.2g}"
        found[name] = row
    return found


def collapsed(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without the classes of which there is nothing to say."""
    unrun = sorted(name for name, row in rows.items() if row.pop("run", True) is False)
    print(f"make_classes: {len(unrun)} of {len(rows)} classes were built and not run", file=sys.stderr)
    return {name: row for name, row in sorted(rows.items()) if len(row) > 1}


def both(new: dict[str, dict[str, Any]], old: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of version 4, what matters: scales, and what stays tied in both."""
    found = {}
    for name, row in old.items():
        stays = sorted(set(row.get("stays", ())) & set(new.get(name, {}).get("stays", ())))
        kept = {"type": row["type"], "scale": row.get("scale"), "stays": stays}
        found[name] = {key: value for key, value in kept.items() if value}
    return collapsed(found)


def build(older: str | None, before: dict[str, Any]) -> dict[str, Any]:
    from embedding_kinds import embeddings

    found = tasks()
    about = {
        "source": f"transformers {version('transformers')}: models/auto, models/*/configuration_*.py, the classes run",
        "copyright": "The HuggingFace Inc. team",
        "license": "Apache-2.0",
        "made by": "tools/make_classes.py",
    }
    if older:
        run = subprocess.run([older, __file__, "--probe"], capture_output=True, text=True, check=True)
        earlier = json.loads(run.stdout.splitlines()[-1])
        about["older"] = earlier["version"]
        untied4 = earlier["untie"]
    else:
        about["older"], untied4 = before["about"]["older"], before["untie4"]
    untied = collapsed(probe())
    kinds, places = embeddings()
    return {
        "about": about,
        "tasks": found,
        "heads": heads({name for types in found.values() for name in types.values()}),
        "flags": flags(),
        "untie": untied,
        "untie4": both(untied, untied4),
        "embedding_classes": kinds,
        "embeddings": places,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--older", metavar="PYTHON", help="an interpreter with transformers 4; else its facts are kept")
    parser.add_argument("--probe", action="store_true", help="print what the installed version does with the flag")
    parser.add_argument("--check", action="store_true", help="fail when the file is not what would be written")
    arguments = parser.parse_args()
    quiet()
    if arguments.probe:
        older_fields()
        print(json.dumps({"version": version("transformers"), "untie": collapsed(probe())}))
        return 0
    from make_names import text

    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    made = text(build(arguments.older, before))
    if arguments.check:
        return 0 if OUT.exists() and OUT.read_text(encoding="utf-8") == made else 1
    OUT.write_text(made, encoding="utf-8")
    print(f"{OUT.relative_to(ROOT)}: {len(made)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
