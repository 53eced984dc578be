"""mlx-lm in one process of its own for all tests: MLX and torch each bring their own threads, and its imports take seconds."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from typing import IO

# Each line is a script and its arguments; what it prints, or how it ended, goes back in one line.
SERVER = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    script, sys.argv = json.loads(line)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(script, {"__name__": "__main__"})
        failed = ""
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([said.getvalue(), failed]), flush=True)
"""


class MlxChild:
    """A process that runs scripts of mlx-lm, one after the other."""

    def __init__(self) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, script: str, *arguments: object) -> str:
        """What a script printed; fails the test if it raised, or ended the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps([script, ["-c", *map(str, arguments)]])
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        waiting = select.poll()  # `select` takes no descriptor above 1,023
        waiting.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        assert waiting.poll(900_000), "mlx-lm's process says nothing"
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise AssertionError(f"mlx-lm's process ended:\n{self._errors.read()[-2000:]}")
        printed, failed = json.loads(answer)
        assert not failed, failed
        return str(printed)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
