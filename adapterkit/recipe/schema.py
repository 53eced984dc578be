"""What a recipe says, as frozen values. `adapterkit.recipe.parse` reads TOML into them, by their fields.

A field's key is its name with hyphens for underscores (``metadata["key"]`` where it is another word). ``SHORT`` names the
field that a plain string in the place of a table means. The keys of a `Table` that are options of verbs are not repeated
here: they come from the requests, where each option says its place in a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from adapterkit.requests.adapters import CombineRequest
from adapterkit.requests.convert import ConvertRequest
from adapterkit.requests.merge import MergeRequest
from adapterkit.requests.option import Option, Request, default_of
from adapterkit.requests.verify import LEVELS as DEEP
from adapterkit.requests.verify import VerifyRequest

LEVELS = ("none", *DEEP)
REQUESTS: tuple[type[Request], ...] = (MergeRequest, ConvertRequest, CombineRequest, VerifyRequest)


@dataclass(frozen=True)
class Known:
    """An option of a table: the name of its field, what it is, and its default."""

    name: str
    option: Option
    default: Any


@cache
def known_options(table: str) -> Mapping[str, Known]:
    """The options of a table by their keys; the first request that has a key says what it is."""
    found: dict[str, Known] = {}
    if not table:
        return found
    for request in REQUESTS:
        for name, option in request.options().items():
            place, _, key = option.recipe.partition(".")
            if place == table:
                found.setdefault(key, Known(name, option, default_of(request._fields()[name])))
    return found


def _choice(*values: str, default: str | None = None) -> Any:
    return field(default=default, metadata={"choices": values})


@dataclass(frozen=True)
class Table:
    """A table with options of verbs.

    Attributes:
        options: what the recipe says of them, by the names of their fields.
    """

    TABLE: ClassVar[str] = ""
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __getattr__(self, name: str) -> Any:
        """An option, at its default where the recipe does not say it."""
        if name.startswith("__") or name == "options":
            raise AttributeError(name)
        if name in self.options:
            return self.options[name]
        known = next((one for one in known_options(self.TABLE).values() if one.name == name), None)
        if known is None:
            raise AttributeError(name)
        return known.default


@dataclass(frozen=True)
class BaseChoice(Table):
    """What adapters are folded onto; the options are those of `adapterkit.bases.open_base`.

    Attributes:
        ref: folder, file, registry name or Hub id; paths are relative to the recipe.
    """

    TABLE: ClassVar[str] = "base"
    SHORT: ClassVar[str] = "ref"
    ref: str


@dataclass(frozen=True)
class AdapterChoice:
    """One adapter: a reference, or what an output with ``to = "adapter"`` makes.

    Attributes:
        ref: folder, file, registry name or Hub id.
        from_: the name of the output that makes it.
        weight: how strongly it counts.
    """

    SHORT: ClassVar[str] = "ref"
    ref: str | None = None
    from_: str | None = field(default=None, metadata={"key": "from"})
    weight: float = 1.0


@dataclass(frozen=True)
class Combining(Table):
    """How several deltas become one: see `adapterkit.ops.rules`."""

    TABLE: ClassVar[str] = "merge"


@dataclass(frozen=True)
class VerifyTable(Table):
    """How deeply an output is verified, and what must hold; the build fails with 3 where a threshold does not.

    Attributes:
        level: ``tensors``, ``layers`` or ``model``, or ``none``.
        html: a page with the evidence.
    """

    TABLE: ClassVar[str] = "verify"
    SHORT: ClassVar[str] = "level"
    level: str = _choice(*LEVELS, default="tensors")
    html: str | None = None


@dataclass(frozen=True)
class Registration:
    """A version in the registry; ``alias`` is pointed to it."""

    SHORT: ClassVar[str] = "name"
    name: str
    alias: str | None = None
    base_id: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Publication:
    """A remote: a repository on the Hub, of an OCI registry, or a folder of a bucket; the keys are the options of `push`."""

    SHORT: ClassVar[str] = "repo"
    repo: str
    private: bool = False
    tag: str | None = None
    create_pr: bool = False
    base_id: str = ""
    replace_card: bool = False
    move_tag: bool = False
    share_with: tuple[str, ...] = ()
    plain_http: bool = False


@dataclass(frozen=True)
class OutputTable(Table):
    """One thing to make. Its options are those of the verb that makes it.

    Attributes:
        path: where, relative to the recipe.
        to: ``folder`` or ``gguf`` (a merge), ``adapter`` (a combination), or a format of `convert`; by default what the
            suffix of ``path`` says, ``folder`` without one.
        from_: another output that this one is converted from.
        adapters: the names of those that count here; by default all of them.
        base, merge, verify: in the place of the recipe's own.
        register, push: what is done with it when it is there and verified.
    """

    TABLE: ClassVar[str] = "output"
    SHORT: ClassVar[str] = "path"
    path: str
    to: str | None = None
    from_: str | None = field(default=None, metadata={"key": "from"})
    adapters: tuple[str, ...] | None = None
    base: BaseChoice | None = None
    merge: Combining | None = None
    verify: VerifyTable | None = None
    register: Registration | None = None
    push: Publication | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe: a base, adapters and how they go together, and what is made of them."""

    outputs: Mapping[str, OutputTable]
    base: BaseChoice | None = None
    adapters: Mapping[str, AdapterChoice] = field(default_factory=dict)
    merge: Combining = field(default_factory=Combining)
    verify: VerifyTable | None = None
