"""Scaled rotary embeddings: which keys and small tensors say to llama.cpp what a config says to transformers.

llama.cpp stretches frequencies by itself for ``linear`` and ``yarn`` (with yarn's usual bounds), multiplies cosine and sine
with ``rope.scaling.attn_factor`` in every architecture, and divides the frequencies by ``rope_freqs.weight`` in those that
load this tensor, which can hold any other stretching that does not depend on the length of the text.
Formulas: transformers' ``modeling_rope_utils``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, TargetError
from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.config import Config, llama3_factors
from adapterkit.gguf.arch.spec import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.gguf.arch.spec import ArchSpec

DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
YARN_FAST, YARN_SLOW = 32.0, 1.0  # the bounds of yarn that are built in, in turns of a frequency
OWN_YARN = "rope.scaling.yarn_log_multiplier"  # of architectures that compute the factor of attention themselves
ATTENTION = "rope.scaling.attn_factor"
# Architectures whose layers with windows are rotated plainly whatever is scaled in the others.
# Source: attn_factor in src/models of llama.cpp.
_PLAIN_WINDOWS = frozenset(("olmo2", "mellum", "laguna"))
_PLAIN = frozenset(("", "default", "mrope", "proportional", "axial", "none"))
SCALED = frozenset(("linear", "yarn", "longrope"))  # the types that a file has a word for
_EVERYWHERE = frozenset(
    ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
)


@dataclass(frozen=True)
class Scaling:
    """How the rotary embeddings of a model are scaled.

    Attributes:
        keys: of the metadata, without the architecture's name.
        notes: what differs all the same.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def scaling(spec: ArchSpec, config: Config) -> Scaling:
    """What a file says of the scaling that a config has.

    Raises:
        CheckpointError: a scaling without its numbers.
        TargetError: llama.cpp cannot compute it in this architecture.
    """
    found = _scaling(spec, config)
    kinds = config.get("layer_types")
    apart = {
        name: rope
        for name, rope in config.rope_by_kind.items()
        if isinstance(rope, dict) and name != "full_attention" and (not isinstance(kinds, list) or name in kinds)
    }
    for name, rope in apart.items():
        other = kind_of(rope)
        if other == "dynamic":
            late = f"rope type 'dynamic' of {name} is left out: texts of more than {config.number('context')} tokens differ"
            found = Scaling(found.keys, (*found.notes, late))
        elif other not in _PLAIN:
            raise _refused(spec, config, f"the rope type '{other}' in layers of the kind '{name}'")
    if apart and ATTENTION in found.keys and spec.arch not in _PLAIN_WINDOWS:
        raise _refused(
            spec,
            config,
            f"an attention factor of {_attention(config):g} in some layers and none in those of {min(apart)}",
        )
    return found


def _scaling(spec: ArchSpec, config: Config) -> Scaling:
    rope = config.rope
    kind = kind_of(rope)
    if kind in _PLAIN:
        return Scaling()
    if kind == "linear" and any(key.name == OWN_YARN for key in spec.keys):
        raise _refused(spec, config, "the rope type 'linear'")
    if kind == "linear":
        return Scaling({"rope.scaling.type": "linear", "rope.scaling.factor": need(config, "factor")})
    if kind == "dynamic" and rope.get("alpha") and NTK_ALPHA in spec.keys:
        return Scaling()  # the base says it
    if kind == "dynamic":
        return Scaling(
            {}, (f"rope type 'dynamic' is left out: texts of more than {config.number('context')} tokens differ",)
        )
    if kind == "yarn":
        return _yarn(spec, config)
    if kind == "llama3":
        if loads(spec, DIVISORS):
            return Scaling()
        raise _refused(spec, config, "the rope type 'llama3'")
    if kind == "longrope":
        if loads(spec, LONG):
            found: dict[str, Any] = {"rope.scaling.type": "longrope"}
            factor = long_attention(config)
            return Scaling(found if factor is None else {**found, ATTENTION: factor}, _by_context(config))
        raise _refused(spec, config, "the rope type 'longrope'")
    raise _refused(spec, config, f"the rope type '{kind}'")


def loads(spec: ArchSpec, tensor: str) -> bool:
    """Whether an architecture of the runtime loads this small tensor."""
    return any(one.tensor == tensor and one.general for one in spec.factors)


def kind_of(rope: Mapping[str, Any]) -> str:
    """The type of a scaling, by its name of today."""
    kind = str(rope.get("rope_type") or rope.get("type") or "").lower()
    return "longrope" if kind == "su" else kind


def need(config: Config, name: str) -> float:
    """A positive number of ``rope_parameters``.

    Raises:
        CheckpointError: it is missing, or no such number.
    """
    value = config.rope.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{config.ref}: '{name}' of its rope_parameters is {value!r}, and a positive number is needed",
            "complete its config.json",
        )
    return value


def _refused(spec: ArchSpec, config: Config, what: str) -> TargetError:
    return TargetError(
        f"{config.ref}: its rope_parameters ask for {what}, which llama.cpp does not compute in a {spec.arch}",
        "run it with transformers or vLLM",
    )


def original_context(config: Config) -> int:
    """Positions that the model was trained with before its rotary frequencies were stretched."""
    found = config.rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(found) if found else config.number("context")


def long_attention(config: Config) -> float | None:
    """What longrope multiplies attention with: sqrt(1 + ln s / ln n), s the stretch of n positions."""
    rope = config.rope
    if not rope.get("long_factor"):
        return None
    if rope.get("attention_factor") is not None:
        return need(config, "attention_factor")
    old = original_context(config)
    scale = need(config, "factor") if rope.get("factor") is not None else config.number("context") / old
    if kind_of(rope) == "yarn":
        return mscale(scale)
    return math.sqrt(1 + math.log(scale) / math.log(old)) if scale > 1 else 1.0


def _by_context(config: Config) -> tuple[str, ...]:
    old = original_context(config)
    if config.number("context") <= old:
        return ()
    taken = f"llama.cpp takes longrope's long factors when it is started with a context above {old} tokens"
    return (f"{taken}, transformers when the text is that long",)


# ------------------------------------------------------------------ yarn


def _yarn(spec: ArchSpec, config: Config) -> Scaling:
    if config.rope.get("original_max_position_embeddings") is None:
        raise CheckpointError(
            f"{config.ref}: yarn scaling without 'original_max_position_embeddings'", "complete its config.json"
        )
    factor, original = need(config, "factor"), need(config, "original_max_position_embeddings")
    own = any(key.name == OWN_YARN for key in spec.keys)
    if not own and _stretched_otherwise(config) and loads(spec, DIVISORS):
        return Scaling({ATTENTION: yarn_attention(config)})
    found: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    notes: tuple[str, ...] = ()
    if spec.reads_yarn_bounds or _bounds(config) != (YARN_FAST, YARN_SLOW):
        given = config.rope.get("beta_fast"), config.rope.get("beta_slow")
        found |= {
            key: value
            for key, value in zip(("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"), given, strict=True)
            if value is not None
        }
    if config.rope.get("truncate") is False:
        notes = ("rope_parameters.truncate is false, and llama.cpp rounds yarn's bounds: small differences",)
    if own:
        if config.rope.get("attention_factor") is not None:
            raise _refused(spec, config, f"an attention_factor of {config.rope['attention_factor']:g}")
        if abs(yarn_attention(config) - 1) > 1e-7:  # the runtime scales all of a head there, and not the rotated part
            raise _refused(spec, config, "yarn without an 'mscale' that equals its 'mscale_all_dim'")
        return Scaling(found, notes)
    # llama.cpp multiplies this with what yarn has by itself, 1 + 0.1 ln(factor).
    extra = yarn_attention(config) / mscale(factor)
    if abs(extra - 1) > 1e-7:
        found[ATTENTION] = extra
    return Scaling(found, notes)


def fixed_bounds(spec: ArchSpec) -> tuple[Fixed, ...]:
    """yarn's bounds, where the runtime reads none from a file and no small tensor can hold what they come to.

    Whoever starts llama.cpp can give them, so a file is written for those who allow it.
    """
    own = any(key.name == OWN_YARN for key in spec.keys)
    read = spec.reads_yarn_bounds or any(key.name == "rope.scaling.yarn_beta_fast" for key in spec.keys)
    if read or (loads(spec, DIVISORS) and not own):
        return ()

    def stretched(config: Config) -> bool:
        return kind_of(config.rope) == "yarn"

    def unless(config: Config) -> str:
        fast, slow = _bounds(config)
        return f"all texts unless it is started with its options yarn-beta-fast {fast:g} and yarn-beta-slow {slow:g}"

    return tuple(
        Fixed(
            f"rope.{name}", value, f"takes {value:g} in a {spec.arch}, whatever the file says", None, stretched, unless
        )
        for name, value in (("beta_fast", YARN_FAST), ("beta_slow", YARN_SLOW))
    )


def _attention(config: Config) -> float:
    return yarn_attention(config) if kind_of(config.rope) == "yarn" else float(long_attention(config) or 1.0)


def yarn_attention(config: Config) -> float:
    """What cosine and sine are multiplied with."""
    rope, factor = config.rope, need(config, "factor")
    if rope.get("attention_factor") is not None:
        return need(config, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(factor, need(config, "mscale")) / mscale(factor, need(config, "mscale_all_dim"))
    return mscale(factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """What yarn multiplies attention with for a stretch of ``factor``."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _bounds(config: Config) -> tuple[float, float]:
    return float(config.rope.get("beta_fast") or YARN_FAST), float(config.rope.get("beta_slow") or YARN_SLOW)


def _stretched_otherwise(config: Config) -> bool:
    """Whether the bounds are others than those that llama.cpp has."""
    return _bounds(config) != (YARN_FAST, YARN_SLOW) or config.rope.get("truncate") is False


def divisors(config: Config, dim: int, llama3_factor: float = 8.0, theta: float | None = None) -> list[float] | None:
    """Divisors of the ``dim // 2`` rotary frequencies, where a file says a scaling by them; None where it needs none.

    Args:
        dim: the rotated dimensions of a head.
        llama3_factor: of a ``llama3`` scaling that does not say its own.
        theta: the rotary base, where ``rope_parameters`` have none for these layers.
    """
    kind = kind_of(config.rope)
    rope = config.rope if theta is None else {**config.rope, "rope_theta": theta}
    if kind == "llama3":
        return llama3_factors(rope, dim, llama3_factor)
    if kind != "yarn" or not _stretched_otherwise(config):
        return None
    base, factor = float(rope.get("rope_theta", 10000.0)), need(config, "factor")
    original, truncate = need(config, "original_max_position_embeddings"), config.rope.get("truncate", True)
    low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in _bounds(config))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    found = []
    for index in range(dim // 2):
        ramp = min(max((index - low) / (high - low), 0.0), 1.0)
        found.append(1 / (ramp / factor + 1 - ramp))
    return found


def ntk_alpha(config: Config) -> float | None:
    """The rotary base stretched by ``alpha``: ``theta * alpha ** (d / (d - 2))``, d the size of a head."""
    rope, size = config.rope, config.number("head_dim")
    theta = rope.get("rope_theta")
    if rope.get("rope_type") not in ("dynamic", "xdrope") or not rope.get("alpha"):
        return None if theta is None else float(theta)
    stretch: float = float(rope["alpha"]) ** (size / (size - 2))
    return float(theta or 10000.0) * stretch


NTK_ALPHA = Key("rope.freq_base", ntk_alpha)
"""Of HunYuan, whose configs call it dynamic: the base is stretched once, for texts of all lengths."""
