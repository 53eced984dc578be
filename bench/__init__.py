"""What is measured, shown and studied beside the tests: ``python -m bench KIND NAME [ARGUMENTS]``.

* ``speed``: seconds and memory beside a peer (``cp``, PEFT, mergekit, llama.cpp) in the same run, and their ratio;
* ``proofs``: conformance over everything that the installed libraries have; each says whether it holds by its exit code;
* ``studies``: what a choice does to a model that was trained for it.

Figures in README and docs come from ``results/`` (see `bench.common.results`). The models are those of the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1] / "tests"
# Behind everything else: a folder there is called as the package gguf is.
sys.path += [str(place) for place in (_TESTS, _TESTS / "gguf", _TESTS / "methods") if str(place) not in sys.path]
