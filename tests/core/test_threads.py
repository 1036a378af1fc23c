"""Work on several items at once, and when not."""

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import pytest
import torch

from pgolf_core.threads import in_threads


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def here(item: int) -> tuple[int, int, int]:
    if item < 0:
        raise ValueError(item)
    return item, torch.get_num_threads(), get_ident()


def test_each_thread_computes_alone_and_the_number_of_threads_comes_back():
    results = in_threads(here, range(20))
    assert [item for item, _, _ in results] == [*range(20)] and {own for _, own, _ in results} == {1}
    assert torch.get_num_threads() == 2 and get_ident() not in {thread for _, _, thread in results}
    with pytest.raises(ValueError):
        in_threads(here, [1, -1])
    assert torch.get_num_threads() == 2


def test_one_item_and_another_thread_keep_all_threads():
    assert in_threads(here, [7]) == [(7, 2, get_ident())]
    with ThreadPoolExecutor(1) as pool:
        assert len({thread for _, _, thread in pool.submit(in_threads, here, range(5)).result()}) == 1
