"""Fixtures that every suite shares; the builders themselves are in `models`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from browser import browser, new_page, page  # noqa: F401  (fixtures)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_child import MlxChild
    from warm import WarmProcesses

# Before anything imports a library that reads them: no test may reach the network by accident, and none may find a token.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
os.environ.pop("HF_TOKEN", None)

# Workers and the processes that they start share the cores; what is about threads asks for them.
os.environ["OMP_NUM_THREADS"] = "1"

# No test depends on how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# A shell has Ctrl-C ignored for what it runs in the background, and every process started from there inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test looks into, or writes to, what somebody registered on this machine; processes that it starts neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERKIT_HOME", str(tmp_path_factory.mktemp("registry") / "home"))
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the registry that is also the default one."""
    root = tmp_path / "home"
    monkeypatch.setenv("ADAPTERKIT_HOME", str(root))
    return root


@pytest.fixture(scope="session")
def mlx_lm() -> Iterator[MlxChild]:
    """mlx-lm in a process of its own, started by the first test that asks for it."""
    from mlx_child import MlxChild

    child = MlxChild()
    yield child
    child.close()


@pytest.fixture
def pieces_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan knows one local weight file from another by its values, as if what changed lay between the hashed pieces."""
    monkeypatch.setattr("adapterkit.checkpoint.values._hash", lambda path, state, kind: "0" * 32)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcesses]:
    from warm import WarmProcesses

    processes = WarmProcesses()
    yield processes
    processes.close()


@pytest.fixture
def warm_processes(warm: WarmProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads pickles is forked, once torch is loaded, and not started anew each time."""
    monkeypatch.setattr("adapterkit.pickles.apart.subprocess", warm)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_base(kind, dtype, **config)``: a tiny transformers checkpoint, built once per session and shape."""
    from models import build_base

    built: dict[str, Path] = {}

    def make(kind: str = "llama", dtype: str = "float32", **config: object) -> Path:
        key = f"{kind}-{dtype}-{sorted(config.items())}"
        if key not in built:
            built[key] = build_base(tmp_path_factory.mktemp(kind), kind, dtype, **config)
        return built[key]

    return make
