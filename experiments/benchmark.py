"""`keyveil benchmark`: what each part of the package costs in time, arithmetic and memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.profiler
from rich.progress import track
from torch import nn

from datamodules.files import write_whole
from experiments.glossary import entry
from experiments.instruments import Flops, memory, now
from experiments.parts import PARTS, Work
from lightning_modules.protocol import Figure, append_results, cell
from lightning_modules.weights import WeightsError

SHORTEST = 0.05  # seconds a timed stretch lasts at least, so that the clock's own cost does not show
MORE = ("peak_share", "overhead", "data_wait", "plain_share", "scaling", "memory_growth")  # columns where measured


@dataclass(frozen=True)
class Measured:
    """What the child process reports: seconds of each timed call, and the rest of the row."""

    seconds: list[float] = field(default_factory=list)
    faces: int = 0
    params: int | None = None
    flops: float | None = None
    memory: int | None = None
    more: dict[str, float] = field(default_factory=dict)
    weights: str | None = None
    why: str | None = None


def benchmark(
    out: str | Path | None = None,
    parts: Sequence[str] = (),
    *,
    repeats: int = 7,
    threads: int | None = None,
    device: str = "cpu",
    profile: bool = False,
) -> list[Figure]:
    """Measure the parts one after another, each alone in a process of its own.

    A time is the median of ``repeats`` stretches of calls after two calls that warm up; ``low`` and ``high``
    are the slowest and the fastest stretch, between which, of seven, the true median lies with 98 %. A comparison and
    a folder of photos are timed once; their overhead is their time over that of methods and judges, or of networks.
    Arithmetic counts a multiplication and an addition as two, in matrix products and convolutions only.
    Memory is how far the process grew at most over its size before the part was set up; on a GPU, the largest
    allocation.

    Args:
        out: Folder for ``results.jsonl`` and ``table.md``; ``None`` writes nothing.
        parts: Names of parts; none means all but those that take long, and an unknown one is answered with all there
            are. `train-sdn`, `train-ifadit-disentangle`, `train-ifadit-transform` are training steps as configured, on
            ORL's faces, always seven stretches: the share of time between steps, in which data are fetched (data wait),
            and FLOPs a second over those of a plain loop over the same networks (of plain loop). With `peak`, the
            fastest this machine computes, each part's FLOPs a second are a share of its best (of peak). Long:
            `scaling-2`, `-4`, `-8`, faces a second of so many processes that train over those of one, each with as many
            threads; `memory-of-training`, bytes by which memory grows with each of 2,000 steps; `compare-lfw-1000` and
            `photos-ifadit-200`.
        repeats: Timed stretches.
        threads: CPU threads for torch and OpenCV; ``None`` leaves torch's default.
        device: Where torch runs, such as ``cpu`` or ``cuda``.
        profile: Run each part once more under torch's profiler: ``profile/PART.json`` in the folder is a trace for
            Chrome or Perfetto, ``profile/PART.txt`` a table. What runs in other processes is not seen.

    Returns:
        One figure for each part and metric; a part whose weights are missing has one without a value.

    Raises:
        ValueError: If a part is unknown, ``repeats`` is less than 1, or a profile has no folder to go to.
    """
    if odd := [name for name in parts if name not in PARTS]:
        raise ValueError(f"unknown part {odd[0]!r}; there are {', '.join(PARTS)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if profile and out is None:
        raise ValueError("expected `out` beside `profile`: the folder that traces are written to")
    threads = threads or torch.get_num_threads()
    chosen = parts or [name for name, part in PARTS.items() if not part.long]
    figures: list[Figure] = []
    for name in track(chosen, "measuring", refresh_per_second=0.2):
        measured = _alone(name, repeats, threads, device, Path(out) / "profile" if profile else None)
        figures += _figures(name, measured, f"threads={threads} device={device}")
    figures += peak_shares(figures)
    heading = (
        f"Median of {repeats} stretches (slowest and fastest in brackets), {threads} threads, {device}, "
        f"{platform.machine()}, torch {torch.__version__.split('+')[0]}."
    )
    text = f"{heading}\n\n{table(figures)}"
    print(text)
    if out is not None:
        (Path(out) / "results.jsonl").unlink(missing_ok=True)  # one run, one table
        append_results(Path(out) / "results.jsonl", figures)
        write_whole(Path(out) / "table.md", text)
    return figures


def table(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table; its last column is the time of a face against the first part's."""
    rows: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        rows.setdefault(figure.method, {})[figure.metric] = figure
    measured = {figure.metric for figure in figures}
    more = [metric for metric in MORE if metric in measured]
    head = ["px", "faces/s", "s/face", "parameters", "FLOPs/face", "peak memory"]
    head += [*(entry(metric).title for metric in more), "time, × first"]
    lines = [f"| part | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    first = next((row["images_per_s"].value for row in rows.values()), None)
    for name, row in rows.items():
        speed = row["images_per_s"]
        seconds = "" if speed.value is None else f"{1 / speed.value:.3g}"
        ratio = "" if speed.value is None or first is None else f"{first / speed.value:.3g}"
        shown = [_short(row.get(metric)) for metric in ("params", "flops", "peak_memory", *more)]
        cells = [name, str(speed.size or ""), cell(speed), seconds, *shown, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(figure: Figure | None) -> str:
    return "" if figure is None or figure.value is None else cell(figure)


def _figures(name: str, measured: Measured, config: str) -> list[Figure]:
    from experiments.provenance import commit  # not at the top: the measuring processes have no use for it

    common: dict[str, Any] = {
        "method": name,
        "data": PARTS[name].data,
        "carrier": None,
        "key": None,
        "config": config,
        "commit": commit(),
        "weights": measured.weights,
        "size": PARTS[name].size,
        "n": measured.faces * len(measured.seconds),
    }
    if measured.why is not None:
        return [Figure(metric="images_per_s", value=None, why=measured.why, **common)]
    speeds = [measured.faces / seconds for seconds in measured.seconds]
    median = measured.faces / statistics.median(measured.seconds)
    figures = [Figure(metric="images_per_s", value=median, low=min(speeds), high=max(speeds), **common)]
    found = {"params": measured.params, "flops": measured.flops, "peak_memory": measured.memory} | measured.more
    return figures + [Figure(metric=metric, value=v, **common) for metric, v in found.items() if v is not None]


def peak_shares(figures: Sequence[Figure]) -> list[Figure]:
    """FLOPs a second of each part over those of the fastest stretch of ``peak``; none where that was not measured."""
    speed = {figure.method: figure for figure in figures if figure.metric == "images_per_s"}
    flops = {figure.method: figure for figure in figures if figure.metric == "flops"}
    if "peak" not in flops:
        return []
    most = flops.pop("peak").value * speed["peak"].high
    return [
        replace(figure, metric="peak_share", value=figure.value * speed[name].value / most)
        for name, figure in flops.items()
    ]


def _alone(name: str, repeats: int, threads: int, device: str, profiles: Path | None) -> Measured:
    """Measure in a fresh process, so that a part's memory and threads do not show in another's row."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_part, name, repeats, threads, device, profiles).result()
        except BrokenProcessPool:
            return Measured(why="the process was ended by the system, probably for want of memory")


def _measure_part(name: str, repeats: int, threads: int, device: str, profiles: Path | None) -> Measured:
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    return measure(PARTS[name].build, repeats, torch.device(device), profiles and profiles / name)


def measure(
    build: Callable[[torch.device], Work], repeats: int, device: torch.device, seen: Path | None = None
) -> Measured:
    """Set a piece of work up, warm it up, time it and count it, in this process; ``seen`` is where a profile goes."""
    torch.manual_seed(0)
    before = memory(device, peak=False)
    try:
        work = build(device)
    except (WeightsError, ImportError, OSError) as error:
        return Measured(why=str(error).splitlines()[0])
    with torch.no_grad():
        if work.once:
            try:
                seconds = [_timed(work.run, device)]
            except RuntimeError as error:
                return Measured(why=" ".join(str(error).split()))
            if work.seconds:
                seconds = [*work.seconds()]
        else:
            first = min(_timed(work.run, device), _timed(work.run, device))
            calls = max(1, round(SHORTEST / first))
            seconds = [_timed(work.run, device, calls) / calls for _ in range(repeats)]
        held = max(memory(device, peak=True) - before, 0)
        flops = _flops(work) if work.torch else None
        if seen is not None:
            _profile(work.sample or work.run, seen)
    parameters = {id(p): p.numel() for module in work.modules for p in module.parameters()}
    return Measured(
        seconds=seconds,
        faces=work.faces,
        params=sum(parameters.values()) if work.modules else None,
        flops=flops,
        memory=held,
        more=work.figures(),
        weights=_weights(work.modules),
    )


def _profile(run: Callable[[], object], seen: Path) -> None:
    """Write what the profiler saw, as a trace and as a table of what took longest by itself."""
    with torch.profiler.profile() as profiler:
        run()
    seen.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(f"{seen}.json")
    write_whole(Path(f"{seen}.txt"), profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


def _timed(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    start = now(device)
    for _ in range(calls):
        run()
    return now(device) - start


def _flops(work: Work) -> float:
    with Flops() as counter:
        work.run()
    return counter.total / work.faces


def _weights(modules: Sequence[nn.Module]) -> str | None:
    """The hash of the borrowed files a part was built from; of several, the hash of their hashes."""
    hashes = sorted({h for m in modules for h in getattr(m, "card_hashes", {}).values()})
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return f"sha256:{hashlib.sha256(' '.join(hashes).encode()).hexdigest()}"
