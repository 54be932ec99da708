"""`keyveil benchmark`: what each part of the package costs in time, arithmetic and memory."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.progress import track
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datamodules.files import write_whole
from experiments.parts import PARTS, Work
from lightning_modules.protocol import Figure, append_results, cell
from lightning_modules.weights import WeightsError

SHORTEST = 0.05  # seconds a timed stretch lasts at least, so that the clock's own cost does not show


@dataclass(frozen=True)
class Measured:
    """What the child process reports: seconds of each timed call, and the rest of the row."""

    seconds: list[float] = field(default_factory=list)
    faces: int = 0
    params: int | None = None
    flops: float | None = None
    memory: int | None = None
    overhead: float | None = None
    weights: str | None = None
    why: str | None = None


def benchmark(
    out: str | Path | None = None,
    parts: Sequence[str] = (),
    *,
    repeats: int = 7,
    threads: int | None = None,
    device: str = "cpu",
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
        parts: Names out of :data:`PARTS`; none means all but those that take a quarter of an hour or more.
        repeats: Timed stretches.
        threads: CPU threads for torch and OpenCV; ``None`` leaves torch's default.
        device: Where torch runs, such as ``cpu`` or ``cuda``.

    Returns:
        One figure for each part and metric; a part whose weights are missing has one without a value.

    Raises:
        ValueError: If a part is unknown or ``repeats`` is less than 1.
    """
    if odd := [name for name in parts if name not in PARTS]:
        raise ValueError(f"unknown part {odd[0]!r}; there are {', '.join(PARTS)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    threads = threads or torch.get_num_threads()
    chosen = parts or [name for name, part in PARTS.items() if not part.long]
    figures: list[Figure] = []
    for name in track(chosen, "measuring", refresh_per_second=0.2):
        measured = _alone(name, repeats, threads, device)
        figures += _figures(name, measured, f"threads={threads} device={device}")
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
    lines = [
        "| part | px | faces/s | s/face | parameters | FLOPs/face | peak memory | overhead | time, × first |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = next((row["images_per_s"].value for row in rows.values()), None)
    for name, row in rows.items():
        speed = row["images_per_s"]
        seconds = "" if speed.value is None else f"{1 / speed.value:.3g}"
        ratio = "" if speed.value is None or first is None else f"{first / speed.value:.3g}"
        shown = [_short(row.get(metric)) for metric in ("params", "flops", "peak_memory", "overhead")]
        cells = [name, str(speed.size or ""), cell(speed), seconds, *shown, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(figure: Figure | None) -> str:
    return "" if figure is None or figure.value is None else cell(figure)


def _figures(name: str, measured: Measured, config: str) -> list[Figure]:
    from experiments.provenance import commit  # not at the top: the measuring processes have no use for it

    common: dict[str, Any] = {
        "method": name,
        "data": "random",
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
    for metric, value in (
        ("params", measured.params),
        ("flops", measured.flops),
        ("peak_memory", measured.memory),
        ("overhead", measured.overhead),
    ):
        if value is not None:
            figures.append(Figure(metric=metric, value=value, **common))
    return figures


def _alone(name: str, repeats: int, threads: int, device: str) -> Measured:
    """Measure in a fresh process, so that a part's memory and threads do not show in another's row."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_part, name, repeats, threads, device).result()
        except BrokenProcessPool:
            return Measured(why="the process was ended by the system, probably for want of memory")


def _measure_part(name: str, repeats: int, threads: int, device: str) -> Measured:
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    return measure(PARTS[name].build, repeats, torch.device(device))


def measure(build: Callable[[torch.device], Work], repeats: int, device: torch.device) -> Measured:
    """Set a piece of work up, warm it up, time it and count it, in this process."""
    torch.manual_seed(0)
    before = _memory(device, peak=False)
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
        else:
            first = min(_timed(work.run, device), _timed(work.run, device))
            calls = max(1, round(SHORTEST / first))
            seconds = [_timed(work.run, device, calls) / calls for _ in range(repeats)]
        memory = max(_memory(device, peak=True) - before, 0)
        flops = _flops(work) if work.torch else None
    parameters = {id(p): p.numel() for module in work.modules for p in module.parameters()}
    return Measured(
        seconds=seconds,
        faces=work.faces,
        params=sum(parameters.values()) if work.modules else None,
        flops=flops,
        memory=memory,
        overhead=work.overhead() if work.overhead else None,
        weights=_weights(work.modules),
    )


def _timed(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return time.perf_counter() - start


def _flops(work: Work) -> float:
    with FlopCounterMode(display=False) as counter:
        work.run()
    return counter.get_total_flops() / work.faces


def _memory(device: torch.device, *, peak: bool) -> int:
    """Bytes now, or at most since; elsewhere than on Linux, ``ru_maxrss`` for both."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else 0
    with contextlib.suppress(OSError, StopIteration):
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of the imports
        status = Path("/proc/self/status").read_text().splitlines()
        word = "VmHWM" if peak else "VmRSS"
        return 1024 * int(next(line for line in status if line.startswith(word)).split()[1])
    import resource  # not on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def _weights(modules: Sequence[nn.Module]) -> str | None:
    """The hash of the borrowed files a part was built from; of several, the hash of their hashes."""
    hashes = sorted({h for m in modules for h in getattr(m, "card_hashes", {}).values()})
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return f"sha256:{hashlib.sha256(' '.join(hashes).encode()).hexdigest()}"
