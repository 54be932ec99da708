"""`keyveil` in double precision, islands of single precision included: what differs then does so by no rounding."""

import sys

import torch

from experiments.cli import main

torch.Tensor.float = torch.Tensor.double

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
