"""The table of architectures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from adapterkit.errors import TargetError
from adapterkit.gguf.arch import (
    coded,
    coded_encoders,
    coded_moe,
    coded_more,
    dense,
    encoders,
    further,
    gemma,
    hybrid,
    latent,
    moe,
    older,
    remote,
    rerank,
    rwkv,
    seq2seq,
    wholes,
    windows,
)
from adapterkit.gguf.arch.fixed import FIXED, NEVER_LORA, NO_LORA
from adapterkit.gguf.arch.rope import fixed_bounds

if TYPE_CHECKING:
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.spec import ArchSpec

_ROWS: tuple[ArchSpec, ...] = (
    *dense.SPECS,
    *gemma.SPECS,
    *moe.SPECS,
    *older.SPECS,
    *hybrid.SPECS,
    *encoders.SPECS,
    *further.SPECS,
    *windows.SPECS,
    *latent.SPECS,
    *wholes.SPECS,
    *seq2seq.SPECS,
    *remote.SPECS,
    *coded.SPECS,
    *coded_encoders.SPECS,
    *coded_moe.SPECS,
    *coded_more.SPECS,
    *rwkv.SPECS,
    *rerank.SPECS,
)


def _under_contract(row: ArchSpec) -> ArchSpec:
    kind = row.model_type
    return replace(
        row,
        fixed=(*row.fixed, *FIXED.get(kind, ()), *fixed_bounds(row)),
        no_lora=(*NEVER_LORA, *row.no_lora, *NO_LORA.get(kind, ())),
    )


SPECS: tuple[ArchSpec, ...] = tuple(_under_contract(row) for row in _ROWS)


# Ends of class names of models whose head is no language model's.
_HEADS = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    *("ForImageClassification", "RewardModel", "ForRewardModel", "ForReward"),
)


@cache
def _by_class() -> dict[str, ArchSpec]:
    found: dict[str, ArchSpec] = {}
    for spec in SPECS:
        for name in spec.classes:
            found.setdefault(name, spec)
    return found


@cache
def _by_type() -> dict[str, ArchSpec]:
    found: dict[str, ArchSpec] = {}
    for spec in SPECS:
        for name in spec.model_types:
            found.setdefault(name, spec)
    return found


def classes() -> dict[str, str]:
    """Classes of ``architectures`` that convert, and the architecture that each becomes.

    Of a whole model with a text part of any kind the architecture is ``its text part's``.
    """
    whole = dict.fromkeys(wholes.WRAPPERS, "its text part's")
    return {**whole, **{name: spec.arch for name, spec in _by_class().items()}}


def spec_of(config: Config) -> ArchSpec:
    """The row of a Hugging Face model.

    Raises:
        TargetError: there is none; the sentence names the road that works.
    """
    for name in config.classes:
        found = _by_class().get(name)
        if found is None and name in wholes.WRAPPERS:
            found = _by_type().get(config.model_type)
        if found is not None:
            return _variant(found, config)
    if config.classes:
        raise _unknown(config)
    raw = str(config.raw.get("model_type") or "")
    for name in dict.fromkeys((config.model_type, raw)):
        found = _by_type().get(name)
        if found is not None:
            return _variant(found, config)
    raise _unknown(config)


def _unknown(config: Config) -> TargetError:
    raw = str(config.raw.get("model_type") or "")
    named = (*config.classes, raw, str(config.raw.get("_class_name") or ""))
    head = next((word for word in _HEADS if config.classes and config.classes[0].endswith(word)), None)
    if head is not None:
        return TargetError(
            f"{config.ref}: llama.cpp has no place for the head of a {config.classes[0]}, which would be left out",
            f"serve it with transformers, or convert the model without its head ({raw or 'its base class'})",
        )
    if not any(named):
        return TargetError(
            f"{config.ref}: its config.json names no architecture, so nobody can tell how GGUF stores it",
            "add the config.json that the base was published with",
        )
    return TargetError(
        f"{config.ref}: how GGUF stores a {next(filter(None, named))} is not known here",
        "take a GGUF of the base as it is published, and merge into that: adapterkit merge BASE.gguf ADAPTER -o OUT.gguf",
    )


def _variant(found: ArchSpec, config: Config) -> ArchSpec:
    """Of rows that share a class, the one for this config."""
    if found.variant is None:
        return found
    other = found.variant(config)
    return next(spec for spec in SPECS if spec.model_type == other) if other is not None else found


def specs_of(arch: str) -> tuple[ArchSpec, ...]:
    """The rows of an architecture as GGUF names it."""
    return tuple(spec for spec in SPECS if spec.arch == arch)
