"""The record that travels with an anonymized picture: where its faces are, what was sealed; read with suspicion."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from lightning_modules.keys.header import Header, _fields, _once, _unhex
from lightning_modules.keys.material import NONCE_BYTES, Cost, MasterKey, fresh, need_bytes

MAC_BYTES = 32
_SIDE = 100_000  # pixels, the longest side of a picture
MOST = 200_000  # of a clip each frame has its own; two hours of one person
SEALS = ("seal", "code")


@dataclass(frozen=True)
class FaceRecord:
    """One face of a picture.

    Args:
        nonce: 16 bytes; its key is derived from the secret with it.
        box: Left, top, right, bottom as the detector said, in pixels.
        place: Affine map from picture pixels to the method's crop, row by row, six numbers.
        attributes: -1 or +1 for each attribute that was a factor beside the key.
        seal: What :func:`seal` made of the original's pixels.
        code: What :func:`seal` made of the method's code of the original.
        frame: Number of the frame of a clip, from 0; ``None`` in a picture.

    Raises:
        ValueError: If a field is not what is said here.
    """

    nonce: bytes
    box: tuple[float, ...]
    place: tuple[float, ...]
    attributes: tuple[int, ...] = ()
    seal: bytes | None = None
    code: bytes | None = None
    frame: int | None = None

    def __post_init__(self) -> None:
        need_bytes("nonce", self.nonce, NONCE_BYTES)
        for name, numbers, count in (("box", self.box, 4), ("place", self.place, 6)):
            if len(numbers) != count or not all(math.isfinite(n) and abs(n) <= 1e6 for n in numbers):
                raise ValueError(f"a face's {name} must be {count} numbers up to a million")
        a, b, _, c, d, _ = self.place
        if abs(a * d - b * c) <= 1e-9:
            raise ValueError("a face's place must be a map that can be undone")
        if len(self.attributes) > 1000 or not set(self.attributes) <= {-1, 1}:
            raise ValueError("a face's attributes must be -1 or 1, at most 1000")
        if self.frame is not None and not 0 <= self.frame < 1 << 31:
            raise ValueError("a face's frame must be a number from 0")

    @property
    def sealed(self) -> int:
        """Bytes that are sealed."""
        return sum(len(getattr(self, name) or b"") for name in SEALS)

    def to_dict(self, sealed: bool = True) -> dict[str, Any]:
        """Plain values; bytes in hexadecimal, what is sealed in base64."""
        found: dict[str, Any] = {"nonce": self.nonce.hex(), "box": list(self.box), "place": list(self.place)}
        if self.attributes:
            found["attributes"] = list(self.attributes)
        if self.frame is not None:
            found["frame"] = self.frame
        for name in SEALS:
            if sealed and getattr(self, name) is not None:
                found[name] = base64.b64encode(getattr(self, name)).decode()
        return found

    @classmethod
    def from_dict(cls, found: Any) -> FaceRecord:
        """Read :meth:`to_dict` back, believing nothing.

        Raises:
            ValueError: If a field is missing, unknown or malformed.
        """
        _fields(
            "a face",
            found,
            {"nonce": str, "box": list, "place": list},
            {"attributes": list, "seal": str, "code": str, "frame": int},
        )
        for name in ("box", "place"):
            if len(found[name]) > 6 or not all(type(n) in (int, float) and abs(n) <= 1e6 for n in found[name]):
                raise ValueError(f"a face's {name} must be finite numbers up to a million")
        asked = found.get("attributes", [])
        if not all(type(n) is int for n in asked):
            raise ValueError("a face's attributes must be whole numbers")
        try:
            seals = {name: base64.b64decode(found[name], validate=True) for name in SEALS if name in found}
        except (binascii.Error, ValueError):
            raise ValueError("a face's seal and code must be base64") from None
        numbers = {name: tuple(float(n) for n in found[name]) for name in ("box", "place")}
        return cls(
            _unhex("nonce", found["nonce"]), **numbers, attributes=tuple(asked), frame=found.get("frame"), **seals
        )


@dataclass(frozen=True)
class Record:
    """What recovery of a picture needs besides the picture and the secret.

    In *verify* mode it is authenticated under a key from the secret, so that neither places nor seals can be changed.
    In *decoy* mode nothing in it depends on the secret: no check value, no authentication, no seal.

    Args:
        header: Method, weights, salt, cost and, in verify mode, the check value.
        width: Pixels of the picture's width.
        height: Pixels of its height.
        crop: Pixels of the side of the method's crop, which the places lead to.
        faces: Its faces that were anonymized.
        mac: HMAC-SHA256 of everything else, 32 bytes; only in verify mode.

    Raises:
        ValueError: If a field is not what is said here.
    """

    VERSION: ClassVar[int] = 1
    LONGEST: ClassVar[int] = 1 << 28

    header: Header
    width: int
    height: int
    crop: int
    faces: tuple[FaceRecord, ...]
    mac: bytes | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height", "crop"):
            if not 1 <= getattr(self, name) <= _SIDE:
                raise ValueError(f"a record's {name} must be 1 to {_SIDE} pixels")
        if len(self.faces) > MOST:
            raise ValueError(f"a record has at most {MOST} faces")
        if self.mac is not None:
            need_bytes("authentication", self.mac, MAC_BYTES)
        if self.header.decoy and (self.mac is not None or any(face.sealed for face in self.faces)):
            raise ValueError("a record in decoy mode may hold nothing that depends on the secret")

    def bound(self) -> bytes:
        """All but the seals and the authentication, as bytes: what a seal is bound to."""
        return _compact(self._dict(sealed=False))

    def _dict(self, sealed: bool = True) -> dict[str, Any]:
        faces = [face.to_dict(sealed) for face in self.faces]
        sides = {"width": self.width, "height": self.height, "crop": self.crop}
        return {"record": self.VERSION, "header": self.header.to_dict(), **sides, "faces": faces}

    def to_json(self) -> str:
        """One line of JSON."""
        found = self._dict()
        return _compact(found if self.mac is None else found | {"mac": self.mac.hex()}).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """Read :meth:`to_json` back, believing nothing.

        Raises:
            ValueError: If the text is too long, no JSON, or no record.
        """
        if len(text) > cls.LONGEST:
            raise ValueError(f"a record has at most {cls.LONGEST} characters, got {len(text)}")
        try:
            found = json.loads(text, object_pairs_hook=_once, parse_constant=_refused)
        except (ValueError, RecursionError):  # whole numbers of too many digits are a ValueError of their own
            raise ValueError("a record must be one JSON object of finite numbers, each field once") from None
        if isinstance(found, dict) and "record" in found:
            version = found["record"]  # first, since another version may have other fields
            if type(version) is not int or version != cls.VERSION:
                raise ValueError(f"this record has another version than {cls.VERSION}, the one this release reads")
        sides = dict.fromkeys(("record", "width", "height", "crop"), int)
        _fields("a record", found, {**sides, "header": dict, "faces": list}, {"mac": str})
        if len(found["faces"]) > MOST:
            raise ValueError(f"a record has at most {MOST} faces")
        return cls(
            header=Header.from_dict(found["header"]),
            **{name: found[name] for name in ("width", "height", "crop")},
            faces=tuple(FaceRecord.from_dict(face) for face in found["faces"]),
            mac=_unhex("mac", found["mac"]) if "mac" in found else None,
        )

    def _hmac(self, master: MasterKey) -> HMAC:
        made = HMAC(master.derive("record", self.header.nonce).material(), SHA256())
        made.update(_compact(self._dict()))
        return made

    def authenticated(self, master: MasterKey) -> Record:
        """The same record under the authentication of its secret; in decoy mode as it is."""
        return self if self.header.decoy else replace(self, mac=self._hmac(master).finalize())

    def check(self, master: MasterKey) -> MasterKey:
        """:meth:`Header.check_secret` of a record that is as it was written; in decoy mode any secret is accepted.

        Raises:
            ValueError: If the key is of another secret, or the record was altered.
        """
        inner = self.header.check_secret(master)
        if not self.header.decoy:
            try:
                self._hmac(master).verify(self.mac or b"")
            except InvalidSignature:
                raise ValueError("the record of this picture was altered; nothing was recovered") from None
        return inner

    def rekeyed(self, inner: MasterKey, master: MasterKey, salt: bytes, cost: Cost) -> Record:
        """The same faces under another secret: their own keys stay, hidden under the new master key.

        Args:
            inner: What :meth:`check` gave for the old secret.
            master: The new secret, stretched with ``salt`` and ``cost``.
            salt: 16 fresh bytes.
            cost: What a guess of the new secret costs.

        Raises:
            ValueError: In decoy mode never; in verify mode, if something sealed does not open.
        """
        nonce = fresh()
        check = None if self.header.decoy else master.check_value(nonce)
        wrapped = master.wrap(inner, nonce)
        header = replace(self.header, salt=salt, nonce=nonce, cost=cost, check=check, wrapped=wrapped)
        bare = replace(self, header=header, mac=None)
        old, new = self.bound(), bare.bound()

        def moved(face: FaceRecord) -> FaceRecord:
            kept = {name: getattr(face, name) for name in SEALS if getattr(face, name) is not None}
            plain = {name: unseal(inner, face.nonce, sealed, old, name) for name, sealed in kept.items()}
            return replace(face, **{name: seal(inner, face.nonce, data, new, name) for name, data in plain.items()})

        return replace(bare, faces=tuple(moved(face) for face in self.faces)).authenticated(master)


def seal(master: MasterKey, nonce: bytes, plain: bytes, bound: bytes, label: str = "seal") -> bytes:
    """Encrypt something of the original: AES-256-GCM under a key of the face's own nonce.

    Args:
        master: The stretched secret.
        nonce: The face's, 16 bytes.
        plain: What is sealed.
        bound: What the seal belongs to (:meth:`Record.bound`); it opens with nothing else.
        label: What it is for, one of :data:`SEALS`; each has its own key.

    Returns:
        12 random bytes, the cipher text and 16 bytes of authentication.
    """
    start = fresh()[:12]
    return start + AESGCM(master.derive(label, nonce).material()).encrypt(start, plain, bound)


def unseal(master: MasterKey, nonce: bytes, sealed: bytes, bound: bytes, label: str = "seal") -> bytes:
    """Undo :func:`seal`.

    Raises:
        ValueError: If the secret is another one, or anything was altered.
    """
    try:
        return AESGCM(master.derive(label, nonce).material()).decrypt(sealed[:12], sealed[12:], bound)
    except (InvalidTag, ValueError):
        what = "original" if label == "seal" else label
        raise ValueError(f"the sealed {what} does not open: another secret, or it was altered") from None


def _compact(found: dict[str, Any]) -> bytes:
    return json.dumps(found, separators=(",", ":"), allow_nan=False).encode()


def _refused(name: str) -> float:
    raise ValueError(name)
