"""`check`: does this adapter fit this base, and what will a server make of it? Headers only."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.bases import open_model
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.errors import AdapterkitError, UnsafeError
from adapterkit.provenance.fits import compare_bases
from adapterkit.serving.expectations import expected
from adapterkit.serving.servers import find as find_server

if TYPE_CHECKING:
    from adapterkit.adapters.fold import Folded
    from adapterkit.registry.identity import IdentityComparison
    from adapterkit.serving.server import Server

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Diagnostic:
    """One thing that was found.

    Attributes:
        level: ``error`` (the check fails), ``warning`` or ``note``.
        code: a stable word for scripts.
        adapter: the adapter it is about.
        message, hint: what, and what to do.
    """

    level: str
    code: str
    adapter: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class BaseMatch:
    """What is proved about the base given and the one that an adapter's record names.

    Attributes:
        adapter: whose record it is.
        verdict, level: a key of `adapterkit.registry.identity.VERDICTS`, and the evidence that decided.
        agree, differ: the levels known of both.
        sentence: the same in words.
    """

    adapter: str
    verdict: str
    level: str
    agree: tuple[str, ...]
    differ: tuple[str, ...]
    sentence: str


@dataclass(frozen=True)
class CheckReport:
    """What a check found; ``ok`` when nothing of it is an error."""

    base: str
    base_commit: str | None
    adapters: tuple[str, ...]
    server: str | None
    ok: bool
    touched: int
    findings: tuple[Diagnostic, ...]
    bases: tuple[BaseMatch, ...] = ()


def check(
    base: str | Path | Checkpoint,
    adapters: Sequence[str | Path | Adapter],
    *,
    server: str | None = None,
    full: bool = False,
) -> CheckReport:
    """Check adapters against a base from headers alone, and from a few windows of its weights where a record names the base.

    Args:
        base: folder, file, Hub id or open checkpoint.
        adapters: one or more.
        server: also say what this server would refuse or get wrong: a key of `adapterkit.serving.servers.servers`.
        full: read every byte of the base where the record holds its strongest identity.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError: something cannot be read at all.
        UsageError: unknown server.
    """
    row = None if server is None else find_server(server)
    opened = base if isinstance(base, Checkpoint) else open_model(base, headers_only=True)
    loaded = [a if isinstance(a, Adapter) else load_adapter(a, headers_only=True) for a in adapters]
    findings: list[Diagnostic] = []
    matches: list[BaseMatch] = []
    touched = 0
    for adapter in loaded:
        compared = compare_bases(adapter, opened, full=full)
        named = _named_base(adapter, opened)
        # Weights are believed over names: a base that is proved to be the same may be called anything.
        same = compared is not None and compared.fits
        findings += [one for one in named if not (same and one.code == OTHER_BASE)]
        if compared is not None:
            matches.append(BaseMatch(adapter.ref, *(getattr(compared, field) for field in _COMPARED)))
            findings += _proved(adapter, compared)
        try:
            folded = _folded(opened, adapter)
        except UnsafeError:
            raise
        except AdapterkitError as error:
            findings.append(Diagnostic(ERROR, type(error).__name__, adapter.ref, error.message, error.hint))
        else:
            touched += len(folded.touched)
            findings += _consequences(adapter, folded)
        if row is not None:
            findings += _expectations(adapter, opened, row)
    ok = all(finding.level != ERROR for finding in findings)
    refs = tuple(adapter.ref for adapter in loaded)
    return CheckReport(opened.ref, opened.commit, refs, server, ok, touched, tuple(findings), tuple(matches))


OTHER_BASE = "other-base"
_COMPARED = ("verdict", "level", "agree", "differ", "sentence")
# verdict of a comparison: how bad, and a word for scripts. Whether other shapes fit is what the fold itself says: an
# adapter trained on a quantized base is merged into the original all the time.
_VERDICTS = {
    "same": (NOTE, "same-base"),
    "likely": (NOTE, "same-base"),
    "other": (ERROR, "other-weights"),
    "misfit": (WARNING, "other-tensors"),
    "shapes": (NOTE, "base-not-compared"),
    "dtype": (NOTE, "base-not-compared"),
}


def _proved(adapter: Adapter, compared: IdentityComparison) -> list[Diagnostic]:
    if compared.verdict not in _VERDICTS:
        return []
    level, code = _VERDICTS[compared.verdict]
    hint = "give the base that its record names" if level == ERROR else ""
    return [Diagnostic(level, code, adapter.ref, compared.sentence, hint)]


def _folded(base: Checkpoint, adapter: Adapter) -> Folded:
    if base.format != "gguf":
        return fold(base, [adapter])
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.fold import fold_gguf
    from adapterkit.gguf.quantize import Quantization

    assert isinstance(base, GGUFCheckpoint)
    made = fold_gguf(base, [adapter], quantization=Quantization(yes_lossy=True))
    return replace(made.folded, notes=(*made.folded.notes, *made.notes))


def _named_base(adapter: Adapter, base: Checkpoint) -> list[Diagnostic]:
    """What the adapter's config says of its base, held against the base given."""
    said = adapter.config.base
    if not said:
        return [Diagnostic(WARNING, "no-base", adapter.ref, "it does not say which base it was trained on")]
    found = []
    if Path(said).is_absolute() or said.startswith((".", "~")):
        hint = "set base_model_name_or_path to the base's Hub id before publishing"
        found.append(
            Diagnostic(WARNING, "local-base", adapter.ref, f"it names its base by a local path ({said})", hint)
        )
    elif not _same_name(said, base.ref):
        message = f"it was trained on {said}, and the base given is {base.ref}"
        found.append(Diagnostic(WARNING, OTHER_BASE, adapter.ref, message, "shapes alone do not tell siblings apart"))
    if adapter.config.revision is None:
        found.append(Diagnostic(NOTE, "no-revision", adapter.ref, "it does not say which revision of its base"))
    elif base.commit and not base.commit.startswith(adapter.config.revision) and len(adapter.config.revision) >= 7:
        message = f"it was trained on revision {adapter.config.revision}, and the base given is {base.commit}"
        found.append(Diagnostic(WARNING, "other-revision", adapter.ref, message))
    return found


def _same_name(said: str, ref: str) -> bool:
    hub = parse_hub(ref)
    if hub is not None and not Path(ref).exists():
        return hub.repo == said
    return Path(ref).name == said.rpartition("/")[2]  # a local copy keeps at most the last part of the name


def _consequences(adapter: Adapter, folded: Folded) -> list[Diagnostic]:
    found = [Diagnostic(NOTE, "merge", adapter.ref, note) for note in folded.notes]
    if folded.vocab is not None:
        old, new = folded.vocab
        found.append(Diagnostic(NOTE, "vocabulary", adapter.ref, f"the vocabulary changes from {old} to {new} rows"))
    if folded.added:
        found.append(Diagnostic(NOTE, "added", adapter.ref, f"new tensors: {', '.join(folded.added[:5])}"))
    return found


def _expectations(adapter: Adapter, base: Checkpoint, server: Server) -> list[Diagnostic]:
    found = []
    for title, row in expected(server, adapter, base):
        level = WARNING if row.verdict == "depends" else ERROR
        message = f"{server.name}, {title}: {row.verdict}: {row.says} [{row.source}]"
        fix = row.fix.format(adapter=shlex.quote(adapter.ref), base=shlex.quote(base.ref))
        found.append(Diagnostic(level, f"{server.name}-{row.feature}", adapter.ref, message, fix))
    return found
