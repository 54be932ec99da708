import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.batch import face_batch
from datamodules.mixed import MixedFaceDataModule, MixedLoader


def loader(value, count, batch_size=2):
    faces = [face_batch(torch.full((3, 2, 2), value), sample=torch.tensor(i)) for i in range(count)]
    return DataLoader(faces, batch_size)


def sources(mixed):
    return [float(batch.image[0, 0, 0, 0]) for batch in mixed]


def test_each_batch_comes_whole_from_one_part_by_share():
    drawn = sources(MixedLoader([loader(0.0, 12), loader(1.0, 40)], [1.0, 2.0], [0, 0]))
    assert len(drawn) == 18
    assert drawn.count(0.0) == 6
    assert drawn[:6] == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_a_short_part_starts_anew():
    drawn = sources(MixedLoader([loader(0.0, 12), loader(1.0, 2)], [1.0, 1.0], [0, 0]))
    assert drawn.count(1.0) == 6


def test_every_process_draws_in_the_same_order():
    parts = [loader(0.0, 12), loader(1.0, 8)]
    drawn = [sources(MixedLoader(parts, [1.0, 3.0], [0, 0])) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_nobody_of_one_part_is_somebody_of_another():
    def people(count):
        faces = [
            face_batch(torch.zeros(3, 2, 2), identity=torch.tensor(i), sample=torch.tensor(i)) for i in range(count)
        ]
        return DataLoader(faces, 2)

    mixed = MixedLoader([people(6), people(4)], [3.0, 2.0], [6, 4])
    seen = sorted(int(person) for batch in mixed for person in batch.identity)
    assert seen == list(range(10))


@pytest.mark.parametrize("shares", [[1.0], None])
def test_no_parts_are_refused(shares):
    with pytest.raises(ValueError, match="a positive share for each part"):
        MixedFaceDataModule([], shares)
