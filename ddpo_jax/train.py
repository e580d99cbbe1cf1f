"""The loop: collect, update, log, save; round after round, and on from the last whole round after a stop."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import checkpoint, experts, metrics, multihost, report
from ddpo_jax.ahead import one_ahead
from ddpo_jax.build import Run, build, init_state
from ddpo_jax.clock import Clock, running_clock
from ddpo_jax.diffusers_folder import check_target
from ddpo_jax.errors import Preempted
from ddpo_jax.fixed_noise import evaluate
from ddpo_jax.metrics import Console, Writer
from ddpo_jax.saved import about, export_trained
from ddpo_jax.sharding import bytes_held
from ddpo_jax.starts import keep_start
from ddpo_jax.types import PyTree, TrainState
from ddpo_jax.update import make_update, optimize, summarize
from ddpo_jax.workdir import claim

LOST_LOCK = 150  # seconds that a file server keeps the lock of a host that is gone, and more


def train(config: ConfigDict, workdir: Path, argv: Sequence[str], watch: Callable[[], None]) -> None:
    """Trains what `config` says in `workdir`, from where an earlier run there stopped, and exports the result.

    argv: the command line that said so, for the record.
    watch: called again and again; raises Preempted once the run is to stop.

    Raises:
        UserError: something cannot be used; no work was done.
        RunStopped, Preempted: the run cannot or may not go on; its last whole round is saved.
    """
    console = metrics.make_console(multihost.watching(watch), quiet=not multihost.is_main())
    metrics.check_boards(config.tensorboard, config.wandb_project)
    patience = LOST_LOCK if jax.process_count() > 1 else 0
    claimed = multihost.inside_on_main(claim(workdir, config.to_dict(), patience=patience))
    with claimed as keep_config, running_clock() as clock:
        with clock.spend("loading"):
            run = build(config, console.phase)
        multihost.on_main(lambda: begin_workdir(run, workdir, keep_config))
        checkpoints = checkpoint.open_manager(
            workdir / "checkpoints",
            keep=config.keep_checkpoints,
            keep_best=config.keep_best_checkpoints,
            note=console.note,
        )
        with checkpoints as manager:
            state = init_state(run, seed=config.seed, ema=config.train.ema_decay > 0)
            state = checkpoint.restore_latest(manager, state) or state
            if not (run.tuning.reads_pretrained or run.algorithm.reads_reference):
                run = run._replace(frozen=run.frozen._replace(denoiser=None))
            first = int(state.epoch)
            writer = metrics.make_writer(
                workdir,
                first_epoch=first,
                num_epochs=config.num_epochs,
                note=console.note,
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
                quiet=not multihost.is_main(),
            )
            multihost.on_main(lambda: keep_start(workdir, argv, epoch=first))
            frozen, learned = bytes_held(run.frozen), bytes_held(state)
            for note in (
                *run.notes,
                f"a device holds {frozen / 1e6:.0f} MB of weights, {learned / 1e6:.0f} MB of training state",
            ):
                console.note(note)
            try:
                with one_ahead(run.draw, range(first, config.num_epochs)) as draw:
                    state = loop(config, run, state, draw, manager, console, writer, clock, workdir)
            finally:
                writer.close()
                with clock.spend("report"):
                    draw_report(workdir, console.note, running=False)
            trained = multihost.to_host(state.params if state.ema is None else state.ema)
            card = about(config, name=workdir.name, epochs=int(state.epoch))
            multihost.on_main(lambda: export_trained(run.source, workdir / "export", run.tuning, trained, about=card))
            console.note(f"exported to {workdir / 'export'}")
            console.note(clock.split())


def begin_workdir(run: Run, workdir: Path, keep_config: Callable[[], None]) -> None:
    """Makes the folder this run's, once all of it was built."""
    check_target(run.source, workdir / "export")
    keep_config()


def loop(
    config: ConfigDict,
    run: Run,
    state: TrainState,
    draw: Callable[[], Any],
    manager,
    console: Console,
    writer: Writer,
    clock: Clock,
    workdir: Path,
) -> TrainState:
    """The rounds that are left. Whatever stops them, the last whole round is saved.

    draw: () -> the inputs of the next round.
    """
    algorithm, frozen = run.algorithm, run.frozen
    update = make_update(algorithm, run.tuning, run.tx, ema_decay=config.train.ema_decay, layout=run.layout)
    previous = multihost.on_main(lambda: (metrics.read(workdir / "metrics.jsonl") or [{}])[-1])
    evaluated = multihost.on_main(lambda: metrics.read(workdir / "evaluations.jsonl"))
    scale = experts.scale_told(run.parts.reward.names, evaluated)
    skipped = float(state.opt_state.total_notfinite)
    boundary, check = Boundary(checkpoint.host_copy(state), previous.get("reward/mean")), algorithm.check
    try:
        for epoch in itertools.count(int(state.epoch)):
            reason = algorithm.stop(previous)
            last = epoch >= config.num_epochs or reason is not None
            if last or epoch == 0 or (config.eval_every and epoch % config.eval_every == 0):
                shown = state.params if state.ema is None else state.ema
                with clock.spend("evaluations"):
                    scale = show(run, shown, state, epoch, writer, console, scale)
                if not last:
                    with clock.spend("report"):
                        draw_report(workdir, console.note, running=True)
            if last:
                break

            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), epoch)
            key_collect, key_update = jax.random.split(key)
            with clock.spend("data"):
                inputs = multihost.together(draw)
            batch, carry, report = algorithm.collect(state.params, frozen, inputs, state.carry, key_collect)
            del inputs  # pictures of gigabytes, while those of the next round come in
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
                "images_per_second": run.drawn / sum(seconds.values()),
            }
            skipped = float(state.opt_state.total_notfinite)
            writer.scalars(epoch, {"step": int(state.step), **previous})
            boundary = Boundary(checkpoint.host_copy(state), previous.get("reward/mean"))
            if (epoch + 1) % config.checkpoint_every == 0:
                checkpoint.save(manager, epoch + 1, state, score=boundary.reward)
        if reason:
            console.note(f"the run ends here: {reason}")
    except BaseException as error:
        # An error, a signal: each leaves the last whole round on disk. Of several processes all save, or none can.
        if multihost.meet(multihost.MEETING):
            multihost.settle(multihost.SETTLING)  # while the frames hold what is under way
            traceback.clear_frames(error.__traceback__)  # what the broken-off round holds on the devices
            boundary.save(manager)
        raise
    boundary.save(manager)
    return state


class Boundary(NamedTuple):
    """The last whole round."""

    state: PyTree  # a host_copy
    reward: float | None

    def save(self, manager) -> None:
        if self.state.epoch:
            checkpoint.save(manager, int(self.state.epoch), self.state, score=self.reward)


def show(
    run: Run,
    trainable: PyTree,
    state: TrainState,
    epoch: int,
    writer: Writer,
    console: Console,
    scale: experts.Scale,
) -> experts.Scale:
    """Pictures and rewards at the fixed prompts and noise, before round `epoch`; the scale of the run's first."""
    for name, prompts in run.eval_prompts.items():
        found = evaluate(
            run.parts,
            trainable,
            run.frozen,
            prompts,
            key_data=state.key,
            combination=run.experts,
            scale=scale,
        )
        scale = found.scale
        captions = [f"{text} {reward:.3g}" for text, reward in zip(prompts.texts, found.rewards, strict=True)]
        writer.images(epoch, name, found.images, captions)
        writer.evaluation(epoch, name, found.report, prompts.texts, found.rewards)
        console.note(
            f"after {epoch} epochs, {name} prompts: reward {found.report['reward/mean']:.4g}"
            f" ± {found.report['reward/std']:.2g}"
        )
    console.seconds()
    return scale


def draw_report(workdir: Path, note: Callable[[str], None], *, running: bool) -> None:
    """Writes report.html. A page that cannot be drawn is told of, and costs the run nothing."""
    if not multihost.is_main():
        return
    try:
        report.write(workdir, running=running)
    except Preempted:
        raise
    except Exception as error:
        note(f"report.html could not be drawn: {error} ({type(error).__name__})")


def pass_over(scalars: Mapping[str, float | int]) -> None:
    """The check of every round but the first."""
