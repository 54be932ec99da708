import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces
from lightning.pytorch.callbacks import Callback
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from datamodules.batch import face_batch
from datamodules.latent import LatentDataModule
from flows.conjugate import Conjugate
from flows.coupling import KeyedCoupling
from flows.homogeneous import LearnedConjugate
from flows.orthogonal import KeyedOrthogonal
from flows.sphere import KeyedSphere
from lightning_modules.carriers import quantize
from lightning_modules.ifadit import IFADITDisentangle, IFADITTransform
from lightning_modules.ifadit.networks import AttributeEncoder, Compensation
from lightning_modules.ifadit.refine import LEVELS, polish, refine
from lightning_modules.ifadit.transform import TransformWeights
from lightning_modules.keys import KeyRing
from lightning_modules.trained import load_trained, read_state, save_trained, weights_hash

TRAINED = {"disentangler.attribute_encoder", "disentangler.fusion"}


def disentangle(**options):
    return IFADITDisentangle(
        LinearGenerator(),
        LinearRecognizer(),
        **{"size": 64, "width": 8, "blocks": 1, "live_rows": 4, **options},
    )


def transform(flow=None, **options):
    flow = Conjugate(512, 16) if flow is None else flow
    options = {"size": 64, "width": 8, "blocks": 1, "live_rows": 4, **options}
    return IFADITTransform(LinearGenerator(), LinearRecognizer(), flow, **options)


def flow():
    return KeyedCoupling(dim=512, key_dim=32, blocks=2)


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_phase_1_moves_every_trainable_parameter(quick_trainer):
    method = disentangle(learning_rate=1e-2)
    before = snapshot(method)
    quick_trainer(3).fit(method, NoiseFaces(w_rows=5))
    assert {n for n, p in method.named_parameters() if not torch.equal(before[n], p)} == set(before)


def test_phase_1_learns(quick_trainer):
    method, faces = disentangle(learning_rate=3e-3), NoiseFaces(count=8, batch_size=8)
    before = method.eval().round_trip(faces.whole(), KeyRing.from_seed(0))
    quick_trainer(30, max_epochs=-1).fit(method.train(), faces)
    after = method.eval().round_trip(faces.whole(), KeyRing.from_seed(0))
    worse, better = ((t.inverted - t.original).square().mean() for t in (before, after))
    assert better < 0.7 * worse


def test_a_latent_warm_start_renders_nothing_and_needs_codes(quick_trainer, monkeypatch):
    method = disentangle(latent=True, learning_rate=1e-3)
    monkeypatch.setattr(method, "render", lambda w: pytest.fail("it rendered"))
    trainer = quick_trainer(3)
    trainer.fit(method, NoiseFaces(w_rows=5))
    assert trainer.logged_metrics["train/same/code"] > 0
    with pytest.raises(ValueError, match="needs faces of this very generator"):
        quick_trainer(1).fit(disentangle(latent=True), NoiseFaces())


def test_every_third_step_crosses_faces(quick_trainer):
    trainer = quick_trainer(3)
    trainer.fit(disentangle(), NoiseFaces())
    assert "train/crossed/identity" in trainer.logged_metrics
    assert trainer.logged_metrics["train/crossed/pixel"] == 0


def test_crossed_steps_may_hide_identities_under_keys(quick_trainer):
    strangers = Conjugate(512, 16)
    method = disentangle(crossed_every=1, transform=strangers)
    assert set(method.state_dict()) == set(disentangle().state_dict())
    before = snapshot(method)
    trainer = quick_trainer(2)
    trainer.fit(method, NoiseFaces())
    assert float(strangers.scales[0]) > 0
    assert trainer.logged_metrics["train/crossed/identity"] > 0
    assert {n for n, p in method.named_parameters() if not torch.equal(before[n], p)} == set(before)


@pytest.mark.parametrize("make", [None, flow], ids=["conjugate", "flow"])
def test_phase_2_moves_every_trainable_parameter_and_no_frozen_one(quick_trainer, make):
    method = transform(make() if make else None, learning_rate=1e-2)
    before = snapshot(method)
    trainable = {n for n, p in method.named_parameters() if p.requires_grad}
    quick_trainer(3).fit(method, NoiseFaces())
    assert {n for n, p in method.named_parameters() if not torch.equal(before[n], p)} == trainable
    assert not any(n.startswith("disentangler.") for n in trainable)


def test_the_right_key_recovers_the_identity_and_a_wrong_one_does_not():
    """With an ideal renderer the code itself travels: recovery is then the transform's own inverse."""
    method, faces = transform().eval(), NoiseFaces(count=40)
    with torch.no_grad():
        method.prepare(faces)
    z = method.identity(faces.whole().image)
    right, wrong = (method.key_spec.random(len(z), torch.Generator().manual_seed(s)) for s in (0, 1))
    hidden = method.transform(z, right)[0]
    back = method.transform.inverse(method.compensation(hidden), right)[0]
    lost = method.transform.inverse(method.compensation(hidden), wrong)[0]
    kept = method.transform.explained(z).sqrt()
    torch.testing.assert_close((back * z).sum(1), kept, atol=1e-3, rtol=0)
    assert (lost * z).sum(1).mean() < 0.5


def test_the_transform_is_fitted_once_and_travels_in_the_state(tmp_path):
    method, faces = transform(), NoiseFaces(count=40)
    method.prepare(faces)
    scales = method.transform.scales.clone()
    method.prepare(NoiseFaces(count=40, people=2))
    torch.testing.assert_close(method.transform.scales, scales)
    save_trained(method, tmp_path / "ifadit.safetensors", {})
    other = transform()
    load_trained(other, tmp_path / "ifadit.safetensors")
    torch.testing.assert_close(other.transform.scales, scales, atol=1e-3, rtol=1e-2)


def test_phase_2_starts_from_phase_1(tmp_path):
    first = disentangle()
    save_trained(first, tmp_path / "phase1.safetensors", {"steps": "7"})
    second = transform(disentangled=tmp_path / "phase1.safetensors")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, atol=1e-3, rtol=1e-2)


def test_weights_of_another_width_are_refused(tmp_path):
    save_trained(disentangle(width=16), tmp_path / "wide.safetensors", {})
    with pytest.raises(ValueError, match="does not fit IFADITTransform"):
        transform(disentangled=tmp_path / "wide.safetensors")


def test_frozen_networks_stay_out_of_the_state():
    assert all(any(n.startswith(t) for t in TRAINED) for n in disentangle().state_dict())


def test_the_untrained_compensation_changes_nothing():
    z = torch.nn.functional.normalize(torch.randn(4, 512), dim=1)
    torch.testing.assert_close(Compensation()(z), z)


def test_the_encoder_takes_any_picture_size():
    encoder = AttributeEncoder(rows=17, width=8, blocks=1).eval()
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == encoder(torch.zeros(1, 3, 256, 256)).shape == (1, 17, 512)


def test_a_face_does_not_depend_on_its_batch():
    method, images = transform(flow()).eval(), torch.rand(3, 3, 64, 64) * 2 - 1
    key = torch.randn(3, 32)
    together = method.anonymize(face_batch(images), key)
    torch.testing.assert_close(together[:1], method.anonymize(face_batch(images[:1]), key[:1]), atol=1e-4, rtol=1e-4)


def test_other_networks_give_another_hash():
    assert weights_hash(disentangle()) != weights_hash(disentangle())


def test_more_live_rows_than_the_generator_has_are_refused():
    with pytest.raises(ValueError, match="live_rows is 17, but this generator has 5"):
        disentangle(live_rows=17)


def test_preview_is_one_of_three_words():
    with pytest.raises(ValueError, match="train, always or never"):
        transform(preview="sometimes")


class HalfMask(torch.nn.Module):
    """The left half is the face."""

    def forward(self, *pictures):
        mask = torch.zeros_like(pictures[0][:, :1])
        mask[..., : mask.shape[-1] // 2] = 1
        return mask


def test_a_mask_leaves_what_is_outside_of_it_as_it_was():
    method, images = transform(flow(), mask=HalfMask()).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    face, key = face_batch(images), torch.randn(2, 32)
    for picture in (method.anonymize(face, key), method.recover(face, key), method.invert(face)):
        torch.testing.assert_close(picture[..., 32:], images[..., 32:], rtol=0, atol=0)
        assert not torch.equal(picture[..., :32], images[..., :32])


def test_refining_comes_closer_to_its_aim_and_does_not_depend_on_the_batch():
    generator, recognizer = LinearGenerator(), LinearRecognizer()
    w, z = torch.randn(3, 5, 512) * 0.1, torch.nn.functional.normalize(torch.randn(3, 512), dim=1)

    def missed(codes, z):
        return 1 - (recognizer(codes) * z).sum(1)

    closer = refine(generator, w, lambda image: missed(image, z), 20)
    assert (missed(generator(closer), z) < missed(generator(w), z)).all()
    alone = refine(generator, w[:1], lambda image: missed(image, z[:1]), 20)
    torch.testing.assert_close(alone, closer[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(refine(generator, w, lambda image: missed(image, z), 0), w)


def test_refinement_descends_on_what_will_be_saved_not_on_previews():
    class Dull(torch.nn.Module):
        """Its previews are darker than its pictures."""

        native_size, preview_head = 4, True

        def forward(self, w, size, preview=False):
            return w.mean((1, 2))[:, None, None, None].expand(-1, 3, size, size) - 0.5 * preview

    def missed(image):
        return (image - 1).square().mean((1, 2, 3))

    refined = refine(Dull(), torch.zeros(2, 4, 512), missed, 40)
    torch.testing.assert_close(refined.mean((1, 2)), torch.full((2,), 0.5), atol=0.02, rtol=0)  # previews alone: 0.75


def test_polishing_comes_closer_within_a_few_levels_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    recognizer, image = LinearRecognizer(), torch.rand(3, 3, 64, 64) * 2 - 1
    z = torch.nn.functional.normalize(recognizer(image) + 0.1 * torch.randn(3, 512), dim=1)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :40] = 1

    def missed(image):
        return 1 - (recognizer(image) * z[: len(image)]).sum(1)

    for where in (None, mask):
        closer = polish(image, missed, 20, where)
        assert (missed(quantize(closer)) < missed(image) - 0.01).all()
        assert (closer - image).abs().max() < (LEVELS + 0.01) * 2 / 255
        torch.testing.assert_close(polish(image[:1], missed, 20, where), closer[:1], atol=1e-3, rtol=0)
    assert torch.equal(closer[..., 40:], image[..., 40:])
    assert torch.equal(polish(image, missed, 0), image)


@pytest.mark.parametrize("mask", [None, HalfMask()], ids=["whole", "pasted"])
def test_an_anonymized_picture_is_polished_for_its_recipient(mask):
    torch.manual_seed(0)
    method = transform(Conjugate(512, 16, bands=2), mask=mask).eval()
    with torch.no_grad():
        method.prepare(NoiseFaces(count=40))
    face, key = face_batch(torch.rand(4, 3, 64, 64) * 2 - 1), method.key_spec.random(4)
    plain, restored = method.anonymize(face, key), method.recover(face, key)
    method.polish = 10
    polished = method.anonymize(face, key)
    assert (polished - plain).abs().max() < (LEVELS + 0.01) * 2 / 255
    z = method.identity(face.image)

    def opened(image):
        return torch.nn.functional.cosine_similarity(method.open(method.identity(quantize(image)), key), z).mean()

    assert opened(polished) > opened(plain) + 0.01
    assert torch.equal(method.recover(face, key), restored)  # a recovered picture is shown, not read
    assert torch.equal(method.train().anonymize(face, key), plain)


@pytest.mark.parametrize("mask", [None, HalfMask()], ids=["whole", "pasted"])
def test_an_anonymized_picture_is_refined_for_its_recipient(mask):
    torch.manual_seed(0)
    method = transform(Conjugate(512, 16, bands=2), mask=mask, refine=20).eval()
    with torch.no_grad():
        method.prepare(NoiseFaces(count=40))
    torch.nn.init.normal_(method.compensation.layers[-1].weight, std=1.0)  # what is read is not what was hidden
    face, key = face_batch(torch.rand(4, 3, 64, 64) * 2 - 1), method.key_spec.random(4)
    z, attributes = method.identity(face.image), method.attributes_of(face.image)
    left = method.open(method.transform(z, key)[0], key)
    wanted = method.disentangler.codes(left, attributes)

    def missed(image):
        return float(method._comes_back(left, wanted, key, image).mean())

    refined = missed(method.anonymize(face, key))
    for_the_code = missed(method.compose(method.transform(z, key)[0], attributes, face.image))
    method.refine = 0
    assert refined < min(for_the_code, missed(method.anonymize(face, key)))


def test_refinement_keeps_the_landmarks_of_the_picture_at_hand():
    class Points(torch.nn.Module):
        """Two points: how bright the left and the right half are."""

        def forward(self, image):
            return torch.nn.functional.adaptive_avg_pool2d(image.mean(1), (1, 2)).transpose(1, 2).expand(-1, 2, 2)

    torch.manual_seed(0)
    face, key = face_batch(torch.rand(4, 3, 64, 64) * 2 - 1), torch.randn(4, 32)
    method = transform(flow(), refine=20).eval()

    verbs = (("recover", [key]), ("invert", []))

    def off(picture):
        return (Points()(picture) - Points()(face.image)).norm()

    hidden = method.anonymize(face, key)
    without = {verb: off(getattr(method, verb)(face, *rest)) for verb, rest in verbs}
    method.landmarks = Points()
    for verb, rest in verbs:
        assert off(getattr(method, verb)(face, *rest)) < 0.8 * without[verb]
    torch.testing.assert_close(method.anonymize(face, key), hidden)  # two keys' people are not to be alike


def test_refinement_is_not_told_what_keys_do_not_hide(monkeypatch):
    method = transform(Conjugate(512, 16, bands=2), refine=1).eval()
    with torch.no_grad():
        method.prepare(NoiseFaces(count=40))
    face, told, judged = face_batch(torch.rand(4, 3, 64, 64) * 2 - 1), [], method._comes_back
    monkeypatch.setattr(method, "_comes_back", lambda z, *rest: told.append(z) or judged(z, *rest))
    method.anonymize(face, method.key_spec.random(4))
    z = method.identity(face.image)
    torch.testing.assert_close(told[0], method.transform.kept(z), rtol=0, atol=1e-4)
    assert not torch.allclose(told[0], z, atol=1e-3)


def test_a_latent_phase_2_renders_nothing_and_needs_codes(quick_trainer, monkeypatch):
    method = transform(flow(), latent=True, learning_rate=1e-2)
    monkeypatch.setattr(method, "compose", lambda *_: pytest.fail("it rendered"))
    before = snapshot(method)
    trainer = quick_trainer(3)
    trainer.fit(method, LatentDataModule(NoiseFaces(), LinearRecognizer(), batch_size=8))
    moved = {n for n, p in method.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n, p in method.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="needs identity codes"):
        quick_trainer(1).fit(transform(flow(), latent=True), NoiseFaces())


@pytest.mark.parametrize("make", [flow, lambda: KeyedSphere(512, key_dim=32, blocks=2)], ids=["flow", "sphere"])
def test_after_a_warm_start_the_key_moves_the_picture_from_the_first_step(quick_trainer, tmp_path, make):
    torch.manual_seed(0)
    warm = transform(make(), latent=True, learning_rate=1e-3)
    quick_trainer(100, max_epochs=-1).fit(warm, LatentDataModule(NoiseFaces(count=40), LinearRecognizer(), 8))
    save_trained(warm, tmp_path / "warm.safetensors", {})
    method = transform(make(), start=tmp_path / "warm.safetensors")
    face, keys = face_batch(torch.rand(4, 3, 64, 64) * 2 - 1), method.key_spec.random(8).split(4)

    class Watch(Callback):
        moved = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                one, two = (module.eval().anonymize(face, key) for key in keys)
                z, attributes = module.identity(face.image), module.attributes_of(face.image)
                other = module.compose(z.roll(1, 0), attributes, face.image)  # somebody else altogether
                same = module.compose(z, attributes, face.image)
            module.train()
            self.moved.append(float((one - two).std() / (other - same).std()))

    quick_trainer(3, callbacks=[Watch()]).fit(method, NoiseFaces(count=40))
    assert len(Watch.moved) == 3
    assert min(Watch.moved) > 0.5


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("make", [KeyedSphere, KeyedOrthogonal, LearnedConjugate], ids=lambda kind: kind.__name__)
def test_every_transform_is_trained_by_the_same_steps(quick_trainer, make, latent):
    options = (
        {"key_dim": 32, "blocks": 2} if make is KeyedSphere else {"directions": 16} if make is LearnedConjugate else {}
    )
    method = transform(make(512, **options), latent=latent, icl_sees_key=make is KeyedSphere)
    before = snapshot(method)
    faces = LatentDataModule(NoiseFaces(count=40), LinearRecognizer(), 8) if latent else NoiseFaces(count=40)
    trainer = quick_trainer(3)
    trainer.fit(method, faces)
    assert all(torch.isfinite(value) for value in trainer.logged_metrics.values())
    moved = {n for n, p in method.named_parameters() if not torch.equal(before[n], p)}
    assert moved >= {n for n, p in method.named_parameters() if p.requires_grad}


def test_one_stage_trains_phase_1_along(quick_trainer):
    method = transform(flow(), one_stage=True, learning_rate=1e-2)
    before = snapshot(method)
    quick_trainer(3).fit(method, NoiseFaces())
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert {n for n, p in method.named_parameters() if not torch.equal(before[n], p)} == trained
    assert any(n.startswith("disentangler.fusion") for n in trained)


@pytest.mark.parametrize(
    "term", ["privacy", "diversity", "security", "recovery", "image", "perceptual", "inject", "icl"]
)
def test_each_term_of_phase_2_can_be_left_out(quick_trainer, term):
    weights = TransformWeights(**{term: 0.0})
    trainer = quick_trainer(1)
    trainer.fit(transform(flow(), weights=weights), NoiseFaces())
    assert torch.isfinite(torch.stack([v for v in trainer.logged_metrics.values()])).all()


def test_a_term_without_its_network_is_refused():
    with pytest.raises(ValueError, match="no landmarks network"):
        transform(flow(), weights=TransformWeights(parsing=1.0))


def test_the_learning_rate_decays_and_needs_an_end(quick_trainer):
    method = disentangle(decay=True, learning_rate=1e-2)
    quick_trainer(4).fit(method, NoiseFaces())
    assert method.optimizers().param_groups[0]["lr"] < 1e-3
    with pytest.raises(ValueError, match="max_steps"):
        quick_trainer(-1, max_epochs=1).fit(disentangle(decay=True), NoiseFaces())


@pytest.mark.parametrize("make", [flow, lambda: LearnedConjugate(512, 16, blocks=2, hidden=8)])
def test_permutations_survive_averaged_weights_and_saving(quick_trainer, tmp_path, make):
    method = transform(make(), learning_rate=1e-2)
    fixed = {n: v.clone() for n, v in method.transform.state_dict().items() if "perm" in n or "places" in n}
    assert fixed
    average = AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for _ in range(3):
        quick_trainer(2).fit(method, NoiseFaces(count=24))
        average.update_parameters(method)
    found = average.module.transform.state_dict()
    assert all(torch.equal(found[name], value) for name, value in fixed.items())
    save_trained(average.module.eval(), tmp_path / "averaged.safetensors", {})
    again = transform(make()).eval()
    load_trained(again, tmp_path / "averaged.safetensors")
    z, key = method.identity(torch.rand(4, 3, 64, 64)), method.key_spec.random(4)
    for one in (average.module, again):
        hidden = one.transform(z, key)[0]
        wanted = z if make is flow else normalize(z @ one.transform.directions.T @ one.transform.directions, dim=1)
        torch.testing.assert_close(one.transform.inverse(hidden, key)[0], wanted, rtol=0, atol=1e-4)


def test_weights_to_start_from_are_measured_too_and_undo_no_training(quick_trainer, tmp_path):
    torch.manual_seed(0)
    save_trained(transform(flow()), tmp_path / "start.safetensors", {})
    method = transform(flow(), start=tmp_path / "start.safetensors", learning_rate=1e-2)
    trainer = quick_trainer(2)
    trainer.test(method, NoiseFaces(), verbose=False)
    wanted = read_state(tmp_path / "start.safetensors")
    assert all(torch.allclose(value, wanted[name]) for name, value in method.state_dict().items())
    trainer.fit(method, NoiseFaces())
    trained = snapshot(method)
    trainer.test(method, NoiseFaces(), verbose=False)
    assert all(torch.equal(value, trained[name]) for name, value in method.named_parameters())
    assert not all(torch.equal(value, wanted[name]) for name, value in method.named_parameters())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    measured = transform(flow(), start=tmp_path / "nowhere.safetensors")  # a checkpoint takes its place
    quick_trainer(1).test(measured, NoiseFaces(), ckpt_path=tmp_path / "trained.ckpt", verbose=False, weights_only=True)
    assert all(torch.equal(value, trained[name]) for name, value in measured.named_parameters())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_measuring_alone_fits_a_transform_that_was_not_trained(quick_trainer, verb, monkeypatch):
    method, faces = transform(Conjugate(512, 16)), NoiseFaces(count=40)
    fitted = []
    prepare = method.prepare
    monkeypatch.setattr(method, "prepare", lambda datamodule: fitted.append(datamodule) or prepare(datamodule))
    monkeypatch.setattr(faces, "predict_dataloader", faces.test_dataloader, raising=False)
    getattr(quick_trainer(1, limit_val_batches=1), verb)(method, datamodule=faces)
    assert fitted == [faces]
