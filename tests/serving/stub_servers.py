"""Servers on loopback that answer as vLLM, SGLang, LoRAX and TGI do, by their own sources of autumn 2026. No model runs in
them: an answer is made from the bytes of the adapter's weights, so another adapter gives another answer.

What each follows:

* vLLM: ``vllm/entrypoints/serve/lora/api_router.py`` and ``protocol.py`` (paths and bodies),
  ``vllm/entrypoints/openai/models/serving.py`` (``OpenAIServingModels``: a name is loaded once and refused the second time with
  400, an unknown one is 404, the list has ``root`` and ``parent``), ``vllm/lora/peft_helper.py`` (ranks, DoRA), and
  ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``, without which the paths do not exist.
* SGLang: ``python/sglang/srt/entrypoints/http_server.py`` (``/load_lora_adapter`` answers 200, or 400, with ``success``,
  ``error_message`` and ``loaded_adapters``; ``/v1/models`` lists ``lora_registry.get_all_adapters()``),
  ``srt/lora/lora_registry.py`` (a name that is there is refused), ``srt/managers/io_struct.py`` (``LoRAUpdateOutput``).
* LoRAX: ``router/src/server.rs`` (``/generate``, ``/info``), ``server/lorax_server/utils/sources/local.py``.
* TGI: ``router/src/server.rs``; adapters are those of ``--lora-adapters``, each ID[=PATH][@REVISION]
  (``server/text_generation_server/utils/adapter.py``, ``parse_lora_adapters``); a request that names another is answered by
  the base (``models/flash_causal_lm.py``: ``ADAPTER_TO_INDEX.get(r.adapter_id, 0)``).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Stub:
    """One server. ``faults`` switches on what goes wrong with it."""

    def __init__(self, kind: str, base: str, max_rank: int = 16, token: str = "") -> None:
        self.kind, self.base, self.max_rank, self.token = kind, base, max_rank, token
        self.loaded: dict[str, str] = {}
        self.weights: dict[str, str] = {}  # what is really computed with, by name
        self.faults: set[str] = set()
        self.calls: list[tuple[str, str, Any]] = []
        self.url = ""

    # ---- what a request does

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((method, path, body))
        if "broken" in self.faults:
            return 503, {"error": "overloaded"}
        if path == "/v1/models" and self.kind in ("vllm", "sglang"):
            return 200, {"object": "list", "data": self._cards()}
        if path == "/info" and self.kind in ("lorax", "tgi"):
            return 200, {"model_id": self.base, "max_concurrent_requests": 128}
        if path in self._paths("load"):
            return self._load(body)
        if path in self._paths("unload"):
            return self._unload(body)
        if path == "/v1/completions" and self.kind in ("vllm", "sglang"):
            return self._completion(body)
        if path == "/generate" and self.kind in ("lorax", "tgi"):
            return self._generate(body)
        return 404, {"detail": "Not Found"}

    def start_tgi(self, words: list[str]) -> None:
        """Start it anew by a command."""
        self.loaded.clear()
        for one in words[words.index("--lora-adapters") + 1].split(","):
            assert one.count("=") < 2 > one.count("@"), f"Invalid LoRA adapter format: {one}"
            named, _, revision = one.partition("@")
            name, _, path = named.partition("=")
            assert path, f"{name} at {revision} would come from the Hub"
            self.loaded[name] = path

    def _paths(self, what: str) -> tuple[str, ...]:
        if "fixed" in self.faults:
            return ()
        return {"vllm": (f"/v1/{what}_lora_adapter",), "sglang": (f"/{what}_lora_adapter",)}.get(self.kind, ())

    def _cards(self) -> list[dict[str, Any]]:
        cards = [{"id": self.base, "object": "model", "root": self.base, "parent": None}]
        return cards + [
            {"id": name, "object": "model", "root": path, "parent": self.base}
            for name, path in self.loaded.items()
            if "hides" not in self.faults
        ]

    def _load(self, body: Any) -> tuple[int, Any]:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.loaded:
            return self._no(400, f"The lora adapter '{name}' has already been loaded.")
        if "silent" in self.faults:  # says yes and does nothing
            return self._yes(name)
        if "slow" in self.faults:
            time.sleep(1.5)
        try:
            config = json.loads((Path(path) / "adapter_config.json").read_text())
        except OSError:
            return self._no(404, f"No adapter found for {path}")
        if config["r"] > self.max_rank:
            # vLLM 0.33 answers what went wrong in the engine with 500.
            status = 500 if self.kind == "vllm" else 400
            return self._no(status, f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}.")
        self.loaded[name] = path
        old = next(reversed(self.weights.values()), "")
        self.weights[name] = old if "stale" in self.faults and old else digest(path)
        if "base" in self.faults:
            self.weights[name] = ""
        if "dies" in self.faults:
            self.faults.add("broken")
        return self._yes(name)

    def _unload(self, body: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if name not in self.loaded:
            return self._no(404 if self.kind == "vllm" else 400, f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        return self._yes(name)

    def _yes(self, name: str) -> tuple[int, Any]:
        if self.kind == "vllm":
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        return 200, {"success": True, "error_message": None, "loaded_adapters": dict(self.loaded)}

    def _no(self, status: int, text: str) -> tuple[int, Any]:
        if self.kind == "vllm":
            return status, {"error": {"message": text, "type": "InvalidUserInput", "code": status}}
        status = 200 if "old" in self.faults else 400  # older releases of SGLang refuse with 200
        return status, {"success": False, "error_message": text, "loaded_adapters": dict(self.loaded)}

    def _completion(self, body: Any) -> tuple[int, Any]:
        model = body["model"]
        name = body.get("lora_path") or (model if model != self.base else "")
        if name and name not in self.loaded:
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "type": "NotFoundError"}}
        text, figures = said(self.weights.get(name, ""), body["prompt"])
        if "mute" in self.faults:
            return 200, {"model": model, "choices": []}
        choice = {"index": 0, "text": text, "logprobs": {"token_logprobs": figures, "tokens": ["x"] * len(figures)}}
        return 200, {"object": "text_completion", "model": model, "choices": [choice]}

    def _generate(self, body: Any) -> tuple[int, Any]:
        name = body["parameters"].get("adapter_id", "")
        path = self.loaded.get(name, "") if self.kind == "tgi" else name
        if path and not Path(path).is_dir():
            return 422, {"error": f"adapter {path} cannot be found", "error_type": "validation"}
        weights = digest(path) if path else ""
        if "stale" in self.faults and path and self.weights:
            weights = next(iter(self.weights.values()))
        elif path:
            self.weights[path] = weights
        text, figures = said(weights, body["inputs"])
        return 200, {"generated_text": text, "details": {"tokens": [{"text": "x", "logprob": one} for one in figures]}}


def digest(path: str) -> str:
    return hashlib.sha256((Path(path) / "adapter_model.safetensors").read_bytes()).hexdigest()


def said(weights: str, prompt: Any) -> tuple[str, list[float]]:
    """An answer that is another one for other weights or prompts."""
    seed = hashlib.sha256(f"{weights}:{prompt}".encode()).digest()
    return f"answer {seed.hex()[:8]}", [-1.0 - one / 256 for one in seed[:8]]


@contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    """The server on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _do(self, body: Any) -> None:
            if stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
                status, value = 401, {"error": "Unauthorized"}
            else:
                path = re.sub("^http://[^/]+", "", self.path)  # as a proxy is asked
                status, value = stub.answer(self.command, path, body)
            data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has gone

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
