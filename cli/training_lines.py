"""What ``mmrec train`` and ``mmrec pretrain`` print: the run, its estimate, its course, its end."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli import console
from features.memory import format_size
from features.signals import exit_code

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.run import Run
    from trainer.runs.train import TrainReport


def announce(run: "Run", *, memory: int | None, is_dry_run: bool, json: bool) -> None:
    """Print what is trained, and what it takes if it has steps and a single process.

    Args:
        run: The run, before its training.
        memory: Most bytes that the training may take; ``None``: what is free.
        is_dry_run: Name no run.
        json: With a dry run, print the estimate as a JSON document.

    Raises:
        OutOfMemoryError: The training does not fit into memory.
    """
    from trainer.distributed import world_size
    from trainer.runs.estimate import estimate_training

    _describe(run, is_dry_run)
    estimate = estimate_training(run, memory) if world_size() == 1 else None
    if estimate is not None:
        of_epoch = console.format_duration(estimate.epoch_seconds)
        console.notify(
            f"memory: about {format_size(estimate.peak_bytes)} of"
            f" {format_size(estimate.budget_bytes)}, features"
            f" {format_size(estimate.feature_bytes)}; a step: about {estimate.step_seconds:.2g} s,"
            f" an epoch of {estimate.steps:,}: {of_epoch}"
        )
    if json and is_dry_run:
        console.emit_json({} if estimate is None else asdict(estimate))


def _describe(run: "Run", is_dry_run: bool) -> None:
    """Print what is trained on what, how many items have no features, and the initial weights."""
    from trainer.data.control import NONE, control_line, marked
    from trainer.evaluation.encode import repeated_share
    from trainer.losses.registry import unread_settings

    spec, control = run.spec, run.config.control
    reads = f" with {', '.join(spec.features)}" if spec.features else ""
    name = "dry run" if is_dry_run else f"run {run.name}"
    console.notify(
        f"{name}: {marked(spec.model, control)} on {spec.dataset}{reads},"
        f" {run.parameters:,} parameters, {run.data.device}"
    )
    if control != NONE:
        console.notify(control_line(control))
    candidates = getattr(spec.settings, "candidates", 0)
    chosen = []
    if "candidates" in spec.automatic and candidates:
        chosen.append(f"softmax over {candidates:,} candidates (candidates=auto)")
    updates_rows = spec.train.item_updates == "rows" and run.model.row_tables()
    if "item_updates" in spec.automatic and updates_rows:
        chosen.append("a step updates the item vectors that it reads (item_updates=auto)")
    if chosen:
        console.notify(f"{run.data.features.n_items:,} items: {'; '.join(chosen)}")
    is_given = spec.train.item_updates == "rows" and "item_updates" not in spec.automatic
    if is_given and not run.model.row_tables():
        console.notify(
            "item_updates=rows changes nothing: a step reads no part of a table of item vectors"
        )
    n_items = run.data.features.n_items
    loss = getattr(spec.settings, "loss", "softmax")
    if loss == "softmax" and "candidates" not in spec.automatic and candidates >= n_items:
        console.notify(f"candidates={candidates}: the softmax is over all {n_items:,} items")
    unread = [] if spec.is_pretraining else unread_settings(spec.settings)
    if unread:
        console.notify(f"loss={loss} does not read {', '.join(unread)}")
    if spec.features:
        counts, bare = run.data.features.coverage()
        have = ", ".join(f"{modality} {count:,}" for modality, count in counts.items())
        console.notify(f"of {run.data.features.n_items:,} items: {have}, none of these {bare:,}")
    if spec.is_pretraining:
        console.notify(f"validated on {run.task.split(run.config)}")
    elif run.config.monitor_seen == "kept":
        share = repeated_share(run.data.dataset, "validation")
        because = f"; {share:.1%} of the validation targets are repeated" if share else ""
        console.notify(
            f"early stopping follows the ranking that keeps seen items (monitor_seen=kept){because}"
        )
    for remark in run.model.remarks:
        console.notify(remark)
    if run.copied_weights:
        for line in run.copied_weights.lines():
            console.notify(line)


def conclude(run: "Run", report: "TrainReport", root: Path | None, *, was_trained: bool) -> None:
    """Print how a training ended.

    Raises:
        typer.Exit: Code 130 if the training was interrupted.
    """
    command = "pretrain" if run.spec.is_pretraining else "train"
    if report.finished and not was_trained:
        console.notify(f"run {report.run} is finished already; nothing was trained{_best(report)}")
    elif report.finished:
        console.notify(f"finished: {_trained(report)}")
        if report.prior is not None:
            console.notify(report.prior.line)
        if run.spec.is_pretraining:
            console.notify(f"start from it: mmrec train --model {report.model} --init {report.run}")
    else:
        place = f" --warehouse {shlex.quote(str(root))}" if root else ""
        console.notify(
            f"stopped: {_trained(report)};"
            f" continue with: mmrec {command} --resume --run {report.run}{place}"
        )
        raise typer.Exit(exit_code())


class TrainWatch:
    """The live line of a training. The lines of validated epochs and of loss terms stay."""

    def __init__(self) -> None:
        self.line = console.ProgressLine()
        self.called = False
        self._chunks = 1

    def __call__(self, progress: "TrainProgress") -> None:
        """Show one report of the loop."""
        self.called = True
        if progress.chunks > self._chunks:
            self._chunks = progress.chunks
            console.notify(
                f"a step ran out of memory: steps are computed in {progress.chunks} chunks from now"
                " on, with the same loss and in more time; a smaller batch_size is faster"
            )
        # A model without gradients has no loss and reads no windows.
        loss = f"  loss {progress.loss:.4f}" if progress.rate else ""
        rate = f"  {progress.rate:,.0f} {progress.unit}/s" if progress.rate else ""
        text = f"epoch {progress.epoch}/{progress.epochs}{loss}"
        if progress.metrics:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in progress.metrics.items())
            self.line.update(f"{text}  {figures}  best {progress.best_epoch}{rate}", keep=True)
            if progress.loss_terms:
                terms = (f"{name} {value:.4f}" for name, value in progress.loss_terms.items())
                self.line.update(f"  loss: {', '.join(terms)}", keep=True)
        else:
            left = console.format_duration(progress.seconds_left)
            self.line.update(f"{text}  step {progress.step}/{progress.steps}{rate}  {left} left")


def _trained(report: "TrainReport") -> str:
    epochs = "1 epoch" if report.epochs == 1 else f"{report.epochs} epochs"
    return f"{epochs} in {console.format_duration(report.seconds)}{_best(report)}"


def _best(report: "TrainReport") -> str:
    if report.best_epoch < 0:
        return ", none validated yet"
    return f", best epoch {report.best_epoch} with {report.best:.4f} ({report.monitor})"
