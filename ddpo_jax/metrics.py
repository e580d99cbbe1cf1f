"""What a run says of itself: progress on the console, metrics.jsonl, picture grids, TensorBoard and wandb."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ddpo_jax.errors import UserError
from ddpo_jax.workdir import write_atomically

TILE = 128  # pixels; smaller pictures are enlarged by a whole factor
CAPTION = 14  # pixels under a picture
MARGIN = 4
PLAIN_EVERY = 30  # seconds


class Console(NamedTuple):
    """Progress of the phases of a round."""

    phase: Callable  # name, total -> context manager that gives advance(count)
    seconds: Callable  # () -> seconds by phase since the last call
    note: Callable  # one line


class Writer(NamedTuple):
    """Where a run's results go."""

    scalars: Callable  # epoch, values: the round's line in metrics.jsonl
    evaluation: Callable  # epoch, name, values, texts, rewards (n,): a line in evaluations.jsonl
    images: Callable  # epoch, name, images (n, H, W, 3) in [0, 1], captions: a grid in images/
    close: Callable


class Rate(ProgressColumn):
    """Things done a second."""

    def render(self, task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def make_console(watch: Callable[[], None], *, quiet: bool = False) -> Console:
    """Bars on a terminal; elsewhere plain lines, and one every PLAIN_EVERY seconds of a long phase.

    watch: is called at each advance.  quiet: shows nothing.
    """
    console = RichConsole(soft_wrap=True, highlight=False, quiet=quiet)
    spent: dict[str, float | int] = {}

    @contextmanager
    def phase(name: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn(f"{name:>8}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        begin = said = time.monotonic()
        done = 0
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(name, total=total)

            def advance(count: int) -> None:
                nonlocal said, done
                done += count
                progress.advance(task, count)
                now = time.monotonic()
                if not console.is_terminal and now - said >= PLAIN_EVERY:
                    said, rate = now, done / (now - begin)
                    note(f"  {name} {done}/{total}  {rate:.2g}/s  {(total - done) / rate:.0f} s left")
                watch()

            try:
                yield advance
            finally:
                spent[name] = spent.get(name, 0.0) + time.monotonic() - begin

    def seconds() -> dict[str, float | int]:
        result = dict(spent)
        spent.clear()
        return result

    def note(text: str) -> None:
        console.print(text, markup=False, emoji=False)
        sys.stdout.flush()

    return Console(phase, seconds, note)


def make_writer(
    workdir: Path,
    *,
    first_epoch: int,
    num_epochs: int,
    note: Callable[[str], None],
    tensorboard: bool,
    wandb_project: str,
    quiet: bool = False,
) -> Writer:
    """A writer that continues at `first_epoch`: what a stopped run wrote of later epochs is dropped.

    quiet: one that writes nothing, where another process does.

    Raises:
        UserError: TensorBoard or wandb is asked for and not installed.
    """
    if quiet:
        return Writer(*[lambda *told: None] * len(Writer._fields))
    boards = [make(workdir, first_epoch) for make in _boards(tensorboard, wandb_project)]
    metrics, evaluations = workdir / "metrics.jsonl", workdir / "evaluations.jsonl"
    drop_later(metrics, first_epoch)
    drop_later(evaluations, first_epoch)
    begin = time.monotonic()

    def scalars(epoch: int, values: Mapping[str, float | int]) -> None:
        append(metrics, {"epoch": epoch, **values})
        for board in boards:
            board.scalars(epoch, values)
        done = epoch + 1 - first_epoch
        left = (time.monotonic() - begin) / done * (num_epochs - epoch - 1)
        note(summary(epoch, num_epochs, values, left))

    def evaluation(
        epoch: int,
        name: str,
        values: Mapping[str, float | int],
        texts: Sequence[str],
        rewards: Float[np.ndarray, " n"],
    ) -> None:
        append(
            evaluations,
            {"epoch": epoch, "prompts": name, **values, "texts": list(texts), "rewards": rewards.tolist()},
        )
        for board in boards:
            board.scalars(epoch, {f"eval/{name}/{key}": value for key, value in values.items()})

    def images(epoch: int, name: str, pictures: Float[np.ndarray, "n H W 3"], captions: Sequence[str]) -> None:
        picture = grid(pictures, captions)
        path = grid_path(workdir, name, epoch)
        path.parent.mkdir(exist_ok=True)
        new = path.with_name(path.name + ".new")
        picture.save(new, format="PNG")
        new.replace(path)
        for board in boards:
            board.image(epoch, name, np.asarray(picture))

    def close() -> None:
        for board in boards:
            board.close()

    return Writer(scalars, evaluation, images, close)


def summary(epoch: int, num_epochs: int, values: Mapping[str, float | int], seconds_left: float) -> str:
    """One line for people; what is not there is left out."""
    parts = [f"epoch {epoch + 1}/{num_epochs}"]
    if "reward/mean" in values:
        spread = f" ± {values['reward/std']:.2g}" if "reward/std" in values else ""
        parts.append(f"reward {values['reward/mean']:.4g}{spread}")
    if values.get("reward/missing"):
        parts.append(f"missing {values['reward/missing']:g}")
    for key, label in (
        ("loss", "loss"),
        ("grad_norm", "gradient"),
        ("approx_kl", "kl"),
        ("clip_fraction", "clipped"),
        ("ratio_max_deviation", "|ratio - 1|"),
    ):
        if key in values:
            parts.append(f"{label} {values[key]:.2g}")
    if values.get("skipped_steps"):
        parts.append(f"skipped {values['skipped_steps']:g}")
    phases = [f"{key.removeprefix('seconds/')} {value:.1f} s" for key, value in values.items() if "seconds/" in key]
    parts.append(", ".join(phases))
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.1f} images/s")
    parts.append(f"{seconds_left / 60:.1f} min left" if seconds_left >= 60 else f"{seconds_left:.0f} s left")
    return "  ".join(part for part in parts if part)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one strict-JSON line, on disk when this returns: what is not finite becomes null."""
    clean = {name: _plain(value) for name, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a torn last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def drop_later(path: Path, first_epoch: int) -> None:
    """Keeps the rows of epochs before `first_epoch`."""
    if path.exists():
        kept = [row for row in read(path) if row["epoch"] < first_epoch]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def grid_path(workdir: Path, name: str, epoch: int) -> Path:
    """Where the grid of an evaluation is."""
    return workdir / "images" / f"{name}_{epoch:05d}.png"


def grid(pictures: Float[np.ndarray, "n H W 3"], captions: Sequence[str]) -> Image.Image:
    """The pictures in rows, about as many as columns, each over its caption."""
    count, height, width, _ = pictures.shape
    factor = max(1, math.ceil(TILE / max(height, width)))
    tile_height, tile_width = height * factor, width * factor
    columns, rows = _columns_and_rows(count)
    sheet = Image.new(
        "RGB",
        (columns * (tile_width + MARGIN) + MARGIN, rows * (tile_height + CAPTION + MARGIN) + MARGIN),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    pixels = np.rint(np.nan_to_num(np.clip(pictures, 0, 1)) * 255).astype(np.uint8)
    for i, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = _corner(i, columns, tile_width, tile_height)
        tile = Image.fromarray(picture).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        pen.text((left, top + tile_height), caption[: tile_width // 6], fill="black", font=font)
    return sheet


def cut(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The `count` pictures of a grid as they were before it enlarged them, to the bit.

    Pictures that were made of equal squares of one colour, all of them, come back as small as that allows.

    Raises:
        ValueError: the sheet is no grid of so many pictures.
    """
    columns, rows = _columns_and_rows(count)
    width, rest_width = divmod(sheet.width - MARGIN, columns)
    height, rest_height = divmod(sheet.height - MARGIN, rows)
    width, height = width - MARGIN, height - CAPTION - MARGIN
    if rest_width or rest_height or min(width, height) < 1:
        raise ValueError(f"{sheet.width} x {sheet.height} pixels are no grid of {count} pictures")
    corners = [_corner(i, columns, width, height) for i in range(count)]
    tiles = [sheet.crop((left, top, left + width, top + height)) for left, top in corners]
    pixels = np.stack([np.asarray(tile) for tile in tiles])
    factor = next(factor for factor in range(TILE, 0, -1) if _enlarged(pixels, factor))
    return [tile.resize((width // factor, height // factor), Image.Resampling.NEAREST) for tile in tiles]


def _columns_and_rows(count: int) -> tuple[int, int]:
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)


def _corner(i: int, columns: int, tile_width: int, tile_height: int) -> tuple[int, int]:
    """Left and top of the i-th picture of a grid."""
    return MARGIN + i % columns * (tile_width + MARGIN), MARGIN + i // columns * (tile_height + CAPTION + MARGIN)


def _enlarged(tiles: UInt8[np.ndarray, "n H W 3"], factor: int) -> bool:
    """Whether `grid` may have enlarged pictures to these: each pixel has become a square of its colour."""
    height, width = tiles.shape[1:3]
    if height % factor or width % factor or factor != max(1, math.ceil(TILE * factor / max(height, width))):
        return False
    small = tiles[:, ::factor, ::factor]
    return bool((small.repeat(factor, axis=1).repeat(factor, axis=2) == tiles).all())


class Board(NamedTuple):
    """An experiment tracker."""

    scalars: Callable  # epoch, values
    image: Callable  # epoch, name, (H, W, 3) uint8
    close: Callable


def _tensorboard(workdir: Path, first_epoch: int) -> Board:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_epoch)

    def scalars(epoch: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)

    def image(epoch: int, name: str, picture: np.ndarray) -> None:
        writer.add_image(name, picture, epoch, dataformats="HWC")

    return Board(scalars, image, writer.close)


def _wandb(project: str) -> Callable[[Path, int], Board]:
    def make(workdir: Path, first_epoch: int) -> Board:
        import wandb

        identity = uuid.uuid5(uuid.NAMESPACE_URL, str(workdir.absolute())).hex  # a continued run stays one run
        run = wandb.init(project=project, id=identity, name=workdir.name, dir=str(workdir), resume="allow")

        def scalars(epoch: int, values: Mapping[str, float | int]) -> None:
            run.log({"epoch": epoch, **values})

        def image(epoch: int, name: str, picture: np.ndarray) -> None:
            run.log({"epoch": epoch, name: wandb.Image(picture)})

        return Board(scalars, image, run.finish)

    return make


def check_boards(tensorboard: bool, wandb_project: str) -> None:
    """Raises UserError if a tracker that is asked for is not installed."""
    import importlib.util

    for wanted, module, extra in ((tensorboard, "tensorboardX", "tensorboard"), (wandb_project, "wandb", "wandb")):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"config.{extra} needs the package {module}: pip install 'ddpo_jax[{extra}]'")


def _boards(tensorboard: bool, wandb_project: str) -> list[Callable[[Path, int], Board]]:
    check_boards(tensorboard, wandb_project)
    return ([_tensorboard] if tensorboard else []) + ([_wandb(wandb_project)] if wandb_project else [])


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | int | np.integer):
        return int(value) if isinstance(value, np.integer) else value
    return float(value) if math.isfinite(value) else None
