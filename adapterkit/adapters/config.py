"""``adapter_config.json`` as data: what kind of adapter it is and how strongly each module is scaled.

Nothing in a config is ever executed: classes it names are not imported, and its patterns are matched with a bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import AdapterError, UnsafeError

PATTERN_TIMEOUT = 2.0  # seconds for one match; a pattern that needs longer was made to hang
MAX_PATTERN = 4096
_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")

# Fields every PEFT method has, and what PEFT's own loader does with them; none changes a merged weight by itself.
COMMON_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
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


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of one adapter config.

    Attributes:
        raw: every field as it stands in the file.
        where: what to call the file in an error.
    """

    raw: Mapping[str, Any]
    where: str

    @property
    def peft_type(self) -> str:
        return str(self.raw.get("peft_type") or "").upper()

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
    def peft_version(self) -> tuple[int, int]:
        """Major and minor of the PEFT that wrote it; PEFT before 0.18 did not say, so (0, 17) when it is missing.

        Raises:
            AdapterError: it is there and not a version.
        """
        said = str(self.get("peft_version", "0.17"))
        match = re.match(r"(\d+)\.(\d+)", said)
        if match is None:
            raise AdapterError(f"{self.where}: 'peft_version' is {said!r}, not a version", "correct the config")
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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"{self.where}: '{name}' is {value!r}, not a number", "correct the config")
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

    def patterned(self, name: str, patterns: str, module: str) -> float:
        """A number that a map of patterns may give a module of its own.

        Raises:
            AdapterError: it is missing or not a number.
        """
        own = pattern_value(self.mapping(patterns), module, self.where)
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
        said = pattern_value(self.mapping("rank_pattern"), module, self.where)
        expected = self.get("r") if said is None else said
        if expected is not None and expected != rank:
            raise AdapterError(
                f"{self.where}: {module} has rank {rank} in the file and {expected} in the config",
                "one of the two was edited; restore the config that was saved with the weights",
            )
        alpha = self.patterned(alpha_field, "alpha_pattern", module)
        return float(alpha) / (math.sqrt(rank) if self.flag("use_rslora") else rank)

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

    def unknown_fields(self, known: frozenset[str]) -> list[str]:
        """Fields that are not known and say something: a newer PEFT may mean another formula by them."""
        return sorted(
            name for name, value in self.raw.items() if name not in known and value not in (None, False, "", [], {})
        )


def pattern_value(patterns: Mapping[str, Any], module: str, where: str) -> float | None:
    """The value of the first pattern that matches, in the file's own order, as PEFT's ``get_pattern_key`` has it.

    A pattern is a regular expression anchored at the end of the path and at a dot before it; the first match wins, not
    the most specific one.
    """
    for pattern, value in patterns.items():
        if _matches(pattern, module, where):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise AdapterError(f"{where}: the value of pattern '{pattern[:60]}' is not a number", "correct it")
            return value
    return None


def _matches(pattern: str, module: str, where: str) -> bool:
    if len(pattern) > MAX_PATTERN:
        raise UnsafeError(f"{where}: a pattern of {len(pattern)} characters", "do not use this adapter")
    if _LITERAL.fullmatch(pattern) and "." not in pattern:
        return module == pattern or module.endswith("." + pattern)
    return _bounded(rf"(?:.*\.)?(?:{pattern})$", pattern, module, where)


def full_match(pattern: str, module: str, where: str) -> bool:
    """Whether a pattern is the whole path, as PEFT matches ``target_modules`` given as one string."""
    if len(pattern) > MAX_PATTERN:
        raise UnsafeError(f"{where}: a pattern of {len(pattern)} characters", "do not use this adapter")
    return _bounded(rf"(?:{pattern})\Z", pattern, module, where)


def _bounded(expression: str, pattern: str, module: str, where: str) -> bool:
    import regex

    try:
        return regex.match(expression, module, timeout=PATTERN_TIMEOUT) is not None
    except TimeoutError:
        raise UnsafeError(
            f"{where}: pattern '{pattern[:60]}' takes too long to match", "do not use this adapter"
        ) from None
    except regex.error as error:
        raise AdapterError(f"{where}: pattern '{pattern[:60]}' is not valid ({error})", "correct the config") from None
