"""Weights & Biases: a version is logged as an artifact (the adapter alone), and comes back from one.

    from adapterkit.integrations import wandb
    wandb.log_version("tickets@prod", project="tickets")
    wandb.import_artifact("team/tickets/tickets:prod", name="tickets")

Logged within a run that is active, or in one of its own; ``WANDB_MODE=offline`` keeps it on this machine until ``wandb sync``.
(The extra ``wandb``.)
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from adapterkit.errors import AdapterkitError, AuthError, NotFound, ServerError, UsageError
from adapterkit.integrations.tracking import LoggedVersion, adapter_of, copy_files, labels, numbers, registered
from adapterkit.packages import need
from adapterkit.registry.evidence import attach_evidence
from adapterkit.registry.names import name_or_from
from adapterkit.registry.register import Registered

TYPE = "model"


def log_version(
    ref: str, *, project: str = "adapterkit", collection: str = "", home: Path | None = None
) -> LoggedVersion:
    """Log a registered adapter as an artifact, with its aliases here as its aliases there.

    Args:
        ref: ``name@alias``, ``name@number`` or a digest.
        project: of a run of its own, where none is active.
        collection: link it to this collection of W&B's registry, as ``wandb-registry-model/tickets``.

    Raises:
        ServerError: W&B cannot be reached, or fails.
        NotFound: there is no such version.
        UsageError: it is no adapter.
    """
    from adapterkit.registry import verbs

    record, folder = adapter_of(ref, home)
    wandb = _wandb()
    aliases = [alias for alias in verbs.show(record.ref, home=home).aliases if re.fullmatch(r"[\w.-]+", alias)]
    active = wandb.run
    try:
        run = active or wandb.init(project=project, job_type="register", settings=wandb.Settings(silent=True))
        failed = True
        try:
            artifact = wandb.Artifact(record.name, TYPE, metadata={**labels(record), **numbers(record.evidence)})
            with tempfile.TemporaryDirectory(prefix="adapterkit-wandb-") as top:
                copy_files(record, folder, Path(top))
                artifact.add_dir(top, policy="mutable")  # copied, since the folder goes away
            logged = run.log_artifact(artifact, aliases=[*aliases, f"v{record.version}-{record.content[:12]}"])
            offline = bool(run.settings._offline if hasattr(run.settings, "_offline") else run.offline)
            if not offline:
                logged.wait()
                if collection:
                    run.link_artifact(logged, collection)
            elif collection:
                raise UsageError(
                    "W&B links nothing to its registry offline", "leave out collection, and link it after the sync"
                )
            failed = False
        finally:
            if active is None:
                run.finish(exit_code=1 if failed else 0)
    except AdapterkitError:
        raise
    except wandb.errors.AuthenticationError as error:
        raise AuthError(f"W&B wants a login ({error})", "wandb login, or set WANDB_API_KEY") from error
    except (wandb.errors.Error, OSError) as error:
        raise ServerError(f"W&B failed ({type(error).__name__}: {error})", "try again") from error
    where = f"{run.entity}/{run.project}/" if run.entity else ""
    said = {"run": run.id, "url": run.url or "", "artifact": f"{where}{record.name}", "collection": collection}
    attached = attach_evidence(record.ref, "wandb", {key: value for key, value in said.items() if value}, home=home)
    return LoggedVersion(attached.ref, run.id, run.url or "", said["artifact"])


def import_artifact(artifact: str, *, name: str = "", home: Path | None = None) -> Registered:
    """Register what an artifact holds.

    Args:
        artifact: ``entity/project/name:alias``.
        name: here; by default the artifact's.

    Raises:
        CheckFailed: other files came than were logged.
        NotFound: there is none, or it holds no adapter.
        AuthError, ServerError, UsageError
    """
    if not re.fullmatch(r"(?:[^/:]+/){0,2}[^/:]+:[^/:]+", artifact):
        raise UsageError(f"'{artifact}' is no artifact", "give entity/project/name:alias")
    wandb = _wandb()
    with tempfile.TemporaryDirectory(prefix="adapterkit-wandb-") as top:
        try:
            found: Any = wandb.Api().artifact(artifact)
            folder = Path(found.download(root=top))
        except wandb.errors.CommError as error:
            raise NotFound(f"W&B has no {artifact} for you ({error})", "check the name and the login") from error
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise AuthError(f"W&B wants a login ({error})", "wandb login, or set WANDB_API_KEY") from error
        except (wandb.errors.Error, OSError) as error:
            raise ServerError(f"W&B failed ({type(error).__name__}: {error})", "try again") from error
        if not (folder / "adapter_config.json").is_file():
            raise NotFound(
                f"{artifact} holds no adapter", "import what was logged by log_version, or a folder as PEFT saves it"
            )
        meta = {"wandb": str(getattr(found, "qualified_name", artifact))}
        content = str((found.metadata or {}).get("adapterkit.content", ""))
        name = name_or_from(name, artifact.rpartition("/")[2].partition(":")[0], artifact)
        return registered(folder, name, meta, content, home)


def _wandb() -> Any:
    need("wandb", what="versions are logged with W&B's own client", extra="wandb")
    import wandb

    return wandb
