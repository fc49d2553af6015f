"""Run an experiment: ``python -m benchmarks.fidelity EXPERIMENT [--seeds 0 1 2] [--variants NAME ...]``.

    python -m benchmarks.fidelity                        # what there is
    python -m benchmarks.fidelity mask-entry             # three seeds of every variant, one after another
    python -m benchmarks.fidelity ways-in --stages 3     # not to the end: a later call goes on from there
    python -m benchmarks.fidelity.report                 # docs/fidelity.md from the results

Equal time needs measured step times:

    python -m benchmarks.fidelity ways-in --seeds 0 1 2 3 4
    python -m benchmarks.fidelity.step_time ways-in
    python -m benchmarks.fidelity ways-in-time --seeds 0 1 2 3 4

Every variant is a preset of recipes.sisma.train with a few settings changed, trained and measured on unseen masks. Real
faces want to be told where they are:

    python -m benchmarks.fidelity faces --words data=PREPARED autoencoder_source=TAESD parser=PARSER \\
        --measure proxy=SQUEEZENET

What is done is not done again: stopped at any point and given again, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.fidelity.variants  # noqa: F401  (registers the models)
from benchmarks.fidelity.experiment import Experiment
from benchmarks.fidelity.experiments import EXPERIMENTS
from benchmarks.timing import RESULTS
from recipes.sisma import evaluate, train
from ssmgen.registry import closest
from ssmgen.training import checkpoints, verify_checkpoint

FOLDER = RESULTS / "fidelity"
_KEPT = (
    "mask_agreement",
    "ceiling",
    "autoencoder_ceiling",
    "floor",
    "floor_to_ceiling",
    "consistency",
    "diversity",
    "distances",
    "nearest",
    "seconds",
)
_PROVENANCE = ("sampling", "parameters", "masks", "commit", "seed", "versions", "hardware")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="all where not given")
    parser.add_argument("--stages", type=int, help="only so many of the first stages; all where not given")
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"), help="folder of the training runs")
    parser.add_argument("--words", nargs="+", default=[], metavar="KEY=VALUE", help="of recipes.sisma.train: data=...")
    parser.add_argument("--measure", nargs="+", default=[], metavar="KEY=VALUE", help="of recipes.sisma.evaluate")
    arguments = parser.parse_args()
    if arguments.experiment is None:
        print("\n".join(f"{name}: {e.question}\n    {' | '.join(e.variants)}" for name, e in EXPERIMENTS.items()))
        return
    if arguments.stages is not None and arguments.stages < 1:
        parser.error(f"--stages must be at least 1, got {arguments.stages}")
    experiment = _known(arguments.experiment, EXPERIMENTS, parser)
    chosen = arguments.variants or list(experiment.variants)
    for name in chosen:
        _known(name, experiment.variants, parser)
    if untimed := experiment.untimed(chosen):
        timing = f"python -m benchmarks.fidelity.step_time {experiment.timed_by}"
        parser.error(f"the steps of {', '.join(untimed)} follow from step times, which are not measured: {timing}")
    for seed in arguments.seeds:
        for name in chosen:
            file = result_file(arguments.experiment, name, seed)
            stages = experiment.stages_of(name)[: arguments.stages]
            if _is_measured(file, stages):
                print(f"{file.name}: done before", file=sys.stderr)
                continue
            print(f"== {arguments.experiment}: {name}, seed {seed}", file=sys.stderr)
            try:
                folder = arguments.runs / arguments.experiment / file.stem
                result = run_variant(experiment, name, seed, folder, stages, arguments.words, arguments.measure)
            except KeyboardInterrupt:
                parser.exit(130, "stopped; the same command goes on from here\n")
            _write(file, result)


def run_variant(
    experiment: Experiment,
    name: str,
    seed: int,
    folder: Path,
    stages: Sequence[int],
    local: Sequence[str] = (),
    measure: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a variant stage by stage and measure it after each.

    Args:
        experiment: what is asked.
        name: of the variant.
        seed: of weights, order of the data and noise.
        folder: of its run. Variants that only sample otherwise share the run ``seed<seed>`` beside it.
        stages: steps after which it is measured: all of the experiment's, or the first of them.
        local: more words of recipes.sisma.train, which say where data and weights lie on this machine.
        measure: more words of recipes.sisma.evaluate.

    Raises:
        KeyboardInterrupt: the training was interrupted; its checkpoint is kept.
    """
    words = [*experiment.base, *experiment.variants[name]]
    given = experiment.variants[name]
    training, sampling = experiment.training(() if experiment.sampled else given), given if experiment.sampled else ()
    run = folder.with_name(f"seed{seed}") if experiment.sampled else folder
    result: dict[str, Any] = {"variant": name, "words": " ".join(words), "stages": {}}
    for steps in stages:
        measured = folder / f"result-{steps}.json"
        if not measured.exists():
            _train([*training, *local], experiment.stages_of(name)[-1], steps, seed, run)
            evaluate.main([f"run={run}", *sampling, *measure])
            folder.mkdir(exist_ok=True)
            (run / "result.json").rename(measured)
        whole = json.loads(measured.read_text())
        whole.get("nearest", {}).pop("images", None)  # every pair is more than a table needs
        result["stages"][steps] = {key: whole[key] for key in (*_KEPT, "commit") if key in whole}
        result |= {key: whole[key] for key in _PROVENANCE}
    return result


def _is_measured(file: Path, stages: Sequence[int]) -> bool:
    return file.exists() and {str(steps) for steps in stages} <= set(json.loads(file.read_text())["stages"])


def _is_trained(run: Path, steps: int) -> bool:
    return any(verify_checkpoint(path)["step"] >= steps for path in checkpoints(run / "checkpoints")[-1:])


def _train(words: list[str], last: int, steps: int, seed: int, run: Path) -> None:
    """Train up to ``steps`` of ``last``; a run that is there already is not trained again."""
    if _is_trained(run, steps):
        return
    words = [*words, f"seed={seed}", f"lr_decay_steps={last}", f"steps={steps}", "evaluate=false", "sample_every=0"]
    train.main([*words, f"run={run}", "resume=auto", f"cache={run.parents[1] / 'cache'}"])
    if not _is_trained(run, steps):
        raise KeyboardInterrupt(f"{run} was interrupted")


def result_file(experiment: str, variant: str, seed: int) -> Path:
    """Where the result of one run lies."""
    return FOLDER / experiment / f"{variant}-seed{seed}.json"


def _known(name: str, known: dict[str, Any], parser: argparse.ArgumentParser) -> Any:
    if name not in known:
        parser.error(f"unknown {name!r}{closest(name, known)} There are {', '.join(known)}.")
    return known[name]


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(file)


if __name__ == "__main__":
    main()
