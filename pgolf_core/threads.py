"""Work on several tensors at once, on a CPU: small products gain nothing from threads of their own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import current_thread, main_thread

import torch


def in_threads(function: Callable, items: Iterable) -> list:
    """function of each item, in order, on as many threads as PyTorch uses, each of which then computes alone.

    Outside the main thread one item follows the other: their number of threads is one for the whole process, and
    others may be computing.
    """
    items, threads = list(items), torch.get_num_threads()
    if min(len(items), threads) == 1 or current_thread() is not main_thread():
        return [function(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
