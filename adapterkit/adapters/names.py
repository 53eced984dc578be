"""From the name of a parameter in a module tree to the checkpoint tensors that hold it.

An adapter names modules as the training library's classes did; a checkpoint names tensors as its first writer did; both
change over time. `Names` brings them together from the names, shapes and config in the headers alone, by the rules of
the architecture, never by guessing: what fits two tensors fits none.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.layout import MOST_BLOCKS, Layout, UnmappableError, lead_of, run, unrun, whole
from adapterkit.adapters.renamings import Loader, table
from adapterkit.adapters.stacks import experts, numbered
from adapterkit.adapters.target import Piece, Target
from adapterkit.checkpoint.pipeline import components

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.adapters.families.names import FamilyNames
    from adapterkit.adapters.renamings import Renaming

# Where a language model sits inside multimodal classes, and alone, over the years.
TEXT = (
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "text_model.",
    "language_model.",
    "model.",
)
HEAD = ("language_model.lm_head.", "model.language_model.lm_head.", "text_model.lm_head.", "lm_head.")

# The part of an any-to-any model that is trained is a model with a head itself.
OMNI = ("thinker.", "")

# The vision tower of Qwen's models, in transformers over the years and in MLX.
VISION = ("model.visual.", "visual.", "vision_tower.")

# A longer name is nobody's parameter: it is only ever matched as it stands.
LONGEST = 500

# Other names of the config fields that the rules ask for.
FIELDS = {
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_attention_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
}
TEXT_CONFIGS = ("text_config", "thinker_config", "llm_config", "language_config")


# The shape of each source tensor of a rule, and the (target, rows) that take from "key:number".
_Takers = tuple[list[tuple[int, ...]], dict[str, list[tuple[int, Piece]]]]


class _Group:
    """Tensors that one converter joins, and the parameters it makes of them."""

    def __init__(self, rule: Renaming, first: str) -> None:
        self.rule = rule
        self.sources: list[list[str]] = [[] for _ in rule.branches]
        head, found, tail = first.partition(rule.targets[0])
        self.parameters = [head + target + tail for target in rule.targets] if found else [first]


class Names:
    """The parameters of a checkpoint, by the names that adapters give them.

    ``shapes`` maps every tensor name in the checkpoint to its shape, ``config`` is its parsed ``config.json`` (``{}``
    when there is none: then only exact names are found).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
        self._stored_shapes = shapes
        self._config = config
        # Single experts of MLX's stacks, under the names that they have elsewhere: (stack, first row).
        self._experts: dict[str, tuple[str, int]] = {}
        self._shapes = shapes
        alone: dict[str, tuple[int, ...]] = {}
        for name, shape, stack, first in experts(shapes, self.model_types):
            alone[name], self._experts[name] = shape, (stack, first)
        if alone:
            self._shapes = {**shapes, **alone}
        self._targets: dict[str, Target | None] = {}
        self._parts: dict[tuple[int, tuple[tuple[int, ...], ...]], _Takers] = {}
        self._called: dict[str, str] = {}  # tensor -> its name in the module tree, filled in with `_known`
        self._layouts: dict[int, list[Layout] | None] = {}
        self._also: tuple[str, ...] = ()
        self.flat_names: dict[str, dict[str, set[str]]] = {}  # lead -> flat name -> modules; filled by `formats.parts`

    @cached_property
    def model_types(self) -> frozenset[str]:
        """The model type of the config and of the configs inside it."""
        parts = [self._config, *(part for part in self._config.values() if hasattr(part, "get"))]
        return frozenset(str(part.get("model_type") or "") for part in parts)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Of a pipeline, the folders that hold tensors; empty for a model."""
        return components(self._config)

    @cached_property
    def known_class(self) -> bool:
        """Whether the config names a model type that the table has, or a class of diffusers; of a file without a config,
        whether a family of image, video or sound models has its names."""
        if "_class_name" in self._config or not self.model_types.isdisjoint(table()["types"]):
            return True
        from adapterkit.adapters.families.names import family_of

        return not self._config and family_of(self._stored_shapes) is not None

    def find(self, parameter: str) -> Target | None:
        """Where ``parameter`` (a module-tree name without ``base_model.model.``) is stored; None if nowhere or unclear.

        A parameter that shares its storage with another one (an output layer tied to the embedding) is not found: ask
        `tied`.
        """
        if parameter not in self._targets:
            layout = self._resolve(parameter)
            if layout is None:
                layout = self._agreed(self._resolve(name) for name in self._repairs(parameter))
            if layout is None:
                layout = self.families.find(parameter)
            self._targets[parameter] = (
                None if layout is None else Target(parameter, layout.shape, layout.pieces, stacked=layout.lead > 1)
            )
        return self._targets[parameter]

    def tied(self, parameter: str) -> str | None:
        """The stored parameter that ``parameter`` shares its values with, when it is not stored under its own name."""
        if self.find(parameter) is not None:
            return None
        seen = {parameter}
        queue = [parameter, *self._repairs(parameter)]
        for name in queue:
            for path, pattern, source in self._loader.ties:
                scope = path + "." if path else ""
                if not name.startswith(scope):
                    continue
                rest = name[len(scope) :]
                match = re.match(pattern, rest)
                other = None
                if match and (match.end() in (0, len(rest)) or "." in (rest[match.end() - 1], rest[match.end()])):
                    other = scope + self._recurring(source, match.group(0)) + rest[match.end() :]
                elif rest.startswith(source) and re.fullmatch(r"[\w.]+", pattern):
                    other = scope + pattern + rest[len(source) :]
                if other is None or other in seen:
                    continue
                if self.find(other) is not None:
                    return other
                seen.add(other)
                queue.append(other)
        return None

    def sharers(self, parameter: str) -> list[str]:
        """The parameters that are declared to share their values with the stored ``parameter`` and have no own tensor."""
        target = self.find(parameter)
        found = []
        for path, pattern, source in self._loader.ties if target is not None else ():
            scope = path + "." if path else ""
            name = scope + pattern
            if not re.fullmatch(r"[\w.]+", pattern) or self.find(name) is not None:
                continue
            other = self.find(scope + source)
            if other is not None and target is not None and other.pieces == target.pieces:
                found.append(name)
        return found

    def declared_ties(self) -> list[tuple[str, str]]:
        """``(embedding, output layer)`` of every tie that the model class declares, whether or not this model uses it."""
        pairs = []
        for path, pattern, source in self._loader.ties:
            scope = path + "." if path else ""
            if re.fullmatch(r"[\w.]+", pattern):
                pairs.append((scope + source, scope + pattern))
        return pairs

    def followers(self) -> list[tuple[str, str]]:
        """``(stored parameter, one that shares its values and has no tensor of its own)`` of every tie declared by name."""
        found: dict[tuple[str, str], None] = {}
        for source, target in self.declared_ties():
            for one, other in ((source, target), (target, source)):
                if self.find(one) is not None and self.find(other) is None:
                    found[one, other] = None
        return list(found)

    def also_under(self, prefix: str) -> None:
        """Find what stands in the base model under ``prefix`` too, as a class calls it that adapters were trained on."""
        if prefix and prefix not in self._also:
            self._also += (prefix,)
            self._targets.clear()

    @property
    def prefix(self) -> str:
        """Under which the class that the config names holds its base model; "" where it is one."""
        return self._loader.prefix

    @cached_property
    def ties_by_pattern(self) -> bool:
        """Whether the model class declares ties that cannot be listed by name (layers that share blocks)."""
        return any(not re.fullmatch(r"[\w.]+", pattern) for _, pattern, _ in self._loader.ties)

    @property
    def class_name(self) -> str:
        """The model class that the config names, or the usual one of its model type; "" where neither is known."""
        return self._loader.name

    def stored_name(self, parameter: str, beside: str) -> str:
        """The tensor name under which a new parameter belongs, next to the existing tensor ``beside``.

        The loader must turn it into ``parameter``; an older spelling is taken when the tensors around it use one.
        """
        older = [name for name in (*self._repairs(parameter), "embed_out.weight") if name not in self._shapes]
        prefix = beside.partition(".")[0] + "."
        for name in older:
            if (name.startswith(prefix) or name == "embed_out.weight") and self._loader.rename(name)[0] == parameter:
                return name
        return parameter

    def turned(self, parameter: str) -> bool:
        """Whether ``parameter`` is a stack of experts whose module keeps it as ``[experts, in, out]``, and says so."""
        return ".".join(parameter.split(".")[-2:]) in self._loader.turned

    def find_module(self, module: str) -> tuple[str, ...]:
        """The parameters that the module called ``module`` holds itself, under that name (``{module}.weight``, ...)."""
        for name in (module, *self._repairs(module)):
            if name in self._modules:
                leaves = sorted(self._modules[name])
                return tuple(p for p in (f"{module}.{leaf}" for leaf in leaves) if self.find(p) is not None)
        return tuple(p for p in (f"{module}.weight", f"{module}.bias") if self.find(p) is not None)

    def nearest(self, parameter: str, n: int = 3) -> list[str]:
        """Up to ``n`` known names that look most like ``parameter``, for an error sentence."""
        import difflib

        number = re.compile(r"(?<=\.)\d+(?=\.)")
        numbers = number.findall(parameter)
        alike: dict[str, str] = {}
        for name in chain(self._shapes, self.parameters()):
            shape = number.sub("0", name)
            if shape not in alike or number.findall(name) == numbers:
                alike[shape] = name
            if len(alike) >= 2000:
                break
        close = difflib.get_close_matches(number.sub("0", parameter), alike, n, cutoff=0.5)
        return [alike[shape] for shape in close]

    @property
    def checkpoint_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors of the Hugging Face checkpoint, by name."""
        return self._stored_shapes

    def parameters(self) -> Iterator[str]:
        """Every parameter the checkpoint is known to hold, by its module-tree name."""
        for name, entry in self._known.items():
            if entry is not None:
                yield name

    def _recurring(self, source: str, name: str) -> str:
        """``source``, with a ``*`` in it replaced by the layer where the shared block of layer ``name`` stands first."""
        if "*" not in source:
            return source
        kinds = self._config.get("layers_block_type")
        hybrid = [index for index, kind in enumerate(kinds if isinstance(kinds, list) else []) if kind == "hybrid"]
        layer = re.search(r"\d+", name)
        if layer is None or int(layer.group(0)) not in hybrid:
            return source
        blocks = self._number(None, "num_mem_blocks") or 1
        return source.replace("*", str(hybrid[hybrid.index(int(layer.group(0))) % blocks]))

    @cached_property
    def families(self) -> FamilyNames:
        """The names that other programs have for a model of images, video or sound."""
        from adapterkit.adapters.families.names import FamilyNames

        return FamilyNames(self._shapes, str(self._config.get("_class_name", "")))

    @cached_property
    def _loader(self) -> Loader:
        return Loader(self._config)

    @cached_property
    def _known(self) -> dict[str, str | tuple[_Group, int] | None]:
        """Module-tree name -> the tensor that holds it, or its place in a group; None where two claim it."""
        known: dict[str, str | tuple[_Group, int] | None] = {}
        groups: dict[tuple[int, str], _Group] = {}
        known.update((name, name) for name in self._shapes if len(name) > LONGEST)
        names = sorted(name for name in self._shapes if len(name) <= LONGEST)
        for name, new, rule, source in self._loader.rename_all(names):
            if rule is None:
                known[new] = None if new in known else name
                self._called[name] = new
            else:
                group = groups.setdefault((id(rule), new), _Group(rule, new))
                group.sources[source].append(name)
        for group in groups.values():
            for index, parameter in enumerate(group.parameters):
                known[parameter] = None if parameter in known else (group, index)
        return known

    @cached_property
    def _modules(self) -> dict[str, set[str]]:
        modules: dict[str, set[str]] = {}
        for names in (self.parameters(), self._shapes):
            for name in names:
                module, _, leaf = name.rpartition(".")
                modules.setdefault(module, set()).add(leaf)
        return modules

    def _resolve(self, name: str) -> Layout | None:
        """``name`` as the table's module tree has it, as the checkpoint has it, or as an older module tree had it."""
        entry = self._known.get(name)
        if isinstance(entry, tuple):
            group, index = entry
            if name in self._shapes and not any(name in source for source in group.sources):
                return None
            layouts = self._converted(group)
            return layouts[index] if layouts else self._stored(name)
        if name in self._shapes:
            return self._stored(name) if entry in (name, None) else None
        return self._stored(entry) if entry else self._older(name)

    def _stored(self, tensor: str, lead: int = 0) -> Layout | None:
        """A tensor as it stands in the checkpoint, with its first ``lead`` dimensions as rows (0: as its kind has them)."""
        if tensor not in self._shapes:
            return None
        shape = self._shapes[tensor]
        if not lead:
            leaf = ".".join(self._called.get(tensor, tensor).split(".")[-2:])
            experts = len(shape) > 2 and (not leaf.endswith(".weight") or leaf in self._loader.stacked)
            lead = len(shape) - 1 if experts else min(1, len(shape))
        return self._whole(tensor, lead)

    def _whole(self, name: str, lead: int) -> Layout:
        """A tensor with its first ``lead`` dimensions as rows, by where it is stored."""
        layout = whole(name, self._shapes[name], lead)
        if name not in self._experts:
            return layout
        stack, first = self._experts[name]
        return Layout(layout.shape, lead, (Piece(stack, layout.rows, at=first),))

    def _converted(self, group: _Group) -> list[Layout] | None:
        """The layouts of a group's parameters; None when its tensors are not what the rule expects."""
        if id(group) not in self._layouts:
            rule, lead = group.rule, lead_of(group.rule.ops)[0]
            sources = [[self._whole(name, lead) for name in sorted(names, key=_natural)] for names in group.sources]
            self._layouts[id(group)] = None
            if all(sources[: 1 if rule.ops[0][0] == "only" else None]):
                keys = [branch.pattern for branch in rule.branches]
                try:
                    self._layouts[id(group)] = run(rule.ops, sources, keys, rule.targets, self._number)
                except (UnmappableError, IndexError):
                    pass
        return self._layouts[id(group)]

    def _older(self, name: str) -> Layout | None:
        """A tensor name of an older module tree or file, sought as (a part of) what it has become."""
        new, rule, source = self._loader.rename(name)
        if rule is None:
            return self._resolve(new) if new != name and (new in self._known or new in self._shapes) else None
        group = _Group(rule, new)
        before, after = lead_of(rule.ops)
        found: list[Layout] = []
        for parameter in group.parameters:
            entry = self._known.get(parameter)
            layout = self._resolve(parameter) if isinstance(entry, tuple) else self._stored(entry or parameter, after)
            if layout is None or layout.lead != after:
                return None
            found.append(layout)
        try:
            return self._part(rule, source, name, found, before)
        except (UnmappableError, IndexError):
            return None

    def _part(self, rule: Renaming, source: int, name: str, found: list[Layout], lead: int) -> Layout | None:
        """The layout of one source of ``rule``, from the layouts of the parameters that the rule makes."""
        makes = tuple(layout.shape for layout in found)
        if (id(rule), makes) not in self._parts:
            self._parts[id(rule), makes] = self._takers(rule, makes, lead)
        shapes, takers = self._parts[id(rule), makes]
        place = 0
        if len(shapes) > 1:
            matched = rule.match(self._renamed(name))
            digits = re.search(r"\d+", matched[1].group(0)) if matched else None
            place = int(digits.group(0)) if digits else len(shapes)
        if place >= len(shapes):
            return None
        pieces = [
            part
            for target, piece in takers.get(f"{source}:{place}", ())
            for part in _through(piece, found[target], shapes[place])
        ]
        return Layout(shapes[place], lead, tuple(sorted(pieces, key=lambda piece: piece.row)))

    def _takers(self, rule: Renaming, makes: tuple[tuple[int, ...], ...], lead: int) -> _Takers:
        """What ``rule`` does with each of its sources, when it makes parameters of these shapes."""
        keys = range(len(rule.branches))
        if any(op[0] in ("stack", "deal") for op in rule.ops):
            if sum(made[0] for made in makes) > MOST_BLOCKS:
                raise UnmappableError
            shapes = [
                unrun(rule.ops, makes, len(keys), target) for target, made in enumerate(makes) for _ in range(made[0])
            ]
        else:
            shapes = [unrun(rule.ops, makes, len(keys))]
        sources = [[whole(f"{key}:{index}", shape, lead) for index, shape in enumerate(shapes)] for key in keys]
        if rule.ops[0][0] == "only":
            sources[1:] = [[] for _ in sources[1:]]
        layouts = run(rule.ops, sources, [branch.pattern for branch in rule.branches], rule.targets, self._number)
        if tuple(layout.shape for layout in layouts) != makes:
            raise UnmappableError
        takers: dict[str, list[tuple[int, Piece]]] = {}
        for target, layout in enumerate(layouts):
            for piece in layout.pieces:
                takers.setdefault(piece.tensor, []).append((target, piece))
        return shapes, takers

    def _renamed(self, name: str) -> str:
        """``name`` after the renamings, before any converter."""
        for rule in self._loader.rules:
            if not rule.ops:
                name, _ = rule.apply(name)
        return name

    def _repairs(self, name: str) -> list[str]:
        """Other names of the same parameter: with or without the base model's prefix, and as part of a bigger model."""
        found = []
        prefix = self._loader.outer + "." if self._loader.outer else ""
        if prefix:
            found += [name[len(prefix) :], prefix + name] if name.startswith(prefix) else [prefix + name]
        for other in self._also:
            if name.startswith(other + "."):
                inner = name[len(other) + 1 :]
                found += [inner, prefix + inner]
        for family in (TEXT, HEAD, OMNI, VISION):
            start = next((start for start in family if name.startswith(start)), None)
            if start is not None:
                found += [other + name[len(start) :] for other in family if other != start]
        other_names = numbered(name)
        return list(dict.fromkeys(found if other_names is None else [*found, other_names]))

    @staticmethod
    def _agreed(layouts: Iterator[Layout | None]) -> Layout | None:
        """The one layout that all candidates which exist agree on."""
        found = {layout.pieces: layout for layout in layouts if layout is not None}
        return next(iter(found.values())) if len(found) == 1 else None

    def _number(self, section: str | None, name: str) -> int:
        """A number of the config: of the section, else of the model, else of its language model."""
        config: Any = self._config.get(section) if section else None
        queue = [config if isinstance(config, dict) else self._config]
        for part in queue:
            for key in FIELDS.get(name, (name,)):
                value = part.get(key)
                if isinstance(value, int) and value > 0:
                    return value
            queue += [part[key] for key in TEXT_CONFIGS if isinstance(part.get(key), dict)]
        return 0


def _through(piece: Piece, stored: Layout, shape: tuple[int, ...]) -> list[Piece]:
    """Translate the rows selected by ``piece`` into rows of the tensor that stores them."""
    parts = stored.take(piece.row, 1, piece.count, 0)
    if not piece.transposed:
        return [replace(part, row=piece.at + part.row * piece.at_step, row_step=piece.at_step) for part in parts]
    if len(parts) != 1 or piece.row_at or piece.count != shape[-1] or parts[0].transposed or parts[0].at_step != 1:
        raise UnmappableError
    return [Piece(parts[0].tensor, stored.shape[-1], row=piece.at, at=parts[0].at, transposed=True)]


def _natural(name: str) -> list[tuple[int, str, int]]:
    """Sort key: numbers by value."""
    found = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        found.append((int(text != ""), text, int(part[len(text) :] or 0)))
    return found
