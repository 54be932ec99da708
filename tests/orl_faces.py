"""Aligned real faces for tests: people of the ORL set, which come with a weight card."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from datamodules.datasets import ORL
from datamodules.detection import default_detector
from lightning_modules.weights import find


def need(*names):
    """Skip a test whose files are not on this machine; tests download nothing."""
    if missing := [name for name in names if find(name) is None]:
        pytest.skip(f"weights missing: run `keyveil weights fetch {' '.join(missing)}`")


@cache
def orl_faces(people=4, each=2, size=256):
    """Faces ``(people, each, 3, size, size)``, RGB in [-1, 1]."""
    need("orl", "centerface")
    source, detector = ORL(), default_detector()
    by_person = {}
    for picture in source.pictures:
        by_person.setdefault(picture.person, []).append(picture)
    crops = [
        source.face(picture, size, detector).image
        for person in sorted(by_person)[:people]
        for picture in by_person[person][:each]
    ]
    pixels = torch.stack([torch.tensor(crop) for crop in crops]).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).reshape(people, each, 3, size, size)
