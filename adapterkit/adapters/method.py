"""What a method is: the keys it owns, the config it reads, and the edits it makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import AdapterError, TargetError, option
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.change import Change
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.adapters.names import Names
    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.tensor import Tensor


@dataclass(frozen=True)
class Edit:
    """One change of one parameter.

    Attributes:
        target: where the parameter lives.
        change: what happens to it.
        override: the change takes the place of the base's own tensor before anything else is added to it.
    """

    target: Target
    change: Change
    override: bool = False


@dataclass(frozen=True)
class Module:
    """The tensors that an adapter has for one module.

    Attributes:
        path: module path without ``base_model.model.``, with wrapping ``base_layer`` components taken out.
        depth: how many ``base_layer`` stood at its end (parameters of one module wrapped one in the other).
        tensors: handle by the part of the key after the path.
    """

    path: str
    depth: int
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str, where: str) -> Tensor:
        """A tensor that must be there.

        Raises:
            AdapterError: it is not.
        """
        if name not in self.tensors:
            raise AdapterError(f"{where}: {self.path} has no {name}", "the file is incomplete; save the adapter again")
        return self.tensors[name]


@dataclass(frozen=True)
class Context:
    """What a method may look at besides its module.

    Attributes:
        adapter: all of it.
        names: parameter path to target in this base.
        model_type: of the base's config.
        residual_base: the base given is what training left behind, not the original model.
        siblings: all modules of the adapter.
        shared: tensors that all modules use, by key.
        scratch: what a method works out once for all modules, by a name of its own.
    """

    adapter: Adapter
    names: Names
    model_type: str
    residual_base: bool = False
    siblings: tuple[Module, ...] = ()
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> AdapterConfig:
        return self.adapter.config

    @property
    def where(self) -> str:
        return self.adapter.source.name

    def target(self, parameter: str, key: str) -> Target:
        """Where ``parameter`` lives in the base.

        Raises:
            TargetError: nowhere; the nearest names are in the sentence.
        """
        found = self.names.find(parameter)
        if found is None:
            shared = self.names.tied(parameter)
            found = None if shared is None else self.names.find(shared)
            found = None if found is None else replace(found, parameter=parameter)
        if found is None:
            near = self.names.nearest(parameter)
            hint = f"nearest: {', '.join(near)}" if near else "check that this is the base it was trained on"
            raise TargetError(f"{self.where}: '{key}' has no target in the base ('{parameter}')", hint)
        return found


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        peft_type: as the config has it.
        title: as people call it.
        formula, source: for the docs.
        suffixes: endings of the keys it owns, after the module path.
        ignored: endings it may ignore: state of training that the formula does not use.
        shared: names of tensors that all modules use and that stand beside them (``vera_A``), not in one.
        fields: config fields it knows, beside the common ones.
        edits: makes the edits of one module.
        refuse: a reason why an adapter of this method cannot be merged, and the way out, or None.
        low_rank: whether its change is an addition of low rank.
        only_in_files: it is read from single files, and PEFT has no form for it.
        notes: for the docs: what a user should know, above all where PEFT does something else.
    """

    peft_type: str
    title: str
    formula: str
    source: str
    suffixes: tuple[str, ...]
    edits: Callable[[Module, Context], Iterable[Edit]]
    ignored: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    fields: frozenset[str] = field(default_factory=frozenset)
    refuse: Callable[[AdapterConfig, bool], tuple[str, str] | None] = lambda config, residual_base: None
    low_rank: bool = False
    only_in_files: bool = False
    notes: str = ""


GIVE_BASE = "give the base it was trained on"


def check_matrix(target: Target, expected: tuple[int, int], key: str, where: str) -> None:
    """Whether a change of this shape fits its target.

    Raises:
        TargetError: it does not; the sentence says why where the shapes tell.
    """
    if target.matrix == expected:
        return
    fact = (
        f"{where}: '{key}' is made for a weight of {expected[0]} x {expected[1]}, and {target.parameter} is "
        f"{' x '.join(map(str, target.shape))}"
    )
    module = target.parameter.rpartition(".")[0].rpartition(".")[2]
    groups = expected[1] // max(target.matrix[1], 1)
    grouped = expected == (target.matrix[0], groups * target.matrix[1]) and groups > 1 and expected[0] % groups == 0
    if len(target.shape) > 2 and grouped:
        raise TargetError(
            f"{fact}: a convolution in {groups} groups, and a change over the inputs of all groups has no place in it",
            "no tool can merge it; serve the adapter beside its base, or train without this convolution",
        )
    if len(target.shape) == 2 and target.matrix == expected[::-1]:
        raise TargetError(
            f"{fact}: it fits only the other way round",
            f"if the module is transformers' Conv1D: {option('conv1d', module)}",
        )
    if len(target.shape) == 2 and target.matrix[1] == expected[1]:
        raise TargetError(
            f"{fact}: the two have another number of rows (a vocabulary, labels or heads of another size)",
            f"give the base whose {module} has {expected[0]} rows",
        )
    raise TargetError(fact, GIVE_BASE)
