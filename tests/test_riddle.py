import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces
from test_compare import calibrated, write  # noqa: F401

from datamodules.batch import face_batch
from datamodules.latent import LatentDataModule
from experiments.compare import compare
from experiments.exchange import hide_into, kept_bytes, recover_from
from experiments.guards import Guard
from lightning_modules.baselines.code_reading import Reading
from lightning_modules.baselines.inversion import Inversion
from lightning_modules.baselines.riddle import RiDDLE, RiDDLEWeights
from lightning_modules.keys import KeyRing, Secret
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.latent_encryptor import LatentEncryptor
from lightning_modules.trained import load_trained, save_trained

SMALL = {"trunk": "own", "width": 8, "blocks": 1, "live_rows": 4}


def riddle(**options):
    torch.manual_seed(1)
    parts = {"generator": LinearGenerator(), "recognizer": LinearRecognizer()}
    return RiDDLE(**parts, **SMALL, **{"size": 64, "preview": 32, "inside": 32, **options})


def keys(count, seed=0):
    return RiDDLE.key_spec.random(count, torch.Generator().manual_seed(seed))


def snapshot(module):
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def codes(faces):
    torch.manual_seed(1)
    return LatentDataModule(faces, Inversion(LinearGenerator(), LinearRecognizer(), **SMALL), batch_size=8)


@pytest.mark.parametrize("path", ["latent", "picture"])
def test_both_verbs_give_pictures_of_the_method_size(path):
    method, faces, key = riddle(path=path).eval(), NoiseFaces(count=3).whole(), keys(3)
    for image in (method.anonymize(faces, key), method.recover(faces._replace(w=torch.zeros(3, 4, 512)), key)):
        assert image.shape == (3, 3, 64, 64)
        assert image.abs().max() <= 1
    trip = method.round_trip(faces, KeyRing.from_seed(0))
    assert trip.recovered.shape == trip.inverted.shape == trip.original.shape


def test_a_face_depends_on_its_key_and_on_nobody_beside_it():
    method, faces = riddle().eval(), NoiseFaces(count=4).whole()
    made, kept = method.anonymize(faces, keys(4)), method.kept_beside(faces, keys(4))
    assert torch.equal(method.anonymize(faces, keys(4)), made)
    assert (method.anonymize(faces, keys(4, seed=1)) - made).abs().mean() > 1e-3
    one = type(faces)(*(field[2:3] for field in faces))
    torch.testing.assert_close(method.anonymize(one, keys(4)[2:3])[0], made[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(method.kept_beside(one, keys(4)[2:3])[0], kept[2], rtol=1e-2, atol=1e-2)
    Guard(method).alone_or_in_company(faces)


def test_layers_begin_as_a_mirror_that_undoes_itself():
    encryptor = LatentEncryptor([2, 1, 1], inside=32)
    encryptor.centre.normal_()
    for layer in encryptor.layers:  # no attention to the face, nothing inside: what is left is the password's
        for linear in (layer.self_attn.out_proj, layer.linear2):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        torch.nn.init.zeros_(layer.multihead_attn.in_proj_weight[:512])
    w, password, other = torch.randn(3, 4, 512), torch.randn(3, 512), torch.randn(3, 512)
    hidden = encryptor(w, password)
    torch.testing.assert_close(encryptor(hidden, password), w, rtol=1e-4, atol=1e-4)
    assert (encryptor(hidden, other) - w).square().mean() > 0.01


def test_groups_of_rows_do_not_see_each_other():
    encryptor, password = LatentEncryptor([2, 1, 1], inside=32), torch.randn(1, 512)
    w = torch.randn(1, 4, 512)
    changed = w.clone()
    changed[:, 0] = torch.randn(512)
    moved = (encryptor(changed, password) - encryptor(w, password)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [True, True, False, False]


def test_the_regressions_read_what_a_linear_code_says():
    z = torch.nn.functional.normalize(torch.randn(600, 512) * (torch.arange(512) < 32), dim=1)
    to_code = torch.randn(512, 2 * 512) / 8
    rest = torch.randn(600, 8) @ torch.randn(8, 2 * 512) / 8
    w = (z @ to_code + rest).view(-1, 2, 512)
    reading = Reading.of(z, w)
    assert torch.cosine_similarity(reading.identity(w), z).mean() > 0.9
    people = (z.roll(1, 0) @ to_code + rest).view_as(w)  # somebody else, and nothing else
    strangers = (z @ to_code + rest.roll(1, 0)).view_as(w)  # the same person in another light
    assert reading.unexplained(people, w) < 0.3 * reading.unexplained(strangers, w)
    assert reading.strangeness(w) < reading.strangeness(4 * w)


@pytest.mark.parametrize("latent", [True, False])
def test_a_step_moves_the_mapper_and_nothing_that_is_frozen(quick_trainer, latent):
    method = riddle(latent=latent, learning_rate=1e-2)
    before = snapshot(method)
    trainer = quick_trainer(2)
    trainer.fit(method, codes(NoiseFaces(count=24)))
    after = snapshot(method)
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {name for name in before if name.startswith("encryptor.")}
    assert not method.inversion.training
    terms = {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}
    assert all(torch.isfinite(value) for value in terms.values())
    assert (terms["image"] > 0) == (terms["layout"] > 0) == (not latent)
    weighted_sum(terms, RiDDLEWeights())  # refuses a term without a weight and a weight without a term


def test_pictures_train_as_their_codes_do(quick_trainer):
    trained = []
    for faces in (NoiseFaces(count=8, batch_size=8), codes(NoiseFaces(count=8))):
        method = riddle(latent=True)
        torch.manual_seed(3)
        trainer = quick_trainer(1)
        trainer.fit(method, faces)
        trained.append(torch.stack([trainer.logged_metrics[f"train/{name}"] for name in ("code", "recovery")]))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-3)


def opened(method, faces, seed):
    with torch.no_grad():
        w, key = method._codes(faces.whole().image), keys(8, seed=5)
        return (method.encrypt(method.encrypt(w, key), keys(8, seed=seed)) - w).square().mean()


def test_it_learns_to_open_what_it_hides_from_wrong_passwords(quick_trainer):
    method, faces = riddle(latent=True, learning_rate=1e-3), NoiseFaces(count=8, people=8, batch_size=8)
    before = opened(method.eval(), faces, seed=5)
    quick_trainer(30, max_epochs=-1).fit(method.train(), faces)
    right, wrong = (opened(method.eval(), faces, seed) for seed in (5, 6))
    assert right < 0.5 * before
    assert right < 0.5 * wrong


def test_checkpoints_hold_the_mapper_alone(tmp_path):
    method = riddle()
    assert all(name.startswith("encryptor.") for name in method.state_dict())
    save_trained(method, tmp_path / "riddle.safetensors", {})
    load_trained(riddle(), tmp_path / "riddle.safetensors")
    assert method.loss_networks == {"linear-recognizer"}
    assert set(method.frozen_cards()) == {"linear-recognizer", "inversion"}
    assert riddle().frozen_cards() == method.frozen_cards()
    assert RiDDLE(LinearGenerator(), LinearRecognizer(), **SMALL).frozen_cards() != method.frozen_cards()


def test_identity_codes_alone_are_refused(quick_trainer):
    with pytest.raises(ValueError, match="must be a lightning_modules.baselines.inversion.Inversion"):
        quick_trainer(1).fit(riddle(latent=True), LatentDataModule(NoiseFaces(), LinearRecognizer(), batch_size=4))


# -- the door: what is kept beside a picture -------------------------------------------------------------------------


def test_recovery_reads_what_was_kept_and_not_the_picture(tmp_path):
    method, faces = riddle().eval(), NoiseFaces(count=3).whole()
    with pytest.raises(ValueError, match="path: latent recovers from codes kept beside"):
        method.recover(face_batch(faces.image), keys(3))
    hide_into(tmp_path, method, [faces], Secret("one"), 0, "png")
    assert sorted(file.stem for file in (tmp_path / "kept").iterdir()) == ["000000", "000001", "000002"]
    assert kept_bytes(tmp_path) == 4 * 512 * 2
    recover_from(tmp_path, method, Secret("one"))
    first = {file.name: file.read_bytes() for file in (tmp_path / "recovered").iterdir()}
    for file in (*(tmp_path / "recovered").iterdir(), *(tmp_path / "kept").iterdir()):
        file.unlink()
    hide_into(tmp_path, method, [faces._replace(image=-faces.image)], Secret("one"), 0, "png")  # pictures stay
    recover_from(tmp_path, method, Secret("one"))
    assert all(file.read_bytes() != first[file.name] for file in (tmp_path / "recovered").iterdir())


def test_from_the_picture_nothing_is_kept(tmp_path):
    method, faces = riddle(path="picture").eval(), NoiseFaces(count=2).whole()
    assert method.kept_beside(faces, keys(2)) is None
    hide_into(tmp_path, method, [faces], Secret("one"), 0, "png")
    assert not (tmp_path / "kept").exists()
    assert kept_bytes(tmp_path) == 0


class Small(RiDDLE):
    def __init__(self, path: str):
        torch.manual_seed(1)
        super().__init__(LinearGenerator(), LinearRecognizer(), path=path, size=64, inside=32, **SMALL)


def test_a_comparison_hands_over_what_is_kept_and_tells_how_much(tmp_path, monkeypatch):
    methods = {
        f"from the {path}": {"class_path": "test_riddle.Small", "init_args": {"path": path}}
        for path in ("latent", "picture")
    }
    methods["from the latent"]["note"] = "untrained"
    assert compare(write(tmp_path / "c.yaml", methods=methods, wrong_keys=1), tmp_path / "out") == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "untrained; 4,096 bytes a face are kept beside its picture" in table
    assert table.count("bytes a face") == 1


class KeepsWhoIsBeside(Small):
    def kept_beside(self, face, key):
        return super().kept_beside(face, key) * len(face.image)


def test_what_is_kept_is_of_one_face_alone():
    with pytest.raises(ValueError, match="what it keeps of a face depends on the faces beside it"):
        Guard(KeepsWhoIsBeside("latent").eval()).alone_or_in_company(NoiseFaces(count=2).whole())


class KeepsOneForAll(Small):
    def kept_beside(self, face, key):
        return super().kept_beside(face, key)[:1]


def test_what_is_kept_is_a_row_a_face(tmp_path):
    with pytest.raises(ValueError, match="expected a row for each of 2 faces"):
        hide_into(tmp_path, KeepsOneForAll("latent").eval(), [NoiseFaces(count=2).whole()], Secret("one"), 0, "png")
