"""Heads that adapters bring: which class the merged model is, how many labels it has, and how its tensors are called.

A task's head is trained from nothing, or in another size than the base's. The class comes from what the adapter says of
its own training (``auto_mapping``), else from its task and the base's model type, else from the names of what it brings
where only one class has them. A class is never made up: where nothing tells, the config stays and a note says so.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.classes import class_for, classes_with, head
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.classes import Head
    from adapterkit.adapters.names import Names
    from adapterkit.adapters.ties import Weighted
    from adapterkit.checkpoint.checkpoint import Checkpoint

# Tasks whose classes are told apart by nothing but their names: the heads of all are called alike.
_NAMED_ALIKE = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
DEFAULT_LABELS = 2
OWN_NUMBER = {"pvt": 1000}
"""Model types whose config has a number of labels of its own, which wins over the list of their names: its default."""


@dataclass(frozen=True)
class Brought:
    """What adapters say of the merged model's head.

    Attributes:
        name: of the class, where it is another one than the base's; None otherwise.
        labels: their number, where the config says another one.
        tokens: ``vocab_size``, where the head says another one.
        prefix: under which the base's tensors have to stand beside the head; "" where they stand so already.
        notes: what a user should know.
    """

    name: str | None = None
    labels: int | None = None
    tokens: int | None = None
    prefix: str = ""
    notes: tuple[str, ...] = field(default=())


def trained_class(adapter: Adapter, config: Mapping[str, Any]) -> str | None:
    """The class that an adapter was trained on, as far as it says so and the table knows it."""
    said = adapter.config.get("auto_mapping")
    if isinstance(said, dict):
        name = said.get("base_model_class")
        return name if isinstance(name, str) and head(name) is not None else None
    return class_for(str(adapter.config.get("task_type") or ""), str(config.get("model_type") or ""))


def base_class(config: Mapping[str, Any]) -> str | None:
    """The class that a ``config.json`` names."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def may_resize(
    parameter: str, old: tuple[int, ...], new: tuple[int, ...], adapter: Adapter, config: Mapping[str, Any]
) -> bool:
    """Whether a parameter that an adapter brings whole may have another size than the base's: it counts labels or tokens.

    Where the class is not known, a head of another length (the first dimension alone) is taken as one.
    """
    if len(old) != len(new):
        return False
    apart = [dim for dim, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    known = [one for name in (trained_class(adapter, config), base_class(config)) if name and (one := head(name))]
    for one in known:
        for counted in (*one.labels, *one.tokens):
            if counted.parameter == parameter and apart == [counted.dim] and counted.number(new) is not None:
                return True
    return not any(one.has(parameter) for one in known) and apart == [0] and not known


def brought(edits: Iterable[Weighted], config: Mapping[str, Any], tensors: Iterable[str]) -> Brought:
    """What adapters that bring whole parameters say of the model's head."""
    found: dict[str, tuple[int, ...]] = {}
    adapters: dict[int, Adapter] = {}
    added: list[str] = []
    for item in edits:
        new = item.edit.change.replaced
        if new is None:
            continue
        found[item.edit.target.parameter] = new.shape
        adapters[id(item.adapter)] = item.adapter
        if item.edit.change.how == ADDED:
            added.append(item.edit.target.parameter)
    if not found:
        return Brought()
    was = base_class(config)
    one = _class(list(adapters.values()), config, added)
    if one is None or not any(map(one.has, found)):
        one = None if was is None or added else head(was)
        if one is None:
            return Brought(notes=_unknown(added, was))
        return _sizes(Brought(), one, found, config)
    if was == one.name or (not added and not _told_by_task(list(adapters.values()), one, was)):
        return _sizes(Brought(), head(was) or one if was else one, found, config)
    prefix = one.prefix + "." if one.prefix else ""
    beside = prefix and added and not any(name.startswith(prefix) for name in tensors)
    if one.partly:  # then the names of the adapter's modules say whether there is a base model inside
        beside = beside and any(key.startswith(prefix) for adapter in adapters.values() for key in adapter.tensors)
    return _sizes(Brought(one.name, prefix=prefix if beside else ""), one, found, config)


ADDED = "added by the adapter"


def _class(adapters: Sequence[Adapter], config: Mapping[str, Any], added: Sequence[str]) -> Head | None:
    for adapter in adapters:
        name = trained_class(adapter, config)
        if name is None or (one := head(name)) is None:
            continue
        if adapter.config.get("auto_mapping") or _holds(one, added):
            return one
    if any(adapter.config.get("auto_mapping") for adapter in adapters) or not added:
        return None
    only = classes_with(added, str(config.get("model_type") or ""))
    return head(only[0]) if len(only) == 1 else None


def _holds(one: Head, added: Sequence[str]) -> bool:
    """Whether a class holds all of these: in its own modules, or in its base model, of which a base may lack the pooler.

    Buffers (of a batch norm) stand beside their parameters.
    """
    modules = {name.partition(".")[0] for name in one.own} | ({one.prefix} if one.prefix else set())
    return all(one.has(name) or name.partition(".")[0] in modules for name in added)


def _told_by_task(adapters: Sequence[Adapter], one: Head, was: str | None) -> bool:
    """Whether an adapter that adds nothing says by its task that the class is another one than the base's."""
    return was is None or any(
        adapter.config.get("auto_mapping") or adapter.config.get("task_type") in _NAMED_ALIKE for adapter in adapters
    )


def _unknown(added: Sequence[str], was: str | None) -> tuple[str, ...]:
    if not added:
        return ()
    named = f"architectures: [{was}]" if was else "no architectures"
    return (
        (
            f"the adapter adds {', '.join(sorted(added)[:3])}, and neither its config nor the table of classes says which "
            f"class that belongs to; config.json keeps {named}, and whether it loads was not checked"
        ),
    )


def unheld(
    found: Brought, adapters: Sequence[Adapter], config: Mapping[str, Any], held: Iterable[str], names: Names
) -> str:
    """What the class with a head has and neither the base nor the adapters hold, in one sentence; "" where that is nothing.

    Training had it too, filled with random numbers that were saved nowhere.

    Args:
        held: every tensor of the merged model.
    """
    trained = [
        name
        for adapter in adapters
        if adapter.config.get("auto_mapping") or adapter.config.get("task_type") in _NAMED_ALIKE
        if (name := trained_class(adapter, config)) is not None
    ]
    one = next((row for name in (found.name, *trained, base_class(config)) if name and (row := head(name))), None)
    if one is None or not one.labels:
        return ""
    lead = one.prefix + "." if one.prefix else ""
    every = {name.removeprefix(lead) for name in (*held, *names.parameters())}
    wanted = [*sorted(one.own), *(lead + module for module in sorted(one.inner))]
    lost = [
        name
        for name in wanted
        if not _held(name.removeprefix(lead), every)
        and names.tied(f"{name}weight" if name.endswith(".") else name) is None
    ]
    if not lost:
        return ""
    modules = list(dict.fromkeys(name.rstrip(".") if name.endswith(".") else name.partition(".")[0] for name in lost))
    return (
        f"{one.name} has {', '.join(modules)}, which neither the base nor the adapter holds: what loads it fills that "
        "with random numbers, as training did without saving them (train it, or save it, with modules_to_save)"
    )


def _held(name: str, every: set[str]) -> bool:
    return any(one.startswith(name) for one in every) if name.endswith(".") else name in every


def _sizes(start: Brought, one: Head, found: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Brought:
    labels = {n for c in one.labels if c.parameter in found and (n := c.number(found[c.parameter])) is not None}
    tokens = {n for c in one.tokens if c.parameter in found and (n := c.number(found[c.parameter])) is not None}
    changed = replace(start)
    if len(labels) == 1 and labels != {labels_of(config)}:
        changed = replace(changed, labels=labels.pop())
    if len(tokens) == 1 and tokens != {config.get("vocab_size")}:
        changed = replace(changed, tokens=tokens.pop())
    return changed


def labels_of(config: Mapping[str, Any]) -> int:
    """How many labels a model with this config has."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    number = config.get("num_labels", config.get("_num_labels"))
    usual = OWN_NUMBER.get(str(config.get("model_type")), DEFAULT_LABELS)
    return number if isinstance(number, int) and not isinstance(number, bool) else usual


def with_head(config: dict[str, Any], head: Brought) -> None:
    """Write what ``head`` says into a parsed ``config.json``."""
    if head.name is not None:
        config["architectures"] = [head.name]
    if head.labels is not None:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(head.labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(head.labels)}
        for key in ("num_labels", "_num_labels"):
            config.pop(key, None)
        if config.get("model_type") in OWN_NUMBER:
            config["num_labels"] = head.labels
    if head.tokens is not None:
        config["vocab_size"] = head.tokens


def prefixes(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> list[str]:
    """Under which names the classes that adapters were trained on hold their base model."""
    classes = [head(name) for adapter in adapters if (name := trained_class(adapter, config)) is not None]
    return list(dict.fromkeys(one.prefix for one in classes if one is not None and one.prefix))


def prefixed(base: Checkpoint, head: Brought, names: Names) -> Checkpoint:
    """A checkpoint under the names that its base model has inside of the class with a head.

    Loaders look for a base model without prefix only where *no* tensor has one: transformers 4 would put a head that
    stands beside such tensors under the prefix too, and not find it. Some classes call their base model otherwise than
    their family does (``transformer`` in question answering).
    """
    from adapterkit.adapters.names import Names as Found

    own = names.prefix + "." if names.prefix and any(name.startswith(names.prefix + ".") for name in base) else ""

    def renamed(name: str) -> str:
        return head.prefix + name[len(own) :] if name.startswith(own) else name

    config = {**base.config, "architectures": [head.name]}
    tensors = {renamed(name): Renamed(renamed(name), tensor) for name, tensor in base.items()}
    after = Found({name: tensor.shape for name, tensor in tensors.items()}, config)
    if any(after.find(renamed(name)) is None for name in names.parameters() if names.find(name) is not None):
        return base
    shards = {renamed(name): shard for name, shard in base.shards.items()}
    return replace(base, tensors=tensors, shards=shards, config=config)
