"""The record of a picture: read back as written, refused when altered, and no way to test guesses in decoy mode."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.keys import Cost, FaceRecord, Header, MasterKey, Record, seal, unseal

MASTER, STRANGER = MasterKey.from_seed(0), MasterKey.from_seed(1)
NONCE = bytes(range(16))


def make(decoy=False, faces=2, **options):
    header = Header("toy", "none", bytes(16), NONCE, Cost(1, 64, 1), None if decoy else MASTER.check_value(NONCE))
    places = [
        FaceRecord(bytes([n]) * 16, (1.5, 2.0, 30.25, 40.0), (0.1, 0.0, 3.0, 0.0, 0.1, 1 / 3), (1, -1))
        for n in range(faces)
    ]
    return replace(Record(header, 640, 480, 64, tuple(places)), **options)


def sealed():
    record = make()
    bound = record.bound()
    faces = tuple(replace(f, seal=seal(MASTER, f.nonce, b"pixels %d" % i, bound)) for i, f in enumerate(record.faces))
    return replace(record, faces=faces).authenticated(MASTER)


@pytest.mark.parametrize(
    "record", [make(), make(decoy=True), make(faces=0), sealed()], ids=["keyed", "decoy", "no face", "sealed"]
)
def test_a_record_is_read_back_as_it_was_written(record):
    assert Record.from_json(record.to_json()) == record


def test_the_right_secret_opens_and_another_one_is_refused():
    record = Record.from_json(make().authenticated(MASTER).to_json())
    assert record.check(MASTER) == MASTER
    with pytest.raises(ValueError, match="wrong secret"):
        record.check(STRANGER)


def test_any_change_of_a_record_is_noticed():
    record = sealed()
    face = record.faces[0]
    changed = [
        replace(record, width=641),
        replace(record, faces=record.faces[:1]),
        replace(record, faces=record.faces[::-1]),
        replace(record, faces=(replace(face, place=(0.2, *face.place[1:])), record.faces[1])),
        replace(record, faces=(replace(face, attributes=(1, 1)), record.faces[1])),
        replace(record, faces=(replace(face, seal=None), record.faces[1])),
        replace(record, mac=None),
        replace(record, header=replace(record.header, method="other")),
    ]
    for one in changed:
        with pytest.raises(ValueError, match="altered"):
            one.check(MASTER)


def test_a_decoy_record_holds_nothing_of_the_secret():
    record = make(decoy=True)
    assert record.authenticated(MASTER).to_json() == record.authenticated(STRANGER).to_json() == record.to_json()
    assert record.check(STRANGER) == STRANGER
    with pytest.raises(ValueError, match="decoy"):
        replace(record, mac=bytes(32))
    with pytest.raises(ValueError, match="decoy"):
        replace(record, faces=(replace(record.faces[0], seal=b"x"),))


def test_a_seal_opens_with_its_secret_its_face_and_its_record_only():
    record = sealed()
    face = record.faces[1]
    assert unseal(MASTER, face.nonce, face.seal, record.bound()) == b"pixels 1"
    bent = bytes([face.seal[-1] ^ 1])
    for master, nonce, text, bound in [
        (STRANGER, face.nonce, face.seal, record.bound()),
        (MASTER, record.faces[0].nonce, face.seal, record.bound()),
        (MASTER, face.nonce, face.seal, make(width=1).bound()),
        (MASTER, face.nonce, face.seal[:-1] + bent, record.bound()),
        (MASTER, face.nonce, b"", record.bound()),
    ]:
        with pytest.raises(ValueError, match="does not open"):
            unseal(master, nonce, text, bound)


def test_ten_thousand_tampered_or_wrongly_keyed_openings_fail():
    record, random = sealed(), np.random.default_rng(0)
    face, bound = record.faces[0], record.bound()
    for number in range(5000):
        bent = bytearray(face.seal)
        bent[random.integers(len(bent))] ^= 1 << random.integers(8)
        for master, text in ((MASTER, bytes(bent)), (MasterKey.from_seed(number + 1), face.seal)):
            with pytest.raises(ValueError, match="does not open"):
                unseal(master, face.nonce, text, bound)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


MANY = [1000, pytest.param(10_000, marks=pytest.mark.slow)]


def refused(text):
    with pytest.raises(ValueError, match="."):
        Record.from_json(text).check(MASTER)


@pytest.mark.parametrize("inputs", MANY)
def test_no_text_is_taken_for_a_record(inputs):
    @settings(max_examples=inputs, deadline=None)
    @given(st.one_of(st.text(), st.binary(), JSON.map(json.dumps)))
    def check(text):
        refused(text)

    check()


@pytest.mark.parametrize("inputs", MANY)
def test_no_field_can_be_exchanged(inputs):
    """One value anywhere in an authenticated record becomes another: it is refused, never opened, never a crash."""

    @settings(max_examples=inputs, deadline=None)
    @given(st.data())
    def check(data):
        found = json.loads(sealed().to_json())
        at, key = found, data.draw(st.sampled_from(sorted(found)))
        while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        value = data.draw(JSON.filter(lambda v: v != at[key]))
        at[key] = value
        refused(json.dumps(found))

    check()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"record": ' + "9" * 10_000 + "}", "NaN", '{"record":1,"record":1}', ""]
)
def test_hostile_text_is_refused_at_once(text):
    refused(text)
