"""Workers that are processes of this machine.

A worker is `adapterkit execute PLAN --served`: it reads numbers of parts on its standard input and writes messages, a line of
JSON each. It ends when its input does, so none outlives a driver that is killed.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

from adapterkit.verbs.engines.pool import LOST, Message, WorkerSetting


class _Child:
    """A process, what it said last without a line break, and where its errors go."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.process, self.errors, self.rest = process, errors, b""

    def why(self) -> str:
        """How it ended, and the last line of what it wrote to standard error."""
        code = self.process.wait()
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1]}" if lines else how


class LocalPool:
    """See `adapterkit.verbs.engines.pool.Pool`."""

    def __init__(self, setting: WorkerSetting) -> None:
        self._setting = setting
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._count = 0

    def start(self) -> int:
        number, self._count = self._count, self._count + 1
        setting = self._setting
        command = [sys.executable, "-m", "adapterkit", "execute", setting.file, "-o", setting.out, "--served"]
        command += ["--jobs", str(setting.jobs), *setting.reading.options]
        if setting.part_size is not None:
            command += ["--part-size", str(setting.part_size)]
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._children[number] = _Child(process, errors)
        self._selector.register(process.stdout, selectors.EVENT_READ, number)
        return number

    def give(self, worker: int, part: int) -> None:
        stdin = self._children[worker].process.stdin
        assert stdin is not None
        try:
            stdin.write(f"{part}\n".encode())
            stdin.flush()
        except OSError:
            pass  # it is gone; its output says so too

    def wait(self, seconds: float) -> Sequence[Message]:
        found: list[Message] = []
        for key, _ in self._selector.select(seconds):
            worker: int = key.data
            child = self._children[worker]
            data = os.read(key.fd, 1 << 20)
            *lines, child.rest = (child.rest + data).split(b"\n")
            found += [_message(worker, line) for line in lines]
            if not data:
                self._selector.unregister(key.fileobj)
                found.append(Message(LOST, worker, said={"why": child.why()}))
                self._forget(worker)
        return found

    def close(self) -> None:
        for child in self._children.values():
            child.process.kill()
        for worker in list(self._children):
            self._children[worker].process.wait()
            self._forget(worker)
        self._selector.close()

    def _forget(self, worker: int) -> None:
        child = self._children.pop(worker)
        child.errors.close()
        for stream in (child.process.stdin, child.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass


def _message(worker: int, line: bytes) -> Message:
    said = json.loads(line)
    return Message(said["kind"], worker, said["part"], said["said"])
