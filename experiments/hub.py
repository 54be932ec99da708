"""`keyveil weights push | pull`: what a method has learned, to and from a Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from safetensors import SafetensorError, safe_open

from experiments.build import configuration, read_yaml
from experiments.model_card import Weights, model_card
from lightning_modules.trained import all_notes, export, read_state
from lightning_modules.weights import WeightsError, card, cards, locate
from lightning_modules.weights.loader import offline, sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push(
    source: str,
    repo: str,
    private: bool = False,
    message: str | None = None,
    note: str = "",
    licence: str | None = None,
    method: str | None = None,
    endpoint: str | None = None,
) -> None:
    """Publish what a method has learned on a Hugging Face Hub, as one safetensors file and a model card.

    A checkpoint is exported first, as by `keyveil weights export`; no pickle is ever uploaded. With the weights go the
    marks of the people they were trained on (hashes of names, by which a comparison refuses to test on them): who has
    a list of names can tell who was among them, so push what private people trained to a private repository only.

    The login is that of `hf auth login`, or HF_TOKEN. The repository is made where there is none; a card that is there
    is written anew.

    Args:
        source: A checkpoint of `keyveil fit`, a safetensors file, or the card's name of weights of our own.
        repo: Where to, OWNER/NAME; the file gets that name.
        private: Make the repository private.
        message: What the commit says; by default the training steps.
        note: How a checkpoint was made: config, data, hardware. Other files have their note in them.
        licence: An identifier such as apache-2.0, or a sentence; by default that of our own card, else "not stated".
        method: The method's YAML file, such as configs/method/sdn.yaml or a run's config.yaml, for the card to show.
        endpoint: Address of another hub; by default HF_ENDPOINT's, or huggingface.co. The login is sent to it.

    Raises:
        OSError: If there are no such weights, or the disk is full.
        ValueError: If the weights are damaged, or an argument does not fit them.
        WeightsError: If there is no login, or the hub cannot be reached or refuses.
    """
    api = _api(endpoint)
    from huggingface_hub import CommitOperationAdd, get_token

    if get_token() is None:
        raise WeightsError("publishing weights needs a login at the hub: `hf auth login`, or HF_TOKEN")
    with tempfile.TemporaryDirectory() as folder:
        weights = _weights(source, note, licence, method, Path(folder))
        with _told(api, repo):
            repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
            if private and not api.model_info(repo).private:
                raise WeightsError(f"{repo} is there already, and public: make it private first, or give another name")
            file = f"{repo.rpartition('/')[2]}.safetensors"
            files = {file: weights.path, "README.md": model_card(repo, file, weights).encode()}
            done = api.create_commit(
                repo,
                [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=message or f"Weights of {weights.notes.get('steps', 'unknown')} training steps",
            )
    print(f"{done.commit_url}\n{file} and its card are in {repo}; to fetch them: keyveil weights pull {repo}")


def pull(
    repo: str,
    revision: str | None = None,
    file: str | None = None,
    out: str | None = None,
    endpoint: str | None = None,
) -> None:
    """Fetch a safetensors file from a Hugging Face Hub, checked against its card and the hub's own hash.

    Pickles are not fetched. Private repositories need `hf auth login`, or HF_TOKEN.

    Args:
        repo: Where from, OWNER/NAME.
        revision: Branch, tag or commit; by default the main branch.
        file: Which file, where the repository has several.
        out: The .safetensors file to write; by default the file's own name, here.
        endpoint: Address of another hub; by default HF_ENDPOINT's, or huggingface.co. Your login is sent to it.

    Raises:
        OSError: If another file is there already, or the disk is full.
        ValueError: If the repository's name or ``out`` is none.
        WeightsError: If the hub cannot be reached, has no such file, or has another one than its card names.
    """
    api = _api(endpoint)
    if out is not None and Path(out).suffix != ".safetensors":
        raise ValueError(f"weights are written to a file named *.safetensors, got {out}")
    with _told(api, repo):
        found = api.model_info(repo, revision=revision, files_metadata=True)
        there = {one.rfilename: one for one in found.siblings or ()}
        name = _one(repo, [path for path in there if Path(path).suffix == ".safetensors"], file)
        target = Path(out or Path(name).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as beside:
            size, free = there[name].size or 0, shutil.disk_usage(beside).free
            if size > free and not target.exists():
                raise OSError(f"No space left for {target}: it takes {size:,} bytes, and {free:,} are free")
            where = {"revision": found.sha, "local_dir": beside}  # the commit: nobody may change it in between
            stated = _stated(api.hf_hub_download(repo, "README.md", **where)) if "README.md" in there else {}
            lfs = there[name].lfs
            digests = {lfs.sha256} if lfs else set()
            digests |= {stated["sha256"]} if stated.get("file") == name and "sha256" in stated else set()
            if len(digests) != 1:
                fault = "states two different sha256" if digests else "states no sha256"
                raise WeightsError(f"{repo} {fault} of {name}, so nobody knows what belongs there; it was not fetched")
            (digest,) = digests
            if not target.exists():
                _check(path := Path(api.hf_hub_download(repo, name, **where)), f"{name} of {repo}", digest)
                os.replace(path, target)
            elif sha256(target) != digest:
                raise FileExistsError(f"{target} is there already, and is another file: give another --out, or move it")
    print(f"{target}\n{name} of {repo} at {found.sha[:12]}: {_summary(all_notes(target))}")


def _weights(source: str, note: str, licence: str | None, method: str | None, folder: Path) -> Weights:
    """The safetensors file of a source, exported into ``folder`` if it is a checkpoint."""
    entry = card(source) if source in cards() else None
    if entry and not any(one.kind == "own" for one in entry.sources):
        raise ValueError(f"{source} was trained by somebody else, whose it is to publish")
    path = locate(source) if entry else Path(source)
    if path.suffix != ".safetensors":
        export(path, folder / "weights.safetensors", note)
        path = folder / "weights.safetensors"
    elif note:
        raise ValueError("--note is for checkpoints: a safetensors file has its own, of `keyveil weights export`")
    read_state(path)  # tells a missing or damaged file in one sentence
    notes, spec = all_notes(path), None
    if method is not None:
        spec = read_yaml(configuration(method), resolve=False).get("model")
        if not isinstance(spec, dict) or "class_path" not in spec:
            raise ValueError(f"{method} has no model: with a class_path, so it is not a method's file")
        if "method" in notes and notes["method"].rpartition(".")[2] != spec["class_path"].rpartition(".")[2]:
            raise ValueError(f"{source} was trained as {notes['method']}, not as {spec['class_path']} of {method}")
    role, terms = (entry.role, entry.licence) if entry else ("", "not stated")
    return Weights(path, notes, licence or terms, spec, role)


def _api(endpoint: str | None) -> HfApi:
    if offline():
        raise WeightsError("KEYVEIL_OFFLINE is set, so no hub is asked; unset it for this")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise WeightsError(
            "weights are pushed and pulled by huggingface_hub, which is missing: pip install 'keyveil[hub]'"
        ) from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=endpoint, library_name="keyveil")


def _one(repo: str, found: list[str], asked: str | None) -> str:
    """The file that is asked for, or the only one."""
    some = ", ".join(map(_plain, found[:5])) + (" …" if len(found) > 5 else "")
    if not found:
        raise WeightsError(f"{repo} has no .safetensors file, and nothing else is fetched: the others may be programs")
    if asked is None and len(found) > 1:
        raise WeightsError(f"{repo} has several files ({some}): name one with --file")
    if asked is not None and asked not in found:
        raise WeightsError(f"{repo} has no weights named {asked}, only {some}")
    name = found[0] if asked is None else asked
    if Path(name).is_absolute() or ".." in re.split(r"[/\\]", name) or not name.isprintable():
        raise WeightsError(f"{repo} gives its file a name that leads elsewhere ({_plain(name)}), and was left alone")
    return name


def _stated(readme: str) -> dict[str, str]:
    """What a card of ours says of its file; empty for any other card."""
    front = re.match(r"\s*---\s*\n(.*?)\n---", Path(readme).read_text("utf-8", "replace"), re.DOTALL)
    try:
        page = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return {}
    found = page.get("keyveil") if isinstance(page, dict) else None
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _check(path: Path, what: str, digest: str) -> None:
    """See that a file is the one that was named, and that it holds tensors."""
    if (found := sha256(path)) != digest:
        raise WeightsError(f"{what} is altered (sha256 expected {_plain(digest)}, found {found}) and was dropped")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{what} is no readable safetensors file ({error}) and was dropped") from error


def _summary(notes: dict[str, str]) -> str:
    """In one line what weights are, as far as their notes say; these may be anybody's."""
    told = [notes.get("method", "").rpartition(".")[2]]
    told += [f"{notes[name]} {unit}" for name, unit in (("steps", "training steps"), ("seconds", "s")) if name in notes]
    told += [notes.get("note", "")]
    return _plain("; ".join(part for part in told if part) or "no notes")


def _plain(text: str) -> str:
    """Somebody else's words without what steers a terminal, and not endless."""
    return "".join(sign if sign.isprintable() else " " for sign in text)[:500]


@contextmanager
def _told(api: HfApi, repo: str) -> Iterator[None]:
    """What the hub answers, or that it does not, as one sentence.

    Raises:
        WeightsError: If it does not do what it is asked for.
    """
    from huggingface_hub import errors

    try:
        yield
    except WeightsError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{api.endpoint} shows no repository {repo}; is it spelled so, and may your login see it (`hf auth login`)?"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no such revision; give a branch, a tag or a commit of it") from error
    except errors.HfHubHTTPError as error:
        said = _plain(error.server_message or " ".join(str(error).split()))
        raise WeightsError(f"{api.endpoint} refuses this for {repo}: {said}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise WeightsError(f"{api.endpoint} cannot be reached ({_plain(str(error.__cause__ or error))})") from error
    except RuntimeError as error:  # an upload that breaks off; the reason lies behind it
        raise WeightsError(f"{repo}: {_plain(str(error.__cause__ or error))}") from error
