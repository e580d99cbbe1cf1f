"""Shards, written side by side by several processes. A shard's bytes follow from its rows alone."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_jax.datasets.builder import INFO, PROGRESS, shard_name, write_info
from ddpo_jax.datasets.formats import IMAGES, BadRow, Captioned, Preference, features, import_tfds, missing_extra
from ddpo_jax.datasets.images import prepare_image
from ddpo_jax.datasets.sources import Source
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.workdir import hold, write_atomically

SKIPPED = "skipped.jsonl"
BEGUN = "input.json"  # in the progress folder: what the shards are made of
OPTIONS = "group_size:1,uncompressed"  # one record is read at a time, and pictures are compressed already
MAX_DETAIL = 200  # characters
AGAIN = "what is done is kept: run the same command again"
PATIENCE = 30.0  # seconds between two reports


class Plan(NamedTuple):
    """What makes a data set what it is: the same plan gives the same bytes."""

    source: Source
    shard_size: int  # rows of the input
    max_pixels: int
    resolution: int | None


class Outcome(NamedTuple):
    """What became of the rows."""

    kept: int
    skipped: Counter  # by reason
    num_shards: int


def convert(plan: Plan, output: Path, *, num_workers: int, report: Callable) -> Outcome:
    """Writes the data set, but for the shards that are there already from a conversion that was cut off.

    report: called with (shards done, shards) now and then.

    Raises:
        UserError: the folder cannot be used, holds something else or is in use, or there is no row to keep.
        RunStopped: a worker failed.
    """
    import_tfds()
    num_shards = count_shards(plan)
    if not num_shards:
        raise UserError("--input: no row in it")
    output.mkdir(parents=True, exist_ok=True)
    with hold(output / ".lock", f"--output={output}"):
        _begin(plan, output)
        left = [shard for shard in range(num_shards) if not is_done(plan, output, shard)]
        if left:
            (output / INFO).unlink(missing_ok=True)
        if num_workers > 1 and len(left) > 1:
            _write_in_processes(plan, output, left, num_workers, report)
        else:
            try:
                write_shards(plan, output, left, None)
            except (OSError, RuntimeError) as error:  # array_record says RuntimeError where the disk is full
                raise RunStopped(f"{error}; {AGAIN}") from None
        return _finish(plan, output)


def count_shards(plan: Plan) -> int:
    """The number of shards: each holds what is kept of shard_size rows in a row."""
    return -(-sum(part.num_rows for part in plan.source.parts) // plan.shard_size)


def is_done(plan: Plan, output: Path, shard: int) -> bool:
    """Whether the shard is there, whole."""
    told = read_progress(output, shard)
    path = output / shard_name(plan.source.kind, shard, count_shards(plan))
    return told is not None and path.is_file() and path.stat().st_size == told["num_bytes"]


def read_progress(output: Path, shard: int) -> dict[str, Any] | None:
    """What was told of a shard when it was done: rows kept, bytes, and the rows skipped."""
    try:
        return json.loads(_progress(output, shard).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_shards(plan: Plan, output: Path, shards: list[int], parent: int | None) -> None:
    """Writes these shards, in order, each whole or not at all.

    parent: the process without which this one ends.
    """
    for shard, rows in itertools.groupby(_rows(plan, frozenset(shards), output / PROGRESS), key=lambda row: row[0]):
        write_shard(plan, output, shard, rows, parent)


def write_shard(plan: Plan, output: Path, shard: int, rows: Iterator, parent: int | None) -> None:
    """Writes one shard of rows (shard, path, row in the file, raw row), and then what is told of it."""
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise missing_extra(error) from None
    described = features(plan.source.kind)
    path = output / shard_name(plan.source.kind, shard, count_shards(plan))
    new = output / PROGRESS / f"{path.name}.{os.getpid()}.new"
    kept, skipped = 0, []
    writer = ArrayRecordWriter(str(new), OPTIONS)
    for _, file, row, raw in rows:
        if parent is not None and os.getppid() != parent:
            os._exit(1)  # an orphan: another conversion may have begun
        try:
            record = prepare_record(plan, file, raw)
        except BadRow as bad:
            skipped.append(
                {"file": Path(file).name, "row": row, "reason": bad.reason, "detail": bad.detail[:MAX_DETAIL]}
            )
            continue
        if record is not None:
            writer.write(serialized(described, record))
            kept += 1
    writer.close()
    with new.open("rb") as file:
        os.fsync(file.fileno())
    told = {"kept": kept, "num_bytes": new.stat().st_size, "skipped": skipped}
    new.replace(path)
    new.write_text(json.dumps(told) + "\n", encoding="utf-8")
    new.replace(_progress(output, shard))


def serialized(described: Any, record: Preference | Captioned) -> bytes:
    """The record as a tf.train.Example, the same bytes in every process."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(described.serialize_example(described.encode_example(record._asdict())))
    return example.SerializeToString(deterministic=True)  # its fields are a map, which has no order


def prepare_record(plan: Plan, path: Path, raw: Any) -> Any:
    """A raw row as a record, its pictures checked; None of a row that says nothing. Raises BadRow."""
    record = plan.source.read(path, raw, plan.max_pixels)
    if record is None:
        return None
    images = {
        name: prepare_image(getattr(record, name), max_pixels=plan.max_pixels, resolution=plan.resolution)
        for name in IMAGES[plan.source.kind]
    }
    return record._replace(**images)


def _rows(plan: Plan, shards: frozenset[int], scratch: Path) -> Iterator[tuple[int, Path, int, Any]]:
    first = 0
    for part in plan.source.parts:

        def is_wanted(row: int, count: int, first: int = first) -> bool:
            begin, end = (first + row) // plan.shard_size, (first + row + max(count, 1) - 1) // plan.shard_size
            return any(shard in shards for shard in range(begin, end + 1))

        if part.num_rows and is_wanted(0, part.num_rows):
            for row, raw in plan.source.rows(part.path, is_wanted, scratch):
                yield (first + row) // plan.shard_size, part.path, row, raw
        first += part.num_rows


def _begin(plan: Plan, output: Path) -> None:
    path = output / PROGRESS / BEGUN
    source = plan.source
    told = {
        "kind": source.kind,
        "read": source.read.__name__,
        "shard_size": plan.shard_size,
        "max_pixels": plan.max_pixels,
        "resolution": plan.resolution,
        "input": [{"file": part.path.name, "rows": part.num_rows, "content": part.identity} for part in source.parts],
    }
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in told if before.get(name) != told[name]]
        if differ:
            raise UserError(
                f"--output={output}: begun with other {', '.join(differ)}; give the same as then, or another --output"
            )
    elif any(entry.name not in (".lock", PROGRESS) for entry in output.iterdir()):
        raise UserError(f"--output={output}: holds something else; give a new folder")
    path.parent.mkdir(exist_ok=True)
    _remove_unfinished(output)
    write_atomically(path, json.dumps(told, indent=2) + "\n")


def _write_in_processes(plan: Plan, output: Path, shards: list[int], num_workers: int, report: Callable) -> None:
    spawn = get_context("spawn")  # a fork would copy the threads' locks of whatever the caller has loaded
    workers = [
        spawn.Process(target=_work, args=(plan, output, shards[i::num_workers], os.getpid()), daemon=True)
        for i in range(min(num_workers, len(shards)))
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.join(PATIENCE / len(workers))
        if any(worker.is_alive() for worker in workers):
            report(count_shards(plan) - sum(not is_done(plan, output, shard) for shard in shards), count_shards(plan))
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise RunStopped(f"{len(failed)} of {len(workers)} workers failed (exit status {failed[0]}); {AGAIN}")


def _work(plan: Plan, output: Path, shards: list[int], parent: int) -> None:
    try:
        write_shards(plan, output, shards, parent)
    except (OSError, RuntimeError, UserError) as error:
        sys.exit(f"worker: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _finish(plan: Plan, output: Path) -> Outcome:
    reasons, lengths, num_bytes, num_shards = Counter(), [], 0, count_shards(plan)
    new = output / PROGRESS / f"{SKIPPED}.new"
    with new.open("w", encoding="utf-8") as file:
        for shard in range(num_shards):
            told = read_progress(output, shard)
            if told is None:
                raise RunStopped(f"--input: shard {shard} has no rows any more; was the input changed meanwhile?")
            reasons.update(row["reason"] for row in told["skipped"])
            lengths.append(told["kept"])
            num_bytes += told["num_bytes"]
            file.writelines(json.dumps(row) + "\n" for row in told["skipped"])
    new.replace(output / SKIPPED)
    _remove_unfinished(output)
    if not sum(lengths):
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "blank lines alone"
        raise UserError(f"--input: no row to keep: {found} (see {output / SKIPPED})")
    write_info(output, plan.source.kind, shard_lengths=lengths, num_bytes=num_bytes)
    return Outcome(sum(lengths), reasons, num_shards)


def _remove_unfinished(output: Path) -> None:
    for path in (output / PROGRESS).glob("*.new"):
        path.unlink(missing_ok=True)  # a worker whose conversion was killed may finish it just now


def _progress(output: Path, shard: int) -> Path:
    return output / PROGRESS / f"{shard:05d}.json"
