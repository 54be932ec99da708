import math

import pytest
import torch
from conftest import LinearRecognizer, NoiseFaces
from torch.nn import functional as F

from lightning_modules.baselines.facebert import (
    FaceBERT,
    FaceBERTWeights,
    faded,
    gumbel,
    masked_cross_entropy,
)
from lightning_modules.keys import KeyRing
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.frozen import Frozen
from lightning_modules.networks.token_transformer import TokenTransformer
from lightning_modules.networks.vqgan import Codebook
from lightning_modules.trained import load_trained, save_trained


def small(**options):
    sizes = {"codes": 16, "width": 8, "discriminator_width": 8, "transformer_width": 32, "layers": 2}
    return FaceBERT(LinearRecognizer(), **{**sizes, **options})


def awake(**options):
    """A method with tokens that mean something and a transformer that holds some for likelier than others."""
    method = small(**options).eval()
    with torch.no_grad():
        method.codebook.follow(method._features(method.fit_size(NoiseFaces().whole()).image))
        torch.nn.init.normal_(method.transformer.out.weight)
    return method


def rows(batch, at):
    return type(batch)(*(field[at] for field in batch))


def nothing(batch):
    return torch.zeros(len(batch.image), 0)


@pytest.fixture
def faces():
    return NoiseFaces(count=6).whole()


# -- the verb ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cells": 16}, {"size": 128, "cells": 16}], ids=str)
def test_faces_are_hidden_in_pictures_of_the_method_size(options, faces):
    method = awake(**options)
    trip = method.round_trip(rows(faces, slice(2)), KeyRing.from_seed(0))
    assert trip.anonymized.shape == (2, 3, 64, 64)
    assert method.anonymize(method.fit_size(faces), nothing(faces)).shape[-1] == method.size
    assert trip.anonymized.abs().max() <= 1
    assert trip.recovered.shape[1] == trip.other.shape[1] == 0  # no way back, no key
    assert trip.inverted.shape == trip.anonymized.shape
    with pytest.raises(ValueError, match="not reversible"):
        method.recover(faces, nothing(faces))


def test_nothing_of_the_inner_face_reaches_the_picture_but_through_what_is_around_it(faces):
    method = awake()
    stranger = torch.where(method.window > 0, torch.rand_like(faces.image) * 2 - 1, faces.image)
    made = method.anonymize(faces, nothing(faces))
    assert torch.equal(method.anonymize(faces._replace(image=stranger), nothing(faces)), made)
    around = torch.where(method.window > 0, faces.image, -faces.image)
    other = method.anonymize(faces._replace(image=around), nothing(faces))
    assert not torch.isclose(other, made)[:, :, method.window > 0].all()
    # where the encoder sees the face, what is around it tells of it: that is what the cover is for
    told = [method.codebook.tokens(method.encoder(image))[:, ~method.inner] for image in (faces.image, stranger)]
    assert not torch.equal(*told)


def test_what_lies_further_out_than_the_feather_stays_bit_for_bit(faces):
    method = awake()
    made = method.anonymize(faces, nothing(faces))
    far = method.faded[0, 0] == 0
    assert far[[0, 0, -1, -1], [0, -1, 0, -1]].all()
    assert torch.equal(made[:, :, far], faces.image[:, :, far])
    assert not torch.isclose(made, faces.image)[:, :, method.window > 0].all(1).any(1).all()


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_a_feather_lies_outside_of_its_window(reach):
    window = torch.zeros(16, 16)
    window[4:9, 5:12] = 1
    soft = faded(window, reach)[0, 0]
    assert (soft[window > 0] == 1).all()
    distance = F.max_pool2d(window[None, None], 4 * reach + 3, 1, 2 * reach + 1)[0, 0]
    assert (soft[distance == 0] == 0).all()
    assert (reach == 0) == torch.equal(soft, window)
    assert soft.unique().numel() > reach


def test_a_face_is_made_alike_alone_in_company_and_in_training_mode(faces):
    method = awake()
    made = method.anonymize(faces, nothing(faces))
    assert torch.equal(method.anonymize(faces, nothing(faces)), made)
    assert torch.equal(method.anonymize(rows(faces, slice(3, 4)), torch.zeros(1, 0))[0], made[3])
    assert torch.equal(method.train().anonymize(faces, nothing(faces)), made)
    assert not any(p.grad is not None for p in method.parameters())


def test_another_number_or_seed_draws_another_face(faces):
    method = awake()
    made = method.anonymize(faces, nothing(faces))
    again = method.anonymize(faces._replace(sample=faces.sample + 100), nothing(faces))
    assert (again - made).abs().mean() > 1e-3
    method.seed = 1
    assert (method.anonymize(faces, nothing(faces)) - made).abs().mean() > 1e-3


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_every_inner_token_is_written_and_no_other(rounds):
    method = awake(rounds=rounds)
    tokens = torch.full((1, 8, 8), 16)  # of 16 codes none
    seen = []
    method.transformer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1].sum().item()))
    written = method._filled(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(written[0] < 16, method.inner)
    count = int(method.inner.sum())
    assert seen == [count, *(int(count * math.cos(math.pi / 2 * at / rounds)) for at in range(1, rounds))]


def test_a_token_that_was_sure_is_not_written_again():
    method = awake()
    drawn = []
    method.transformer.register_forward_hook(lambda _, inputs, __: drawn.append(inputs))
    written = method._filled(torch.zeros(1, 8, 8, dtype=torch.int64), torch.Generator().manual_seed(0))
    for (_, before), (_, after) in zip(drawn, drawn[1:], strict=False):
        assert not (after & ~before).any()
    for tokens, masked in drawn:
        assert torch.equal(tokens[~masked], written[~masked])


def test_draws_follow_the_logits():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().view(1, 3, 1).expand(1, 3, 20000)
    drawn = (logits + gumbel(logits, torch.Generator().manual_seed(0))).argmax(1)
    torch.testing.assert_close(drawn.flatten().bincount() / 20000, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)


def test_a_size_that_its_cells_do_not_fit_is_refused():
    for size, cells in ((64, 12), (64, 64), (48, 16), (8, 8)):
        with pytest.raises(ValueError, match="8 or 16 cells"):
            small(size=size, cells=cells)


# -- tokens --------------------------------------------------------------------------------------------------------


def groups(centres, count):
    """Features around some of some directions, and which."""
    at = torch.randint(len(centres), (count, 5, 5))
    return (3 * centres[at] + 0.1 * torch.randn(count, 5, 5, centres.shape[1])).permute(0, 3, 1, 2), at


def test_a_codebook_follows_the_features_and_no_code_lies_idle():
    centres, book = F.normalize(torch.randn(6, 8)), Codebook(24, 8)
    for people in (centres, -centres):  # codes of those who are gone start anew at those who came
        for _ in range(150):
            features, at = groups(people, 4)
            book.follow(features)
        tokens = book.tokens(features)
        assert F.cosine_similarity(book.codes_of(tokens).permute(0, 2, 3, 1), people[at], dim=-1).min() > 0.99
        assert (book.codes @ people.mT).amax(1).min() > 0.9
    torch.testing.assert_close(book.codes.norm(dim=1), torch.ones(24))


def test_gradients_pass_straight_through_a_codebook_and_pull_features_to_their_codes():
    book, features = Codebook(4, 8), torch.randn(2, 8, 3, 3, requires_grad=True)
    book.follow(features)
    codes, commitment = book(features)
    assert torch.equal(book.tokens(codes), book.tokens(features))
    torch.testing.assert_close(codes, book.codes_of(book.tokens(features)))
    torch.testing.assert_close(book(features, 0.0)[0], F.normalize(features))
    wanted = torch.randn_like(codes)
    (straight,) = torch.autograd.grad((wanted * codes).sum(), features, retain_graph=True)
    (alike,) = torch.autograd.grad((wanted * F.normalize(features)).sum(), features)
    torch.testing.assert_close(straight, alike)
    (pull,) = torch.autograd.grad(commitment, features)
    assert book(features - pull)[1] < commitment


def test_the_codebook_travels_with_the_weights(tmp_path):
    method, faces = awake(), NoiseFaces(count=4).whole()
    save_trained(method, tmp_path / "facebert.safetensors", {})
    other = small().eval()
    assert other.codebook.empty
    load_trained(other, tmp_path / "facebert.safetensors")
    assert not other.codebook.empty
    assert torch.equal(other.codebook.codes, method.codebook.codes)
    assert torch.equal(other.anonymize(faces, nothing(faces)), method.anonymize(faces, nothing(faces)))


def test_what_is_masked_is_not_looked_at():
    torch.manual_seed(0)
    network, tokens = TokenTransformer(4, 8, 32, 2), torch.randint(8, (2, 4, 4))
    torch.nn.init.normal_(network.out.weight)
    masked = torch.rand(2, 4, 4) < 0.5
    others = torch.where(masked, (tokens + 1) % 8, tokens)
    assert torch.equal(network(tokens, masked), network(others, masked))
    assert not torch.allclose(network(tokens, masked), network((tokens + 1) % 8, masked))
    turned = network(tokens.mT, masked.mT).mT
    assert not torch.allclose(network(tokens, masked), turned)  # it knows rows from columns


def test_only_masked_tokens_are_guessed_and_each_face_counts_alike():
    tokens, masked = torch.zeros(2, 2, 2, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.bool)
    masked[0, 0, 0] = masked[1, 0, 0] = masked[1, 1, 1] = True
    logits = torch.zeros(2, 4, 2, 2)
    logits[:, 1] = torch.where(masked, 0.0, 50.0)
    torch.testing.assert_close(masked_cross_entropy(logits, tokens, masked), torch.tensor(4.0).log())
    logits[0, 0, 0, 0] = 50.0  # the first face is known: half of the loss is left
    torch.testing.assert_close(masked_cross_entropy(logits, tokens, masked), torch.tensor(4.0).log() / 2)


# -- training ------------------------------------------------------------------------------------------------------


def trained(quick_trainer, steps, **options):
    method, trainer = small(learning_rate=1e-2, **options), quick_trainer(steps)
    before = {name: value.detach().clone() for name, value in method.state_dict().items()}
    trainer.fit(method, NoiseFaces())
    after = method.state_dict()
    return method, trainer, {name for name, value in before.items() if not torch.equal(value, after[name])}


def of(method, *parts):
    return {name for name in method.state_dict() if name.split(".")[0] in parts}


def test_the_first_stage_moves_the_vqgan_and_the_second_the_transformer(quick_trainer, tmp_path):
    method, trainer, moved = trained(quick_trainer, 3, first="tokens", warm_up=1)
    assert moved == of(method, "encoder", "decoder", "codebook", "discriminator")
    assert trainer.global_step == 3
    terms = {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms.pop("discriminator") > 0
    weighted_sum(terms, FaceBERTWeights())  # refuses a term without a weight and a weight without a term
    save_trained(method, tmp_path / "tokens.safetensors", {})
    second, trainer, _ = trained(quick_trainer, 3, start=tmp_path / "tokens.safetensors")
    assert trainer.global_step == 3
    tokens, faces = method.state_dict(), second.state_dict()
    moved = {name for name in tokens if not torch.equal(tokens[name], faces[name])}
    assert moved == of(method, "transformer")


def test_a_transformer_without_tokens_is_refused(quick_trainer):
    with pytest.raises(ValueError, match="needs a trained codebook"):
        quick_trainer(1).fit(small(), NoiseFaces())


class FrozenRecognizer(Frozen):
    card_hashes = {"linear-recognizer": "sha256:0"}

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)
        self.freeze()

    def pyramid(self, images):
        features = self.layer(images)
        return features.mean((2, 3)), [features]


def test_the_recognizer_stays_frozen_out_of_checkpoints_and_out_of_the_judges(quick_trainer):
    sizes = {"codes": 16, "width": 8, "discriminator_width": 8, "transformer_width": 32, "layers": 1}
    method = FaceBERT(FrozenRecognizer(), first="tokens", **sizes)
    before = method.recognizer.layer.weight.clone()
    quick_trainer(2).fit(method.train(), NoiseFaces())
    assert torch.equal(method.recognizer.layer.weight, before)
    assert not method.recognizer.training
    assert not method.recognizer.layer.weight.requires_grad
    assert not any("recognizer" in name for name in method.state_dict())
    assert method.loss_networks == {"linear-recognizer"}
    assert method.frozen_cards() == {"linear-recognizer": "sha256:0"}


def test_both_stages_learn_eight_faces_by_heart(quick_trainer, tmp_path):
    faces = NoiseFaces(count=8, batch_size=8)
    whole = faces.whole()

    def guessed(method):
        """Share of the inner tokens that are right when all are guessed at once."""
        with torch.no_grad():
            tokens = method.codebook.tokens(method._features(whole.image))
            found = method.transformer(tokens, method.inner.expand_as(tokens)).argmax(1)
        return float((found == tokens)[:, method.inner].float().mean())

    first = small(first="tokens", learning_rate=1e-3, warm_up=10, codes=32, transformer_width=64)
    with torch.no_grad():
        first.codebook.follow(first._features(whole.image))
        before = F.l1_loss(first.invert(whole), whole.image)
    quick_trainer(40).fit(first, faces)
    assert F.l1_loss(first.invert(whole), whole.image) < 0.7 * before
    save_trained(first, tmp_path / "tokens.safetensors", {})
    second = small(start=tmp_path / "tokens.safetensors", learning_rate=5e-3, codes=32, transformer_width=64)
    quick_trainer(80).fit(second, faces)
    assert guessed(first) < 0.3  # as often as the commonest token is right
    assert guessed(second) > 0.6


def test_masks_fall_on_the_inner_face_alone_and_from_one_cell_to_all(quick_trainer):
    method, shares = small(), []
    method._trainer = quick_trainer(1)
    for seed in range(20):
        method.seed = seed
        masked = method._masks(torch.arange(8))
        assert not masked[:, ~method.inner].any()
        assert torch.equal(method._masks(torch.arange(4, 8)), masked[4:])  # each face's own, on whatever process
        shares += (masked.sum((1, 2)) / method.inner.sum()).tolist()
    assert 0 < min(shares) < 0.1
    assert max(shares) == 1
    assert sum(shares) / len(shares) == pytest.approx(2 / math.pi, abs=0.06)  # the mean of cos(πu/2), rounded up
