"""``keyveil generator``: draw faces, and train the preview head against the generator's own full pictures (ours)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.carriers import write_picture
from lightning_modules.networks.stylegan import MobileStyleGAN
from lightning_modules.networks.stylegan.preview import PreviewHead


def draw_codes(generator: MobileStyleGAN, count: int, seed: int) -> Tensor:
    """Codes ``(count, L, 512)`` to train or test on: mapped at truncation 0.4 … 1, half of them with mixed rows.

    Encoders leave the space of mapped codes; crossing two codes at a random row and adding a little noise to each row
    keeps the head honest there.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        first, second = (generator.mapping(torch.randn(count, 512, generator=random)) for _ in range(2))
        truncation = 0.4 + 0.6 * torch.rand(count, 1, generator=random)
        first, second = (generator.mean_w + truncation * (w - generator.mean_w) for w in (first, second))
    rows = torch.arange(generator.num_layers)
    cut = torch.randint(3, generator.num_layers, (count, 1), generator=random)
    mixed = (torch.rand(count, 1, generator=random) < 0.5) & (rows >= cut)
    codes = torch.where(mixed[:, :, None], second[:, None], first[:, None])
    return codes + 0.03 * torch.randn(codes.shape, generator=random) * (torch.rand(count, 1, 1, generator=random) < 0.5)


def render_targets(generator: MobileStyleGAN, codes: Tensor) -> Tensor:
    """Full pictures of the codes, area-averaged to 256 px, as fp16 ``(N, 3, 256, 256)`` in about [-1, 1]."""
    with torch.no_grad():
        return torch.cat(
            [generator(w, size=256).half() for w in track(codes.split(4), "full pictures", refresh_per_second=0.2)]
        )


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of each picture, both clamped to [-1, 1]."""
    error = (image.clamp(-1, 1) - target.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    return -10 * error.log10()


@torch.no_grad()
def held_out_psnr(generator: MobileStyleGAN, codes: Tensor, targets: Tensor, size: int = 256) -> Tensor:
    """PSNR in dB of previews against full pictures, one a code."""
    pairs = zip(codes.split(4), targets.split(4), strict=True)
    return torch.cat([psnr(generator(w, size, preview=True), F.avg_pool2d(t.float(), 256 // size)) for w, t in pairs])


def sample(out: Path, count: int = 8, truncation: float = 0.7, seed: int = 0, size: int = 256) -> None:
    """Write a picture of generated faces: full network above, preview head below.

    Args:
        out: The PNG to write.
        count: Number of faces.
        truncation: 0 is the mean face, 1 the whole range.
        seed: Which faces.
        size: Pixels of each face, at most 256.
    """
    generator = MobileStyleGAN()
    z = torch.randn(count, 512, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        w = generator.sample_w(z, truncation)
        rows = [torch.cat(list(generator(w, size, preview=preview)), 2) for preview in (False, True)]
    write_picture(out, torch.cat(rows, 1).clamp(-1, 1))


def fit_preview(out: Path, faces: int = 1200, minutes: float = 15, width: int = 64, resume: Path | None = None) -> None:
    """Train a preview head for a number of minutes and write it to ``out`` (safetensors, fp16).

    Args:
        out: Where the weights go.
        faces: Number of full pictures to learn from.
        minutes: How long to train once the pictures are there.
        width: Channels inside the head.
        resume: A head to start from.
    """
    torch.manual_seed(0)
    start = resume or out.with_suffix(".start.safetensors")
    if resume is None:
        save_file(PreviewHead(width=width).state_dict(), start)
    generator = MobileStyleGAN(preview_head=start)
    head = generator.preview_head.requires_grad_(True)
    codes, held_out = draw_codes(generator, faces, seed=1), draw_codes(generator, 32, seed=2)
    targets, held_out_targets = render_targets(generator, codes), render_targets(generator, held_out)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-3, betas=(0.9, 0.99))
    began, step = time.monotonic(), 0
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - share) + 1e-5
        pick = torch.randint(faces, (4,))
        with torch.no_grad():
            features = generator.features(codes[pick])
        loss = F.mse_loss(head(features, codes[pick]), targets[pick].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            found = held_out_psnr(generator, held_out, held_out_targets)
            print(f"step {step}  {time.monotonic() - began:.0f} s  held out {found.mean():.2f} dB", flush=True)
            _save(head, out)
    _save(head, out)


def _save(head: PreviewHead, out: Path) -> None:
    beside = out.with_suffix(".part")
    save_file({name: value.detach().half().contiguous() for name, value in head.state_dict().items()}, beside)
    os.replace(beside, out)
