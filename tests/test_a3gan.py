import pytest
import torch
from conftest import DetailRecognizer, NoiseFaces
from torch import nn

from datamodules.batch import face_batch
from lightning_modules.baselines.a3gan import A3GAN, A3GANWeights, SuppressiveConv
from lightning_modules.keys import KeyRing
from lightning_modules.losses import push_apart, weighted_sum
from lightning_modules.networks.blocks import means
from lightning_modules.networks.frozen import Frozen


class FrozenRecognizer(Frozen):
    """A recogniser with a weight, which is to stay."""

    card_hashes = {"frozen-recognizer": "sha256:0"}

    def __init__(self):
        super().__init__()
        self.inner, self.scale = DetailRecognizer(), nn.Parameter(torch.ones(()))
        self.freeze()

    def forward(self, images):
        return self.inner(self.scale * images)


def small(**options):
    tiny = {"size": 64, "width": 8, "discriminator_width": 4, "blocks": 1, "free": 4}
    return A3GAN(FrozenRecognizer(), **{**tiny, **options})


def awake(method):
    """The method with a decoder that does not add nothing, as one does before training."""
    torch.manual_seed(2)
    nn.init.normal_(method.decoder.out.weight, std=0.05)
    return method.eval()


def nothing(faces):
    return torch.zeros(len(faces.image), 0)


def moved(before, module):
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


@pytest.mark.parametrize("size", [64, 128])
def test_it_makes_pictures_of_its_size_and_cannot_undo_them(size):
    faces, method = NoiseFaces(count=3).whole(), awake(small(size=size))
    trip = method.round_trip(faces, KeyRing.from_seed(0))
    assert trip.anonymized.shape == faces.image.shape
    assert method.anonymize(method.fit_size(faces), nothing(faces)).shape == (3, 3, size, size)
    assert trip.recovered.shape[1] == trip.other.shape[1] == 0
    with pytest.raises(ValueError, match="not reversible"):
        method.recover(faces, nothing(faces))


def test_what_lies_around_the_face_stays_bit_for_bit_and_so_do_block_means():
    image = 0.5 * NoiseFaces(count=3).whole().image
    method = awake(small())
    with torch.no_grad():
        made = method.anonymize(face_batch(image), torch.zeros(3, 0))
    around = method.window == 0
    assert torch.equal(made[:, :, around], image[:, :, around])
    assert (made - image).abs().mean() > 0.01
    assert (means(made) - means(image)).abs().mean() < 0.02  # but for what is clipped


def test_a_face_is_hidden_alike_each_time_and_beside_others():
    faces, method = NoiseFaces(count=6).whole(), awake(small(injected=3, kept=2))
    with torch.no_grad():
        made = method.anonymize(faces, nothing(faces))
        assert torch.equal(method.anonymize(faces, nothing(faces)), made)
        alone = type(faces)(*(field[2:3] for field in faces))
        torch.testing.assert_close(method.anonymize(alone, nothing(alone))[0], made[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.train().anonymize(faces, nothing(faces)), made)


def test_the_same_face_becomes_others_under_other_numbers_and_seeds():
    image, method = torch.zeros(2, 3, 64, 64), awake(small())
    faces = face_batch(image, sample=torch.tensor([0, 1]))
    with torch.no_grad():
        one, two = method.anonymize(faces, nothing(faces))
        assert (one - two).abs().mean() > 1e-3
        method.seed = 1
        assert (method.anonymize(faces, nothing(faces))[0] - one).abs().mean() > 1e-3


def test_attributes_that_stay_are_the_faces_and_the_others_are_drawn():
    method = small(injected=3, kept=2)
    numbers, own = torch.randn(200, 5), torch.where(torch.rand(200, 3) > 0.5, 1.0, -1.0)
    injection = method._injection(numbers, own)
    assert injection.shape == (200, 3 + 4)
    assert torch.equal(injection[:, 1:3], own[:, 1:])
    assert torch.equal(injection[:, 0], numbers[:, 0].sign())
    assert torch.equal(injection[:, 3:], numbers[:, 1:])
    assert 0.3 < (injection[:, 0] == own[:, 0]).float().mean() < 0.7


def test_attributes_that_stay_are_read_off_the_face():
    method, faces = awake(small(injected=1, kept=1)), NoiseFaces(count=2).whole()
    made = []
    for bias in (-100.0, 100.0):
        nn.init.constant_(method.discriminator.attributes.bias, bias)
        with torch.no_grad():
            made.append(method.anonymize(faces, nothing(faces)))
    assert (made[0] - made[1]).abs().mean() > 1e-3


def test_a_shut_gate_lets_nothing_pass():
    unit, x = SuppressiveConv(4, 8), torch.randn(2, 4, 16, 16)
    open_, share = unit(x)
    assert open_.shape == (2, 8, 8, 8)
    assert 0.7 < share < 1
    nn.init.constant_(unit.gate.bias, -100.0)
    nn.init.zeros_(unit.gate.weight)
    shut, share = unit(x)
    assert shut.abs().max() == share == 0


@pytest.mark.parametrize("injected", [0, 2])
def test_a_few_steps_move_every_parameter_but_the_frozen_ones(quick_trainer, injected):
    method = small(injected=injected, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(4)
    trainer.fit(method, NoiseFaces(attributes=injected))  # behind gains that start at zero, gradients come later
    assert trainer.global_step == 4
    assert set(before) - moved(before, method) == {"recognizer.scale"}
    terms = {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}
    assert all(torch.isfinite(value) for value in terms.values())
    terms.pop("discriminator")
    weighted_sum(terms, A3GANWeights())  # refuses a term without a weight and a weight without a term


def test_the_recogniser_is_named_and_stays_out_of_checkpoints():
    method = small()
    assert method.loss_networks == {"frozen-recognizer"}
    assert not any(name.startswith("recognizer") for name in method.state_dict())
    assert not method.train().recognizer.training


def test_it_learns_to_lead_eight_faces_away_from_themselves(quick_trainer):
    weights = A3GANWeights(adversarial=0.0, identity=2.0, attributes=0.0, code=0.0, layout=0.0, passed=0.1)
    method, faces = small(learning_rate=2e-3, weights=weights), NoiseFaces(count=8, people=8, batch_size=8)
    whole = faces.whole()

    def alike():
        with torch.no_grad():
            made = method.anonymize(whole, nothing(whole))
            return push_apart(method.recognizer(made), method.recognizer(whole.image), floor=-1.0)

    def passed():
        with torch.no_grad():
            return method.suppressor(whole.image)[1]

    before, open_ = alike(), passed()
    quick_trainer(30, max_epochs=-1).fit(method, faces)
    assert alike() < before - 0.02
    assert passed() < open_


def test_the_first_stage_learns_to_paint_covered_faces_back(quick_trainer):
    method, faces = small(learning_rate=5e-3, first="autoencoder"), NoiseFaces(count=8, people=8, batch_size=8)
    judged = {name: p.detach().clone() for name, p in method.discriminator.named_parameters()}
    trainer = quick_trainer(2, max_epochs=-1)
    trainer.fit(method, faces)
    before = trainer.logged_metrics["train/autoencoder"]
    trainer = quick_trainer(30, max_epochs=-1)
    trainer.fit(method, faces)
    assert trainer.logged_metrics["train/autoencoder"] < 0.9 * before
    assert not moved(judged, method.discriminator)


def test_what_is_drawn_while_training_does_not_depend_on_the_batch():
    method, faces = small(injected=2, kept=1), NoiseFaces(count=8, attributes=2).whole()
    together = method.training_keys(method.drawn, faces.sample, 0)
    assert torch.equal(method.training_keys(method.drawn, faces.sample[3:5], 0), together[3:5])
    assert len(together.unique(dim=0)) == 8


def test_missing_labels_and_odd_sizes_are_named(quick_trainer):
    with pytest.raises(ValueError, match="expected 2 attributes a face, got 0"):
        quick_trainer(1).fit(small(injected=2), NoiseFaces())
    with pytest.raises(ValueError, match="multiple of 32"):
        small(size=50)
    with pytest.raises(ValueError, match="kept <= injected"):
        small(injected=1, kept=2)
