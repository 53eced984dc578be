"""`check`: does this adapter fit this base, and what will a server make of it? Headers only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.half_saved import half_saved_note
from adapterkit.adapters.trained_base import elsewhere
from adapterkit.bases import open_change, open_model
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.pipeline import folder_of
from adapterkit.errors import AdapterkitError, AuthError, CheckFailed, HubError, UnsafeError, counted
from adapterkit.provenance.fits import compare_bases
from adapterkit.requests.call import takes
from adapterkit.requests.check import CheckRequest
from adapterkit.requests.groups import LIMITS
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.fold import Folded
    from adapterkit.registry.identity import IdentityComparison
    from adapterkit.serving.server import Server
    from adapterkit.verbs.merge import Merge

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Diagnostic:
    """One thing that was found.

    Attributes:
        level: ``error`` (the check fails), ``warning`` or ``note``.
        code: a stable word for scripts.
        adapter: the adapter that it is about, or the base.
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
    """What a check found; ``ok`` when nothing of it is an error.

    ``exit_code`` is what the command line returns: that of `merge` where it would refuse, 3 where something else does not
    hold.
    """

    base: str
    base_commit: str | None
    adapters: tuple[str, ...]
    server: str | None
    ok: bool
    touched: int
    findings: tuple[Diagnostic, ...]
    bases: tuple[BaseMatch, ...] = ()
    exit_code: int = 0


@takes(CheckRequest)
def check(request: CheckRequest) -> CheckReport:
    """Check adapters against a base from headers alone, and from a few windows of its weights where a record names the base.
    Values are computed where a limit of what has to survive is named, or a quantized output is.

    The merge that has the same options is planned: what `merge` refuses is refused here, in the same words. With
    ``server``, a key of `adapterkit.serving.servers.servers`, it is also said what that server would make of them.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError: something cannot be read at all.
        UsageError: an unknown server, or options that contradict each other.
    """
    row = None if request.server is None else _server(request.server)
    opened = open_model(request.base, headers_only=True)
    loaded = tuple(_loaded(adapter) for adapter in request.given_adapters)
    findings: list[Diagnostic] = []
    matches: list[BaseMatch] = []
    for adapter in loaded:
        if adapter.whole:
            continue  # its tensors tell by themselves, and are compared when the merge is planned
        compared = compare_bases(adapter, opened, full=request.full)
        named = _named_base(adapter, opened)
        # Weights are believed over names: a base that is proved to be the same may be called anything.
        same = compared is not None and compared.fits
        findings += [one for one in named if not (same and one.code == OTHER_BASE)] + _claimed(adapter, opened)
        partly = half_saved_note(adapter)
        if partly is not None:
            findings.append(Diagnostic(WARNING, "half-saved", adapter.ref, f"it {partly}"))
        if compared is not None:
            matches.append(BaseMatch(adapter.ref, *(getattr(compared, field) for field in _COMPARED)))
            findings += _proved(adapter, compared)
    alone = tuple(adapter for adapter in loaded if not adapter.whole)  # a whole model is no adapter to a server
    touched, refused, found = _merged(request, opened, loaded)
    findings += found
    if row is not None:
        findings += _runtime(row, opened, alone)
        for adapter in alone:
            findings += _expectations(adapter, opened, row)
    if request.scan:
        for adapter in alone:
            findings += _scanned(adapter, opened)
    ok = all(finding.level != ERROR for finding in findings)
    refs = tuple(adapter.ref for adapter in loaded)
    code = 0 if ok else refused or CheckFailed.exit_code
    return CheckReport(
        opened.ref, opened.commit, refs, request.server, ok, touched, tuple(findings), tuple(matches), code
    )


def _server(name: str) -> Server:
    from adapterkit.serving.servers import find

    return find(name)


def _scanned(adapter: Adapter, base: Checkpoint) -> list[Diagnostic]:
    """What a scan of the change finds; the values are read for it."""
    from adapterkit.adapters.load import load_adapter
    from adapterkit.provenance.fits import record_of
    from adapterkit.provenance.scan import scan

    record = record_of(adapter)
    try:
        read = load_adapter(adapter.ref)
    except AdapterkitError as error:
        return [
            Diagnostic(NOTE, "scan-not-read", adapter.ref, f"its change was not looked at: {error.message}", error.hint)
        ]
    found = scan(read, base, said=record.base if record is not None else None)
    beside = f"beside {counted(found.peers, 'other adapter')}"
    said = f"scanned {counted(len(found.figures), 'module')}, {beside}; the largest deviation is {found.score:.1f}"
    return [
        *(Diagnostic(one.level, one.code, adapter.ref, one.message, one.hint) for one in found.oddities),
        Diagnostic(NOTE, "scan", adapter.ref, said),
    ]


def _loaded(adapter: Any) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else open_change(adapter, headers_only=True)


def _merged(
    request: CheckRequest, base: Checkpoint, adapters: tuple[Adapter, ...]
) -> tuple[int, int, list[Diagnostic]]:
    """What planning the merge says: how many tensors change, the exit code of a refusal, and findings."""
    from adapterkit.verbs.merge import planned

    touched, refused = 0, 0
    findings: list[Diagnostic] = []
    # Several adapters that do not fit are named each; what refuses them together is found when they are planned so.
    # A whole model means nothing alone.
    alone = [(adapter,) for adapter in adapters if not adapter.whole]
    for some in [*alone, adapters] if len(adapters) > 1 else [adapters]:
        one = len(some) == 1
        asked = (
            request if some == adapters else replace(request, weights=None, parameters={}, method="linear", space=None)
        )
        try:
            merge = planned(asked.merge(base, some), fingerprints=False)
        except (UnsafeError, AuthError, HubError):
            raise
        except AdapterkitError as error:
            refused = refused or error.exit_code
            ref = some[0].ref if one else ", ".join(adapter.ref for adapter in some)
            findings.append(Diagnostic(ERROR, type(error).__name__, ref, error.message, error.hint))
        else:
            if one or not alone:
                touched += len(merge.folded.touched)
                findings += _consequences(some[0], merge.folded, merge.notes, merge.base)
            if some == adapters:
                left = _left(request, merge)
                findings += left
                refused = refused or (CheckFailed.exit_code if any(one.level == ERROR for one in left) else 0)
            if one or not alone:
                for adapter in some:
                    words = None if adapter.whole else elsewhere(adapter, merge.base, merge.base_values)
                    if words is not None:
                        findings.append(Diagnostic(NOTE, "quantized-base", adapter.ref, words))
        if refused and one and alone and some == alone[-1]:
            break
    return touched, refused, list(dict.fromkeys(findings))  # what is said of the base, each plan says again


def _left(request: CheckRequest, merge: Merge) -> list[Diagnostic]:
    """What of the change survives: measured where a limit was named, and where a grid that the base lies on is written."""
    if request.quant is None and not request.limited:
        return []
    from adapterkit.verbs.merge import Loss
    from adapterkit.verbs.report import unmet

    ref = merge.base.ref
    try:
        found = Loss(merge, watched=request.limited).unwritten()
    except CheckFailed as error:
        return [Diagnostic(ERROR, "lost", ref, error.message, error.hint)]
    if not request.limited:
        return []
    if found is None:
        named = ", ".join(request.spelled(name) for name in LIMITS if getattr(request, name) is not None)
        message = f"{named} asks for values, and those of {ref} are not on this disk"
        return [Diagnostic(ERROR, "not-measured", ref, message, "download the base, or let merge measure it")]
    wrong = unmet(found, request)
    return [
        *(Diagnostic(ERROR, "lost", ref, words, found.advice) for words in wrong),
        Diagnostic(NOTE, "fidelity", ref, found.summary),
    ]


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
    elif not _same_name(said, base.ref) and not _made_from(base, said):
        message = f"it was trained on {said}, and the base given is {base.ref}"
        found.append(Diagnostic(WARNING, OTHER_BASE, adapter.ref, message, "shapes alone do not tell siblings apart"))
    if adapter.config.revision is None:
        found.append(Diagnostic(NOTE, "no-revision", adapter.ref, "it does not say which revision of its base"))
    elif base.commit and not base.commit.startswith(adapter.config.revision) and len(adapter.config.revision) >= 7:
        message = f"it was trained on revision {adapter.config.revision}, and the base given is {base.commit}"
        found.append(Diagnostic(WARNING, "other-revision", adapter.ref, message))
    return found


def _claimed(adapter: Adapter, base: Checkpoint) -> list[Diagnostic]:
    """Whether what has the name that the adapter's config gives its base has other weights than the base given."""
    from adapterkit.registry.home import open_home

    said = adapter.config.base or ""
    hub = parse_hub(base.ref) if base.commit else None
    if not said or (hub is not None and hub.repo == said):
        return []
    folder, there = folder_of(base), os.path.isdir(said)
    if (there and folder is not None and folder.samefile(said)) or not (there or open_home(None).root.is_dir()):
        return []
    from adapterkit.provenance.claims import called, contradicted

    named = called(said)
    if not named:
        return []
    from adapterkit.registry.weights import cheap, identity_of

    other = contradicted(identity_of(base, cheap(base)), named)
    if not other:
        return []
    message = f"its config names {said} as its base, and {base.ref} has {other}"
    return [Diagnostic(WARNING, OTHER_BASE, adapter.ref, message, "shapes alone do not tell siblings apart")]


def _same_name(said: str, ref: str) -> bool:
    hub = parse_hub(ref)
    if hub is not None and not Path(ref).exists():
        return hub.repo == said
    return Path(ref).name == said.rpartition("/")[2]  # a local copy keeps at most the last part of the name


def _made_from(base: Checkpoint, said: str) -> bool:
    """Whether the record beside the base says that it was made from what the adapter names."""
    from adapterkit.registry.beside import read_beside

    path, folder = base.sources[0].path if base.sources else None, folder_of(base)
    if path is None or folder is None:
        return False
    try:
        record = read_beside(path if path.suffix == ".gguf" else folder)
    except AdapterkitError:
        return False  # a record that cannot be read proves nothing
    names = [] if record is None else [parent.label for parent in record.parents]
    return any(name.partition("@")[0] in (said, Path(said).name) for name in names if name)


def _consequences(adapter: Adapter, folded: Folded, notes: Sequence[str], base: Checkpoint) -> list[Diagnostic]:
    found = [
        Diagnostic(NOTE, "merge", base.ref if note in base.notes else adapter.ref, note)
        for note in notes
        if note != folded.unheld
    ]
    if folded.unheld:
        found.append(Diagnostic(WARNING, "random", adapter.ref, folded.unheld))
    if folded.vocab is not None:
        old, new = folded.vocab
        found.append(Diagnostic(NOTE, "vocabulary", adapter.ref, f"the vocabulary changes from {old} to {new} rows"))
    if folded.added:
        found.append(Diagnostic(NOTE, "added", adapter.ref, f"new tensors: {', '.join(folded.added[:5])}"))
    return found


def _runtime(server: Server, base: Checkpoint, adapters: Sequence[Adapter]) -> list[Diagnostic]:
    """What a server that runs GGUF files computes of the base's config, and which factors it would not look for."""
    if server.file is None:  # it runs no GGUF files
        return []
    from adapterkit.gguf.runtime import config_refusal, unheard

    found = []
    refused = config_refusal(base)
    if refused is not None:
        found.append(Diagnostic(ERROR, f"{server.name}-config", base.ref, refused.message, refused.hint))
    for adapter in adapters:
        for parameter, tensor in unheard(base, adapter)[:1]:
            message = f"{server.name} applies no LoRA to '{tensor}', so a LoRA file would leave out {parameter}"
            fix = "merge it: adapterkit merge BASE ADAPTER -o merged.gguf"
            found.append(Diagnostic(WARNING, f"{server.name}-unheard", adapter.ref, message, fix))
    return found


def _expectations(adapter: Adapter, base: Checkpoint, server: Server) -> list[Diagnostic]:
    import shlex

    from adapterkit.serving.expectations import expected

    found = []
    for title, row in expected(server, adapter, base):
        level = WARNING if row.verdict == "depends" else ERROR
        message = f"{server.name}, {title}: {row.verdict}: {row.says} [{row.source}]"
        fix = row.fix.format(adapter=shlex.quote(adapter.ref), base=shlex.quote(base.ref))
        found.append(Diagnostic(level, f"{server.name}-{row.feature}", adapter.ref, message, fix))
    return found
