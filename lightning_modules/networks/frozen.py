"""Networks that are used but never trained: no gradients, always in eval mode, out of every checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn


class Frozen(nn.Module):
    """Base of borrowed networks, which are rebuilt from their weight cards and never stored.

    Call :meth:`freeze` at the end of the constructor. Gradients flow *through* the network to its input; none reaches
    its weights. ``card_hashes`` names what it was built from: card name → ``"sha256:…"``.
    """

    card_hashes: dict[str, str]

    def freeze(self) -> Frozen:
        """Stop every parameter and switch to eval mode for good."""
        self.requires_grad_(False)
        self.register_load_state_dict_post_hook(type(self)._forgive)
        return self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode, whatever the caller asks."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: a frozen network is rebuilt from its card."""
        return kwargs.get("destination") if kwargs.get("destination") is not None else {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Nothing to load; remember where we stand, so that what lies below is not reported as missing."""
        self._prefix = prefix

    def _forgive(self, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.startswith(self._prefix)]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""
