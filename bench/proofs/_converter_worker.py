"""Conversions by llama.cpp's own converter, many in one process: ``PYTHON _converter_worker.py CONVERTER JOBS.json``.

Run by `bench/proofs/converter.py` with a Python that has what that converter wants; nothing of adapterkit is imported. A job is
``{"folder", "out", "type", "pre", "flags"}``; one line of JSON is printed for each: ``{"out", "error"}``.

The converter knows a byte-level pre-tokenizer by a hash of the ids of one text, so none that was trained here. Where it says
so it is told the name (``pre``), and goes on by itself. With no name it writes no tokenizer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert each."""
    place, jobs = Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text())
    sys.path.insert(0, str(place.parent))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the converter's own messages, whatever prints them
    import conversion.base as base
    import convert_hf_to_gguf as converter

    known = base.TextModel.get_vocab_base_pre
    told: list[str] = []

    def recognised(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not told[0]:
                raise
            return told[0]

    base.TextModel.get_vocab_base_pre = recognised
    known_class = converter.get_model_class

    def bare(*args: Any, **more: Any) -> Any:
        found = known_class(*args, **more)
        return type(
            found.__name__, (found,), {"model_arch": found.model_arch, "set_vocab": base.TextModel._set_vocab_none}
        )

    for job in jobs:
        told[:] = [job["pre"] or ""]
        converter.get_model_class = known_class if job["pre"] else bare
        sys.argv = [str(place), job["folder"], "--outfile", job["out"], "--outtype", job["type"], *job["flags"]]
        said = ""
        try:
            converter.main()
        except (Exception, SystemExit) as error:  # one that fails must not lose the others
            logging.exception(job["out"])
            said = f"{type(error).__name__}: {error}"
        print(json.dumps({"out": job["out"], "error": said}), file=answers, flush=True)


if __name__ == "__main__":
    main()
