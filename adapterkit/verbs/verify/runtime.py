"""GGUF files in llama.cpp itself: the xllamacpp wheel in a process of its own, or a ``llama-server`` found on PATH."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.plan import default_jobs
from adapterkit.errors import AdapterkitError, how_it_ended, option
from adapterkit.foreign import json_value
from adapterkit.verbs.verify import decode_child

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

START = 300.0  # seconds that a server may take to load a model
ANSWER = 600.0  # seconds for one answer
MOST_ANSWER = 256 << 20  # bytes of an answer, which has a line for each token of the vocabulary

# Reads one question (JSON) per line, answers each with a line that names a file of float32 log-probabilities.
_CHILD = """
import json, sys
import numpy as np
import xllamacpp as x
file, context, threads, where = json.loads(sys.argv[1])
p = x.CommonParams()
p.model.path = file
p.n_ctx = context; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.cpuparams.n_threads = threads; p.verbosity = -1; p.port = 0
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
print("READY", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = server.handle_completions(asked)
    # A token that is only a part of a character is held back, and its figures with it. They are taken before a token is
    # chosen, so another choice, one of the question's own tokens, leaves them as they are.
    for token in dict.fromkeys(asked["prompt"]):
        if "choices" not in answer or answer["choices"][0].get("logprobs"):
            break
        answer = server.handle_completions({**asked, "logit_bias": [[token, 1e9]]})
    if "choices" not in answer or not answer["choices"][0].get("logprobs"):
        print("ERROR" + json.dumps(answer)[:500], flush=True)
        continue
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    row = np.full(asked["n_probs"], -np.inf, np.float32)
    for one in top:
        row[one["id"]] = one["logprob"]
    np.save(where, row)
    print("ROW", flush=True)
"""


def find_runtime() -> str | None:
    """The runtime that is there: ``xllamacpp``, the path of a ``llama-server``, or None."""
    if find_spec("xllamacpp") is not None:
        return "xllamacpp"
    return shutil.which("llama-server")


class InLlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with a float32 cache of keys and values.

    Args:
        file: the model, or the first part of it.
        runtime: what `find_runtime` found.
        context: tokens that have to fit.
        vocabulary: tokens that it knows.
        jobs: threads; by default as many as a merge has.

    Raises:
        AdapterkitError: it does not start, as with an architecture that it does not know.
    """

    def __init__(self, file: Path, runtime: str, context: int, vocabulary: int, jobs: int | None = None) -> None:
        self._vocabulary = vocabulary
        self._folder = tempfile.TemporaryDirectory(prefix="adapterkit-verify-")
        threads = jobs or default_jobs()
        inside = runtime == "xllamacpp"
        self._server: _Inside | _Beside
        try:
            if inside:
                self._server = _Inside(file, context, threads, Path(self._folder.name) / "row.npy")
            else:
                self._server = _Beside(file, runtime, context, threads, vocabulary)
        except BaseException:
            self._folder.cleanup()
            raise
        self.name = f"llama.cpp ({'xllamacpp' if inside else 'llama-server'})"

    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """Float32 ``[positions, vocabulary]``: by one decode where the C functions can be used.

        Else by one question each, of which llama.cpp keeps what it has read already.
        """
        import numpy as np

        if isinstance(self._server, _Inside) and self._server.at_once:
            last = max(positions) + 1
            found = self._server.ask({"prompt": list(ids[:last]), "positions": list(positions)})
            return found[:, : self._vocabulary]
        rows = []
        for at in positions:
            asked = {
                "prompt": list(ids[: at + 1]),
                "n_predict": 1,
                "n_probs": self._vocabulary,
                "temperature": 0.0,
                "cache_prompt": True,
                "ignore_eos": True,
            }
            rows.append(self._server.ask(asked))
        return np.stack(rows)

    def close(self) -> None:
        self._server.close()
        self._folder.cleanup()


class _Inside:
    """xllamacpp in a child process: what happens in there cannot end this one.

    Attributes:
        at_once: it answers for many positions in one question.
    """

    def __init__(self, file: Path, context: int, threads: int, where: Path) -> None:
        self._where = where
        asked = json.dumps([str(file), context, threads, str(where)])
        # With the C functions of the library where they are as they are known; else with its server.
        for self.at_once in (True, False):
            self._start(["-I", decode_child.__file__] if self.at_once else ["-c", _CHILD], asked)
            if self._line() == "READY":
                return
            self.close()
        raise AdapterkitError(f"llama.cpp cannot load {file}", "see whether this version knows its architecture")

    def _start(self, program: list[str], asked: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *program, asked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, asked: dict[str, Any]) -> Floats:
        """One row, or one for each position."""
        import numpy as np

        assert self._process.stdin is not None
        line = ""
        with contextlib.suppress(OSError):  # it ended since the last answer
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._line()
        if line != "ROW":
            self.close()
            said = line[:200] or how_it_ended(self._process.returncode)
            raise AdapterkitError(f"llama.cpp gave no answer ({said})", f"use {option('level', 'layers')}")
        return np.asarray(np.load(self._where), dtype=np.float32)

    def _line(self) -> str:
        """The next line that is ours; llama.cpp may print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("READY", "ROW", "ERROR", "NO ")):
                return line.strip()
        return ""

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not read any more
                    stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Beside:
    """A ``llama-server`` on the loopback interface."""

    def __init__(self, file: Path, program: str, context: int, threads: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [program, "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-c", str(context), "-np", "1"]
        command += ["-t", str(threads), "-ctk", "f32", "-ctv", "f32", "--no-warmup"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise AdapterkitError(
                    f"{program} cannot load {file}", "see whether this version knows its architecture"
                )
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def ask(self, asked: dict[str, Any]) -> Floats:
        import numpy as np

        data = json.dumps(asked).encode()
        request = urllib.request.Request(f"{self._url}/completion", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as answer:
                found = json_value(answer.read(MOST_ANSWER))
            top = found["completion_probabilities"][0]["top_logprobs"]
            row = np.full(self._vocabulary, -np.inf, np.float32)
            for one in top:
                row[one["id"]] = one["logprob"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise AdapterkitError(
                f"llama-server gave no answer ({error})", f"use {option('level', 'layers')}"
            ) from None
        return row

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
