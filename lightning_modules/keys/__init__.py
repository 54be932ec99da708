"""Keys: from the secret a person holds to the numbers a method wants, and the header beside a face."""

from lightning_modules.keys.header import Header
from lightning_modules.keys.material import Cost, Key, MasterKey, fresh, orthogonalize, stretch
from lightning_modules.keys.record import FaceRecord, Record, seal, unseal
from lightning_modules.keys.secret import Secret, read_secret
from lightning_modules.keys.spec import KeyRing, KeySpec

__all__ = [
    "Cost",
    "FaceRecord",
    "Header",
    "Key",
    "KeyRing",
    "KeySpec",
    "MasterKey",
    "Record",
    "Secret",
    "fresh",
    "orthogonalize",
    "read_secret",
    "seal",
    "stretch",
    "unseal",
]
