"""The words of the protocol are the only words, and a line of results survives being written and read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lightning_modules.protocol import (
    METRICS,
    Figure,
    append_results,
    arrow,
    cell,
    direction,
    read_results,
)

EXAMPLE = (
    '{"method": "ifadit", "data": "lfw-test", "judge": "dlib", "leg": "recovered", '
    '"reference": "other-image", "carrier": "png", "key": "right", "metric": "tar@far=1e-3", '
    '"value": 0.912, "low": 0.897, "high": 0.925, '
    '"n": 1324, "threshold": 0.512, "config": "configs/compare/lfw.yaml", "commit": "abc", '
    '"weights": "sha256:00", "seed": 0}'
)


def figure(**changes):
    return replace(Figure.from_json(EXAMPLE), **changes)


def test_the_published_line_comes_back_word_for_word():
    assert json.loads(Figure.from_json(EXAMPLE).to_json()) == json.loads(EXAMPLE)


def test_a_figure_survives_its_line():
    missing = figure(metric="lpips", value=None, low=None, high=None, why="weights missing: lpips-alex-backbone")
    for each in (figure(), missing, figure(steps=10, seconds=1.5, faces=3, size=64, region="face")):
        assert Figure.from_json(each.to_json()) == each


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_of_the_protocol_is_accepted(metric):
    metric = metric.replace("@N", "@10")
    assert figure(metric=metric).metric == metric
    assert direction(metric, "recovered") in ((0,) if metric == "fmr" else (-1, 1))


@pytest.mark.parametrize(
    ("field", "word", "allowed"),
    [
        ("metric", "accuracy", "tar@far=1e-3"),
        ("metric", "known_plaintext@N", "known_plaintext@N"),
        ("metric", "known_plaintext@0", "known_plaintext@N"),
        ("leg", "deid", "wrongly_recovered"),
        ("reference", "same", "other-image"),
        ("carrier", "gif", "webp80"),
        ("key", "wrong", "one-bit"),
        ("region", "mask", "face"),
    ],
)
def test_unknown_words_are_refused_and_the_allowed_ones_listed(field, word, allowed):
    with pytest.raises(ValueError, match=f"unknown {field} '{word}'") as caught:
        figure(**{field: word})
    assert allowed in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_is_finite(value):
    with pytest.raises(ValueError, match="value of 'tar@far=1e-3'"):
        figure(value=value)


@pytest.mark.parametrize("value", ["0.5", True])
def test_a_value_is_a_number(value):
    with pytest.raises((ValueError, TypeError)):  # the second where types are checked while tests run
        figure(value=value)


def test_a_missing_value_needs_a_reason_and_only_it():
    with pytest.raises(ValueError, match="needs a reason"):
        figure(value=None)
    with pytest.raises(ValueError, match="needs a reason"):
        figure(why="no reason")


def test_a_figure_of_identity_names_its_judge_and_reference():
    for gap in ({"judge": None}, {"reference": None}):
        with pytest.raises(ValueError, match="needs a judge and a reference"):
            figure(**gap)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"metric": "psnr", "value": 1.0, "n": 1, "colour": 2}', "unknown field colour"),
        ('{"metric": "psnr", "value": 1.0}', "needs the field n"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_a_line_of_another_shape_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        Figure.from_json(line)


def test_results_are_appended_and_read_in_order(tmp_path):
    path = tmp_path / "run" / "results.jsonl"
    first, second = figure(), figure(seed=1)
    append_results(path, [first])
    append_results(path, [second, first])
    assert read_results(path) == [first, second, first]


def test_a_line_cut_short_is_dropped_when_reading_and_removed_when_appending(tmp_path):
    path = tmp_path / "results.jsonl"
    append_results(path, [figure(), figure(seed=1)])
    path.write_bytes(path.read_bytes()[:-40])
    assert read_results(path) == [figure()]
    append_results(path, [figure(seed=2)])
    assert read_results(path) == [figure(), figure(seed=2)]


def test_a_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(figure().to_json())
    append_results(path, [figure(seed=1)])
    assert read_results(path) == [figure(), figure(seed=1)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{figure().to_json()}\n{{half\n{figure().to_json()}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2"):
        read_results(path)


def test_better_is_unlike_when_hidden_and_alike_when_recovered():
    assert arrow("tar@far=1e-3", "anonymized") == "↓"
    assert arrow("tar@far=1e-3", "wrongly_recovered") == "↓"
    assert arrow("tar@far=1e-3", "recovered") == "↑"
    assert arrow("similarity", "anonymized", "other-key") == "↓"
    assert arrow("id_distance", "anonymized") == "↑"
    assert arrow("lpips", "recovered") == "↓"
    assert arrow("psnr", "wrongly_recovered") == ""


def test_cells_speak_the_unit_of_their_figure():
    assert cell(figure()) == "91.2 % [89.7, 92.5]"
    assert cell(figure(), interval=False) == "91.2 %"
    assert cell(figure(value=None, why="weights missing: x")) == "n/a (weights missing: x)"
    assert cell(Figure(metric="params", value=50_120_000, n=1)) == "50.1 M"
