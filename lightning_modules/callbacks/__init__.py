"""What watches a run: measurements and pictures of its round trips."""

from lightning_modules.callbacks.round_trip_grid import RoundTripGrid, grid_picture
from lightning_modules.callbacks.round_trip_metrics import RoundTripMetrics

__all__ = ["RoundTripGrid", "RoundTripMetrics", "grid_picture"]
