"""The data module: splits by person, numbers that stay, loaders that repeat nobody, labels and augmentation."""

import pickle
from collections import Counter
from types import SimpleNamespace

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from test_datasets import MiddleFace

from datamodules.batch import FaceBatch
from datamodules.datasets import GeneratedFaces, ImageFolderFaces
from datamodules.faces import FaceDataModule, augmentation, even, read_labels
from datamodules.splits import SPLITS, split_of
from experiments.build import build


@pytest.fixture
def people(tmp_path, monkeypatch):
    """40 people with 1 to 4 pictures each."""
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    random = np.random.default_rng(0)
    for person in range(40):
        folder = tmp_path / "people" / f"person-{person:02d}"
        folder.mkdir(parents=True)
        for number in range(1 + person % 4):
            cv2.imwrite(str(folder / f"{number}.png"), random.integers(1, 256, (40, 40, 3), np.uint8))
    return str(tmp_path / "people")


def module(root, **options):
    defaults = {"size": 16, "batch_size": 4, "num_workers": 0, "detector": MiddleFace()}
    return FaceDataModule(ImageFolderFaces(root), **{**defaults, **options})


def samples(loader):
    return [int(sample) for batch in loader for sample in batch.sample]


def as_process(data, rank, processes):
    data.trainer = SimpleNamespace(world_size=processes, global_rank=rank, state=SimpleNamespace(fn=TrainerFn.FITTING))
    return data


def test_a_split_is_decided_by_the_name_alone():
    names = [f"person {number}" for number in range(5000)]
    counts = Counter(split_of(name) for name in names)
    assert set(counts) == set(SPLITS)
    assert abs(counts["train"] / 5000 - 0.8) < 0.02
    assert abs(counts["test"] / 5000 - 0.1) < 0.02
    # these never change: published figures stand on them
    assert [split_of(name) for name in ("George_W_Bush", "Aaron_Eckhart", "s1", "2880", "Zoë")] == [
        "test",
        "train",
        "train",
        "train",
        "train",
    ]


def test_no_person_is_in_two_splits_and_none_is_lost(people):
    data = module(people)
    by_split = [{p.person for p in data.chosen[split]} for split in SPLITS]
    assert sum(len(names) for names in by_split) == len(set.union(*by_split)) == 40
    assert all(by_split)


def test_a_sample_keeps_its_number_whatever_the_split_and_selection(people):
    source = ImageFolderFaces(people)
    number = {p.file: p.sample for p in source.pictures}
    for options in ({}, {"limit": 5}, {"min_pictures": 2}):
        data = module(people, **options)
        for split in SPLITS:
            assert all(number[p.file] == p.sample for p in data.chosen[split])
            assert [int(face.sample) for face in data.dataset(split)] == [p.sample for p in data.chosen[split]]


def test_training_people_are_numbered_without_a_gap(people):
    data = module(people)
    seen = {int(face.identity) for face in data.dataset("train")}
    assert seen == set(range(data.num_identities))
    assert min(int(face.identity) for face in data.dataset("test")) >= data.num_identities


def test_pictures_of_one_person_share_a_number_and_those_of_two_do_not(people):
    data = module(people)
    named = {(p.person, int(f.identity)) for s in SPLITS for p, f in zip(data.chosen[s], data.dataset(s), strict=True)}
    assert len(named) == 40 == len({number for _, number in named})


def test_people_have_marks_that_are_the_same_whatever_the_selection(people):
    data, fewer = module(people), module(people, min_pictures=3)
    marks = {split: data.people(split) for split in SPLITS}
    assert {n for numbers in marks.values() for n in numbers} == set(range(40))
    assert len({mark for numbers in marks.values() for mark in numbers.values()}) == 40
    for split in SPLITS:
        assert set(marks[split]) == {int(face.identity) for face in data.dataset(split)}
        assert set(fewer.people(split).values()) < set(marks[split].values())


def test_a_limit_bounds_each_split_and_keeps_people_whole(people):
    data, whole = module(people, limit=7), module(people)
    count = Counter(p.person for p in whole.faces.pictures)
    kept = Counter(p.person for p in data.chosen["train"])
    assert len(data.chosen["train"]) == 7
    assert sum(kept[name] != count[name] for name in kept) <= 1
    assert {p.file for p in module(people, limit=4).chosen["train"]} <= {p.file for p in data.chosen["train"]}


def test_few_pictures_keep_a_person_out(people):
    data = module(people, min_pictures=3)
    kept = Counter(p.person for split in SPLITS for p in data.chosen[split])
    assert set(kept.values()) == {3, 4}


def test_batches_are_faces_in_the_stated_range(people):
    batch = next(iter(module(people).train_dataloader()))
    assert isinstance(batch, FaceBatch)
    assert batch.image.shape == (4, 3, 16, 16)
    assert batch.image.dtype == torch.float32
    assert -1 <= batch.image.min() < batch.image.max() <= 1
    assert batch.place.shape == (4, 2, 3)
    assert batch.identity.dtype == batch.sample.dtype == torch.int64
    assert batch.attributes.shape == batch.mask.shape == batch.w.shape == (4, 0)


def test_evaluation_goes_through_each_face_once_and_in_order(people):
    data = module(people)
    for loader, split in (
        (data.val_dataloader(), "val"),
        (data.test_dataloader(), "test"),
        (data.predict_dataloader(), "test"),
    ):
        assert samples(loader) == [p.sample for p in data.chosen[split]]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_evaluation_without_repeats_and_in_equal_numbers_of_batches(people, processes):
    parts = [as_process(module(people, batch_size=2), rank, processes).test_dataloader() for rank in range(processes)]
    assert sorted(sum((samples(part) for part in parts), [])) == samples(module(people).test_dataloader())
    assert len({len(part) for part in parts}) == 1


def test_an_even_batch_size_gives_every_process_the_same_number_of_batches():
    for faces in range(2, 200):
        for processes in (2, 3, 8):
            for batch_size in (1, 4, 16):
                size = even(faces, processes, batch_size)
                held = [len(range(rank, faces, processes)) for rank in range(processes)]
                if min(held):
                    assert len({-(-count // size) for count in held}) == 1


def test_two_processes_train_on_the_batches_of_one_and_change_faces_alike(people):
    def data(**options):
        return module(people, augment=True, flip=True, **options)

    one = data(batch_size=4).train_dataloader()
    halves = [as_process(data(batch_size=2), rank, 2).train_dataloader() for rank in range(2)]
    for _ in range(3):  # passes
        for whole, left, right in zip(one, *halves, strict=True):
            together = torch.stack([left.image, right.image], 1).flatten(0, 1)
            assert torch.equal(whole.image, together)
            assert whole.sample.tolist() == torch.stack([left.sample, right.sample], 1).flatten().tolist()


def test_the_order_of_training_changes_by_pass_and_seed_and_repeats_otherwise(people, monkeypatch):
    def order(passes, seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        loader = module(people).train_dataloader()
        return [samples(loader) for _ in range(passes)][-1]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(passes, seed)) for passes, seed in ((1, 0), (2, 0), (1, 1))}) == 3


def test_a_data_module_goes_on_where_it_was_and_where_a_checkpoint_says(people):
    data, fresh = module(people), module(people)
    first = samples(data.train_dataloader())
    resumed = module(people)
    resumed.load_state_dict(data.state_dict())
    second = samples(data.train_dataloader())
    whole = fresh.train_dataloader()
    assert first + second == samples(whole) + samples(whole)
    assert samples(resumed.train_dataloader()) == second


def test_readers_beside_change_neither_order_nor_faces(people):
    alone, helped = (
        module(people, augment=True, flip=True, num_workers=workers).train_dataloader() for workers in (0, 2)
    )
    for _ in range(2):
        for a, b in zip(alone, helped, strict=True):
            assert torch.equal(a.image, b.image)
            assert a.sample.tolist() == b.sample.tolist()


def test_a_gallery_is_all_of_training_in_order_and_unchanged(people):
    data = module(people, augment=True, flip=True)
    batches = list(data.gallery_dataloader())
    assert [int(s) for b in batches for s in b.sample] == [p.sample for p in data.chosen["train"]]
    plain = module(people).dataset("train")
    torch.testing.assert_close(torch.cat([b.image for b in batches]), torch.stack([face.image for face in plain]))


def test_only_what_the_trainer_needs_is_aligned(people, tmp_path):
    data = module(people)
    data.prepare_data()
    assert not (tmp_path / "cache").exists()
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))
    data.prepare_data()
    assert set(data._sets) == {"test"}


def test_a_split_without_people_is_told_and_validation_without_people_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set" / "s1").mkdir(parents=True)  # a training person
    cv2.imwrite(str(tmp_path / "set" / "s1" / "1.png"), np.full((40, 40, 3), 99, np.uint8))
    data = module(str(tmp_path / "set"))
    assert data.val_dataloader() == []
    assert len(list(data.train_dataloader())) == 1  # fewer faces than a batch still train
    with pytest.raises(ValueError, match="nobody in the test split: of its 1 pictures, .* train 1, val 0, test 0"):
        data.test_dataloader()


def test_workers_read_what_the_main_process_reads(people):
    alone = module(people).test_dataloader()
    helped = module(people, num_workers=2).test_dataloader()
    for a, b in zip(alone, helped, strict=True):
        torch.testing.assert_close(a.image, b.image)


def test_a_pickled_data_set_leaves_its_pixels_on_disk(people):
    faces = module(people).dataset("train")
    _ = faces[0]
    assert len(pickle.dumps(faces)) < faces.images.nbytes / 2
    torch.testing.assert_close(pickle.loads(pickle.dumps(faces))[3].image, faces[3].image)


def test_an_augmentation_is_drawn_from_its_seed():
    change = augmentation(colour=True, flip=True)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    place = np.eye(2, 3, dtype=np.float32)
    first = [change(image, place, seed)[0] for seed in (4, 4, 6)]
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).any()


def test_a_mirrored_face_knows_its_place():
    change = augmentation(colour=False, flip=True)
    image = np.zeros((32, 32, 3), np.uint8)
    image[10, 7] = 255
    place = np.array([[2, 0, 1], [0, 2, 4]], np.float32)  # picture (3, 3) lands on crop (7, 10)
    mirrored, moved = change(image, place, 1)
    x, y = moved @ [3, 3, 1]
    assert mirrored[int(y), int(x)].min() == 255
    np.testing.assert_array_equal(change(image, place, 2)[1], place)


def test_augmentation_changes_training_faces_and_no_others(people):
    plain, changed = module(people), module(people, augment=True)
    assert any(
        (a.image != b.image).any() for a, b in zip(plain.dataset("train"), changed.dataset("train"), strict=True)
    )
    assert all((a.image == b.image).all() for a, b in zip(plain.dataset("test"), changed.dataset("test"), strict=True))


def test_generated_faces_are_not_augmented_since_their_codes_are_exact(linear_generator, tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path))
    source = GeneratedFaces(linear_generator, count=30)
    data = FaceDataModule(source, size=32, num_workers=0, batch_size=8)
    assert next(iter(data.train_dataloader())).w.shape == (8, 5, 512)
    with pytest.raises(ValueError, match="not its style code's"):
        FaceDataModule(source, size=32, num_workers=0, flip=True).train_dataloader()


def labels(path, people, columns="pseudo_male,age"):
    rows = [f"{p.file},{1 if p.sample % 2 else -1},{p.sample}.5" for p in ImageFolderFaces(people).pictures]
    path.write_text("\n".join(["# pseudo-labels of faces, guessed by sha256:0", f"file,{columns}", *rows]))
    return str(path)


def test_labels_of_a_csv_become_attributes(people, tmp_path):
    data = module(people, labels=labels(tmp_path / "labels.csv", people))
    assert data.attribute_names == ("pseudo_male",)
    for face in data.dataset("train"):
        assert face.attributes.tolist() == [1 if int(face.sample) % 2 else -1]


def test_labels_that_do_not_fit_are_told(people, tmp_path):
    path = labels(tmp_path / "labels.csv", people)
    with pytest.raises(ValueError, match="no column 'age' of -1 and 1; it has pseudo_male"):
        _ = module(people, labels=path, attributes=["age"]).attribute_names
    (tmp_path / "part.csv").write_text("file,pseudo_male\nnobody.png,1\n")
    with pytest.raises(ValueError, match="has no labels for"):
        module(people, labels=str(tmp_path / "part.csv")).dataset("train")
    (tmp_path / "none.csv").write_text("# empty\n")
    with pytest.raises(ValueError, match="expected a header with `file`"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="expected `labels` beside `attributes`"):
        module(people, attributes=["pseudo_male"])


class Count(L.LightningModule):
    """Counts the faces that each loop hands it."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), Counter()

    def training_step(self, batch, _):
        self.seen["train"] += len(batch.image)
        return self.weight * 0

    def validation_step(self, batch, _):
        self.seen["val"] += len(batch.image)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_runs_over_the_data_module(people, quick_trainer):
    data, model = module(people), Count()
    quick_trainer(steps=-1, max_epochs=1, limit_val_batches=1.0, use_distributed_sampler=False).fit(model, data)
    assert model.seen["train"] == len(data.chosen["train"]) // 4 * 4
    assert model.seen["val"] == len(data.chosen["val"])


@pytest.mark.parametrize("name", ["orl", "lfw", "celeba", "ffhq", "folder"])
def test_each_data_configuration_builds_its_module(name):
    from pathlib import Path

    from experiments.build import read_yaml

    spec = read_yaml(Path(__file__).parents[1] / "configs" / "data" / f"{name}.yaml")["data"]
    data = build(L.LightningDataModule, spec, f"data {name!r}")
    assert isinstance(data, FaceDataModule)
    assert data.faces.name == {"folder": "faces"}.get(name, name)
