"""PEFT's own test matrix, from its source release: each model x tuner x config merged, beside PEFT's live adapter.

    python -m bench proofs peft_matrix                        # the release of the installed PEFT, by `pip download`
    python -m bench proofs peft_matrix --tests FOLDER         # its unpacked `tests`
    python -m bench proofs peft_matrix --only IA3 --only Conv2d
    python -m bench proofs peft_matrix --json rows.json       # each row as it is done; what the file holds is not run again

The tables of models and configs are imported from PEFT's tests when this runs. Models that the tests download are made here,
tiny and random. For each row the adapter is moved by random numbers and saved; the output of base + live adapter is held
against the output of the merged file, loaded by the model's own class:

* equal: the outputs differ by at most 1e-5 of their spread, in float32 (in float64 where a deep model makes more of the last
  bits of float32), and so do the tensors from those of PEFT's merge where that is the live adapter;
* refused: an error by name, with its reason;
* wrong: another output, or an error without a name;
* no adapter: PEFT itself cannot make, save, load or run this adapter on this model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.common import results

LIMIT = 1e-5  # of a difference, as a part of the spread of the outputs, or of the largest change of the tensors
PACKAGE = "tests_of_peft"
OUTCOMES = ("equal", "refused", "wrong", "no adapter")


@dataclass
class Model:
    """How a base is made (the same at each call), written, and read again; and how it is asked."""

    make: Callable[[], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    ask: Callable[[Any], torch.Tensor]


@dataclass
class Case:
    """One row of a table: ``configs`` are trained one after the other, each on a fresh model."""

    table: str
    title: str
    model: Model
    configs: list[Callable[[], Any]]
    method: str

    @property
    def name(self) -> str:
        return f"{self.table}: {self.title}"


@dataclass
class Row:
    """What came of a case.

    Attributes:
        off: largest difference of outputs, as a part of their spread.
        peft: what PEFT's own ``merge_and_unload`` does: "equal" to its live adapter, "another", or its error.
    """

    name: str
    method: str
    outcome: str = ""
    off: float = 0.0
    reason: str = ""
    peft: str = ""
    notes: list[str] = field(default_factory=list)


# --- the tables of PEFT's tests ---


def release(folder: Path) -> Path:
    """The unpacked ``tests`` of the installed PEFT's source release."""
    import peft

    words = ["download", f"peft=={peft.__version__}", "--no-binary", ":all:", "--no-deps", "--quiet", "--dest"]
    subprocess.run([sys.executable, "-m", "pip", *words, str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (found,) = folder.glob("*/tests")
    return found


def modules(folder: Path) -> Callable[[str], Any]:
    """How a module of PEFT's tests is imported; the data that some of them load meanwhile are mocked."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package

    def module(name: str) -> Any:
        with mock.patch("datasets.load_dataset", mock.MagicMock()):
            return importlib.import_module(f"{PACKAGE}.{name}")

    return module


def cases(module: Callable[[str], Any]) -> Iterator[Case]:
    """Every row of the tables of models and configs."""
    yield from custom(module("test_custom_models"))
    for name, models in (
        ("test_decoder_models", "PEFT_DECODER_MODELS_TO_TEST"),
        ("test_encoder_decoder_models", "PEFT_ENCODER_DECODER_MODELS_TO_TEST"),
        ("test_feature_extraction_models", "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST"),
        ("test_seq_classifier", "PEFT_SEQ_CLS_MODELS_TO_TEST"),
    ):
        tests = module(name)
        heads = [getattr(one, "transformers_class", None) for one in vars(tests).values() if isinstance(one, type)]
        auto = next(head for head in heads if isinstance(head, type))
        for model in getattr(tests, models):
            for cls, words in tests.ALL_CONFIGS:
                yield of_transformers(name, model, auto, cls, words)
    tests = module("test_token_classification_qa")
    for suite, configs in (("TokenClassification", "TOKEN_CLS_CONFIGS"), ("QuestionAnswering", "QA_CONFIGS")):
        auto = getattr(tests, f"Test{suite}Models").transformers_class
        for model in tests.PEFT_TOKEN_CLS_MODELS_TO_TEST:
            for cls, words in getattr(tests, configs):
                yield of_transformers("test_token_classification_qa", model, auto, cls, words)
    tests = module("test_target_parameters")
    for model, cls, words in tests.ALL_CONFIGS:
        yield of_transformers("test_target_parameters", model, tests.AutoModelForCausalLM, cls, words)
    tests = module("test_vision_models")
    for title, config in tests.CONFIGS.items():
        made = resnet(tests.TestResnet.model_id)
        yield Case("test_vision_models", title, made, [partial(lambda one: one, config)], method(type(config)))
    tests = module("test_lora_variants")
    for title, cls, words in tests.TEST_CASES:
        yield Case("test_lora_variants", title, plain(tests.CustomModel), [partial(cls, **words)], method(cls))
    for cls, parts in module("test_stablediffusion").DIFFUSERS_CONFIGS:
        for part, words in parts.items():
            title = f"{part} {told(cls, words)}"
            yield Case("test_stablediffusion", title, component(part), [partial(cls, **words)], method(cls))


def custom(tests: Any) -> Iterator[Case]:
    """Modules that are of no library; their base is a file of weights without a config."""
    for title, model, cls, words in tests.TEST_CASES:
        made = plain(partial(tests.MockTransformerWrapper.from_pretrained, model))
        yield Case("test_custom_models", title, made, [partial(cls, **words)], method(cls))
    for title, model, cls, words in tests.TEST_CASES:
        made = plain(partial(tests.MockTransformerWrapper.from_pretrained, model))
        yield Case("test_custom_models, twice", title, made, [partial(cls, **words)] * 2, method(cls))
    choose = tests.TestMultipleActiveAdapters().resolve_model_cls
    for title, tuner, cls, *both in tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES:
        made = plain(partial(choose, tuner))
        configs = [partial(cls, **words) for words in both]
        yield Case("test_custom_models, two adapters", title, made, configs, method(cls))


def of_transformers(table: str, model: str, auto: Any, cls: Any, words: dict[str, Any]) -> Case:
    # One of the tests has a class of its own.
    auto = next(one for one in auto.__mro__ if one.__module__.startswith("transformers"))
    made = published(model, auto)
    title = f"{auto.__name__.removeprefix('AutoModel').removeprefix('For')} {model.split('/')[-1]}, {told(cls, words)}"
    return Case(table, title.strip(), made, [partial(cls, **words)], method(cls))


def told(cls: Any, words: dict[str, Any]) -> str:
    """A config in one line."""
    known = {k: v for k, v in words.items() if k != "task_type" and not (k == "target_modules" and table_like(v))}
    return f"{method(cls)} {', '.join(f'{k}={v}' for k, v in known.items())}".strip()


def table_like(value: Any) -> bool:
    return value is None or len(value) > 3


def method(cls: Any) -> str:
    return cls.__name__.removesuffix("Config")


# --- the models ---


def randomised(model: Any) -> Any:
    """Every number random, those too that a class fills with zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.float().eval()


def plain(make: Callable[[], Any]) -> Model:
    """A module of no library."""

    def fresh() -> Any:
        torch.manual_seed(0)
        return make().float().eval()

    def save(model: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")

    def load(folder: Path) -> Any:
        model = fresh()
        model.load_state_dict(tensors(folder))
        return model

    def ask(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        if any(isinstance(one, torch.nn.Embedding) for one in model.modules()):
            ids = torch.randint(0, 100, (9, 10), generator=generator)
            two = any(isinstance(one, torch.nn.Conv2d) for one in model.modules())
            return answer(model, ids, *([torch.randn(9, 1, 10, 10, generator=generator)] if two else []))
        return answer(model, torch.randn(9, 10, generator=generator))

    return Model(fresh, save, load, ask)


def published(name: str, auto: Any) -> Model:
    """A tiny random stand-in of a published model of transformers, with the head of ``auto``."""
    import transformers

    from bench.common import zoo

    short = name.split("/")[-1].removesuffix("-calibrated")
    known = {kind: cls for types in zoo.kinds().values() for kind, cls in types.items()}
    written = re.search(r"[A-Z]\w+", short)
    cls = getattr(transformers, written[0] if written else known[max((k for k in known if k in short), key=len)])

    def fresh() -> Any:
        torch.manual_seed(0)
        padded = {"pad_token_id": 0} if "SequenceClassification" in auto.__name__ else {}
        return randomised(zoo.make(cls, **padded))

    def load(folder: Path) -> Any:
        torch.manual_seed(0)  # of a head that the files do not hold
        return auto.from_pretrained(folder).float().eval()

    def ask(model: Any) -> torch.Tensor:
        ids = torch.arange(4, 20).view(2, 8) % 90
        more = {"decoder_input_ids": ids[:, :5] + 1} if model.config.is_encoder_decoder else {}
        return answer(model, input_ids=ids, **more)

    return Model(fresh, lambda model, folder: model.save_pretrained(folder), load, ask)


def resnet(name: str) -> Model:
    """The one model of images of the tests."""
    import transformers

    made = published(name, transformers.AutoModelForImageClassification)
    made.ask = lambda model: answer(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return made


def component(part: str) -> Model:
    """Text encoder or UNet of Stable Diffusion, at the size of a test."""
    import diffusers
    import transformers

    if part == "text_encoder":
        return published("CLIPTextModel", transformers.CLIPTextModel)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up}
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8}

    def fresh() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=8, **blocks, **sizes).eval()

    def ask(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        told = torch.randn(1, 7, 32, generator=generator)
        return answer(model, torch.randn(1, 4, 8, 8, generator=generator), 3, encoder_hidden_states=told)

    load = diffusers.UNet2DConditionModel.from_pretrained
    return Model(fresh, lambda model, folder: model.save_pretrained(folder), lambda folder: load(folder).eval(), ask)


def answer(model: Any, *inputs: Any, **named: Any) -> torch.Tensor:
    """The first tensor of what a model gives."""
    dtype = next(model.parameters()).dtype
    given = [one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs]
    named = {k: one.to(dtype) if one.is_floating_point() else one for k, one in named.items()}
    with torch.no_grad():
        found = model(*given, **named)
    if not isinstance(found, torch.Tensor):
        found = found[0]
    return found.detach().clone()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


# --- one case ---


def trained(case: Case, base: Path, folder: Path) -> tuple[list[Path], Any]:
    """The folders of the adapters, and the live model of the last."""
    from peft import get_peft_model

    found = []
    for number, config in enumerate(case.configs):
        generator = torch.Generator().manual_seed(2 + number)
        settings = config()
        settings.base_model_name_or_path = str(base)
        torch.manual_seed(number)
        model = get_peft_model(case.model.load(base), settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
        found.append(folder / f"adapter{number}")
        model.save_pretrained(found[-1])
    return found, model


def live(case: Case, base: Path, adapters: list[Path]) -> Any:
    """Base and adapters as PEFT loads them from their files, all active."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    model = PeftModel.from_pretrained(case.model.load(base), adapters[0], adapter_name="a0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=f"a{number}")
    if len(adapters) > 1:
        for one in model.modules():
            if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper):
                one.set_adapter([f"a{number}" for number in range(len(adapters))])
    return model.eval()


def widened(model: Any) -> Any:
    """The model in float64."""
    for one in model.modules():
        if isinstance(vars(one).get("dtype"), torch.dtype):
            one.dtype = torch.float64
    return model.double()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a part of the spread of ``theirs``."""
    if ours.shape != theirs.shape:
        return float("inf")
    spread = (theirs.double().max() - theirs.double().min()).item()
    off = (ours.double() - theirs.double()).abs().max().item()
    return off / spread if spread else float(off > 0)


def examined(case: Case, folder: Path) -> Row:
    """What comes of one case."""
    import adapterkit
    from adapterkit.errors import AdapterkitError

    row = Row(case.name, case.method)
    base = folder / "base"
    try:
        model = case.model.make()
        case.model.save(model, base)
        before = case.model.ask(case.model.load(base))
        adapters, last = trained(case, base, folder)
        wrapped = live(case, base, adapters)
        wanted = case.model.ask(wrapped)
        if len(adapters) == 1 and apart(wanted, case.model.ask(last)) > LIMIT:
            row.notes.append("PEFT loads another function than it saved")
    except Exception as error:
        row.outcome, row.reason = "no adapter", said(error, folder)
        return row
    if not torch.isfinite(wanted).all():
        row.outcome, row.reason = "no adapter", "its outputs are not finite"
        return row
    if before.shape == wanted.shape and torch.equal(before, wanted):
        row.notes.append("changes no output")
    theirs = merged_by_peft(case, wrapped, wanted, row)
    try:
        adapterkit.merge(base, adapters, folder / "out")
    except AdapterkitError as error:
        row.outcome, row.reason = "refused", said(error, folder)
        return row
    except Exception as error:
        row.outcome, row.reason = "wrong", f"{type(error).__name__}: {said(error, folder)}"
        return row
    try:
        got = case.model.ask(case.model.load(folder / "out"))
    except Exception as error:
        row.outcome, row.reason = "wrong", f"does not load: {said(error, folder)}"
        return row
    row.off = apart(got, wanted)
    if row.off > LIMIT:  # a deep model makes more of the last bits than float32 holds
        wide = case.model.ask(widened(live(case, base, adapters)))
        row.off = apart(case.model.ask(widened(case.model.load(folder / "out"))), wide)
        row.notes.append("outputs in float64")
    row.outcome = "equal" if row.off <= LIMIT else "wrong"
    if row.outcome == "equal" and row.peft == "equal":
        row.reason = other_tensors(theirs, case.model.load(folder / "out").state_dict(), tensors(base))
        row.outcome = "wrong" if row.reason else "equal"
    return row


def merged_by_peft(case: Case, wrapped: Any, wanted: torch.Tensor, row: Row) -> dict[str, torch.Tensor]:
    """The parameters after PEFT's own merge; ``row.peft`` says what it is."""
    try:
        merged = wrapped.merge_and_unload()
        row.peft = "equal" if apart(case.model.ask(merged), wanted) <= LIMIT else "another"
    except Exception as error:
        row.peft = f"{type(error).__name__}: {str(error)[:100]}"
        return {}
    return {k.replace(".modules_to_save.a0", ""): v for k, v in merged.state_dict().items()}


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def other_tensors(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> str:
    """Which tensors of two state dicts differ by more than float32 does; "" where none does."""
    changes = [largest(v - base[k]) for k, v in theirs.items() if k in base and base[k].shape == v.shape]
    rounding = torch.finfo(torch.float32).eps
    found = []
    for name, tensor in theirs.items():
        if name in ours and tensor.is_floating_point():
            # Both add up in float32, some methods many terms.
            limit = LIMIT * max(changes, default=0.0) + 8 * rounding * largest(tensor)
            if tensor.shape != ours[name].shape or largest(tensor - ours[name]) > limit:
                found.append(name)
    return f"other tensors than PEFT's: {', '.join(found[:3])}" if found else ""


def said(error: Exception, folder: Path) -> str:
    """An error in one line without the folders of this run."""
    text = re.sub(rf"{re.escape(str(folder))}/?", "", str(error) or type(error).__name__)
    return " ".join(text.split())


# --- what is printed ---


def reason(row: Row) -> str:
    """The reason of a row without the names of its own: what several rows share."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", row.reason)
    own = r"\b(?:lin|conv|emb|layer|block|base_model|model|encoder|decoder|transformer)"
    text = re.sub(rf"[\w.]*{own}\w*(?:\.\w+)+", "...", text)
    return re.sub(r"\[[\d, ]*\]", "[...]", text)[:160]


def report(rows: list[Row]) -> None:
    """Two tables: outcomes by tuner, and why what was refused was."""
    results.head("tuner", *OUTCOMES, "PEFT cannot merge", "of these equal", "largest difference")
    for name in sorted({row.method for row in rows}):
        of = [row for row in rows if row.method == name]
        counts = Counter(row.outcome for row in of)
        unable = [row for row in of if row.outcome != "no adapter" and row.peft != "equal"]
        worst = max((row.off for row in of if row.outcome == "equal"), default=0.0)
        alone = sum(row.outcome == "equal" for row in unable)
        results.row(name, *(str(counts[one]) for one in OUTCOMES), str(len(unable)), str(alone), f"{worst:.1e}")
    print()
    results.head("refused", "rows", "of which PEFT merges")
    refused = [row for row in rows if row.outcome == "refused"]
    for (name, why), count in Counter((row.method, reason(row)) for row in refused).most_common():
        able = sum(row.peft == "equal" for row in refused if (row.method, reason(row)) == (name, why))
        results.row(f"{name}: {why}".replace("|", "\\|"), str(count), str(able))
    print()
    totals = Counter(row.outcome for row in rows)
    print(f"{len(rows)} rows: {', '.join(f'{totals[one]} {one}' for one in OUTCOMES)}.")
    able = sum(row.peft == "equal" for row in refused)
    counts = {one.replace(" ", "_"): totals[one] for one in OUTCOMES}
    results.note(rows=len(rows), refused_that_peft_merges=able, **counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="the unpacked tests of PEFT's source release")
    parser.add_argument("--only", action="append", default=[], help="rows with this word (may be given more than once)")
    parser.add_argument("--json", type=Path, help="file for the rows; what it holds is not run again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        folder = arguments.tests or release(Path(work))
        kept = {}
        if arguments.json and arguments.json.exists():
            kept = {row["name"]: Row(**row) for row in json.loads(arguments.json.read_text(encoding="utf-8"))}
        rows: list[Row] = []
        seen: Counter[str] = Counter()
        for case in cases(modules(folder)):
            seen[case.name] += 1
            if seen[case.name] > 1:  # the tables have some rows twice
                case.title += f" ({seen[case.name]})"
            if arguments.only and not any(word in case.name for word in arguments.only):
                continue
            if case.name not in kept:
                with tempfile.TemporaryDirectory() as place:
                    kept[case.name] = examined(case, Path(place))
            rows.append(kept[case.name])
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
            if rows[-1].outcome == "wrong" or not arguments.json:
                row = rows[-1]
                print(f"{row.outcome} {row.off:.1e} {row.name} {row.reason}", file=sys.stderr, flush=True)
        report(rows)
    return int(any(row.outcome == "wrong" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
