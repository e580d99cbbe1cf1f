"""Converts synthetic pairs and reads them back: peak memory of the conversion, and pairs a second of the reading.

python benchmarks/read_pairs.py --pairs=100000 --resolution=256 --num_workers=2 --folder=runs/read_pairs

Makes parquet files of Pick-a-Pic's form whose pictures are JPEGs of quality 90 with smooth shapes and noise, as large
as photographs are. Memory is that of the converter and its workers together, sampled every 50 ms: `peak_rss_mb` counts
pages they share more than once, `peak_pss_mb` once. Reading is `preferences.make_batch` on shuffled rounds, decoding
and scaling to [0, 1] included. Prints one line of JSON. The folder needs about 100 KB a pair, and is removed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

NUM_PICTURES = 400  # distinct ones; each row draws two of them
ROWS_PER_FILE, ROWS_PER_GROUP = 5000, 500
BATCH = 128


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help=f"of {BATCH} pairs, to be read")
    parser.add_argument("--folder", type=Path, required=True, help="a new one, for what is written")
    flags = parser.parse_args(argv)
    flags.folder.mkdir(parents=True)
    try:
        num_bytes = write_parquet(flags.folder / "input", flags.pairs, flags.resolution)
        told = {"pairs": flags.pairs, "resolution": flags.resolution, "bytes_per_picture": round(num_bytes)}
        told |= convert(flags.folder, flags.num_workers)
        shutil.rmtree(flags.folder / "input")
        told |= read(flags.folder / "output", flags.resolution, flags.rounds)
        print(json.dumps(told | {"processors": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}))
    finally:
        shutil.rmtree(flags.folder)


def pictures(resolution: int) -> Iterator[bytes]:
    """JPEGs that compress about as photographs do."""
    y, x = np.mgrid[0:resolution, 0:resolution] / resolution
    for i in range(NUM_PICTURES):
        random = np.random.default_rng(i)
        image = np.full((resolution, resolution, 3), random.uniform(80, 170, 3))
        for _ in range(12):
            wave = np.sin(x * random.normal(0, 12) + y * random.normal(0, 12) + random.uniform(0, 6))
            image += wave[:, :, None] * random.normal(0, 20, 3)
        for _ in range(6):
            inside = np.hypot(x - random.random(), y - random.random()) < random.uniform(0.05, 0.3)
            image[inside] = image[inside] * 0.3 + random.uniform(0, 255, 3) * 0.7
        grain = random.normal(0, 7, image.shape[:2])[:, :, None]
        buffer = io.BytesIO()
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def write_parquet(folder: Path, num_pairs: int, resolution: int) -> float:
    """Writes the input; the mean number of bytes of a picture."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder.mkdir()
    stock = list(pictures(resolution))
    random = np.random.default_rng(0)
    for first in range(0, num_pairs, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, num_pairs - first)
        labels = random.integers(0, 2, count).astype(float)
        # A comment after the end of a JPEG makes each picture's bytes its own.
        columns = {
            "caption": [f"picture number {first + i}" for i in range(count)],
            "jpg_0": [stock[k] + f"{first + i}a".encode() for i, k in enumerate(random.integers(0, len(stock), count))],
            "jpg_1": [stock[k] + f"{first + i}b".encode() for i, k in enumerate(random.integers(0, len(stock), count))],
            "label_0": labels,
            "label_1": 1 - labels,
            "has_label": np.ones(count, bool),
        }
        path = folder / f"train-{first // ROWS_PER_FILE:05d}.parquet"
        parquet.write_table(pa.table(columns), path, row_group_size=ROWS_PER_GROUP)
    return sum(map(len, stock)) / len(stock)


def convert(folder: Path, num_workers: int) -> dict[str, float]:
    """Runs ddpo_jax.prepare; its time and memory."""
    command = [sys.executable, "-m", "ddpo_jax.prepare", "--from=pick_a_pic", f"--num_workers={num_workers}"]
    begin, peak_rss, peak_pss = time.monotonic(), 0, 0
    with subprocess.Popen([*command, f"--input={folder / 'input'}", f"--output={folder / 'output'}"], stdout=2) as main:
        while main.poll() is None:
            sizes = [memory(pid) for pid in family(main.pid)]
            peak_rss = max(peak_rss, sum(rss for rss, _ in sizes))
            peak_pss = max(peak_pss, sum(pss for _, pss in sizes))
            time.sleep(0.05)
    if main.returncode:
        raise SystemExit(f"the conversion ended with status {main.returncode}")
    seconds = time.monotonic() - begin
    return {"convert_s": round(seconds, 1), "peak_rss_mb": peak_rss // 2**10, "peak_pss_mb": peak_pss // 2**10}


def family(pid: int) -> list[int]:
    """The process and those that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def memory(pid: int) -> tuple[int, int]:
    """Resident KB of a process: all, and with shared pages by halves."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return fields.get("Rss:", 0), fields.get("Pss:", 0)


def read(output: Path, resolution: int, rounds: int) -> dict[str, float]:
    """Pairs a second of rounds of a shuffled pass."""
    from ddpo_jax import preferences

    source = preferences.open_source(str(output), resolution=resolution)
    settings = {"batch_size": BATCH, "seed": 0, "resolution": resolution, "horizontal_flip": True}
    preferences.make_batch(source, epoch=0, **settings)
    begin, cpu = time.monotonic(), time.process_time()
    for epoch in range(1, rounds + 1):
        preferences.make_batch(source, epoch=epoch, **settings)
    seconds, cpu, pairs = time.monotonic() - begin, time.process_time() - cpu, rounds * BATCH
    return {"pairs_per_s": round(pairs / seconds), "read_cpu_ms_per_pair": round(1000 * cpu / pairs, 2)}


if __name__ == "__main__":
    main()
