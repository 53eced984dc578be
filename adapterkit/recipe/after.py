"""What is done with an output once it is there: verified, registered, pushed. In this order, each only if the one before
it held, and none again for the same bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.errors import CheckFailed, OutputError, option
from adapterkit.places import Address
from adapterkit.provenance.record import created
from adapterkit.recipe.carry import How, Pins, opened_as, request_of
from adapterkit.recipe.parse import RecipeFile
from adapterkit.recipe.state import Made, State, key_of
from adapterkit.recipe.steps import CONVERT, Step, place_of, reference
from adapterkit.registry.record import UNDATED
from adapterkit.registry.verification import KEY, Verification, evidence_of
from adapterkit.requests.groups import LIMITS
from adapterkit.stores.files import deliver, version_of

if TYPE_CHECKING:
    from adapterkit.verbs.verify.report import VerifyReport

VERIFY, REGISTER, PUSH = "verify", "register", "push"
# kind of a registered conversion, by its form; a merge and a combination say it in the record beside them
_KINDS = {"gguf": "converted", "gguf-lora": "converted", "peft": "adapter", "mlx": "adapter"}

Task = tuple[str, str, Callable[[], dict[str, Any]]]


def words(step: Step) -> tuple[str, ...]:
    """What is done after a step, for a plan."""
    found = []
    if step.residual is not None:
        found.append(f"write {step.residual.name}, the residual of rank {step.asked.residual}")
    verify, register, push = step.verify, step.asked.register, step.asked.push
    if verify is not None:
        limits = [
            f"{name.replace('_', '-')} {value:g}"
            for name in ("max_kl", "min_top1", *LIMITS)
            if (value := getattr(verify, name)) is not None
        ]
        page = [f"a page in {verify.html}"] if verify.html is not None else []
        found.append(", ".join([f"verify {verify.level}", *limits, *page]))
    if register is not None:
        found.append(f"register as {register.name}{f', alias {register.alias}' if register.alias else ''}")
    if push is not None:
        tag = f", tag {push.tag}" if push.tag else ""
        found.append(f"push to {push.repo}{' (private)' if push.private else ''}{tag}")
    return tuple(found)


def check(file: RecipeFile, steps: tuple[Step, ...]) -> None:
    """Names of the registry and the Hub, before anything is made.

    Raises:
        RecipeError, UnsafeError, UsageError: one that cannot be.
    """
    from adapterkit.places import HUB
    from adapterkit.recipe.steps import located
    from adapterkit.redaction import check_public
    from adapterkit.registry.names import check_alias, check_name, is_repo
    from adapterkit.requests.publish import PushRequest

    for step in steps:
        register, push = step.asked.register, step.asked.push
        at = ("outputs", step.name)
        if register is not None:
            with located(file, *at, "register"):
                check_name(register.name)
                if register.alias is not None:
                    check_alias(register.alias)
                for key, value in register.meta.items():
                    check_public(f"{key}={value}", f"the metadata '{key}'")
        if push is None:
            continue
        with located(file, *at, "push"):
            asked = PushRequest("", **vars(push))
        if asked.kind == HUB and (not is_repo(asked.address) or "/" not in asked.address):
            file.fail((*at, "push"), f"'{push.repo}' is not a repository", "give it as org/name")
        if push.tag is not None and not re.fullmatch(r"[\w][\w./-]{0,127}", push.tag):
            file.fail((*at, "push", "tag"), f"'{push.tag}' cannot be a tag", "use letters, digits, '.', '_', '-'")
        if step.is_file and register is None:
            hint = f'add register = "NAME" to outputs.{step.name}'
            file.fail((*at, "push"), "a file is pushed from the registry", hint)


def check_packages(step: Step) -> None:
    """What its verification reads the output with is installed: said before the output is made.

    Raises:
        MissingPackage: it is not.
    """
    from adapterkit.packages import need
    from adapterkit.requests.merge import GGUF

    quant = step.asked.quant
    if step.verify is None or step.verify.level == "load":
        return
    if step.to == GGUF and quant and quant.upper() not in ("F32", "F16", "BF16"):
        need("gguf", what=f"verify decodes {quant} by the package gguf", extra="gguf", tried=False)


class After:
    """Runs what follows the steps of one build.

    Args:
        note: told of what happens.
    """

    def __init__(self, file: RecipeFile, state: State, pins: Pins, how: How, note: Callable[[str], None]) -> None:
        self._file, self._state, self._pins, self._how, self._note = file, state, pins, how, note

    def run(self, step: Step, origin: Step, made: Made) -> Made:
        """Do what is left to do for an output; gives what is known of it then, which is saved at once.

        Args:
            step: that made it.
            origin: the merge at its root, for a conversion.

        Raises:
            CheckFailed: a threshold does not hold; nothing after it is done.
        """
        done: dict[str, Mapping[str, Any]] = dict(made.after)
        for name, key, task in self._tasks(step, origin, made, done):
            if done.get(name, {}).get("key") != key or (name == VERIFY and self._lost_page(step)):
                done[name] = {"key": key, **task()}
                made = replace(made, after=dict(done))
                self._state.made[step.name] = made
                self._state.save()
        wanted = {VERIFY: step.verify, REGISTER: step.asked.register, PUSH: step.asked.push}
        kept = {name: value for name, value in done.items() if wanted[name] is not None}
        return replace(made, after=kept)

    def _lost_page(self, step: Step) -> bool:
        page = None if step.verify is None else step.verify.html
        return page is not None and digest_of_page(place_of(self._file, page)) is None

    def _tasks(self, step: Step, origin: Step, made: Made, done: Mapping[str, Any]) -> Iterator[Task]:
        verify, register, push = step.verify, step.asked.register, step.asked.push
        if verify is not None:
            prompts = None if verify.prompts is None else self._prompts(verify.prompts)
            key = key_of([made.identity, asdict(verify), prompts])
            yield VERIFY, key, lambda: self._verify(step, origin)
        if register is not None:
            key = key_of([made.identity, asdict(register), done.get(VERIFY, {}).get("key")])
            yield REGISTER, key, lambda: self._register(step, done)
        if push is not None:
            key = key_of([made.identity, asdict(push), done.get(REGISTER, {}).get("ref")])
            yield PUSH, key, lambda: self._push(step, done)

    def _prompts(self, name: str) -> str:
        """What tells of a change of the file of prompts."""
        place = place_of(self._file, name)
        return version_of(place) if isinstance(place, Address) else self._state.sha256(place)

    def _verify(self, step: Step, origin: Step) -> dict[str, Any]:
        """Hold an output against its base and adapters.

        Raises:
            CheckFailed: it is not what was trained, or a threshold does not hold.
        """
        from adapterkit.requests.verify import merge_options
        from adapterkit.verbs.verify import verify

        asked = step.verify
        assert asked is not None
        assert origin.base is not None
        merged = request_of(origin, self._pins, self._how)
        self._note(f"{step.name}: verifying {asked.level}")
        found = verify(
            reference(step.out),
            base=merged.base,
            adapters=merged.adapters,
            level=asked.level,
            prompts=None if asked.prompts is None else reference(place_of(self._file, asked.prompts)),
            max_kl=asked.max_kl,
            min_top1=asked.min_top1,
            min_retention=asked.min_retention,
            min_cosine=asked.min_cosine,
            max_error=asked.max_error,
            max_dead=asked.max_dead,
            device=asked.device,
            jobs=self._how.jobs,
            progress=self._how.progress,
            **merge_options(merged),
        )
        if asked.html is not None:
            self._page(asked.html, found)
        wrong = [finding for finding in found.findings if finding.severity == "error"]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise CheckFailed(f"outputs.{step.name} does not verify: {wrong[0].text}{more}", wrong[0].hint)
        return {
            "level": found.level,
            "summary": _summary(found),
            "findings": [f"{finding.severity}: {finding.text}" for finding in found.findings],
            "evidence": evidence_of(_levels(found)),
        }

    def _page(self, name: str, found: VerifyReport) -> None:
        """The evidence as a page, whether it holds or not."""
        from adapterkit.registry.record import now
        from adapterkit.verbs.verify.page import html

        path, data = place_of(self._file, name), html(found, when=now()).encode()
        digest = hashlib.sha256(data).hexdigest()
        self._state.coming_pages[name] = digest  # what is cut off now leaves the page before or this one
        self._state.save()
        if isinstance(path, Address):
            deliver(path, data)
        else:
            with disk.writing(path.name, path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                disk.write_file(path, data)
        self._state.pages[name] = digest
        del self._state.coming_pages[name]
        self._state.save()
        self._note(f"page written to {path}")

    def _register(self, step: Step, done: Mapping[str, Any]) -> dict[str, Any]:
        from adapterkit.provenance.register import register
        from adapterkit.registry import verbs

        asked = step.asked.register
        assert asked is not None
        converted = step.verb == CONVERT
        found = register(
            reference(step.out),
            asked.name,
            base=opened_as(step.base, self._pins) if converted and step.base is not None else None,
            base_id=asked.base_id if converted and step.base is not None else "",
            kind=_KINDS[step.to] if converted else "",
            meta=asked.meta,
            evidence={KEY: done[VERIFY]["evidence"]} if VERIFY in done else {},
        )
        record = found.record
        self._note(f"{step.name}: {record.ref}{'' if found.new else ', was there already'}")
        if asked.alias is not None:
            verbs.tag(record.ref, asked.alias)
        return {"ref": record.ref, "digest": record.digest, "new": found.new, "alias": asked.alias}

    def _push(self, step: Step, done: Mapping[str, Any]) -> dict[str, Any]:
        from adapterkit.hub.push import Pushed
        from adapterkit.verbs.publish import push

        asked = step.asked.push
        assert asked is not None
        ref = done[REGISTER]["ref"] if REGISTER in done else str(step.out)
        found = push(ref, **vars(asked))
        self._note(f"{step.name}: {found.where}")
        exact = {"commit": found.commit} if isinstance(found, Pushed) else {"digest": found.digest}
        return {"repo": asked.repo, "url": found.where, "new": found.new, **exact}


def digest_of_page(path: Path | Address) -> str | None:
    """The sha256 of a page; "" of what is no file, None where nothing is."""
    if isinstance(path, Address):
        from adapterkit.stores.connect import open_store

        store = open_store(path)
        found = store.head(path.key)
        return None if found is None else hashlib.sha256(store.read(found.key, 0, found.size, found.etag)).hexdigest()
    if path.is_file():
        return disk.hash_file(path)[0]
    return "" if os.path.lexists(path) else None


def check_pages(file: RecipeFile, steps: tuple[Step, ...], state: State) -> None:
    """Refuse to replace a page that an earlier build did not write, or that was changed since.

    Raises:
        OutputError: there is one.
    """
    for step in steps:
        if step.verify is None or step.verify.html is None:
            continue
        path = place_of(file, step.verify.html)
        ours = [pages.get(step.verify.html) for pages in (state.pages, state.coming_pages)]
        there = digest_of_page(path)
        if there is not None and there not in ours:
            raise OutputError(
                f"{path} exists, and this recipe did not write it", f"move it away, or use {option('force', True)}"
            )


def _summary(found: VerifyReport) -> str:
    """One line about a verification that held."""
    if found.tensors is None:
        return f"{found.level}: headers, config and the files beside them"
    counts = ", ".join(f"{number} {status}" for status, number in found.tensors.counts.items() if number)
    there = f"the change has cosine {found.tensors.cosine:.4f}, {found.tensors.retention:.1%} of it is there"
    parts = [f"{counts}; {there}"]
    if found.layers is not None:
        parts.append(f"layers lose {found.layers.lost:.1%} of it")
    if found.model is not None:
        parts.append(f"{found.model.merged.top1:.1%} of tokens agree, mean KL {found.model.merged.mean_kl:.2g}")
    return f"{found.level}: {'; '.join(parts)}"


def _levels(found: VerifyReport) -> Iterator[Verification]:
    """The levels of a verification as records carry them; undated unless $SOURCE_DATE_EPOCH says otherwise."""
    when = created()
    limits = {name: value for name, value in asdict(found.thresholds).items() if value is not None}
    dated: dict[str, Any] = {"when": "" if when == UNDATED else when}
    tensors = found.tensors
    if tensors is None:
        yield Verification("load", found.ok, {}, {}, **dated)
        return
    figures = {
        "cosine": tensors.cosine,
        "error": tensors.error,
        "retention": tensors.retention,
        "dead": len(tensors.dead),
        "tensors": tensors.total,
        "touched": tensors.touched,
    }
    yield Verification("tensor", found.ok, figures, {k: v for k, v in limits.items() if k in LIMITS}, **dated)
    if found.layers is not None:
        layers = {"lost": found.layers.lost, "error": found.layers.error, "worst": found.layers.worst}
        yield Verification("layer", found.ok, layers, {}, **dated)
    if found.model is not None:
        model = {"kl": found.model.merged.mean_kl, "top1": found.model.merged.top1, "tokens": found.model.tokens}
        yield Verification("model", found.ok, model, {k: v for k, v in limits.items() if k not in LIMITS}, **dated)


def in_folder(path: Path | Address, folder: Path) -> str:
    """A path as the recipe would write it."""
    if isinstance(path, Address):
        return str(path)
    try:
        return path.relative_to(folder).as_posix()
    except ValueError:
        return str(path)
