"""From a recipe to the steps that carry it out, in order; everything that can be wrong without opening a file is said here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from adapterkit.adapters.load import file_and_parts
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.errors import AdapterkitError, NotFound, RecipeError, UnsafeError, option
from adapterkit.places import Address, address_of, local, readable, writable
from adapterkit.recipe.parse import Place, RecipeFile, key_of, nearest, shown
from adapterkit.recipe.schema import BaseChoice, Combining, OutputTable, Table, VerifyTable, known_options
from adapterkit.requests.adapters import CombineRequest
from adapterkit.requests.convert import ConvertRequest
from adapterkit.requests.formats import formats
from adapterkit.requests.groups import LIMITS
from adapterkit.requests.merge import FOLDER, GGUF, MergeRequest, folder_formats
from adapterkit.requests.option import Request
from adapterkit.verbs.residual_of import residual_path
from adapterkit.verbs.tower import tower_path

ADAPTER = "adapter"
AUTO = "auto"  # of mmproj: made of the base, and not a file that is copied
MERGE, COMBINE, CONVERT = "merge", "combine", "convert"
OF_VERB: dict[str, type[Request]] = {MERGE: MergeRequest, COMBINE: CombineRequest, CONVERT: ConvertRequest}
# Which tables and references of an output mean something for what makes it; its options are those of the verb.
_ALWAYS = frozenset({"path", "to", "register", "push"})
TAKES = {
    MERGE: _ALWAYS | {"adapters", "base", "merge", "verify"},
    COMBINE: _ALWAYS | {"adapters", "base", "merge"},
    CONVERT: _ALWAYS | {"from_", "adapters", "base", "verify"},
}


@dataclass(frozen=True)
class Input:
    """Something that is read.

    Attributes:
        place: the key that names it.
        ref: as the recipe says it; for what a step makes, its path.
        path: where it lies, if it is a file or folder here, or what a step makes.
        output: the name of the step that makes it.
        weight: of an adapter.
        whole: it is a file that is read whole, and no model or adapter.
    """

    place: Place
    ref: str
    path: Path | Address | None = None
    output: str | None = None
    weight: float = 1.0
    whole: bool = False


@dataclass(frozen=True)
class Step:
    """One output to make.

    Attributes:
        name: of the output.
        verb: ``merge``, ``combine`` or ``convert``.
        to: the form that is written.
        out: where.
        base, base16, source, imatrix, mmproj, calibration, metadata, tensor_type_file, adapters: what is read; ``source``
            is what a conversion starts from.
        needs: steps that come before it.
        asked, combination, choice: what the recipe says of it, of how deltas go together, and of the base.
        compressor: the Python that has llm-compressor, where the recipe names one.
        verify: how it is verified, if it is.
    """

    name: str
    verb: str
    to: str
    out: Path | Address
    asked: OutputTable
    combination: Combining
    choice: BaseChoice | None
    base: Input | None
    base16: Input | None
    source: Input | None
    imatrix: Input | None
    mmproj: Input | None
    calibration: Input | None
    metadata: Input | None
    tensor_type_file: Input | None
    adapters: tuple[Input, ...]
    compressor: Path | None
    verify: VerifyTable | None

    @property
    def roles(self) -> tuple[tuple[str, Input], ...]:
        """What is read, each with what it is read as."""
        names = ("base", "base16", "source", "imatrix", "mmproj", "calibration", "metadata", "tensor_type_file")
        found = [(name, getattr(self, name)) for name in names]
        return (*(pair for pair in found if pair[1] is not None), *(("adapter", one) for one in self.adapters))

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(one for _, one in self.roles)

    @property
    def projector(self) -> Path | Address | None:
        """Where the mmproj file goes, if there is one: a copy, or what is made of the base."""
        if self.asked.mmproj == AUTO:
            return self.out.with_name(tower_path(self.out).name)
        return (
            None
            if self.mmproj is None
            else self.out.with_name(PurePosixPath(str(self.mmproj.path or self.mmproj.ref)).name)
        )

    @property
    def residual(self) -> Path | Address | None:
        """Where what rounding takes goes, if it is written: a folder or a file beside the output."""
        return None if self.asked.residual is None else residual_path(self.out)

    @property
    def here(self) -> Path:
        """Where, of an output on this machine."""
        assert isinstance(self.out, Path)
        return self.out

    @property
    def beside_here(self) -> tuple[Path, ...]:
        """The projector and the residual of an output on this machine."""
        return tuple(one for one in (self.projector, self.residual) if isinstance(one, Path))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.output for one in self.inputs if one.output is not None))

    @property
    def is_file(self) -> bool:
        """Whether the output is a file (or a set of them) and not a folder."""
        return self.to in (GGUF, "gguf-lora") or self.out.suffix == ".safetensors"

    @property
    def shares(self) -> Any:
        """What a step reads: those that agree in it are written in one pass. A step that shares with none has its name."""
        if self.verb == MERGE:
            return self.fold()
        if self.verb == CONVERT and self.to == GGUF and self.source is not None:
            return (CONVERT, self.source.path or self.source.ref, isinstance(self.out, Address))
        return self.name

    def fold(self) -> tuple[Any, ...]:
        """What decides the folded values: two merges that agree in it can share one pass over the base."""
        refs = tuple((one.path or one.ref, one.weight) for one in self.adapters)
        return (
            repr(self.choice),
            None if self.base is None else self.base.path or self.base.ref,
            refs,
            repr(self.combination),
            isinstance(self.out, Address),  # what is written in one pass lies in stores, or here
        )


@contextmanager
def located(file: RecipeFile, *place: str | int) -> Iterator[None]:
    """Give an error of the body the line of the recipe that it is about."""
    try:
        yield
    except AdapterkitError as error:
        if error.place is None:
            error.place = file.at(*place)
            error.message = f"{error.place[0]}:{error.place[1]}: {error.message}"
            error.args = (error.message,)
        raise


def steps_of(file: RecipeFile) -> tuple[Step, ...]:
    """The steps of a recipe, each after those that it needs.

    Raises:
        RecipeError: names that mean nothing, cycles, two outputs on one path, keys that do not go together.
        NotFound: a file that is neither there nor made by a step.
    """
    if not file.recipe.outputs:
        file.fail(("outputs",), "the recipe makes nothing", "add an output, as in [outputs.merged] with a path")
    try:
        maker = _Maker(file)
        steps = {name: maker.step(name, output) for name, output in file.recipe.outputs.items()}
        _check_paths(file, steps)
    except (OSError, ValueError) as error:  # a name that no file can have: too long, or with a zero byte in it
        said = getattr(error, "strerror", None) or error
        message = f"{file.path} names a path that cannot be ({said})"
        raise RecipeError(message, "shorten or correct it", (str(file.path), 1)) from None
    return _ordered(file, steps)


class _Maker:
    def __init__(self, file: RecipeFile) -> None:
        self.file, self.recipe = file, file.recipe
        self.folder = file.folder
        self.made: dict[_Spot, str] = {}
        for name, one in self.recipe.outputs.items():
            place: Place = ("outputs", name, "path")
            with located(file, *place):
                writable(one.path, shown(place))  # refuses other addresses
                self.made[_spot(place_of(file, one.path))] = name

    def step(self, name: str, asked: OutputTable) -> Step:
        place: Place = ("outputs", name)
        if not asked.path or Path(asked.path).name in ("", ".."):
            self.file.fail(
                (*place, "path"), f"'{asked.path}' is no path for an output", "name a folder or file to make"
            )
        to = self._form(asked, place)
        verb = COMBINE if to == ADAPTER else MERGE if to in (FOLDER, GGUF) and asked.from_ is None else CONVERT
        self._check_keys(verb, to, asked, place)
        choice, at = self._base(asked, place)
        adapters = self._adapters(asked, place) if verb != CONVERT or asked.from_ is None else ()
        source = None
        if verb == MERGE and choice is None:
            self.file.fail(place, f"{shown(place)} is a merge, and the recipe names no base", "add base = ...")
        if verb != CONVERT and not adapters:
            self.file.fail(place, f"{shown(place)} has no adapters", "add some under [adapters]")
        if verb == CONVERT:
            source = self._source(asked, adapters, place)
            adapters = ()
        self._check_verify(verb, asked, place)
        if verb == CONVERT and "base" not in formats()[to].takes:
            choice = None
        if choice is not None:
            self._check_options(choice, verb, at, f"{shown(place)}, a {verb} to {to}")
        base = None if choice is None else self._input((*at, "ref"), choice.ref)
        base16 = (
            None
            if choice is None or choice.base16 is None or verb != MERGE
            else self._input((*at, "base16"), choice.base16)
        )
        return Step(
            name=name,
            verb=verb,
            to=to,
            out=place_of(self.file, asked.path),
            asked=asked,
            combination=asked.merge or self.recipe.merge,
            choice=choice,
            base=base,
            base16=base16,
            source=source,
            imatrix=self._file((*place, "imatrix"), asked.imatrix),
            mmproj=None if asked.mmproj == AUTO else self._file((*place, "mmproj"), asked.mmproj),
            calibration=self._file((*place, "calibration"), asked.calibration),
            metadata=self._file((*place, "metadata"), asked.metadata),
            tensor_type_file=self._file((*place, "tensor-type-file"), asked.tensor_type_file),
            adapters=adapters,
            compressor=self._program(asked.compressor),
            verify=self._verification(asked, verb),
        )

    def _form(self, asked: OutputTable, place: Place) -> str:
        known = [FOLDER, ADAPTER, *formats()]
        if asked.to is None:
            return GGUF if Path(asked.path).suffix == ".gguf" else FOLDER
        if asked.to not in known:
            self.file.fail((*place, "to"), f"'{asked.to}' is nothing to write", nearest(asked.to, known))
        return asked.to

    def _check_keys(self, verb: str, to: str, asked: OutputTable, place: Place) -> None:
        for one in fields(OutputTable):
            if one.name == "options":
                continue
            value = getattr(asked, one.name)
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if value != default and one.name not in TAKES[verb]:
                self._means_nothing(key_of(one), place, f"{shown(place)}, a {verb} to {to}")
        self._check_options(asked, verb, place, f"{shown(place)}, a {verb} to {to}")
        if verb == CONVERT and to == FOLDER:
            self.file.fail(
                (*place, "from"),
                f"{shown(place)} is converted to a folder, which is nothing new",
                f"use {', '.join(formats())}",
            )
        if to == FOLDER and asked.quant is not None and asked.quant not in folder_formats():
            hint = f"use {', '.join(folder_formats())}, or give it a path that ends in .gguf"
            self.file.fail((*place, "quant"), f"'{asked.quant}' is no format of a folder", hint)
        if asked.server is not None and to != GGUF:
            self.file.fail(
                (*place, "for"), f"{asked.server} serves a GGUF file, and {shown(place)} is none", "leave it out"
            )
        if asked.mmproj is not None and to != GGUF:
            self.file.fail(
                (*place, "mmproj"),
                f"an mmproj file belongs beside a GGUF file, and {shown(place)} is none",
                "leave it out",
            )
        if asked.keep_below is not None and asked.keep_touched is None:
            self.file.fail(
                (*place, "keep-below"), "keep-below says which tensors are kept wider", 'add keep-touched = "Q8_0"'
            )
        if to == GGUF and asked.quant in folder_formats():
            self.file.fail((*place, "quant"), f"'{asked.quant}' is no type of a GGUF file", "use a mix such as Q4_K_M")

    def _check_options(self, table: Table, verb: str, place: Place, what: str) -> None:
        """Refuse options of a table that the verb does not have."""
        known = OF_VERB[verb].options()
        for key, one in known_options(table.TABLE).items():
            if one.name in table.options and not (one.name in known and _is_of(known[one.name].recipe, table.TABLE)):
                self._means_nothing(key, place, what)

    def _means_nothing(self, key: str, place: Place, what: str) -> NoReturn:
        self.file.fail((*place, key), f"'{key}' means nothing for {what}", "leave it out")

    def _base(self, asked: OutputTable, place: Place) -> tuple[BaseChoice | None, Place]:
        return (self.recipe.base, ("base",)) if asked.base is None else (asked.base, (*place, "base"))

    def _adapters(self, asked: OutputTable, place: Place) -> tuple[Input, ...]:
        names = list(self.recipe.adapters) if asked.adapters is None else list(asked.adapters)
        found = []
        for number, name in enumerate(names):
            if name not in self.recipe.adapters:
                hint = nearest(name, list(self.recipe.adapters))
                self.file.fail((*place, "adapters", number), f"there is no adapter '{name}'", hint)
            found.append(self._adapter(name))
        return tuple(found)

    def _adapter(self, name: str) -> Input:
        place: Place = ("adapters", name)
        said = self.recipe.adapters[name]
        if (said.ref is None) == (said.from_ is None):
            what = "both a ref and an output it comes from" if said.ref is not None else "neither ref nor from"
            self.file.fail(place, f"{shown(place)} has {what}", "give one of them")
        if said.ref is not None:
            return self._input((*place, "ref"), said.ref, said.weight)
        assert said.from_ is not None
        output = self._output((*place, "from"), said.from_)
        form = self._form(output, ("outputs", said.from_))
        if form not in (ADAPTER, "peft", "mlx"):
            self.file.fail(
                (*place, "from"), f"outputs.{said.from_} makes a {form}, not an adapter", 'give it to = "adapter"'
            )
        return Input((*place, "from"), said.from_, place_of(self.file, output.path), said.from_, said.weight)

    def _source(self, asked: OutputTable, adapters: Sequence[Input], place: Place) -> Input:
        if asked.from_ is not None:
            output = self._output((*place, "from"), asked.from_)
            return Input((*place, "from"), asked.from_, place_of(self.file, output.path), asked.from_)
        if len(adapters) != 1:
            hint = 'name it, as in adapters = ["NAME"], or the output that it is converted from with from'
            there = f"there are {len(adapters)}" if adapters else "there is none"
            self.file.fail(place, f"{shown(place)} is a conversion of one adapter, and {there}", hint)
        return adapters[0]

    def _output(self, place: Place, name: str) -> OutputTable:
        if name not in self.recipe.outputs:
            hint = nearest(name, list(self.recipe.outputs))
            if "/" in name or (self.folder / name).exists():
                hint = "from names an output of this recipe; what is there already is named with base or adapters"
            self.file.fail(place, f"there is no output '{name}'", hint)
        return self.recipe.outputs[name]

    def _input(self, place: Place, ref: str, weight: float = 1.0) -> Input:
        """A reference: a path beside the recipe if there is one, an address, else a registry name or a Hub id."""
        if not ref:
            self.file.fail(place, f"{shown(place)} is empty", "name a folder, a file, a registry name or a Hub id")
        with located(self.file, *place):
            known = str(readable(ref, shown(place)))  # a path, where it was file://
        path = address_of(known) or self.folder / Path(known).expanduser()
        made = self.made.get(_spot(path))
        if made is not None:
            hint = f'say from = "{made}"' if place[0] == "adapters" else f"use a base that outputs.{made} does not make"
            self.file.fail(place, f"{ref} is what outputs.{made} makes", hint)
        if isinstance(path, Address):
            return Input(place, ref, weight=weight)
        if path.exists() or file_and_parts(path)[1]:
            return Input(place, ref, path, weight=weight)
        is_path = known.startswith((".", "/", "~")) or known.endswith((".gguf", ".safetensors"))
        if is_path or (parse_hub(ref) is None and not _registered(ref)):
            hint = "give a path beside the recipe, a registry name or a Hub id like org/name"
            self.file.fail(place, f"{ref} does not exist", hint, NotFound)
        return Input(place, ref, weight=weight)

    def _file(self, place: Place, name: str | None) -> Input | None:
        if name is None:
            return None
        with located(self.file, *place):
            writable(name, shown(place), "file")  # refuses other addresses
            path = place_of(self.file, name)
        if isinstance(path, Address):
            return Input(place, name, whole=True)
        if not path.is_file():
            self.file.fail(place, f"{name} does not exist", "give a file beside the recipe", NotFound)
        return Input(place, name, path, whole=True)

    def _program(self, name: str | None) -> Path | None:
        """A program: a path beside the recipe, or a bare name that $PATH knows."""
        given = Path(name or "").expanduser()
        return None if name is None else given if given.name == name else self.folder / given

    def _verification(self, asked: OutputTable, verb: str) -> VerifyTable | None:
        found = asked.verify or (self.recipe.verify if verb == MERGE else None)
        return None if found is None or found.level == "none" else found

    def _check_verify(self, verb: str, asked: OutputTable, place: Place) -> None:
        for said, at in ((asked.verify, (*place, "verify")), (self.recipe.verify, ("verify",))):
            if said is None:
                continue
            if said.level != "model":
                for name in ("max_kl", "min_top1", "prompts"):
                    if getattr(said, name) is not None:
                        key = name.replace("_", "-")
                        what = f"{shown((*at, key))} needs the model's answers, and level {said.level} does not ask for them"
                        self.file.fail((*at, key), what, 'use level = "model"')
            for name in LIMITS:
                key = name.replace("_", "-")
                if said.level == "none" and getattr(said, name) is not None:
                    self.file.fail((*at, key), f"nothing is verified, so {key} cannot be met", "raise the level")
            self._file((*at, "prompts"), said.prompts)
        if asked.verify is not None and verb == CONVERT and asked.from_ is None:
            self.file.fail(
                (*place, "verify"),
                f"{shown(place)} is an adapter, which is verified by what it was made from",
                "leave it out",
            )


def _is_of(place: str, table: str) -> bool:
    return place.partition(".")[0] == table


def _registered(ref: str) -> bool:
    from adapterkit.errors import RegistryError
    from adapterkit.registry.finder import is_known
    from adapterkit.registry.home import open_home

    try:
        return is_known(open_home(None), ref)
    except RegistryError:
        return False


def place_of(file: RecipeFile, name: str) -> Path | Address:
    """Where a path of a recipe lies: beside it, or where an address says."""
    if (address := address_of(name)) is not None:
        return address
    return file.folder / Path(local(name, "a path of the recipe")).expanduser()


def reference(place: Path | Address) -> Path | str:
    """A place as a verb takes it."""
    return str(place) if isinstance(place, Address) else place


def _written(file: RecipeFile, step: Step) -> list[tuple[Path | Address, Place]]:
    """Every path that a step writes, and the key that names it."""
    places: list[tuple[Path | Address, Place]] = [(step.out, ("outputs", step.name, "path"))]
    if step.verify is not None and step.verify.html is not None:
        at: Place = ("verify", "html") if step.asked.verify is None else ("outputs", step.name, "verify", "html")
        places.append((place_of(file, step.verify.html), at))
    if step.projector is not None:
        places.append((step.projector, ("outputs", step.name, "mmproj")))
    if step.residual is not None:
        places.append((step.residual, ("outputs", step.name, "residual")))
    return places


def check_inside(file: RecipeFile, steps: Sequence[Step]) -> None:
    """Refuse outputs outside of the recipe's folder, also through links in it: a recipe may come with a repository of
    somebody else's.

    Raises:
        UnsafeError: there is one.
    """
    project = _real(file.folder)
    for step in steps:
        for path, place in _written(file, step):
            with located(file, *place):
                if isinstance(path, Address) or not _real(path.parent).joinpath(path.name).is_relative_to(project):
                    raise UnsafeError(
                        f"{shown(place)} lies outside of the recipe's folder, at {path}",
                        f"give it a path in there, or allow it with {option('outside', True)}",
                    )


def _check_paths(file: RecipeFile, steps: Mapping[str, Step]) -> None:
    """No two outputs on one path or in each other, none over an input or the recipe."""
    taken: dict[_Spot, tuple[str, Place]] = {}
    recipe = _spot(file.path)
    for step in steps.values():
        for path, place in _written(file, step):
            real = _spot(path)
            for other, (which, there) in taken.items():
                if _within(other, real) or _within(real, other):
                    how = "is where" if other == real else "lies in or around where"
                    line = file.at(*there)[1]
                    file.fail(
                        place, f"{_short(file, path)} {how} {which} goes (line {line})", "give each a path of its own"
                    )
            if _within(recipe, real):
                file.fail(
                    place, f"{_short(file, path)} would be written over the recipe", "name a folder or file below it"
                )
            taken[real] = (shown(place[:-1]), place)
    for step in steps.values():
        for one in step.inputs:
            place_in = one.path or address_of(one.ref)
            if place_in is None or one.output is not None:
                continue
            real, alone = _spot(place_in), _is_alone(place_in)
            for other, (which, at) in taken.items():
                if _within(real, other) or (_within(other, real) and not alone):
                    file.fail(at, f"{which} would be written in or over the input {one.ref}", "write it elsewhere")


def _ordered(file: RecipeFile, steps: Mapping[str, Step]) -> tuple[Step, ...]:
    """Every step after what it needs, else in the recipe's own order.

    Raises:
        RecipeError: a cycle.
    """
    done: dict[str, Step] = {}

    def visit(name: str, road: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in road:
            circle = " -> ".join((*road[road.index(name) :], name))
            inner = steps[road[-1]]
            place = next(one.place for one in inner.inputs if one.output == name)
            file.fail(place, f"outputs need each other in a circle: {circle}", "make one of them from something else")
        for other in steps[name].needs:
            visit(other, (*road, name))
        done[name] = steps[name]

    for name in steps:
        visit(name, ())
    return tuple(done.values())


_Spot = tuple[str, ...]


def _spot(place: Path | Address) -> _Spot:
    """A place as the names that lead to it, links followed: what lies in it has a longer one."""
    if isinstance(place, Address):
        return (f"{place.scheme}://{place.bucket}", *filter(None, place.key.split("/")))
    return _real(place).parts


def _within(inner: _Spot, outer: _Spot) -> bool:
    return inner[: len(outer)] == outer


def _is_alone(place: Path | Address) -> bool:
    """Whether an input is a file, in which nothing lies."""
    if isinstance(place, Address):
        return place.suffix in (".gguf", ".safetensors")
    return not _real(place).is_dir()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _short(file: RecipeFile, path: Path | Address) -> str:
    if isinstance(path, Address):
        return str(path)
    try:
        return str(path.relative_to(file.folder))
    except ValueError:
        return str(path)
