"""The level of loading: whether MERGED's folder becomes the model that was trained when its own class reads it.

transformers builds the class on the meta device, so nothing is read but headers, and says which keys it misses, does not
know, or finds in another shape. Tokenizer and chat template are compared with what the merge would put beside the
weights. No code of the folder is run. Where transformers is not installed, or the class is not known, a note says what
was not checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.adapters.brought import PROCESSOR_CONFIG, TEMPLATE, TEMPLATES, TOKENIZER, TOKENIZER_CONFIG
from adapterkit.checkpoint.folder import INDEX, MORE_TEMPLATES
from adapterkit.checkpoint.header import parse_header
from adapterkit.checkpoint.pipeline import components
from adapterkit.errors import counted
from adapterkit.foreign import json_value
from adapterkit.verbs.verify.inputs import place
from adapterkit.verbs.verify.report import ERROR, NOTE, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.verbs.verify.subject import Subject

MOST_TEXT = 64 << 20  # bytes of a file that is read for what it says
MOST_LAYERS = 2_000  # of a model that transformers builds to be asked; it takes a hundredth of a second for each
_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
NAMED = 4  # tensors that a sentence names


def loading(subject: Subject, around: Sequence[Finding] = ()) -> list[Finding]:
    """What is wrong with MERGED as a folder to load, but for tensors that findings of ``around`` are about."""
    if subject.found.format == "gguf":
        return []
    folder = place(subject.found)
    if folder is None or not folder.is_dir():
        return [_unchecked(f"{subject.found.ref} is not a folder on this machine, so it was not loaded")]
    said = frozenset(name for one in around for name in one.tensors)
    return [*_built(subject, folder, said), *_templates(subject, folder), *_vocabulary(subject, folder)]


def names(subject: Subject) -> list[Finding]:
    """Which names and shapes MERGED's headers have beside those that merge would write."""
    found = []
    for kind, listed, what in (
        ("missing", subject.missing, "which merge would write"),
        ("extra", subject.extra, "which merge would not write"),
        ("shape", tuple(one[0] for one in subject.misshapen), "in another shape"),
    ):
        if listed:
            verb = "lacks" if kind == "missing" else "has"
            text = f"MERGED {verb} {_names(list(listed))}, {what}"
            found.append(Finding(kind, WARNING if kind == "extra" else ERROR, text, "merge again", tuple(listed)))
    return found


# Formats whose weights transformers converts while it loads them, so that its class cannot be built without values.
_NEEDS_VALUES = ("bitsandbytes",)


def _unchecked(why: str) -> Finding:
    return Finding("not loaded", NOTE, f"{why}; missing, unexpected and mismatched keys were not looked for")


# ------------------------------------------------------------------ the class


def _built(subject: Subject, folder: Path, said: frozenset[str]) -> Iterator[Finding]:
    config = subject.found.config
    if components(config):
        text = "the components of a pipeline were compared by names, shapes and configs, and not loaded"
        yield Finding("not loaded", NOTE, text)
        return
    if subject.found.metadata.get("format") == "mlx":
        yield _unchecked("MERGED is in MLX's layout, which mlx-lm and mlx-vlm load and transformers does not")
        return
    lacking = [name for name in ("transformers", "tokenizers", "accelerate") if find_spec(name) is None]
    if lacking:
        yield _unchecked(f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed")
        return
    layers = _layers(config)
    if layers > MOST_LAYERS:
        if layers > len(subject.found):
            text = f"config.json says {layers:,} layers, and MERGED holds {counted(len(subject.found), 'tensor')}"
            yield Finding("missing key", ERROR, text, "correct config.json, or merge again")
            return
        yield _unchecked(f"MERGED has {layers:,} layers, more than {MOST_LAYERS:,}, and was not built in transformers")
        return
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    from adapterkit.verbs.verify.answers import need_transformers

    transformers = need_transformers()
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if cls is None or not hasattr(cls, "from_pretrained"):
        known = f"'{name}'" if name else "no class"
        yield _unchecked(f"config.json names {known}, which transformers {transformers.__version__} does not have")
        return
    told = _told(cls, folder)
    if isinstance(told, str):
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method in _NEEDS_VALUES:
            yield _unchecked(
                f"transformers {transformers.__version__} builds no class of {method} weights without loading them"
            )
            return
        yield _unchecked(f"transformers {transformers.__version__} cannot build {name} from it ({told})")
        return
    brought = {*subject.folded.touched, *subject.folded.added}
    missing, mismatched = (_keys(told[key]) for key in ("missing_keys", "mismatched_keys"))
    unexpected = _keys(told["unexpected_keys"])
    before = _of_base(subject, name) if missing or mismatched else frozenset()
    lost = [one for one in missing if one not in before | said]
    if lost:
        text = f"{name} has {_names(lost)}, which MERGED does not hold: a loader fills them with random numbers"
        yield Finding("missing key", ERROR, text, "merge again, or name the class that was trained", tuple(lost))
    other = [one for one in mismatched if one not in before]
    if other:
        text = f"{name} wants {_names(other)} in another shape than MERGED has, as its config.json is"
        yield Finding("other shape", ERROR, text, "correct config.json, or merge again", tuple(other))
    kept = [one for one in (*missing, *mismatched) if one in before]
    if kept:
        text = f"{name} has {_names(kept)}, which the base's folder does not hold either, or in another shape"
        yield Finding("missing key", NOTE, text, "loaders fill them with random numbers", tuple(kept))
    trained = [one for one in unexpected if one in brought]
    if trained:
        text = f"{name} does not read {_names(trained)}, which adapters change: the change is lost on loading"
        yield Finding("unread key", ERROR, text, "name the class that was trained in config.json", tuple(trained))
    rest = [one for one in unexpected if one not in brought]
    if rest:
        yield Finding(
            "unread key", NOTE, f"{name} does not read {_names(rest)}, which the base has too", "", tuple(rest)
        )


def _layers(config: Mapping[str, Any]) -> int:
    """The most layers that a config says, whatever its class calls them."""
    nested = [one for one in config.values() if isinstance(one, dict)]
    said = [one.get(name) for one in (config, *nested) for name in _OF_LAYERS]
    return max((one for one in said if type(one) is int), default=0)


def _told(cls: Any, folder: Path) -> Mapping[str, Any] | str:
    """What a class says of the keys in a folder; a few words where it cannot be built."""
    from adapterkit.verbs.verify.answers import need_transformers, quiet

    transformers = need_transformers()
    before = transformers.utils.logging.get_verbosity()
    try:
        # compressed-tensors draws progress bars of its own.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            transformers.utils.logging.set_verbosity(transformers.logging.CRITICAL)
            _, told = cls.from_pretrained(
                folder,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except Exception as error:  # whatever a class makes of a config that is not its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        transformers.utils.logging.set_verbosity(before)
    found: Mapping[str, Any] = told
    return found


def _of_base(subject: Subject, name: str) -> frozenset[str]:
    """Keys that the base's folder lacks or has in another shape, where its class is that of MERGED too."""
    from adapterkit.adapters.heads import base_class
    from adapterkit.verbs.verify.answers import need_transformers

    if base_class(subject.base.config) != name:
        return frozenset()
    with _folder_of(subject.base) as folder:
        told = "no folder" if folder is None else _told(getattr(need_transformers(), name), folder)
    if isinstance(told, str):
        return frozenset()
    return frozenset({*_keys(told["missing_keys"]), *_keys(told["mismatched_keys"])})


@contextlib.contextmanager
def _folder_of(base: Checkpoint) -> Iterator[Path | None]:
    """The folder of a model. For one that is not on this disk, a temporary one: its config, and files of the same size with
    its headers and no values, which take no room on a disk."""
    folder = place(base)
    if folder is not None or not all(one.name.endswith(".safetensors") for one in base.sources):
        yield folder if folder is not None and folder.is_dir() else None
        return
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as lent:
        top, files = Path(lent), dict[str, str]()
        with disk.writing("a temporary folder", top):
            for source in base.sources:
                name = source.name.rpartition("/")[2]
                header = parse_header(source.read, source.size, source.name)
                with open(top / name, "xb") as file:
                    file.write(source.read(0, header.data_start))
                    file.truncate(source.size)
                files |= dict.fromkeys(header.tensors, name)
            (top / "config.json").write_text(json.dumps(base.config))
            (top / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
        yield top


def _keys(found: Any) -> list[str]:
    """Names of what a loader tells of, which it gives alone or with shapes."""
    return sorted(str(one[0]) if isinstance(one, tuple) else str(one) for one in found)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# ------------------------------------------------------------------ what stands beside the weights


def _templates(subject: Subject, folder: Path) -> Iterator[Finding]:
    wanted, there = _said(dict(subject.side)), _said(_read(folder))
    apart = {text for text in there.values() if text not in wanted.values()}
    if len(set(there.values())) > 1 and any(text in apart for text in there.values()):
        named = ", ".join(sorted(there))
        text = f"MERGED states its chat template in several files that differ ({named}): readers will not agree"
        yield Finding("chat template", ERROR, text, "keep the one that was trained with")
    elif wanted and not there:
        text = f"MERGED has no chat template, and {_source(subject)} has one"
        yield Finding("chat template", WARNING, text, "copy it")
    elif wanted and apart:
        brought = any(_said({f.name: f.bytes() for f in one.side_files}) for one in subject.adapters)
        text = f"MERGED's chat template ({', '.join(sorted(there))}) is not that of {_source(subject)}"
        yield Finding("chat template", ERROR if brought else WARNING, text, "copy the one that was trained with")


def _source(subject: Subject) -> str:
    brought = [one.ref for one in subject.adapters if _said({f.name: f.bytes() for f in one.side_files})]
    return brought[0] if brought else subject.base.ref


def _said(files: Mapping[str, bytes]) -> dict[str, str]:
    """The main chat template in each file that states it."""
    found: dict[str, str] = {}
    for name, data in files.items():
        if name == TEMPLATES[0]:
            found[name] = data.decode("utf-8", "replace").strip()
        elif name in (TEMPLATES[1], TOKENIZER_CONFIG, PROCESSOR_CONFIG):
            text = _main(_object(data).get(TEMPLATE))
            if text is not None:
                found[name] = text.strip()
    return found


def _main(template: Any) -> str | None:
    if isinstance(template, list):
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _vocabulary(subject: Subject, folder: Path) -> Iterator[Finding]:
    """Words and added tokens of tokenizer.json, where the merge would write one and MERGED has one."""
    wanted, there = (_words(side.get(TOKENIZER, b"")) for side in (dict(subject.side), _read(folder)))
    if wanted is None or there is None or wanted == there:
        return
    (words, added), (mine, other) = wanted, there
    brought = any(file.name == TOKENIZER for one in subject.adapters for file in one.side_files)
    whose = "the adapter's" if brought else "the base's"
    apart = sorted(set(added.items()) ^ set(other.items()))
    what = f"token {apart[0][1]} ({apart[0][0]!r})" if apart else "its vocabulary"
    if words == mine and not apart:
        return
    text = f"MERGED's tokenizer.json differs from {whose} in {what}"
    yield Finding("tokenizer", ERROR if brought else WARNING, text, f"copy {whose} tokenizer files")


def _words(data: bytes) -> tuple[Any, dict[str, Any]] | None:
    said = _object(data)
    model, tokens = said.get("model"), said.get("added_tokens")
    if not isinstance(model, dict):
        return None
    rows = tokens if isinstance(tokens, list) else []
    return model.get("vocab"), {str(one.get("content")): one.get("id") for one in rows if isinstance(one, dict)}


def _read(folder: Path) -> dict[str, bytes]:
    names = (*TEMPLATES, TOKENIZER_CONFIG, PROCESSOR_CONFIG, TOKENIZER)
    paths = [folder / name for name in names]
    more = folder / MORE_TEMPLATES.rstrip("/")
    paths += sorted(more.glob("*.jinja")) if more.is_dir() else []
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.is_file() and path.stat().st_size <= MOST_TEXT
    }


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json_value(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
