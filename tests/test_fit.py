from types import SimpleNamespace

import pytest
import torch
from conftest import DetailRecognizer, LinearRecognizer, NoiseFaces
from torch.nn import functional as F

from datamodules.batch import face_batch
from lightning_modules.baselines.fit import FIT, FITWeights, Legs, alike, fours
from lightning_modules.carriers import quantize
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.blocks import means, oval
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.networks.translator import Translator
from lightning_modules.networks.views import codes_of, view


def small(recognizer=None, **options):
    torch.manual_seed(0)
    return FIT(recognizer or LinearRecognizer(), **{"size": 32, "width": 4, "blocks": 1, "key_bits": 8, **options})


def awake(method):
    """The method with a generator that adds something, as before training none does."""
    torch.nn.init.normal_(method.generator.out.weight, std=0.05)
    return method


def every_key(bits):
    """All ``2 ** bits`` passwords."""
    return 2.0 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1).float() - 1


def test_both_verbs_give_pictures_and_each_bit_matters():
    method, faces = awake(small()).eval(), NoiseFaces(size=32, count=2).whole()
    key = KeySpec("bits", 8).random(2)
    with torch.no_grad():
        hidden = method.anonymize(faces, key)
        assert hidden.shape == faces.image.shape
        assert hidden.abs().max() <= 1
        assert torch.equal(method.anonymize(faces, key), hidden)
        for bit in range(8):
            assert (method.anonymize(faces, method.key_spec.one_off(key, bit)) - hidden).abs().max() > 1e-3
        assert torch.equal(method.recover(faces, key), method.anonymize(faces, -key))
    with pytest.raises(ValueError, match="expected a key of 8 bits, got 16"):
        method.anonymize(faces, torch.ones(2, 16))


def test_faces_are_painted_over_their_block_means_and_nothing_is_around_them():
    image = 0.5 * NoiseFaces(size=32, count=2).whole().image
    around = oval(32) == 0
    blank, made = (method.anonymize(face_batch(image), torch.ones(2, 8)) for method in (small(), awake(small())))
    for anonymized in (blank, made):
        assert torch.equal(anonymized[:, :, around], image[:, :, around])
        assert (means(anonymized) - means(image)).abs().mean() < 0.02  # but for what is clipped
    assert (blank - image).abs().mean() > 0.005  # covered before anything is learned
    assert (made - blank).abs().mean() > 0.005


def test_a_face_depends_on_nobody_else_and_not_on_the_mode():
    method, faces = awake(small()), NoiseFaces(size=32, count=3).whole()
    key = KeySpec("bits", 8).random(3)
    together, trained = method.eval().anonymize(faces, key), method.train().anonymize(faces, key)
    alone = method.eval().anonymize(face_batch(faces.image[1:2]), key[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(together, trained)


def test_a_linear_layer_stands_for_constant_planes_under_reflection():
    generator = Translator(size=16, planes=3, width=4, blocks=1)
    image, numbers = torch.rand(2, 3, 16, 16), torch.randn(2, 3)
    planes = numbers[:, :, None, None].expand(-1, -1, 16, 16)
    kernel = torch.randn(4, 3, 7, 7)
    generator.planes.weight.data = kernel.sum((2, 3))
    whole = F.conv2d(F.pad(torch.cat([image, planes], 1), (3,) * 4, mode="reflect"),
                     torch.cat([generator.stem.weight, kernel], 1), generator.stem.bias)  # fmt: skip
    made = generator.stem(image) + generator.planes(numbers)[:, :, None, None]
    torch.testing.assert_close(made, whole, atol=1e-4, rtol=1e-4)


def test_four_bits_are_one_class_of_sixteen():
    keys = every_key(8).flip(1)  # the first bit the highest
    assert torch.equal(fours(keys)[:, 0] * 16 + fours(keys)[:, 1], torch.arange(256))
    with pytest.raises(ValueError, match="a multiple of 4, got 6"):
        small(key_bits=6)
    with pytest.raises(ValueError, match="a multiple of 8, got 36"):
        small(size=36)


def test_strangers_are_at_right_angles():
    one, two = torch.eye(3)[:1], torch.eye(3)[1:2]
    assert alike(one, two) == alike(one, -one) == pytest.approx(0, abs=1e-2)
    assert alike(one, one) == pytest.approx(1, abs=1e-2)


def test_all_pictures_of_a_step_are_seen_alike():
    image = torch.rand(2, 3, 8, 8)
    seen = [view(image, draw) for draw in range(32)]
    assert {len(picture[0, 0]) for picture in seen} == {8, 4}
    assert any(torch.equal(picture, image) for picture in seen)
    assert any(torch.equal(picture, image.flip(-1)) for picture in seen)
    assert all(torch.equal(view(image, draw), picture) for draw, picture in enumerate(seen))
    original, made = codes_of(LinearRecognizer(), [image, image.clone().requires_grad_()], 1)
    torch.testing.assert_close(original, made)
    assert made.requires_grad
    assert not original.requires_grad


def identity_network():
    try:
        return MobileFaceNet()
    except OSError as missing:
        pytest.skip(str(missing))


def test_a_few_steps_move_every_parameter_and_no_frozen_one(quick_trainer):
    # behind gains that start at zero, gradients come later
    method = FIT(identity_network(), size=32, width=4, blocks=1, key_bits=8, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(3)
    trainer.fit(method, NoiseFaces(size=32, count=6, batch_size=2))
    moved = {name for name, p in method.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if not name.startswith("recognizer.")}
    assert trainer.global_step == 3
    assert not any(name.startswith("recognizer.") for name in method.state_dict())
    assert not method.recognizer.training
    assert method.loss_networks == {"mobilefacenet"}


def losses_of(trainer, method, batch):
    trainer.fit(method, NoiseFaces(size=32, count=8, batch_size=batch))
    return {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}


def test_each_loss_has_a_weight_and_those_of_hiding_fall_on_eight_faces(quick_trainer):
    first = losses_of(quick_trainer(1), small(DetailRecognizer(), learning_rate=5e-3), 8)
    last = losses_of(quick_trainer(20), small(DetailRecognizer(), learning_rate=5e-3), 8)
    assert all(torch.isfinite(value) for value in last.values())
    assert weighted_sum(last, FITWeights()) < weighted_sum(first, FITWeights())
    assert last["identity"] + last["diversity"] < 0.9 * (first["identity"] + first["diversity"])


def test_recovery_gets_its_weight_by_and_by():
    method, faces = small(warmup=4), NoiseFaces(size=32, count=2).whole()
    legs = [faces.image] * 3 + [-faces.image] * 3
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        method._trainer = SimpleNamespace(global_step=step)
        looks = method._looks(Legs(*legs))
        torch.testing.assert_close(looks["reconstruct"], share * 2 * faces.image.abs().mean())
        torch.testing.assert_close(looks["wrong_layout"], 2 * faces.image.abs().mean())


def test_training_meets_what_was_saved(quick_trainer):
    method, image = awake(small(jpeg=1.0)), NoiseFaces(size=32, count=2).whole().image
    keys = [KeySpec("bits", 8).random(2) for _ in range(4)]
    seen = []
    method.generator.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    method._trainer = SimpleNamespace(global_step=0)
    legs = method._legs(image, *keys)
    assert not torch.allclose(seen[1][:2], legs.anonymized, atol=1e-3)  # a JPEG
    method.jpeg = 0.0
    legs = method._legs(image, *keys)
    assert torch.equal(seen[3][:2], quantize(legs.anonymized))
    legs.recovered.sum().backward()
    assert method.generator.stem.weight.grad.abs().sum() > 0


def test_the_round_trip_knows_every_leg():
    faces = NoiseFaces(size=32, count=4).whole()
    trip = awake(small()).eval().round_trip(faces, KeyRing.from_seed(0))
    for leg in ("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered"):
        assert getattr(trip, leg).shape == faces.image.shape


class PatternsByKey(torch.nn.Module):
    """A generator that recovers all but perfectly: each bit moves the picture by a pattern of its own."""

    def __init__(self, bits):
        super().__init__()
        self.patterns = torch.randn(bits, 3 * 8 * 8, generator=torch.Generator().manual_seed(4)) / bits**0.5

    def forward(self, image, numbers):
        moved = F.interpolate((numbers @ self.patterns).view(-1, 3, 8, 8), size=image.shape[-2:], mode="bilinear")
        return (image + 1.5 * moved).clamp(-1, 1)


def found_by_trying(method, file, photograph):
    """The password under which the one hidden in ``file`` looks most like somebody of whom there is another picture."""
    scores = []
    with torch.no_grad():
        wanted = method.recognizer(photograph)
        for some in every_key(method.key_spec.length).split(256):
            opened = method.recover(face_batch(file.expand(len(some), -1, -1, -1)), some)
            scores.append(F.cosine_similarity(method.recognizer(opened), wanted))
    return every_key(method.key_spec.length)[torch.cat(scores).argmax()]


def another_picture(image):
    return (0.8 * image + 0.1 + 0.1 * torch.randn_like(image)).clamp(-1, 1)


@pytest.mark.parametrize("bits", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_a_short_password_is_found_by_trying_all(bits):
    method, faces = small(key_bits=bits), NoiseFaces(size=32, count=4).whole()
    method.generator = PatternsByKey(bits)
    keys = KeySpec("bits", bits).random(4)
    hidden = quantize(method.anonymize(faces, keys))
    assert F.cosine_similarity(method.recognizer(hidden), method.recognizer(faces.image)).max() < 0.8
    for file, image, key in zip(hidden, faces.image, keys, strict=True):
        assert torch.equal(found_by_trying(method, file[None], another_picture(image[None])), key)


def test_the_first_stage_paints_where_a_face_is_covered_and_asks_no_recogniser(quick_trainer):
    method, faces = small(first="painter", learning_rate=5e-3), NoiseFaces(size=32, count=8, batch_size=8)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    method.recognizer = None
    trainer = quick_trainer(4, max_epochs=-1)
    trainer.fit(method, faces)
    assert set(trainer.logged_metrics) == {"train/adversarial", "train/layout", "train/password"}
    assert {name for name, p in method.named_parameters() if torch.equal(before[name], p)} == set()
    image = faces.whole().image
    with torch.no_grad():
        legs = method._painted(image, torch.ones(8, 8))
    assert torch.equal(legs.anonymized, legs.recovered)
    assert torch.equal(legs.anonymized[:, :, oval(32) == 0], image[:, :, oval(32) == 0])
    assert (means(legs.anonymized) - means(image)).abs().mean() < 0.02  # those of the face, not of the covered one
