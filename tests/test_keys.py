"""Properties of keys: the same inputs give the same numbers, others give others, and a secret never shows."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import pickle
import struct
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.keys import (
    Cost,
    Header,
    Key,
    KeyRing,
    KeySpec,
    MasterKey,
    Secret,
    fresh,
    orthogonalize,
    read_secret,
    stretch,
)

CHEAP = Cost(time=1, memory=8, lanes=1)
VECTORS = Path(__file__).parent / "data" / "key_vectors.json"
PHRASE = "correct horse battery staple"
SALT, NONCE = bytes(range(16)), bytes(range(16, 32))
sixteen = st.binary(min_size=16, max_size=16)


def master(secret=PHRASE, salt=SALT):
    return stretch(Secret(secret), salt, CHEAP)


def header(**change):
    fields = {"method": "sdn", "weights": "none", "salt": SALT, "nonce": NONCE, "cost": CHEAP, **change}
    return Header(**fields)


# ---- the same on every platform and release ----


def compute(secret, salt, nonce, label, cost):
    """What ``key_vectors.json`` holds. Written once: whatever changes it makes old pictures unreadable."""
    key = stretch(Secret(secret), bytes.fromhex(salt), Cost(**cost)).derive(label, bytes.fromhex(nonce))
    normal, rotation, large = key.normal(512), key.rotation(4), key.rotation(64)
    return {
        "material": key.material(48).hex(),
        "bits": [int(b) for b in key.bits(64)],
        "seed": key.seed(),
        "normal": [*normal[:6].tolist(), normal[511].item(), normal.sum().item()],
        "rotation_4": rotation.flatten().tolist(),
        "rotation_64": [large[0, 0].item(), large[63, 0].item(), large[0, 63].item(), large.trace().item()],
    }


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_text(encoding="utf-8")))
def test_the_committed_vectors_hold(vector):
    found = compute(**vector["given"])
    for name, expected in vector["expected"].items():
        if isinstance(expected, list):
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-9)
        else:
            assert found[name] == expected


def chacha20_block(key, counter, nonce):
    """RFC 8439, section 2.3, read from the text: what the library is checked against."""

    def rotate(x, n):
        return (x << n | x >> (32 - n)) & 0xFFFFFFFF

    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter]
    start += struct.unpack("<3I", nonce)
    s = list(start)
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for _ in range(10):
        for a, b, c, d in columns + diagonals:
            for x, y, z, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                s[x] = (s[x] + s[y]) & 0xFFFFFFFF
                s[z] = rotate(s[z] ^ s[x], by)
    return struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(s, start, strict=True)))


def test_keys_are_hkdf_sha256_and_numbers_are_the_chacha20_stream():
    value = bytes(range(32))
    pseudorandom = hmac.digest(NONCE, value, "sha256")  # RFC 5869: extract, then one block of expand
    expected = hmac.digest(pseudorandom, b"keyveil/1/key/face\x01", "sha256")
    key = MasterKey(value).derive("face", NONCE)
    assert key == Key(expected)
    stream = b"".join(chacha20_block(expected, i, b"material\0\0\0\0") for i in range(3))
    assert key.material(192) == stream
    seed = chacha20_block(expected, 0, b"seed".ljust(12, b"\0"))[:8]
    assert key.seed() == int.from_bytes(seed, "little") >> 1


# ---- same inputs, same key; any other input, another key ----


@settings(max_examples=25, deadline=None)
@given(secret=st.text(min_size=1), salt=sixteen, nonce=sixteen, label=st.text(max_size=20))
def test_the_same_inputs_give_the_same_key(secret, salt, nonce, label):
    one, two = (stretch(Secret(secret), salt, CHEAP).derive(label, nonce) for _ in range(2))
    assert one == two
    assert torch.equal(one.bits(64), two.bits(64))
    assert torch.equal(one.normal(9), two.normal(9))
    assert torch.equal(one.rotation(3), two.rotation(3))
    assert one.seed() == two.seed()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), salt=sixteen, nonce=sixteen)
def test_another_secret_salt_nonce_label_or_cost_gives_an_unrelated_key(data, salt, nonce):
    def flip(value):
        bit = data.draw(st.integers(0, 8 * len(value) - 1))
        return bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(value))

    right = stretch(Secret(PHRASE), salt, CHEAP).derive("face", nonce)
    for other in (
        stretch(Secret(PHRASE + "."), salt, CHEAP).derive("face", nonce),
        stretch(Secret(PHRASE), flip(salt), CHEAP).derive("face", nonce),
        stretch(Secret(PHRASE), salt, CHEAP).derive("face", flip(nonce)),
        stretch(Secret(PHRASE), salt, CHEAP).derive("fact", nonce),
        stretch(Secret(PHRASE), salt, Cost(2, 8, 1)).derive("face", nonce),
    ):
        agree = (right.bits(4096) == other.bits(4096)).float().mean()
        assert abs(agree - 0.5) < 6 * 0.5 / 64  # six standard deviations of a fair coin
        assert abs(torch.cosine_similarity(right.normal(4096), other.normal(4096), 0)) < 6 / 64


def test_the_kinds_of_numbers_of_one_key_are_unrelated():
    key = KeyRing.from_seed(3).right(0)
    drawn = [key._stream(purpose, 64) for purpose in ("material", "bits", "normal", "rotation", "seed")]
    assert len(set(drawn)) == 5


def test_a_passphrase_is_one_secret_however_its_accents_are_typed():
    assert Secret("caf\u00e9") == Secret("cafe\u0301") == Secret("caf\u00e9".encode())
    assert Secret(b"\xff\xfe") != Secret(b"\xff\xfd")
    assert Secret("\udcff") == Secret(b"\xff")  # how Python hands over a byte that is no UTF-8


# ---- the numbers ----


def test_bits_are_fair():
    bits = KeyRing.from_seed(0).right(0).bits(40_000)
    assert set(bits.tolist()) == {-1.0, 1.0}
    assert abs(bits.mean()) < 6 / 200
    assert abs((bits[1:] * bits[:-1]).mean()) < 6 / 200


def test_normals_have_the_moments_and_tails_of_normals():
    x = KeyRing.from_seed(0).right(0).normal(99_999)
    assert x.shape == (99_999,)
    assert x.dtype == torch.float64
    assert x.isfinite().all()
    se = 99_999**-0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 6 * se * variance**0.5
    assert abs((x.abs() > 1.959964).double().mean() - 0.05) < 6 * se * 0.05**0.5
    assert abs((x[::2][:-1] * x[1::2]).mean()) < 6 * se * 2**0.5  # the two of a Box-Muller pair


@pytest.mark.parametrize("size", [1, 2, 3, 16, 128])
def test_a_rotation_is_orthogonal_with_determinant_one(size):
    for sample in range(6):
        q = KeyRing.from_seed(1).right(sample).rotation(size)
        torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
        assert np.linalg.det(q.numpy()) == pytest.approx(1.0, abs=1e-10)


def test_a_rotation_in_bands_mixes_nothing_of_two_bands_and_tells_keys_apart():
    spec = KeySpec("rotation", 12, bands=3)
    one, two = (spec.numbers(KeyRing.from_seed(1).right(sample)) for sample in range(2))
    across = torch.block_diag(*[torch.ones(4, 4)] * 3) == 0
    for q in (one, two, *spec.random(2)):
        torch.testing.assert_close(q @ q.T, torch.eye(12), rtol=0, atol=1e-6)
        assert not q[across].any()
        assert q[~across].all()
    assert (one - two)[~across].abs().min() > 1e-4
    assert (one[:4, :4] - one[4:8, 4:8]).abs().min() > 1e-4  # each band turns in its own way


@pytest.mark.parametrize(
    ("kind", "length", "bands"), [("rotation", 12, 5), ("rotation", 12, 0), ("rotation", 12, 12), ("normal", 12, 3)]
)
def test_bands_that_do_not_suit_are_refused(kind, length, bands):
    with pytest.raises(ValueError, match=f"cannot have {bands} bands"):
        KeySpec(kind, length, bands)


def test_rotations_are_numpys_qr_with_fixed_signs():
    x = torch.randn(5, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for normals, q in zip(x.numpy(), orthogonalize(x).numpy(), strict=True):
        expected, r = np.linalg.qr(normals)
        expected = expected * np.sign(np.diag(r))
        expected[:, -1] *= np.sign(np.linalg.det(expected))
        np.testing.assert_allclose(q, expected, atol=1e-12)


def test_rotations_are_uniform_over_all():
    q = KeySpec("rotation", 3).random(20_000, torch.Generator().manual_seed(0))
    assert q.mean(0).abs().max() < 6 * (1 / 3 / 20_000) ** 0.5
    torch.testing.assert_close((q**2).mean(0), torch.full((3, 3), 1 / 3), rtol=0, atol=0.02)
    # the trace of a Haar rotation of three dimensions, 1 + 2 cos(angle), has mean 0 and variance 1
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.var() - 1) < 0.06


# ---- what a method asks for ----

SPECS = [KeySpec("none", 0), KeySpec("bits", 64), KeySpec("normal", 512), KeySpec("rotation", 8)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_a_specs_numbers_and_random_keys_pass_its_own_check(spec):
    ring = KeyRing.from_seed(0)
    numbers = torch.stack([spec.numbers(ring.right(i)) for i in range(3)])
    drawn = spec.random(3, torch.Generator().manual_seed(0))
    for keys in (numbers, drawn, spec.random(3)):
        assert keys.dtype == torch.float32
        assert spec.check(keys, 3) is keys
        assert keys.shape == (3, *spec.shape)
    assert torch.equal(drawn, spec.random(3, torch.Generator().manual_seed(0)))
    if spec.kind != "none":
        assert not torch.equal(drawn, spec.random(3, torch.Generator().manual_seed(1)))
        assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("spec", "numbers", "batch", "sentence"),
    [
        (
            KeySpec("bits", 64),
            torch.ones(2, 16),
            2,
            "expected a key of 64 bits, got 16; a key fits only models built with the same key_bits",
        ),
        (
            KeySpec("normal", 512),
            torch.ones(2, 64),
            2,
            "expected a key of 512 numbers, got 64; a key fits only models built with the same key length",
        ),
        (
            KeySpec("rotation", 8),
            torch.ones(2, 9, 9),
            2,
            "expected a key of 8 dimensions, got 9; a key fits only models built with the same key length",
        ),
        (
            KeySpec("bits", 64),
            torch.ones(64),
            1,
            "expected a key of 64 bits, got shape (64,); a key fits only models built with the same key_bits",
        ),
        (KeySpec("bits", 64), torch.ones(3, 64), 2, "expected 2 keys, one a face, got 3"),
        (
            KeySpec("bits", 64),
            torch.ones(2, 64, dtype=torch.int64),
            2,
            "expected a key of floating-point numbers, got torch.int64",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_refused_in_one_sentence(spec, numbers, batch, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        spec.check(numbers, batch)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("kind", "length"), [("bits", 0), ("none", 3), ("normal", -1), ("rotation", 0)])
def test_a_spec_that_means_nothing_is_refused(kind, length):
    with pytest.raises(ValueError, match="cannot have length"):
        KeySpec(kind, length)


@given(index=st.integers(0, 200), length=st.integers(1, 64))
@settings(deadline=None)
def test_one_off_flips_exactly_one_bit(index, length):
    spec = KeySpec("bits", length)
    right = spec.random(3)
    before = right.clone()
    wrong = spec.one_off(right, index)
    changed = wrong != right
    assert torch.equal(right, before)
    assert changed.sum(1).tolist() == [1, 1, 1]
    assert changed[:, index % length].all()
    assert torch.equal(wrong.abs(), torch.ones_like(wrong))


@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.99])
def test_one_off_of_a_vector_keeps_its_length_at_the_wanted_cosine(cosine):
    spec = KeySpec("normal", 512)
    right = spec.random(4, torch.Generator().manual_seed(0))
    wrong, again = spec.one_off(right, 3, cosine), spec.one_off(right, 4, cosine)
    torch.testing.assert_close(torch.cosine_similarity(right, wrong), torch.full((4,), cosine), atol=1e-5, rtol=0)
    torch.testing.assert_close(wrong.norm(dim=1), right.norm(dim=1))
    assert torch.equal(wrong, spec.one_off(right, 3, cosine))
    assert not torch.allclose(wrong, again)


def test_keys_nearby_are_as_far_off_as_their_word_says():
    sample = torch.arange(3)
    for length, counts in ((64, [2, 4, 8, 16]), (256, [2, 4, 8, 16, 32]), (16, [2, 4]), (4, [])):
        right = KeySpec("bits", length).random(3)
        nearby = KeySpec("bits", length).nearby(right, sample)
        assert list(nearby) == [f"bits-{count}" for count in counts]
        for count, wrong in zip(counts, nearby.values(), strict=True):
            assert (wrong != right).sum(1).tolist() == [count] * 3
            assert torch.equal(wrong.abs(), torch.ones_like(wrong))
    right = KeySpec("bits", 64).random(1).expand(3, 64)
    assert len(KeySpec("bits", 64).nearby(right, sample)["bits-8"].unique(dim=0)) == 3  # other bits for other faces
    right = KeySpec("normal", 512).random(3)
    for word, wrong in KeySpec("normal", 512).nearby(right, sample).items():
        cosine = torch.full((3,), float(word.removeprefix("cosine-")))
        torch.testing.assert_close(torch.cosine_similarity(right, wrong), cosine, atol=1e-5, rtol=0)


def test_nothing_is_near_a_rotation_or_no_key():
    for spec in (SPECS[0], SPECS[3], KeySpec("normal", 1)):
        assert spec.one_off(spec.random(2)) is None
        assert spec.nearby(spec.random(2), torch.arange(2)) == {}


# ---- rings ----


def test_a_ring_is_the_same_everywhere_and_its_keys_are_all_different():
    def keys(ring):
        drawn = [draw(sample) for draw in (ring.right, ring.other, ring.wrong) for sample in (0, 1, 2**40)]
        return drawn + [ring.other(0, 1), ring.wrong(0, 1), ring.wrong(0, 2)]

    ring, again = KeyRing.from_seed(0), KeyRing.from_seed(0)
    assert keys(ring) == keys(again)
    many = keys(ring) + keys(KeyRing.from_seed(1)) + keys(KeyRing.from_seed(0, label="sdn"))
    assert len({key.material() for key in many}) == len(many)


def test_a_wrong_key_is_another_secret_under_the_same_nonce():
    ring = KeyRing.from_seed(0)
    assert ring.wrong(5) == ring.wrong_master.derive(ring.label, ring.nonce(5))
    assert ring.right(5) == ring.master.derive(ring.label, ring.nonce(5))
    assert len(ring.nonce(5)) == 16


# ---- headers ----


@settings(max_examples=50, deadline=None)
@given(salt=sixteen, nonce=sixteen, check=st.none() | sixteen, trained=st.booleans())
def test_a_header_comes_back_from_its_json(salt, nonce, check, trained):
    weights = "sha256:" + hashlib.sha256(salt).hexdigest() if trained else "none"
    one = header(salt=salt, nonce=nonce, check=check, weights=weights)
    assert Header.from_json(one.to_json()) == one
    assert one.decoy == (check is None)


def change(**fields):
    found = {**header(check=bytes(16)).to_dict(), **fields}
    return json.dumps({name: value for name, value in found.items() if value != "drop"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "one JSON object"),
        ("[]", "one JSON object"),
        ("[" * 2000, "one JSON object"),
        (b"\xff\xff", "one JSON object"),
        (" " * 5000, "at most 2048 characters"),
        ('{"version": 1, "version": 1}', "each field once"),
        (change(version=2, new="field"), "has version 2, and this release reads version 1"),
        (change(version=True), "has version True"),
        (change(version="1"), "has version '1'"),
        (change(salt="drop"), "lacks salt"),
        (change(secret="x"), "unknown fields: secret"),
        (change(salt="00" * 15), "expected a salt of 16 bytes, got 15"),
        (change(nonce="00" * 17), "expected a nonce of 16 bytes, got 17"),
        (change(check="00"), "expected a key-check value of 16 bytes, got 1"),
        (change(check=None), "check must be text"),
        (change(salt="zz" * 16), "salt must be hexadecimal"),
        (change(nonce=["00"]), "nonce must be text"),
        (change(method="../../x"), "a header's method"),
        (change(method=""), "a header's method"),
        (change(method="x\n"), "a header's method"),
        (change(method=7), "method must be text"),
        (change(weights="md5:00"), "a header's weights"),
        (change(cost=3), "cost must be an object"),
        (change(cost={"time": 1, "memory": 8}), "cost lacks lanes"),
        (change(cost={"time": 1, "memory": 8, "lanes": 1, "hash": 64}), "unknown fields: hash"),
        (
            change(cost={"time": 17, "memory": 8, "lanes": 1}),
            "time must be a whole number from 1 to 16, got 17",
        ),
        (
            change(cost={"time": 1, "memory": 2**21, "lanes": 1}),
            "memory in KiB must be a whole number from 8 to",
        ),
        (change(cost={"time": 1, "memory": 8, "lanes": 2}), "from 16 to 1048576, got 8"),
        (change(cost={"time": 1, "memory": 8, "lanes": 99}), "lanes must be a whole number from 1 to 16"),
        (change(cost={"time": 1.0, "memory": 8, "lanes": 1}), "time must be a whole number"),
        (change(cost={"time": "1" * 900, "memory": 8, "lanes": 1}), "time must be a whole number"),
    ],
)
def test_a_header_from_a_stranger_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Header.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_verify_refuses_a_wrong_secret_and_decoy_takes_any():
    key = master()
    verify, decoy = header(check=key.check_value(NONCE)), header()
    assert verify.unlock(Secret(PHRASE)) == key
    with pytest.raises(ValueError, match="^wrong secret: "):
        verify.unlock(Secret("something else"))
    with pytest.raises(ValueError, match="^wrong secret: "):
        header(check=key.check_value(NONCE), nonce=SALT).check_secret(key)
    assert decoy.unlock(Secret("something else")) == master("something else")


def test_nothing_in_a_decoy_header_depends_on_the_secret():
    assert set(header().to_dict()) == {"version", "method", "weights", "salt", "nonce", "cost"}


def test_the_check_value_is_none_of_the_numbers():
    key = master()
    value = key.check_value(NONCE)
    assert value not in key.derive("check", NONCE).material(4096)
    assert value != key.derive("check", NONCE)._value[:16]


def test_the_default_cost_is_worth_its_wait():
    assert Cost() == Cost(time=3, memory=64 * 1024, lanes=4)
    assert len(fresh()) == 16
    assert fresh() != fresh()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: stretch(Secret("x"), b"short", CHEAP), "expected a salt of 16 bytes, got 5"),
        (lambda: master().derive("face", b""), "expected a nonce of 16 bytes, got 0"),
        (lambda: master().check_value(b"x"), "expected a nonce of 16 bytes, got 1"),
        (lambda: MasterKey(b"x"), "expected a master key of 32 bytes, got 1"),
        (lambda: Key(b"x"), "expected a key of 32 bytes, got 1"),
        (lambda: Secret(""), "the secret is empty"),
        (lambda: Secret(b""), "the secret is empty"),
        (lambda: Cost(time=0), "time must be a whole number from 1 to 16, got 0"),
    ],
)
def test_what_cannot_be_a_key_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# ---- where a secret comes from ----


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_file_loses_one_newline_and_no_more(tmp_path, monkeypatch, end):
    monkeypatch.setenv("KEYVEIL_SECRET", "not this one")
    (tmp_path / "secret").write_bytes(b"a phrase \n" + end)
    expected = "a phrase \n" if end else "a phrase "
    assert read_secret(tmp_path / "secret") == Secret(expected)


def test_bytes_of_a_key_file_are_taken_as_they_are(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(range(128, 160)))
    assert read_secret(tmp_path / "secret") == Secret(bytes(range(128, 160)))


def test_the_environment_comes_before_the_prompt(monkeypatch):
    monkeypatch.setattr("getpass.getpass", lambda _: pytest.fail("asked"))
    monkeypatch.setenv("KEYVEIL_SECRET", PHRASE)
    monkeypatch.setenv("OTHER", "other")
    assert read_secret() == Secret(PHRASE)
    assert read_secret(env="OTHER") == Secret("other")


def test_the_prompt_asks_twice_where_a_slip_would_cost_the_picture(monkeypatch):
    monkeypatch.delenv("KEYVEIL_SECRET", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([PHRASE, PHRASE, PHRASE, PHRASE, "a slip"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))
    assert read_secret() == Secret(PHRASE)
    assert read_secret(confirm=True) == Secret(PHRASE)
    with pytest.raises(ValueError, match="the two secrets differ"):
        read_secret(confirm=True)


def test_no_secret_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("KEYVEIL_SECRET", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(ValueError, match="there is no secret: name a secret file, set KEYVEIL_SECRET"):
        read_secret()
    with pytest.raises(ValueError, match="there is no secret"):
        read_secret(prompt=False)
    (tmp_path / "empty").write_bytes(b"\n")
    with pytest.raises(ValueError, match="the secret is empty"):
        read_secret(tmp_path / "empty")
    monkeypatch.setenv("KEYVEIL_SECRET", "")
    with pytest.raises(ValueError, match="the secret is empty"):
        read_secret()


# ---- a secret never shows ----


def spoken(error):
    return "".join(traceback.format_exception(error)) + repr(error) + str(error)


def test_secrets_and_keys_never_show_themselves():
    secret, key = Secret(PHRASE), master()
    face = key.derive("face", NONCE)
    ring = KeyRing(key, key)
    shown = " ".join(f"{x} {x!r} {x!s} {[x]}" for x in (secret, key, face, ring))
    shown += header(check=key.check_value(NONCE)).to_json() + repr(header(check=key.check_value(NONCE)))
    for hidden in (secret, key, face):
        assert not hasattr(hidden, "__dict__")
        raw = hidden._value
        for form in (raw.decode("latin-1"), raw.hex(), repr(raw)):
            assert form not in shown
    assert PHRASE not in shown


@pytest.mark.parametrize("hidden", [Secret(PHRASE), MasterKey(bytes(32)), Key(bytes(32)), KeyRing.from_seed(0)])
def test_secrets_and_keys_are_neither_pickled_nor_copied(hidden):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled or copied"):
            pickle.dumps(hidden, protocol)
    with pytest.raises(TypeError, match="not pickled or copied"):
        copy.deepcopy(hidden)


def test_no_error_repeats_the_secret(tmp_path, monkeypatch):
    verify = header(check=master("right").check_value(NONCE))
    calls = [
        lambda: verify.unlock(Secret(PHRASE)),
        lambda: stretch(Secret(PHRASE), b"", CHEAP),
        lambda: pickle.dumps(Secret(PHRASE)),
        lambda: hash(Secret(PHRASE)),
        lambda: Secret(PHRASE) + "x",
        lambda: Secret(PHRASE + "\ud800"),
        lambda: json.dumps({"secret": Secret(PHRASE)}),
        lambda: read_secret(PHRASE),  # the secret given where a file name belongs
        lambda: read_secret(tmp_path),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError, OSError)) as caught:
            call()
        said = "".join(str(e) for e in (caught.value, caught.value.__cause__))
        assert PHRASE not in said
        assert PHRASE not in spoken(caught.value)
