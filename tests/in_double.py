"""`keyveil` in double precision, islands of single precision included: what differs then does so by no rounding."""

import sys
import tempfile
from pathlib import Path

import torch

import datamodules.cache
import datamodules.latent
from experiments.cli import main

made = datamodules.cache.face_batch
datamodules.cache.face_batch = lambda image, **known: made(image.double(), **known)
datamodules.latent.cache_folder = lambda: Path(tempfile.mkdtemp())  # codes of this precision are nobody else's
torch.Tensor.float = torch.Tensor.double

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
