"""The pictures of the documentation site in docs/images, taken in Chromium (needs the extras ``docs`` and ``test``).

python tools/site_screenshots.py [DIR]
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name: (page, dark, width, height)
SHOTS = {
    "site-home": ("", False, 1280, 860),
    "site-worse": ("worse/", False, 1280, 860),
    "site-recipes-dark": ("recipes/", True, 1280, 860),
    "site-phone": ("tutorials/qlora-to-ollama/", False, 390, 800),
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import FLAGS, chromium
    from playwright.sync_api import sync_playwright

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opened = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        for name, (page, dark, width, height) in SHOTS.items():
            context = opened.new_context(
                color_scheme="dark" if dark else "light", viewport={"width": width, "height": height}
            )
            shown = context.new_page()
            shown.goto(f"http://127.0.0.1:{server.server_port}/{page}")
            shown.screenshot(path=out / f"{name}.png")
            context.close()
        opened.close()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
