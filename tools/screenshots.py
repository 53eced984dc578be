"""The pictures in docs/images: a registry with believable contents, looked at in Chromium (needs the extra ``test``).

python tools/screenshots.py [DIR]
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.registry import served, store, verbs
from adapterkit.registry.evaluation import Score
from adapterkit.registry.evidence import attach_evaluation, attach_evidence, attach_verification
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import FileEntry, Operation, Parent, Record
from adapterkit.registry.verification import Verification
from adapterkit.ui.server import PageServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def base(repo: str) -> Identity:
    named = {key: digest(f"{repo} {key}") for key in ("shapes", "skeleton", "sampled")}
    return Identity(repo, hashlib.sha1(repo.encode()).hexdigest(), (), **named)


class Filled:
    """A home and the calls that fill it; files are named and not stored."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.create()
        self.day = 0

    def add(self, name: str, draft: Record) -> Record:
        self.day += 1
        created = f"2026-{1 + self.day // 28:02d}-{1 + self.day % 28:02d}T09:{self.day % 60:02d}:00Z"
        with self.home.store_lock(shared=True):
            return store.add_record(self.home, replace(draft, created=created), name).record

    def adapter(self, name: str, on: Identity, run: str, method: str = "lora", rank: int = 16) -> Record:
        weights = FileEntry("adapter_model.safetensors", 41_943_040 * rank // 16, digest(name + run), stored=False)
        config = FileEntry("adapter_config.json", 812, digest(f"config {name} {run}"), stored=False)
        settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        meta = {"dataset": name.split("-")[0], "run": run}
        return self.add(
            name, Record("adapter", (weights, config), method=method, parameters=settings, base=on, meta=meta)
        )

    def made(
        self,
        name: str,
        kind: str,
        operation: str,
        parents: list[tuple[Record, float]],
        on: Identity,
        **settings: object,
    ) -> Record:
        file = "model.gguf" if kind == "quantized" else "model.safetensors"
        size = 5_027_783_872 if kind == "quantized" else 16_381_470_720
        role = "source" if kind == "quantized" else "adapter"
        made_of = [] if kind == "quantized" else [Parent("base", identity=on, label=on.label)]
        for parent, weight in parents:
            said = {} if kind == "quantized" else {"weight": weight}
            made_of.append(Parent(role, parent.content, record=parent.digest, label=parent.ref, parameters=said))
        files = (FileEntry(file, size, digest(name + str(self.day)), stored=False),)
        method = str(settings.pop("method", ""))
        return self.add(
            name,
            Record(
                kind, files, method=method, base=on, operation=Operation(operation, settings), parents=tuple(made_of)
            ),
        )


def fill(root: Path) -> Home:
    """A registry of a small team."""
    filled = Filled(root)
    qwen, llama, gemma = base("Qwen/Qwen3-8B"), base("meta-llama/Llama-3.1-8B-Instruct"), base("google/gemma-3-4b-it")
    with filled.home.store_lock(shared=True):
        store.add_record(filled.home, Record("base", identity=qwen), "qwen3-8b")
    filled.adapter("support-tone", qwen, "run-114")
    support = filled.adapter("support-tone", qwen, "run-131")
    refunds = filled.adapter("refunds-policy", qwen, "run-118", "dora", 32)
    filled.adapter("sql-dialects", qwen, "run-090", rank=64)
    filled.adapter("legal-summaries", llama, "run-021", "dora")
    german = filled.adapter("german-letters", llama, "run-033")
    filled.adapter("recipe-writer", gemma, "run-007", "vera")
    desk = filled.made(
        "support-desk", "merged", "merge", [(support, 0.7), (refunds, 0.5)], qwen, method="ties", dtype="bf16"
    )
    attach_evidence(
        desk.ref,
        "fidelity",
        {"retention": 0.9964, "cosine": 0.9991, "format": "bf16", "worst": "model.layers.31.mlp.down_proj.weight"},
        home=root,
    )
    held = [
        Verification(
            "tensors",
            True,
            {"equal": 399, "touched": 252, "retention": 0.9964},
            {"min_retention": 0.95},
            "2026-02-14T10:12:00Z",
        ),
        Verification(
            "model",
            True,
            {"kl": 0.00081, "top1": 0.9975, "prompts": 64},
            {"max_kl": 0.005, "min_top1": 0.99},
            "2026-02-14T10:21:00Z",
        ),
    ]
    desk = attach_verification("support-desk", held, home=root).record
    small = filled.made(
        "support-desk-q4", "quantized", "convert", [(desk, 1)], qwen, method="Q4_K_M", imatrix="tickets"
    )
    loose = Verification("model", False, {"kl": 0.0312, "top1": 0.941}, {"max_kl": 0.02}, "2026-02-15T08:00:00Z")
    attach_verification(small.ref, [loose], home=root)
    filled.made("support-desk-q5", "quantized", "convert", [(desk, 1)], qwen, method="Q5_K_M", imatrix="tickets")
    tight = Verification("model", True, {"kl": 0.0094, "top1": 0.978}, {"max_kl": 0.02}, "2026-02-15T08:40:00Z")
    attach_verification("support-desk-q5", [tight], home=root)
    filled.made(
        "support-and-refunds", "combined", "combine", [(support, 0.5), (refunds, 0.5)], qwen, method="svd", rank=32
    )
    filled.made("german-llama", "merged", "merge", [(german, 1)], llama, dtype="bf16")
    for name, value, under in (("support-tone@2", 0.742, 0.691), ("legal-summaries", 0.688, 0.652)):
        task = name.partition("-")[0]
        scores = [
            Score(
                task,
                "acc",
                figure,
                0.0195,
                500,
                subject=of,
                when="2026-02-12T16:00:00Z",
                tool="lm-eval",
                tool_version="0.4.13",
            )
            for of, figure in (("self", value), ("base", under), ("shuffled", under - 0.004))
        ]
        attach_evaluation(name, [*scores, Score(task, "acc", value - 0.031, 0.04, 120, "lang=de", when="2026-02-12T16:00:00Z")],
                          home=root)  # fmt: skip
    for ref, alias, by, why in (
        ("support-tone@1", "prod", "mira", "first release"),
        ("support-tone", "prod", "mira", "trained on the tickets of January"),
        ("support-desk", "prod", "jo", "tone and refunds in one"),
        ("support-desk-q5", "prod", "jo", "fits the small machines"),
        ("support-desk-q4", "canary", "jo", ""),
        ("legal-summaries", "prod", "mira", ""),
    ):
        verbs.tag(ref, alias, by=by, why=why, home=root)
    for server, ref, share, by in (
        ("http://gpu1:8000", "support-tone@prod", 1.0, "mira"),
        ("http://edge-7:8080", "support-desk-q5@prod", 1.0, "jo"),
        ("http://gpu2:8000", "support-desk@prod", 1.0, "jo"),
    ):
        record = verbs.show(ref, home=root).record
        name, _, alias = ref.partition("@")
        called = f"{name}@{record.content[:12]}"
        served.record_serving(server, record, served_as=called, alias=alias, share=share, by=by, home=root)
    return filled.home


def shoot(page: Page, url: str, path: Path, width: int, height: int, full: bool = False) -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.goto(url)
    page.screenshot(path=path, full_page=full)
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import FLAGS, chromium
    from playwright.sync_api import sync_playwright

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.environ["HOME"] = folder
        root = Path(folder) / ".local" / "share" / "adapterkit"
        fill(root)
        server = PageServer(0, root)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opened = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        light = opened.new_context(color_scheme="light", device_scale_factor=1).new_page()
        dark = opened.new_context(color_scheme="dark", device_scale_factor=1).new_page()
        shoot(light, server.url, out / "ui-overview.png", 1280, 860)
        shoot(light, f"{server.url}v/support-desk/3", out / "ui-version.png", 1280, 1000, full=True)
        shoot(dark, f"{server.url}v/support-desk/3", out / "ui-version-dark.png", 1280, 1000)
        shoot(light, f"{server.url}compare?a=support-tone@1&b=support-tone@3", out / "ui-compare.png", 1280, 900)
        shoot(dark, server.url, out / "ui-narrow-dark.png", 390, 800)
        opened.close()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
