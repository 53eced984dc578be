"""What a ``config.json`` has to say about weights, by class: from the table ``classes.json``.

Which class does a task for a model type, what that class has beside its base model, which dimensions of it count labels
or tokens, and what else happens when embeddings are no longer tied. The table is made from transformers by
``tools/make_classes.py``; transformers itself is never imported.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FLAG = "tie_word_embeddings"


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The table of classes; see ``about`` in it for its source and licence."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("classes.json").read_text(encoding="utf-8"))
    return data


@dataclass(frozen=True)
class Counted:
    """A dimension of a parameter that is ``factor`` times a number of the config, plus ``offset``."""

    parameter: str
    dim: int
    factor: int
    offset: int

    def number(self, shape: tuple[int, ...]) -> int | None:
        """The number that a parameter of this shape says; None where it can say none."""
        if self.dim >= len(shape):
            return None
        number, rest = divmod(shape[self.dim] - self.offset, self.factor)
        return number if not rest and number > 0 else None


@dataclass(frozen=True)
class Head:
    """A model class with a head.

    Attributes:
        name: of the class.
        prefix: under which its base model stands.
        own: its parameters outside of the base model; a name that ends with a dot is a whole module.
        labels, tokens: which dimensions count ``num_labels``, and those outside the base model that count ``vocab_size``.
        partly: of ``own`` only what is counted is known, and whether there is a base model inside is not: some classes
            have its parts in themselves (SigLIP), some have more of their own than the table holds (DPT).
        inner: modules of its base model that another base model of the type may be without, each with a dot behind: the
            pooler of BERT for classification.
    """

    name: str
    prefix: str
    own: frozenset[str]
    labels: tuple[Counted, ...]
    tokens: tuple[Counted, ...]
    partly: bool = False
    inner: frozenset[str] = frozenset()

    def has(self, parameter: str) -> bool:
        """Whether a parameter stands outside of the base model."""
        return parameter in self.own or any(one[-1] == "." and parameter.startswith(one) for one in self.own)


def head(name: str) -> Head | None:
    """The class of that name; None where the table has none."""
    row = table()["heads"].get(name)
    if row is None:
        return None
    labels, tokens = (tuple(Counted(*one) for one in row.get(key, ())) for key in ("labels", "tokens"))
    own = frozenset(row.get("own", ()))
    partly = not own
    if partly:
        own = frozenset(one.parameter for one in (*labels, *tokens))
    return Head(name, row.get("prefix", ""), own, labels, tokens, partly, frozenset(row.get("inner", ())))


def class_for(task: str, model_type: str) -> str | None:
    """The class that does ``task`` (PEFT's ``task_type``) for a model type."""
    found: str | None = table()["tasks"].get(task, {}).get(model_type)
    return found


def classes_with(parameters: Iterable[str], model_type: str) -> list[str]:
    """The classes of a model type that have all of ``parameters`` beside their base model."""
    wanted = list(parameters)
    names = {types[model_type] for types in table()["tasks"].values() if model_type in types}
    return [name for name in sorted(names) if (one := head(name)) is not None and all(map(one.has, wanted))]


@dataclass(frozen=True)
class Untying:
    """What a class does when its embeddings are tied no longer.

    Attributes:
        factor: by which the output layer has to be multiplied for the model to answer as before.
        stays: parameters that share their values whatever the flag says.
        resized: parameters that have another shape when they are tied no longer: they cannot be told apart.
        notes: what a user should know.
    """

    factor: float = 1.0
    stays: frozenset[str] = frozenset()
    resized: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def untying(name: str, config: Mapping[str, Any]) -> Untying:
    """What happens when the flag is turned off for the class called ``name``, whose parsed ``config.json`` is given."""
    data = table()
    new = data["untie"].get(name, {})
    old = data["untie4"].get(name)
    known_before = old is not None
    old = new if old is None else old
    notes = []
    width, before = new.get("scale"), old.get("scale")
    stays = frozenset(new.get("stays", ())) & frozenset(old.get("stays", ()))
    size = config.get(width or before)
    factor = 1.0
    if width and isinstance(size, int) and size > 0:
        factor = float(size) ** -0.5
        notes.append(
            f"{name} divides what its output layer reads by the square root of {width} only while embeddings are tied; "
            "the output layer was multiplied by that factor"
        )
    elif before and known_before:
        notes.append(
            f"transformers 4 multiplies the logits of {name} by the square root of {before} when embeddings are not tied, "
            "and version 5 does not; the folder is right for version 5"
        )
    return Untying(factor, stays, frozenset(new.get("resized", ())), tuple(notes))


def flag_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of ``config.json`` that decide whether embeddings are tied; the first is always a key of the format."""
    kinds = [config, *(part for part in config.values() if hasattr(part, "get"))]
    more = [key for part in kinds for key in table()["flags"].get(str(part.get("model_type") or ""), ())]
    return tuple(dict.fromkeys((FLAG, *more)))
