"""A callback for transformers' Trainer, and so for TRL and unsloth: every save becomes a version in the registry.

    trainer = SFTTrainer(..., callbacks=[RegisterCallback("tickets", base="meta-llama/Llama-3.2-1B")])

A version says which base it was trained on, by its weights; the settings, the seed, the data set and its fingerprint,
the commit of the code, the figures so far, and where the run can be looked at. Whatever kills the run, a version is
in the registry whole or not at all: a save that was finished and not registered yet is registered when the run is
resumed, and one that was cut off is not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers import __version__ as version

from adapterkit.errors import AdapterError, AdapterkitError, NotFound
from adapterkit.foreign import is_whole, json_value
from adapterkit.integrations import runs
from adapterkit.registry.home import open_home
from adapterkit.registry.identity import Identity
from adapterkit.registry.names import check_alias, check_name, is_repo
from adapterkit.registry.record import FileEntry, Operation, Record

log = logging.getLogger(__name__)
STATE = "trainer_state.json"
_ALWAYS = ("seed", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
_NOT_SETTINGS = ("output_dir", "logging_dir", "run_name", "report_to", "hub_token", "push_to_hub_token", "_n_gpu")


class RegisterCallback(TrainerCallback):  # type: ignore[misc]
    """Registers each save.

    Args:
        name: of the versions in the registry.
        base: the base: a folder, a Hub id or a registered name; by default what the adapter's config names, from the local
            cache.
        alias: an alias that is moved to each new version, such as ``candidate``; it asks for what its policy asks.
        data: what the data set is called, where it does not say.
        meta: more text to keep.
        strict: stop the training where a save cannot be registered; by default that is logged, and the next save is tried.
        home: the registry's folder.

    Attributes:
        registered: the references of what was registered, in order.
        failures: sentences on what was not.
    """

    def __init__(
        self,
        name: str,
        *,
        base: str | Path | None = None,
        alias: str = "",
        data: str = "",
        meta: Mapping[str, str] | None = None,
        strict: bool = False,
        home: Path | None = None,
    ) -> None:
        self.name = check_name(name)
        self.base, self.data, self.meta, self.strict, self.home = base, data, dict(meta or {}), strict, home
        self.alias = check_alias(alias) if alias else ""
        self.registered: list[str] = []
        self.failures: list[str] = []
        self._data: dict[str, str] = {}
        self._settings: dict[str, Any] = {}
        self._code: dict[str, str] = {}
        self._bases: dict[str, Identity | None] = {}

    # ---- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Looks at the code, the data and the settings; registers what a run that was killed had saved."""
        if not state.is_world_process_zero:
            return
        self._code = runs.code()
        loader = given.get("train_dataloader")
        dataset = getattr(loader, "dataset", None)
        if dataset is not None:
            try:
                self._data = runs.data(dataset, self.data)
            except Exception as error:  # a data set is the user's own code, and its name is no reason to stop
                log.warning("adapterkit: the data set has no fingerprint (%s: %s)", type(error).__name__, error)
                self._data = {"data": self.data} if self.data else {}
        usual = {
            field.name: field.default_factory() if field.default_factory is not MISSING else field.default
            for field in fields(args)
            if field.default is not MISSING or field.default_factory is not MISSING
        }
        said = {key: value for key, value in args.to_dict().items() if key not in _NOT_SETTINGS}
        self._settings = runs.settings(said, usual, _ALWAYS)
        if state.global_step:
            for step, folder in _checkpoints(Path(args.output_dir)):
                if step <= state.global_step:
                    self._try(folder, step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Registers the checkpoint that was saved just now."""
        if state.is_world_process_zero:
            folder = _saved(Path(args.output_dir), state.global_step)
            self._try(folder, state.global_step, rows=state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Says what is in the registry now."""
        if state.is_world_process_zero:
            log.info("adapterkit: registered %s", ", ".join(self.registered) or "nothing")
            for sentence in self.failures:
                log.error("adapterkit: not registered: %s", sentence)

    # ---- one save

    def _try(self, folder: Path, step: int, rows: list[dict[str, Any]] | None = None) -> None:
        try:
            parts = _adapters(folder)
            for part, name in parts:
                self._register(part, f"{self.name}{f'-{name}' if name else ''}", folder, step, rows)
        except (AdapterkitError, OSError) as error:
            if self.strict:
                raise
            self.failures.append(f"{folder.name}: {error}")
            log.warning("adapterkit: %s is not registered: %s", folder.name, error)

    def _register(self, part: Path, name: str, folder: Path, step: int, rows: list[dict[str, Any]] | None) -> None:
        from adapterkit.bases import open_adapter
        from adapterkit.registry import verbs
        from adapterkit.registry.register import register

        adapter = open_adapter(part, headers_only=True)  # a file that was cut off is an error here
        if _is_registered(part, name, self.home):
            return  # by the run that was killed, or by this one before it saved the same again
        if rows is None:
            rows = _rows(folder)
        measured = {**runs.figures(rows, step), "step": step}
        said = {**self._code, **self._data, **runs.link(), **self.meta, "step": str(step)}
        if "seed" in self._settings:
            said["seed"] = str(self._settings["seed"])
        base = self._base(adapter.config.base or "", adapter.config.revision)
        found = register(
            part,
            name,
            base=base,
            operation=Operation("train", self._settings, tool="transformers", tool_version=version),
            evidence={"training": measured},
            meta=said,
            home=self.home,
        )
        self.registered.append(found.record.ref)
        if self.alias:
            verbs.tag(found.record.ref, self.alias, home=self.home)

    def _base(self, named: str, revision: str | None) -> Identity | None:
        """Which base it is, looked up once for each name."""
        key = str(self.base or named)
        if key not in self._bases:
            self._bases[key] = base_identity(self.base, named, revision, self.home)
        return self._bases[key]


def base_identity(
    given: str | Path | None, named: str, revision: str | None, home: Path | None = None
) -> Identity | None:
    """The base of a run by its weights: what was given, else the folder or the cached repository that the adapter names.

    Without either, its Hub id alone; None where nothing is known. No network is asked.
    """
    from dataclasses import replace

    from adapterkit.provenance.register import by_weights, identify_base

    place: str | Path = given or named
    repo = named if is_repo(named) else ""
    commit = ""
    if given is None and repo and not Path(named).is_dir():
        cached = _cached(named, revision)
        if cached is None:
            return Identity(id=repo)
        place, commit = cached, cached.name if len(cached.name) == 40 else ""
    if not str(place):
        return None
    try:
        found = identify_base(place, home=home)
    except NotFound:
        if given is not None:
            raise
        return Identity(id=repo) if repo else None
    if repo and not found.id:
        found = replace(found, id=repo, commit=commit)
    return by_weights(found, home, said=named)[0]


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository in the Hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _saved(output: Path, step: int) -> Path:
    """The folder of a step; a search for hyper-parameters puts it one level down.

    Raises:
        NotFound: nothing was saved there.
    """
    name = f"checkpoint-{step}"
    found = [output / name, *sorted(output.glob(f"run-*/{name}"))]
    there = [folder for folder in found if folder.is_dir()]
    if not there:
        return output / name
    return max(there, key=lambda folder: folder.stat().st_mtime_ns)


def _checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints by their steps: the trainer's state is what it writes last."""
    found = []
    for folder in output.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if is_whole(step) and (folder / STATE).is_file():
            found.append((int(step), folder))
    return sorted(found)


def _adapters(folder: Path) -> list[tuple[Path, str]]:
    """The adapter in a folder, and those of other names below it.

    Raises:
        AdapterError: there is none.
    """
    found = [(folder, "")] if (folder / "adapter_config.json").is_file() else []
    found += [(path.parent, path.parent.name) for path in sorted(folder.glob("*/adapter_config.json"))]
    if not found:
        raise AdapterError(f"{folder} holds no adapter", "the callback registers what PEFT saves")
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        found = json_value((folder / STATE).read_text())["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _is_registered(folder: Path, name: str, home: Path | None) -> bool:
    """Whether a version of the name holds exactly these files."""
    from adapterkit import disk
    from adapterkit.registry import store
    from adapterkit.registry.gather import gather

    at = open_home(home)
    entries = []
    for inside, real in gather(folder).files:
        digest, size = disk.hash_file(real)
        entries.append(FileEntry(inside, size, digest))
    content = Record("adapter", tuple(entries)).content
    known = (store.load(at, name, version) for version in at.versions(name))
    return any(isinstance(record, Record) and record.content == content for record in known)
