"""The keyed flow of unit codes: volume-preserving blocks, renormalised, so that no key can inflate a code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from flows.coupling import KeyedCoupling


class KeyedSphere(nn.Module):
    r"""Keyed map of unit codes to unit codes, undone up to an error that it reports (ours).

    An affine flow buys its sensitivity to the key by inflating :math:`\|z_a\|`, but a face that is rendered
    and encoded again carries a direction, not a length, so the inverse misses what it needs. Here the blocks
    keep volumes (GIN, Sorrenson et al., 2020) and the length is dropped in training already:

    .. math::
        z_a = \frac{g_k(z / \|z\|)}{\|g_k(z / \|z\|)\|}, \qquad
        \hat z = \frac{g_k^{-1}(z_a / \|z_a\|)}{\|g_k^{-1}(z_a / \|z_a\|)\|}.

    :math:`g_k` is exactly invertible, but :math:`\hat z = z` only where :math:`\|g_k(z)\| = 1`:
    :meth:`norm_penalty` draws lengths to 1 in training, :meth:`roundtrip_error` tells what is left.

    ``log_det`` is that of :math:`g_k`, zero up to rounding: renormalising has none as a map of the space.

    Args:
        dim: Length of an identity code.
        key_dim: Length of a key.
        blocks: Number of coupling blocks.
        hidden: Widths of the subnets' hidden layers, as in :class:`~flows.coupling.KeyedCoupling`.
        seed: Seed of the permutations, which stand in the ``state_dict``.

    Example:
        >>> flow = KeyedSphere(dim=8, key_dim=4, blocks=2)
        >>> z, key = torch.randn(3, 8), torch.randn(3, 4)
        >>> torch.allclose(flow(z, key)[0].norm(dim=1), torch.ones(3))
        True
        >>> flow.roundtrip_error(z, key).max() < 0.5  # untrained; training adds flow.norm_penalty(z, key)
        tensor(True)
    """

    key_kind: ClassVar[str] = "normal"

    def __init__(
        self,
        dim: int = 512,
        key_dim: int = 512,
        blocks: int = 4,
        hidden: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.key_length = dim, key_dim
        self.blocks = KeyedCoupling(dim, key_dim, blocks, hidden, seed, gin=True)

    def forward(
        self, z: Float[Tensor, "batch dim"], key: Float[Tensor, "batch key_dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Hide codes of any length under ``key`` as unit codes; also return ``log |det J|`` of the blocks."""
        g, log_det = self._lengthy(z, key)
        return normalize(g, dim=1), log_det

    def inverse(
        self, z_a: Float[Tensor, "batch dim"], key: Float[Tensor, "batch key_dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Open codes hidden under ``key``, as unit codes and approximately; also ``log |det J|`` of the blocks."""
        g, log_det = self.blocks.inverse(normalize(z_a, dim=1), key)
        return normalize(g, dim=1), log_det

    def roundtrip_error(
        self, z: Float[Tensor, "batch dim"], key: Float[Tensor, "batch key_dim"]
    ) -> Float[Tensor, " batch"]:
        r"""What renormalising costs each code, the cosine distance :math:`1 - \cos(\hat z, z)` in [0, 2]."""
        back, _ = self.inverse(self(z, key)[0], key)
        return 1 - cosine_similarity(back, z.to(back), dim=1)

    def norm_penalty(self, z: Float[Tensor, "batch dim"], key: Float[Tensor, "batch key_dim"]) -> Float[Tensor, ""]:
        r"""A term to add to a training, the mean of :math:`(\log\|g_k(z / \|z\|)\|)^2`; at 0 the inverse is exact."""
        return self._lengthy(z, key)[0].norm(dim=1).log().square().mean()

    def _lengthy(self, z: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks(normalize(z, dim=1), key)
