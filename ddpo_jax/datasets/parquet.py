"""Parquet files of rows with pictures, read so that memory stays flat however their writer cut them.

A reader holds a whole page of each column it reads, and writers make pages of 1024 rows: half a gigabyte where pictures
are large. Row groups of such pages are first copied out to a file, one column at a time and by one process at a time.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ddpo_jax.datasets.formats import missing_extra

BATCH = 16  # rows in memory at once
BUFFER = 2**20  # bytes of a column read at once; without it a whole row group would be
PAGE_ROWS = 1024  # that Arrow writes before it looks how large a page has become
LARGE_PAGE = 2**25  # bytes
LOCK = "copying.lock"

Rows = Iterator[tuple[int, dict[str, Any] | None]]


def open_parquet(path: Path) -> Any:
    """The opened file. Raises UserError where pyarrow is missing, and Arrow's errors, which are ValueErrors."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra(error) from None
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)


def wanted_rows(path: Path, is_wanted: Callable, scratch: Path, *, columns: list[str], pictures: list[str]) -> Rows:
    """The wanted rows of the file, text as bytes; None for one that cannot be read.

    is_wanted: (first, count) -> whether any of these rows is.
    scratch: a folder for what is copied out.
    columns, pictures: the columns to read, and those of them that are large.
    """
    with open_parquet(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if is_wanted(first, count):
                if has_large_pages(file, group, pictures):
                    yield from _copied(file, group, first, is_wanted, scratch, columns=columns, pictures=pictures)
                else:
                    yield from _streamed(file, group, first, is_wanted, columns)
            first += count


def has_large_pages(file: Any, group: int, pictures: list[str]) -> bool:
    """Whether a page of a column of pictures is expected to be larger than is good to have in every process."""
    told = file.metadata.row_group(group)
    columns = [told.column(i) for i in range(told.num_columns)]
    sizes = [column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in pictures]
    return max(sizes, default=0) * min(1, PAGE_ROWS / max(told.num_rows, 1)) > LARGE_PAGE


def _streamed(file: Any, group: int, first: int, is_wanted: Callable, columns: list[str]) -> Rows:
    import pyarrow as pa

    row, last = first, first + file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
            if is_wanted(row, batch.num_rows):
                for values in _as_bytes(batch).to_pylist():
                    if is_wanted(row, 1):
                        yield row, values
                    row += 1
            else:
                row += batch.num_rows
    except (pa.ArrowException, OSError):
        yield from ((i, None) for i in range(row, last) if is_wanted(i, 1))


def _copied(
    file: Any, group: int, first: int, is_wanted: Callable, scratch: Path, *, columns: list[str], pictures: list[str]
) -> Rows:
    import pyarrow as pa

    with TemporaryFile(dir=scratch) as copy:
        with _alone(scratch):
            rows = dict(_streamed(file, group, first, is_wanted, [name for name in columns if name not in pictures]))
            for name in pictures:
                for row, values in _streamed(file, group, first, is_wanted, [name]):
                    if values is None or rows[row] is None:
                        rows[row] = None
                    else:
                        rows[row][name] = _put(copy, values[name])
            pa.default_memory_pool().release_unused()
        for row, values in rows.items():
            yield row, values and values | {name: _take(copy, values[name]) for name in pictures}


def _put(copy: Any, content: Any) -> tuple[int, int] | None:
    return (copy.seek(0, 2), copy.write(content)) if isinstance(content, bytes) else None


def _take(copy: Any, place: tuple[int, int] | None) -> bytes | None:
    if place is None:
        return None
    copy.seek(place[0])
    return copy.read(place[1])


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    with (scratch / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _as_bytes(batch: Any) -> Any:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([_plain(column) for column in batch.columns], names=batch.schema.names)


def _plain(column: Any) -> Any:
    """The column with text as bytes, as what is not UTF-8 would stop the whole of it, and `bytes` of a struct."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_struct(column.type):  # a picture's bytes and path, as `datasets` writes it
        column = compute.struct_field(column, "bytes")
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    return column.cast(as_bytes[column.type]) if column.type in as_bytes else column
