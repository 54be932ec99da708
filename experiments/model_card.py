"""The model card of published weights: what they are, how they came about, how to use them, what they are not for."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_modules.weights.loader import sha256


class Weights(NamedTuple):
    """A file to publish, and what is known of it.

    Attributes:
        path: The safetensors file.
        notes: Its notes.
        licence: Its licence.
        method: ``model:`` of the method's YAML file; ``None`` where it is not known.
        role: What it is, where it has a card of ours.
    """

    path: Path
    notes: dict[str, str]
    licence: str
    method: dict[str, Any] | None
    role: str


def model_card(repo: str, file: str, weights: Weights) -> str:
    """The README.md of a repository: what lies there, how it came about, how to use it, and what it is not for.

    Args:
        repo: OWNER/NAME.
        file: The safetensors file's name there.
        weights: What is known of it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    notes, digest, licence = weights.notes, sha256(weights.path), weights.licence
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*", licence)
    data = ModelCardData(
        license=licence.lower() if named else "other",
        license_name=None if named else re.sub(r"[^a-z0-9.]+", "-", licence.lower().partition(";")[0]).strip("-"),
        library_name="keyveil",
        pipeline_tag="image-to-image",
        tags=["keyveil", "face-anonymization", "privacy", "reversible"],
        keyveil={"file": file, "sha256": digest},  # what `keyveil weights pull` compares
    )
    made = (weights.method or {}).get("class_path") or notes.get("method")
    table = {
        "method": ": ".join(part for part in (made and f"`{made}`", weights.role) if part) or "not noted",
        "training steps, of the last stage": notes.get("steps", "not noted"),
        "seconds of training, of the last stage": notes.get("seconds", "not noted"),
        "how it was made": notes.get("note") or "not noted",
        "file": f"`{file}`, {weights.path.stat().st_size:,} bytes: what was learned, and these notes",
        "sha256": f"`{digest}`",
        "licence": licence,
    }
    shown = yaml.safe_dump({"model": _shown(weights.method)}, sort_keys=False)
    text = _CARD.format(
        name=repo.rpartition("/")[2],
        table="\n".join(f"| {what} | {_cell(value)} |" for what, value in table.items()),
        repo=repo,
        file=file,
        method=_METHOD.format(shown) if weights.method else _NO_METHOD,
        networks=_networks(notes),
        people=_people(notes),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


_CARD = """\
# {name}

Trained weights for keyveil, a Python package for reversible, keyed face anonymization: a face and a secret give the
picture of another person, that picture and the secret give the face back, and another secret yet another person.

| | |
|---|---|
{table}

## Use

```bash
pip install "keyveil[hub]"
keyveil weights pull {repo}
keyveil anonymize holiday/ --out safe/ --method method.yaml --weights {file}
keyveil recover safe/ --out back/ --method method.yaml --weights {file}
```

The verbs that take `--weights FILE`, a comparison's `weights:` and a training's `start:` take it too.
{method}
## Frozen networks

{networks}

## Who trained it

{people}

## Limits

- Whoever has the secret brings a face back, and whoever attacks without it may still learn something of the face:
  pictures made with these weights remain personal data.
- No figure of how well they hide and recover stands here. It depends on faces, picture size and file format: measure
  yours with `keyveil compare` and `keyveil attack` before anybody relies on it.
- Faces unlike those that trained it, in age, gender, skin, pose or glasses, may be hidden and recovered less well.
- Data sets and frozen networks have terms of their own, which may forbid some uses, commercial ones above all.
- Not meant for passing a made-up face off as somebody's, nor for finding out who a person is.
"""
_METHOD = "`method.yaml` is:\n\n```yaml\n{}```\n"
_NO_METHOD = "`method.yaml` is that of its training, as those of `configs/method` are; it is not noted here.\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _shown(value: Any) -> Any:
    """A method's arguments without the folders of one machine, and without what training began from."""
    if isinstance(value, dict):
        return {key: _shown(one) for key, one in value.items() if key not in ("start", "disentangled")}
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value


def _networks(notes: dict[str, str]) -> str:
    """The frozen networks that weights were trained against."""
    if "cards" not in notes:
        return "Not noted."
    found = json.loads(notes["cards"])
    if not found:
        return "None: it needs no network but its own."
    lines = [f"| {name} | `{digest}` |" for name, digest in sorted(found.items())]
    told = "Not in the file; keyveil fetches them by card, and refuses these weights beside others."
    return "\n".join([told, "", "| card | hash |", "|---|---|", *lines])


def _people(notes: dict[str, str]) -> str:
    """How many people of which data set trained weights, and what the file tells of them."""
    if "people" not in notes:
        return "Not noted, so a comparison cannot tell whether it tests on people who trained it."
    count = Counter(mark.partition(":")[0] for mark in json.loads(notes["people"]))
    if not count:
        return "Nobody whose name is known to a data set."
    told = ", ".join(f"{number:,} of {name}" for name, number in sorted(count.items()))
    return (
        f"People: {told}. The file holds a mark of each, a hash of the name in its data set, by which a comparison "
        "refuses to test it on them. Whoever has a list of names can tell who of them is among these."
    )
