"""Who trains, who validates and who tests: by person, the same on every machine and in every release."""

from __future__ import annotations

from hashlib import sha256
from typing import Literal, get_args

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(person: str) -> Split:
    r"""Split of a person: :math:`\mathrm{sha256}(\mathrm{name}) \bmod 10`, 0-7 train, 8 val, 9 test.

    The name alone decides, so a person is in one split whatever data set, order or selection it comes from.

    Args:
        person: Name as the data set spells it.

    Example:
        >>> split_of("Aaron_Eckhart"), split_of("George_W_Bush")
        ('train', 'test')
    """
    ten = int(sha256(person.encode()).hexdigest(), 16) % 10
    return "train" if ten < 8 else "val" if ten == 8 else "test"
