"""The training loop: a step over batches, with validation, early stopping, checkpoints and a record."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._core.checks import positive_int
from jrnn.training.checkpoint import Checkpointer, compare_leaves, describe_leaves
from jrnn.training.data import of_epoch, weighted_means
from jrnn.training.interrupt import Interrupt
from jrnn.training.logs import Logger
from jrnn.training.step import Metrics, Step, TrainState

_END = object()
LINES = 20  # of progress in a run, where there is no bar


class FitResult(NamedTuple):
    """The result of `fit`.

    Attributes:
      params: the parameters with the best validation so far; without validation, the last ones.
      state: the `TrainState` at the end.
      history: plain lists and floats, see `fit`.
      best: ``{"step": ..., "value": ...}`` of the best validation, or None.
      stopped: why the run ended: "epochs", "steps", "patience", "callback" or "interrupt".

    >>> FitResult._fields
    ('params', 'state', 'history', 'best', 'stopped')
    """

    params: Any
    state: TrainState
    history: dict[str, Any]
    best: dict[str, Any] | None
    stopped: str


class Report(NamedTuple):
    """The argument of a callback of `fit`, which is called after each record.

    Attributes:
      step: the number of steps that were run.
      epoch: the epoch of the last of them, counted from 0.
      params: the parameters after it. The next step overwrites them: copy what is to be kept.
      history: see `fit`; the newest numbers are the last of each column.
      best: ``{"step": ..., "value": ...}`` of the best validation so far, or None.

    >>> Report(step=10, epoch=0, params={}, history={}, best=None).step
    10
    """

    step: int
    epoch: int
    params: Any
    history: dict[str, Any]
    best: dict[str, Any] | None


class NonFiniteError(ArithmeticError):
    """Raised by `fit` after too many steps in a row that were not finite (see `Step`). None of them changed anything.

    Attributes:
      step: the number of the step that was one too many, counted from 1.
      in_row: the number of such steps in a row.
      loss, grad_norm: the loss and the gradient norm of that step.
      leaves: the paths of the parameters whose gradients were not finite; where all gradients were finite, of those
        whose updates or new values were not.

    >>> NonFiniteError(7, 3, float("nan"), float("nan"), ["w_hh"]).step
    7
    """

    def __init__(self, step: int, in_row: int, loss: float, grad_norm: float, leaves: list[str]):
        self.step, self.in_row, self.loss, self.grad_norm, self.leaves = step, in_row, loss, grad_norm, leaves
        if leaves or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kind = "updates" if leaves and math.isfinite(grad_norm) else "gradients"
            where = f"{kind} not finite in: {', '.join(leaves) or 'no leaf'}"
        else:
            where = "the optimizer's state would not be finite"
        super().__init__(
            f"step {step}: the loss, the gradients or the updates were not finite in {in_row} step(s) in a row "
            f"(max_nonfinite). Loss {loss:g}, gradient norm {grad_norm:g}, {where}. "
            "The parameters are still those before the first of these steps. Look for NaN in the batches, lower the "
            "learning rate, clip the gradient norm (clip_norm), or raise max_nonfinite."
        )

    def __reduce__(self) -> Any:
        return type(self), (self.step, self.in_row, self.loss, self.grad_norm, self.leaves)


def fit(
    step: Step,
    params: Any,
    data: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    key: jax.Array | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    validation: Iterable[Any] | Callable[[int], Iterable[Any]] | None = None,
    validation_weight: Callable[[Any], Any] | None = None,
    validate_every: int | None = None,
    monitor: str = "loss",
    mode: str = "min",
    patience: int | None = None,
    min_delta: float = 0.0,
    log_every: int = 10,
    max_nonfinite: int | None = 10,
    progress: bool | None = None,
    checkpoint: Any = None,
    checkpoint_every: int | None = None,
    resume: bool | None = None,
    callbacks: Sequence[Callable[[Report], bool | None]] = (),
    logger: Logger | None = None,
) -> FitResult:
    """Trains for a number of epochs or of steps, and returns the parameters with the best validation.

    The first ^C ends the run after the current step: its result is returned, with ``stopped="interrupt"``, and a
    checkpoint is saved where there are checkpoints. No further validation is made. A second ^C raises KeyboardInterrupt
    at once. (Only the main thread receives ^C.)

    The host does not wait for the device between records: it fetches batches while the device works, and reads numbers
    back every `log_every` steps. The same data, parameters, key and arguments give the same result, bit for bit, even
    if the run was interrupted (by ^C, by a callback, or killed) and resumed from a checkpoint.

    Args:
      step: from `make_step` or `tbptt_step`.
      params: the initial parameters; they are copied, not changed.
      data: the batches: anything that can be iterated once per epoch (a list, a loader), or a function of the epoch's
        number that returns an iterable, for a shuffle of its own, reproducible, in each epoch. A one-shot iterator (a
        generator) serves for one pass. A batch must not be changed after it was handed over.
      key: for dropout and the like: the step numbered ``n``, counted from 0, uses ``fold_in(key, n)``, and with
        `tbptt_step` all chunks of a sequence use that of their first chunk. None for a run without randomness.
      epochs: how many passes over `data`; or
      steps: how many batches, over as many passes as that needs. One of the two. They count the whole run: to go on
        with a run that has ended, call `fit` again with its checkpoint and a larger number.
      validation: batches to validate on, iterated anew each time, with ``key=None``; or a function of the epoch's
        number that returns them, such as `batches`, which is always called with 0.
      validation_weight: the weight of each of these batches in the mean of a metric: a function ``batch -> number``, as
        in `evaluate`. None gives all batches the same weight.
      validate_every: in steps; None for the end of each epoch. The last of all steps always validates.
      monitor: the metric to validate by: "loss", or a name in the loss function's aux dictionary.
      mode: whether the "min" or the "max" of that metric is best.
      patience: stop after this many validations in a row without an improvement; None never stops early.
      min_delta: `patience` counts a change by more than this as an improvement, measured from the last value that was
        one, so that several small changes add up. The best parameters are always those of the best validation.
      log_every: the number of steps that a record averages over.
      max_nonfinite: stop with `NonFiniteError` after this many steps in a row that were not finite (such steps change
        nothing, see `Step`); None never stops for this reason. It is noticed when the numbers are read back.
      progress: True shows a tqdm bar on stderr (needs the extra ``progress``), with steps per second and the numbers of
        the latest record: the epoch (counted from 1 here), the loss, the gradient norm before clipping, and the
        monitored metric of the latest validation. False shows nothing. None shows the bar where tqdm is installed and
        stderr is a terminal; elsewhere it prints these numbers on at most 21 lines, each at the first record after the
        end of an epoch (of every epoch where there are no more than 20), the last one at the last record.
      checkpoint: a directory, or a `Checkpointer` (which stays open), to save to (needs the extra ``checkpoint``). A
        checkpoint is saved at every improvement, at the end, and as `checkpoint_every` says.
      checkpoint_every: save a checkpoint every this many steps; None saves one at the end of each epoch.
      resume: None continues from the latest checkpoint if there is one; then `params` and `key` only give the structure
        to expect. True requires a checkpoint, False requires that there is none. `data` must be the same again: batches
        that the run has already consumed in its current epoch are skipped.
      callbacks: functions that are called with a `Report` after each record, in order. One that returns True ends the
        run, with ``stopped="callback"``; the others return False or None.
      logger: a `Logger`, such as `CSVLogger`: its ``log(step, scalars)`` gets the numbers of each record as
        ``train/...`` and those of each validation as ``validation/...``.

    Returns:
      A `FitResult`. Its ``history`` has the entries "train" (columns "step", "epoch", "loss", "grad_norm" and more),
      "validation" ("step", "epoch", "loss" and more) and "skipped"; columns are of equal length. A train record, made
      every `log_every` steps, at validations, at checkpoints and at the end, holds means over the finite steps since
      the one before, scalars in the aux dictionary included; "skipped" lists the steps that were not finite. Steps
      count from 1, epochs from 0.

    Raises:
      ValueError, TypeError: arguments that do not fit together, an empty data set, a one-shot iterator that ran out,
        a checkpoint of another model.
      NonFiniteError: see `max_nonfinite`.
      ImportError: a progress bar or checkpoints were asked for, and their extra is not installed.

    >>> import optax
    >>> from jrnn.training import make_step
    >>> step = make_step(lambda params, batch, key: (params - batch) ** 2, optax.sgd(0.25))
    >>> result = fit(step, 0.0, [1.0, 1.0], epochs=2, validation=[1.0], log_every=1)
    >>> float(result.params)
    0.9375
    >>> result.history["train"]["loss"]
    [1.0, 0.25, 0.0625, 0.015625]
    >>> result.best, result.stopped
    ({'step': 4, 'value': 0.00390625}, 'epochs')
    """
    _check(**{name: value for name, value in locals().items() if name not in ("params", "key")})
    state, best, run = step.init(params, key), None, _Run()
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint is not None:
            is_open = isinstance(checkpoint, Checkpointer)
            store = checkpoint if is_open else stack.enter_context(Checkpointer(checkpoint))
            state, best, run = _load(store, step, state, resume) or (state, best, run)
        display = _display(progress, _total(data, epochs, steps), epochs, steps, monitor, run, stack)
        feed = _Feed(data, run.epoch, run.index)
        record = _Record(run, step, max_nonfinite, int(state.skipped_in_row), _leaf_names(state.params))
        news = _News(run, callbacks, logger)
        interrupt = stack.enter_context(Interrupt())

        def ended() -> str | None:
            if epochs is not None and run.epoch >= epochs:
                return "epochs"
            return "steps" if steps is not None and run.step >= steps else None

        def stopped() -> str | None:
            if (reason := ended()) is not None:
                return reason
            if patience is not None and run.waited >= patience:
                return "patience"
            return "callback" if news.enough else "interrupt" if interrupt.asked else None

        reason = stopped()
        while reason is None:
            state, metrics = step(state, feed.take())
            run.step += 1
            record.add(run.step, run.epoch, metrics)
            epoch, run.epoch, run.index = run.epoch, *feed.advance(last=run.step == steps)
            epoch_over, value, improved = run.epoch > epoch, None, False
            if validation is not None and (ended() or _due(run.step, validate_every, epoch_over)):
                record.write()
                value = _validate(step, state.params, validation, validation_weight, monitor, run, epoch)
                improved = run.improves(value, mode, min_delta)
                if improved:
                    best = jax.tree.map(jnp.copy, state.params)  # the next step overwrites these
            if ended() or run.step % log_every == 0:
                record.write()
            # A callback may end the run, so that it is called before a last checkpoint is due.
            news.tell(state.params)
            reason = stopped()  # once a step: a ^C from here on ends the run after the next one
            if store is not None:
                due = improved or _due(run.step, checkpoint_every, epoch_over)
                if due or ended():
                    record.write()
                if due or reason is not None:
                    # A run that is cut short between two records resumes there, as if nothing had happened.
                    record.read()
                    _save(store, state, best, run, value, mode)
            if reason is not None:
                record.write()
                news.tell(state.params)
            if display is not None and run.history["train"].get("step", [])[-1:] == [run.step]:
                display.show(last=reason is not None)
    return FitResult(state.params if best is None else best, state, run.history, run.best(), reason)


def load_params(checkpoint: Any, like: Any, which: str = "best") -> Any:
    """The parameters that `fit` saved, without the optimiser: for inference, or to train on in another way.

    They are read from the latest checkpoint of the run. The directory is not changed, so this may be called while the
    run goes on.

    Args:
      checkpoint: the directory that `fit` was given, or a `Checkpointer`, which stays open.
      like: a pytree with the structure, shapes and dtypes of the parameters: parameters of the same model, or their
        shapes alone, ``jax.eval_shape(model.init, key, in_features)``. Arrays are restored with the sharding of the
        arrays in `like`, and to the first device where there is none.
      which: "best" for the parameters with the best validation so far, which are those of `FitResult`; "last" for
        those after the last step that was saved.

    Returns:
      A pytree like `like`. To know the step or the value of the best validation, or the history, see
      ``Checkpointer.restore``.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the parameters saved differ from `like` in structure, shape or dtype (the message names where); the
        best ones are asked for of a run without validation; the checkpoint is not one of `fit`.
      ImportError: without the extra ``checkpoint``.

    >>> import tempfile
    >>> import jrnn
    >>> model = jrnn.stack(jrnn.gru(4), jrnn.dense(1))
    >>> def loss_fn(params, batch, key):
    ...     _, predictions = jrnn.unroll(model, params, batch, key=key)
    ...     return jrnn.losses.mse(predictions[:-1], batch[1:])
    >>> step = jrnn.training.make_step(loss_fn, jrnn.optimizer("adam", 1e-2))
    >>> data = [jnp.sin(jnp.arange(20.0))[:, None, None]]
    >>> with tempfile.TemporaryDirectory() as runs:
    ...     params = model.init(jax.random.key(0), 1)
    ...     result = fit(step, params, data, epochs=3, validation=data, checkpoint=runs, progress=False)
    ...     shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), 1))
    ...     loaded = load_params(runs, shapes)
    >>> bool(jax.tree.all(jax.tree.map(jnp.array_equal, loaded, result.params)))
    True
    """
    roots = {"best": "best", "last": "state/params"}  # where `_save` puts them
    if which not in roots:
        raise ValueError(f'which: expected "best" or "last", got {which!r}')
    with contextlib.ExitStack() as stack:
        store = checkpoint
        if not isinstance(store, Checkpointer):
            path = os.fspath(checkpoint)
            if "://" not in path and not os.path.isdir(os.path.expanduser(path)):  # a `Checkpointer` would make it
                raise FileNotFoundError(f"checkpoint: expected a directory that fit has saved to, got {path}")
            store = stack.enter_context(Checkpointer(path))
        step = store._find(None)
        leaves = store.leaves(step)
        if not _below(roots["last"], leaves):
            raise ValueError(f"checkpoint: expected one that fit has saved in {store.directory}, got {sorted(leaves)}")
        saved = _below(roots[which], leaves)
        if not saved:
            raise ValueError(
                f"which: the run in {store.directory} has no best parameters, because it had no validation or none "
                'that gave a number; load those of its last step with which="last"'
            )
        tree = {"best": {"best": like}, "last": {"state": {"params": like}}}[which]
        compare_leaves(saved, describe_leaves(tree), f"checkpoint {step} in {store.directory}")
        tree = store._read(step, tree)
    return tree["best"] if which == "best" else tree["state"]["params"]


def _below(root: str, leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves of the subtree at `root`, which may be a single leaf."""
    return {name: leaf for name, leaf in leaves.items() if name == root or name.startswith(root + "/")}


@dataclasses.dataclass
class _Run:
    """The progress of a run, as plain data: the part of a checkpoint that is not arrays."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    waited: int = 0
    waited_on: float | None = None
    best_step: int | None = None
    best_value: float | None = None
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)  # finite steps that await a record
    history: dict[str, Any] = dataclasses.field(default_factory=lambda: {"train": {}, "validation": {}, "skipped": []})

    def improves(self, value: float, mode: str, min_delta: float) -> bool:
        """Whether a validation is the best so far; remembers it, and how long patience has waited.

        Any gain makes a validation the best. Patience waits for a gain of more than `min_delta` over `waited_on`, the
        last value that had one, whether it is made in one validation or in several.
        """
        self.waited += 1
        if _better(value, self.waited_on, mode, min_delta):
            self.waited, self.waited_on = 0, value
        improved = _better(value, self.best_value, mode)
        if improved:
            self.best_step, self.best_value = self.step, value
        return improved

    def best(self) -> dict[str, Any] | None:
        return None if self.best_step is None else {"step": self.best_step, "value": self.best_value}


class _News:
    """Tells the logger and the callbacks what is new in the history, and whether one of them has had enough."""

    def __init__(self, run: _Run, callbacks: Any, logger: Any):
        self.run, self.callbacks, self.logger, self.enough = run, callbacks, logger, False
        self.told = {kind: self._count(kind) for kind in ("train", "validation")}

    def _count(self, kind: str) -> int:
        return len(self.run.history[kind].get("step", ()))

    def tell(self, params: Any) -> None:
        new = False
        for kind, told in self.told.items():
            columns = self.run.history[kind]
            for row in range(told, self._count(kind)):
                new = True
                if self.logger is not None:
                    scalars = {f"{kind}/{n}": values[row] for n, values in columns.items() if n != "step"}
                    self.logger.log(columns["step"][row], scalars)
            self.told[kind] = self._count(kind)
        if new and self.callbacks:
            train = self.run.history["train"]
            epoch = train["epoch"][-1] if train else 0
            report = Report(self.run.step, epoch, params, self.run.history, self.run.best())
            # All of them, whatever the first says.
            self.enough = any([_truth(callback(report), callback) for callback in self.callbacks]) or self.enough


class _Feed:
    """Batches one after the other, over the epochs, with the position of the next one."""

    def __init__(self, data: Any, epoch: int, index: int):
        self.data, self.epoch, self.index = data, epoch, index
        self.one_shot = isinstance(data, Iterator)
        self.batch: Any = _END
        self.batches: Any = None

    def take(self) -> Any:
        """The next batch."""
        if self.batch is _END:
            self._open()
        return self.batch

    def advance(self, last: bool) -> tuple[int, int]:
        """Moves on by one batch; the position ``(epoch, index)`` of the one that follows."""
        self.index += 1
        if last and self.one_shot:  # what is taken from a one-shot iterator is lost to its owner
            self.batch = _END
            return self.epoch, self.index
        self.batch = next(self.batches, _END)
        if self.batch is _END:
            self.epoch, self.index = self.epoch + 1, 0
        return self.epoch, self.index

    def _open(self) -> None:
        if self.one_shot and self.batches is not None:
            raise ValueError(
                "data: a one-shot iterator ran out before the last step, and cannot be iterated again; pass a list, "
                "an object that can be iterated anew, or a function epoch -> iterable"
            )
        self.batches = iter(of_epoch(self.data, self.epoch))
        skipped = sum(1 for _ in itertools.islice(self.batches, self.index))
        self.batch = next(self.batches, _END)
        if self.batch is _END:
            raise ValueError(
                f"data: expected at least one batch, but epoch {self.epoch} has none"
                if self.index == 0
                else f"data: the checkpoint stands before batch {self.index} of epoch {self.epoch}, but that epoch has "
                f"only {skipped} batches; resume with the data of the interrupted run"
            )


class _Record:
    """Reads metrics back now and then, writes the history, and stops a run that is not finite."""

    def __init__(self, run: _Run, step: Step, limit: int | None, in_row: int, leaves: list[str]):
        self.run, self.limit, self.in_row, self.leaves = run, limit, in_row, leaves
        self.pending: list[tuple[int, Metrics]] = []
        self.names: tuple[str, ...] = ()
        self.last: tuple[int, int] | None = None  # the step and the epoch of the last step, if it awaits a record

    def add(self, step: int, epoch: int, metrics: Metrics) -> None:
        scalars = {name: x for name, x in metrics.aux.items() if jnp.shape(x) == ()}
        self.pending.append((step, metrics._replace(aux=scalars)))
        self.names = ("loss", "grad_norm", *scalars)
        self.last = step, epoch

    def read(self) -> None:
        """Waits for the steps pending, and keeps the numbers of those that are finite."""
        pending: list[tuple[int, Metrics]] = jax.device_get(self.pending)
        self.pending = []
        for step, metrics in pending:
            self.in_row = 0 if metrics.finite else self.in_row + 1
            if not metrics.finite:
                self.run.history["skipped"].append(int(step))
            if self.limit is not None and self.in_row >= self.limit:
                # One gradient that is not finite spoils all updates where the global norm is clipped.
                finite = np.isfinite(metrics.leaf_norms)
                good = metrics.leaf_finite if finite.all() else finite
                bad = [name for name, is_good in zip(self.leaves, good, strict=True) if not is_good]
                raise NonFiniteError(int(step), self.in_row, float(metrics.loss), float(metrics.grad_norm), bad)
            if metrics.finite:
                numbers = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, **metrics.aux}
                self.run.rows.append({name: float(x) for name, x in numbers.items()})

    def write(self) -> None:
        """Makes one record of the steps since the one before, if there are any."""
        self.read()
        if self.last is None:
            return
        (step, epoch), rows = self.last, self.run.rows
        self.last, self.run.rows = None, []
        means = {name: _mean([row[name] for row in rows]) for name in self.names}
        _append(self.run.history["train"], {"step": step, "epoch": epoch, **means})


@dataclasses.dataclass
class _Display:
    """Shows the newest record of a run.

    It shows what the history holds and asks for nothing more: the records that a run makes must not depend on whether
    somebody looks.
    """

    run: _Run
    epochs: int | None
    monitor: str

    def place(self) -> str:
        epoch = self.run.history["train"]["epoch"][-1] + 1
        return f"epoch {epoch}" if self.epochs is None else f"epoch {epoch}/{self.epochs}"

    def numbers(self) -> dict[str, str]:
        train, validation = self.run.history["train"], self.run.history["validation"]
        values = {"loss": train["loss"][-1], "grad_norm": train["grad_norm"][-1]}
        if self.monitor in validation:
            values[f"validation {self.monitor}"] = validation[self.monitor][-1]
        return {name: f"{value:.4g}" for name, value in values.items()}


class _Bar(_Display):
    def __init__(self, run: _Run, epochs: int | None, monitor: str, bar: Any):
        super().__init__(run, epochs, monitor)
        self.bar = bar

    def show(self, last: bool) -> None:
        self.bar.set_description(self.place(), refresh=False)
        self.bar.set_postfix(self.numbers(), refresh=last)
        self.bar.update(self.run.step - self.bar.n)


class _Lines(_Display):
    """A line at the first record after the end of an epoch, but no more than twenty of them, and one at the last."""

    def __init__(self, run: _Run, epochs: int | None, monitor: str, steps: int | None):
        super().__init__(run, epochs, monitor)
        self.total = epochs or steps or 0
        self.epoch, self.shown = run.epoch, self._done()  # at the line before

    def _done(self) -> int:
        return self.run.step if self.epochs is None else self.run.epoch

    def show(self, last: bool) -> None:
        if last or (self.run.epoch > self.epoch and LINES * (self._done() - self.shown) >= self.total):
            self.epoch, self.shown = self.run.epoch, self._done()
            numbers = "".join(f", {name} {value}" for name, value in self.numbers().items())
            print(f"{self.place()}: step {self.run.step}{numbers}", file=sys.stderr, flush=True)


def _validate(step: Step, params: Any, data: Any, weight: Any, monitor: str, run: _Run, epoch: int) -> float:
    means = weighted_means(step, params, data, weight, "validation")
    if monitor not in means:
        raise ValueError(f"monitor: expected one of {sorted(means)}, got {monitor!r}")
    _append(run.history["validation"], {"step": run.step, "epoch": epoch, **means})
    return means[monitor]


def _save(store: Checkpointer, state: TrainState, best: Any, run: _Run, value: float | None, mode: str) -> None:
    # The carry goes flat: its shapes are those of the last batch, which a fresh state does not know.
    tree = {
        "state": state._replace(carry=None),
        "carry": tuple(jax.tree.leaves(state.carry)),
        "best": () if best is None else best,
    }
    if value is not None and mode == "max":
        value = -value
    store.save(run.step, tree, info=dataclasses.asdict(run), value=value)


def _load(store: Checkpointer, step: Step, fresh: TrainState, resume: bool | None) -> Any:
    latest = store.latest_step()
    if latest is None and resume:
        raise FileNotFoundError(f"resume: expected a checkpoint in {store.directory}, found none")
    if latest is None:
        return None
    if resume is False:
        raise ValueError(
            f"resume: False starts a new run, but {store.directory} already holds one, at step {latest}; choose an "
            "empty directory, or leave resume out to go on with it"
        )
    leaves = store.leaves(latest)
    like = {
        "state": fresh,
        "carry": tuple(jax.ShapeDtypeStruct(*leaf) for name, leaf in leaves.items() if name.startswith("carry/")),
        "best": fresh.params if _below("best", leaves) else (),
    }
    _, tree, info = store.restore(like, latest)
    carry = jax.tree.unflatten(step.carry_structure(fresh.params), tree["carry"])
    info = {"waited_on": info["best_value"], **info}  # checkpoints of earlier versions lack it: there, the two were one
    best = None if info["best_step"] is None else tree["best"]
    return tree["state"]._replace(carry=carry), best, _Run(**info)


def _display(
    progress: bool | None, total: int | None, epochs: int | None, steps: int | None, monitor: str, run: _Run,
    stack: contextlib.ExitStack,
) -> _Lines | _Bar | None:  # fmt: skip
    if progress is None:
        progress = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
        if not progress:
            return _Lines(run, epochs, monitor, steps)
    if not progress:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('progress: a bar needs tqdm, which is not installed: pip install "jrnn[progress]"') from error
    bar = tqdm(total=total, initial=run.step, unit="step", dynamic_ncols=True)
    return _Bar(run, epochs, monitor, stack.enter_context(bar))


def _total(data: Any, epochs: int | None, steps: int | None) -> int | None:
    if steps is not None or epochs is None:
        return steps
    return epochs * len(data) if hasattr(data, "__len__") else None


def _due(step: int, every: int | None, epoch_over: bool) -> bool:
    return epoch_over if every is None else step % every == 0


def _better(value: float, than: float | None, mode: str, by: float = 0.0) -> bool:
    """Whether `value` is better by more than `by`; NaN never is, and every finite value is better than None."""
    sign = 1.0 if mode == "max" else -1.0
    return sign * value > (-math.inf if than is None else sign * than + by)


def _truth(answer: Any, callback: Any) -> bool:
    """The answer of a callback, which may be a boolean of NumPy's or JAX's: comparisons of arrays return these."""
    if answer is None:
        return False
    value = np.asarray(answer)
    if value.ndim or value.dtype != np.bool_:
        raise TypeError(
            f"callbacks: expected True, which ends the run, False or None from {callback!r}, got {answer!r}; let it "
            "return None if it is not to decide about the end"
        )
    return bool(value)


def _mean(values: list[Any]) -> float:
    return math.fsum(float(value) for value in values) / len(values) if values else math.nan


def _append(columns: dict[str, list[Any]], row: dict[str, Any]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


def _leaf_names(params: Any) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") or "params" for path, _ in paths]


def _check(
    step: Any, data: Any, epochs: Any, steps: Any, validation: Any, validation_weight: Any, validate_every: Any,
    monitor: Any, mode: Any, patience: Any, min_delta: Any, log_every: Any, max_nonfinite: Any, progress: Any,
    checkpoint: Any, checkpoint_every: Any, resume: Any, callbacks: Any, logger: Any,
) -> None:  # fmt: skip
    if not isinstance(step, Step):
        raise TypeError(f"step: expected make_step(loss_fn, optimizer) or a tbptt_step, got {type(step).__name__}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs, steps: expected exactly one of the two, got epochs={epochs} and steps={steps}")
    counts = {
        "epochs": epochs, "steps": steps, "validate_every": validate_every, "patience": patience,
        "log_every": log_every, "max_nonfinite": max_nonfinite, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    for name, value in counts.items():
        if value is not None or name == "log_every":
            positive_int(value, name)
    if not callable(data) and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(f"data: expected an iterable of batches or a function of the epoch, got {type(data).__name__}")
    if epochs is not None and epochs > 1 and isinstance(data, Iterator):
        raise ValueError(
            f"data: a one-shot iterator cannot be iterated for epochs={epochs}; pass a list, an object that can be "
            "iterated anew, or a function epoch -> iterable"
        )
    if hasattr(data, "__len__") and len(data) == 0:
        raise ValueError("data: expected at least one batch, got none")
    if validation is None and not (patience is None and validate_every is None and validation_weight is None):
        raise ValueError("validation: patience, validate_every and validation_weight need it, got None")
    if validation_weight is not None and not callable(validation_weight):
        raise TypeError(f"validation_weight: expected a function batch -> number, got {validation_weight!r}")
    if checkpoint is None and (checkpoint_every is not None or resume is not None):
        raise ValueError("checkpoint: checkpoint_every and resume need it, got None")
    if isinstance(validation, Iterator):
        raise TypeError(
            "validation: expected batches that can be iterated anew each time, such as a list, or a function of the "
            f"epoch, got {type(validation).__name__}"
        )
    if mode not in ("min", "max"):
        raise ValueError(f'mode: expected "min" or "max", got {mode!r}')
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks: expected functions of a Report, got {callback!r}")
    if logger is not None and not callable(getattr(logger, "log", None)):
        raise TypeError(f"logger: expected an object with log(step, scalars), such as CSVLogger(path), got {logger!r}")
    if not min_delta >= 0:
        raise ValueError(f"min_delta: expected zero or more, got {min_delta}")
