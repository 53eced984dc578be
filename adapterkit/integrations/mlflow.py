"""MLflow: a version is logged to a run (the adapter alone, never its base), registered in MLflow's registry, and comes back.

    from adapterkit.integrations import mlflow
    mlflow.log_version("tickets@prod", model="tickets")
    mlflow.import_model("models:/tickets@champion", name="tickets")

The server is the one that MLflow itself is set to (``MLFLOW_TRACKING_URI``). It is asked whether it is there before anything is
done, and what was begun on it is taken back where a later step fails. (The extra ``mlflow``.)
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterkit.errors import AdapterkitError, AuthError, NotFound, ServerError, UsageError
from adapterkit.integrations.tracking import LoggedVersion, adapter_of, copy_files, labels, numbers, registered
from adapterkit.packages import need
from adapterkit.redaction import without_login
from adapterkit.registry.evidence import attach_evidence
from adapterkit.registry.names import name_or_from
from adapterkit.registry.register import Registered

PATH = "adapter"
"""The folder of a run's artifacts that holds the adapter."""


def log_version(
    ref: str,
    *,
    model: str = "",
    run_id: str = "",
    experiment: str = "adapterkit",
    tracking_uri: str = "",
    home: Path | None = None,
) -> LoggedVersion:
    """Log a registered adapter.

    Args:
        ref: ``name@alias``, ``name@number`` or a digest.
        model: register it in MLflow's registry under this name.
        run_id: an existing run, such as that of the training; by default a run of its own.
        experiment: of a run of its own.
        tracking_uri: of the server; by default MLflow's own setting.

    Raises:
        ServerError: MLflow cannot be reached, or fails; nothing half done is left.
        NotFound: there is no such version, or run.
        UsageError: it is no adapter.
    """
    record, folder = adapter_of(ref, home)
    client, uri = _client(tracking_uri)
    with _errors(uri):
        mine = not run_id
        run = (
            client.create_run(_experiment(client, experiment), run_name=record.ref) if mine else client.get_run(run_id)
        )
        identity = run.info.run_id
        try:
            with tempfile.TemporaryDirectory(prefix="adapterkit-mlflow-") as top:
                target = Path(top) / PATH
                target.mkdir()
                copy_files(record, folder, target)
                _describe(target, record, identity)
                client.log_artifacts(identity, str(target), PATH)
            for key, value in labels(record).items():
                client.set_tag(identity, key, value)
            for key, number in numbers(record.evidence).items():
                client.log_metric(identity, key, number)
            version = _register(client, model, identity, record) if model else ""
            if mine:
                client.set_terminated(identity)
        except BaseException:
            if mine:
                _forget(client, identity)
            raise
        shown = without_login(uri)
        url = f"{shown}/#/experiments/{run.info.experiment_id}/runs/{identity}" if uri.startswith("http") else ""
    said = {"run": identity, "url": url, "model": model, "version": version}
    attached = attach_evidence(record.ref, "mlflow", {key: value for key, value in said.items() if value}, home=home)
    return LoggedVersion(attached.ref, identity, url, model, version)


def import_model(model: str, *, name: str = "", tracking_uri: str = "", home: Path | None = None) -> Registered:
    """Register what a version of MLflow's registry holds.

    Args:
        model: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        name: here; by default the name there.

    Raises:
        CheckFailed: other files came than were logged.
        NotFound: there is no such version, or it holds no adapter.
        ServerError: MLflow cannot be reached, or fails.
        UsageError
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:/([0-9]+)|@([^/@]+))", model)
    if found is None:
        raise UsageError(f"'{model}' is no version of a model", "give models:/NAME/VERSION or models:/NAME@ALIAS")
    client, uri = _client(tracking_uri)
    with _errors(uri), tempfile.TemporaryDirectory(prefix="adapterkit-mlflow-") as top:
        if found[2]:
            version = client.get_model_version(found[1], found[2])
        else:
            version = client.get_model_version_by_alias(found[1], found[3])
        folder = Path(_artifacts(client.get_model_version_download_uri(found[1], version.version), uri, top))
        (folder / "MLmodel").unlink(missing_ok=True)
        if not (folder / "adapter_config.json").is_file():
            raise NotFound(
                f"{model} holds no adapter", "import what was logged by log_version, or a folder as PEFT saves it"
            )
        meta = {"mlflow": f"models:/{found[1]}/{version.version}", "mlflow.run": version.run_id or ""}
        content = version.tags.get("adapterkit.content", "")
        return registered(
            folder, name_or_from(name, found[1], model), {k: v for k, v in meta.items() if v}, content, home
        )


def _artifacts(source: str, uri: str, top: str) -> str:
    import mlflow

    return str(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=top, tracking_uri=uri or None))


def _client(tracking_uri: str) -> tuple[Any, str]:
    """A client of a server that is there.

    Raises:
        MissingPackage: MLflow is not installed.
        ServerError: nothing answers.
    """
    need("mlflow", what="versions are logged with MLflow's own client", extra="mlflow")
    import mlflow

    uri = (tracking_uri or mlflow.get_tracking_uri()).rstrip("/")
    if uri.startswith("http"):
        from adapterkit.web import ask

        # Its own client tries for minutes. No login is needed to see whether it is there.
        shown = without_login(uri)
        answer = ask("GET", f"{shown}/health", timeout=10)
        if not answer.ok and answer.status not in (401, 403, 404):
            raise ServerError(f"MLflow at {shown} is not well ({answer.status})", "see its log")
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    return client, uri


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """MLflow's errors as ours, without the login that an address may hold; its client gives up sooner than in minutes."""
    from mlflow.exceptions import MlflowException

    before = {key: os.environ.get(key) for key in _PATIENCE}
    os.environ.update(_PATIENCE)
    try:
        yield
    except AdapterkitError:
        raise
    except MlflowException as error:
        said = without_login(" ".join(str(error).split()))[:300]
        code = getattr(error, "error_code", "")
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"MLflow has no such thing ({said})", "check the name") from error
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            raise AuthError(
                f"MLflow does not allow that ({said})", "set MLFLOW_TRACKING_TOKEN, or user and password"
            ) from error
        if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise UsageError(f"MLflow refuses that ({said})") from error
        raise ServerError(f"MLflow at {without_login(uri)} failed ({said})", "try again when it is there") from error
    except OSError as error:
        said = f"{type(error).__name__}: {without_login(str(error))}"
        raise ServerError(f"MLflow at {without_login(uri)} failed ({said})", "try again when it is there") from error
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found is not None else client.create_experiment(name))


def _describe(folder: Path, record: Any, run: str) -> None:
    """The file that makes a folder one of MLflow's models, with a flavour of our own: what it is, and on which base."""
    from mlflow.models import Model

    said = labels(record)
    about = {key.removeprefix("adapterkit."): said[key] for key in said if not key.startswith("adapterkit.meta.")}
    model = Model(artifact_path=PATH, run_id=run)
    model.add_flavor("adapterkit", **about)
    model.save(str(folder / "MLmodel"))


def _register(client: Any, name: str, run: str, record: Any) -> str:
    """A version of MLflow's own registry; the last step, since it is what others find."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
    source = f"{client.get_run(run).info.artifact_uri}/{PATH}"
    made = client.create_model_version(
        name, source, run_id=run, tags=labels(record), description=f"{record.ref}, by adapterkit"
    )
    return str(made.version)


def _forget(client: Any, run: str) -> None:
    """Take back a run of our own, as far as the server still answers."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_run(run)
    except (MlflowException, OSError):
        pass  # what failed first is what there is to say
