"""Worker threads: what `settle` does to torch and to malloc."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from adapterkit.ops.threads import SMALL, OneAtATime, settle

STEPS = """
import resource, sys, threading
import torch
from adapterkit.ops.threads import SMALL, OneAtATime, settle

def steps():
    if sys.argv[1] == "settled":
        settle()
    for number in range(60):
        if number == 10:
            begin.append(faults())
        pieces = [torch.zeros(1 << 18) for _ in range(12)]
        del pieces

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

begin = []
thread = threading.Thread(target=steps)
thread.start()
thread.join()
print(faults() - begin[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the behaviour of glibc's malloc")
def test_freed_memory_is_not_asked_for_again() -> None:
    """50 steps of 12 MiB in pages of 4 KiB are 153,600 faults where each step gets its memory anew."""
    found = {}
    for how in ("settled", "not"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found["settled"] < 15_000 < 50_000 < found["not"]


def test_torch_uses_no_other_thread() -> None:
    seen = []

    def work() -> None:
        settle()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]


def test_small_tensors_take_turns_and_large_ones_do_not_wait() -> None:
    """Two threads meet in large steps; in small ones the second comes in when the first is out."""
    turns, inside, met = OneAtATime(), threading.Semaphore(0), []

    def small() -> None:
        with turns.of(SMALL - 1):
            inside.release()
            met.append(inside.acquire(timeout=0.05) and inside.acquire(timeout=0.05))

    def large(barrier: threading.Barrier) -> None:
        with turns.of(SMALL):
            barrier.wait(timeout=900)

    for work in (small, partial(large, threading.Barrier(2))):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=900)
        assert not any(thread.is_alive() for thread in threads)
    assert met == [False, False]
