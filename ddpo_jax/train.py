"""The loop: collect, update, log, save; round after round, and on from the last whole round after a stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import checkpoint, metrics, report
from ddpo_jax.build import Run, build, init_state
from ddpo_jax.clock import Clock, running_clock
from ddpo_jax.diffusers_folder import check_target
from ddpo_jax.errors import Preempted
from ddpo_jax.evaluate import evaluate
from ddpo_jax.metrics import Console, Writer
from ddpo_jax.saved import about, export_trained
from ddpo_jax.sharding import bytes_held
from ddpo_jax.starts import keep_start
from ddpo_jax.types import PyTree, TrainState
from ddpo_jax.update import make_update, optimize, summarize
from ddpo_jax.workdir import claim


def train(config: ConfigDict, workdir: Path, argv: Sequence[str], watch: Callable[[], None]) -> None:
    """Trains what `config` says in `workdir`, from where an earlier run there stopped, and exports the result.

    argv: the command line that said so, for the record.
    watch: called again and again; raises Preempted once the run is to stop.

    Raises:
        UserError: something cannot be used; no work was done.
        RunStopped, Preempted: the run cannot or may not go on; its last whole round is saved.
    """
    console = metrics.make_console(watch)
    metrics.check_boards(config.tensorboard, config.wandb_project)
    with claim(workdir, config.to_dict()) as keep_config, running_clock() as clock:
        with clock.spend("loading"):
            run = build(config, console.phase)
        check_target(run.source, workdir / "export")
        keep_config()
        with checkpoint.open_manager(workdir / "checkpoints", keep=config.keep_checkpoints) as manager:
            state = init_state(run, seed=config.seed, ema=config.train.ema_decay > 0)
            state = checkpoint.restore_latest(manager, state) or state
            if not (run.tuning.reads_pretrained or run.algorithm.reads_reference):
                run = run._replace(frozen=run.frozen._replace(denoiser=None))
            writer = metrics.make_writer(
                workdir,
                first_epoch=int(state.epoch),
                num_epochs=config.num_epochs,
                note=console.note,
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
            )
            keep_start(workdir, argv, epoch=int(state.epoch))
            for note in run.notes:
                console.note(note)
            frozen, learned = bytes_held(run.frozen), bytes_held(state)
            console.note(f"a device holds {frozen / 1e6:.0f} MB of weights, {learned / 1e6:.0f} MB of training state")
            try:
                state = loop(config, run, state, manager, console, writer, clock, workdir)
            finally:
                writer.close()
                with clock.spend("report"):
                    draw_report(workdir, console.note, running=False)
            trained = checkpoint.host_copy(state.params if state.ema is None else state.ema)
            card = about(config, name=workdir.name, epochs=int(state.epoch))
            export_trained(run.source, workdir / "export", run.tuning, trained, about=card)
            console.note(f"exported to {workdir / 'export'}")
            console.note(clock.split())


def loop(
    config: ConfigDict,
    run: Run,
    state: TrainState,
    manager,
    console: Console,
    writer: Writer,
    clock: Clock,
    workdir: Path,
) -> TrainState:
    """The rounds that are left. Whatever stops them, the last whole round is saved."""
    algorithm, frozen = run.algorithm, run.frozen
    update = make_update(algorithm, run.tuning, run.tx, ema_decay=config.train.ema_decay, layout=run.layout)
    previous = (metrics.read(workdir / "metrics.jsonl") or [{}])[-1]
    skipped = float(state.opt_state.total_notfinite)
    boundary, check = checkpoint.host_copy(state), algorithm.check
    try:
        for epoch in itertools.count(int(state.epoch)):
            reason = algorithm.stop(previous)
            last = epoch >= config.num_epochs or reason is not None
            if last or epoch == 0 or (config.eval_every and epoch % config.eval_every == 0):
                shown = state.params if state.ema is None else state.ema
                with clock.spend("evaluations"):
                    show(run, shown, state, epoch, writer, console)
                if not last:
                    with clock.spend("report"):
                        draw_report(workdir, console.note, running=True)
            if last:
                break

            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), epoch)
            key_collect, key_update = jax.random.split(key)
            batch, carry, report = algorithm.collect(state.params, frozen, run.draw(epoch), state.carry, key_collect)
            state, history = optimize(
                update,
                algorithm,
                state,
                frozen,
                batch,
                key_update,
                schedule=run.schedule,
                seed=(config.seed, epoch),
                phase=console.phase,
                check=check,
            )
            check = pass_over
            state = state._replace(epoch=np.array(epoch + 1, np.int32), carry=carry)
            seconds = console.seconds()
            clock.add(seconds)
            previous = {
                **report,
                **summarize(history, skipped),
                **{f"seconds/{name}": spent for name, spent in seconds.items()},
                "images_per_second": len(algorithm.slices(batch)) / sum(seconds.values()),
            }
            skipped = float(state.opt_state.total_notfinite)
            writer.scalars(epoch, {"step": int(state.step), **previous})
            boundary = checkpoint.host_copy(state)
            if (epoch + 1) % config.checkpoint_every == 0:
                checkpoint.save(manager, epoch + 1, boundary)
        if reason:
            console.note(f"the run ends here: {reason}")
        return state
    finally:
        # The end, an error, a signal: each leaves the last whole round on disk.
        if boundary.epoch:
            checkpoint.save(manager, int(boundary.epoch), boundary)


def show(run: Run, trainable: PyTree, state: TrainState, epoch: int, writer: Writer, console: Console) -> None:
    """Pictures and rewards at the fixed prompts and noise, before round `epoch`."""
    for name, prompts in run.eval_prompts.items():
        found = evaluate(run.parts, trainable, run.frozen, prompts, key_data=state.key, weights=run.reward_weights)
        captions = [f"{text} {reward:.3g}" for text, reward in zip(prompts.texts, found.rewards, strict=True)]
        writer.images(epoch, name, found.images, captions)
        writer.evaluation(epoch, name, found.report, prompts.texts, found.rewards)
        console.note(
            f"after {epoch} epochs, {name} prompts: reward {found.report['reward/mean']:.4g}"
            f" ± {found.report['reward/std']:.2g}"
        )
    console.seconds()


def draw_report(workdir: Path, note: Callable[[str], None], *, running: bool) -> None:
    """Writes report.html. A page that cannot be drawn is told of, and costs the run nothing."""
    try:
        report.write(workdir, running=running)
    except Preempted:
        raise
    except Exception as error:
        note(f"report.html could not be drawn: {error} ({type(error).__name__})")


def pass_over(scalars: Mapping[str, float | int]) -> None:
    """The check of every round but the first."""
