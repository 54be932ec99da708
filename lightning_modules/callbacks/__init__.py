"""What watches a run: checkpoints, measurements and pictures of its round trips, predictions as files."""

from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.face_writer import FaceWriter
from lightning_modules.callbacks.faster import Faster
from lightning_modules.callbacks.paste_back import Gate, PasteBack
from lightning_modules.callbacks.round_trip_grid import RoundTripGrid, grid_picture
from lightning_modules.callbacks.round_trip_metrics import RoundTripMetrics
from lightning_modules.callbacks.training_checkpoint import TrainingCheckpoint

__all__ = [
    "EMA",
    "FaceWriter",
    "Faster",
    "Gate",
    "PasteBack",
    "RoundTripGrid",
    "RoundTripMetrics",
    "TrainingCheckpoint",
    "grid_picture",
]
