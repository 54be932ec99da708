"""What baselines share that change a face's style code: iFADIT's first phase as their inversion (ours)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.ifadit.disentangle import Disentangler, Trunk
from lightning_modules.paste import finish
from lightning_modules.trained import load_trained


class Inverted(ReversibleAnonymizer):
    """Faces as W+ codes of a frozen StyleGAN, and back. Not reversible: what an edit drops is gone.

    The papers invert by encoders of their own, or by optimisation; here all rows of the table share one encoder, so
    that they differ in what they do to a code.

    Args:
        generator: Frozen generator.
        recognizer: Frozen identity network.
        disentangled: Weights of iFADIT's first phase: a checkpoint, safetensors or a card; ``None``: untrained.
        size: Pixels of the pictures, a divisor of the generator's size.
        trunk: Where the encoder's trunk starts, as in phase 1.
        width: Width of the attribute encoder, as in phase 1.
        blocks: Residual blocks a stage of it, as in phase 1.
        live_rows: Style rows told apart, as in phase 1.
        mask: Finds the region to paste (:class:`lightning_modules.paste.FaceMask`); ``None`` hands out the rendered
            picture whole.
    """

    reversible = False

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        disentangled: str | Path | None = None,
        size: int = 256,
        trunk: Trunk = "recognizer",
        width: int = 32,
        blocks: int = 2,
        live_rows: int = 17,
        mask: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.size, self.mask = size, mask
        self.disentangler = Disentangler(generator, recognizer, live_rows, width, blocks, trunk).requires_grad_(False)
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))
        if disentangled is not None:
            load_trained(self, disentangled, prefix="disentangler.")

    def render(self, w: Tensor, picture: Image) -> Image:
        """Pictures of W+ codes ``(B, L, 512)``, pasted where the face of ``picture`` is."""
        rendered = self.disentangler.generator(w, size=self.size)
        return finish(rendered, picture, None if self.mask is None else self.mask(picture, rendered))
