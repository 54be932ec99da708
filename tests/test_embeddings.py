"""Embeddings on the disk: what a judge would have said, said once."""

import copy

import pytest
import torch
from test_compare import LinearJudge, calibrated, write  # noqa: F401

from experiments.compare import compare
from experiments.embeddings import Remembering
from lightning_modules.judges import Judge


class Counting(LinearJudge):
    def __init__(self, weights: str = LinearJudge.weights) -> None:
        self.weights, self.seen = weights, 0

    def embed(self, images):
        self.seen += len(images)
        return super().embed(images)


def test_no_picture_is_embedded_twice(tmp_path):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    judge = Counting()
    remembering = Remembering(judge, tmp_path / "known.sqlite", "")
    wanted = LinearJudge().embed(images)
    for batch in (images[[0, 1, 0]], images, images.flip(0)):
        rows = [int((images == image).flatten(1).all(1).nonzero()[0]) for image in batch]
        torch.testing.assert_close(remembering.embed(batch), wanted[rows], atol=1e-7, rtol=0)
    assert judge.seen == 4
    later = Counting()
    torch.testing.assert_close(
        Remembering(later, tmp_path / "known.sqlite", "").embed(images), wanted, atol=1e-7, rtol=0
    )
    assert later.seen == 0


class CountingAll(Counting):
    """Counts over all of its kind."""

    total = 0

    def __init__(self):
        super().__init__()

    def embed(self, images):
        CountingAll.total += len(images)
        return super().embed(images)


def test_a_comparison_embeds_originals_once_for_all_methods_and_runs(tmp_path):
    methods = {
        name: {"class_path": f"lightning_modules.baselines.obscure.{name}", "init_args": {"size": 64}}
        for name in ("Blur", "Pixelate")
    }
    judges = {"linear": {"class_path": f"{__name__}.CountingAll"}}
    plan = write(tmp_path / "c.yaml", methods=methods, judges=judges)
    CountingAll.total = 0
    assert compare(plan, tmp_path / "out") == 0
    results = (tmp_path / "out" / "results.jsonl").read_text()
    assert CountingAll.total == 6 + 2 * 6  # the originals, and what either method made of them
    for part in (tmp_path / "out" / "parts").glob("*.json"):
        part.unlink()  # all is to be judged again
    assert compare(plan, tmp_path / "out") == 0
    assert CountingAll.total == 18
    assert [line for line in results.splitlines() if "images_per_s" not in line] == [
        line for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines() if "images_per_s" not in line
    ]


def test_what_is_remembered_is_a_judges_own(tmp_path):
    """Other weights, other settings, another size or one grey level less is another picture."""
    images = torch.zeros(1, 3, 16, 16)
    Remembering(Counting(), tmp_path / "known.sqlite", "").embed(images)
    for weights, settings, asked in (
        ("sha256:" + "2" * 64, "", images),
        (Counting.weights, "bgr", images),
        (Counting.weights, "", images + 1 / 127.5),
        (Counting.weights, "", torch.zeros(1, 3, 8, 32)),
    ):
        judge = Counting(weights)
        Remembering(judge, tmp_path / "known.sqlite", settings).embed(asked)
        assert judge.seen == 1


def test_it_stands_for_its_judge(tmp_path):
    remembering = copy.deepcopy(Remembering(Counting(), tmp_path / "known.sqlite", ""))
    assert isinstance(remembering, Judge)
    assert remembering.describe() == "linear"
    with pytest.raises(AttributeError):
        _ = remembering.nothing
