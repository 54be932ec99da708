"""The stream of training faces: every face once a round, the same whoever reads, and on where it was."""

from collections import Counter
from itertools import islice

import pytest
import torch
from conftest import NoiseFaces
from test_optimization import TwoPlayers

from datamodules.batch import face_batch
from datamodules.stream import Stream, Turns
from lightning_modules.callbacks import TrainingCheckpoint


class Turned(torch.utils.data.Dataset):
    """Faces whose brightness tells their row, and whose sample tells the seed of the turn."""

    def __init__(self, count=10):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, turn):
        image = torch.full((3, 8, 8), turn.row / self.count)
        return face_batch(image, identity=torch.tensor(turn.row % 3), sample=torch.tensor(turn.seed))


class StreamFaces(NoiseFaces):
    """As those, but a stream; so many faces at once."""

    def __init__(self, at_once=4, workers=0, count=10):
        super().__init__()
        self.at_once, self.workers, self.faces, self.seen = at_once, workers, Turned(count), []

    def train_dataloader(self):
        return Stream(self.faces, self.at_once, seed=1, num_workers=self.workers)


class Watched(TwoPlayers):
    """Notes whom it saw."""

    def training_step(self, batch, batch_idx):
        self.trainer.datamodule.seen.append(batch.sample.tolist())
        super().training_step(batch, batch_idx)


def rows(turns):
    return [turn.row for batch in turns for turn in batch]


def test_every_face_comes_once_a_round_and_batches_are_full():
    turns, seen = Turns(10, 4, seed=0), []
    for _ in range(10):
        seen += rows(turns)
        turns.start += len(turns) * turns.together
    assert len(seen) == 80
    rounds = [seen[at : at + 10] for at in range(0, 80, 10)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert len(set(map(tuple, rounds))) == 8


def test_two_turns_of_a_face_have_seeds_of_their_own():
    turns = Turns(3, 3, seed=0)
    seeds = []
    for _ in range(50):
        seeds += [turn.seed for batch in turns for turn in batch]
        turns.start += 3
    assert len(set(seeds)) == 150
    assert 0.3 < sum(seed % 2 for seed in seeds) / 150 < 0.7


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_what_one_would_have_also_from_the_middle_on(processes):
    whole = Turns(24, 6, seed=5)
    parts = [Turns(24, 6 // processes, 5, processes, rank) for rank in range(processes)]
    for turns in (whole, *parts):
        turns.start = 13
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [turn for turns in zip(*shares, strict=True) for turn in turns] == batch


def test_fewer_faces_than_a_batch_still_train():
    stream = Stream(Turned(3), 16, seed=0)
    assert [len(batch.sample) for batch in stream] == [3]
    shared = [Stream(Turned(3), 16, 0, processes=2, rank=rank) for rank in range(2)]
    assert [[len(batch.sample) for batch in one] for one in shared] == [[1], [1]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_a_run_that_was_cut_sees_what_a_whole_one_sees(cut, workers, quick_trainer, tmp_path):
    """A pass has two batches of four of ten faces, so cuts fall within and between passes."""

    def run(steps, folder, ckpt_path=None):
        torch.manual_seed(0)
        saver = TrainingCheckpoint(every_n_train_steps=1)
        options = {"callbacks": [saver], "enable_checkpointing": True, "default_root_dir": tmp_path / folder}
        method, faces = Watched(), StreamFaces(workers=workers)
        quick_trainer(steps, max_epochs=-1, **options).fit(method, faces, ckpt_path=ckpt_path)
        return method, faces.seen

    whole, expected = run(7, "whole")
    _, begun = run(cut, "cut")
    resumed, rest = run(7, "cut", tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert begun + rest == expected
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_goes_on_with_other_batches(quick_trainer, tmp_path):
    """As on another number of processes: what was seen is counted in faces."""

    def run(steps, at_once, ckpt_path=None):
        saver = TrainingCheckpoint(every_n_train_steps=1)
        faces = StreamFaces(at_once, count=24)
        options = {"callbacks": [saver], "enable_checkpointing": True, "default_root_dir": tmp_path}
        quick_trainer(steps, max_epochs=-1, **options).fit(Watched(), faces, ckpt_path=ckpt_path)
        return sum(faces.seen, [])

    before = run(5, 2)
    after = run(20, 6, tmp_path / "checkpoints" / "last.ckpt")
    stream = Stream(Turned(24), 2, seed=1)
    expected = [int(s) for _ in range(9) for batch in stream for s in batch.sample][: 10 + 15 * 6]
    assert before + after == expected
    assert max(Counter(before + after).values()) == 1  # a seed a turn


def test_overfitting_has_the_same_faces_in_every_pass():
    stream = Stream(Turned(10), 4, seed=0, again=True)
    passes = [[batch.sample.tolist() for batch in stream] for _ in range(2)]
    assert passes[0] == passes[1]


def test_the_next_pass_goes_on_where_the_last_was_left():
    stream = Stream(Turned(10), 4, seed=0)
    left = [batch.sample.tolist() for batch in islice(stream, 1)]
    again = [batch.sample.tolist() for batch in stream]
    fresh = Stream(Turned(10), 4, seed=0)
    assert left + again == [batch.sample.tolist() for _ in range(2) for batch in fresh][:3]
