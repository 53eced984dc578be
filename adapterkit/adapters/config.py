"""``adapter_config.json`` as data: what kind of adapter it is and how strongly each module is scaled.

Nothing in a config is ever executed: classes it names are not imported, and its patterns are matched with a bound.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import lru_cache
from typing import Any

from adapterkit.adapters.trainer_fields import decides_nothing
from adapterkit.errors import AdapterError, UnsafeError
from adapterkit.values import dataclass

PATTERN_TIMEOUT = 2.0  # seconds for all matches of one config; patterns that need longer were made to hang
MAX_PATTERN = 4096  # characters
MAX_REPEATS = 100_000  # product of all counted repeats of a pattern: compiling takes time and memory with it
_DOTTED = re.compile(r"[A-Za-z0-9_.-]+")
_FUZZY = re.compile(r"\{(?!\d*,?\d*\})")
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")

PARTS = "pipeline_parts"  # a field of our own: the configs of several parts of a pipeline, by their names
FLAT = "flat_module_names"  # a field of our own: paths as single files of kohya's scripts have them
CONV1D = "conv1d_modules"  # a field of our own: modules that the user says keep their weights as [in, out]
# Fields every PEFT method has, and what PEFT's own loader does with them; none changes a merged weight by itself.
COMMON_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        CONV1D,
        FLAT,
        PARTS,
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
    }
)


# How authors write the names of their methods, where it is not in capitals as in the config.
_LABELS = {
    "ADALORA": "AdaLoRA",
    "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT",
    "GLORA": "GLoRA",
    "GRALORA": "GraLoRA",
    "HIRA": "HiRA",
    "LN_TUNING": "LN tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "LYCORIS": "LyCORIS",
    "MISS": "MiSS",
    "MODEL": "whole model",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "TINYLORA": "TinyLoRA",
    "TRAINABLE_TOKENS": "trainable tokens",
    "UNILORA": "Uni-LoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}
_INITS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "eva": "EVA", "mica": "MiCA"}


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of one adapter config.

    Attributes:
        raw: every field as it stands in the file.
        where: what to call the file in an error.
    """

    raw: Mapping[str, Any]
    where: str
    _spent: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)
    _sorted: dict[str, _Patterns] = field(default_factory=dict, repr=False, compare=False)

    @property
    def peft_type(self) -> str:
        return str(self.raw.get("peft_type") or "").upper()

    @property
    def label(self) -> str:
        """The method as its authors write it: ``DoRA``, ``rsLoRA``, ``rsLoRA with DoRA``, ``VB-LoRA``."""
        kind = self.peft_type
        if kind != "LORA":
            return _LABELS.get(kind, kind)
        init = str(self.get("init_lora_weights", "")).lower()
        plain = "rsLoRA" if self.get("use_rslora") else "LoRA"
        named = next((name for word, name in _INITS.items() if init.startswith(word)), plain)
        if self.get("use_dora"):
            return "DoRA" if named == "LoRA" else f"{named} with DoRA"
        return named

    @property
    def base(self) -> str | None:
        """What the config calls the base it was trained on."""
        value = self.raw.get("base_model_name_or_path")
        return str(value) if value else None

    @property
    def revision(self) -> str | None:
        value = self.raw.get("revision")
        return str(value) if value else None

    @property
    def peft_minor(self) -> tuple[int, int]:
        """Major and minor version of the PEFT that wrote it; PEFT before 0.18 did not say, so (0, 17) when missing.

        Raises:
            AdapterError: it is there and not a version.
        """
        said = str(self.get("peft_version", "0.17"))
        match = re.match(r"(\d{1,6})\.(\d{1,6})", said)
        if match is None:
            raise AdapterError(f"{self.where}: 'peft_version' is {said[:60]!r}, not a version", "correct the config")
        return int(match.group(1)), int(match.group(2))

    def get(self, name: str, default: Any = None) -> Any:
        value = self.raw.get(name)
        return default if value is None else value

    def flag(self, name: str) -> bool:
        """A boolean field.

        Raises:
            AdapterError: it is there and not a boolean.
        """
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise AdapterError(f"{self.where}: '{name}' is {value!r}, not true or false", "correct the config")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            AdapterError: missing without a default, or not a finite number.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise AdapterError(f"{self.where}: '{name}' is {str(value)[:60]}, not a number", "correct the config")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise AdapterError(f"{self.where}: '{name}' is not a map", "correct the config")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A field that is a name, a list of names, or nothing."""
        value = self.get(name, ())
        found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
        if found is None or not all(isinstance(item, str) for item in found):
            raise AdapterError(f"{self.where}: '{name}' is not a list of names", "correct the config")
        return found

    def choice(self, name: str, known: tuple[Any, ...], default: Any = None) -> Any:
        """A field that must have one of the values we know.

        Raises:
            AdapterError: it has another one.
        """
        value = self.get(name, default)
        if not any(type(value) is type(one) and value == one for one in known):
            words = ", ".join(repr(one) for one in known)
            raise AdapterError(f"{self.where}: '{name}' is {value!r}; known are {words}", "update adapterkit")
        return value

    def patterned(self, name: str, patterns: str, module: str) -> float:
        """A number that a map of patterns may give a module of its own.

        Raises:
            AdapterError: it is missing or not a number.
        """
        own = self.pattern(patterns, module)
        return self.number(name) if own is None else own

    def scaling(self, module: str, rank: int, alpha_field: str = "lora_alpha") -> float:
        """alpha/r, or alpha/sqrt(r) for rsLoRA (arXiv:2312.03732), with the module's own alpha.

        Args:
            module: path without ``base_model.model.``.
            rank: rank of the factors as stored.
            alpha_field: what the method calls alpha.

        Raises:
            AdapterError: the config gives this module another rank than its factors have.
        """
        said = self.pattern("rank_pattern", module)
        expected = self.get("r") if said is None else said
        if expected is not None and expected != rank:
            raise AdapterError(
                f"{self.where}: {module} has rank {rank} in the file and {expected} in the config",
                "one of the two was edited; restore the config that was saved with the weights",
            )
        alpha = self.patterned(alpha_field, "alpha_pattern", module)
        return float(alpha) / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def pattern(self, name: str, module: str) -> float | None:
        """The value of the first pattern that matches, in the file's own order, as PEFT's ``get_pattern_key`` has it.

        A pattern is a regular expression anchored at the end of the path and at a dot before it; the first match wins,
        not the most specific one.

        Raises:
            AdapterError: a pattern is not valid, or its value is not a number.
            UnsafeError: the patterns take too long to match.
        """
        for pattern, value in self._patterns(name).candidates(module):
            if self._matches(pattern, module):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
                    raise AdapterError(
                        f"{self.where}: the value of pattern '{pattern[:60]}' is not a number", "correct it"
                    )
                return value
        return None

    def _patterns(self, name: str) -> _Patterns:
        found = self._sorted.get(name)
        if found is None:
            found = self._sorted[name] = _Patterns(self.mapping(name))
        return found

    def is_whole(self, pattern: str, module: str) -> bool:
        """Whether a pattern is the whole path of a module, as PEFT matches ``target_modules`` given as one string.

        Raises:
            AdapterError, UnsafeError: as `pattern`.
        """
        return self._matches(pattern, module, whole=True)

    def _matches(self, pattern: str, module: str, whole: bool = False) -> bool:
        if _DOTTED.fullmatch(pattern) and not whole:
            return _dotted(pattern, module)
        if len(pattern) > MAX_PATTERN or _repeats(pattern) > MAX_REPEATS:
            raise UnsafeError(f"{self.where}: pattern '{pattern[:60]}' was made to hang", "do not use this adapter")
        import regex

        started = time.thread_time()
        try:
            left = PATTERN_TIMEOUT - self._spent[0]
            if left <= 0:
                raise TimeoutError
            return _compiled(pattern, whole).match(module, timeout=left) is not None
        except (TimeoutError, MemoryError):
            raise UnsafeError(
                f"{self.where}: pattern '{pattern[:60]}' takes too long to match", "do not use this adapter"
            ) from None
        except (regex.error, re.error, RecursionError, OverflowError, ValueError) as error:
            raise AdapterError(
                f"{self.where}: pattern '{pattern[:60]}' is not valid ({error})", "correct the config"
            ) from None
        finally:
            self._spent[0] += time.thread_time() - started

    def unknown_fields(self, known: frozenset[str]) -> list[str]:
        """Fields that are not known and say something: a newer PEFT may mean another formula by them."""
        return sorted(
            name for name, value in self.raw.items() if name not in known and not decides_nothing(name, value)
        )


class _Patterns:
    """A map of patterns, arranged so that a module is not held against all of them.

    Most maps name whole paths. A pattern of plain characters and dots can only match the end of a path that has the same
    segments, but for a dot, which matches any one character; so those are looked up by their length and what stands
    between their dots. The others, real expressions, are tried one after the other.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._others: list[tuple[int, str, Any]] = []
        self._plain: dict[tuple[int, ...], dict[str, tuple[int, str, Any]]] = {}
        for number, (pattern, value) in enumerate(given.items()):
            if _DOTTED.fullmatch(pattern):
                shape = (len(pattern), *(at for at, char in enumerate(pattern) if char == "."))
                key = pattern.replace(".", "")
                self._plain.setdefault(shape, {}).setdefault(key, (number, pattern, value))
            else:
                self._others.append((number, pattern, value))

    def candidates(self, module: str) -> Iterator[tuple[str, Any]]:
        """Pattern and value of those that may match, in the order of the map."""
        found = list(self._others)
        for (length, *dots), known in self._plain.items():
            end = module[-length:] if length <= len(module) else ""
            if not end:
                continue
            key = "".join(char for at, char in enumerate(end) if at not in dots) if dots else end
            if (one := known.get(key)) is not None:
                found.append(one)
        for _, pattern, value in sorted(found, key=lambda one: one[0]):
            yield pattern, value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


@lru_cache(maxsize=4096)
def _compiled(pattern: str, whole: bool) -> Any:
    """``regex`` matches, for it can stop in time; but only what ``re`` takes, which is what training used.

    So there is no recursion (which eats memory faster than any limit of time stops it) and no fuzzy matching.
    """
    import warnings

    import regex

    if _FUZZY.search(pattern):
        raise ValueError("a brace without a count")
    # The groups stand as in PEFT's own expression, so that back-references count the same.
    text = rf"({pattern})\Z" if whole else rf"(.*\.)?({pattern})$"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        re.compile(text)
    return regex.compile(text)


def _repeats(pattern: str) -> int:
    """How many times a pattern repeats something, all its counts multiplied."""
    counts = [max(int(low or 0), int(high or 0), 1) for low, high in _REPEAT.findall(pattern)]
    return math.prod(counts)


def _dotted(pattern: str, module: str) -> bool:
    """A pattern of plain characters and dots (each matching any one character) at the end of a path."""
    start = len(module) - len(pattern)
    if start < 0 or (start > 0 and module[start - 1] != ".") or not module.endswith(pattern.rpartition(".")[2]):
        return False
    return all(p in (".", c) for p, c in zip(pattern, module[start:], strict=True))
