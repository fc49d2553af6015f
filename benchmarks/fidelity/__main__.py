"""Run an experiment: ``python -m benchmarks.fidelity EXPERIMENT [--seeds 0 1 2] [--variants NAME ...]``.

    python -m benchmarks.fidelity                # what there is
    python -m benchmarks.fidelity mask-entry     # three seeds of every variant, one after another
    python -m benchmarks.fidelity.report         # docs/fidelity.md from the results

Every variant is the quick preset of recipes.sisma.train with a few settings changed, trained and measured on unseen
drawn masks. What is done is not done again: stopped at any point and given again, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmarks.fidelity.variants  # noqa: F401  (registers the models)
from benchmarks.fidelity.experiments import EXPERIMENTS, Experiment
from benchmarks.timing import RESULTS
from recipes.sisma import evaluate, train
from ssmgen.registry import closest
from ssmgen.training import checkpoints, verify_checkpoint

FOLDER = RESULTS / "fidelity"
_KEPT = ("mask_agreement", "ceiling", "autoencoder_ceiling", "floor", "floor_to_ceiling", "diversity", "seconds")
_PROVENANCE = ("sampling", "parameters", "masks", "commit", "seed", "versions", "hardware")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="all where not given")
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"), help="folder of the training runs")
    arguments = parser.parse_args()
    if arguments.experiment is None:
        print("\n".join(f"{name}: {e.question}\n    {' | '.join(e.variants)}" for name, e in EXPERIMENTS.items()))
        return
    experiment = _known(arguments.experiment, EXPERIMENTS, parser)
    chosen = arguments.variants or list(experiment.variants)
    for name in chosen:
        _known(name, experiment.variants, parser)
    for seed in arguments.seeds:
        for name in chosen:
            file = result_file(arguments.experiment, name, seed)
            if file.exists():
                print(f"{file.name}: done before", file=sys.stderr)
                continue
            print(f"== {arguments.experiment}: {name}, seed {seed}", file=sys.stderr)
            try:
                run = run_sampling if experiment.sampled else run_variant
                result = run(experiment, name, seed, arguments.runs / arguments.experiment / file.stem)
            except KeyboardInterrupt:
                parser.exit(130, "stopped; the same command goes on from here\n")
            _write(file, result)


def run_variant(experiment: Experiment, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a variant stage by stage and measure it after each.

    Raises:
        KeyboardInterrupt: the training was interrupted; its checkpoint is kept.
    """
    words = [*experiment.base, *experiment.variants[name]]
    result: dict[str, Any] = {"variant": name, "words": " ".join(words), "stages": {}}
    for steps in experiment.stages_of(name):
        measured = folder / f"result-{steps}.json"
        if not measured.exists():
            (folder / "result.json").unlink(missing_ok=True)
            _train(experiment, name, words, seed, folder, steps)
            if not (folder / "result.json").exists():
                raise KeyboardInterrupt(f"{folder} was interrupted")
            (folder / "result.json").rename(measured)
        whole = json.loads(measured.read_text())
        result["stages"][steps] = {key: whole[key] for key in _KEPT}
        result |= {key: whole[key] for key in _PROVENANCE}
    return result


def run_sampling(experiment: Experiment, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Sample and measure the one run that all variants of a seed share; train it first where it is not.

    Raises:
        KeyboardInterrupt: the training was interrupted; its checkpoint is kept.
    """
    shared, steps = folder.with_name(f"seed{seed}"), experiment.stages[-1]
    if not _is_trained(shared, steps):
        _train(experiment, name, list(experiment.base), seed, shared, steps)
    if not _is_trained(shared, steps):
        raise KeyboardInterrupt(f"{shared} was interrupted")
    words = experiment.variants[name]
    evaluate.main([f"run={shared}", *words])
    whole = json.loads((shared / "result.json").read_text())
    result = {"variant": name, "words": " ".join(words), "stages": {steps: {key: whole[key] for key in _KEPT}}}
    return result | {key: whole[key] for key in _PROVENANCE}


def _is_trained(run: Path, steps: int) -> bool:
    return any(verify_checkpoint(path)["step"] >= steps for path in checkpoints(run / "checkpoints")[-1:])


def _train(experiment: Experiment, name: str, words: list[str], seed: int, folder: Path, steps: int) -> None:
    """Train up to ``steps``; a run that is there already is never trained again."""
    last = experiment.stages_of(name)[-1]
    words = [*words, f"seed={seed}", f"lr_decay_steps={last}", f"steps={steps}"]
    words += [f"run={folder}", "resume=auto", "sample_every=0", f"cache={folder.parents[1] / 'cache'}"]
    train.main(["quick", *words])


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
