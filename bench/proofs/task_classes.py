"""Merged folders loaded by transformers' auto classes, task by task: each answers as the live adapter does.

    python -m bench proofs task_classes                       # eight families of each task
    python -m bench proofs task_classes --each 0              # all families
    python -m bench proofs task_classes --only SEQ_CLS --only vit
    python -m bench proofs task_classes --json rows.json      # each row as it is done; what the file holds is not run again

A family's tiny random base is saved without a head where the task trains one (`TRAINED`), else by the task's class. The
task's class is loaded from it with three labels; PEFT puts a LoRA on all its linear layers and stacked experts, and trains
whole what the base has not. The merged folder is loaded by the auto class of the task, and held against the live adapter:

* equal: of the same class, nothing missing, unexpected or of another shape, as many labels (named as the base names them where
  it has as many), the tensors those of PEFT's merge, and every output within 1e-5 of its spread in float32 (in float64 where a
  deep model makes more of the last bits of float32);
* as PEFT merges: PEFT's merge answers so too, and not as its live adapter: models that read the weight of a layer beside its
  forward (WavLM's attention), which leaves a LoRA on it untrained, or that make more of a rounded weight than the limit;
* tensors: the same, but nothing is known here to ask the model;
* refused: an error by name; wrong: anything else;
* no adapter: transformers or PEFT cannot make this input.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.common import results

LIMIT = 1e-5  # of a difference, as a part of the spread
LABELS = 3
OUTCOMES = ("equal", "as PEFT merges", "tensors", "refused", "wrong", "no adapter")
# Task, as PEFT names it or as the auto class is called -> auto class.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "masked LM": "AutoModelForMaskedLM",
    "multiple choice": "AutoModelForMultipleChoice",
    "image classification": "AutoModelForImageClassification",
    "video classification": "AutoModelForVideoClassification",
    "semantic segmentation": "AutoModelForSemanticSegmentation",
    "universal segmentation": "AutoModelForUniversalSegmentation",
    "object detection": "AutoModelForObjectDetection",
    "depth estimation": "AutoModelForDepthEstimation",
    "audio classification": "AutoModelForAudioClassification",
    "audio frame classification": "AutoModelForAudioFrameClassification",
    "audio x-vector": "AutoModelForAudioXVector",
    "CTC": "AutoModelForCTC",
    "speech to text": "AutoModelForSpeechSeq2Seq",
    "image and text to text": "AutoModelForImageTextToText",
    "table question answering": "AutoModelForTableQuestionAnswering",
    "visual question answering": "AutoModelForVisualQuestionAnswering",
    "document question answering": "AutoModelForDocumentQuestionAnswering",
}
TRAINED = {
    *("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "multiple choice", "image classification", "video classification"),
    *("semantic segmentation", "audio classification", "audio frame classification", "audio x-vector", "CTC"),
}
COUNTED = TRAINED - {"QUESTION_ANS", "multiple choice", "CTC", "audio x-vector"}


@dataclass
class Row:
    """What came of one family in one task."""

    task: str
    family: str
    outcome: str = ""
    off: float = 0.0
    reason: str = ""
    notes: list[str] = field(default_factory=list)


class Unmade(Exception):
    """The input of a row cannot be made."""


def families(task: str) -> dict[str, Any]:
    """Model type -> class, of a task."""
    import transformers

    mapping = getattr(transformers, TASKS[task])._model_mapping
    names = {config.model_type: name for config, name in _names(mapping).items()}
    return {kind: getattr(transformers, name) for kind, name in sorted(names.items()) if hasattr(transformers, name)}


def _names(mapping: Any) -> dict[Any, str]:
    found = {}
    for kind, name in mapping._model_mapping.items():
        try:
            config = mapping._load_attr_from_module(kind, mapping._config_mapping[kind])
        except (KeyError, ValueError, AttributeError, ImportError):
            continue
        found[config] = name if isinstance(name, str) else name[0]
    return found


# --- the input of a row ---


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.1, generator=generator)
    return model.float().eval()


def base_of(task: str, kind: str, cls: Any, folder: Path) -> None:
    """Save a tiny base: the family's bare model where the task trains a head and there is one, else the task's class."""
    from bench.common import zoo

    bare = families("FEATURE_EXTRACTION").get(kind) if task in TRAINED else None
    torch.manual_seed(0)
    made = zoo.make(
        bare or cls, **({} if bare else {"id2label": {0: "one", 1: "two", 2: "three"}} if task in COUNTED else {})
    )
    randomised(made).save_pretrained(folder)


def loaded(task: str, cls: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The task's class from the base, as training starts from it."""
    torch.manual_seed(1)
    sizes = {"num_labels": LABELS} if task in COUNTED else {"vocab_size": 45} if task == "CTC" else {}
    settings = {"ignore_mismatched_sizes": True, "output_loading_info": True, "attn_implementation": "eager"}
    model, told = cls.from_pretrained(folder, **settings, **sizes)
    return model.float().eval(), told


def brought(model: Any, told: dict[str, Any]) -> list[str]:
    """The modules that the base has not, which training has to save whole.

    Raises:
        Unmade: they are no modules of their own.
    """
    prefix = model.base_model_prefix + "."
    mismatched = {one[0] for one in told["mismatched_keys"]}
    found = set()
    for key in {*told["missing_keys"], *mismatched}:
        parts = key.split(".")
        depth = 1 if not key.startswith(prefix) else len(parts) - 1
        module = ".".join(parts[:depth])
        if len(parts) == 1 or not isinstance(model.get_submodule(module), torch.nn.Module):
            raise Unmade(f"{key} is in no module that could be saved")
        if isinstance(model.get_submodule(module), torch.nn.ModuleList | torch.nn.ModuleDict):
            module = ".".join(parts[:-1])
        found.add(module)
    for path, _ in model.named_modules():
        if path not in found and path.rpartition(".")[2] in found and any(path.startswith(f"{one}.") for one in found):
            raise Unmade(f"PEFT takes {path}, inside of what is saved whole, for another module to save")
    return sorted(found)


def trained(task: str, cls: Any, base: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The live adapter, saved, and what loading the base into the class told."""
    from peft import LoraConfig, TaskType, get_peft_model

    from bench.proofs.sweep import EXPERTS, targets, tied_parameters

    model, told = loaded(task, cls, base)
    whole = brought(model, told)
    shared = tied_parameters(model)
    layers = [one for one in targets(model) if not any(f"{one}.".startswith(f"{part}.") for part in whole)]
    experts = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 1)[-1] in EXPERTS and name not in shared
    ]
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=layers,
        target_parameters=experts or None,
        modules_to_save=whole or None,
        task_type=task if task in TaskType.__members__ else None,
    )
    wrapped = get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped, told


# --- how a model is asked ---


def number(config: Any, *names: str) -> int | None:
    """The first of these fields in a config or in one inside of it."""
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ())]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def questions(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that a model may take, the likeliest first."""
    takes = set(inspect.signature(model.forward).parameters)
    config = model.config
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.arange(4, 20).view(2, 8) % 90
    text: dict[str, torch.Tensor] = {
        "input_ids": ids[:, None].repeat(1, 3, 1) if "MultipleChoice" in type(model).__name__ else ids
    }
    told = {"decoder_input_ids": ids[:, :5]} if "decoder_input_ids" in takes else {}
    channels = number(config, "num_channels", "in_channels", "in_chans") or 3
    frames = number(config, "num_frames", "frames_per_clip") or 2
    size = number(config, "image_size", "crop_size")
    for side in dict.fromkeys((size or 64, 64, 224, 32)):
        pixels = noise(2, channels, side, side)
        if "pixel_values_videos" in takes and "input_ids" not in takes:
            yield {"pixel_values_videos": noise(2, frames, channels, side, side)}
        if "pixel_values" not in takes:
            break
        if "input_ids" in takes:
            yield {**text, "pixel_values": pixels, **told}
        else:
            yield {"pixel_values": pixels, **told}
            yield {"pixel_values": noise(2, frames, channels, side, side), **told}
    bands = number(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "feat_dim") or 80
    if "input_features" in takes:
        positions = number(config, "max_source_positions") or 50
        for shape in ((2, bands, 2 * positions), (2, 40, bands), (2, bands, 40), (2, bands, 3000)):
            yield {"input_features": noise(*shape), **told}
    if "input_values" in takes:
        length = number(config, "max_length") or 40
        for shape in ((2, 4000), (2, 16000), (2, 1, 4000), (2, length, bands)):
            yield {"input_values": noise(*shape), **told}
    if "inputs" in takes:
        yield {"inputs": ids}
        yield {"inputs": noise(2, channels, size or 64, size or 64)}
    yield {**text, **told}
    yield text
    yield {key: value[:1] for key, value in text.items()}


def asked(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every output of floats."""
    dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(**given)
    return {
        k: v.clone() for k, v in out.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel() > 1
    }


def question(model: Any) -> dict[str, torch.Tensor] | None:
    """The first input that the model answers."""
    for inputs in questions(model):
        try:
            found = asked(model, inputs)
        except Exception:  # it takes something else
            continue
        if found and all(torch.isfinite(one).all() for one in found.values()):
            return inputs
    return None


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of an output, as a part of its spread."""
    if ours.keys() != theirs.keys() or any(ours[k].shape != theirs[k].shape for k in ours):
        return float("inf")
    found = [0.0]
    for key, one in theirs.items():
        spread = (one.double().max() - one.double().min()).item()
        off = (ours[key].double() - one.double()).abs().max().item()
        found.append(off / spread if spread else float(off > 0))
    return max(found)


# --- one row ---


def examined(task: str, kind: str, cls: Any, folder: Path) -> Row:
    import adapterkit
    from adapterkit.errors import AdapterkitError

    row = Row(task, kind)
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    try:
        base_of(task, kind, cls, base)
        if task not in TRAINED:
            reloaded(task, base)  # some bases are of no class that the auto class knows
        wrapped, told = trained(task, cls, base, adapter)
        live = wrapped.base_model.model
        inputs = question(live)
        wanted = asked(live, inputs) if inputs else {}
    except Exception as error:
        row.outcome, row.reason = "no adapter", said(error, folder)
        return row
    if inputs:
        row.notes.append("+".join(inputs))
    try:
        adapterkit.merge(base, [adapter], out)
    except AdapterkitError as error:
        row.outcome, row.reason = "refused", said(error, folder)
        return row
    except Exception as error:
        row.outcome, row.reason = "wrong", f"{type(error).__name__}: {said(error, folder)}"
        return row
    try:
        row.reason = strange(task, cls, base, out, told)
        if not row.reason and inputs:
            row.off = off(task, out, live, inputs, wanted, row)
        merged = wrapped.merge_and_unload()
        row.reason = row.reason or other_tensors(reloaded(task, out), merged)
        if not row.reason and row.off > LIMIT:
            alike = apart(asked(reloaded(task, out).double(), inputs), asked(merged.double(), inputs)) <= LIMIT
            row.outcome, row.reason = "as PEFT merges", "" if alike else "another answer"
    except Exception as error:
        row.reason = f"{type(error).__name__}: {said(error, folder)}"
    row.outcome = "wrong" if row.reason else row.outcome or ("equal" if inputs else "tensors")
    return row


def reloaded(task: str, out: Path) -> Any:
    import transformers

    auto = getattr(transformers, TASKS[task])
    return auto.from_pretrained(out, attn_implementation="eager").float().eval()


def off(task: str, out: Path, live: Any, inputs: Any, wanted: Any, row: Row) -> float:
    found = apart(asked(reloaded(task, out), inputs), wanted)
    if found > LIMIT:
        row.notes.append("in float64")
        found = apart(asked(reloaded(task, out).double(), inputs), asked(live.double(), inputs))
        live.float()
    return found


def strange(task: str, cls: Any, base: Path, out: Path, told: dict[str, Any]) -> str:
    """What the folder is besides the model that was trained; "" where nothing."""
    import transformers

    auto = getattr(transformers, TASKS[task])
    model, now = auto.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    if type(model) is not cls:
        return f"loaded as {type(model).__name__}"
    named = json.loads((out / "config.json").read_text(encoding="utf-8")).get("architectures")
    if named != [cls.__name__]:
        return f"architectures {named}"
    for key in ("missing_keys", "mismatched_keys"):
        if now[key]:
            return f"{key}: {sorted(map(str, now[key]))[:3]}"
    prefix = f"{cls.base_model_prefix}."  # a base without a head has its names without it
    known = {name.removeprefix(prefix) for name in told["unexpected_keys"]}
    more = {name for name in now["unexpected_keys"] if name.removeprefix(prefix) not in known}
    if more:
        return f"unexpected keys: {sorted(more)[:3]}"
    if task in COUNTED and model.config.num_labels != LABELS:
        return f"{model.config.num_labels} labels"
    before = json.loads((base / "config.json").read_text(encoding="utf-8")).get("id2label")
    if (
        task in COUNTED
        and before
        and len(before) == LABELS
        and list(model.config.id2label.values()) != list(before.values())
    ):
        return f"labels named {model.config.id2label}"
    return ""


def other_tensors(model: Any, merged: Any) -> str:
    """Which tensors of the loaded model are not those of PEFT's merge."""
    ours = model.state_dict()
    theirs = {k.replace(".modules_to_save.default", ""): v for k, v in merged.state_dict().items()}
    found = []
    for name, tensor in theirs.items():
        if ".original_module." in name or not tensor.is_floating_point() or not tensor.numel():
            continue
        if (
            name not in ours
            or ours[name].shape != tensor.shape
            or (ours[name] - tensor).abs().max().item() > LIMIT * max(1.0, tensor.abs().max().item())
        ):
            found.append(name)
    return f"{len(found)} other tensors than PEFT's: {found[:3]}" if found else ""


def said(error: Exception, folder: Path) -> str:
    """An error in one line, without the folder of this run."""
    return " ".join((str(error) or type(error).__name__).replace(f"{folder}/", "").split())[:300]


# --- what is printed ---


def report(rows: list[Row]) -> None:
    results.head("task", "loaded by", "families", *OUTCOMES, "largest difference")
    for task, auto in TASKS.items():
        of = [row for row in rows if row.task == task]
        counts = Counter(row.outcome for row in of)
        worst = max((row.off for row in of if row.outcome == "equal"), default=0.0)
        if of:
            results.row(task, f"`{auto}`", str(len(of)), *(str(counts[one]) for one in OUTCOMES), f"{worst:.1e}")
    print()
    for row in rows:
        if row.outcome in ("refused", "wrong"):
            print(f"{row.outcome}: {row.task}, {row.family}: {row.reason}")
    totals = Counter(row.outcome for row in rows)
    print(f"{len(rows)} rows: {', '.join(f'{totals[one]} {one}' for one in OUTCOMES)}.")
    results.note(rows=len(rows), **{one.replace(" ", "_"): totals[one] for one in OUTCOMES})


def spread(found: dict[str, Any], each: int) -> dict[str, Any]:
    """``each`` of them, from the first to the last; all for 0."""
    kinds = list(found)
    if not each or each >= len(kinds):
        return found
    return {kinds[i * len(kinds) // each]: found[kinds[i * len(kinds) // each]] for i in range(each)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=8, help="families of each task; 0 for all")
    parser.add_argument("--only", action="append", default=[], help="a task or a family (may be given more than once)")
    parser.add_argument("--json", type=Path, help="file for the rows; what it holds is not run again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kept: dict[tuple[str, str], Row] = {}
    if arguments.json and arguments.json.exists():
        kept = {(r["task"], r["family"]): Row(**r) for r in json.loads(arguments.json.read_text(encoding="utf-8"))}
    rows = []
    words = set(arguments.only)
    for task in TASKS:
        every = families(task)
        named = {kind: cls for kind, cls in every.items() if kind in words}
        for kind, cls in (spread(every, arguments.each) if not words or task in words else named).items():
            if named and kind not in named:
                continue
            if (task, kind) not in kept:
                with tempfile.TemporaryDirectory() as folder:
                    kept[task, kind] = examined(task, kind, cls, Path(folder))
            rows.append(kept[task, kind])
            if arguments.json:
                arguments.json.write_text(
                    json.dumps([asdict(one) for one in kept.values()], indent=1), encoding="utf-8"
                )
            row = rows[-1]
            print(f"{row.outcome} {row.off:.1e} {task}, {kind} {row.reason} {row.notes}", file=sys.stderr, flush=True)
    report(rows)
    return int(any(row.outcome == "wrong" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
