import json
import math

import pytest
import torch
from test_compare import calibrated, write  # noqa: F401

from experiments.benchmark import benchmark, measure, peak_shares, table
from experiments.comparing import NoiseFaces as ComparedNoise
from experiments.comparing import TimedComparison
from experiments.parts import PARTS, Work
from lightning_modules.protocol import Figure, read_results
from lightning_modules.weights import WeightsError

CPU = torch.device("cpu")


def linear(device):
    layer, x = torch.nn.Linear(16, 8, bias=False), torch.randn(4, 16)
    return Work(lambda: layer(x), 4, [layer, layer])


def test_arithmetic_and_parameters_are_those_of_the_layer():
    measured = measure(linear, 3, CPU)
    assert measured.flops == 2 * 16 * 8  # a face
    assert measured.params == 16 * 8  # a module that is named twice counts once
    assert len(measured.seconds) == 3
    assert all(seconds > 0 for seconds in measured.seconds)


def test_long_work_is_timed_once_and_says_its_overhead():
    calls = []
    work = Work(lambda: calls.append(1), 4, torch=False, once=True, figures=lambda: {"overhead": 1.5})
    measured = measure(lambda device: work, 7, CPU)
    assert (len(calls), len(measured.seconds), measured.more) == (1, 1, {"overhead": 1.5})


def test_work_that_clocks_itself_is_believed():
    work = Work(lambda: None, 4, torch=False, once=True, seconds=lambda: (3.0, 4.0))
    assert measure(lambda device: work, 7, CPU).seconds == [3.0, 4.0]


def test_the_overhead_of_a_comparison_is_what_is_left_beside_methods_and_judges(tmp_path):
    noise = {"class_path": "experiments.comparing.NoiseFaces", "init_args": {"count": 8, "size": 64}}
    plan = json.loads(write(tmp_path / "c.yaml", data={"noise": noise}).read_text())
    plan["methods"] = {"blur": plan["methods"]["blur"]}
    run = TimedComparison(plan)
    run()
    assert 1 < run.overhead < math.inf
    plan["methods"] = {"blur": {"class_path": "lightning_modules.baselines.obscure.Blur", "init_args": {"sizes": 1}}}
    with pytest.raises(RuntimeError, match="sizes"):
        TimedComparison(plan)()


def test_faces_of_noise_are_drawn_alike_each_time():
    faces = ComparedNoise(count=8, size=16).test_dataloader()
    (one,), (again,) = list(faces), list(faces)
    assert torch.equal(one.image, again.image)
    assert one.identity.tolist() == [0] * 4 + [1] * 4
    assert one.sample.tolist() == list(range(8))


def test_memory_is_how_far_the_process_grew_at_most():
    def build(device):
        return Work(lambda: torch.ones(60_000_000).sum(), 1)

    assert 230e6 < measure(build, 1, CPU).memory < 400e6


def test_a_part_without_its_weights_says_so_and_the_table_has_a_row_for_it():
    def build(device):
        raise WeightsError("no source has the card 'x'\nmore")

    assert measure(build, 3, CPU).why == "no source has the card 'x'"


def test_a_part_is_measured_alone_and_written_in_the_words_of_the_protocol(tmp_path):
    name = "conjugate-x64"
    figures = benchmark(tmp_path, [name], repeats=2, threads=1)
    assert read_results(tmp_path / "results.jsonl") == figures
    found = {figure.metric: figure for figure in figures}
    assert set(found) == {"images_per_s", "params", "flops", "peak_memory"}
    speed = found["images_per_s"]
    assert speed.low <= speed.value <= speed.high
    assert (speed.method, speed.n, speed.config) == (name, 2 * 64, "threads=1 device=cpu")
    assert found["params"].value == 0  # it is fitted, not trained
    assert found["flops"].value >= 2 * 2 * 512 * 128
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("Median of 2 stretches")
    assert f"| {name} |" in text


def test_the_last_column_compares_with_the_first_row():
    figures = [f for name in ("a", "b") for f in _speeds(name)]
    rows = table(figures).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["1", "4"]


def _speeds(name):
    return [Figure(method=name, metric="images_per_s", value={"a": 8.0, "b": 2.0}[name], n=1)]


def test_the_share_of_the_peak_is_that_of_its_flops_a_second():
    def row(name, speed, flops):
        pace = Figure(method=name, metric="images_per_s", value=speed, low=speed / 2, high=2 * speed, n=1)
        return [pace, Figure(method=name, metric="flops", value=flops, n=1)]

    rows = row("peak", 5.0, 6.0) + row("network", 2.0, 9.0) + _speeds("a")  # 60 a second at best, and 18
    (share,) = peak_shares(rows)
    assert (share.method, share.metric, share.value) == ("network", "peak_share", 0.3)
    assert peak_shares(rows[2:]) == []
    lines = table([*rows, share]).splitlines()
    assert "| of peak |" in lines[0]
    assert [line.split("|")[8].strip() for line in lines[2:]] == ["", "0.300", ""]


def test_a_profile_is_a_trace_and_a_table(tmp_path):
    measure(linear, 1, CPU, tmp_path / "profile" / "linear")
    assert "traceEvents" in json.loads((tmp_path / "profile" / "linear.json").read_text())
    assert "aten::mm" in (tmp_path / "profile" / "linear.txt").read_text()
    with pytest.raises(ValueError, match="expected `out` beside `profile`"):
        benchmark(parts=["conjugate-x4"], profile=True)


def test_the_profiler_gets_the_shorter_call(tmp_path):
    calls = []
    work = Work(lambda: calls.append("all"), 1, torch=False, once=True, sample=lambda: calls.append("some"))
    measure(lambda device: work, 1, CPU, tmp_path / "work")
    assert calls == ["all", "some"]


def test_unknown_parts_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown part 'toaster'; there are generator, "):
        benchmark(parts=["toaster"])
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        benchmark(repeats=0)


def test_the_first_part_is_the_generator_at_its_full_size():
    assert next(iter(PARTS)) == "generator"
    assert PARTS["generator"].size == 1024
    assert all(part.size is None or math.log2(part.size) % 1 == 0 or part.size == 250 for part in PARTS.values())
