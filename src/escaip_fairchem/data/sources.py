"""Read any data set for the tools that look at it: parts shared out among processes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data.frames import Frame
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from escaip_fairchem.data.formats.base import Part, Record
    from escaip_fairchem.data.plan import Reading


def frames_of(reading: Reading, part: Part, sample: int = 0) -> Iterator[Frame]:
    """Structures of a part, with their labels.

    Args:
        reading: How they are taken.
        part: What is read.
        sample: About so many, evenly spaced; 0 for all.

    Raises:
        UserError: Naming file and frame of a structure that cannot be read.
    """
    path = part.paths[0]
    for record in evenly(reading.reader().read(part), sample):
        try:
            yield Frame(record.build(), path, record.index)
        except Exception as error:  # readers raise of every type
            raise UserError(f"{path}, frame {record.index}: {error}") from error


def place_of(frame: Frame) -> str:
    """File and frame, for messages."""
    return f"{frame.path}, frame {frame.index}"


def evenly(records: Iterator[Record], n: int) -> Iterator[Record]:
    """About ``n`` records, evenly spaced; all of them for 0. None is decoded that is left out."""
    if not n:
        yield from records
        return
    kept: list[Record] = []
    stride = 1
    for index, record in enumerate(records):  # how many there are is known at the end
        if index % stride == 0:
            kept.append(record)
        if len(kept) >= 2 * n:
            kept, stride = kept[::2], 2 * stride
    yield from kept


def over_parts(
    task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[Any]:
    """Results of a task for the arguments of each part, in order, with a progress bar.

    Args:
        task: A function that can be pickled.
        arguments: One tuple for each part.
        workers: Processes; 1 works in this one.
    """
    from tqdm import tqdm

    columns = list(zip(*arguments, strict=True))
    with _mapper(min(workers, len(arguments))) as mapped:
        results = mapped(task, *columns)
        yield from tqdm(results, total=len(arguments), unit=" parts", disable=None)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    if workers <= 1:
        yield map
        return
    # spawned, because a fork would copy the threads of numpy and torch in an unknown state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield pool.map
