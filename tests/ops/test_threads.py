from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adapterkit.ops.threads import one_thread


def test_the_number_comes_back() -> None:
    before = torch.get_num_threads()
    try:
        for chosen in (2, 1):
            torch.set_num_threads(chosen)
            with one_thread():
                assert torch.get_num_threads() == 1
                with one_thread():
                    assert torch.get_num_threads() == 1
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


def test_the_number_comes_back_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    @one_thread()
    def fails() -> None:
        raise KeyError

    try:
        with pytest.raises(KeyError):
            fails()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_leaves_does_not_change_one_inside() -> None:
    before = torch.get_num_threads()

    def work() -> int:
        torch.set_num_threads(2)
        with one_thread():
            pass
        return torch.get_num_threads()

    try:
        with one_thread(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(work).result() == 2
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
