"""Train SISMA: ``python -m recipes.sisma.train [preset] [key=value ...]``.

    python -m recipes.sisma.train                                   # quick: drawn faces, for about 6 minutes
    python -m recipes.sisma.train faces data=PREPARED
    python -m recipes.sisma.train quick run=runs/mine steps=3000 seed=1
    python -m recipes.sisma.train quick run=runs/mine resume=auto

The run's folder receives ``config.yaml``, ``labels.json``, ``source.json``, ``log.jsonl``, ``samples/*.png``,
``checkpoints/step-*/``, ``result.json`` and the files of ``tracker=``. ``python -m recipes.sisma.watch run=RUN`` shows
it in a browser.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.sisma.arguments import UsageError, command_line, flat, from_command_line, run_command
from recipes.sisma.evaluation.measure import load_named_parser
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.evaluation.trained_run import evaluate_run
from recipes.sisma.pairs import (
    EncodedPairs,
    check_pairs,
    encoded_pairs,
    first_held_out,
    load_autoencoder,
    training_pairs,
)
from recipes.sisma.presets import PRESETS, Config, Presets, preset, sides_of
from recipes.sisma.runs import (
    all_processes,
    as_pipeline,
    check_writable,
    load_config,
    new_model,
    save_config,
    save_labels,
    save_source,
)
from recipes.sisma.sheets import samples_of, save_mask_sheet
from recipes.sisma.told import told_sampling
from ssmgen import build
from ssmgen.data import CELEBAMASK19, LabelSet
from ssmgen.ops import backends
from ssmgen.signals import exit_status, say
from ssmgen.training import (
    TrainResult,
    checkpoints,
    find_checkpoint,
    read_state,
    run_lock,
    seconds_per_step,
    settle_precision,
    train,
)
from ssmgen.training.resume import check_lost

# Settings that may differ between a run and its continuation: training steps do not depend on them, except by rounding.
_FREE = {
    *("recipe", "preset", "run", "resume", "steps", "minutes", "cache", "rebuild_cache"),
    *("checkpoint_every", "keep_checkpoints", "log_every"),
    *("shard", "checkpoint_activations", "compile", "num_workers", "tracker", "sample_every"),
    *("evaluate", "evaluate_masks", "parser"),
    *("solver", "solver_steps", "shift", "guidance_scale", "guidance_start", "shared_noise"),
    *("data", "autoencoder_source"),  # compared by content, not by path
}
#: With fewer steps the faces hardly follow their masks; with more, the small network of `quick` gains little.
LEAST, MOST = 400, 1300
# Measurements on one machine differ by some percent; rounded, they mostly give the same number.
_MULTIPLE = 50
_SHEET_MASKS, _SHEET_SAMPLES = 6, 4


def main(argv: list[str], presets: Presets = PRESETS) -> int | None:
    """Train a preset, then evaluate it; returns the status if stopped. All checks come before anything is written.

    Args:
        argv: ``[preset] [key=value ...]``.
        presets: those of the recipe by name, of which the first is the default.
    """
    with ExitStack() as owned:
        return _train_and_evaluate(argv, presets, owned)


def _train_and_evaluate(argv: list[str], presets: Presets, owned: ExitStack) -> int | None:
    """`main`; the main process keeps the lock of the run's folder in ``owned``."""
    config = continued(parse(argv, presets))
    settings = config.with_steps(config.train.steps or most_steps(config)).train
    run = Path(config.run)
    labels = check_pairs(config)
    autoencoder = load_autoencoder(config)
    torch.manual_seed(config.train.seed)
    model = new_model(config, autoencoder, labels)
    check_config(config, model, autoencoder, labels)
    resume = None if config.resume == "no" else config.resume
    processes = all_processes()
    settings = settle_precision(settings, run, resume, processes)
    config.train.precision = settings.precision
    done = 0
    with processes.main_process_first():
        if processes.is_main_process:
            done = check_run_folder(config, _record(config, autoencoder), owned)
        data = encoded_pairs(config, autoencoder.to(processes.device), processes.is_local_main_process)
    objective = build(config.objective, t_sampling=config.t_sampling)
    measure = partial(seconds_per_step, model, objective, data, settings)
    config = choose_steps(config, measure, quiet=not processes.is_main_process)
    settings, record = config.train, _record(config, autoencoder)
    if processes.is_main_process:
        if not done:
            _report_new_start(config, run)
        save_config(config, run / "config.yaml")
        save_labels(labels, run)
        save_source(config, run)
        _announce(config, model, data, processes.num_processes)
    draw = _Sheets(run, config, autoencoder, labels) if config.sample_every else None
    result = train(model, objective, data, settings, run, record=record, resume=resume, on_step=draw)
    if result.interrupted:
        if processes.is_main_process:
            launcher = " the same launcher and" if processes.num_processes > 1 else ""
            say(f"stopped at step {result.step}; continue with{launcher}: {_continue(argv, config.recipe)}")
        return exit_status(result.signal)
    if not processes.is_main_process:
        return None
    trained = f"trained {run} to step {result.step} in {result.seconds:.0f} s"
    complete = f"{run} is at step {result.step} already: nothing to train"
    print((trained if done < result.step else complete) + _unusual(result))
    if config.evaluate:
        evaluate_run(
            run, Settings(), seconds=result.seconds, command=command_line("train", *argv, recipe=config.recipe)
        )
    return None


def parse(argv: list[str], presets: Presets = PRESETS) -> Config:
    """Parse ``[preset] [key=value ...]`` into the settings of a run."""
    named = argv[:1] and "=" not in argv[0] and not argv[0].startswith("-")
    name, words = (argv[0], argv[1:]) if named else (next(iter(presets)), argv)
    plain = preset(name, presets)
    config = from_command_line(plain, words)
    if config.preset != name:
        raise UsageError(f"preset={config.preset}: name the preset as the first word instead")
    if config.recipe != plain.recipe:
        raise UsageError(f"recipe={config.recipe}: run python -m {config.recipe}.train instead")
    return config


def continued(config: Config) -> Config:
    """The settings, completed from the run they continue: its number of steps if left open, its cosine if longer.

    Raises:
        UsageError: ``steps`` is left open without ``minutes``, or the run to continue does not tell its number.
    """
    run = Path(config.run) if config.resume in ("no", "auto") else Path(config.resume).parent.parent
    known = config.resume != "no" and (run / "config.yaml").is_file()
    steps = config.train.steps
    if steps:
        if known and config.train.lr_decay_steps is None:  # who wants fewer steps does not ask for another schedule
            cosine = max(steps, load_config(run).train.lr_decay_steps or 0)
            config = replace(config, train=replace(config.train, lr_decay_steps=cosine))
        return config.with_steps(steps)
    if config.minutes <= 0:
        raise UsageError(f"steps must be positive, or 0 with minutes= to train for; got minutes={config.minutes:g}")
    if known:
        return config.with_steps(load_config(run).train.steps)
    if config.resume != "no" and (config.resume != "auto" or checkpoints(run / "checkpoints")):
        raise UsageError(f"{run / 'config.yaml'}: not found, so the run's number of steps is not known: give steps=")
    return config


def most_steps(config: Config) -> int:
    """The largest number that may be chosen: a cosine that is to end earlier is not trained beyond."""
    end = config.train.lr_decay_steps or 0
    return min(MOST, end) if end > 0 else MOST


def choose_steps(config: Config, measure: Callable[[], float], *, quiet: bool = False) -> Config:
    """The settings with a number of steps: their own, or as many as fit in ``minutes``, which a measured step tells."""
    if config.train.steps:
        return config
    seconds = measure()
    fitting = int(60 * config.minutes / seconds) // _MULTIPLE * _MULTIPLE
    steps = min(max(fitting, LEAST), most_steps(config))
    if not quiet:
        say(f"measured {seconds:.2f} s a step: {_why(config, steps, fitting, seconds)}")
    return config.with_steps(steps)


def _why(config: Config, steps: int, fitting: int, seconds: float) -> str:
    if steps == fitting:
        return f"{steps} steps fit in {config.minutes:g} minutes"
    bound = f"the allowed {'maximum' if steps < fitting else 'minimum'}"
    if steps == most_steps(config) < MOST:
        bound = "as many as the cosine of the learning rate has"
    return f"{steps} steps, {bound}, take about {steps * seconds / 60:.1f} minutes ({config.minutes:g} were asked for)"


def check_config(config: Config, model: nn.Module, autoencoder: Any, labels: LabelSet = CELEBAMASK19) -> None:
    """Reject settings that would fail only after training.

    Raises:
        ValueError: a value out of range or one that does not suit the others, such as guidance without mask dropout.
        FileNotFoundError: no such parser.
        ImportError: the solver needs a missing package; names the extra.
    """
    multiple = autoencoder.factor * model.multiple
    if any(side % multiple for side in sides_of(config.size)):
        given = config.image_size
        raise ValueError(f"image_size must be a multiple of {multiple} (autoencoder x model), got {given}")
    if not 0 <= config.balance <= 1:
        raise ValueError(f"balance is a share of the masks, in [0, 1], got {config.balance}")
    for key in ("class_weighting", "mirrored_weighting"):
        if not 0 <= getattr(config, key) < math.inf:
            raise ValueError(f"{key} must be a number from 0 on, got {getattr(config, key)}")
    build(config.objective, t_sampling=config.t_sampling)  # checks both
    if not config.run:
        raise ValueError("run= is empty: name the run's folder")
    if config.evaluate and config.evaluate_masks < 2:
        raise ValueError(f"evaluate_masks must be at least 2, got {config.evaluate_masks}")
    told_sampling(config.sampling, model).guidances(list(model.conditions), model.conditions)
    build(config.sampling.solver)  # it may need a package
    if config.evaluate and (parser := load_named_parser(config.parser, labels)):
        parser.check(labels, config.size)


def check_run_folder(config: Config, record: dict[str, Any], owned: ExitStack) -> int:
    """Create and own the run's folder, or reject it before any work is done; the number of steps that it has already.

    Raises:
        RunLockError: another training owns it.
        OSError: a file, a folder that cannot be written to or holds another run, or ``resume`` is not a folder.
        CheckpointError, ValueError: it cannot be continued with this record, or has more steps than ``steps``.
    """
    run, resume, steps = Path(config.run), config.resume, config.train.steps
    if run.is_file():
        raise FileExistsError(f"{run}: is a file; run= names a folder")
    named = resume not in ("no", "auto")
    if named and not Path(resume).is_dir():
        raise FileNotFoundError(f"resume={resume}: not found; expected 'auto', 'no' or a checkpoint's folder")
    owned.enter_context(run_lock(run))  # before it is looked at: another training may be about to end
    taken = (run / "log.jsonl").exists() or (run / "checkpoints").exists()
    if named and taken and run.resolve() not in Path(resume).resolve().parents:
        raise FileExistsError(f"{run}: already holds a run, and {resume} is another's: choose another run=FOLDER")
    if resume == "no" and taken:
        raise FileExistsError(f"{run}: already holds a run; continue it with resume=auto or choose another run=FOLDER")
    check_writable(run)
    found = find_checkpoint(run, None if resume == "no" else resume, record)
    if found is None and resume == "auto":
        check_lost(run, config.train.checkpoint_every)
    done = read_state(found)["step"] if found else 0
    if done > steps:
        raise ValueError(f"{found}: the run is at step {done} already, beyond steps={steps}: give steps={done} or more")
    return done


def _report_new_start(config: Config, run: Path) -> None:
    """Say that a run to continue begins at step 0, and which settings differ from those before."""
    if not (run / "config.yaml").is_file():
        if config.resume == "auto" and not (run / "log.jsonl").exists():  # the loop says that of a log
            say(f"{run}: no run there yet, training begins at step 0")
        return
    before, now = flat(load_config(run)), flat(config)
    changed = [key for key in now if key not in _FREE and before[key] != now[key]]
    listed = "; ".join(f"{key}: {before[key]!r} before, {now[key]!r} now" for key in changed)
    with_what = f"with other settings ({listed})" if changed else "with the same settings"
    say(f"{run}: has no checkpoint, so training begins at step 0 {with_what}")


def _record(config: Config, autoencoder: Any) -> dict[str, Any]:
    """The settings that a continuation must share, because a training step depends on them."""
    settings = {key: value for key, value in flat(config).items() if key not in _FREE}
    if config.objective == "flow-matching":
        del settings["objective"]  # runs that began before there was a choice do not record it
    for key in ("style", "words"):  # likewise
        if not settings[key]:
            del settings[key]
    return settings | {"autoencoder": autoencoder.describe(), "source": training_pairs(config).fingerprint()}


def _announce(config: Config, model: nn.Module, data: EncodedPairs, processes: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scan = next(f"{name} ({status.detail})" for name, status in backends().items() if device in status.auto_for)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    changed = f" {config.model_args}" if config.model_args else ""
    repeated = " (rare classes repeated)" if config.balance else ""
    say(
        f"preset {config.preset}: {config.model}{changed}, {millions:.2f} M parameters, "
        f"{len(data)} examples an epoch{repeated}, {config.train.steps} steps of {config.train.batch_size}, "
        f"run {config.run}\n"
        f"scan backend on {device}: {scan}"
    )
    each = "a part of the model (FSDP2)" if config.train.shard else "the whole model"
    if processes > 1:
        say(f"{processes} processes, each with {each} and {config.train.batch_size // processes} examples of a step")
    elif config.train.shard:
        say("shard=true has no effect in a single process")
    if isinstance(config.size, list):
        _announce_sizes(config.size, data.sizes(), config.train.batch_size)


def _announce_sizes(buckets: list[tuple[int, int]], found: dict[tuple[int, int], int], batch_size: int) -> None:
    """Say how many examples each size has, and warn of sizes with fewer than a batch."""
    counts = {f"{height}x{width}": found.get((height, width), 0) for height, width in buckets}
    say("examples by size: " + ", ".join(f"{size}: {count}" for size, count in counts.items()))
    rare = [size for size, count in counts.items() if 0 < count < batch_size]
    if rare:
        say(
            f"warning: {', '.join(rare)}: fewer examples than a batch of {batch_size}, so every batch of such a size "
            "shows some of them more than once. Leave the size out of image_size=; ssmgen.data.frequent_buckets finds "
            "those that fill a batch"
        )


def _unusual(result: TrainResult) -> str:
    skipped = f"; {result.skipped} steps were skipped because the loss or gradient was not finite"
    spikes = f"; the loss was a spike in {result.spikes} steps"
    return (skipped if result.skipped else "") + (spikes if result.spikes else "")


class _Sheets:
    """A callback that writes samples of the same masks and seeds every ``sample_every`` steps."""

    def __init__(self, run: Path, config: Config, autoencoder: Any, labels: LabelSet) -> None:
        self.folder, self.config, self.autoencoder, self.labels = run / "samples", config, autoencoder, labels
        self.real, self.masks = first_held_out(config, _SHEET_MASKS)
        self.seeds = [[100 * row + column for column in range(_SHEET_SAMPLES)] for row in range(len(self.masks))]

    def due(self, step: int) -> bool:
        """Whether there is a sheet of this step."""
        every, last = self.config.sample_every, self.config.train.steps
        return bool(every) and step > 0 and (step % every == 0 or step == last)  # type: ignore[operator]

    def __call__(self, step: int, model: nn.Module) -> Path | None:
        file = self.folder / f"step-{step:06d}.png"
        if file.exists():
            return file
        pipe = as_pipeline(self.config, model, self.autoencoder.to(next(model.parameters()).device), self.labels)
        groups = samples_of(pipe, self.masks, self.seeds)
        save_mask_sheet(file, self.masks, groups, self.real, self.labels)
        return file


def _continue(argv: list[str], recipe: str) -> str:
    kept = (word for word in argv if not word.startswith("resume="))
    return command_line("train", *kept, "resume=auto", recipe=recipe)


if __name__ == "__main__":
    run_command(main)
