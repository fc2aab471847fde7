"""Work on several files at once. Hashing and writing leave Python's lock, so threads are enough.

The threads are daemons, unlike those of `concurrent.futures`: a process that exits may give up on a disk that hangs, and a save that began
before the exit may still start some.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], num_threads: int) -> list[Result]:
    """`work` of every item, in order. After a failure no further item is begun; of several failures the first item's is raised."""
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}
    waiting = iter(range(len(items)))
    lock = threading.Lock()

    def serve() -> None:
        while True:
            with lock:
                index = None if failures else next(waiting, None)
            if index is None:
                return
            try:
                results[index] = work(items[index])
            except BaseException as failure:  # raised below, in the caller's thread
                failures[index] = failure

    threads = [threading.Thread(target=serve, name="checkpoint-file", daemon=True) for _ in range(min(num_threads, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[min(failures)]
    return [results[index] for index in range(len(items))]
