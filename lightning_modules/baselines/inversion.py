"""Faces as identity and style codes of a frozen generator, and back, for methods that train on both."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.anonymizer import Image
from lightning_modules.ifadit.disentangle import Disentangler, Trunk
from lightning_modules.ifadit.networks import CODE
from lightning_modules.networks.frozen import Frozen
from lightning_modules.trained import load_trained, weights_hash
from lightning_modules.weights import card, cards

Rows = Float[Tensor, "batch rows 512"]
Identities = Float[Tensor, "batch 512"]


class Inversion(Frozen):
    """Faces as codes and back, by the first phase of iFADIT; frozen, and out of checkpoints.

    Args:
        generator: Frozen generator.
        recognizer: Frozen identity network.
        disentangled: Weights of the first phase: a card, a checkpoint or safetensors; ``None``: untrained.
        trunk: Where the encoder's trunk starts, as in phase 1.
        width: Width of the attribute encoder, as in phase 1.
        blocks: Residual blocks a stage of it, as in phase 1.
        live_rows: Style rows told apart, as in phase 1.
    """

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        disentangled: str | Path | None = None,
        trunk: Trunk = "recognizer",
        width: int = 32,
        blocks: int = 2,
        live_rows: int = 17,
    ) -> None:
        super().__init__()
        parts = nn.ModuleDict({"disentangler": Disentangler(generator, recognizer, live_rows, width, blocks, trunk)})
        if disentangled is not None:
            load_trained(parts, disentangled, prefix="disentangler.")
        self.trained_on = getattr(parts, "trained_on", frozenset())
        self.disentangler, self.live_rows = parts["disentangler"], live_rows
        named = str(disentangled) in cards()
        own = {str(disentangled): card(str(disentangled)).digest} if named else {"inversion": weights_hash(parts)}
        self.card_hashes = {**getattr(generator, "card_hashes", {}), **getattr(recognizer, "card_hashes", {}), **own}
        self.freeze()

    def forward(self, image: Image) -> Float[Tensor, "batch codes"]:
        """Identity code and live W+ rows of each face in one line: what a latent data module keeps of it."""
        z = self.disentangler.recognizer(image)
        w = self.disentangler.codes(z, self.disentangler.attribute_encoder(image))
        return torch.cat([z, w[:, : self.live_rows].flatten(1)], 1)

    def apart(self, codes: Float[Tensor, "batch codes"]) -> tuple[Identities, Rows]:
        """The two that :meth:`forward` put together.

        Raises:
            ValueError: If they are codes of something else.
        """
        if codes.shape[1] != CODE * (1 + self.live_rows):
            raise ValueError(
                f"expected codes of {CODE * (1 + self.live_rows)} numbers, got {codes.shape[1]}; the data module's "
                "recognizer must be a lightning_modules.baselines.inversion.Inversion with as many live_rows"
            )
        return codes[:, :CODE], codes[:, CODE:].unflatten(1, (self.live_rows, CODE))

    def render(self, w: Rows, size: int, **how: bool) -> Image:
        """Pictures of live rows; the generator's later ones repeat the last."""
        rest = self.disentangler.generator.num_layers - self.live_rows
        return self.disentangler.generator(torch.cat([w, w[:, -1:].expand(-1, rest, -1)], 1), size=size, **how)
