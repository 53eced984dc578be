from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from adapterkit.ops.threads import one_thread


def test_the_number_comes_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_number_comes_back_after_an_error() -> None:
    before = torch.get_num_threads()

    @one_thread()
    def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == before


def test_several_threads_at_once() -> None:
    before = torch.get_num_threads()
    together = Barrier(4)

    def work(_: int) -> None:
        together.wait()
        for _ in range(200):
            with one_thread():
                assert torch.get_num_threads() == 1

    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        with one_thread():
            pass
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_choice_of_one_is_kept() -> None:
    before = torch.get_num_threads()
    try:
        for chosen in (2, 1, 2):
            torch.set_num_threads(chosen)
            with one_thread():
                pass
            assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


def mkl_threads() -> int:
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    if found is None:
        pytest.skip("this torch has no MKL")
    return int(found[1])


def test_leaving_does_not_speed_up_those_still_inside() -> None:
    before = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(2)
        with one_thread():
            pass

    try:
        with one_thread():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(work).result()
            assert mkl_threads() == 1
    finally:
        torch.set_num_threads(before)
