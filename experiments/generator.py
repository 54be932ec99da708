"""``keyveil generator``: draw faces, and train the preview head against the generator's own full pictures (ours)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from datamodules.files import write_tensors, write_whole
from lightning_modules.carriers import write_picture
from lightning_modules.networks.stylegan import MobileStyleGAN
from lightning_modules.networks.stylegan.mobile import PREVIEW_BLOCKS
from lightning_modules.networks.stylegan.preview import LATE_ROWS, PreviewHead
from lightning_modules.weights import card


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


class Pairs(NamedTuple):
    """What the head reads and what it should say, kept in memory: 8 MB a face."""

    codes: Float[Tensor, "n rows 512"]
    features: Float[Tensor, "n 128 128 256"]
    targets: Float[Tensor, "n 3 256 256"]


@torch.no_grad()
def render(generator: MobileStyleGAN, codes: Tensor, description: str) -> Pairs:
    """Features (fp16) and full pictures, area-averaged to 256 px (fp16, in about [-1, 1]), of some codes."""
    features = torch.empty(len(codes), 128, 128, 256, dtype=torch.half)
    targets = torch.empty(len(codes), 3, 256, 256, dtype=torch.half)
    for i, w in enumerate(track(codes.split(1), description)):
        x = generator.features(w)
        features[i], targets[i] = x[0], F.avg_pool2d(generator.finish(x, w), 4)[0]
    return Pairs(codes, features, targets)


def start_head(generator: MobileStyleGAN, pairs: Pairs, width: int) -> PreviewHead:
    """A head that knows what can be known without training.

    Its style is the one with which the generator's next block reads the same features, and its direct path the
    least-squares map from those styled features to the wavelet channels of the pictures.
    """
    head = PreviewHead(pairs.features.shape[-1], width)
    head.style.load_state_dict(generator.blocks[PREVIEW_BLOCKS].up.affine.state_dict())
    gram, cross = torch.zeros(257, 257, dtype=torch.float64), torch.zeros(257, 12, dtype=torch.float64)
    with torch.no_grad():
        for w, x, target in zip(*(part.split(1) for part in pairs), strict=True):
            styled = (x.float() * head.style(w[:, LATE_ROWS].mean(1))[:, None, None]).flatten(0, 2)
            styled = torch.cat([styled, torch.ones(len(styled), 1)], 1).double()
            bands = haar_bands(target.float()).permute(0, 2, 3, 1).flatten(0, 2).double()
            gram += styled.T @ styled
            cross += styled.T @ bands
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(257)
        solution = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).float()
        # Channels of unit size: Adam moves every weight by the same amount, and would tear a solution in tiny weights.
        scale = (gram.diagonal()[:256] / gram[256, 256]).sqrt().float()
        head.style.weight.div_(scale[:, None])
        head.style.bias.div_(scale)
        head.direct.weight.copy_((solution[:256] * scale[:, None]).T[:, :, None, None])
        head.outward.bias.copy_(solution[256])
        head.outward.weight.zero_()
    return head


def haar_bands(image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 12 h2 w2"]:
    """Haar transform: LL, LH, HL, HH of each colour at half the size; the inverse of what the head ends with."""
    corners = F.pixel_unshuffle(image, 2).unflatten(1, (3, 4))  # top left, top right, bottom left, bottom right
    a, b, c, d = corners.unbind(2)
    return torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 2


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of each picture, both clamped to [-1, 1]."""
    error = (image.clamp(-1, 1) - target.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    return -10 * error.log10()


@torch.no_grad()
def held_out_psnr(head: PreviewHead, pairs: Pairs, size: int = 256) -> Tensor:
    """PSNR in dB of previews against full pictures, one a face."""
    shrink = 256 // size
    return torch.cat(
        [
            psnr(F.avg_pool2d(head(x.float(), w), shrink), F.avg_pool2d(target.float(), shrink))
            for w, x, target in zip(*(part.split(4) for part in pairs), strict=True)
        ]
    )


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


def fit_preview(
    out: Path, faces: int = 1000, steps: int = 5000, width: int = 96, resume: Path | None = None, crop: int = 40
) -> None:
    """Train a preview head and write it to ``out`` (safetensors, fp16), with its held-out PSNR beside it (JSON lines).

    The features of all faces are computed once (8 MB each in memory); a step then sees small crops of many faces.

    Args:
        out: Where the weights go.
        faces: Number of full pictures to learn from.
        steps: Training steps of 16 crops.
        width: Channels inside the head.
        resume: A head to go on with.
        crop: Side of a crop in features.
    """
    torch.manual_seed(0)
    start = resume or out.with_suffix(".start.safetensors")
    if resume is None:
        write_tensors(start, PreviewHead(width=width).state_dict())
    generator = MobileStyleGAN(preview_head=start)
    held_out = render(generator, draw_codes(generator, 48, seed=2), "held-out faces")
    pairs = render(generator, draw_codes(generator, faces, seed=1), "faces")
    head = PreviewHead.load(resume) if resume else start_head(generator, pairs, width)
    print(f"start: held out {held_out_psnr(head, held_out).mean():.2f} dB", flush=True)
    out.with_suffix(".start.safetensors").unlink(missing_ok=True)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    inner = slice(6, 2 * crop - 6)  # the rim of a crop does not see its neighbours
    for step in range(1, steps + 1):
        chosen = torch.randint(faces, (16,)).tolist()
        top, left = torch.randint(128 - crop + 1, (2, 16)).tolist()
        x = torch.stack(
            [pairs.features[i, y : y + crop, x : x + crop] for i, y, x in zip(chosen, top, left, strict=True)]
        )
        target = torch.stack(
            [
                pairs.targets[i, :, 2 * y : 2 * (y + crop), 2 * x : 2 * (x + crop)]
                for i, y, x in zip(chosen, top, left, strict=True)
            ]
        )
        image = head(x.float(), pairs.codes[chosen])
        loss = F.mse_loss(image[:, :, inner, inner], target.float()[:, :, inner, inner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            found = held_out_psnr(head, held_out)
            print(f"step {step}: held out {found.mean():.2f} dB, worst {found.min():.2f}", flush=True)
            _save(head, out, {"steps": str(step), "faces": str(faces), "psnr": f"{found.mean():.2f}"})


def measure_preview(out: Path, count: int = 64, seed: int = 7) -> None:
    """Write the PSNR of previews against full pictures, on codes no head has seen, as JSON lines.

    Args:
        out: The .jsonl to write.
        count: Number of faces.
        seed: Which codes; 1 and 2 are those of the training.
    """
    generator = MobileStyleGAN()
    pairs = render(generator, draw_codes(generator, count, seed), "faces")
    lines = []
    for size in (256, 128):
        found = held_out_psnr(generator.preview_head, pairs, size)
        told = {"metric": "psnr", "what": "preview against full picture", "size": size, "n": count, "seed": seed}
        spread = {"value": round(found.mean().item(), 3), "worst": round(found.min().item(), 3)}
        lines.append({**told, **spread, "weights": card("preview-head").digest})
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines))
    print(out.read_text(), end="")


def _save(head: PreviewHead, out: Path, notes: dict[str, str]) -> None:
    write_tensors(out, {name: value.half() for name, value in head.state_dict().items()}, notes)
