"""A worker that is a process: numbers of parts come in, a line each, and messages go out, a line of JSON each."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from adapterkit.verbs.engines.pool import ENDED, FAILED, MOVED, READY, as_said
from adapterkit.verbs.execute import OpenPlan

PACE = 0.2  # seconds between two words on how far a part is


def serve(opened: OpenPlan, asked: IO[bytes], answers: int, *, jobs: int | None = None) -> None:
    """Execute the parts that are asked for, until the asking ends; the process ends then, in the middle of a part too.

    Args:
        opened: the plan.
        asked: where numbers of parts come from.
        answers: descriptor that messages go to.
    """

    def say(kind: str, part: int = -1, /, **said: Any) -> None:
        os.write(answers, (json.dumps({"kind": kind, "part": part, "said": said}) + "\n").encode())

    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked, numbers), daemon=True).start()
    part = -1
    try:
        opened.ready()
        say(READY, host=socket.gethostname(), pid=os.getpid())
        while True:
            part = numbers.get()
            report = opened.execute(part, jobs=jobs, progress=_paced(say, part))
            say(ENDED, part, **asdict(report))
    except Exception as error:
        say(FAILED, part, **as_said(error))


def _listen(asked: IO[bytes], numbers: queue.SimpleQueue[int]) -> None:
    for line in asked:
        numbers.put(int(line))
    os._exit(0)  # who asked is gone: nobody would hear of what is still done


def _paced(say: Callable[..., None], part: int) -> Callable[[int, int], None]:
    last = time.monotonic()

    def moved(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PACE:
            last = time.monotonic()
            say(MOVED, part, done=done)

    return moved
