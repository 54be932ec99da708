"""The verbs for pictures: anonymize and recover files and folders, look at a record, verify what was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from datamodules.alignment import warp
from datamodules.batch import FaceBatch
from datamodules.detection import Detector, default_detector
from datamodules.photo_files import read_photo, sidecar
from datamodules.photo_search import CLIPS, SIDECAR, Found, find_photos
from datamodules.photos import Photos, look_for_places
from experiments.anonymizing import Anonymizing, Hiding
from experiments.clips import anonymize_clip, recover_clip
from experiments.photo_folder import OutputFolder
from experiments.photo_jobs import PhotoJob, parse_record, read_record
from experiments.photo_methods import Running, load_photo_method, method_of
from experiments.recovering import Recovering
from lightning_modules import manifest as manifests
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.callbacks.paste_back import Gate, PasteBack
from lightning_modules.keys import Record, Secret, read_secret
from lightning_modules.photo_step import PhotoStep, predict_photos
from lightning_modules.trained import weights_hash


def anonymize(
    paths: Sequence[str] = (),
    out: str = "",
    method: str = "ifadit",
    weights: str | None = None,
    secret_file: str | None = None,
    mode: Literal["verify", "decoy"] = "verify",
    seal: Literal["none", "code", "original"] = "none",
    header: Literal["picture", "sidecar", "both"] = "picture",
    faces: Literal["all", "largest", "except"] = "all",
    except_for: str | None = None,
    on_no_face: Literal["fail", "skip", "copy"] = "fail",
    keep_metadata: bool = False,
    lossless: bool = False,
    refine: int | None = None,
    batch_size: int = 2,
    workers: int = 2,
    accelerator: str = "auto",
    devices: int | str = 1,
    trainer: str | None = None,
) -> int:
    """Anonymize pictures: `keyveil anonymize holiday/ --out safe/`. The secret is asked for, or KEYVEIL_SECRET.

    Folders are searched through and mirrored; a .tar is a folder of pictures too, whose faces are read where they lie.
    Each face is replaced, checked against its original by a recogniser, and a picture in which one is still known is
    not written. A second run goes on where the first was stopped; in decoy mode it cannot tell whether the secret is
    still the same, so pictures that are done stay as they are.

    Args:
        paths: Pictures, folders, and shards (.tar, not compressed), as plain words.
        out: Folder to write to.
        method: ifadit, sdn, blur, pixelate, blackbox, or a YAML file of configs/method.
        weights: What the method has learned: a checkpoint, safetensors or a card; by default the card of its name.
        secret_file: A file that holds the secret.
        mode: verify: a wrong secret is refused. decoy: it gives yet another face, and nothing tells guesses apart.
        seal: original: the pixels that were replaced, encrypted, so that they come back bit for bit. code: the method's
            own code of each face, encrypted, so that it comes back as well as the method can.
        header: Where the record goes that recovery needs: into the picture, beside it (NAME.keyveil), or both.
        faces: Which faces of a picture. except: all but those of the people of --except_for.
        except_for: A picture of somebody who stays as they are, or a folder of such pictures, one a person or more. One
            stranger in a thousand is taken for each of them: look at what was written.
        on_no_face: What becomes of a picture without a face: an error, nothing, or a copy without metadata.
        keep_metadata: Keep date, camera, exposure and copyright; by default nothing is kept but the colour profile.
        lossless: Write clips without any loss (FFV1 in Matroska, many times as large); by default H.264, hardly lossy.
        refine: Steps of optimisation a face, for ifadit.
        batch_size: Faces at once: more for a GPU; on a CPU they take memory alone.
        workers: Pictures read ahead, each in a thread of its own.
        accelerator: Lightning's.
        devices: Lightning's.
        trainer: A YAML of configs/trainer that names accelerator, devices, nodes and strategy in their place.

    Returns:
        0, or 1 if a picture could not be done.

    Raises:
        ValueError: Two options do not go together, or there is no secret.
        OSError: A path is not there, or the output folder cannot be written.
    """
    if (faces == "except") != bool(except_for):
        raise ValueError("--faces except and --except_for go together: whose faces stay as they are?")
    found, folder = _places(paths, out, shards=True)
    running = Running(batch_size, accelerator, devices, lossless, workers).on(trainer)
    network, name = load_photo_method(method, weights, refine, running.accelerator)
    steps = getattr(network, "refine", None)
    hiding = Hiding(
        name, weights_hash(network), network.size, mode, seal, header, faces, on_no_face, keep_metadata, steps
    )
    check_options(network, hiding)
    secret = read_secret(secret_file, confirm=True) if needs_secret(network, hiding) else None
    return anonymize_files(found, folder, network, hiding, secret, running, except_for)


def check_options(network: ReversibleAnonymizer, hiding: Hiding) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: A seal in decoy mode, or of codes that a method does not have.
    """
    if hiding.seal != "none" and hiding.mode == "decoy":
        raise ValueError("--seal needs --mode verify: what a secret opens would tell guesses of it apart")
    if hiding.seal == "code" and type(network).code_of is ReversibleAnonymizer.code_of:
        raise ValueError(
            f"{hiding.method} has no code of a face that could be sealed; seal the pixels by --seal original"
        )


def needs_secret(network: ReversibleAnonymizer, hiding: Hiding) -> bool:
    """Whether anything is keyed: the method, or a seal."""
    return network.key_spec.kind != "none" or hiding.seal != "none"


def anonymize_files(
    found: list[Found],
    folder: Path,
    network: ReversibleAnonymizer,
    hiding: Hiding,
    secret: Secret | None,
    running: Running,
    except_for: str | None = None,
) -> int:
    """As :func:`anonymize`, with a method and a secret at hand.

    Args:
        found: The pictures.
        folder: Where to write.
        network: The method, in evaluation mode.
        hiding: How; :func:`check_options` has passed it.
        secret: What a person holds, where :func:`needs_secret` asks for it.
        running: On what.
        except_for: As :func:`anonymize`.

    Returns:
        As :func:`anonymize`.

    Raises:
        ValueError: As :func:`anonymize`.
        OSError: As :func:`anonymize`.
    """
    pictures, clips = _parted(found, running)
    gate, detector = Gate(), default_detector()
    spared, digests = _spared(except_for, detector, network.size) if except_for else ([], ())
    hiding = replace(hiding, spared=digests)
    with OutputFolder(folder) as manifest, running.bar or _progress(len(found), "anonymizing") as bar:
        known = partial(gate.knows, spared) if spared else None
        codes, count = partial(_codes, network), network.attributes
        job = Anonymizing(folder, manifest, bar, hiding, secret, detector, gate.threshold, codes, known, count)
        step = PhotoStep(network, "anonymize", job.key_of)
        for clip in clips:
            anonymize_clip(clip, job, network.to(running.device), running, gate)
        return _predict(job, pictures, step, PasteBack(gate, detector), running, hiding.keep_metadata)


def recover(
    paths: Sequence[str] = (),
    out: str = "",
    method: str | None = None,
    weights: str | None = None,
    secret_file: str | None = None,
    keep_metadata: bool = True,
    lossless: bool = False,
    refine: int | None = None,
    batch_size: int = 2,
    workers: int = 2,
    accelerator: str = "auto",
    devices: int | str = 1,
    trainer: str | None = None,
) -> int:
    """Recover anonymized pictures: `keyveil recover safe/ --out back/`. The pictures and the secret are all it takes.

    Args:
        paths: Anonymized pictures and folders of them, as plain words; records beside them (NAME.keyveil) are found.
        out: Folder to write to.
        method: The method that made them, where it was a YAML file.
        weights: What it has learned, where they were named when anonymizing.
        secret_file: A file that holds the secret.
        keep_metadata: Keep what the anonymized pictures say of date, camera, exposure and copyright.
        lossless: Write clips without any loss (FFV1 in Matroska, many times as large); by default H.264, hardly lossy.
        refine: Steps of optimisation a face, for ifadit.
        batch_size: Faces at once: more for a GPU; on a CPU they take memory alone.
        workers: Pictures read ahead, each in a thread of its own.
        accelerator: Lightning's.
        devices: Lightning's.
        trainer: A YAML of configs/trainer that names accelerator, devices, nodes and strategy in their place.

    Returns:
        0, or 1 if a picture could not be done.

    Raises:
        ValueError: As :func:`anonymize`.
        OSError: As :func:`anonymize`.
    """
    found, folder = _places(paths, out)
    chosen = method or method_of(found)
    running = Running(batch_size, accelerator, devices, lossless, workers).on(trainer)
    loaded = None if chosen is None else load_photo_method(chosen, weights, refine, running.accelerator)
    network, name = loaded or (None, "none")
    secret = read_secret(secret_file)
    return recover_files(found, folder, network, name, secret, running, keep_metadata)


def recover_files(
    found: list[Found],
    folder: Path,
    network: ReversibleAnonymizer | None,
    name: str,
    secret: Secret,
    running: Running,
    keep_metadata: bool = True,
) -> int:
    """As :func:`recover`, with a method and a secret at hand.

    Args:
        found: The pictures.
        folder: Where to write.
        network: The method that made them; ``None`` where all are sealed.
        name: What their records call it.
        secret: What a person holds.
        running: On what.
        keep_metadata: As :func:`recover`.

    Returns:
        As :func:`recover`.

    Raises:
        ValueError: As :func:`recover`.
        OSError: As :func:`recover`.
    """
    pictures, clips = _parted(found, running)
    with OutputFolder(folder) as manifest, running.bar or _progress(len(found), "recovering") as bar:
        job = Recovering(folder, manifest, bar, network, name, secret, keep_metadata)
        step = None if network is None else PhotoStep(network, "recover", job.key_of, job.code_of)
        for clip in clips:
            recover_clip(clip, job, network and network.to(running.device), running)
        return _predict(job, pictures, step, PasteBack(), running, keep_metadata)


def inspect(path: str) -> int:
    """Print what an anonymized picture says of itself: method, mode, faces, seals. No secret is needed.

    Args:
        path: The picture, or the record beside it (NAME.keyveil).
    """
    file = Path(path)
    record = _record_at(file)
    told = {
        "method": record.header.method,
        "weights": record.header.weights,
        "mode": "decoy" if record.header.decoy else "verify",
        "size": [record.width, record.height],
    }
    if any(face.frame is not None for face in record.faces):
        people: dict[bytes, list[int]] = {}
        for face in record.faces:
            people.setdefault(face.nonce, []).append(face.frame or 0)
        told["people"] = [{"first_frame": min(seen), "last_frame": max(seen)} for seen in people.values()]
    else:
        told["faces"] = [
            {"box": [round(side) for side in face.box], "sealed_bytes": face.sealed} for face in record.faces
        ]
    print(json.dumps(told, indent=2))
    return 0


def _record_at(file: Path) -> Record:
    if file.suffix == SIDECAR:
        return Record.from_json(file.read_bytes())
    return parse_record(None, sidecar(file)) if file.suffix.lower() in CLIPS else read_record(_read(file))


def verify(folder: str, signer: str | None = None) -> int:
    """Check an output folder against its manifest: every file's hash, every line's signature. No secret is needed.

    Args:
        folder: Output folder of `keyveil anonymize` or `keyveil recover`.
        signer: Public key that is trusted, in hexadecimal; by default your own.

    Returns:
        0, or 1 if something is altered or missing.

    Raises:
        ValueError: The manifest itself was altered, or another key signed it.
        OSError: There is no manifest.
    """
    trusted = signer or manifests.signer(manifests.signing_key())
    wrong = manifests.check_folder(Path(folder), trusted)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not wrong:
        print(f"{folder} is as it was written, signed by {trusted}")
    return int(bool(wrong))


def _parted(found: list[Found], running: Running) -> tuple[list[Found], list[Found]]:
    """Pictures, and clips.

    Raises:
        ValueError: There are clips, and more than one device.
    """
    clips = [one for one in found if one.path.suffix.lower() in CLIPS]
    if clips and (str(running.devices), running.num_nodes) != ("1", 1):
        raise ValueError("clips are done on one device: leave --devices at 1, or take the clips out")
    return [one for one in found if one not in clips], clips


def _places(paths: Sequence[str], out: str, shards: bool = False) -> tuple[list[Found], Path]:
    if not out:
        raise ValueError("name the folder to write to by --out")
    if not paths:
        raise ValueError("name the pictures or folders to be done")
    found, others = find_photos(paths, out, shards)
    if others:
        print(f"{others} other files are no pictures and are left out", file=sys.stderr)
    return found, Path(out)


def _read(path: Path) -> Any:
    try:
        return read_photo(Found(path, path.name))
    except OSError as error:
        raise OSError(f"{path}: {error}") from error


def _spared(path: str, detector: Detector, size: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Crops of the people who stay as they are, and the hashes of their pictures.

    Raises:
        OSError: There is no such picture, or it cannot be read.
        ValueError: A picture has no face.
    """
    crops, digests = [], []
    for one in find_photos([path], Path(path, "-"))[0]:
        photo = _read(one.path)
        places, _ = look_for_places(photo.pixels, detector, size, "largest")
        if not places:
            raise ValueError(f"no face was found in {one.path}, whose face is to stay")
        crops.append(warp(photo.pixels, places[0].matrix, size))
        digests.append(photo.digest)
    return crops, tuple(digests)


@torch.no_grad()
def _codes(network: ReversibleAnonymizer, face: FaceBatch) -> torch.Tensor | None:
    """A method's codes of faces, on its device."""
    return network.code_of(network.fit_size(FaceBatch(*(value.to(network.device) for value in face))))


def _progress(total: int, verb: str) -> Progress:
    bar = Progress(console=Console(stderr=True))
    bar.add_task(verb, total=total)
    return bar


def _predict(
    job: PhotoJob,
    found: list[Found],
    step: PhotoStep | None,
    paste: PasteBack,
    running: Running,
    keep_metadata: bool,
) -> int:
    """One pass over the pictures under Lightning, the manifest's last line, and 1 if a picture could not be done.

    Without a method, none of the pictures has a face for a network.
    """
    photos = Photos(found, job, step.method.size if step else 1, running.batch_size, keep_metadata, running.workers)
    job.photos = photos
    if step is None:
        for _ in photos.predict_dataloader():
            raise AssertionError("a face without a method")
        job.close()
        return int(job.failures > 0)
    predict_photos(step, photos, paste, running.trainer)
    job.close()
    return int(paste.failures > 0)
