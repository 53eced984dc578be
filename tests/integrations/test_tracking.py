"""MLflow with a real server on SQLite, and W&B offline: logged, found again, and nothing half done where a server is away."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes

from adapterkit.errors import CheckFailed, NotFound, ServerError, UsageError
from adapterkit.integrations import mlflow as ours
from adapterkit.provenance.register import register
from adapterkit.registry import verbs
from adapterkit.registry.checkout import checkout
from adapterkit.registry.evidence import attach_evidence
from adapterkit.registry.home import Home

pytestmark = pytest.mark.filterwarnings("ignore")  # what MLflow and W&B say of their own dependencies


@pytest.fixture
def tickets(home: Path, tmp_path: Path) -> str:
    """A registered adapter with a figure; its reference."""
    base = plain_base(tmp_path / "base")
    folder = plain_adapter(tmp_path / "a1", base, base_model_name_or_path="org/base")
    register(folder, "tickets", base=base, meta={"dataset": "tickets-v3"})
    found = attach_evidence("tickets", "training", {"loss": 0.25, "step": 4})
    verbs.tag(found.ref, "prod")
    return found.ref


@pytest.fixture(scope="module", params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow on a SQLite file: by its library in this process, and by its own server on loopback."""
    pytest.importorskip("mlflow.server")
    folder = tmp_path_factory.mktemp("mlflow")
    if request.param == "sqlite":
        before = os.getcwd()
        os.chdir(folder)  # where MLflow puts what is logged
        try:
            yield f"sqlite:///{folder / 'mlflow.db'}"
        finally:
            os.chdir(before)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *store,
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(1200):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as probe:
                    probe.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                    if probe.recv(64):
                        break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_mlflow_gets_the_adapter_with_its_record_and_gives_it_back(
    server: str, tickets: str, home: Path, tmp_path: Path
) -> None:
    import mlflow

    record = verbs.show(tickets).record
    done = ours.log_version("tickets@prod", model="tickets", tracking_uri=server)
    client = mlflow.MlflowClient(tracking_uri=server, registry_uri=server)
    run = client.get_run(done.run)
    assert (run.info.status, run.data.tags["adapterkit.content"]) == ("FINISHED", f"sha256:{record.content}")
    assert run.data.metrics["training.loss"] == 0.25
    assert run.data.tags["adapterkit.meta.dataset"] == "tickets-v3"
    names = {Path(file.path).name for file in client.list_artifacts(done.run, "adapter")}
    assert names == {"MLmodel", "adapter_config.json", "adapter_model.safetensors", "adapterkit.json"}
    version = client.get_model_version("tickets", done.version)
    assert (version.run_id, version.tags["adapterkit.ref"]) == (done.run, tickets)
    # The link is shown here too: the same content, with it among the evidence.
    shown = verbs.show(done.ref).record
    assert shown.content == record.content
    said = {"run": done.run, "model": "tickets", "version": done.version}
    assert dict(shown.evidence["mlflow"]) == said | ({"url": done.url} if done.url else {})
    assert done.url.startswith(server) or server.startswith("sqlite")
    # And back, on another machine.
    client.set_registered_model_alias("tickets", "champion", done.version)
    other = tmp_path / "other"
    for model in (f"models:/tickets/{done.version}", "models:/tickets@champion"):
        found = ours.import_model(model, name="again", tracking_uri=server, home=other)
        assert (found.record.content, found.record.ref) == (record.content, "again@1")
    assert found.record.base == record.base
    assert found.record.meta["mlflow"] == f"models:/tickets/{done.version}"
    assert found.record.meta["mlflow.run"] == done.run
    folder = checkout("again", home=other)
    assert read_bytes(folder) == read_bytes(checkout(tickets, home=home))
    # A run that is there already, as that of the training.
    own = client.create_run(run.info.experiment_id)
    assert ours.log_version(tickets, run_id=own.info.run_id, tracking_uri=server).run == own.info.run_id
    assert client.get_run(own.info.run_id).info.status == "RUNNING"  # it is not ours to end


def test_what_mlflow_does_not_have_or_somebody_changed(server: str, tickets: str, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=server, registry_uri=server)
    done = ours.log_version(tickets, model="changed", tracking_uri=server)
    client.set_model_version_tag("changed", done.version, "adapterkit.content", f"sha256:{'0' * 64}")
    with pytest.raises(CheckFailed, match="was logged"):
        ours.import_model(f"models:/changed/{done.version}", tracking_uri=server, home=tmp_path / "other")
    with pytest.raises(NotFound):
        ours.import_model("models:/changed/99", tracking_uri=server)
    with pytest.raises(NotFound):
        ours.log_version(tickets, run_id="0" * 32, tracking_uri=server)
    empty = client.create_run("0")
    client.log_text(empty.info.run_id, "nothing", "adapter/readme.txt")
    client.create_registered_model("empty")
    client.create_model_version("empty", f"{empty.info.artifact_uri}/adapter", run_id=empty.info.run_id)
    with pytest.raises(NotFound, match="holds no adapter"):
        ours.import_model("models:/empty/1", tracking_uri=server)
    for text in ("tickets", "models:/tickets", "models:/a/b/c", "runs:/x"):
        with pytest.raises(UsageError):
            ours.import_model(text, tracking_uri=server)


def test_an_mlflow_that_fails_at_the_last_step_keeps_nothing(
    server: str, tickets: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=server, registry_uri=server)

    def fails(self: Any, *given: Any, **more: Any) -> None:
        raise MlflowException("the database went away")

    before = len(Home(home).versions("tickets"))
    monkeypatch.setattr(mlflow.MlflowClient, "create_model_version", fails)
    with pytest.raises(ServerError, match="the database went away"):
        ours.log_version(tickets, model="never", experiment="failing", tracking_uri=server)
    found = client.get_experiment_by_name("failing")
    assert client.search_runs([found.experiment_id]) == []
    assert len(Home(home).versions("tickets")) == before  # no link to what is not there


def test_an_mlflow_that_is_away_is_said_at_once(tickets: str, home: Path) -> None:
    before = len(Home(home).versions("tickets"))
    began = time.monotonic()
    with pytest.raises(ServerError, match="cannot be reached") as caught:
        ours.log_version(tickets, model="tickets", tracking_uri="http://127.0.0.1:9")
    assert caught.value.exit_code == 5
    with pytest.raises(ServerError):
        ours.import_model("models:/tickets/1", tracking_uri="http://127.0.0.1:9")
    assert time.monotonic() - began < 60  # its own client would try for minutes
    assert len(Home(home).versions("tickets")) == before


def test_a_password_in_the_address_is_neither_said_nor_kept(tickets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``https://user:password@host`` is how MLflow's own address is often set."""
    mlflow = pytest.importorskip("mlflow")
    from mlflow.exceptions import MlflowException

    from adapterkit import web
    from adapterkit.integrations import runs

    login, asked = "https://ci:p@ss-w0rd@mlflow.example.com", []

    def well(method: str, url: str, **given: Any) -> web.WebAnswer:
        asked.append(url)
        return web.WebAnswer(200, {})

    def fails(*given: Any, **more: Any) -> None:
        raise MlflowException(f"API request to {login}/api failed")

    monkeypatch.setattr(web, "ask", well)
    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", fails)
    with pytest.raises(ServerError) as caught:
        ours.log_version(tickets, tracking_uri=login)
    assert asked == ["https://mlflow.example.com/health"]
    assert "mlflow.example.com" in caught.value.message
    assert "ss-w0rd" not in str(caught.value)

    class Run:
        class info:  # noqa: N801
            run_id, experiment_id, run_name = "r1", "7", "mine"

    monkeypatch.setattr(mlflow, "active_run", Run)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: login)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert runs.link()["run"] == "https://mlflow.example.com/#/experiments/7/runs/r1"


def test_whole_models_are_not_logged(home: Path, tmp_path: Path) -> None:
    register(plain_base(tmp_path / "base"), "model", kind="merged")
    with pytest.raises(UsageError, match="adapters are logged"):
        ours.log_version("model", tracking_uri="http://127.0.0.1:9")


def test_wandb_keeps_a_version_offline(tickets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from adapterkit.integrations import wandb as theirs

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    seen: dict[str, Any] = {}
    kept = wandb.Artifact.add_dir

    def look(self: Any, folder: str, *given: Any, **more: Any) -> Any:
        seen.update(read_bytes(Path(folder), record=True))
        return kept(self, folder, *given, **more)

    monkeypatch.setattr(wandb.Artifact, "add_dir", look)
    done = theirs.log_version("tickets@prod", project="tickets")
    record = verbs.show(tickets).record
    assert set(seen) == {"adapter_config.json", "adapter_model.safetensors", "adapterkit.json"}
    assert json.loads(seen["adapterkit.json"])["meta"]["dataset"] == "tickets-v3"
    shown = verbs.show(done.ref).record
    assert (shown.content, shown.evidence["wandb"]["run"]) == (record.content, done.run)
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{done.run}"))
    with pytest.raises(UsageError, match="offline"):
        theirs.log_version(tickets, collection="registry/tickets")


def test_wandb_gives_an_artifact_back(tickets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``wandb.Api().artifact(name)`` with ``metadata`` and ``download(root)``, as the public API has them."""
    wandb = pytest.importorskip("wandb")
    from adapterkit.integrations import wandb as theirs
    from adapterkit.integrations.tracking import copy_files, labels

    record = verbs.show(tickets).record

    class Artifact:
        metadata = labels(record)
        qualified_name = "team/tickets/tickets:v3"

        def download(self, root: str) -> str:
            copy_files(record, checkout(tickets), Path(root))
            return root

    class Api:
        def artifact(self, name: str) -> Artifact:
            if name != "team/tickets/tickets:v3":
                raise wandb.errors.CommError("not found")
            return Artifact()

    monkeypatch.setattr(wandb, "Api", Api)
    found = theirs.import_artifact("team/tickets/tickets:v3", home=tmp_path / "other")
    assert (found.record.name, found.record.content) == ("tickets", record.content)
    with pytest.raises(NotFound):
        theirs.import_artifact("team/tickets/other:v3")
    with pytest.raises(UsageError):
        theirs.import_artifact("tickets")
    Artifact.metadata = {**Artifact.metadata, "adapterkit.content": f"sha256:{'1' * 64}"}
    with pytest.raises(CheckFailed):
        theirs.import_artifact("team/tickets/tickets:v3", home=tmp_path / "third")
