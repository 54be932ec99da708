"""SDN, the Secure Dual Network."""

from lightning_modules.sdn.module import SDN, SDNWeights

__all__ = ["SDN", "SDNWeights"]
