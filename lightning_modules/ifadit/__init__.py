"""iFADIT: identity and attributes disentangled over a frozen StyleGAN, the identity hidden by a keyed transform."""

from lightning_modules.ifadit.disentangle import DisentangleWeights, IFADITDisentangle
from lightning_modules.ifadit.transform import IFADITTransform, TransformWeights

__all__ = ["DisentangleWeights", "IFADITDisentangle", "IFADITTransform", "TransformWeights"]
