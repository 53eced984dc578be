"""Which type llama-quantize gives each tensor for a file type such as ``Q4_K_M``, as tables.

Source: ``tensor_allows_quantization``, ``llama_tensor_get_type``, ``tensor_type_fallback`` and
``tensor_requires_imatrix`` of llama.cpp's llama-quant.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkit.errors import UsageError
from adapterkit.gguf.filetypes import FILE_TYPES, file_type
from adapterkit.gguf.types import TYPES, ggml_type

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""For rows that are no multiple of 256; when they are no multiple of 32 either, F16."""

TIME_MIX = (
    "first",
    "w0",
    "w1",
    "w2",
    "v0",
    "v1",
    "v2",
    "a0",
    "a1",
    "a2",
    "g1",
    "g2",
    "decay_w1",
    "decay_w2",
    "lerp_fused",
)

KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
KEPT_PARTS = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    *(f"time_mix_{part}.weight" for part in TIME_MIX),
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
"""Parts of the names of tensors that keep their type: small, or sensitive."""

CATEGORIES = (  # (category, part of the name), the first that matches
    ("attn_v", "attn_qkv.weight"),
    ("attn_v", "attn_kv_b.weight"),
    ("attn_v", "attn_v.weight"),
    ("attn_k", "attn_k.weight"),
    ("attn_q", "attn_q.weight"),
    ("attn_output", "attn_output.weight"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True)
class TensorPlace:
    """What a rule may ask: the tensor's layer ``i`` of ``n``, and the model."""

    i: int
    n: int
    gqa: int
    experts: int
    imatrix: bool
    falcon: bool

    @property
    def first_eighth(self) -> bool:
        return self.i < self.n // 8

    @property
    def more_bits(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        return self.first_eighth or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2

    @property
    def middle(self) -> bool:
        return self.n // 8 <= self.i < 7 * self.n // 8


class TypeRule(NamedTuple):
    """For these file types (space-separated), where ``when`` holds, a type. The first rule that fits decides."""

    file_types: str
    type: str
    when: Callable[[TensorPlace], bool] = lambda place: True


_LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
"""File types with rules of their own."""

OUTPUT = (
    TypeRule("MXFP4_MOE", "Q8_0"),
    TypeRule(f"{_LOW} IQ3_XXS", "Q5_K"),
    TypeRule("Q8_0", "Q8_0"),
    TypeRule(" ".join(FILE_TYPES), "Q6_K"),
)
TOKEN_EMBD = (
    TypeRule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
    TypeRule("IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
    TypeRule("TQ1_0 TQ2_0 Q2_0", "Q4_K"),
)
LOW_RULES: dict[str, tuple[TypeRule, ...]] = {
    "attn_v": (
        TypeRule(_LOW, "Q4_K", lambda p: p.gqa >= 4 or p.experts >= 4),
        TypeRule("IQ2_S IQ2_M", "IQ3_S"),
        TypeRule(_LOW, "Q2_K"),
    ),
    "attn_k": (TypeRule(_LOW, "Q4_K", lambda p: p.experts == 8),),
    "ffn_down": (
        TypeRule("IQ2_S IQ2_M", "IQ3_S", lambda p: p.first_eighth),
        TypeRule(_LOW, "Q2_K", lambda p: p.first_eighth),
    ),
    "attn_output": (
        TypeRule(_LOW, "Q5_K", lambda p: p.experts == 8),
        TypeRule("IQ1_S IQ1_M", "IQ2_XXS"),
        TypeRule("IQ2_S IQ2_M", "IQ3_S"),
    ),
}
_QUERY = (TypeRule("IQ3_XS", "IQ3_XXS"), TypeRule("IQ3_XXS", "IQ2_S"))
_WIDE = (TypeRule("IQ3_XS", "IQ3_XXS", lambda p: p.middle),)
RULES: dict[str, tuple[TypeRule, ...]] = {
    "attn_v": (
        TypeRule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "Q4_K", lambda p: p.gqa >= 4),
        TypeRule("Q2_K", "Q3_K"),
        TypeRule("IQ3_XXS", "IQ3_S", lambda p: not p.imatrix),
        TypeRule("IQ3_M", "Q4_K"),
        TypeRule("Q3_K_M", "Q5_K", lambda p: p.i < 2),
        TypeRule("Q3_K_M", "Q4_K"),
        TypeRule("Q3_K_L", "Q5_K"),
        TypeRule("IQ4_NL IQ4_XS", "Q5_K", lambda p: p.gqa >= 4),
        TypeRule("Q4_K_M Q5_K_M", "Q6_K", lambda p: p.more_bits),
        TypeRule("Q4_K_S", "Q5_K", lambda p: p.i < 4),
    ),
    "attn_k": (TypeRule(" ".join(FILE_TYPES), "Q8_0", lambda p: p.experts == 8), *_QUERY),
    "attn_q": _QUERY,
    "attn_output": (
        TypeRule("Q3_K_L", "Q4_K", lambda p: p.falcon),
        TypeRule(
            "Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS",
            "Q5_K",
            lambda p: p.experts == 8 and not p.falcon,
        ),
        TypeRule("Q2_K", "Q3_K", lambda p: p.experts != 8 and not p.falcon),
        TypeRule("IQ3_XXS", "IQ3_S", lambda p: p.experts != 8 and not p.falcon),
        TypeRule("Q3_K_M IQ3_M", "Q4_K", lambda p: p.experts != 8 and not p.falcon),
        TypeRule("Q3_K_L", "Q5_K", lambda p: p.experts != 8 and not p.falcon),
    ),
    "ffn_down": (
        TypeRule("Q2_K", "Q3_K"),
        TypeRule("Q2_K_S", "Q4_K", lambda p: p.first_eighth),
        TypeRule("IQ3_XXS", "Q4_K", lambda p: not p.imatrix and p.first_eighth),
        TypeRule("IQ3_XXS", "Q3_K", lambda p: not p.imatrix),
        TypeRule("Q3_K_M", "Q5_K", lambda p: p.i < p.n // 16),
        TypeRule("Q3_K_M", "Q4_K", lambda p: not p.falcon or p.more_bits),
        TypeRule("IQ3_M", "Q4_K", lambda p: p.first_eighth or (p.experts == 8 and p.more_bits)),
        TypeRule("Q3_K_L", "Q4_K", lambda p: p.falcon),
        TypeRule("Q3_K_L", "Q5_K"),
        TypeRule("Q4_K_M", "Q6_K", lambda p: p.i < p.n // 16 if p.falcon else p.more_bits),
        TypeRule("Q4_K_M", "Q5_K", lambda p: p.falcon and p.more_bits),
        TypeRule("IQ4_NL IQ4_XS", "Q5_K", lambda p: p.first_eighth and not p.imatrix),
        TypeRule("Q5_K_M", "Q6_K", lambda p: p.more_bits),
        TypeRule("Q4_K_S", "Q5_K", lambda p: p.first_eighth and not p.falcon),
        TypeRule("Q4_0", "Q4_1", lambda p: p.imatrix and p.first_eighth),
        TypeRule("Q5_0", "Q5_1", lambda p: p.imatrix and p.first_eighth),
    ),
    "ffn_gate": _WIDE,
    "ffn_up": _WIDE,
}
LARGE_MODELS = {"llama": 80, "deci": 80, "qwen2": 80, "olmo": 80, "jais2": 68}
"""Layers of the "70B" models of an architecture, whose small attn_v gets five bits; llama only with grouped queries."""


def quantizable(name: str, shape: Sequence[int], leave_output: bool = False) -> bool:
    """Whether llama-quantize touches a tensor at all: a matrix or a stack of them, whose name is not on the list."""
    dims = list(shape)
    while len(dims) > 1 and dims[0] == 1:  # ggml drops leading dimensions of one
        dims.pop(0)
    if len(dims) < 2 or not name.endswith("weight") or name in KEPT_NAMES or (leave_output and name == "output.weight"):
        return False
    return not any(part in name for part in KEPT_PARTS)


def needs_importance(name: str, type_name: str, ftype: str) -> bool:
    """Whether llama-quantize refuses to write this tensor without an importance matrix."""
    if name in EMBEDDINGS or name == "output.weight":
        return False
    return TYPES[type_name].needs_importance or (type_name == "Q2_K" and file_type(ftype)[0] == "Q2_K_S")


def choose_types(
    tensors: Sequence[tuple[str, Sequence[int], str]],
    ftype: str,
    arch: str,
    hparams: Mapping[str, Any],
    has_imatrix: bool = False,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    token_embedding_type: str | None = None,
    leave_output: bool = False,
) -> dict[str, str]:
    """The type of every tensor of a file.

    Args:
        tensors: (GGUF name, shape with the row length last, type it has now) of all tensors of the model.
        ftype: the mix, such as ``"Q4_K_M"``.
        arch: ``general.architecture``.
        hparams: ``n_layer``, and where the model has them ``n_expert``, ``n_head``, ``n_head_kv`` (number or list).
        has_imatrix: whether an importance matrix is used.
        pure: every tensor the mix's default type.
        tensor_types: (regular expression, type) pairs that go before the mix's rules; the first that is found decides.
        output_type: for ``output.weight``, and for the embeddings of a model without it.
        token_embedding_type: for the embeddings.
        leave_output: ``output.weight`` keeps its type.

    Raises:
        UsageError: an unknown mix or type, a regular expression that is none, a type by hand that a row does not fit,
            or a name without a layer number in a model with experts.
    """
    mix, (_, default) = file_type(ftype)
    patterns = [(compiled(pattern), ggml_type(name).name) for pattern, name in tensor_types]
    output = ggml_type(output_type).name if output_type else None
    embedding = ggml_type(token_embedding_type).name if token_embedding_type else None
    state = _Mix(mix, arch, hparams, has_imatrix, [name for name, _, _ in tensors])
    chosen = {}
    for name, shape, source in sorted(tensors, key=lambda tensor: (_layer(tensor[0], -1), tensor[0])):
        if not quantizable(name, shape, leave_output):
            chosen[name] = source
        elif embedding and name in EMBEDDINGS:
            chosen[name] = _by_hand(name, shape[-1], embedding)
        elif output and name == "output.weight":
            chosen[name] = _by_hand(name, shape[-1], output)
        elif not TYPES[default].is_quantized:
            chosen[name] = default
        else:
            manual = next((wanted for pattern, wanted in patterns if pattern.search(name)), None)
            wanted = manual or (default if pure else state.choose(name, shape, default, output))
            chosen[name] = fitting(shape[-1], wanted)
    return {name: chosen[name] for name, _, _ in tensors}


class _Mix:
    """The rules for one file, and the counters that they advance, tensor by tensor."""

    def __init__(self, mix: str, arch: str, hparams: Mapping[str, Any], imatrix: bool, names: Sequence[str]) -> None:
        heads, kv_heads = (_first(hparams.get(key)) for key in ("n_head", "n_head_kv"))
        self.mix = mix
        self.arch = arch
        self.layers = int(hparams["n_layer"])
        self.experts = int(hparams.get("n_expert") or 0)
        self.gqa = heads // kv_heads if kv_heads else 0
        self.large = LARGE_MODELS.get(arch) == self.layers and (arch != "llama" or heads != kv_heads)
        self.imatrix = imatrix
        self.tied = "output.weight" not in names
        self.seen = dict.fromkeys(("attn_v", "ffn_down", "ffn_gate", "ffn_up"), 0)
        self.attn_v = sum(_category(name) == "attn_v" for name in names)

    def choose(self, name: str, shape: Sequence[int], default: str, output: str | None) -> str:
        if name == "output.weight" or (self.tied and name in EMBEDDINGS):
            return output or self._output(shape, default)
        if self.mix == "MXFP4_MOE":
            stacked = len(shape) > 2 and shape[-3] > 1
            expert = self.arch != "bailingmoe3" or _category(name) in ("ffn_up", "ffn_gate", "ffn_down")
            return "MXFP4" if stacked and expert else "Q8_0"
        if name in EMBEDDINGS:
            return _first_rule(TOKEN_EMBD, self.mix, self._place("", 0), default)
        category = _category(name)
        low = self.mix in _LOW.split()
        place = self._place(category, self._index(name, category, low))
        found = _first_rule((LOW_RULES if low else RULES).get(category, ()), self.mix, place, default)
        if category == "attn_v" and not low:
            if self.large and found in ("Q3_K", "Q4_K"):
                found = "Q5_K"
            if self.experts == 8:
                found = "Q8_0"
        return found

    def _output(self, shape: Sequence[int], default: str) -> str:
        if self.mix != "MXFP4_MOE" and (self.arch == "falcon" or shape[-1] % TYPES[default].block):
            return "Q8_0"
        return _first_rule(OUTPUT, self.mix, self._place("", 0), default)

    def _index(self, name: str, category: str, low: bool) -> int:
        """The tensor's layer: how many of its category came before, or its number where experts mix up the order."""
        index = self.seen.get(category, 0)
        if category in self.seen:
            self.seen[category] = index + 1
        if self.experts > 1 and category.startswith("ffn_") and not low:
            index = _layer(name, -1)
            if not 0 <= index < self.layers:
                message = f"tensor {name} has no layer number below {self.layers}"
                raise UsageError(message, "name it blk.N... or correct block_count")
        return index

    def _place(self, category: str, index: int) -> TensorPlace:
        count = self.attn_v if category == "attn_v" else self.layers
        return TensorPlace(index, count, self.gqa, self.experts, self.imatrix, self.arch == "falcon")


def _first_rule(rules: Sequence[TypeRule], mix: str, place: TensorPlace, default: str) -> str:
    return next((rule.type for rule in rules if mix in rule.file_types.split() and rule.when(place)), default)


def _category(name: str) -> str:
    if name == "output.weight" or name in EMBEDDINGS:
        return ""
    return next((category for category, part in CATEGORIES if part in name), "")


def _layer(name: str, missing: int) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else missing


def _first(value: Any) -> int:
    """A number, or the first of a list with one per layer."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else 0
    return int(value or 0)


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a tensor type option.

    Raises:
        UsageError: it is none.
    """
    try:
        return re.compile(pattern.lower())
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}", "correct the tensor type option") from error


def _by_hand(name: str, columns: int, wanted: str) -> str:
    if columns % TYPES[wanted].block:
        raise UsageError(
            f"'{name}' has rows of {columns} weights, which {wanted} cannot hold", "choose another type for it"
        )
    return wanted


def fitting(columns: int, wanted: str) -> str:
    """The wanted type, or the one llama-quantize takes when rows of ``columns`` cannot have it."""
    if columns % TYPES[wanted].block == 0:
        return wanted
    fallback = FALLBACKS.get(wanted, wanted)
    return fallback if columns % TYPES[fallback].block == 0 else "F16"
