"""`keyveil weights convert`: a StyleGAN2 checkpoint of the user's → the file that our adapter reads."""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_modules.networks.stylegan.convert import convert_state
from lightning_modules.networks.stylegan.stylegan2 import StyleGAN2


def convert(source: str | Path, out: str | Path | None = None) -> StyleGAN2:
    """Convert a generator, try it once, and only then put it in place.

    Read are rosinality-style ``.pt`` files and the plain ``state_dict`` of NVlabs' ``G_ema`` as ``.pt`` or
    ``.safetensors``; nothing in them is executed. NVlabs' ``.pkl`` files are programs and are refused.
    Export one on a machine you trust with it, inside a clone of its own repository::

        import legacy, torch
        generator = legacy.load_network_pkl(open("ffhq.pkl", "rb"))["G_ema"]
        torch.save(generator.state_dict(), "ffhq.pt")

    Args:
        source: The checkpoint.
        out: The file to write, ``*.safetensors``, whole or not at all; ``None`` writes beside the source.

    Returns:
        The converted generator.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is not one that can be converted safely.
    """
    source = Path(source)
    out = source.with_suffix(".safetensors") if out is None else Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"the converted file must be named *.safetensors, got {out.name}")
    if out == source:
        raise ValueError(f"{source.name} would be overwritten by its conversion: give another --out")
    tensors = {name: value.clone().contiguous() for name, value in convert_state(_read(source)).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.stem}-", suffix=".safetensors")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"layout": "keyveil-stylegan2", "source": source.name})
        generator = _tried(Path(temporary), source)
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)
    print(f"wrote {out}: StyleGAN2, {generator.native_size} px, {generator.num_layers} style rows")
    return generator


def _read(source: Path) -> dict[str, object]:
    if not source.is_file():
        raise FileNotFoundError(f"there is no checkpoint {source}")
    if source.suffix in {".pkl", ".pickle"}:
        raise ValueError(
            f"{source.name} is a pickle, and opening a pickle runs whatever program is inside: on a machine "
            "you trust with it, in a clone of stylegan2-ada-pytorch, run `import legacy, torch; "
            f"generator = legacy.load_network_pkl(open('{source.name}', 'rb'))['G_ema']; "
            f"torch.save(generator.state_dict(), '{source.stem}.pt')`, and convert that file"
        )
    try:
        if source.suffix == ".safetensors":
            return dict(load_file(source))
        # rosinality's training script stores its command line beside the weights: attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{source.name} holds more than weights or is damaged, and was not opened: "
            "save the generator's state_dict() alone"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{source.name} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def _tried(path: Path, source: Path) -> StyleGAN2:
    try:
        generator = StyleGAN2(path)
        with torch.no_grad():
            image = generator(generator.mean_w.expand(1, generator.num_layers, -1))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{source.name} lacks layers or has some of the wrong shape: {error}") from error
    if not image.isfinite().all():
        raise ValueError(f"{source.name} gives a mean face that is not finite: its weights are damaged")
    return generator
