"""Render ``benchmarks/results/*.json`` as tables and plots: ``python -m benchmarks.report``.

Writes ``docs/benchmarks.md`` and its pictures, and the part of ``docs/performance.md`` about GPUs. Nothing in them is
typed by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
#: What encloses the tables of GPUs in ``docs/performance.md``.
GPU_PART = ("<!-- made by python -m benchmarks.report -->\n", "<!-- end of what it makes -->\n")
Result = dict[str, Any]


def main() -> None:
    """Write the page and its plots, and the part about GPUs."""
    DOCS.joinpath("benchmarks.md").write_text(page(RESULTS))
    performance = DOCS / "performance.md"
    performance.write_text(with_gpu_part(performance.read_text(), gpu_part(RESULTS)))
    for name, draw in (("tokens", plot_tokens), ("solvers", plot_solvers)):
        file = RESULTS / f"{name}-cpu.json"
        if file.exists():
            draw(json.loads(file.read_text()), DOCS / "images" / f"bench-{name}.svg")


def page(results: Path) -> str:
    """The page as Markdown, from every result of the folder."""
    parts = [
        "# Benchmarks\n\nMade by `python -m benchmarks.report` from `benchmarks/results/`, where every single time is. "
        "Medians, in one process, taken in turn. "
        "How to read and repeat them, and the GPU: [Performance](performance.md).\n"
    ]
    parts += [section for device, section in _sections(results) if device != "gpu"]
    return "\n".join(parts)


def gpu_part(results: Path) -> str:
    """The tables of GPUs as Markdown, or that there are none."""
    parts = [section.replace("## ", "### ", 1) for device, section in _sections(results) if device == "gpu"]
    return "\n".join(parts) or "Nothing has been measured on a GPU.\n"


def with_gpu_part(text: str, part: str) -> str:
    """A page's text with that part between the two marks of `GPU_PART`."""
    start, end = GPU_PART
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{part}\n{end}{rest.partition(end)[2]}"


def _sections(results: Path) -> Iterator[tuple[str, str]]:
    """The device and the section of each result."""
    for file in sorted(results.glob("*.json")):
        name, _, device = file.stem.rpartition("-")
        if name not in SECTIONS:
            raise ValueError(f"{file}: no section of the report is made from it; there are {', '.join(SECTIONS)}")
        result = json.loads(file.read_text())
        title, render = SECTIONS[name]
        yield device, f"## {title} ({device.upper()})\n\n{_origin(result)}\n\n{render(result)}"


def _origin(result: Result) -> str:
    hardware, versions = result["hardware"], result["versions"]
    where = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads"
    return (
        f"`{result['command']}`, commit `{result['commit']}`, {where}, torch {versions['torch']}, "
        f"Python {versions['python']}, seed {result['seed']}."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _times(value: float | None, base: float) -> str:
    return (
        "-"
        if value is None or math.isnan(value)
        else f"{value / base:.1f}x"
        if value < 100 * base
        else (f"{value / base:,.0f}x")
    )


def _scan(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        medians, ours = row["medians"], row["medians"]["ssmgen cpu"]
        others = [_times(medians.get(name), ours) for name in ("ssmgen portable", "mambapy", "mamba-ssm's reference")]
        rows.append([str(tuple(row["shape"])), row["what"], _ms(ours), f"{ours / row['floor']:.2f}x", *others])
    head = ["(batch, dim, length, d_state)", "", "ours", "ours / floor", "portable", "mambapy", "mamba-ssm's reference"]
    rate, lanes = result["vector_rate"] or (math.nan, 0)
    note = (
        f"Float32. The columns on the right are times over ours. The floor counts the arithmetic alone, at the "
        f"{rate / 1e9:.1f} G multiply-adds of {lanes} floats a second that this machine reached.\n"
    )
    return table(head, rows) + "\n" + note


def _compared(rows: list[Result]) -> str:
    parts = []
    for row in rows:
        medians = row["medians"]
        base = next(iter(medians.values()))
        lines = [[name, _ms(value), f"{value / base:.2f}"] for name, value in medians.items()]
        parts.append(f"**{row['what']}**\n\n{table(['', 'median', 'over the first'], lines)}")
    return "\n".join(parts)


def _gpu_layers(result: Result) -> str:
    floors = [{} if row["floor"] is None else {"floor": row["floor"]} for row in result["rows"]]
    rows = zip(result["rows"], floors, strict=True)
    return _compared([row | {"medians": row["medians"] | floor} for row, floor in rows])


def _blocks(result: Result) -> str:
    return _compared(result["rows"])


def _sampling(result: Result) -> str:
    rows = [
        {"what": "8 images of one mask, 25 Euler steps, quick model", "medians": result["medians"]},
        {"what": "one block of sisma-xl, 256 tokens, batch 1, and its parts", "medians": result["block_medians"]},
    ]
    note = f"\nLargest difference between the two paths, over the largest value: {result['difference']:.1e}.\n"
    return _compared(rows) + note


def _tokens(result: Result) -> str:
    names = list(result["rows"][0]["medians"])
    memory = [name for name in names if result["rows"][0]["peak_bytes"]]
    head = ["tokens", *[f"{name}, us a token" for name in names], *[f"{name}, peak MiB" for name in memory]]
    rows = [
        [
            f"{row['tokens']:,}",
            *[f"{1e3 * row['medians'][name] / row['tokens']:.2f}" for name in names],
            *[f"{row['peak_bytes'][name] / 2**20:.0f}" for name in memory],
        ]
        for row in result["rows"]
    ]
    ahead = [
        f"- faster than *{name}* from {crossing:,} tokens on"
        if (crossing := _crossing(result["rows"], name))
        else f"- slower than *{name}* at every length here"
        for name in names[1:]
    ]
    plot = "\n![Time per token](images/bench-tokens.svg)\n" if not memory else ""
    return (
        f"One block, width {result['width']}.\n\n{table(head, rows)}\n{names[0]} is:\n\n"
        + "\n".join(ahead)
        + f"\n{plot}"
    )


def _crossing(rows: list[Result], rival: str) -> int | None:
    """The length from which on ours (the first) stays faster."""
    behind = [row["tokens"] for row in rows if next(iter(row["medians"].values())) >= row["medians"][rival]]
    return next((row["tokens"] for row in rows if row["tokens"] > max(behind, default=0)), None)


def _models(result: Result) -> str:
    head = ["", "batch", "a step", "seconds an image", "first call", "peak"]
    rows = [
        [
            row["case"],
            str(row["batch"]),
            _ms(row["milliseconds_per_step"]),
            f"{row['seconds_per_image']:.3g}",
            f"{row['first_seconds']:.1f} s",
            f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else "-",
        ]
        for row in result["sampling"]
    ]
    training = [
        [
            row["case"],
            str(row.get("batch", 8)),  # which earlier results do not say
            f"{row['images_per_second']:.3g}",
            f"{row['mfu']:.0%}" if row["mfu"] else "-",
        ]
        for row in result["training"]
    ]
    sampled = f"Sampling, {result['steps']} Euler steps.\n\n{table(head, rows)}"
    return sampled + f"\nTraining.\n\n{table(['', 'batch', 'images a second', 'share of the matrix rate'], training)}"


def _gpu_scan(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        medians, ours = row["medians"], row["medians"]["ssmgen triton"]
        floor = f"{ours / row['floor']:.1f}x" if row["floor"] else "-"
        others = [_times(medians.get(name), ours) for name in ("ssmgen portable", "mamba-ssm")]
        what = f"{row['dtype'].removeprefix('torch.')}, {row['what']}"
        rows.append([str(tuple(row["shape"])), what, _ms(ours), floor, *others])
    head = ["(batch, dim, length, d_state)", "", "triton", "over the floor", "portable", "mamba-ssm"]
    note = (
        "The columns on the right are times over the Triton scan's: below 1 the other one is faster. The floor is the "
        f"larger of bytes over the memory's rate and exponentials over theirs. mamba-ssm: {result['mamba_ssm']}.\n"
    )
    return table(head, rows) + "\n" + note


def _solvers(result: Result) -> str:
    evaluations = sorted({row["evaluations"] for row in result["rows"]})
    cells = {(row["solver"], row["shift"], row["evaluations"]): row["error"] for row in result["rows"]}
    lines = [
        [
            solver,
            f"{shift:g}",
            *[f"{cells[key]:.4f}" if (key := (solver, shift, n)) in cells else "" for n in evaluations],
        ]
        for solver, shift in dict.fromkeys((row["solver"], row["shift"]) for row in result["rows"])
    ]
    return (
        table(["solver", "shift", *[f"{n} evaluations" for n in evaluations]], lines)
        + "\nRelative error of the endpoint against rk4 in 50 steps (200 evaluations), guidance "
        + f"{result['guidance_scale']}.\n\n![Error against evaluations](images/bench-solvers.svg)\n"
    )


def _demo_soak(result: Result) -> str:
    answers = ", ".join(f"{count} with {what}" for what, count in sorted(result["answers"].items()))
    rows = [
        ["requests", f"{result['requests']:,}: answered {answers}"],
        ["memory of the server, second to last fifth of the run", _growth(result)],
        ["files left behind", str(result["files_left"])],
        ["files read, of attempts by path", f"{result['files_read']} of {result['tries']}"],
    ]
    return table(["", ""], rows)


def _growth(result: Result) -> str:
    early, late = result["memory_early_mb"], result["memory_late_mb"]
    return f"{early:,.0f} MB to {late:,.0f} MB ({result['memory_growth']:+.1%})"


SECTIONS = {
    "demo_soak": ("The painting page under many requests", _demo_soak),
    "scan": ("The scan", _scan),
    "gpu_scan": ("The Triton scan", _gpu_scan),
    "gpu_layers": ("The layers around the scan", _gpu_layers),
    "blocks": ("Blocks and a training step", _blocks),
    "sampling": ("Nothing twice while sampling", _sampling),
    "tokens": ("Cost per token", _tokens),
    "models": ("Whole models", _models),
    "solvers": ("Solver error against evaluations", _solvers),
}


def _axes() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "ssmgen", "svg.fonttype": "none", "font.size": 11}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.2)
    return figure, axes


def _save(figure: Any, axes: Any, file: Path) -> None:
    axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None}, facecolor="white")


def plot_tokens(result: Result, file: Path) -> None:
    """Microseconds per token against the number of tokens."""
    figure, axes = _axes()
    lengths = [row["tokens"] for row in result["rows"]]
    for name in result["rows"][0]["medians"]:
        axes.plot(lengths, [1e3 * r["medians"][name] / r["tokens"] for r in result["rows"]], marker="o", label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds per token")
    _save(figure, axes, file)


def plot_solvers(result: Result, file: Path) -> None:
    """Error against evaluations, the better of the grids for each solver."""
    figure, axes = _axes()
    for solver in dict.fromkeys(row["solver"] for row in result["rows"]):
        best: dict[int, float] = {}
        for row in (row for row in result["rows"] if row["solver"] == solver):
            best[row["evaluations"]] = min(row["error"], best.get(row["evaluations"], math.inf))
        axes.plot(list(best), list(best.values()), marker="o", label=solver)
    axes.set_xlabel("evaluations of the model")
    axes.set_ylabel("relative error of the endpoint")
    _save(figure, axes, file)


if __name__ == "__main__":
    main()
