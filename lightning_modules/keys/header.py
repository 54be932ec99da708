"""The header that travels with an anonymized face: written plainly, read with suspicion."""

from __future__ import annotations

import hmac
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from lightning_modules.keys.material import (
    CHECK_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    SALT_BYTES,
    Cost,
    MasterKey,
    need_bytes,
    stretch,
)
from lightning_modules.keys.secret import Secret


@dataclass(frozen=True)
class Header:
    """What recovery needs besides the secret, and nothing that replaces it.

    With a check value (*verify*) a wrong secret is refused. Without one (*decoy*) nothing here depends on the
    secret, so no guess can be tested by the header and a wrong secret yields another plausible face.

    Args:
        method: Name of the method, letters, digits and ``_.-``.
        weights: Hash of what it was trained to, ``"sha256:…"``, or ``"none"``.
        salt: 16 bytes, one a run.
        nonce: 16 bytes, one a face.
        cost: What a guess of the secret costs.
        check: :meth:`MasterKey.check_value` of the nonce, or ``None`` for decoy.
        wrapped: After a change of the secret, :meth:`MasterKey.wrap` of the master key that faces' keys come from.
        version: Version of this format.

    Raises:
        ValueError: If a field is not what is said here.
    """

    VERSION: ClassVar[int] = 1
    LONGEST: ClassVar[int] = 2048

    method: str
    weights: str
    salt: bytes
    nonce: bytes
    cost: Cost = field(default_factory=Cost)
    check: bytes | None = None
    wrapped: bytes | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        self._readable(self.version)
        if not re.fullmatch(r"[\w.-]{1,64}", self.method, re.ASCII):
            raise ValueError("a header's method must be 1 to 64 letters, digits, '_', '.' or '-'")
        if not re.fullmatch(r"none|sha256:[0-9a-f]{64}", self.weights):
            raise ValueError("a header's weights must be 'none' or 'sha256:' and 64 hexadecimal digits")
        need_bytes("salt", self.salt, SALT_BYTES)
        need_bytes("nonce", self.nonce, NONCE_BYTES)
        if self.check is not None:
            need_bytes("key-check value", self.check, CHECK_BYTES)
        if self.wrapped is not None:
            need_bytes("wrapped key", self.wrapped, KEY_BYTES)

    @classmethod
    def _readable(cls, version: Any) -> None:
        if type(version) is not int or version != cls.VERSION:
            found = f"{version!r:.40}"
            raise ValueError(f"this header has version {found}, and this release reads version {cls.VERSION} only")

    @property
    def decoy(self) -> bool:
        """Whether any secret is accepted."""
        return self.check is None

    def unlock(self, secret: Secret) -> MasterKey:
        """Stretch a secret as this header says, and refuse a wrong one if it can be told.

        Raises:
            ValueError: As :meth:`check_secret`.
        """
        return self.check_secret(stretch(secret, self.salt, self.cost))

    def check_secret(self, master: MasterKey) -> MasterKey:
        """The master key that faces' keys come from, if the header accepts this one; in decoy mode it accepts any.

        It is the one that is given, unless the secret was changed since.

        Raises:
            ValueError: If the key is of another secret.
        """
        if self.check is not None and not hmac.compare_digest(self.check, master.check_value(self.nonce)):
            raise ValueError("wrong secret: this face was anonymized under another one")
        return master if self.wrapped is None else master.unwrap(self.wrapped, self.nonce)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, bytes in hexadecimal."""
        found: dict[str, Any] = {"version": self.version, "method": self.method, "weights": self.weights}
        found |= {"salt": self.salt.hex(), "nonce": self.nonce.hex(), "cost": asdict(self.cost)}
        optional = {"check": self.check, "wrapped": self.wrapped}
        return found | {name: value.hex() for name, value in optional.items() if value is not None}

    @classmethod
    def from_dict(cls, found: Any) -> Header:
        """Read :meth:`to_dict` back, believing nothing.

        Raises:
            ValueError: If a field is missing, unknown or malformed.
        """
        if isinstance(found, dict) and "version" in found:
            cls._readable(found["version"])  # first, since another version may have other fields
        text = dict.fromkeys(("method", "weights", "salt", "nonce"), str)
        _fields("a header", found, {"version": int, **text, "cost": dict}, {"check": str, "wrapped": str})
        _fields("a header's cost", found["cost"], dict.fromkeys(("time", "memory", "lanes"), int))
        raw = {name: _unhex(name, found[name]) for name in ("salt", "nonce", "check", "wrapped") if name in found}
        return cls(**{**found, **raw, "cost": Cost(**found["cost"])})

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Header:
        """Read :meth:`to_json` back, believing nothing.

        Raises:
            ValueError: If the text is too long, no JSON, or no header.
        """
        if len(text) > cls.LONGEST:
            raise ValueError(f"a header has at most {cls.LONGEST} characters, got {len(text)}")
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise ValueError("a header must be one JSON object") from None
        return cls.from_dict(found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a header states each field once")
    return dict(pairs)


def _fields(what: str, found: Any, needed: dict[str, type], optional: dict[str, type] | None = None) -> None:
    words = {int: "a whole number", str: "text", dict: "an object", list: "a list"}
    known = needed | (optional or {})
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be one JSON object")
    if missing := needed.keys() - found.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := found.keys() - known.keys():
        raise ValueError(f"{what} has unknown fields: {', '.join(sorted(unknown))[:80]}")
    for name, value in found.items():
        if type(value) is not known[name]:
            raise ValueError(f"{what} is malformed: {name} must be {words[known[name]]}")


def _unhex(name: str, value: str) -> bytes:
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", value):
        raise ValueError(f"a header's {name} must be hexadecimal digits")
    return bytes.fromhex(value)
