"""What `verify` found, as frozen values; ``--json`` prints them as they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.verbs.report import Forecast

ERROR, WARNING, NOTE = "error", "warning", "note"

# How a tensor stands to what the merge would write, best first.
EQUAL, ROUNDING, FORMAT, OFF, MISSING, EXTRA, SHAPE = (
    "equal",  # the very bytes
    "rounding",  # the formula, rounded otherwise on the way
    "format",  # another encoding of the same values, as near to them as ours
    "off",
    "missing",
    "extra",
    "shape",
)
RIGHT = frozenset({EQUAL, ROUNDING, FORMAT})
DEAD = 0.5  # cosine and retention below which a tensor's change counts as lost, as for `adapterkit.adapters.fidelity`


@dataclass(frozen=True)
class VerifiedInput:
    """Something the verification read.

    Attributes:
        role: ``merged``, ``base``, ``adapter``, ``model``, ``original``, ``residual`` or ``prompts``.
        digest: of its content, with what it covers: ``sha256:...`` of files, ``sampled:...`` of 16 KiB of each tensor.
    """

    role: str
    ref: str
    digest: str
    weight: float | None = None
    method: str = ""
    commit: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        kind: a plain name, such as ``not applied`` or ``other scaling``.
        severity: ``error`` makes the verification fail; ``warning`` and ``note`` do not.
        text: one sentence that says what and where.
        hint: what to do.
        tensors: the names it is about.
        figure: the number that shows it, where there is one.
        keys: of a GGUF file's metadata that it is about.
    """

    kind: str
    severity: str
    text: str
    hint: str = ""
    tensors: tuple[str, ...] = ()
    figure: float | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorCheck:
    """One tensor that an adapter changes, or that is not as it should be.

    With W the base, D the change that was trained and G what MERGED holds beyond W:

    Attributes:
        status: ``equal``, ``rounding``, ``format``, ``off``, ``missing``, ``extra`` or ``shape``.
        touched: adapters change it.
        relative: \\|D|/|W|.
        retention: <G, D>/|D|^2, 1 when all of the change is there.
        cosine: <G, D>/(|G||D|).
        unmoved: share of entries where G is nothing.
        error: \\|G - D|/|D|: what rounding or the format adds, as a part of the change.
        ours: the same for what `merge` would write.
        differing: elements (of quantized tensors: bytes) that are other than those of `merge`.
        steps: the largest distance to the formula, in steps of the dtype; 1 is one rounding.
        finding: kind of the finding that it is part of.
    """

    name: str
    status: str
    touched: bool
    dtype: str
    shape: tuple[int, ...]
    how: str = ""
    relative: float | None = None
    retention: float | None = None
    cosine: float | None = None
    unmoved: float | None = None
    error: float | None = None
    ours: float | None = None
    differing: int = 0
    steps: float | None = None
    finding: str = ""


@dataclass(frozen=True)
class TensorLevel:
    """Every tensor of MERGED beside what the formula gives.

    Attributes:
        total, touched: tensors expected, and how many of them adapters change.
        counts: how many tensors have which status.
        untouched_equal: untouched tensors that are byte-identical to the base's.
        retention, cosine, relative, unmoved, error: over all touched tensors together.
        tensors: the touched ones, and every one that is not right.
        nbytes: bytes that were compared.
    """

    total: int
    touched: int
    counts: Mapping[str, int]
    untouched_equal: int
    retention: float
    cosine: float
    relative: float
    unmoved: float
    error: float
    tensors: tuple[TensorCheck, ...]
    nbytes: int
    seconds: float

    @property
    def dead(self) -> tuple[TensorCheck, ...]:
        """Changed tensors whose change is less than half there, or that point elsewhere; as `merge --fidelity` counts them."""
        known = ((one, one.retention, one.cosine) for one in self.tensors if one.touched)
        return tuple(
            one
            for one, retention, cosine in known
            if (retention is not None and retention < DEAD) or (cosine is not None and cosine < DEAD)
        )


@dataclass(frozen=True)
class LayerCheck:
    """One linear module fed with the same inputs twice: as base with adapters, and as merged.

    Attributes:
        error: \\|Y_merged - Y_trained| / |Y_trained|.
        change: \\|Y_trained - Y_base| / |Y_trained|: what the adapter does to the outputs.
        lost: error as a part of the change.
    """

    module: str
    error: float
    change: float
    lost: float


@dataclass(frozen=True)
class LayerLevel:
    """Outputs of every touched linear module.

    Attributes:
        inputs: ``random``, or ``replayed``: the activations of a running model.
        rows: input rows per module.
        error, change, lost: over all modules together; ``worst`` names the module that loses most.
    """

    inputs: str
    rows: int
    error: float
    change: float
    lost: float
    worst: str
    modules: tuple[LayerCheck, ...]
    seconds: float


@dataclass(frozen=True)
class Parting:
    """A place in a prompt where two models' likeliest next tokens differ.

    Attributes:
        at: position of the token before.
        before: the text just before it.
        trained, merged: the tokens, as text.
        kl: divergence of the two distributions there, in nats.
    """

    at: int
    before: str
    trained: str
    merged: str
    kl: float


@dataclass(frozen=True)
class Distance:
    """Two models on the same tokens, the first taken as right.

    Attributes:
        top1: share of positions with the same likeliest next token.
        mean_kl, max_kl: KL(trained || other) in nats.
    """

    top1: float
    mean_kl: float
    max_kl: float


@dataclass(frozen=True)
class PromptCheck:
    """One prompt.

    Attributes:
        text: its start.
        tokens: how many were scored.
        merged, base: distances of these to base + adapters.
        partings: where merged and trained part, the widest first.
        positions: the scored ones; ``kls`` is the divergence at each, for drawing.
    """

    text: str
    tokens: int
    merged: Distance
    base: Distance
    partings: tuple[Parting, ...]
    positions: tuple[int, ...] = ()
    kls: tuple[float, ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class ModelLevel:
    """Merged and trained as running models.

    Attributes:
        runtime: what computed MERGED: ``transformers`` or ``llama.cpp (...)`` or ``transformers, decoded``.
        trained: what computed base + adapters: ``PEFT`` or ``folded in float32``.
        perplexity: by model: ``base``, ``trained``, ``merged``.
        merged, base: distances to base + adapters, over all scored tokens.
    """

    runtime: str
    trained: str
    prompts: tuple[PromptCheck, ...]
    tokens: int
    merged: Distance
    base: Distance
    perplexity: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Thresholds:
    """What a user asked for; None asks nothing, but for retention, which falls back to `LEAST_RETENTION`."""

    max_kl: float | None = None
    min_top1: float | None = None
    min_retention: float | None = None
    min_cosine: float | None = None
    max_error: float | None = None
    max_dead: int | None = None


@dataclass(frozen=True)
class VerifyReport:
    """Whether MERGED is what was trained.

    Attributes:
        ok: no finding is an error.
        level: the deepest level that was asked for.
        options: of the merge, as they were taken for right.
        record: whether they came from the record beside MERGED.
        inputs: everything that was read, by digest.
        tensors, layers, model: the figures of each level that was run, of MERGED alone.
        residual: what stands beside MERGED, where that is measured too; ``pair``: the figures of the two together.
        dry_run: nothing was compared, so nothing is ``ok``; ``forecast`` is what workers would take.
        nbytes: of the report as a file, where one was written.
    """

    ok: bool
    merged: str
    base: str
    adapters: tuple[str, ...]
    level: str
    findings: tuple[Finding, ...]
    tensors: TensorLevel | None = None
    layers: LayerLevel | None = None
    model: ModelLevel | None = None
    residual: str = ""
    pair: TensorLevel | None = None
    thresholds: Thresholds = Thresholds()
    options: Mapping[str, Any] = field(default_factory=dict)
    record: bool = False
    inputs: tuple[VerifiedInput, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_memory: int = 0
    dry_run: bool = False
    forecast: tuple[Forecast, ...] = ()
    nbytes: int = 0

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == ERROR)

    @property
    def summary(self) -> str:
        """One line."""
        if self.dry_run:
            return "nothing was compared, it was only planned"
        if not self.ok:
            first = self.errors[0]
            more = f", and {len(self.errors) - 1} more" if len(self.errors) > 1 else ""
            return f"{first.kind}: {first.text}{more}"
        return f"{self.merged} is {self.base} with {', '.join(self.adapters)} folded in"
