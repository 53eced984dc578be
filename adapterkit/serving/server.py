"""What a row of the table of servers says: what the server accepts, how it is started, and the file it wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.gguf.reader import GGUFHeader
    from adapterkit.serving.live import Live

# Fixes that several servers share. ``{adapter}`` and ``{base}`` stand for what `check` was given.
MERGED = "merge the adapter and serve the result: adapterkit merge {base} {adapter} -o merged"
PLAIN = "make plain LoRA of it: adapterkit convert {adapter} --to peft --plain --base {base} -o plain"
SCALED = "fold the scalings into the factors: adapterkit convert {adapter} --to peft --plain -o plain"
NAMED = "set base_model_name_or_path to the name under which the base is served"


@dataclass(frozen=True)
class Expectation:
    """What one server does with one feature, where that is written, and what to do about it.

    Attributes:
        feature: a key of `adapterkit.serving.features.FEATURES`.
        verdict: ``refused`` (the server says no), ``wrong`` (it goes on and computes something else than what was
            trained) or ``depends`` (it can be started or addressed so that it works).
        says: what happens, in words.
        source: where that is written.
        fix: what to do; ``{adapter}`` and ``{base}`` stand for what `check` was given.
        architectures: ``model_type`` of the bases for which it holds; empty for all.
    """

    feature: str
    verdict: str
    says: str
    source: str
    fix: str = MERGED
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """The ranks that a server takes.

    Attributes:
        largest: above it an adapter is refused.
        default: above it the server must be started with an option of its own.
        steps: the values that the option takes, in order; empty for any.
        option: the server's own flag.
        source: where that is written.
    """

    largest: int
    default: int
    option: str
    source: str
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredForms:
    """The quantized forms of a base that a server's documentation lists, as ``quant_method`` in config.json names them."""

    methods: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        model: the command for a whole model; ``{path}``, or ``{json}`` in quotes.
        adapters: the command for a base with adapters; ``{base}``, or ``{json}`` in quotes; ``{each}``, ``{rank}``,
            ``{count}``.
        source: where the flags are documented.
        each: one adapter in it; ``{name}``, ``{path}``, ``{about}``, a description in quotes; ``between`` stands between two.
        several: what is added to the command where there is more than one.
        after: a request that names an adapter, where it takes more than its name; ``{json}`` path, ``{place}`` from 0.
        after_one: whether a single adapter needs that request too.
        parts: a set of GGUF files is named by a pattern, not by its first.
        note: what a user has to know; ``{ref}``.
        gguf: reads GGUF files and no folders of safetensors.
        single: takes one adapter.
        shell: the text is a command of a shell; a Modelfile is not.
        hub: it can load a base by its Hub id.
    """

    model: str
    adapters: str
    source: str
    each: str = ""
    between: str = " "
    several: str = ""
    after: str = ""
    after_one: bool = True
    parts: bool = False
    note: str = ""
    gguf: bool = False
    single: bool = False
    shell: bool = True
    hub: bool = True


@dataclass(frozen=True)
class ModelFile:
    """The file beside a GGUF model that loads it in a server.

    Attributes:
        suffix: what the file is called after the model's own name.
        text: path, header and ``generation_config.json`` of the model to the file's text, and notes for the user.
        script: the text is a command; the file becomes a script that runs it where the model lies.
        start: what a user runs; ``{path}`` of the file.
    """

    suffix: str
    text: Callable[[str, GGUFHeader, Mapping[str, Any]], tuple[str, tuple[str, ...]]]
    script: bool
    start: str


@dataclass(frozen=True)
class Server:
    """One server.

    Attributes:
        name: what ``--for`` calls it.
        expectations: what it makes of an adapter's features; what is not listed is taken as it was trained.
        ranks: the ranks it takes; None for any.
        stored: the quantized bases it reads; None where that is not known.
        launch: how it is started; None where `serve-args` cannot say.
        file: what a GGUF model gets beside it; None where it is not served from one.
        live: how it is told while it runs (`deploy`); None where it cannot be.
    """

    name: str
    expectations: tuple[Expectation, ...] = ()
    ranks: Ranks | None = None
    stored: StoredForms | None = None
    launch: Launch | None = None
    file: ModelFile | None = None
    live: Callable[[], Live] | None = None
