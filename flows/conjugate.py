"""People to people: rotate codes where real codes are round, and only there."""

from __future__ import annotations

from math import lgamma, log, pi
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from flows.orthogonal import rotate, turned_by
from flows.precision import full_precision


class Conjugate(nn.Module):
    r"""Conjugated rotation :math:`T_k = f^{-1} \circ Q_k \circ f`, for a whitening :math:`f` (ours).

    Codes of real faces fill few of their dimensions, and those unevenly, so most rotated codes are nobody's.
    With :math:`V` the leading principal directions of real codes and :math:`S` the root mean square along
    each, :math:`A = S^{-1} V` makes them round, a rotation then keeps their distribution, and

    .. math::
        u = \frac{A z}{\|A z\|}, \qquad
        z_a = \frac{A^+ Q_k u}{\|A^+ Q_k u\|}, \qquad
        A^+ = V^\top S

    is a person again for every key. A face that is rendered and encoded again carries a direction, not a
    length, so the map goes from unit codes to unit codes, and :math:`Q_k^\top` in place of :math:`Q_k`
    undoes it exactly *for codes in the subspace*. What a code has outside is dropped: :meth:`explained` says
    how much that is.

    The second moment is taken about zero, not about the mean: after subtracting a mean the direction alone
    would no longer determine the code.

    On the unit sphere of the subspace (dimension :math:`d - 1`), :math:`z \mapsto Az/\|Az\|` scales volumes
    by :math:`|\det A| \, \|Az\|^{-d}` (the angular central Gaussian density, Tyler 1987), so ``log_det`` is
    the true :math:`d \, (\log \|A z_a\| - \log \|A z\|)` between tangent spaces of that sphere; as a map of
    the surrounding space it has none.

    A rendered face does not carry every direction of its code alike: what is asked for along the widest arrives,
    along the narrowest hardly anything does (``carried`` of ``keyveil limits``). One rotation of all of them spreads
    the loss of the narrow over the wide, so ``bands`` lets directions be mixed only with their like. A rotation in
    bands keeps the length of a code's share of each band, by which a stranger could link pictures without any key:
    so every hidden code gets the usual lengths, and its own are lost (:meth:`kept`).

    Nothing is trained. The buffers are in the ``state_dict`` and keep their shapes, so a fitted one loads
    into a new one.

    Args:
        dim: Length of an identity code.
        directions: Number d of principal directions kept; a key is a d × d rotation. Few lose a part of
            every code, many amplify the noise of near-empty directions: 128 of 512 was best for the
            MobileFaceNet of the cards (recovered similarity 0.63 to 0.80; 0.18 to 0.54 with 192).
        angle: How far the key may turn a code, in radians: :math:`Q_k` becomes
            :math:`\exp(\theta (Q_k - Q_k^\top)/2)` (after Cao et al., ICCV 2021), whose turned codes have a
            mean cosine of about :math:`J_0(\theta)` to the original where codes are round: 1 at 0, 0.77 at
            1, 0 at 2.4. ``None`` takes the key's rotation as it is, which leaves nothing alike.
        bands: Into how many equal bands of at least two, from the widest directions to the narrowest, a key's
            rotation falls (:attr:`key_bands`). With one, all that lies in the subspace comes back.

    Raises:
        ValueError: If ``directions`` does not lie in ``dim`` or does not fall into so many bands.

    Example:
        >>> codes = torch.nn.functional.normalize(torch.randn(100, 6) * torch.arange(1, 7), dim=1)
        >>> flow = Conjugate(dim=6, directions=6).fit_(codes)
        >>> key = torch.linalg.qr(torch.randn(100, 6, 6))[0]
        >>> torch.allclose(flow.inverse(flow(codes, key)[0], key)[0], codes, atol=1e-4)
        True
    """

    key_kind: ClassVar[str] = "rotation"
    directions: Float[Tensor, "d dim"]
    scales: Float[Tensor, " d"]

    def __init__(self, dim: int = 512, directions: int = 128, angle: float | None = None, bands: int = 1) -> None:
        super().__init__()
        if not 2 <= directions <= dim:
            raise ValueError(f"directions must lie between 2 and dim = {dim}, got {directions}")
        if bands < 1 or directions % bands or directions // bands < 2:
            raise ValueError(f"{directions} directions do not fall into {bands} equal bands of at least two")
        self.dim, self.key_length, self.key_bands, self.angle = dim, directions, bands, angle
        self.register_buffer("directions", torch.zeros(directions, dim))
        self.register_buffer("scales", torch.zeros(directions))
        if bands > 1:
            self.register_buffer("lengths", torch.zeros(bands))

    @torch.no_grad()
    def fit_(self, codes: Float[Tensor, "n dim"], shrink: float = 0.1) -> Conjugate:
        """Take the directions and scales of real codes; a second or two for ten thousand codes.

        Args:
            codes: Codes of different people's real faces; only their directions count.
            shrink: 0 whitens fully; 1 not at all (a rotation within the subspace). Between, every variance
                is drawn towards their mean by this share, so that nearly empty directions are not blown up
                to full size.

        Returns:
            Itself.

        Raises:
            ValueError: If there are fewer codes than directions, ``shrink`` is outside [0, 1], or the codes
                leave a direction empty although ``shrink`` is 0.
        """
        if len(codes) < self.key_length:
            raise ValueError(f"{self.key_length} directions need at least as many codes, got {len(codes)}")
        if not 0 <= shrink <= 1:
            raise ValueError(f"shrink must lie in [0, 1], got {shrink}")
        z = normalize(codes.double(), dim=1)
        variances, vectors = torch.linalg.eigh(z.mT @ z / len(z))  # ascending
        variances = variances[-self.key_length :].flip(0).clamp_min(0)
        variances = torch.lerp(variances, variances.mean(), shrink)
        if variances[-1] <= 1e-12:
            raise ValueError(
                f"the codes fill fewer than {self.key_length} directions: "
                "keep fewer directions, shrink more or bring more codes"
            )
        self.directions.copy_(vectors[:, -self.key_length :].mT.flip(0))
        self.scales.copy_(variances.sqrt())
        self._fit_lengths(codes)
        return self

    def _fit_lengths(self, codes: Tensor) -> None:
        if self.key_bands > 1:
            self.lengths.copy_(
                self.round_codes(codes).unflatten(1, (self.key_bands, -1)).square().sum(2).mean(0).sqrt()
            )

    def round_codes(self, codes: Float[Tensor, "n dim"]) -> Float[Tensor, "n d"]:
        """Where keys turn: unit codes ``f(z)``, of real people's codes about uniform on the sphere."""
        with full_precision(codes.device):
            return self._to_round(codes.to(self._dtype))[0]

    def _level(self, u: Tensor) -> Tensor:
        """Round unit codes with the usual lengths of their bands."""
        if self.key_bands == 1:
            return u
        bands = normalize(u.unflatten(1, (self.key_bands, -1)), dim=2)
        return normalize((bands * self.lengths.to(u)[:, None]).flatten(1), dim=1)

    def forward(
        self, z: Float[Tensor, "batch dim"], key: Float[Tensor, "batch d d"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Hide codes of any length under ``key`` as unit codes; also return ``log |det J|`` on the sphere."""
        return self._turn(z, key, back=False)

    def inverse(
        self, z_a: Float[Tensor, "batch dim"], key: Float[Tensor, "batch d d"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Open codes hidden under ``key``, as unit codes; also return ``log |det J|`` of the inverse."""
        return self._turn(z_a, key, back=True)

    def explained(self, codes: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Share of each code's squared length inside the subspace, in [0, 1].

        Its square root is the cosine between a code and what the right key gives back in the best case.
        """
        return (normalize(codes.to(self.directions), dim=1) @ self.directions.mT).square().sum(1)

    def kept(self, codes: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """What the right key gives back of codes in the best case: unit codes in the subspace, their bands levelled."""
        self._check_fitted()
        with full_precision(codes.device):
            return self._from_round(self._level(self.round_codes(codes)))[0]

    def log_prob(self, codes: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        r"""Log-density in nats of codes' directions in the subspace, if :math:`f` made real codes uniform.

        .. math::
            \log p(z) = \log|\det A| - d \log\|A z\| - \log\frac{2 \pi^{d/2}}{\Gamma(d/2)},
            \qquad \|V z\| = 1,

        the angular central Gaussian density (Tyler 1987) with respect to the area of the subspace's unit
        sphere; what a code has outside is dropped. Of two transforms of as many directions and the same
        :math:`V`, the one that gives held-out people more nats is closer to making them round.
        """
        self._check_fitted()
        half = self.key_length / 2
        with full_precision(codes.device):
            _, density = self._to_round(codes.to(self._dtype))
            return density - self.scales.to(self._dtype).log().sum() - log(2) - half * log(pi) + lgamma(half)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.scales.dtype, torch.float32)

    def _check_fitted(self) -> None:
        if not self.scales[0] > 0:
            raise ValueError("the conjugate transform has no directions yet: call fit_(codes) or load a fitted one")

    def _turn(self, z: Tensor, key: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
        self._check_fitted()
        with full_precision(z.device):
            rotation = turned_by(key.to(self._dtype), self.angle)
            u, density = self._to_round(z.to(self._dtype))
            turned, density_there = self._from_round(
                rotate(rotation.mT, u) if back else rotate(rotation, self._level(u))
            )
            return turned, density - density_there  # a rotation keeps areas: what is left is f's share on either side

    def _to_round(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes to where they are round, :math:`u = f(z)`, and the log of how f scales areas, less log det A."""
        whitened = normalize(z @ self.directions.to(z).mT, dim=1) / self.scales.to(z)
        return normalize(whitened, dim=1), -self.key_length * whitened.norm(dim=1).log()

    def _from_round(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Back to unit codes, and the log of how f scales areas *there*: ‖A z‖ is 1 / ‖S u‖ for a unit u."""
        spread = u * self.scales.to(u)
        return normalize(spread, dim=1) @ self.directions.to(u), self.key_length * spread.norm(dim=1).log()
