"""Frozen StyleGAN-type generators behind one interface: W+ codes in, faces out."""

from lightning_modules.networks.stylegan.mobile import MobileStyleGAN

__all__ = ["MobileStyleGAN"]
