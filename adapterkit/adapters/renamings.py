"""What a model class does to checkpoint names when it loads them, from the table ``names.json``.

`Loader` is that part of a model loader which only needs names: the renamings and converters that apply to one
architecture and to the sub-models inside it, each within its own part of the module tree. The table is made from
transformers by ``tools/make_names.py``; transformers itself is never imported.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The naming table; see ``about`` in it for its source and licence."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
    return data


@dataclass
class Branch:
    """One pattern. ``needle`` is text that every match contains, so most names never meet the regular expression."""

    needle: str
    pattern: str
    replacement: str

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def search(self, name: str) -> re.Match[str] | None:
        return self.regex.search(name) if self.needle in name else None


@dataclass
class Renaming:
    """A renaming, or a converter when it has ``ops``.

    ``scopes`` are the name prefixes under which it applies, tried in order (``("",)`` for the root model's own rules).
    ``guarded`` rules rename in a shifting way (``norm0 -> norm1 -> norm2``): nothing happens before the first branch
    was seen. ``offset`` is added to a captured number. A ``paired`` rule reads two layers of a file as one of the module
    tree: ``layers.{2i}`` and ``layers.{2i+1}`` become parts of ``layers.{i}``, the part by its own name where ``named``
    has it, else by whether the layer is the first or the second.
    """

    branches: list[Branch]
    scopes: tuple[str, ...]
    guarded: bool = False
    offset: int | None = None
    paired: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    ops: list[list[Any]] = field(default_factory=list)
    active: bool = False

    def match(self, name: str) -> tuple[str, re.Match[str], int] | None:
        """``(prefix left alone, match, branch)``: the leftmost match, the longer pattern first among equals."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        if scope is None:
            return None
        rest = name[len(scope) :]
        found: tuple[str, re.Match[str], int] | None = None
        for index in sorted(range(len(self.branches)), key=lambda i: -len(self.branches[i].pattern)):
            match = self.branches[index].search(rest)
            if match and (found is None or match.start() < found[1].start()):
                found = (scope, match, index)
        return found

    def apply(self, name: str) -> tuple[str, int | None]:
        """The new name, and which branch made it (None: the rule does not apply)."""
        found = self.match(name)
        if found is None:
            return name, None
        scope, match, index = found
        if self.paired:
            layer, part = int(match.group(1)), match.group(2)
            part = self.named.get(part, self.paired[layer % len(self.paired)])
            rest = name[len(scope) :]
            there = f"layers.{layer // len(self.paired)}.{part}"
            return scope + rest[: match.start()] + there + rest[match.end() :], index
        if self.guarded:
            self.active = self.active or index == 0
            if not self.active:
                return name, None
        replacement = self.branches[index].replacement
        for number, text in enumerate(match.groups(), 1):
            if text is not None and f"\\{number}" in replacement:
                shifted = text if self.offset is None else str(int(text) + self.offset)
                replacement = replacement.replace(f"\\{number}", shifted)
        # the first occurrence of the matched text, as the loader does it, which need not be the match itself
        return scope + name[len(scope) :].replace(match.group(0), replacement, 1), index


def rule(entry: Any, scopes: tuple[str, ...]) -> Renaming:
    """A `Renaming` from its table entry; the forms are made by ``tools/make_names.py``."""
    if isinstance(entry, list):
        return Renaming([Branch(*entry)], scopes)
    if "any" in entry:
        return Renaming([Branch(*branch) for branch in entry["any"]], scopes)
    if "group" in entry:
        return Renaming([Branch(*branch) for branch in entry["group"]], scopes, guarded=True)
    if "paired" in entry:
        return Renaming([Branch(*entry["rename"])], scopes, paired=tuple(entry["paired"]), named=entry["named"])
    if "offset" in entry:
        return Renaming([Branch(*entry["rename"])], scopes, offset=entry["offset"])
    first = entry["to"][0]
    branches = [Branch(needle, pattern, first) for needle, pattern in entry["from"]]
    return Renaming(branches, scopes, targets=entry["to"], ops=entry["ops"])


class Loader:
    """The renamings and converters of the model that ``config`` (the parsed ``config.json``) describes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        data = table()
        named = config.get("architectures")
        first = named[0] if isinstance(named, list) and named else None
        self.model_type = str(config.get("model_type") or "")
        known = isinstance(first, str) and first in data["classes"]
        self.name = str(first) if known else self._auto(self.model_type, "Model")
        usual = data["types"].get(self.model_type, ["", ""])[1]
        self.prefix: str = self._class(self.name)[1] if self.name in data["classes"] else usual
        # what a model with a head calls this model, where the model itself has no word for it
        self.outer: str = self.prefix or usual

    @staticmethod
    def _class(name: str) -> list[Any]:
        """``[model type, base model prefix, sub-models, ties, stacked weights, turned weights]`` of a class."""
        row = table()["classes"].get(name, [])
        return [*row, *["", "", [], {}, [], []][len(row) :]]

    @staticmethod
    def _auto(model_type: str, like: str) -> str:
        """The class of ``model_type`` that does what the class called ``like`` does for its own type."""
        data = table()
        base: str = data["types"].get(model_type, [""])[0]
        head = re.search(r"For[A-Z]\w*$", like)
        if head and (name := base.removesuffix("Model") + head.group(0)) in data["classes"]:
            return name
        return base

    @cached_property
    def tree(self) -> list[tuple[str, str, str]]:
        """``(path, class, model type)`` of the model and its sub-models, parents first."""

        def walk(path: str, name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
            row = self._class(name)
            kind = str(config.get("model_type") or row[0]) if path == "" else row[0]
            yield path, name, kind
            for below, child, key in row[2]:
                inner = config.get(key, {}) if key else config
                inner = inner if isinstance(inner, dict) else {}
                kind = inner.get("model_type") if key else None
                if isinstance(kind, str) and kind != self._class(child)[0]:
                    child = self._auto(kind, child) or child
                yield from walk(f"{path}.{below}" if path else below, child, inner)

        return list(walk("", self.name, self._config))

    @cached_property
    def rules(self) -> list[Renaming]:
        """All rules, in the loader's order: a sub-model's own where no model above it has claimed its class or type."""
        data = table()

        def entries(key: str) -> list[Any] | None:
            return data["rules"].get(data["same"].get(key, key)) if key else None

        found: list[Renaming] = []
        seen: list[tuple[str, str]] = []
        for path, name, kind in self.tree:
            above = {key for key, where in seen if where == "" or path.startswith(where + ".")}
            if name and name in above:
                continue
            own = entries(name)
            if own is None and kind in above:
                continue
            here = own if own is not None else entries(kind)
            if here is None:
                continue
            scope = path.removeprefix(self.prefix).removeprefix(".") if path else ""
            below = scope + "." if scope else ""
            base = self.prefix + "." if self.prefix else ""
            scopes = tuple(dict.fromkeys((base + below, below))) if path else ("",)
            found += [rule(entry, scopes) for entry in here]
            seen.append((name, path))
            if own is None:
                seen.append((kind, path))
        return found + [rule(entry, ("",)) for entry in data["rules"]["legacy"]]

    @cached_property
    def _numbers_matter(self) -> bool:
        """Whether some rule looks at the value of a number that stands alone between dots."""
        literal = re.compile(r"(?<![\w\\])(?:\d|\\d(?!\+))|\[[^]]*\d")
        patterns = [branch.pattern for rule in self.rules for branch in rule.branches]
        return any(map(literal.search, patterns)) or any(rule.offset is not None or rule.paired for rule in self.rules)

    def rename(self, name: str) -> tuple[str, Renaming | None, int]:
        """``name`` after all renamings and at most one converter, that converter, and which of its sources it was."""
        for one in self.rules:
            if not one.ops:
                name, _ = one.apply(name)
        for one in self.rules:
            if one.ops:
                new, index = one.apply(name)
                if index is not None:
                    return new, one, index
        return name, None, 0

    def rename_all(self, names: Iterable[str]) -> Iterator[tuple[str, str, Renaming | None, int]]:
        """``(name, *rename(name))`` of each name; layers that differ in their number only are worked out once."""
        if self._numbers_matter:
            for name in names:
                yield (name, *self.rename(name))
            return
        known: dict[str, tuple[list[str], Renaming | None, int]] = {}
        stand_in = re.compile(r"7777(\d+)7777")
        for name in names:
            if "7777" in name:
                yield (name, *self.rename(name))
                continue
            parts = name.split(".")
            numbers: list[str] = []
            for index, part in enumerate(parts):
                if part.isdecimal():
                    parts[index] = f"7777{len(numbers)}7777"
                    numbers.append(part)
            template = ".".join(parts)
            if template not in known:
                new, one, source = self.rename(template)
                known[template] = (stand_in.split(new), one, source)
            pieces, one, source = known[template]
            if len(pieces) > 1:
                pieces = [numbers[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces)]
            yield name, "".join(pieces), one, source

    @cached_property
    def stacked(self) -> set[str]:
        """Last two parts of the names of three-dimensional weights that are stacked matrices, not convolutions."""
        return {leaf for _, name, _ in self.tree for leaf in self._class(name)[4]}

    @cached_property
    def turned(self) -> set[str]:
        """Last two parts of the names of stacked experts that a module keeps as ``[experts, in, out]``, and says so."""
        return {leaf for _, name, _ in self.tree for leaf in self._class(name)[5]}

    @cached_property
    def ties(self) -> list[tuple[str, str, str]]:
        """``(path, pattern, source)``: below ``path``, what starts like ``pattern`` may be stored as ``source``."""
        return [
            (path, target, source) for path, name, _ in self.tree for target, source in self._class(name)[3].items()
        ]
