import itertools

import cv2
import numpy as np
import pytest
import torch
from test_datasets import MiddleFace

from datamodules.batch import face_batch
from datamodules.datasets import ImageFolderFaces
from datamodules.faces import FaceDataModule
from datamodules.latent import gallery_codes
from datamodules.mixed import MixedFaceDataModule, MixedLoader
from datamodules.stream import Stream


class Rows(torch.utils.data.Dataset):
    """Faces that are asked for by their turn."""

    def __init__(self, faces):
        self.faces = faces

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, turn):
        return self.faces[turn.row]


def loader(value, count, batch_size=2):
    faces = [face_batch(torch.full((3, 2, 2), value), sample=torch.tensor(i)) for i in range(count)]
    return Stream(Rows(faces), batch_size, seed=0)


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


def test_a_resumed_mixture_goes_on_where_it_was():
    def mixed():
        return MixedLoader([loader(0.0, 12), loader(0.5, 10)], [1.0, 3.0], [0, 0])

    def drawn(batches):
        return [(float(batch.image.mean()), batch.sample.tolist()) for batch in batches]

    whole, begun, resumed = mixed(), mixed(), mixed()
    expected = drawn(itertools.chain(whole, whole))
    assert drawn(itertools.islice(begun, 7)) == expected[:7]
    resumed.load_state_dict(begun.state_dict())
    assert drawn(itertools.islice(itertools.chain(resumed, resumed), len(expected) - 7)) == expected[7:]
    other = MixedLoader([loader(0.0, 12), loader(0.5, 10)], [3.0, 1.0], [0, 0])
    other.load_state_dict(begun.state_dict())
    assert other.given == [0, 0]
    assert other.streams[1].position == begun.streams[1].position > 0
    with pytest.raises(ValueError, match="trained on 2 data sets at once, this is 1"):
        MixedLoader([loader(0.0, 12)], [1.0], [0]).load_state_dict(begun.state_dict())


def test_every_process_draws_in_the_same_order():
    parts = [loader(0.0, 12), loader(1.0, 8)]
    drawn = [sources(MixedLoader(parts, [1.0, 3.0], [0, 0])) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_nobody_of_one_part_is_somebody_of_another():
    def people(count):
        faces = [
            face_batch(torch.zeros(3, 2, 2), identity=torch.tensor(i), sample=torch.tensor(i)) for i in range(count)
        ]
        return Stream(Rows(faces), 2, seed=0)

    mixed = MixedLoader([people(6), people(4)], [3.0, 2.0], [0, 6])
    seen = sorted(int(person) for batch in mixed for person in batch.identity)
    assert seen == list(range(10))


@pytest.mark.parametrize("shares", [[1.0], None])
def test_no_parts_are_refused(shares):
    with pytest.raises(ValueError, match="a positive share for each part"):
        MixedFaceDataModule([], shares)


def test_the_people_of_a_gallery_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    parts = []
    for number in range(2):
        for person in range(12):
            folder = tmp_path / str(number) / f"person-{number}-{person}"
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.png"), np.full((40, 40, 3), 9 + 9 * person, np.uint8))
        faces = ImageFolderFaces(str(tmp_path / str(number)))
        parts.append(FaceDataModule(faces, size=16, batch_size=4, num_workers=0, detector=MiddleFace()))
    mixed = MixedFaceDataModule(parts)
    total = parts[0].num_identities + parts[1].num_identities
    assert mixed.num_identities == total
    assert [int(i) for batch in mixed.gallery_dataloader() for i in batch.identity] == list(range(total))
    assert gallery_codes(mixed, torch.nn.Flatten())[1].tolist() == list(range(total))
    assert {int(i) for batch in mixed.train_dataloader() for i in batch.identity} <= set(range(total))
    assert mixed.attribute_names == ()
    assert set(mixed.people("train")) == set(range(mixed.num_identities))
    assert set(mixed.people("train").values()) == {mark for part in parts for mark in part.people("train").values()}
    assert mixed.people("test") == parts[0].people("test")


def test_codes_are_cached_by_what_faces_and_network_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    for person in range(12):
        (tmp_path / "people" / str(person)).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "people" / str(person) / "0.png"), np.full((40, 40, 3), 9 + 9 * person, np.uint8))

    def codes(network):
        source = ImageFolderFaces(str(tmp_path / "people"))
        return gallery_codes(FaceDataModule(source, 16, 4, num_workers=0, detector=MiddleFace()), network)[0]

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    first = codes(network)
    monkeypatch.setattr("datamodules.latent.write_tensors", lambda *_: pytest.fail("was made again"))
    assert torch.equal(codes(network), first)
    monkeypatch.undo()
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    with torch.no_grad():
        network[1].bias += 1
    torch.testing.assert_close(codes(network), first + 1)
    cv2.imwrite(str(tmp_path / "people" / "3" / "0.png"), np.full((40, 40, 3), 200, np.uint8))
    assert not torch.equal(codes(network), first + 1)
