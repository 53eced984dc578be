"""What a row of the table of architectures is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.gguf.arch.builtin import Fixed
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.ops import Op

    # A value for a key, or None where the key is left out.
    Source = Callable[[Config], Any]

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."


@dataclass(frozen=True)
class Rule:
    """Tensors of one kind, in a Hugging Face checkpoint and in GGUF.

    Attributes:
        hf: a name with ``{i}`` for the layer and ``{e}`` for what is stacked (experts). One without ``.weight`` or
            ``.bias`` stands for both.
        gguf: the tensors that they become, in the same way; none drops them.
        ops: what happens on the way.
        writes: False for a spelling that is read and never written.
        layers: which layers have this name, where others have another for the same tensor.
        items: what stands for ``{e}``, in order, where that is no number: ``("q", "k", "v")``.
    """

    hf: str
    gguf: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    writes: bool = True
    layers: Callable[[Config, int], bool] | None = None
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Key:
    """A key-value of the architecture's own metadata.

    Attributes:
        name: without the architecture's name in front.
        source: fields of the config, the first that is there; or what computes the value.
        default: for a config without those fields; None leaves the key out.
        needed: the config must say it.
        field: the field that a config made from GGUF gets; by default the first of ``source``.
    """

    name: str
    source: str | tuple[str, ...] | Source
    default: Any = None
    needed: bool = False
    field: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        if callable(self.source):
            return (self.field,) if self.field else ()
        names = (self.source,) if isinstance(self.source, str) else self.source
        return (self.field or names[0],)


@dataclass(frozen=True)
class ComputedTensor:
    """A small tensor that is computed from the config: divisors of rotary frequencies.

    ``general``: it holds whatever scaling a config asks for.
    """

    tensor: str
    make: Callable[[Config], Sequence[float] | None]
    general: bool = False


@dataclass(frozen=True)
class Scalars:
    """Numbers that the checkpoint has as one small tensor per layer, and GGUF as an array in its metadata.

    Attributes:
        hf: the tensor's name, with ``{i}`` for the layer.
        key: of the metadata, without the architecture's name in front.
        shape: of each tensor.
    """

    hf: str
    key: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class ArchSpec:
    """One architecture.

    Attributes:
        arch: ``general.architecture``.
        classes: of transformers' ``architectures``; the first is written into a config made from GGUF.
        model_type: of such a config.
        rules: of its tensors; the first that fits a name counts.
        keys: of its metadata, after the common ones; a later one takes an earlier one's place.
        common: whether the keys that most architectures share are written.
        leave: common keys that are not.
        factors: tensors that are made from the config.
        vocab: kind of tokenizer, for `read_vocab`.
        drops: parts of names of tensors that runtimes do not use.
        prefixes: of tensor names that are taken off; the root of the rules' names stands there instead.
        root: what names of a written checkpoint begin with, but for output layers.
        types: further model types that are this architecture.
        needs: tensors that every file has; ``{i}`` stands for every layer.
        uneven: layers may lack tensors that others have.
        tied: the output layer is always the embedding.
        check: what refuses a config that this architecture's runtime cannot run.
        defaults: fields of a config made from GGUF that its metadata does not say.
        encoder: no text comes out of it.
        experts: of rows of one architecture, the one with (without) experts; told apart by that in a GGUF.
        when: of rows of one architecture, whether a GGUF file is this one; those without a condition come last.
        scaled: numbers of the config are multiplied into weights and cannot be told from a GGUF file.
        own_output: the runtime loads no such model without ``output.weight``, so a tied one gets the embedding twice.
        fixed: what the runtime has built in whatever the config says; see `adapterkit.gguf.arch.contract`.
        reads_yarn_bounds: the runtime reads ``beta_fast`` and ``beta_slow``.
        variant: the model type of another row of the same classes, for configs that are better read by it.
        scalars: small tensors that are metadata in GGUF.
        back: fields of a config made from GGUF beyond those of the keys, from its key-values, the config so far and
            the file's tensors.
        no_lora: ends of names of weights that the runtime multiplies with itself, without looking for a LoRA (plain
            ``ggml_mul_mat`` in its ``src/models``).
        note: what the runtime does otherwise whatever a config says.
        output_apart: the output layer is other numbers than the embedding although the config ties them.
    """

    arch: str
    classes: tuple[str, ...]
    model_type: str
    rules: tuple[Rule, ...]
    keys: tuple[Key, ...] = ()
    common: bool = True
    leave: tuple[str, ...] = ()
    factors: tuple[ComputedTensor, ...] = ()
    vocab: str = "auto"
    drops: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    root: str = ""
    types: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("token_embd.weight", "output_norm.weight")
    uneven: bool = False
    tied: bool = False
    check: Callable[[Config], None] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    encoder: bool = False
    scaled: bool = False
    experts: bool | None = None
    when: Callable[[Any], bool] | None = None
    variant: Callable[[Config], str | None] | None = None
    scalars: tuple[Scalars, ...] = ()
    no_lora: tuple[str, ...] = ()
    own_output: bool = False
    output_apart: bool = False
    fixed: tuple[Fixed, ...] = ()
    reads_yarn_bounds: bool = False
    note: str = ""
    back: Callable[[Mapping[str, Any], Mapping[str, Any], Any], dict[str, Any]] | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        return (self.model_type, *self.types)


def rule(hf: str, *gguf: str, ops: Sequence[Op] = (), writes: bool = True) -> Rule:
    return Rule(hf, gguf, tuple(ops), writes)


def block(hf: str, *gguf: str, ops: Sequence[Op] = (), writes: bool = True) -> Rule:
    """A rule for a tensor of every layer, by its names within the layer."""
    return Rule(LAYER + hf, tuple(BLOCK + name for name in gguf), tuple(ops), writes)


def blocks(**names: str) -> tuple[Rule, ...]:
    """Rules without operations: GGUF name (``attn_q``) = name in the layer."""
    return tuple(block(hf, gguf) for gguf, hf in names.items())


def tree(layer: str, names: Mapping[str, str], ops: Mapping[str, Sequence[Op]] | None = None) -> tuple[Rule, ...]:
    """Rules of the tensors of a layer: GGUF name (``attn_q``) = name after ``layer``, with operations by GGUF name."""
    return tuple(rule(f"{layer}{hf}", f"{BLOCK}{gguf}", ops=(ops or {}).get(gguf, ())) for gguf, hf in names.items())


def named_items(hf: str, items: tuple[str, ...], gguf: str, *ops: Op) -> Rule:
    """A rule for tensors whose names begin with ``hf`` and end with ``items``, which are put together in that order."""
    return Rule(f"{hf}{{e}}", (gguf,), tuple(ops), items=items)


def plus_one(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Norms that are stored without the 1 that is added to their weights."""
    from adapterkit.gguf.arch.ops import Add

    found: list[Rule] = []
    for one in rules:
        if one.hf.endswith("norm"):
            found += [Rule(f"{one.hf}.weight", (f"{one.gguf[0]}.weight",), (Add(1.0),))]
            found += [Rule(f"{one.hf}.bias", (f"{one.gguf[0]}.bias",))]
        else:
            found.append(one)
    return tuple(found)
