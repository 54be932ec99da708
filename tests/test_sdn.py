import math
from types import SimpleNamespace

import pytest
import torch
from conftest import NoiseFaces

from datamodules.batch import face_batch
from lightning_modules.anonymizer import RoundTrip
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.blocks import means, with_means_of
from lightning_modules.sdn import SDN, SDNWeights, losses, texture
from lightning_modules.sdn.module import Legs
from lightning_modules.sdn.networks import GaussianHead


def small(**options):
    return SDN(**{"size": 64, "width": 8, "key_bits": 8, "identities": 16, **options})


def moved(before, module):
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def awake(method):
    """The method with a decoder that does not add nothing, as one does before training."""
    torch.manual_seed(2)
    torch.nn.init.normal_(method.decoder.out.weight, std=0.05)
    if method.opener is not None:
        torch.nn.init.normal_(method.opener[1].out.weight, std=0.05)
    return method


def test_a_few_steps_move_every_parameter(quick_trainer):
    method = small(attributes=2, learning_rate=1e-2, information_warmup=1)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    quick_trainer(4).fit(method, NoiseFaces(attributes=2))  # behind gains that start at zero, gradients come later
    assert set(before) <= moved(before, method)


def test_the_counter_counts_training_steps_not_optimizers(quick_trainer):
    trainer = quick_trainer(3)
    trainer.fit(small(), NoiseFaces())
    assert trainer.global_step == 3


def test_losses_are_finite_and_each_has_a_weight(quick_trainer):
    trainer = quick_trainer(1)
    trainer.fit(small(), NoiseFaces())
    terms = {name.removeprefix("train/"): value for name, value in trainer.logged_metrics.items()}
    assert all(torch.isfinite(value) for value in terms.values())
    terms.pop("club_nats")
    weighted_sum(terms, SDNWeights())  # refuses a term without a weight and a weight without a term


def test_both_verbs_give_pictures_of_the_method_size():
    method, face = small().eval(), face_batch(torch.zeros(2, 3, 64, 64))
    bits = torch.ones(2, 8)
    for verb in (method.anonymize, method.recover):
        image = verb(face, bits)
        assert image.shape == (2, 3, 64, 64)
        assert image.abs().max() <= 1


@pytest.mark.parametrize(
    "options",
    [{"dual": False}, {"wrong_factors": False}, {"jpeg": 1.0}, {"decay": True}, {"weights": SDNWeights(cycle=0.0)}],
    ids=lambda options: next(iter(options)),
)
def test_an_ablation_trains_all_that_it_has(quick_trainer, options):
    method = small(learning_rate=1e-2, information_warmup=1, **options)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(4)
    trainer.fit(method, NoiseFaces())
    assert set(before) <= moved(before, method)
    assert all(torch.isfinite(value) for value in trainer.logged_metrics.values())
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert all(rate < 1e-3 for rate in rates) if method.decay else rates == [1e-2] * 4


def test_what_an_ablation_leaves_out_is_not_made():
    torch.manual_seed(0)
    image, factors, other = torch.rand(2, 3, 64, 64) * 2 - 1, torch.ones(2, 8), -torch.ones(2, 8)

    def legs(**options):
        torch.manual_seed(1)
        method = awake(small(**options))
        method._trainer = SimpleNamespace(global_step=0)
        return method._legs(image, factors, other, other)

    whole = legs()
    assert whole.wrong is not None
    assert len(whole.faked()) == 2
    assert legs(wrong_factors=False).wrong is None
    assert len(legs(wrong_factors=False).faked()) == 1
    assert whole.again is not whole.anonymized
    uncycled = legs(weights=SDNWeights(cycle=0.0))
    assert uncycled.again is uncycled.anonymized
    assert not torch.allclose(legs(jpeg=1.0).recovered, whole.recovered)
    apart = legs(dual=False)
    assert torch.equal(apart.anonymized, whole.anonymized)  # the same beginning, for a paired comparison
    assert not torch.allclose(apart.recovered, whole.recovered)


def test_without_dual_inference_recovery_has_networks_of_its_own():
    face, bits = face_batch(torch.rand(2, 3, 64, 64) * 2 - 1), torch.ones(2, 8)
    method = awake(small(dual=False)).eval()
    before = method.anonymize(face, bits), method.recover(face, bits)
    torch.nn.init.zeros_(method.opener[1].out.weight)
    assert torch.equal(before[0], method.anonymize(face, bits))
    assert not torch.equal(before[1], method.recover(face, bits))
    assert small().opener is None


def test_what_lies_around_the_face_stays_bit_for_bit():
    face, bits = face_batch(torch.rand(2, 3, 64, 64) * 2 - 1), torch.ones(2, 8)
    method = awake(small()).eval()
    around, within = method.window == 0, method.window == 1
    assert around[[0, 0, -1, -1], [0, -1, 0, -1]].all()
    assert within[36, 32]
    assert 0.4 < method.window.mean() < 0.65
    for picture in (method.anonymize(face, bits), method.recover(face, bits), method.edit(face, bits, torch.ones(256))):
        assert torch.equal(picture[:, :, around], face.image[:, :, around])
        assert not torch.isclose(picture[:, :, within], face.image[:, :, within]).all(1).any(1).all()
    whole = small(window=False).eval().anonymize(face, bits)
    assert not torch.isclose(whole[:, :, around], face.image[:, :, around]).all()


def test_one_wrong_bit_or_attribute_is_as_wrong_as_a_strange_password():
    factors = KeySpec("bits", 67).random(1, torch.Generator().manual_seed(0))
    near = torch.where(torch.eye(67).bool(), -factors, factors)
    off = texture.hashed(near, 64) != texture.hashed(factors, 64)
    assert off.float().mean() == pytest.approx(0.5, abs=0.03)
    assert off.sum(1).min() > 16  # a fair coin does this once in 100,000 times
    assert torch.equal(texture.hashed(factors, 64), texture.hashed(factors.clone(), 64))
    plain = small(attributes=2, avalanche=False)
    assert torch.equal(plain._seen(factors[:, :10]), factors[:, :10])
    assert torch.equal(small(attributes=2)._seen(factors[:, :10])[:, 8:], factors[:, 8:10])


@pytest.mark.parametrize(
    ("first", "trained"),
    [("classifier", ("classifier.", "centres")), ("autoencoder", ("encoder.", "decoder.", "factors."))],
)
def test_a_first_stage_trains_its_networks_alone(quick_trainer, first, trained):
    method = small(attributes=2, first=first, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(4)
    trainer.fit(method, NoiseFaces())  # which has no attributes
    assert moved(before, method) == {name for name in before if name.startswith(trained)}
    assert trainer.global_step == 4


def test_the_painter_learns_against_the_discriminator_alone(quick_trainer):
    method = small(attributes=2, first="painter", learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = quick_trainer(4)
    trainer.fit(method, NoiseFaces(attributes=2))
    trained = ("encoder.", "decoder.", "factors.", "discriminator.")
    assert moved(before, method) == {name for name in before if name.startswith(trained)}
    assert trainer.global_step == 4
    assert {"train/adversarial", "train/triplet", "train/discriminator"} <= set(trainer.logged_metrics)


def test_a_painted_face_leaves_room_for_its_texture():
    painted = torch.zeros(1, 3, 64, 64)
    painted[:, :, :32] = 0.8
    assert losses.room(painted) == 0
    painted[:, :, 32:] = -1.0
    assert losses.room(painted) == pytest.approx(0.1)


def test_the_classifier_searches_for_the_original_person_in_what_was_made_of_them():
    torch.manual_seed(0)
    face, method = NoiseFaces(count=4).whole(), small()
    made = torch.rand(4, 3, 64, 64, requires_grad=True)
    legs = Legs(made, made, made, made, made, wrong=made, lost=made, again=made)

    def found(**options):
        method.pursuit = options.get("pursuit", 0.5)
        return method._classifier_loss(face, options.get("legs"))

    real = losses.angular_margin(method.classifier(face.image), method.centres, face.identity)
    hidden = losses.angular_margin(method.classifier(made), method.centres, face.identity)
    torch.testing.assert_close(found(), real)
    torch.testing.assert_close(found(legs=legs), real + 0.5 * hidden)
    torch.testing.assert_close(found(legs=legs._replace(wrong=None)), real + 0.5 * hidden)
    torch.testing.assert_close(found(legs=legs, pursuit=0), real)
    found(legs=legs).backward()
    assert made.grad is None


def test_layout_is_what_a_small_picture_shows():
    image, target = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    means = (image - target).reshape(2, 3, 16, 4, 16, 4).mean((3, 5))
    torch.testing.assert_close(losses.layout(image, target), means.abs().mean())


def test_two_passwords_are_to_differ_as_much_as_two_people():
    one, two = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    usual = torch.tensor([0.01, 1.0, 2.0])
    off = (one - two).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).abs()  # 32 px
    short = [max(0.0, 1 - float(a.mean()) / float(u)) for a, u in zip(off, usual, strict=True)]
    assert short[0] == 0 < short[1] < short[2]
    torch.testing.assert_close(losses.sameness(one, two, usual), torch.tensor(sum(short) / 3))
    stripes = torch.tensor([0.2, -0.2]).repeat(32)  # that nobody sees
    assert losses.sameness(one, one + stripes, usual) == pytest.approx(1, abs=1e-6)


def test_the_two_people_are_put_where_the_face_is():
    torch.manual_seed(0)
    method, image = small(window=True, weights=SDNWeights(diversity=1.0)), torch.rand(4, 3, 64, 64) * 2 - 1
    placed = [method._within(image, with_means_of(image, image.roll(shift, 0))) for shift in (1, 2)]
    torch.testing.assert_close(method._sameness(image, *placed), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert method._sameness(image, placed[0], placed[0]) == 1


def test_a_margin_keeps_its_slope_in_bfloat16():
    features = torch.nn.functional.normalize(torch.randn(3, 256), dim=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses.angular_margin(features, features.detach().clone(), torch.arange(3)).backward()
    assert features.grad.isfinite().all()


def test_wrong_factors_are_near_misses_by_share():
    face = NoiseFaces(count=400, attributes=2).whole()
    for share in (0.0, 0.5, 1.0):
        right, other, wrong, asked = small(attributes=2, near_misses=share)._draw_factors(face)
        off = right != wrong
        one = off.sum(1) == 1
        assert set(wrong.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(right[:, 8:], asked)
        assert torch.equal(other[:, 8:], asked)
        strange = (wrong[:, :8] == other[:, :8]).all(1)
        assert strange.float().mean() == pytest.approx(1 - share, abs=0.07)
        if share == 1:
            assert one.all()
            assert off[:, 8:].any(1).float().mean() == pytest.approx(0.5, abs=0.07)
            assert (off.float().mean(0) > 0.02).all()  # every entry
        if share == 0:
            assert (off[:, :8].any(1) & off[:, 8:].any(1)).float().mean() > 0.2  # both wrong


def test_what_is_drawn_for_a_face_does_not_depend_on_its_batch():
    method, face = small(near_misses=1.0), NoiseFaces(count=8).whole()
    part = type(face)(*(field[3:5] for field in face))
    for whole, alone in zip(method._draw_factors(face), method._draw_factors(part), strict=True):
        assert torch.equal(whole[3:5], alone)


def test_a_face_does_not_depend_on_its_batch():
    method, images = small().eval(), torch.rand(3, 3, 64, 64) * 2 - 1
    bits = torch.ones(3, 8)
    together = method.anonymize(face_batch(images), bits)
    alone = method.anonymize(face_batch(images[1:2]), bits[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_a_16_bit_key_does_not_fit_a_64_bit_model():
    method = small(key_bits=64)
    with pytest.raises(ValueError, match="expected a key of 64 bits, got 16"):
        method.anonymize(face_batch(torch.zeros(1, 3, 64, 64)), torch.ones(1, 16))


def test_missing_attributes_are_named():
    with pytest.raises(ValueError, match="expected 2 attributes a face, got 0"):
        small(attributes=2).anonymize(face_batch(torch.zeros(1, 3, 64, 64)), torch.ones(1, 8))


def test_the_round_trip_goes_through_a_file_and_knows_every_leg():
    faces = NoiseFaces().whole()
    trip = small().eval().round_trip(faces, KeyRing.from_seed(0))
    assert isinstance(trip, RoundTrip)
    for leg in ("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered"):
        picture = getattr(trip, leg)
        assert picture.shape == faces.image.shape
        levels = (picture + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert trip.inverted.shape[1] == 0


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_right_factors_undo_the_texture_before_anything_is_learned(size):
    faces = NoiseFaces(count=4).whole()
    smooth = torch.nn.functional.interpolate(faces.image[:, :, :24, :24], (size, size), mode="bicubic").clamp(-0.7, 0.7)
    method = awake(small(size=size, attributes=2)).eval()
    face, bits = face_batch(smooth, attributes=torch.ones(4, 2)), KeySpec("bits", 8).random(4, torch.Generator())
    hidden = method.anonymize(face, bits)
    torch.nn.init.zeros_(method.decoder.out.weight)  # the painted face stays out of the way of what is undone
    hidden = method.anonymize(face, bits)

    def missed(key, attributes=face.attributes):
        opened = method.recover(face_batch(hidden, attributes=attributes), key)
        return ((opened - smooth) * method.window).abs().mean()

    one_off, other = torch.where(torch.arange(8) == 3, -bits, bits), face.attributes * torch.tensor([1.0, -1.0])
    # what is left are the frequencies above those that are kept
    assert missed(bits) < 0.25 * min(missed(one_off), missed(-bits), missed(bits, other))
    assert ((hidden - smooth) * method.window).abs().mean() > 2 * missed(bits)
    assert small(turning=False, size=size)._turned(hidden, bits, back=True) is hidden


def test_block_means_stay_whatever_is_painted():
    method = awake(small()).eval()
    image = torch.rand(2, 3, 64, 64) - 0.5
    painted = method._paint(image, torch.ones(2, 8))
    torch.testing.assert_close(means(painted), means(image), atol=1e-2, rtol=0)
    assert not torch.isclose(painted, image)[:, :, method.window > 0].any(1).all()


def test_block_means_are_lifted_without_edges():
    ramp = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 64, 64)
    made = with_means_of(ramp, torch.zeros_like(ramp))
    torch.testing.assert_close(means(made), means(ramp), atol=1e-5, rtol=0)
    steps = (made[..., 1:] - made[..., :-1]).abs()  # by blocks alone, 1/8 at each edge
    assert steps[..., 8:-8].max() < 0.04


def test_codes_and_pictures_are_two_views_of_the_same():
    blocks = texture.BlockCosines(64)
    code = torch.randn(2, blocks.depth, 8, 8)
    torch.testing.assert_close(blocks(blocks.picture(code)), code, atol=1e-4, rtol=0)
    assert means(blocks.picture(code)).abs().max() < 1e-4
    assert blocks.depth == 40
    whole = texture.BlockCosines(64, luma=63, chroma=63)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(whole.picture(whole(image)) + means(image), image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [64, 128])
def test_a_texture_carries_a_code_in_brightness_whatever_happens_to_colours(size):
    blocks = texture.BlockCosines(size)
    code = torch.randn(2, blocks.depth, 8, 8)
    made = blocks.texture(code)
    assert (made.std(1) < 1e-6).all()  # gray
    assert means(made).abs().max() < 1e-5
    assert made.square().mean() / blocks.picture(code).square().mean() == pytest.approx(1, abs=0.2)
    red = torch.randn(2, 1, size, size)
    coloured = made + torch.cat([1.402 * red, -0.714136 * red, 0 * red], 1)  # Cr alone
    torch.testing.assert_close(blocks.carried(coloured), code, atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 72])
def test_the_cosine_transform_is_orthogonal(order):
    matrix = texture.cosines(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order), atol=1e-5, rtol=0)


def test_blocks_are_turned_each_in_its_own_way_and_back():
    code = torch.randn(1, 72, 1, 1).expand(2, 72, 8, 8).contiguous()  # all blocks of both faces alike
    signs = texture.hashed(KeySpec("bits", 64).random(2, torch.Generator()), 3 * 72 * 64).unflatten(1, (72, 8, 8, 3))
    hidden = texture.turned(code, signs, back=False)
    torch.testing.assert_close(texture.turned(hidden, signs, back=True), code, atol=1e-4, rtol=1e-4)
    blocks = torch.nn.functional.normalize(hidden, dim=1).transpose(0, 1).flatten(1)
    alike = (blocks.mT @ blocks)[~torch.eye(128, dtype=torch.bool)]
    assert alike.abs().max() < 0.6  # as between directions by chance in 72 dimensions
    assert alike.std() == pytest.approx(72**-0.5, rel=0.1)


def test_it_can_learn_to_mend_eight_faces_by_heart(quick_trainer):
    weights = SDNWeights(cycle=0.0, adversarial=0.0, triplet=0.0, hidden_information=0.0)
    method = small(width=8, learning_rate=1e-3, clip=None, jpeg=1.0, weights=weights)
    faces = NoiseFaces(count=8, people=8, batch_size=8)
    before = method.eval().round_trip(faces.whole(), KeyRing.from_seed(0), "jpeg75")
    quick_trainer(120, max_epochs=-1).fit(method.train(), faces)
    after = method.eval().round_trip(faces.whole(), KeyRing.from_seed(0), "jpeg75")
    worse, better = ((t.recovered - t.original).abs().mean() for t in (before, after))
    assert better < 0.85 * worse


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        SDN(size=50)


def test_a_person_beyond_the_classifier_is_named(quick_trainer):
    with pytest.raises(ValueError, match="raise `identities`"):
        quick_trainer(1).fit(small(identities=2), NoiseFaces())


def correlated(count, rho, dimensions):
    """Pairs of Gaussians whose coordinates have correlation ρ; their mutual information is −d/2 log(1 − ρ²) nats."""
    x = torch.randn(count, dimensions)
    return x, rho * x + (1 - rho**2) ** 0.5 * torch.randn(count, dimensions)


@pytest.mark.parametrize("rho", [0.3, 0.7])
def test_club_on_gaussians_is_its_closed_form(rho):
    """CLUB with the exact conditional equals d ρ² / (1 − ρ²) (methods: 2.2)."""
    x, y = correlated(4000, rho, 3)
    log_variance = torch.full_like(y, 1 - rho**2).log()
    estimate = losses.club(y, rho * x, log_variance)
    expected = 3 * rho**2 / (1 - rho**2)
    assert abs(estimate - expected) < 0.1 * expected + 0.02
    assert estimate >= -1.5 * math.log(1 - rho**2)


def test_both_estimates_with_a_fitted_head_enclose_the_mutual_information():
    """Barber–Agakov, E log q(y | x) + H(y), lies below it by less than a tenth; CLUB lies above it."""
    rho, dimensions = 0.8, 4
    head = GaussianHead(dimensions)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 600)
        x, y = correlated(512, rho, dimensions)
        optimizer.zero_grad()
        (-losses.gaussian_log_likelihood(y, *head(x)).mean()).backward()
        optimizer.step()
    x, y = correlated(20_000, rho, dimensions)
    information = -dimensions / 2 * math.log(1 - rho**2)
    entropy = dimensions / 2 * math.log(2 * math.pi * math.e)
    with torch.no_grad():
        below = float(losses.gaussian_log_likelihood(y, *head(x)).mean()) + entropy
        above = float(losses.club(y[:4000], *(part[:4000] for part in head(x))))
    assert 0.9 * information < below < 1.02 * information  # 0.02: chance of so many pairs
    assert above > information
    assert above == pytest.approx(dimensions * rho**2 / (1 - rho**2), rel=0.1)


def test_the_gaussian_likelihood_is_torchs():
    y, mean, log_variance = torch.randn(3, 5, 4)
    expected = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(y).sum(1)
    torch.testing.assert_close(losses.gaussian_log_likelihood(y, mean, log_variance), expected)


def test_a_triplet_in_order_costs_nothing():
    anchor = torch.eye(4)
    assert losses.triplet(anchor, anchor, -anchor) == 0
    assert losses.triplet(anchor, -anchor, anchor) > 2


def test_distance_counts_right_angles_and_has_a_slope_where_faces_are_alike():
    a = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), dim=1)
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(losses.distance(a, b), torch.tensor([0.0, 1.0, 2.0, 0.5]), atol=4e-3, rtol=0)
    turned = torch.tensor(0.05, requires_grad=True)
    losses.distance(a[:1], torch.stack([turned.cos(), turned.sin()])[None]).sum().backward()
    torch.testing.assert_close(turned.grad, torch.tensor(2 / math.pi), atol=1e-3, rtol=0)  # the cosine's is 0.05


def test_no_pretrained_network_is_in_it():
    from lightning_modules.networks.frozen import Frozen

    method = small()
    assert not any(isinstance(module, Frozen) for module in method.modules())
    assert all(p.requires_grad for p in method.parameters())
    assert method.frozen_cards() == {}
    assert method.loss_networks == frozenset()


def test_contrast_and_colour_pass_through():
    """A norm on the way would make a picture and its half-contrast copy recover alike."""
    from lightning_modules.sdn.networks import Encoder

    image, encoder = torch.rand(1, 3, 64, 64) * 2 - 1, Encoder(8)
    strong, weak = encoder(image), encoder(image / 2)
    assert (strong - weak).norm() > 0.2 * strong.norm()
    method, bits = small().eval(), torch.ones(1, 8)
    strong, weak = (method.recover(face_batch(x), bits) for x in (image, image / 4))
    assert (strong - weak).std() > 0.2 * strong.std()
