"""From the tensors of a checkpoint to those of the other format, by the rules of an architecture: names and shapes only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.checkpoint.slices import current
from adapterkit.errors import CheckpointError, TargetError, counted
from adapterkit.gguf.arch.maps import Array, MapError

if TYPE_CHECKING:
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.spec import ArchSpec, Rule, Scalars

SUFFIXES = (".weight", ".bias")
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Where a language model sits in a checkpoint: the root that rules use stands in the place of these.
ROOTS = (
    "model.language_model.model.",
    "language_model.model.model.",
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "thinker.model.",
    "text_model.",
    "language_model.",
)
HEADS = ("model.language_model.lm_head.", "language_model.lm_head.", "thinker.lm_head.", "text_model.lm_head.")
# Parts of names of towers for images and sound, and of what joins them to the text.
TOWERS = re.compile(
    r"visual[._]|vision[._]|video_tower\.|audio[._]|talker\.|token2wav\.|code2wav\.|projector|image_newline|view_seperator|patch_embed"
    r"|patch_merg|connector\.|^vit\.|^vpm\.|^siglip|^merger\.|^resampler\.|^mlp\d?\.|embed_vision|embed_audio|sam_model"
    r"|^model\.mm_|image_|^model\.(aligner|generation_\w+|vqmodel|merger)\.|^encoder\.|^multi_modal_|^mlp_AR\."
)
# Buffers that older versions saved.
BUFFERS = re.compile(
    r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias|attn\.(masked_)?bias|embeddings\.position_ids)$|^embeddings\.position_ids$"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
MOST = 1 << 16  # layers or experts; a header with more is not followed


@dataclass(frozen=True)
class Match:
    """A name as an instance of a rule."""

    rule: Rule
    suffix: str
    layer: int | None
    item: int | None


@dataclass(frozen=True)
class Mapped:
    """The tensors of GGUF as arrays of stored ones.

    Attributes:
        arrays: by name, in the order of writing.
        dropped: stored tensors that no tensor of GGUF holds.
        sources: for each tensor of the checkpoint, the GGUF tensors that it is part of.
        rules: which rule made each tensor.
    """

    arrays: dict[str, Array]
    dropped: tuple[str, ...]
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)


class Mapper:
    """The rules of an architecture, ready to match names.

    Args:
        spec: the architecture.
        config: of the model.
        apart: the checkpoint has an output layer that is not its embedding, whatever the config says; see `ties.apart`.
    """

    def __init__(self, spec: ArchSpec, config: Config, *, apart: bool = False) -> None:
        self.spec, self.config, self.apart = spec, config, apart

    # ------------------------------------------------------------------ names

    @cached_property
    def _by_hf(self) -> dict[str, list[tuple[str, Rule, int | None]]]:
        """By the shape of a name: the names of rules, and which item each is of rules whose items have names."""
        found: dict[str, list[tuple[str, Rule, int | None]]] = {}
        for one in self.spec.rules:
            names = enumerate(one.hf.replace("{e}", item) for item in one.items) if one.items else ((None, one.hf),)
            for item, name in names:
                found.setdefault(_shape_of(name), []).append((name, one, item))
        return found

    @cached_property
    def _by_gguf(self) -> dict[str, list[tuple[Rule, int]]]:
        found: dict[str, list[tuple[Rule, int]]] = {}
        for one in self.spec.rules:
            for number, name in enumerate(one.gguf if one.writes else ()):
                found.setdefault(_shape_of(name), []).append((one, number))
        return found

    def canonical(self, name: str) -> str:
        """A stored name with the root that the rules use."""
        for prefix in self.spec.prefixes:
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        for head in HEADS:
            if name.startswith(head):
                return "lm_head." + name[len(head) :]
        for start in ROOTS:
            if name.startswith(start):
                return "model." + name[len(start) :]
        return name

    def match(self, name: str) -> Match | None:
        """The rule of a stored tensor, or None."""
        name = self.canonical(name)
        found = self._match(name)
        if found is None and not name.startswith("model."):
            found = self._match("model." + name)  # a model without its head
        return found

    def _match(self, name: str) -> Match | None:
        for text, suffix in ((name, ""), *((name[: -len(end)], end) for end in SUFFIXES if name.endswith(end))):
            shape = _NUMBER.sub("#", text + ".")[:-1] if text else ""
            for template, one, item in self._by_hf.get(shape, ()):
                if suffix and one.gguf and one.gguf[0].endswith(SUFFIXES):
                    continue
                found = _instance(template, one, suffix, [int(digits) for digits in _NUMBER.findall(text + ".")])
                if found is not None:
                    return found if item is None else replace(found, item=item)
        return None

    # ------------------------------------------------------------------ Hugging Face -> GGUF

    def to_gguf(self, shapes: Mapping[str, tuple[int, ...]], ref: str) -> Mapped:
        """The GGUF tensors that a checkpoint of these shapes becomes.

        Raises:
            TargetError: a tensor that no rule knows, with the nearest names.
            CheckpointError: shapes that do not fit, or tensors that are missing.
        """
        groups: dict[tuple[str, str, int | None], list[tuple[int | None, str]]] = {}
        chosen: dict[tuple[str, str, int | None], Rule] = {}
        dropped: list[str] = []
        strange: list[str] = []
        for name in shapes:
            found = self.match(name)
            if found is None:
                (dropped if self._unused(name) else strange).append(name)
                continue
            if not found.rule.gguf or self._beyond(found):
                if self._beyond(found) and not self._predicts:
                    raise CheckpointError(
                        f"{ref}: its config.json says {counted(self.layers, 'layer')}, and '{name}' is of one after them",
                        "give the config.json that belongs to these weights",
                    )
                dropped.append(name)
                continue
            key = (found.rule.hf, found.suffix, found.layer)
            groups.setdefault(key, []).append((found.item, name))
            chosen[key] = found.rule
        if strange:
            raise TargetError(
                f"{ref}: nothing is known of '{strange[0]}' in a {self.spec.arch} ({counted(len(strange), 'tensor')})",
                f"the nearest name that is known is {_nearest(strange[0], self.spec.rules)}",
            )
        arrays: dict[str, Array] = {}
        sources: dict[str, list[str]] = {}
        rules: dict[str, Rule] = {}
        for key, members in groups.items():
            self._add(chosen[key], key[1], key[2], members, shapes, ref, arrays, sources, rules)
        if OUTPUT in arrays and self.output_is_embedding:
            del arrays[OUTPUT]
            for name in sources:
                sources[name] = [one for one in sources[name] if one != OUTPUT]
            dropped += [name for name, into in sources.items() if not into]
        if self.spec.own_output and OUTPUT not in arrays and EMBEDDING in arrays:
            arrays[OUTPUT] = arrays[EMBEDDING]
            rules[OUTPUT] = rules[EMBEDDING]
            for into in sources.values():
                into += [OUTPUT] if EMBEDDING in into else []
        self._check_whole(arrays, ref)
        ordered = dict(sorted(arrays.items(), key=lambda pair: _place(pair[0])))
        kept = {name: tuple(into) for name, into in sources.items() if into}
        return Mapped(ordered, tuple(dropped), kept, rules)

    def _add(
        self,
        one: Rule,
        suffix: str,
        layer: int | None,
        members: list[tuple[int | None, str]],
        shapes: Mapping[str, tuple[int, ...]],
        ref: str,
        arrays: dict[str, Array],
        sources: dict[str, list[str]],
        rules: dict[str, Rule],
    ) -> None:
        members.sort(key=lambda pair: pair[0] or 0)
        wanted = len(one.items) or len(members)
        if "{e}" in one.hf and [number for number, _ in members] != list(range(wanted)):
            raise CheckpointError(
                f"{ref}: of '{members[0][1]}' and its like, number {_gap([n or 0 for n, _ in members])} is missing or "
                "there twice",
                "download it again",
            )
        if "{e}" not in one.hf and len(members) > 1:
            self._same_twice(members, ref)
        stored = [Array.stored(name, shapes[name]) for _, name in members]
        made = self._run(one, stored, members[0][1], ref)
        for name, array in zip(one.gguf, made, strict=True):
            target = _named(name, layer) + suffix
            if target in arrays:
                raise CheckpointError(
                    f"{ref}: '{members[0][1]}' and another tensor both become '{target}'", "remove one of them"
                )
            arrays[target] = array
            rules[target] = one
            for _, member in members:
                sources.setdefault(member, []).append(target)

    def _same_twice(self, members: list[tuple[int | None, str]], ref: str) -> None:
        raise CheckpointError(
            f"{ref}: '{members[0][1]}' and '{members[1][1]}' are two spellings of one tensor", "remove one of them"
        )

    def _run(self, one: Rule, arrays: list[Array], name: str, ref: str) -> list[Array]:
        try:
            for op in one.ops:
                arrays = op.run(arrays, self.config)
        except MapError as error:
            raise CheckpointError(
                f"{ref}: '{name}' does not fit its config.json: {error.message}",
                "give the config.json that belongs to these weights",
            ) from None
        if len(arrays) != len(one.gguf):
            raise CheckpointError(
                f"{ref}: '{name}' is {len(arrays)} tensors where one was expected", "download it again"
            )
        return arrays

    @cached_property
    def _predicts(self) -> bool:
        """Whether the config says that there are layers which predict further tokens."""
        said = {**self.config.raw, **self.config.text}
        return any(value for name, value in said.items() if "nextn" in name or "mtp" in name)

    def _beyond(self, found: Match) -> bool:
        """A tensor of layers after the last: multi-token prediction, which is left out."""
        return found.layer is not None and found.rule.hf.startswith("model.layers.") and found.layer >= self.layers

    @cached_property
    def layers(self) -> int:
        found = self.config.number("layers")
        if not 0 < found <= MOST:
            raise CheckpointError(f"{self.config.ref}: {found} layers in its config.json", "correct it")
        return found

    @cached_property
    def _scalars(self) -> dict[str, Scalars]:
        return {_shape_of(one.hf): one for one in self.spec.scalars}

    def scalar(self, name: str) -> tuple[Scalars, int] | None:
        """What a stored tensor is in the metadata of GGUF, and of which layer."""
        name = self.canonical(name)
        found = self._scalars.get(_NUMBER.sub("#", name + ".")[:-1])
        return None if found is None else (found, int(_NUMBER.findall(name + ".")[0]))

    def _unused(self, name: str) -> bool:
        if self.scalar(name) is not None:
            return True
        if BUFFERS.search(name) or any(re.search(part, name) for part in self.spec.drops):
            return True
        found = re.match(r"model\.layers\.(\d+)\.", self.canonical(name))
        if found is not None and int(found[1]) >= self.layers:
            return True
        return self.config.has_vision and TOWERS.search(name) is not None

    @property
    def says_tied(self) -> bool:
        """Whether the output layer is the embedding by the config, or by the architecture."""
        if self.spec.output_apart:
            return False
        return self.spec.tied or bool(self.config.get("tie_word_embeddings", default=False))

    @property
    def output_is_embedding(self) -> bool:
        """Whether an output layer that is saved beside the embedding is the same and is left out."""
        return self.says_tied and not self.apart

    def _check_whole(self, arrays: Mapping[str, Array], ref: str) -> None:
        if current() is not None:
            return  # one part of a model, which was whole when it was planned
        needs = [name for need in self.spec.needs for name in self._every_layer(need)]
        missing = [name for name in needs if name not in arrays]
        if not missing and not self.spec.uneven:
            missing = _uneven(arrays, self.layers)
        if missing:
            raise CheckpointError(
                f"{ref}: the tensor that becomes '{missing[0]}' is missing ({len(missing)} in all)", "download it again"
            )

    def _every_layer(self, need: str) -> list[str]:
        return [need.replace("{i}", str(i)) for i in range(self.layers)] if "{i}" in need else [need]

    # ------------------------------------------------------------------ GGUF -> Hugging Face

    def hf_shapes(self, shapes: Mapping[str, tuple[int, ...]], ref: str) -> dict[str, tuple[int, ...]]:
        """The tensors of the Hugging Face checkpoint that GGUF tensors of these shapes came from.

        Tensors that are made from the config (`ArchSpec.factors`) are left out.

        Raises:
            TargetError: a tensor that no rule writes.
        """
        made = {one.tensor for one in self.spec.factors}
        groups: dict[tuple[str, str, int | None], dict[int, tuple[int, ...]]] = {}
        chosen: dict[tuple[str, str, int | None], Rule] = {}
        for name, shape in shapes.items():
            if name in made:
                continue
            found = self._match_gguf(name)
            if found is None:
                raise TargetError(
                    f"{ref}: nothing is known of '{name}' in a {self.spec.arch}", "convert the base again"
                )
            one, number, suffix, layer = found
            key = (one.hf, suffix, layer)
            groups.setdefault(key, {})[number] = shape
            chosen[key] = one
        result: dict[str, tuple[int, ...]] = {}
        for (hf, suffix, layer), parts in groups.items():
            one = chosen[hf, suffix, layer]
            if len(parts) != len(one.gguf):
                lacking = next(n for i, n in enumerate(one.gguf) if i not in parts)
                raise CheckpointError(f"{ref}: '{_named(lacking, layer)}{suffix}' is missing", "convert the base again")
            back = [parts[number] for number in range(len(one.gguf))]
            for op in reversed(one.ops):
                back = op.back(back, self.config)
            if len(back) > MOST:
                raise CheckpointError(f"{ref}: {len(back)} experts", "convert the base again")
            for item, shape in enumerate(back):
                own = one.items[item] if one.items else str(item)
                result[self._written(_named(hf, layer).replace("{e}", own) + suffix)] = shape
        return result

    def _written(self, name: str) -> str:
        return name if name.startswith(("lm_head", "embed_out", "classifier")) else self.spec.root + name

    def knows(self, name: str) -> bool:
        """Whether a rule makes a GGUF tensor of this name."""
        return self._match_gguf(name) is not None

    def _match_gguf(self, name: str) -> tuple[Rule, int, str, int | None] | None:
        for text, suffix in ((name, ""), *((name[: -len(end)], end) for end in SUFFIXES if name.endswith(end))):
            numbers = _NUMBER.findall(text + ".")
            layer = int(numbers[0]) if numbers else None
            for one, number in self._by_gguf.get(_NUMBER.sub("#", text + ".")[:-1], ()):
                if one.layers is None or (layer is not None and one.layers(self.config, layer)):
                    return one, number, suffix, layer
        return None


def _shape_of(template: str) -> str:
    return _NUMBER.sub("#", re.sub(r"\{\w\}", "#", template) + ".")[:-1]


def _instance(template: str, one: Rule, suffix: str, numbers: list[int]) -> Match | None:
    letters = re.findall(r"\{(\w)\}|(?:^|\.)(\d+)(?=\.|$)", template)
    layer = item = None
    for (letter, digits), number in zip(letters, numbers, strict=False):
        if letter == "i":
            layer = number
        elif letter == "e":
            item = number
        elif digits and int(digits) != number:
            return None
    return Match(one, suffix, layer, item)


def _named(template: str, layer: int | None) -> str:
    return template.replace("{i}", str(layer))


def _gap(numbers: list[int]) -> int:
    return next((i for i, number in enumerate(sorted(numbers)) if number != i), len(numbers))


def _uneven(arrays: Iterable[str], layers: int) -> list[str]:
    """Tensors that a layer lacks although another layer has all that it has, and them."""
    kinds: dict[int, set[str]] = {}
    for name in arrays:
        found = re.match(r"blk\.(\d+)\.(.+)", name)
        if found is not None:
            kinds.setdefault(int(found[1]), set()).add(found[2])
    whole = {frozenset(one) for one in kinds.values()}
    for layer in range(layers):
        own = kinds.get(layer, set())
        more = next((other for other in whole if other > own), None)
        if more is not None or not own:
            return [f"blk.{layer}.{stem}" for stem in sorted((more or {"attn_norm.weight"}) - own)]
    return []


def _nearest(name: str, rules: Iterable[Rule]) -> str:
    import difflib

    known = [one.hf for one in rules]
    close = difflib.get_close_matches(_NUMBER.sub("#", name), [_shape_of(hf) for hf in known], 1, cutoff=0.0)
    return f"'{close[0].replace('#', 'N')}'" if close else "none"


def _place(name: str) -> tuple[int, str]:
    found = re.match(r"(?:blk|enc\.blk|dec\.blk)\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)
