"""`exaone-jax train`: the loop, and what happens to it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import yaml
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from exaone_jax.checkpoints.atomic import replace_file, storage_errors
from exaone_jax.checkpoints.convert import save_hf
from exaone_jax.checkpoints.names import totals
from exaone_jax.config.run import HostsConfig, RunConfig, dump_run
from exaone_jax.costs.flops import step_flops
from exaone_jax.costs.memory import program_bytes
from exaone_jax.costs.workload import workload
from exaone_jax.data.packing import PackedRows
from exaone_jax.errors import CheckpointError, ConfigError
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.text import complete
from exaone_jax.parallel import hosts
from exaone_jax.training import report
from exaone_jax.training.faults import Stop, TrainingError, Watchdog, check_replicas, locked
from exaone_jax.training.lora import merged, save_adapter
from exaone_jax.training.report import Clock, Face
from exaone_jax.training.saves import (
    DamagedStep,
    Saver,
    parameters_sha256,
    read_step,
    saved_steps,
    set_aside,
    step_folder,
    sweep,
)
from exaone_jax.training.setup import (
    Setup,
    Stage,
    abstract_batch,
    device_batches,
    evaluation_batches,
    initial_state,
    set_up,
)
from exaone_jax.training.step import StepMetrics, TrainState, awake, evaluate, train_step, trained_model
from exaone_jax.training.trackers import open_trackers

CHECKPOINTS, CONFIG, STACKS, PROFILE, TOKENIZER = "checkpoints", "config.yaml", "stacks", "profile", "tokenizer"
ADAPTER = "adapter"
_STOP, _SAVE = 0, 1  # the questions that every device is asked at every step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """steps: taken in all. loss: of the last step. stopped: whether a signal ended the run early."""

    steps: int
    loss: float
    sha256: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step, the step-th of the run, that the devices were told to take."""

    step: int
    stage: Stage
    metrics: StepMetrics
    first: bool  # of its shape: it was compiled


def train(config: RunConfig, *, strict_resume: bool = False) -> Outcome:
    """Train, or go on training, in `config.run_dir`.

    Raises:
        ConfigError, CheckpointError, InputError, StorageError: before the first step, where the run cannot be.
        TrainingError: a loss that is not finite, or copies of parameters that differ.
    """
    clock = Clock()
    with clock.phase("init"):
        _join_hosts(config)
        run_dir, first = Path(config.run_dir), jax.process_index() == 0
    with locked(run_dir) if first else contextlib.nullcontext():
        with clock.phase("init"):
            setup = set_up(config)
            if config.export is not None and jax.process_count() > 1:
                raise ConfigError(
                    "export: needs a run of one process; `exaone-jax convert to-hf` exports any saved step"
                )
            trackers = open_trackers(config.trackers, run_dir, config.model_dump(mode="json")) if first else []
            face = Face(run_dir, trackers, speaks=first, total=config.steps)
        try:
            return _Run(setup, face, clock, run_dir).go(strict_resume)
        finally:
            face.close()


def dry_run(config: RunConfig) -> dict[str, int]:
    """Bytes of one device that each stage's step takes, the largest of them: compiled, and nothing allocated or written."""
    _join_hosts(config)
    setup = set_up(config)
    found: dict[str, int] = {}
    for stage in setup.stages:
        asked = jax.ShapeDtypeStruct((setup.mesh.size, 2), np.bool_, sharding=_asked_sharding(setup))
        lowered = train_step.lower(
            setup.graphdef, setup.like, abstract_batch(stage, setup.mesh), asked, **setup.step_arguments()
        )
        program = lowered.compile()
        stats, total = program.memory_analysis(), program_bytes(program)
        arguments = 0 if stats is None else stats.argument_size_in_bytes
        sizes = {"arguments": arguments, "temporaries": total - arguments, "total": total}
        found = max(found, sizes, key=lambda sizes: sizes.get("total", 0))
    return found


def _join_hosts(config: RunConfig) -> None:
    if config.hosts is None:
        return
    if isinstance(config.hosts, HostsConfig):
        hosts.start(hosts.Hosts(**config.hosts.model_dump()))
    else:
        hosts.start()


def _asked_sharding(setup: Setup) -> NamedSharding:
    return NamedSharding(setup.mesh, PartitionSpec(setup.mesh.axis_names))


class _Run:
    """One process's part in a run."""

    def __init__(self, setup: Setup, face: Face, clock: Clock, run_dir: Path):
        self.setup, self.config, self.face, self.clock, self.run_dir = setup, setup.config, face, clock, run_dir
        self.folder = run_dir / CHECKPOINTS
        self.stop, self.first_step, self.taken, self.lost = Stop(), 0, 0, 0
        self.watchdog = Watchdog(self.config.guard.hang_seconds, run_dir / f"{STACKS}-{jax.process_index()}.txt")
        self.ending: Literal["stopped", "halted"] | None = None
        self.good_step, self.halt, self.wants_save, self.profiling = 0, "", False, False
        self.last_loss, self.last_look = math.nan, time.perf_counter()
        self.last_save, self.saved_step = time.monotonic(), -1
        self.held_out: list[PackedRows] | None = None
        chip = report.chip_here(setup.mesh.devices.flat[0])
        self.peak = None if chip is None else chip.flops / chip.devices
        self.flops = {stage.start: self._model_flops(stage) for stage in setup.stages}

    def go(self, strict_resume: bool) -> Outcome:
        with self.clock.phase("init"):
            self.base = None if self.config.lora is None else initial_state(self.setup)
            identity = self.setup.identity if self.base is None else self.setup.identity_beside(self.base.frozen)
            self.saver = Saver(self.folder, identity, self._files(), self.config.save.keep, self._on_save)
        state, self.base = self._first_state(strict_resume), None  # the first step takes its arrays over
        self._write_config()
        self._say_what_is_done(state)
        try:
            with self.stop.installed(), self.watchdog.watching(), self.face.live(self.first_step):
                state = self._train(state)
            return self._finish(state)
        finally:
            self.watchdog.rest()
            self.saver.wait()
            self.face.event("goodput", self.clock.report(self.lost, self.taken))

    def _write_config(self) -> None:
        """And say what is no longer as it was when the run began."""
        if jax.process_index() != 0:
            return
        path, text = self.run_dir / CONFIG, dump_run(self.config)
        if self.first_step:
            with storage_errors(str(path)):
                before, now = yaml.safe_load(path.read_text()), yaml.safe_load(text)
            changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
            if changed:
                self.face.say(f"changed since: {', '.join(changed)}")
        replace_file(path, text.encode())

    def _files(self) -> dict[str, Path]:
        """The tokenizer's, to go along with every saved step."""
        if self.setup.files:
            return self.setup.files
        folder = self.run_dir / TOKENIZER
        if jax.process_index() == 0:
            with storage_errors(str(folder)):
                folder.mkdir(exist_ok=True)
                self.setup.tokenizer.save(folder)
        return {path.name: path for path in folder.iterdir()} if jax.process_index() == 0 else {}

    def _first_state(self, strict: bool) -> TrainState:
        """That of the last good saved step, or of step 0 where none was ever saved."""
        if jax.process_index() == 0:
            sweep(self.folder)
        _meet("swept")
        before = [line["step"] for line in self.face.metrics.read() if "loss" in line]
        steps = saved_steps(self.folder)
        for step in steps:
            with self.clock.phase("restore"):
                state = self._restored(step, strict)
            if state is not None:
                self.first_step, self.saved_step = step, step
                self.lost = max(0, max(before, default=0) - step)
                again = f"; {self.lost} steps after it are taken again" if self.lost else ""
                self.face.say(f"going on from {step_folder(self.folder, step)}{again}")
                self.face.event("resumed", {"step": step, "lost_steps": self.lost})
                return state
        self._refuse_to_start_over(steps)
        with self.clock.phase("init"):
            state = self.base or initial_state(self.setup)
            jax.block_until_ready(state)
        self.face.event("started", {"step": 0})
        return state

    def _restored(self, step: int, strict: bool) -> TrainState | None:
        """None where the step is damaged: it is set aside then. Every process comes to the same verdict."""
        folder, problem, state = step_folder(self.folder, step), "", None
        try:
            state = read_step(folder, self.setup.like, self.saver.identity)
            if self.base is not None:
                state = dataclasses.replace(state, frozen=self.base.frozen)
        except DamagedStep as error:
            problem = str(error)
        if not _anywhere(bool(problem)):
            return state
        problem = problem or "another process found it damaged"
        if strict:
            raise CheckpointError(f"{problem}; without --strict-resume the run falls back to the step saved before")
        _meet("damaged")
        if jax.process_index() == 0:
            aside = set_aside(folder)
            self.face.say(f"warning: {problem}")
            self.face.say(f"warning: step {step} is damaged and now at {aside}; falling back to the step saved before")
            self.face.event("damaged", {"step": step, "problem": problem})
        _meet("set aside")
        return None

    def _refuse_to_start_over(self, steps: list[int]) -> None:
        """A run that has saved steps never starts from scratch unasked."""
        known = [line["step"] for line in self.face.events.read() if line["event"] == "saved"]
        aside = sorted(path.name for path in self.folder.glob("*.corrupt-*")) if self.folder.is_dir() else []
        if _anywhere(bool(steps or known or aside)):
            raise CheckpointError(
                f"{self.folder}: steps were saved and none of them can be read ({', '.join(aside) or 'all are gone'}); "
                "expected a good one. Training does not start over by itself: give another run_dir"
            )

    def _say_what_is_done(self, state: TrainState) -> None:
        count = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.router_biases)))
        where = f"on {self.setup.mesh.size} devices, {jax.process_count()} processes"
        if self.config.lora is None:
            self.face.say(f"{count:,} parameters {where}")
        else:
            trained, whole = (
                sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                totals(self.setup.model).parameters,
            )
            self.face.say(
                f"{trained:,} parameters of adapters are trained, {trained / whole:.2%} of the model's {whole:,}, {where}"
            )
        for stage in self.setup.stages:
            self.face.say(
                f"steps {stage.start} to {stage.stop}: {stage.batch_size} rows of {stage.context} tokens; the data has "
                f"{stage.rows.rows_per_epoch:,} rows and is read {stage.epochs:.2f} times"
            )

    def _train(self, state: TrainState) -> TrainState:
        end = min(self.config.steps, self.config.stop_after or self.config.steps)
        step, pending, stage, batches = self.first_step, None, None, iter(())
        self.last_look = time.perf_counter()
        while step < end and self.ending is None:
            if first := stage is not (now := self.setup.stage_of(step)):
                stage, batches = now, device_batches(now, self.setup.mesh, step)
                self.watchdog.rest()
            self._profile(step)
            with self.clock.phase("data"):
                batch = next(batches)
            with self.clock.phase("compile" if first else "step"):
                state, metrics = train_step(
                    self.setup.graphdef, state, batch, self._asked(), **self.setup.step_arguments()
                )
            step += 1
            self._look(pending)  # at the step before, while the devices are at this one
            pending = _Pending(step, now, metrics, first)
            if first or self.wants_save or self._on_the_way(step, end):
                self._look(pending)
                pending = None
                self._by_the_way(state, step, end)
        self._look(pending)
        if self.profiling:
            self._profile(end)
        self._end(state, step)
        return state

    def _look(self, pending: _Pending | None) -> None:
        """Wait for a step, show it, and hear what the processes ask for."""
        if pending is None:
            return
        with self.clock.phase("compile" if pending.first else "step"):
            metrics: StepMetrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self.last_look = now - self.last_look, now
        self.watchdog.beat()
        if metrics.halted:
            if self.ending is None:
                self.ending, self.good_step = "halted", pending.step - 1
                self.halt = f"loss {metrics.loss.loss}, gradient norm {metrics.grad_norm}"
            return
        self.taken += 1
        self.last_loss = float(metrics.loss.loss)
        if metrics.skipped:
            self.face.say(f"warning: step {pending.step} was skipped: loss {metrics.loss.loss:.4f}")
            self.face.event("skipped", {"step": pending.step, "loss": str(metrics.loss.loss)})
        self.face.step(self._figures(pending, metrics, seconds))
        answers = metrics.asked
        if answers is not None and answers[_STOP] and self.ending is None:
            self.ending = "stopped"
        self.wants_save = answers is not None and bool(answers[_SAVE])

    def _figures(self, pending: _Pending, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
        stage, devices = pending.stage, self.setup.mesh.size
        speed = stage.batch_size * stage.context / seconds / devices
        flops = self.flops[stage.start] / seconds / devices
        loss = metrics.loss
        optional = {"mtp_loss": loss.mtp_loss, "balance_loss": loss.balance_loss}
        return {
            "step": pending.step,
            "loss": float(loss.loss),
            **{name: float(value) for name, value in optional.items() if value is not None},
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": int(loss.tokens),
            "skipped": bool(metrics.skipped),
            "tokens_per_second_per_device": speed,
            "tflops_per_second_per_device": flops / 1e12,
            "mfu": None if self.peak is None else flops / self.peak,
            "memory_bytes": report.peak_memory(self.setup.mesh.local_devices[0]),
            "seconds": seconds,
            **report.expert_figures(None if loss.expert_load is None else np.asarray(loss.expert_load)),
        }

    def _model_flops(self, stage: Stage) -> int:
        """Of one of its steps."""
        remat, lora = self.setup.loss.remat, self.config.lora
        work = workload(self.setup.model, "train", stage.batch_size, stage.context, remat=remat, lora=lora)
        return step_flops(self.setup.model, work).model

    def _asked(self) -> jax.Array:
        """What this process asks all for, on each of its devices: to stop, to save."""
        minutes = self.config.save.minutes
        late = minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        row = np.array([[self.stop.signal is not None, late and jax.process_index() == 0]])
        return jax.make_array_from_callback((self.setup.mesh.size, 2), _asked_sharding(self.setup), lambda _: row)

    def _on_the_way(self, step: int, end: int) -> bool:
        """Whether something is to be done with the state after this step."""
        run = self.config
        samples = None if run.sample is None else run.sample.every
        every = (run.save.every, run.guard.checksum_every, run.evaluate.every, samples)
        return step < end and any(n is not None and step % n == 0 for n in every)

    def _by_the_way(self, state: TrainState, step: int, end: int) -> None:
        run = self.config

        def due(every: int | None) -> bool:
            return every is not None and step % every == 0 and step < end and self.ending is None

        self.watchdog.rest()
        if due(run.guard.checksum_every):
            self._check_replicas(state)
        if due(run.save.every) or (self.wants_save and self.ending is None):
            self._save(state, step)
        if due(run.evaluate.every):
            self._evaluate(state, step)
        if run.sample is not None and due(run.sample.every):
            self._sample(state, step)
        self.last_look = time.perf_counter()
        self.watchdog.beat()

    def _check_replicas(self, state: TrainState) -> None:
        if self.config.guard.checksum_every is not None:
            check_replicas(state, self.setup.mesh)

    def _save(self, state: TrainState, step: int) -> None:
        self._check_replicas(state)
        with self.clock.phase("save"):
            self.saver.save(state, step)
        self.last_save, self.saved_step, self.wants_save = time.monotonic(), step, False

    def _on_save(self, event: str, facts: Mapping[str, Any]) -> None:
        self.face.event(event, facts)
        if event == "not saved":
            self.saved_step = -1
            self.face.say(f"warning: step {facts['step']} was not saved: {facts['error']}")

    def _evaluate(self, state: TrainState, step: int) -> None:
        with self.clock.phase("evaluate"):
            if self.held_out is None:
                self.held_out = evaluation_batches(self.setup)
            found = evaluate(self.setup.graphdef, _averaged(state), self.held_out)
        figures = {"loss": found.loss} | ({} if found.mtp_loss is None else {"mtp_loss": found.mtp_loss})
        self.face.figures(step, "evaluation", figures)

    def _sample(self, state: TrainState, step: int) -> None:
        sample = self.config.sample
        if sample is None:
            return
        with self.clock.phase("sample"):
            model = trained_model(self.setup.graphdef, _averaged(state))
            params = SamplingParams(max_new_tokens=sample.max_new_tokens)
            found = complete(model, self.setup.tokenizer, list(sample.prompts), params)
        for prompt, completion in zip(sample.prompts, found, strict=True):
            self.face.text(step, "sample", f"{prompt!r} -> {completion.text!r}")

    def _profile(self, step: int) -> None:
        if self.config.profile_steps is None:
            return
        first, stop = self.config.profile_steps
        if first <= step < stop and not self.profiling:
            jax.profiler.start_trace(str(self.run_dir / PROFILE))
            self.profiling = True
        elif step >= stop and self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False
            self.face.say(f"profile of steps {first} to {stop} in {self.run_dir / PROFILE}")

    def _end(self, state: TrainState, step: int) -> None:
        """The last save, which must not fail."""
        self.watchdog.rest()
        if self.ending == "halted":
            step, state = self.good_step, awake(state)
        if step != self.saved_step and step > 0:
            self._save(state, step)
        with self.clock.phase("save"):
            if (error := self.saver.wait()) is not None:
                raise error
        if self.ending == "halted":
            saved = f"step {step} is saved in {self.folder}" if step else "no step was taken"
            raise TrainingError(
                f"step {step + 1} is not finite: {self.halt}; {saved}. Look at its data and learning rate; "
                "guard.nonfinite=skip goes on without such steps"
            )

    def _finish(self, state: TrainState) -> Outcome:
        """What a run leaves when it is done, or stopped."""
        step, stopped = self.saved_step, self.ending == "stopped"
        if not stopped:
            if self.config.data.eval_sources:
                self._evaluate(state, step)
            self._write_adapter(state)
            self._export(state)
        if jax.process_index() == 0:
            report.draw_curve(self.face.metrics, self.run_dir / report.CURVE, self.setup.model.vocab_size)
        if stopped:
            self.face.say(f"stopped after step {step}, which is saved; the same command goes on from it")
        outcome = Outcome(step, self._final_loss(), parameters_sha256(state), stopped)
        self.face.say(f"final loss {outcome.loss!r} sha256 {outcome.sha256}")
        return outcome

    def _final_loss(self) -> float:
        """Of the last step taken, also where that was in an earlier process."""
        if not math.isnan(self.last_loss):
            return self.last_loss
        return next((line["loss"] for line in reversed(self.face.metrics.read()) if "loss" in line), math.nan)

    def _write_adapter(self, state: TrainState) -> None:
        """For PEFT."""
        if self.config.lora is None or self.config.steps != self.saved_step:
            return
        folder, everywhere = self.run_dir / ADAPTER, NamedSharding(self.setup.mesh, PartitionSpec())
        with self.clock.phase("save"):
            whole = jax.device_put(_averaged(state).params, everywhere)
            if jax.process_index() == 0:
                save_adapter(whole, self.setup.model, self.config.lora, folder, str(self.config.init_from))
        self.face.say(f"adapter in {folder}")

    def _export(self, state: TrainState) -> None:
        if self.config.export is None or self.config.steps != self.saved_step:
            return
        params = nnx.state(trained_model(self.setup.graphdef, _averaged(state)))
        if self.config.lora is not None:
            params = merged(self.setup.graphdef, _averaged(state).model, self.setup.model.dtype)
        files = self.config.tokenizer if self.setup.files and self.config.tokenizer else self.config.init_from
        extra = Path(files) if self.setup.files and files else self.run_dir / TOKENIZER
        with self.clock.phase("save"):
            save_hf(params, self.setup.model, self.config.export, extra_files_from=extra, overwrite=True)
        self.face.say(f"exported to {self.config.export}")


def _averaged(state: TrainState) -> TrainState:
    """With the average of the parameters in their place, where one is kept."""
    return state if state.ema is None else dataclasses.replace(state, params=state.ema)


def _anywhere(flag: bool) -> bool:
    """Whether any process says so."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
