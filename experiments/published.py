"""Published figures to stand beside a table: of other protocols, data and judges, so context and no bar to clear."""

from __future__ import annotations

from typing import NamedTuple

PAPER = "Pan, Chen & Wu, Electronics 2024, 13(22), 4398 (SDN)"
WARNING = "another protocol, other data, other judges: context only"


class Published(NamedTuple):
    """A table as it was published.

    Attributes:
        title: What it is about.
        source: Who published it.
        head: Names of the columns; arrows point to the better way.
        rows: As many words as ``head``; an empty one was not published.
    """

    title: str
    source: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


ANONYMIZED = Published(
    "Anonymized faces",
    PAPER,
    ("method", "LPIPS ↓", "FID ↓", "SSIM ↑"),
    (
        ("Gu et al. (FIT)", "0.17", "28", "0.95"),
        ("MfM", "0.35", "27", "0.83"),
        ("FaceBERT", "0.15", "123", "0.83"),
        ("Yang et al.", "0.12", "144", "0.81"),
        ("A3GAN", "0.29", "93", "0.87"),
        ("Khorzooghi et al.", "0.28", "101", "0.86"),
        ("Xue et al.", "0.16", "127", "0.83"),
        ("CIAGAN", "0.28", "108", "0.85"),
        ("Cao et al.", "0.29", "43", "0.93"),
        ("SDN", "0.15", "28", "0.96"),
    ),
)
RECOVERED = Published(
    "Recovered faces",
    PAPER,
    ("method", "LPIPS ↓", "PSNR (dB) ↑", "SSIM ↑", "PieAPP ↓"),
    (
        ("Gu et al. (FIT)", "0.038", "28.11", "0.809", "0.532"),
        ("MfM", "0.069", "27.52", "0.823", "0.581"),
        ("Cao et al.", "0.072", "27.10", "0.85", "0.63"),
        ("SDN", "0.034", "28.91", "0.872", "0.451"),
    ),
)
EDITED = Published(
    "SDN's latent edits by degree",
    PAPER,
    ("feature", "figure", "−2", "−1", "0", "+1", "+2"),
    (
        ("smiling", "FID ↓", "0.25", "8.94", "0", "11.68", "14.08"),
        ("smiling", "SSIM ↑", "0.93", "0.97", "1", "0.97", "0.93"),
        ("smiling", "LPIPS ↓", "0.0155", "0.0063", "0", "0.0065", "0.0158"),
        ("mouth open", "FID ↓", "13.73", "11.23", "0", "8.98", "9.54"),
        ("mouth open", "SSIM ↑", "0.94", "0.97", "1", "0.97", "0.93"),
        ("mouth open", "LPIPS ↓", "0.0157", "0.0069", "0", "0.0082", "0.0200"),
        ("moustache", "FID ↓", "9.75", "9.47", "0", "10.66", "12.68"),
        ("moustache", "SSIM ↑", "0.93", "0.97", "1", "0.97", "0.93"),
        ("moustache", "LPIPS ↓", "0.0171", "0.0067", "0", "0.0068", "0.0176"),
    ),
)
PUBLISHED = (ANONYMIZED, RECOVERED, EDITED)
