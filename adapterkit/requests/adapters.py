"""What the verbs that make an adapter are asked for: combine, extract, resize."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from adapterkit.errors import UsageError
from adapterkit.ops.device import check_wide
from adapterkit.places import Address
from adapterkit.requests.groups import ADAPTERS, BASE, COMBINE, OUTPUT, OfAdapters, Ruled, Running, device_option
from adapterkit.requests.option import BYTES, FLAG, INPUT, NUMBER, OUTPUT_THERE, PATH, REF, VALUES, WHOLE, Request, opt
from adapterkit.requests.workers import OnWorkers
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.requests.groups import Adapters, Base, Ref

FACTOR_TYPES = ("f32", "bf16", "f16")
FOLDERS = ("peft", "mlx")  # of several files
FLOAT64 = "Decompositions are float64, which mps has not."
STYLES = (*FOLDERS, "diffusers", "kohya", "comfyui", "lycoris")


class Opened(Protocol):
    """Adapters that are open already, as `open_family` gives them."""

    @property
    def adapters(self) -> tuple[Adapter, ...]: ...


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class FactorOptions(Request):
    """The factors of an adapter that is made."""

    rank: int | None = field(
        default=None,
        metadata=opt("At most this rank in every layer.", WHOLE, role=VALUES, group=OUTPUT, recipe="output.rank"),
    )
    energy: float | None = field(
        default=None,
        metadata=opt(
            "The smallest rank that keeps this share of each layer's squared norm.", NUMBER,
            role=VALUES, group=OUTPUT, recipe="output.energy",
        ),
    )  # fmt: skip
    dtype: str = field(
        default="f32",
        metadata=opt("Dtype of the factors.", role=BYTES, group=OUTPUT, choices=FACTOR_TYPES, recipe="output.dtype"),
    )
    to: str | None = field(
        default=None,
        metadata=opt(
            "What is written: peft (the default) and mlx are folders, the others one file as those programs load it. Where OUT "
            "ends in .safetensors, by default a file as that of the first adapter.",
            role=BYTES, group=OUTPUT, choices=STYLES, recipe="output.to",
        ),
    )  # fmt: skip
    device: str = device_option(FLOAT64)
    own_ranks: bool = field(
        default=False,
        metadata=opt(
            "Each layer keeps its own rank. vLLM and llama.cpp want one for all.", FLAG,
            role=BYTES, group=OUTPUT, recipe="output.own-ranks",
        ),
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        check_wide(self.device, "factors are computed")

    def styled(self, first: str) -> str:
        """What is written.

        Args:
            first: the style of file that the first input has, for an output that is a file.

        Raises:
            UsageError: a folder is to be a file.
        """
        out = getattr(self, "out", None)
        file = out is not None and str(out).endswith(".safetensors")
        if self.to is None:
            return first if file else "peft"
        if file and self.to in FOLDERS:
            raise UsageError(
                f"{self.to} is a folder, and {out} is the name of a file", "name a folder, or another format"
            )
        return self.to

    @property
    def target(self) -> Path | Address:
        """Where the output goes.

        Raises:
            UsageError: it is not said.
        """
        out = getattr(self, "out", None)
        if out is None:
            raise UsageError("nothing says where the adapter goes", "add -o DIR")
        return out if isinstance(out, Address) else Path(out)

    def stated(self, *always: str) -> dict[str, Any]:
        """The options as JSON for a record: those that it always has, and what was given beside them."""
        later = self.given(VALUES, BYTES).keys() - {*always, "parameters", "base", "weights"}
        names = [*always, *sorted(later)]
        return {name: getattr(self, name) for name in names} | dict(getattr(self, "parameters", {}))


def _methods() -> tuple[str, ...]:
    from adapterkit.ops.rules import RULES

    return (*RULES, "arrow")


def _out() -> Any:
    words = "The folder to make; an address in a store (s3://bucket/folder) too."
    return opt(words, PATH, role=INPUT, short="-o", recipe="output.path", store=OUTPUT_THERE)


@dataclass(frozen=True, eq=False, repr=False)
class CombineRequest(OfAdapters, Ruled, FactorOptions, OnWorkers, Running):
    """Several adapters that become one."""

    VERB: ClassVar[str] = "combine"
    FIRST: ClassVar[tuple[str, ...]] = ("out", "method", "weights", "rank", "energy", "dry_run")

    adapters: Adapters | Opened = field(
        metadata=opt("The adapters, in order.", REF, role=INPUT, many=True, recipe="output.adapters")
    )
    out: Ref | Address | None = field(default=None, metadata=_out())
    method: str = field(
        default="linear",
        kw_only=True,
        metadata=opt(
            "How the deltas of several adapters become one; or arrow, which keeps them apart for a router. See --methods.",
            role=VALUES, group=COMBINE, choices=_methods, recipe="merge.method", open=True,
        ),
    )  # fmt: skip
    base: Base | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The base of the adapters, for methods whose change depends on the weights.", REF,
            role=VALUES, group=BASE, recipe="base.ref",
        ),
    )  # fmt: skip
    residual_base: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "BASE is what training left behind (PiSSA, LoRA-GA), not the original model.", FLAG,
            role=VALUES, group=BASE, recipe="base.residual",
        ),
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class ExtractRequest(FactorOptions, OnWorkers, Running):
    """The difference of two checkpoints as an adapter."""

    VERB: ClassVar[str] = "extract"
    FIRST: ClassVar[tuple[str, ...]] = ("out", "rank", "energy", "dtype", "force", "dry_run")

    base: Base = field(metadata=opt("The checkpoint that training began from.", REF, role=INPUT))
    tuned: Base = field(metadata=opt("The checkpoint that training made of it.", REF, role=INPUT))
    out: Ref | Address | None = field(default=None, metadata=_out())
    exact: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("A dense SVD of every layer instead of subspace iteration.", FLAG, role=VALUES, group=OUTPUT),
    )


@dataclass(frozen=True, eq=False, repr=False)
class ResizeRequest(FactorOptions, OnWorkers, Running):
    """An adapter at another rank."""

    VERB: ClassVar[str] = "resize"
    FIRST: ClassVar[tuple[str, ...]] = ("out", "rank", "energy", "dtype", "force", "dry_run")

    adapter: str | Path | Adapter = field(metadata=opt("The adapter.", REF, role=INPUT))
    out: Ref | Address | None = field(default=None, metadata=_out())
    max_error: float | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The smallest rank with at most this relative error in each layer.", NUMBER, role=VALUES, group=OUTPUT
        ),
    )
    base: Base | None = field(
        default=None,
        kw_only=True,
        metadata=opt("The adapter's base, where its factors do not tell the shapes.", REF, role=VALUES, group=ADAPTERS),
    )
    allow_unknown: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("Go on where the config has fields that are not known here.", FLAG, role=VALUES, group=ADAPTERS),
    )

    def check(self) -> None:
        super().check()
        if self.rank is None and self.energy is None and self.max_error is None:
            raise UsageError("nothing says how small the adapter is to be", "give --rank, --energy or --max-error")
