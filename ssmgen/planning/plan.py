"""Memory, time, communication and cost of a training, from counted work and a device's figures."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ssmgen.planning.counting import Call, StepCounts, count_activations, count_step
from ssmgen.planning.devices import Device

SHARDINGS = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("bf16", "no")
#: Share of the backward pass behind which gradients or weights can travel.
OVERLAP = 0.8
_DAY = 86400


@dataclass(frozen=True)
class Job:
    """A training to be planned.

    Attributes:
        model: registered name.
        gpus, batch, accumulate: processes, examples of a step over all of them, and parts of a process's share.
        size: side of the latent; that of a 256 x 256 image if None.
        precision, optimizer: as the training loop calls them.
        sharding: ``"ddp"``, every process holds the whole model, or ``"fsdp"``, each holds a part.
        checkpointed: blocks are computed again in the backward pass.
        steps, price: optimiser steps, and money per GPU and hour; None where not given.

    Raises:
        ValueError: a word or number out of range, or a batch that does not divide.
    """

    model: str
    gpus: int
    batch: int
    accumulate: int = 1
    size: int | None = None
    precision: str = "bf16"
    optimizer: str = "adamw"
    sharding: str = "ddp"
    checkpointed: bool = False
    steps: int | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        words = (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("sharding", SHARDINGS))
        for name, known in words:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("gpus", "batch", "accumulate", "size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise ValueError(f"price must be a number of at least 0 per GPU and hour, got {self.price}")
        pieces = self.gpus * self.accumulate
        if self.batch % pieces:
            below, above = self.batch // pieces * pieces, -(-self.batch // pieces) * pieces
            near = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"batch {self.batch} must be a multiple of GPUs x accumulate = {pieces}, e.g. {near}")

    @property
    def part(self) -> int:
        """Examples that a process has in memory at a time."""
        return self.batch // (self.gpus * self.accumulate)


@dataclass(frozen=True)
class Plan:
    """The prediction for a job; bytes and seconds.

    Attributes:
        memory, peak: bytes per GPU, by part and at most at once, see `peak_of`.
        usable: bytes per GPU that tensors can fill.
        per_example: bytes that one more example takes.
        largest_part: examples that fit a GPU at a time; 0 where not even one does.
        seconds: of a step by part; ``host`` is what remains when the host is slower than its GPU.
        transfer: seconds of communication, of which ``seconds["communication"]`` are not hidden behind computing.
        matrix_flops: operations of matrix products in a step and process.
        suggestion: what makes it fit, where it does not.
        example_bytes: latent and mask of one example in a latent cache.
    """

    job: Job
    device: Device
    memory: dict[str, float]
    peak: float
    usable: float
    per_example: float
    largest_part: int
    seconds: dict[str, float]
    transfer: float
    matrix_flops: float
    suggestion: str | None
    example_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the peak is within what tensors can fill."""
        return self.peak <= self.usable

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def facts(self) -> dict[str, Any]:
        """Everything that the command prints, as JSON."""
        job, hours = self.job, None if self.job.steps is None else self.step * self.job.steps / 3600
        gpu_hours = None if hours is None else hours * job.gpus
        return {
            "basis": basis(self.device),
            "job": vars(job) | {"part": job.part},
            "device": vars(self.device),
            "memory_bytes": self.memory | {"peak": self.peak, "usable": self.usable},
            "fits": self.fits,
            "suggestion": self.suggestion,
            "largest_batch": self.largest_part * job.gpus * job.accumulate,
            "step_seconds": self.seconds | {"step": self.step},
            "communication_seconds": self.transfer,
            "overlap": OVERLAP,
            "matrix_flops_per_gpu": self.matrix_flops,
            "examples_per_second": job.batch / self.step,
            "days": None if hours is None else hours * 3600 / _DAY,
            "gpu_hours": gpu_hours,
            "cost": None if gpu_hours is None or job.price is None else gpu_hours * job.price,
            "cache_bytes_per_example": self.example_bytes,
            "cache_bytes_per_second": self.example_bytes * job.batch / self.step,
        }


def basis(device: Device) -> str:
    """Where the figures of a plan come from, in a few words."""
    if device.waits:
        return "predicted from rates measured on this machine just now"
    return f"predicted; not measured on this GPU ({device.source})"


def make_plan(job: Job, device: Device) -> Plan:
    """Predict memory and time.

    Raises:
        ValueError, TypeError: a model or size that cannot be built, several CPUs, or a network that is not known.
    """
    link = bandwidth_between(job.gpus, device)

    def count(job: Job) -> StepCounts:
        return count_step(job.model, job.part, job.size, **_counting(job, device))

    counts = count(job)
    other = 1 if job.part > 1 else 2
    fewer = count_activations(job.model, other, job.size, **_counting(job, device))
    per_example = max(1.0, (counts.activations - fewer) / (job.part - other))
    usable = device.memory * device.memory_share
    memory = memory_of(counts, job)
    peak = peak_of(counts, job)
    transfer, seconds = _seconds(counts, job, device, link)
    growth = per_example + counts.working / job.part  # what is at work grows with the batch too, at most like this
    suggestion, largest = None, int(job.part + (usable - sum(memory.values())) // growth)
    if peak > usable:
        suggestion = _suggestion(job, usable, counts, per_example, count)
    return Plan(
        job=job,
        device=device,
        memory=memory,
        peak=peak,
        usable=usable,
        per_example=per_example,
        largest_part=max(largest, job.part if peak <= usable else 0),
        seconds=seconds,
        transfer=transfer,
        matrix_flops=job.accumulate * sum(call.work for call in counts.calls if call.kind == "matrix"),
        suggestion=suggestion,
        example_bytes=counts.example,
    )


def _counting(job: Job, device: Device) -> dict[str, Any]:
    options = {"gpu": not device.waits, "precision": job.precision, "checkpointed": job.checkpointed}
    return options | {"optimizer": job.optimizer}


def memory_of(counts: StepCounts, job: Job) -> dict[str, float]:
    """Bytes per GPU by part, of one process of a job."""
    held = job.gpus if job.sharding == "fsdp" else 1
    memory: dict[str, float] = {
        "weights": counts.weights / held,
        "gradients": counts.gradients / held,
        "optimiser": counts.optimizer / held,
        "moving average": counts.weights / held,
    }
    if job.gpus > 1 and job.sharding == "ddp":
        memory["DDP's buckets"] = counts.gradients
    if job.gpus > 1 and job.sharding == "fsdp":
        # The weights outside the blocks, those of this block and the next, and the gradients of this one.
        memory["gathered weights"] = counts.outside + 3 * counts.block
    return memory | {"activations": counts.activations, "other tensors": counts.working}


def peak_of(counts: StepCounts, job: Job) -> float:
    """The most bytes per GPU at once.

    Where every part of a step is seen, it is less than the sum of `memory_of`: gradients appear while activations go.
    With several parts, or shards, it is the sum.
    """
    memory = memory_of(counts, job)
    if job.accumulate > 1 or "gathered weights" in memory:
        return sum(memory.values())
    return sum(memory.values()) - counts.gradients - counts.activations - counts.working + counts.peak


def seconds_of(calls: Iterable[Call], device: Device, precision: str) -> dict[str, float]:
    """Seconds of operations by kind.

    On a GPU each takes the longer of its arithmetic and its bytes, and all overlap with the host, which may be the
    slower one; ``host`` is what that adds. On a CPU all three add up.
    """
    rates = {
        "matrix": device.matrix(precision),
        "scan forward": device.scan_forward,
        "scan backward": device.scan_backward,
    }
    found: dict[str, float] = defaultdict(float, {"products": 0.0, "scans": 0.0, "other": 0.0})
    count = 0
    for call in calls:
        arithmetic = call.work / rates[call.kind] if call.work else 0.0
        kind = {"matrix": "products", "other": "other"}.get(call.kind, "scans")
        traffic = call.bytes / (device.bandwidth * device.bandwidth_share)
        found[kind] += arithmetic + traffic if device.waits else max(arithmetic, traffic)
        count += 1
    host = count * device.call
    found["host"] = host if device.waits else max(0.0, host - sum(found.values()))
    return dict(found)


def reduce_seconds(size: float, ranks: int, bandwidth: float) -> float:
    """A ring all-reduce of ``size`` bytes: every rank sends 2 (n - 1) / n of them."""
    return 2 * gather_seconds(size, ranks, bandwidth)


def gather_seconds(size: float, ranks: int, bandwidth: float) -> float:
    """An all-gather to, or a reduce-scatter of, ``size`` bytes: every rank sends (n - 1) / n of them."""
    return (ranks - 1) / ranks * size / bandwidth if ranks > 1 else 0.0


def bandwidth_between(gpus: int, device: Device) -> float:
    """Bytes per second that a GPU sends in a ring of ``gpus``: the network's where they fill more than a node.

    Raises:
        ValueError: the device has no such connection.
    """
    if gpus > 1 and device.waits:
        raise ValueError("--gpu cpu plans one process: use --gpus 1, or name a GPU")
    if gpus <= device.per_node:
        return device.link * device.link_share
    if device.network is None:
        raise ValueError(
            f"{gpus} GPUs take {-(-gpus // device.per_node)} nodes of {device.per_node}, and the network between nodes "
            f"of {device.name} is not in the table: give it as --network, in GB/s per GPU"
        )
    return min(device.link, device.network) * device.link_share


def _seconds(counts: StepCounts, job: Job, device: Device, link: float) -> tuple[float, dict[str, float]]:
    """Seconds of all communication, and of a step by part."""
    phases = {
        phase: seconds_of((call for call in counts.calls if call.phase == phase), device, job.precision)
        for phase in ("forward", "backward", "update")
    }
    part: dict[str, float] = {
        name: job.accumulate * (phases["forward"][name] + phases["backward"][name]) for name in phases["forward"]
    }
    held = job.gpus if job.sharding == "fsdp" else 1
    # Every process orthogonalises whole matrices; the rest of the update, and the average, go over what it holds.
    products = phases["update"]["products"]
    rest = sum(phases["update"].values()) - products
    average = 3 * counts.weights / (device.bandwidth * device.bandwidth_share)
    part["update"] = products + (rest + average) / held
    backward = job.accumulate * sum(phases["backward"].values())
    transfer, hidden = communication(counts, job, link, backward)
    return transfer, part | {"communication": transfer - hidden}


def communication(counts: StepCounts, job: Job, link: float, backward: float) -> tuple[float, float]:
    """Seconds of a step's communication, and those hidden behind ``backward`` seconds of computing.

    DDP reduces float32 gradients once. FSDP gathers float32 weights for the forward and again for the backward pass of
    every part, and scatters reduced gradients once. Muon gathers whole matrices from their shards; nothing hides that.
    """
    if job.gpus == 1:
        return 0.0, 0.0
    if job.sharding == "ddp":
        shared, exposed = reduce_seconds(counts.gradients, job.gpus, link), 0.0
    else:
        gathers = 2 * job.accumulate * gather_seconds(counts.weights, job.gpus, link)
        shared = gathers + gather_seconds(counts.gradients, job.gpus, link)
        exposed = gather_seconds(counts.matrices, job.gpus, link)
    return shared + exposed, min(shared, OVERLAP * backward)


def _suggestion(
    job: Job, usable: float, counts: StepCounts, per_example: float, count: Callable[[Job], StepCounts]
) -> str:
    """The first change that fits, from the cheapest on."""
    share = job.batch // job.gpus
    fixed = sum(memory_of(counts, job).values()) - job.part * per_example
    for parts in range(job.accumulate + 1, share + 1):
        if share % parts == 0 and fixed + share // parts * per_example <= usable:
            return f"--accumulate {parts} fits"
    saved = replace(job, checkpointed=True)
    sharded = replace(job, sharding="fsdp")
    tries = [saved, sharded, replace(saved, sharding="fsdp"), replace(saved, sharding="fsdp", accumulate=share)]
    known = {(job.checkpointed, job.part): counts}
    for changed in tries:
        key = changed.checkpointed, changed.part
        if changed != job and key not in known:
            known[key] = count(changed)
        if changed != job and peak_of(known[key], changed) <= usable:
            return f"{_options(job, changed)} fits"
    return f"nor does {_options(job, tries[-1])}: take more or larger GPUs, or fewer tokens"


def _options(job: Job, changed: Job) -> str:
    words = ["--checkpoint-activations"] if changed.checkpointed > job.checkpointed else []
    words += [f"--sharding {changed.sharding}"] if changed.sharding != job.sharding else []
    words += [f"--accumulate {changed.accumulate}"] if changed.accumulate != job.accumulate else []
    return " ".join(words)
