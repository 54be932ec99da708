"""Where every frozen network comes from: cards (source, hash, licence) and the loader that verifies them."""

from lightning_modules.weights.loader import Card, Source, WeightsError, card, cards, find, locate

__all__ = ["Card", "Source", "WeightsError", "card", "cards", "find", "locate"]
