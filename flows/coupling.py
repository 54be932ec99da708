"""The keyed coupling flow: affine coupling blocks that read the key. The only file that knows FrEIA."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from jaxtyping import Float
from torch import Tensor, nn

from flows.precision import full_precision


class KeyedCoupling(nn.Module):
    r"""Invertible map of identity codes, one bijection per key.

    Stacks affine coupling blocks (Dinh et al., "Density estimation using Real NVP", 2017) conditioned on the
    key :math:`k`. A block splits its input into a passive half :math:`x_1` and an active half :math:`x_2`,

    .. math::
        y = P \, \big(c \odot [x_1 ; \; x_2 \odot \exp(2 \tanh s(x_1, k)) + t(x_1, k)] + d\big)

    with a learned scale :math:`c > 0`, offset :math:`d` and a fixed permutation :math:`P`, so that
    :math:`z_a = f_k(z)` has the exact inverse :math:`z = f_k^{-1}(z_a)` and a triangular Jacobian.

    Known from the released inference code of iFADIT (Yuan et al., 2025, arXiv 2501.04390): four FrEIA
    ``AllInOneBlock`` on 512 numbers, a condition of 512, and the subnet
    Linear 768→256→128→128→256→512 with LeakyReLU between. Ours: hard permutations drawn from ``seed`` (they
    stand in the ``state_dict``, frozen; keep them out of any moving average), LeakyReLU's slope left at
    0.01, and the same proportions at other sizes.

    At initialisation the key does next to nothing (two keys differ by a cosine of 0.001): only training
    terms that push keys apart make it matter.

    Args:
        dim: Length of an identity code.
        key_dim: Length of a key.
        blocks: Number of coupling blocks.
        hidden: Widths of the subnets' hidden layers; ``None`` is ``dim`` × (1/2, 1/4, 1/4, 1/2), at least 8,
            which is the published 256, 128, 128, 256 at ``dim=512``.
        seed: Seed of the permutations, and of nothing else.
        gin: Whether the blocks keep volumes (GIN, Sorrenson et al., 2020, "Disentanglement by Nonlinear ICA
            with General Incompressible-flow Networks"): the mean of :math:`2 \tanh s` over the active half is
            subtracted and :math:`c = 1`, so that ``log_det`` is 0.

    Example:
        >>> flow = KeyedCoupling(dim=8, key_dim=4, blocks=2)
        >>> z, key = torch.randn(3, 8), torch.randn(3, 4)
        >>> torch.allclose(flow.inverse(flow(z, key)[0], key)[0], z, atol=1e-5)
        True
    """

    key_kind: ClassVar[str] = "normal"

    def __init__(
        self,
        dim: int = 512,
        key_dim: int = 512,
        blocks: int = 4,
        hidden: Sequence[int] | None = None,
        seed: int = 0,
        gin: bool = False,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"a coupling flow splits its code in two, so dim must be at least 2, got {dim}")
        self.dim, self.key_length = dim, key_dim
        widths = [max(dim // part, 8) for part in (2, 4, 4, 2)] if hidden is None else list(hidden)

        def subnet(length_in: int, length_out: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in pairwise([length_in, *widths, length_out]):
                layers += [nn.Linear(a, b), nn.LeakyReLU()]
            return nn.Sequential(*layers[:-1])

        self.flow = SequenceINN(dim)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(blocks):
            self.flow.append(AllInOneBlock, cond=0, cond_shape=(key_dim,), subnet_constructor=subnet, gin_block=gin)
            # FrEIA draws from numpy's global state; replaced so that the same seed is the same architecture.
            permutation = torch.eye(dim)[torch.randperm(dim, generator=generator)]
            self.flow[-1].w_perm.data.copy_(permutation)
            self.flow[-1].w_perm_inv.data.copy_(permutation.T)
            # FrEIA 0.2's GIN never reads it, and a parameter without a gradient stops a run on several GPUs.
            self.flow[-1].global_scale.requires_grad_(not gin)

    def forward(
        self, z: Float[Tensor, "batch dim"], key: Float[Tensor, "batch key_dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Hide codes under ``key``; also return ``log |det J|``."""
        return self._run(z, key, rev=False)

    def inverse(
        self, z_a: Float[Tensor, "batch dim"], key: Float[Tensor, "batch key_dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Open codes hidden under ``key``; also return ``log |det J|`` of the inverse."""
        return self._run(z_a, key, rev=True)

    def _run(self, z: Tensor, key: Tensor, *, rev: bool) -> tuple[Tensor, Tensor]:
        dtype = self.flow[0].global_scale.dtype
        if dtype.itemsize < 4:
            raise ValueError(
                f"the coupling flow cannot be inverted in {dtype}: keep its weights in float32 "
                "(a mixed precision, such as bf16-mixed, does; bf16-true does not)"
            )
        with full_precision(z.device):
            return self.flow(z.to(dtype), c=[key.to(dtype)], rev=rev)
