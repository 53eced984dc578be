"""Workers that are actors of Ray: of a cluster that runs, or of one that is started here and ends with the run."""

from __future__ import annotations

import gc
import math
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from typing import Any

from adapterkit.errors import MissingPackage, OutputError, UsageError, option
from adapterkit.ops.device import CUDA
from adapterkit.verbs.engines.pool import ENDED, FAILED, LOST, MOVED, READY, Message, Reading, WorkerSetting, as_said

PACE = 1.0  # seconds between two looks at how far parts are


class Worker:
    """The actor. It opens the plan once; one thread of it executes parts, another says how far it is."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self._setting = setting
        self._opened: Any = None
        self._lock = threading.Lock()
        self._done = 0

    def ready(self) -> dict[str, Any]:
        """Open the plan; where the actor is, or why it cannot be one."""
        from adapterkit.checkpoint.plan import Plan
        from adapterkit.verbs.execute import OpenPlan

        gc.set_threshold(1_000_000, 50, 100)  # as the command line does: a plan is many objects that all live on
        try:
            Reading(**self._setting["reading"]).take()
            plan = Plan.from_json(self._setting["plan"])
            self._opened = OpenPlan(plan, self._setting["out"], self._setting["part_size"])
            self._opened.ready()
        except Exception as error:
            return {"failed": as_said(error)}
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def execute(self, index: int) -> dict[str, Any]:
        """Execute a part; its report, or why it cannot be executed."""
        self._done = 0
        try:
            return asdict(self._opened.execute(index, jobs=self._setting["jobs"], progress=self._moved))
        except Exception as error:
            return {"failed": as_said(error)}

    def done(self) -> int:
        """Bytes of the part at hand."""
        return self._done

    def _moved(self, done: int, total: int) -> None:
        self._done = done


def gpu_of(device: str, there: float, count: int) -> dict[str, float]:
    """What a worker asks Ray for to compute on a device: a GPU, or its share of one.

    Args:
        there: GPUs that the cluster has.
        count: workers.

    Raises:
        UsageError: the cluster has none, or one is named by a number, which Ray gives.
    """
    sort, colon, _ = device.partition(":")
    if sort != CUDA:
        return {}
    if colon:
        raise UsageError(
            f"Ray gives each worker its GPU, and {device} names one by its number", f"use {option('device', CUDA)}"
        )
    if there < 1:
        raise UsageError(
            "no machine of the cluster has a GPU that Ray knows of",
            f"leave out {option('device')}, or add such a machine",
        )
    return {"num_gpus": 1.0 if count <= there else 1 / math.ceil(count / int(there))}


def _begin(ray: Any, how: dict[str, Any], tries: int) -> None:
    """Join a cluster, or start one. Ray gives its own processes 30 seconds, which are too few on a busy machine."""
    while True:
        try:
            ray.init(log_to_driver=False, logging_level="error", **how)
            return
        except Exception as error:
            tries -= 1
            if tries == 0 or _TOO_SLOW not in str(error):
                raise
            ray.shutdown()


class RayPool:
    """See `adapterkit.verbs.engines.pool.Pool`.

    Args:
        address: of a cluster, ``auto`` for the one that this machine belongs to; None starts one here.
        count: workers, for a cluster that is started here.

    Raises:
        MissingPackage: Ray is not installed.
        OutputError: the cluster does not answer.
    """

    def __init__(self, setting: WorkerSetting, address: str | None, count: int) -> None:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise MissingPackage("Ray is not installed", "pip install 'adapterkit[ray]'") from None
        self._ray = ray
        self._actors: dict[int, Any] = {}
        # Ray tells of lost workers on standard output, which is the report's.
        self._quiet = ExitStack()
        self._quiet.enter_context(redirect_stdout(sys.stderr))
        self._own = not ray.is_initialized()
        if self._own:
            how: dict[str, Any] = {"address": address} if address is not None else {"address": "local"}
            if address is None:
                how |= {"num_cpus": count * setting.jobs, "include_dashboard": False}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _begin(ray, how, tries=1 if address is not None else STARTS)
            except Exception as error:
                self._quiet.close()
                where = address or "this machine"
                said = str(error).strip().splitlines()
                raise OutputError(
                    f"Ray does not answer at {where} ({said[0] if said else type(error).__name__})",
                    "start a cluster, or check the address and its token",
                ) from error
        # A worker whose process ends is not brought back by Ray: the driver starts another, and knows that it did.
        how = {"num_cpus": setting.jobs, "max_restarts": 0, "max_concurrency": 2}
        try:
            how |= gpu_of(setting.device, float(ray.cluster_resources().get("GPU", 0)), count)
        except UsageError:
            self.close()
            raise
        self._class = ray.remote(**how)(Worker)
        self._given = ray.put({**asdict(setting), "file": ""})
        self._asked: dict[Any, tuple[str, int, int]] = {}  # reference: kind of its answer, worker, part
        self._count = 0
        self._looked = 0.0

    def start(self) -> int:
        number, self._count = self._count, self._count + 1
        actor = self._actors[number] = self._class.remote(self._given)
        self._asked[actor.ready.remote()] = (READY, number, -1)
        return number

    def give(self, worker: int, part: int) -> None:
        actor = self._actors[worker]
        self._asked[actor.execute.remote(part)] = (ENDED, worker, part)

    def wait(self, seconds: float) -> Sequence[Message]:
        found = []
        for reference in self._answered(seconds):
            if reference not in self._asked:
                continue  # of a worker that is known to be lost
            kind, worker, part = self._asked.pop(reference)
            try:
                said = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                found.append(self._lost(worker, error))
                continue
            if kind == MOVED:
                found.append(Message(MOVED, worker, part, {"done": said}))
            elif "failed" in said:
                found.append(Message(FAILED, worker, part, said["failed"]))
            else:
                found.append(Message(kind, worker, part, said))
        return found

    def _answered(self, seconds: float) -> list[Any]:
        """What is answered; one answer is waited for, and now and then all are asked how far they are."""
        waited = [reference for reference, (kind, _, _) in self._asked.items() if kind != MOVED]
        if not waited:
            return []
        self._ray.wait(waited, num_returns=1, timeout=seconds, fetch_local=False)
        every = list(self._asked)
        ready, _ = self._ray.wait(every, num_returns=len(every), timeout=0, fetch_local=False)
        if time.monotonic() - self._looked >= PACE:
            self._looked = time.monotonic()
            asked = {worker for kind, worker, _ in self._asked.values() if kind == MOVED}
            for kind, worker, part in list(self._asked.values()):
                if kind == ENDED and worker not in asked:
                    self._asked[self._actors[worker].done.remote()] = (MOVED, worker, part)
        return list(ready)

    def _lost(self, worker: int, error: BaseException) -> Message:
        self._asked = {ref: about for ref, about in self._asked.items() if about[1] != worker}
        self._actors.pop(worker, None)
        lines = str(error).strip().splitlines()
        return Message(LOST, worker, said={"why": f"{type(error).__name__}: {lines[0] if lines else ''}"})

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._own:
            self._ray.shutdown()
        self._quiet.close()


_TOO_SLOW = "timed out during startup"  # by ray/_private/node.py, where the seconds are fixed
STARTS = 4
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
