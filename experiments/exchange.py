"""The two verbs through files: what one side saves, and what the other makes of the files, the header and a secret."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from datamodules.batch import FaceBatch, face_batch
from datamodules.files import write_tensors, write_whole
from lightning_modules.anonymizer import ReversibleAnonymizer, RoundTrip, resize
from lightning_modules.carriers import decode, encode
from lightning_modules.keys import Cost, Header, KeyRing, Secret, stretch
from lightning_modules.trained import weights_hash

KEPT = "kept"  # folder of what a method keeps of each face beside its picture
NEARBY = "nearby"  # folder of what keys at several distances from the right one open
SUFFIX = {"png": ".png", "half": ".png", "noise1": ".png", "webp80": ".webp"}  # the JPEG qualities: .jpg


def hide_into(
    folder: Path,
    method: ReversibleAnonymizer,
    batches: Iterable[FaceBatch],
    secret: Secret,
    seed: int,
    carrier: str,
    other_keys: int = 1,
    tell: Callable[[int], None] = lambda done: None,
    png: Path | None = None,
    invert: bool = True,
) -> Speed:
    """Anonymize faces into ``folder``: one file a face, and ``header.json``, which is all that recovery gets.

    A method that keeps something of each face beside its picture (:meth:`~ReversibleAnonymizer.kept_beside`) finds it
    again in ``kept/``.

    Faces are also hidden under other keys (``other/``, ``other-2/`` …), for diversity, and inverted (with ``invert``)
    where the method can. Pictures that lie there already are left as they are, so that a run goes on where it was
    stopped. Where the very same pictures lie as PNG in the folder ``png``, they are encoded anew instead of made anew:
    every carrier begins with 8-bit pixels, so that is the same. After each batch ``tell`` hears how many are done.

    Returns:
        Faces anonymized, and the seconds that took over all runs, without keys and files.
    """
    speed = Speed.so_far(folder / "hiding.json")
    salt = hashlib.sha256(f"keyveil comparison salt {seed}".encode()).digest()[:16]
    header = Header(
        method=type(method).__name__,
        weights=weights_hash(method),
        salt=salt,
        nonce=bytes(16),
        cost=Cost(1, 8192, 1),
    )
    keys = _key_ring(header, secret)
    draws: dict[str, Any] = {"anonymized": keys.right}
    if method.key_spec.kind != "none":
        draws |= {leg: partial(keys.other, index=at) for at, leg in enumerate(_legs("other", other_keys))}
    attributes: dict[int, list[float]] = {}
    done = 0
    for batch in batches:
        face = method.fit_size(batch)
        with torch.no_grad():
            for leg, draw in draws.items():
                hide = partial(speed.of, method.anonymize, face, _numbers(method, draw, batch.sample), method.size)
                _fill(folder / leg, batch.sample, carrier, hide, png and png / leg)
                speed.keep(folder / "hiding.json")
            with speed.timed():
                right = _numbers(method, keys.right, batch.sample)
                _keep(folder / KEPT, batch.sample, partial(method.kept_beside, face, right))
            if invert:
                _fill(folder / "inverted", batch.sample, "png", partial(method.invert, face), png and png / "inverted")
        attributes |= dict(zip(batch.sample.tolist(), batch.attributes[:, : method.attributes].tolist(), strict=True))
        tell(done := done + len(batch.image))
    described = {"header": header.to_dict(), "carrier": carrier, "attributes": attributes}
    write_whole(folder / "header.json", json.dumps(described).encode())
    return speed


def recover_from(
    folder: Path,
    method: ReversibleAnonymizer,
    secret: Secret,
    batch_size: int = 8,
    wrong_keys: int = 1,
    sensitivity: bool = False,
) -> Speed:
    """Open the files of ``folder`` with the right key, with random wrong ones, and with as many that are nearly right.

    It is given the folder, the method and the secret, and has no way to the originals. What wrong keys open lies in
    ``wrongly_recovered/``, ``wrongly_recovered-2/`` and so on, what a wrong attribute opens in ``wrong_attribute/``.
    What lies there already is left as it is. With ``sensitivity``, keys at further distances from the right one
    (:meth:`~lightning_modules.keys.KeySpec.nearby`) open into ``nearby/bits-4/`` and so on.

    Returns:
        Faces recovered, and the seconds that took over all runs, without keys and files.
    """
    speed = Speed.so_far(folder / "opening.json")
    described = json.loads((folder / "header.json").read_text())
    keys = _key_ring(Header.from_dict(described["header"]), secret)
    tries = 1 if method.key_spec.kind == "none" else wrong_keys
    files = sorted((folder / "anonymized").glob("[0-9]*"))
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        sample = torch.tensor([int(file.stem) for file in chunk])
        image = torch.stack([resize(decode(file.read_bytes())[None], method.size)[0] for file in chunk])
        attributes = torch.tensor([described["attributes"][str(int(s))] for s in sample])
        face = face_batch(image, attributes=attributes.reshape(len(chunk), -1), w=_kept(folder / KEPT, sample))
        right = _numbers(method, keys.right, sample)
        tried: dict[str, tuple[FaceBatch, Tensor | None]] = {"recovered": (face, right)}
        for index, leg in enumerate(_legs("wrongly_recovered", tries)):
            tried[leg] = (face, _numbers(method, partial(keys.wrong, index=index), sample))
        for index, leg in enumerate(_legs("nearly_recovered", tries)):  # bits from all over the key
            tried[leg] = (face, method.key_spec.one_off(right, index * max(1, method.key_spec.length // tries)))
        if sensitivity:
            nearby = method.key_spec.nearby(right, sample)
            tried |= {f"{NEARBY}/{word}": (face, numbers) for word, numbers in nearby.items()}
        if method.attributes:
            flipped = face.attributes.clone()
            flipped[torch.arange(len(chunk)), sample % method.attributes] *= -1
            tried["wrong_attribute"] = (face._replace(attributes=flipped), right)
        for leg, (given, numbers) in tried.items():
            if numbers is not None:
                with torch.no_grad():
                    _fill(folder / leg, sample, "png", partial(speed.of, method.recover, given, numbers, method.size))
                speed.keep(folder / "opening.json")
    return speed


def keep_if(folder: Path, made_by: str) -> None:
    """Empty a folder of pictures, unless it says that the very same made them."""
    if not is_made_by(folder, made_by):
        if folder.exists():
            shutil.rmtree(folder)
        write_whole(folder / "made-by", made_by)


def is_made_by(folder: Path, made_by: str) -> bool:
    """Whether a folder of pictures says that the very same made them."""
    mark = folder / "made-by"
    return mark.is_file() and mark.read_text() == made_by


@dataclasses.dataclass
class Speed:
    """Faces handled, and the seconds that took."""

    faces: int = 0
    seconds: float = 0.0

    def of(self, verb: Callable[[FaceBatch, Tensor], Tensor], face: FaceBatch, numbers: Tensor, size: int) -> Tensor:
        """Call a verb on a batch and count.

        Raises:
            ValueError: If it hands out anything but pictures of ``size`` pixels; beside one there is room for another.
        """
        with self.timed(len(face.image)):
            image = verb(face, numbers)
        if image.shape != (len(face.image), 3, size, size):
            told = f"expected {len(face.image)} pictures of 3 × {size} × {size}, got {tuple(image.shape)}"
            raise ValueError(f"{told} of {verb.__name__}")
        return image

    @contextmanager
    def timed(self, faces: int = 0) -> Iterator[None]:
        """Count what is done inside, and these faces once it is done."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.faces += faces

    @classmethod
    def so_far(cls, file: Path) -> Speed:
        """What earlier runs kept in a file; nothing where there is none."""
        return cls(**json.loads(file.read_text())) if file.is_file() else cls()

    def keep(self, file: Path) -> None:
        """Keep it for later runs."""
        write_whole(file, json.dumps(dataclasses.asdict(self)))


def _legs(name: str, count: int) -> list[str]:
    """Folders of the pictures of several keys."""
    return [name, *(f"{name}-{index}" for index in range(2, count + 1))]


def comparison_secret(seed: int) -> Secret:
    """The secret of a comparison: no secret at all, so that anybody can repeat it."""
    return Secret(f"keyveil comparison {seed}")


def _key_ring(header: Header, secret: Secret) -> KeyRing:
    wrong = Secret("not the secret of this comparison")
    return KeyRing(stretch(secret, header.salt, header.cost), stretch(wrong, header.salt, header.cost))


def _numbers(method: ReversibleAnonymizer, draw: Any, sample: Tensor) -> Tensor:
    return torch.stack([method.key_spec.numbers(draw(int(s))) for s in sample])


def _fill(
    folder: Path, sample: Tensor, carrier: str, make: Callable[[], Tensor | None], png: Path | None = None
) -> None:
    """Save the pictures that lie in ``png``, or else that ``make`` hands out, unless an earlier run did."""
    names = [f"{int(number):06d}" for number in sample]
    files = [folder / f"{name}{SUFFIX.get(carrier, '.jpg')}" for name in names]
    if all(file.is_file() for file in files):
        return
    known = [] if png is None else [file for name in names if (file := png / f"{name}.png").is_file()]
    made = torch.stack([decode(file.read_bytes()) for file in known]) if len(known) == len(files) else make()
    for image, file in zip(() if made is None else made, files, strict=made is not None):
        write_whole(file, encode(image, carrier))


def _keep(folder: Path, sample: Tensor, keep: Callable[[], Tensor | None]) -> None:
    """Save what a method keeps, a file of one tensor a face, unless an earlier run did.

    Raises:
        ValueError: If it is not a row a face.
    """
    files = [folder / f"{int(number):06d}.safetensors" for number in sample]
    if all(file.is_file() for file in files) or (rows := keep()) is None:
        return
    if rows.ndim < 2 or len(rows) != len(files):
        raise ValueError(f"expected a row for each of {len(files)} faces, got {tuple(rows.shape)} of kept")
    for row, file in zip(rows, files, strict=True):
        write_tensors(file, {KEPT: row})


def _kept(folder: Path, sample: Tensor) -> Tensor | None:
    """What was kept of faces; ``None`` where nothing was."""
    if not folder.is_dir():
        return None
    return torch.stack([load_file(folder / f"{int(number):06d}.safetensors")[KEPT] for number in sample])


def kept_bytes(folder: Path) -> int:
    """How many bytes a face are kept beside the pictures of ``folder``."""
    first = next((folder / KEPT).glob("*.safetensors"), None)
    return 0 if first is None else load_file(first)[KEPT].nbytes


def _saved(stem: Path) -> Path | None:
    """The picture of this name, whatever its format; a pattern would go through the whole folder."""
    return next((file for end in (".png", ".jpg", ".webp") if (file := stem.with_suffix(end)).is_file()), None)


def read_trip(folder: Path, batch: FaceBatch, size: int) -> RoundTrip:
    """The legs of a batch's faces as they lie in ``folder``, at ``size`` pixels; empty where there is none."""

    def further(name: str) -> Tensor:
        legs = _legs(name, len(list(folder.glob(f"{name}*"))))[1:]
        if not legs:
            return batch.image.new_zeros((len(batch.image), 0))
        return torch.stack([_leg(folder / name, batch, size) for name in legs], 1)

    made = ("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered", "wrong_attribute", "inverted")
    return _trip(
        batch,
        size,
        other_again=further("other"),
        wrong_again=further("wrongly_recovered"),
        near_again=further("nearly_recovered"),
        **{name: _leg(folder / name, batch, size) for name in made},
    )


def nearby_trips(folder: Path, batch: FaceBatch, size: int) -> dict[str, RoundTrip]:
    """Key of the protocol → what it opened, as ``nearly_recovered`` of a round trip that has no other leg."""
    legs = sorted((folder / NEARBY).glob("*"))
    return {leg.name: _trip(batch, size, nearly_recovered=_leg(leg, batch, size)) for leg in legs}


def _leg(folder: Path, batch: FaceBatch, size: int) -> Tensor:
    files = [_saved(folder / f"{int(s):06d}") for s in batch.sample]
    if any(file is None for file in files):
        return batch.image.new_zeros((len(files), 0))
    return torch.cat([resize(decode(file.read_bytes())[None], size) for file in files])


def _trip(batch: FaceBatch, size: int, **legs: Tensor) -> RoundTrip:
    face = {"identity": batch.identity, "sample": batch.sample, "mask": batch.mask}
    return RoundTrip.of(resize(batch.image, size), **face, **legs)
