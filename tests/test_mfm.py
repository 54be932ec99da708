from types import SimpleNamespace

import pytest
import torch
from conftest import LinearRecognizer, NoiseFaces

from datamodules.batch import face_batch
from lightning_modules.baselines.mfm import MfM, MfMWeights, spread_out
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.losses import weighted_sum


def small(**options):
    torch.manual_seed(0)
    return MfM(LinearRecognizer(), **{"size": 64, "width": 4, "blocks": 1, "key_bits": 8, **options})


def awake(method):
    """The method with a generator that adds something, as before training none does."""
    torch.nn.init.normal_(method.generator.out.weight, std=0.05)
    return method


def test_every_factor_and_the_direction_matter():
    method, faces = awake(small(attributes=2)).eval(), NoiseFaces(count=2, attributes=2).whole()
    key = KeySpec("bits", 8).random(2)
    with torch.no_grad():
        hidden = method.anonymize(faces, key)
        assert hidden.shape == faces.image.shape
        assert hidden.abs().max() <= 1
        changed = [method.anonymize(faces, method.key_spec.one_off(key, bit)) for bit in range(8)]
        for entry in torch.eye(2):
            changed.append(method.anonymize(faces._replace(attributes=faces.attributes * (1 - 2 * entry)), key))
        changed.append(method.recover(faces, key))
    assert all((picture - hidden).abs().max() > 1e-3 for picture in changed)


def test_what_does_not_fit_is_named():
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="expected a key of 8 bits, got 16"):
        small().anonymize(face_batch(image), torch.ones(1, 16))
    with pytest.raises(ValueError, match="expected 2 attributes a face, got 0"):
        small(attributes=2).recover(face_batch(image), torch.ones(1, 8))
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        small(jpeg=2.0)


def test_a_face_depends_on_nobody_else_and_not_on_the_mode():
    method, faces = awake(small()), NoiseFaces(count=3).whole()
    key = KeySpec("bits", 8).random(3)
    together, trained = method.eval().anonymize(faces, key), method.train().anonymize(faces, key)
    alone = method.eval().anonymize(face_batch(faces.image[1:2]), key[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(together, trained)


def test_a_few_steps_move_every_parameter(quick_trainer):
    method = small(attributes=2, learning_rate=1e-2, warmup=1)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    recognizer = {name: value.clone() for name, value in method.recognizer.named_buffers()}
    trainer = quick_trainer(4)
    trainer.fit(method, NoiseFaces(count=8, attributes=2, batch_size=2))
    assert all(not torch.equal(before[name], p) for name, p in method.named_parameters())
    assert all(torch.equal(recognizer[name], value) for name, value in method.recognizer.named_buffers())
    assert not any(name.startswith("recognizer.") for name in method.state_dict())
    assert trainer.global_step == 4
    terms = {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}
    assert all(torch.isfinite(value) for value in terms.values())
    weighted_sum(terms, MfMWeights())  # refuses a term without a weight and a weight without a term


def test_the_bounds_move_the_way_their_names_say():
    """More information raises the lower bound's term and CLUB; each estimator alone learns from its own loss."""
    torch.manual_seed(0)
    method = small(warmup=0)
    method._trainer = SimpleNamespace(global_step=1)
    unit = [torch.nn.functional.normalize(codes, dim=1) for codes in torch.randn(3, 64, 512)]
    original, stranger, _ = unit
    optimizer = torch.optim.Adam([*method.recovered_head.parameters(), *method.hidden_head.parameters()], 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        method._estimator_loss(original, original, stranger, original, stranger).backward()
        optimizer.step()
    with torch.no_grad():
        kept = method._identity(original, original, stranger, original, stranger)
        lost = method._identity(original, stranger, stranger, stranger, stranger)
    assert kept["recovered_information"] < lost["recovered_information"]
    assert kept["hidden_information"] > 10 * lost["hidden_information"].abs()
    assert spread_out(original).square().mean() == pytest.approx(1, rel=1e-4)


def test_the_round_trip_knows_every_leg():
    faces = NoiseFaces(count=4).whole()
    trip = awake(small()).eval().round_trip(faces, KeyRing.from_seed(0))
    for leg in ("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered"):
        assert getattr(trip, leg).shape == faces.image.shape


def test_the_first_stage_paints_where_a_face_is_covered_and_asks_no_recogniser(quick_trainer):
    method, faces = small(first="painter", attributes=2, learning_rate=5e-3), NoiseFaces(attributes=2, batch_size=8)
    estimators = {name for name, _ in method.named_parameters() if "_head" in name and "password" not in name}
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    method.recognizer = None
    trainer = quick_trainer(4, max_epochs=-1)
    trainer.fit(method, faces)
    names = ("adversarial", "attributes", "layout", "password")
    assert set(trainer.logged_metrics) == {f"train/{name}" for name in names}
    with pytest.raises(ValueError, match="expected 2 attributes a face, got 0"):
        quick_trainer(1).fit(method, NoiseFaces())
    assert {name for name, p in method.named_parameters() if torch.equal(before[name], p)} == estimators
