"""What an adapter of a single file holds, and the `Adapter` that some of its modules make.

Each module has one algorithm, told by its tensors, and perhaps a scale of its own: ``alpha``, a number beside it. Without one,
with 0, and where a LoKr stores both factors whole, the scale is 1. OFT keeps its constraint there. diffusers' newer files
carry PEFT's config of each part in their metadata.

What is LoRA, DoRA, LoHa or LoKr in every module becomes an adapter of that PEFT type. Any other (Tucker cores, norms of inputs,
DoRA of LoHa and LoKr, full differences, norms, OFT, BOFT, (IA)^3, GLoRA, or several of all these) is of type ``LYCORIS``, a
method of ours (`adapterkit.adapters.methods.single`).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.config import FLAT, AdapterConfig
from adapterkit.adapters.formats.keys import BIAS, DOWN, EMBEDDINGS, UP, WHOLE, is_prefixed, read_key
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError, UnsupportedAdapter
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Stored, Tensor

METADATA = "lora_adapter_metadata"
MAX_METADATA = 1 << 20  # characters

# PEFT's method -> what the tensors are called in LyCORIS and in PEFT
PEFT_NAMES: dict[str, dict[str, str]] = {
    "LORA": {
        DOWN: "lora_A.weight",
        UP: "lora_B.weight",
        BIAS: BIAS,
        "dora_scale": "lora_magnitude_vector",
    },
    "LOHA": {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    "LOKR": {
        name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    },
}
# The same for the method of ours; names that could be a parameter's own get a word before them.
OTHER_NAMES = {
    **{name: name for name in (DOWN, UP, "lora_mid.weight", "dora_scale")},
    **PEFT_NAMES["LOHA"],
    **PEFT_NAMES["LOKR"],
    **{
        name: f"lycoris_{name}"
        for name in (
            *("diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale"),
            *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
            *("bias_indices", "bias_values", "bias_size"),
        )
    },
    BIAS: "lycoris_diff_b",
}
_IA3 = "lycoris_ia3.weight"  # `weight` in the file, beside `on_input`
_REFUSED = {
    **dict.fromkeys(
        ("lambda_layer", "q_layer.weight", "p_layer.weight"),
        (
            "belongs to T-LoRA, whose rank depends on the timestep, so that no one weight stands for it",
            "load it with LyCORIS beside the base",
        ),
    ),
    "scalar": (
        "is a scale that LyCORIS folds into its factors when it saves",
        "save the file with the trainer that made it",
    ),
}
_NUMBERS = {
    "F16": "<e",
    "F32": "<f",
    "F64": "<d",
    "BOOL": "<?",
    "I8": "<b",
    "U8": "<B",
    "I16": "<h",
    "I32": "<i",
    "I64": "<q",
}
# The factor whose first dimension is the rank.
_RANKED = (DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
# Fields of a config in the metadata that the tensors tell too, or that say nothing about a merge.
_TOLD = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
        *("target_modules", "exclude_modules", "lora_dropout", "bias", "init_lora_weights", "fan_in_fan_out"),
        *("inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
        *("layers_to_transform", "layers_pattern", "modules_to_save", "megatron_core", "ensure_weight_tying"),
        "qalora_group_size",  # of `use_qalora`, and set where that is not
    }
)


@dataclass(frozen=True)
class FileModule:
    """One module of a file.

    Attributes:
        part: of a pipeline; empty where the key names none.
        path: as it stands in the file.
        flat: the path has ``_`` for every dot.
        tensors: in LyCORIS' terms.
        alpha: beside it; None where there is none.
        on_input: of (IA)^3.
    """

    part: str
    path: str
    flat: bool
    tensors: Mapping[str, Stored]
    alpha: float | None = None
    on_input: float | None = None

    @property
    def rank(self) -> int | None:
        """Of its factors; 0 where both factors of a LoKr are whole, None where it has no factors."""
        named = [leaf for leaf in self.tensors if leaf.startswith(("lora_", "hada_", "lokr_"))]
        if not named:
            return None
        return next((self.tensors[leaf].shape[0] for leaf in _RANKED if leaf in self.tensors), 0)

    @property
    def parameter(self) -> bool:
        """Whether it is a parameter of the base's own, stored whole."""
        return WHOLE in self.tensors


@dataclass(frozen=True)
class Contents:
    """A file, read from its header.

    Attributes:
        where: what to call it in an error.
        modules: in the order of the file.
        style: whose way of writing keys most of them have.
        told: configs in the metadata, by part.
        apart: tensors that are no adapter's: embeddings.
        metadata: the file's own.
        placed: the paths are those of a base.
    """

    where: str
    modules: tuple[FileModule, ...]
    style: str
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    placed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline, in the order of the file."""
        return tuple(dict.fromkeys(module.part for module in self.modules))

    def of(self, *parts: str) -> tuple[FileModule, ...]:
        return tuple(module for module in self.modules if module.part in parts)


def read_contents(stored: Mapping[str, Stored], metadata: Mapping[str, str], where: str) -> Contents:
    """The modules of a file.

    Raises:
        UnsupportedAdapter: tensors of an algorithm that is not read.
        AdapterError: a factor is no matrix, two tensors have one name, or metadata is no config.
    """
    found: dict[tuple[str, str, bool], dict[str, Stored]] = {}
    styles: Counter[str] = Counter()
    apart = []
    for name, tensor in stored.items():
        if name.startswith(EMBEDDINGS):
            apart.append(name)
            continue
        key = read_key(name)
        _check_leaf(name, key.leaf, where, key.flat)
        held = found.setdefault((key.part, key.path, key.flat), {})
        if key.leaf in held:
            what = (
                f"two modules called '{key.path}'" if is_prefixed(name) else f"two tensors for '{key.path}.{key.leaf}'"
            )
            raise AdapterError(f"{where} holds {what}", "save the adapter again")
        held[key.leaf] = tensor
        styles[key.style] += 1
    said = _said(metadata, where)
    modules = tuple(_module(part, path, flat, own, where) for (part, path, flat), own in found.items())
    told = {part: config for part in dict.fromkeys(module.part for module in modules) if (config := _told(part, said))}
    style = styles.most_common(1)[0][0] if styles else ""
    return Contents(where, modules, style, told, tuple(apart), dict(metadata))


def _check_leaf(name: str, leaf: str, where: str, flat: bool) -> None:
    known = leaf in OTHER_NAMES or leaf in ("alpha", "on_input", WHOLE) or (flat and leaf == "weight")
    if known:
        return
    why, instead = _REFUSED.get(
        leaf or name.rpartition(".")[2],
        ("belongs to an algorithm that is not read from such files", "merge it with the tool that trained it"),
    )
    raise UnsupportedAdapter(f"{where}: '{name}' {why}", instead)


def _module(part: str, path: str, flat: bool, held: dict[str, Stored], where: str) -> FileModule:
    numbers = {name: number(held.pop(name), where) for name in ("alpha", "on_input") if name in held}
    if not held:
        raise AdapterError(f"{where}: '{path}' has an alpha and nothing else", "save the adapter again")
    if "weight" in held and "on_input" not in numbers:
        raise UnsupportedAdapter(
            f"{where}: '{held['weight'].name}' belongs to an algorithm that is not read from such files",
            "merge it with the tool that trained it",
        )
    for leaf, tensor in held.items():
        factor = leaf.startswith(("lora_", "hada_", "lokr_")) and leaf != BIAS
        if factor and len(tensor.shape) < 2:
            raise AdapterError(f"{where}: '{tensor.name}' is {list(tensor.shape)}, no factor", "save the adapter again")
    return FileModule(part, path, flat, dict(held), numbers.get("alpha"), numbers.get("on_input"))


def _said(metadata: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The configs in the file's metadata: fields by part and name, as ``transformer.r``."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        found = json_value(text) if len(text) <= MAX_METADATA else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise AdapterError(f"{where}: its {METADATA} is no config", "save the adapter again")
    return found


def _told(part: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a part in the metadata; empty where it tells none."""
    lead = part + "." if part else ""
    own = {key.removeprefix(lead): value for key, value in said.items() if key.startswith(lead)}
    return {"peft_type": "LORA", **own} if "r" in own else {}


def assembled(contents: Contents, modules: Sequence[FileModule]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter of these modules, under the paths that they have.

    Raises:
        UnsupportedAdapter: a config in the metadata says of one part what cannot be said of several.
        AdapterError: a bias with a scale of its own stands beside another algorithm.
    """
    where = contents.where
    factored = [module for module in modules if not module.parameter]
    kind = next((kind for kind in PEFT_NAMES if all(_is_peft(kind, module) for module in factored)), "LYCORIS")
    tensors: dict[str, Tensor] = {}
    for module in modules:
        for leaf, tensor in module.tensors.items():
            name = module.path if leaf == WHOLE else f"{module.path}.{_name(kind, leaf, module, where)}"
            if name in tensors:
                raise AdapterError(f"{where} holds two tensors for '{name}'", "save the adapter again")
            tensors[name] = Renamed(name, tensor)
    told = {part: contents.told[part] for part in dict.fromkeys(m.part for m in modules) if part in contents.told}
    if told and len({module.part for module in modules}) == 1:
        return AdapterConfig(next(iter(told.values())), where), tensors
    for config in told.values():
        more = sorted(name for name, value in config.items() if name not in _TOLD and value)
        init = config.get("init_lora_weights")
        if more or (isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal")):
            raise UnsupportedAdapter(
                f"{where}: its metadata say of one part what they do not say of another ({more[0] if more else init})",
                "merge the parts one after the other, as FILE#PART",
            )
    return AdapterConfig(_config(kind, factored, told, where), where), tensors


def _config(
    kind: str, modules: Sequence[FileModule], told: Mapping[str, Mapping[str, Any]], where: str
) -> dict[str, Any]:
    ranks = {module.path: module.rank for module in modules if module.rank is not None}
    alphas: dict[str, float] = {}
    for module in modules:
        if module.part in told and module.rank:
            config = AdapterConfig(told[module.part], where)
            alphas[module.path] = config.scaling(module.path, module.rank) * module.rank
        elif module.rank is not None:
            alphas[module.path] = (module.alpha or module.rank) if module.rank else 1
        elif module.alpha is not None:
            alphas[module.path] = module.alpha  # what has no rank keeps it: GLoRA a scale, OFT a constraint
    field_of_alpha = "lora_alpha" if kind == "LORA" else "alpha"
    held = {leaf for module in modules for leaf in module.tensors}
    found: dict[str, Any] = {"peft_type": kind}
    for name, pattern, values in (
        ("r", "rank_pattern", {path: rank or 1 for path, rank in ranks.items()}),
        (field_of_alpha, "alpha_pattern", alphas),
    ):
        found[name] = next(iter(values.values()), 1) or 1
        if kind == "LYCORIS" or len(set(values.values())) > 1:
            # A pattern fits whatever ends with it, and the first one that fits is taken.
            found[pattern] = {path: values[path] for path in sorted(values, key=len, reverse=True)}
    if kind == "LORA":
        found |= {"use_dora": True} if "dora_scale" in held else {}
        found |= {"lora_bias": True} if BIAS in held else {}
    inputs = {module.path: bool(module.on_input) for module in modules if module.on_input is not None}
    found |= {"on_input": inputs} if inputs else {}
    if any(module.flat for module in modules):
        return found | {FLAT: True}
    return found if kind == "LYCORIS" else found | {"target_modules": list(ranks)}


def _is_peft(kind: str, module: FileModule) -> bool:
    """Whether PEFT has a form for a module: DoRA's norms are of outputs, LoKr is of no one-dimensional convolution,
    which PEFT lays out differently."""
    found = module.tensors
    if not found.keys() <= PEFT_NAMES[kind].keys():
        return False
    norms, whole = found.get("dora_scale"), found.get("lokr_w2")
    over_outputs = norms is None or norms.shape[:1] == (norms.numel,)
    return over_outputs and (whole is None or len(whole.shape) != 3)


def _name(kind: str, leaf: str, module: FileModule, where: str) -> str:
    """What a tensor is called once it is read."""
    if kind != "LYCORIS":
        return PEFT_NAMES[kind][leaf]
    if leaf == BIAS and module.alpha is not None and module.alpha != module.rank:
        raise AdapterError(
            f"{where}: '{module.path}.{BIAS}' is scaled, and stands beside another algorithm in the file",
            "save the LoRA alone",
        )
    return _IA3 if leaf == "weight" else OTHER_NAMES[leaf]


def number(tensor: Stored, where: str) -> float:
    """A scalar, read without torch."""
    data = tensor.source.read(tensor.offset, tensor.nbytes)
    if tensor.numel != 1 or (tensor.dtype.code not in _NUMBERS and tensor.dtype.code != "BF16"):
        raise AdapterError(f"{where}: '{tensor.name}' is no number", "save the adapter again")
    if tensor.dtype.code == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_NUMBERS[tensor.dtype.code], data)[0])


def moved(module: FileModule, path: str) -> FileModule:
    """The same module under another path, with dots."""
    return replace(module, path=path, flat=False)
