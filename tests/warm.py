"""Processes that are forked from one which has torch already; starting a new Python for each takes two seconds.

Each still is a process of its own that runs a script, or a package, from its first line, with its own limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SERVER = """
import json, os, runpy, sys, tempfile, traceback
import torch, torch.distributed.checkpoint
torch.set_num_threads(1)
here = list(sys.path)
for line in sys.stdin:
    asked = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(asked["cwd"])
            os.environ.clear()
            os.environ.update(asked["env"])
            sys.argv = asked["argv"]
            sys.path[:] = [asked["cwd"]] * bool(asked["module"]) + here
            code = 1
            try:
                if asked["module"]:
                    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as stopped:
                code = stopped.code if isinstance(stopped.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    print(json.dumps([code, *said]), flush=True)
"""


class WarmProcesses:
    """Stands where a module has `subprocess`: ``run`` of ``python -I SCRIPT ...`` is a fork."""

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-W", "ignore", "-c", SERVER]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-I"], command
        return self._forked({"argv": command[2:], "module": "", "cwd": os.getcwd()})

    def package(self, name: str, words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """``python -m NAME WORD ...`` in a folder, of which packages are found first."""
        return self._forked({"argv": [name, *words], "module": name, "cwd": str(cwd)})

    def _forked(self, asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({**asked, "env": dict(os.environ)}) + "\n")
        self.server.stdin.flush()
        code, out, err = json.loads(self.server.stdout.readline())
        return subprocess.CompletedProcess(asked["argv"], code, out, err)

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()
