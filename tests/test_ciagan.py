import pytest
import torch
from conftest import NoiseFaces
from torch import nn

from datamodules.batch import face_batch
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.baselines.ciagan import CIAGAN, CIAGANWeights, contrastive, sketch
from lightning_modules.keys import KeyRing
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.frozen import Frozen
from lightning_modules.trained import card_hashes

# where the 68 points lie in an aligned crop, about: jaw, brows, nose, eyes, mouth
GROUPS = [(17, 0.2, 0.5, 0.8, 0.9), (10, 0.3, 0.4, 0.7, 0.4), (9, 0.5, 0.45, 0.5, 0.65), (12, 0.35, 0.48, 0.65, 0.48)]
GROUPS += [(20, 0.4, 0.75, 0.6, 0.78)]


class FixedLandmarks(Frozen):
    """The same 68 points for every face, moved by its mean."""

    card_hashes = {"fixed-landmarks": "sha256:0"}

    def __init__(self):
        super().__init__()
        lines = [torch.stack([torch.linspace(x, x2, n), torch.linspace(y, y2, n)], 1) for n, x, y, x2, y2 in GROUPS]
        lines[0][:, 1] = 0.5 + 0.4 * torch.linspace(0, torch.pi, 17).sin()  # a chin
        self.points = nn.Parameter(torch.cat(lines))
        self.freeze()

    def forward(self, images):
        return self.points + 0.01 * images.mean((1, 2, 3))[:, None, None]


def small(**options):
    tiny = {"size": 64, "width": 8, "discriminator_width": 4, "siamese_width": 4, "identities": 16}
    return CIAGAN(FixedLandmarks(), **{**tiny, **options})


def awake(method):
    """The method with a generator that does not hand out the background, as one does before training."""
    torch.manual_seed(2)
    nn.init.normal_(method.generator.out.weight, std=0.2)
    return method.eval()


def nothing(faces):
    return torch.zeros(len(faces.image), 0)


def moved(before, module):
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def test_it_makes_pictures_of_its_size_and_cannot_undo_them():
    faces, method = NoiseFaces(count=4).whole(), awake(small())
    assert isinstance(method, ReversibleAnonymizer)
    trip = method.round_trip(faces, KeyRing.from_seed(0))
    assert trip.anonymized.shape == faces.image.shape
    assert trip.anonymized.abs().max() <= 1
    assert trip.recovered.shape[1] == trip.other.shape[1] == 0
    with pytest.raises(ValueError, match="not reversible"):
        method.recover(faces, nothing(faces))


def test_the_inner_face_is_not_looked_at_and_what_is_around_it_stays():
    faces, method = NoiseFaces(count=3).whole(), awake(small())
    with torch.no_grad():
        drawn, background, mask = method._seen(faces.image)
        assert 0.1 < mask.mean() < 0.6
        assert (background[(mask == 1).expand_as(background)] == 0).all()
        made = method.anonymize(faces, nothing(faces))
        around = (mask == 0).expand_as(made)
        assert torch.equal(made[around], faces.image[around])
        # another inner face under the same landmarks and mask: nothing changes
        swapped = torch.where(mask == 1, -faces.image, faces.image)
        again = method._paint(drawn, (1 - mask) * swapped, mask, faces.identity)
        torch.testing.assert_close(again, method._paint(drawn, background, mask, faces.identity))


def test_lines_run_through_contour_bridge_and_lips_and_spare_the_eyes():
    points = FixedLandmarks()(torch.zeros(1, 3, 64, 64))
    picture = sketch(points, 64)
    assert picture.shape == (1, 3, 64, 64)
    assert picture.min() == 0
    assert picture.max() <= 1
    x, y = (64 * points[0]).long().clamp(max=63).unbind(1)
    for channel, shown in enumerate((slice(0, 17), slice(27, 31), slice(48, 60))):
        assert (picture[0, channel, y[shown], x[shown]] > 0).all()
    assert (picture[0, :, y[36:48], x[36:48]].sum(0) == 0)[[0, 1, 10, 11]].all()  # the eyes' outer points


def test_each_line_is_as_long_as_it_is():
    points = torch.zeros(1, 68, 2)
    points[:, 27:31, 0], points[:, 27:31, 1] = 0.5, torch.linspace(0.25, 0.75, 4)
    bridge = sketch(points, 64)[0, 1]
    assert bridge.sum() == pytest.approx(32 * 1.5, rel=0.1)
    assert bridge[:14].sum() == bridge[50:].sum() == bridge[:, :29].sum() == 0


def test_a_face_is_hidden_alike_each_time_and_beside_others():
    faces, method = NoiseFaces(count=6).whole(), awake(small())
    with torch.no_grad():
        made = method.anonymize(faces, nothing(faces))
        assert torch.equal(method.anonymize(faces, nothing(faces)), made)
        alone = type(faces)(*(field[2:3] for field in faces))
        torch.testing.assert_close(method.anonymize(alone, nothing(alone))[0], made[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.train().anonymize(faces, nothing(faces)), made)


def test_targets_are_people_met_in_training_and_differ_by_face_and_seed():
    image = torch.zeros(1, 3, 64, 64).expand(40, -1, -1, -1)
    faces = face_batch(image, sample=torch.arange(40))
    with torch.no_grad():
        method = awake(small())
        every = method.anonymize(faces, nothing(faces))
        assert len(every.flatten(1).unique(dim=0)) > 10
        method.met[[3, 5]] = True
        made = method.anonymize(faces, nothing(faces))
        both = [method._painted(faces.image[:1], torch.tensor([person]))[0] for person in (3, 5)]
        near = torch.stack([(made - one).abs().amax((1, 2, 3)) < 1e-4 for one in both])
        assert near.any(0).all()
        assert near.any(1).all()
        method.seed = 1
        assert (method.anonymize(faces, nothing(faces)) - made).abs().amax((1, 2, 3)).gt(1e-3).any()


def test_a_few_steps_move_every_parameter_but_the_frozen_ones(quick_trainer):
    method = small(learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(3)
    trainer.fit(method, NoiseFaces())
    assert trainer.global_step == 3
    assert set(before) - moved(before, method) == {"mask.landmarks.points"}
    terms = {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}
    assert all(torch.isfinite(value) for value in terms.values())
    weighted_sum({name: terms[name] for name in ("adversarial", "identity", "reconstruct")}, CIAGANWeights())
    assert torch.equal(method.met.nonzero()[:, 0], torch.arange(6))


def test_the_first_stage_trains_the_siamese_network_alone(quick_trainer):
    method = small(first="siamese", learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(2)
    trainer.fit(method, NoiseFaces())
    assert moved(before, method) == {name for name in before if name.startswith(("siamese.", "proxies"))}
    assert trainer.global_step == 2


def test_frozen_landmarks_stay_out_of_checkpoints():
    method = small()
    assert not any(name.startswith("mask") for name in method.state_dict())
    assert card_hashes(method) == {"fixed-landmarks": "sha256:0"}
    assert not method.train().mask.landmarks.training


def test_it_learns_eight_faces_by_heart(quick_trainer):
    method = small(learning_rate=2e-3, weights=CIAGANWeights(adversarial=0.1, identity=0.1, reconstruct=10.0))
    faces = NoiseFaces(count=8, people=8, batch_size=8)
    whole = faces.whole()

    def missed():
        with torch.no_grad():
            return (method._painted(whole.image, whole.identity) - whole.image).abs().mean()

    before = missed()
    quick_trainer(30, max_epochs=-1).fit(method, faces)
    assert missed() < 0.8 * before


def test_the_made_face_is_pulled_to_the_features_of_its_target():
    one, two = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=2)
    torch.testing.assert_close(contrastive(one, two), (2 - 2 * (one * two).sum(1)).mean())
    assert contrastive(one, one) == 0


def test_a_person_beyond_the_proxies_is_named(quick_trainer):
    with pytest.raises(ValueError, match="raise `identities`"):
        quick_trainer(1).fit(small(identities=2), NoiseFaces())
