"""Public StyleGAN2 layouts → ours: names and constant gains, tensors in, tensors out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_modules.networks.stylegan.stylegan2 import mapping

LEARNING_RATE = 0.01  # of the mapping network, in every public configuration


def convert_rosinality(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Convert a checkpoint of rosinality's ``stylegan2-pytorch``.

    Args:
        state: ``{"g_ema": …, "latent_avg": …}`` or the generator's ``state_dict`` alone. Where the mean code
            is absent it is taken over 4096 codes of a fixed seed; where noise is absent there is none.

    Raises:
        ValueError: If it is no such generator.
    """
    g = state.get("g_ema", state)
    if not (isinstance(g, Mapping) and "input.input" in g and "to_rgb1.conv.weight" in g):
        raise ValueError("this is not a rosinality StyleGAN2: it has neither `input.input` nor `to_rgb1`")
    out = {"const": _tensor(g["input.input"])[0]}
    depth = sum(re.fullmatch(r"style\.\d+\.weight", name) is not None for name in g)
    _mapping(out, [f"style.{i + 1}" for i in range(depth)], lambda name: _tensor(g[name]))

    def layer(source: str, target: str, index: int | None) -> None:
        _layer(
            out,
            target,
            weight=_tensor(g[f"{source}.conv.weight"])[0],
            style=(
                _tensor(g[f"{source}.conv.modulation.weight"]),
                _tensor(g[f"{source}.conv.modulation.bias"]),
            ),
            bias=_tensor(g[f"{source}.bias" if index is None else f"{source}.activate.bias"]).flatten(),
        )
        if index is not None and f"noises.noise_{index}" in g:
            noise, strength = _tensor(g[f"noises.noise_{index}"]), _tensor(g[f"{source}.noise.weight"])
            out[f"{target}.noise"] = noise[0, 0] * strength

    layer("conv1", "b4.conv1", 0)
    layer("to_rgb1", "b4.torgb", None)
    blocks = sum(re.fullmatch(r"to_rgbs\.\d+\.bias", name) is not None for name in g)
    for i in range(blocks):
        size = 8 << i
        layer(f"convs.{2 * i}", f"b{size}.conv0", 2 * i + 1)
        layer(f"convs.{2 * i + 1}", f"b{size}.conv1", 2 * i + 2)
        layer(f"to_rgbs.{i}", f"b{size}.torgb", None)
    if state.get("latent_avg") is None:
        out["mean_w"] = _mean_w(out)
    else:
        w_dim = len(out["b4.conv1.style.weight"][0])
        out["mean_w"] = _tensor(state["latent_avg"]).reshape(-1, w_dim).mean(0)
    return out


def convert_nvlabs(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Convert the ``state_dict`` of ``G_ema`` from NVlabs' stylegan2-ada-pytorch, or stylegan3's StyleGAN2.

    Args:
        state: Names such as ``synthesis.b4.conv1.weight`` and ``mapping.fc0.weight``.

    Raises:
        ValueError: If it is no such generator, or one of another architecture: StyleGAN3, conditional on
            classes, without skip connections, or not of RGB pictures.
    """
    state = state.get("G_ema", state)
    if any(re.match(r"synthesis\.(input\.|L\d+_)", name) for name in state):
        raise ValueError("this is a StyleGAN3 generator, another architecture: bring a StyleGAN2 one")
    if "synthesis.b4.const" not in state or "mapping.fc0.weight" not in state:
        raise ValueError("this is not an NVlabs StyleGAN2: it has neither `synthesis.b4` nor `mapping.fc0`")
    if "mapping.embed.weight" in state:
        raise ValueError("this StyleGAN2 is conditional on classes: bring an unconditional one")
    if "synthesis.b4.torgb.weight" not in state:
        raise ValueError("this StyleGAN2 is not of the skip architecture, the only one supported")
    if len(state["synthesis.b4.torgb.bias"]) != 3:
        raise ValueError(f"expected an RGB generator, got {len(state['synthesis.b4.torgb.bias'])} channels")
    out = {"const": _tensor(state["synthesis.b4.const"])}
    depth = sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in state)
    _mapping(out, [f"mapping.fc{i}" for i in range(depth)], lambda name: _tensor(state[name]))
    for name in state:
        found = re.fullmatch(r"synthesis\.(b\d+\.(?:conv0|conv1|torgb))\.weight", name)
        if found is None:
            continue
        source, target = f"synthesis.{found[1]}", found[1]
        affine = (_tensor(state[f"{source}.affine.weight"]), _tensor(state[f"{source}.affine.bias"]))
        _layer(out, target, weight=_tensor(state[name]), style=affine, bias=_tensor(state[f"{source}.bias"]))
        if f"{source}.noise_const" in state:
            strength = _tensor(state[f"{source}.noise_strength"])
            out[f"{target}.noise"] = _tensor(state[f"{source}.noise_const"]) * strength
    out["mean_w"] = _tensor(state["mapping.w_avg"]) if "mapping.w_avg" in state else _mean_w(out)
    return out


def convert_state(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Convert either public layout, told apart by its names.

    Raises:
        ValueError: If it is neither, or a variant that is not supported.
    """
    inner = state.get("g_ema", state)
    if isinstance(inner, Mapping) and "input.input" in inner:
        return convert_rosinality(state)
    inner = state.get("G_ema", state)
    if isinstance(inner, Mapping) and any(str(name).startswith("synthesis.") for name in inner):
        return convert_nvlabs(state)
    raise ValueError(
        "these are not the weights of a StyleGAN2 generator in rosinality's layout ({'g_ema': …}) "
        "or NVlabs' (the state_dict of G_ema)"
    )


def _tensor(value: object) -> Tensor:
    return torch.as_tensor(value).detach().float()


def _mapping(out: dict[str, Tensor], names: list[str], read: Callable[[str], Tensor]) -> None:
    for i, name in enumerate(names):
        weight = read(f"{name}.weight")
        out[f"mapping.{i}.weight"] = weight * (LEARNING_RATE / weight.shape[1] ** 0.5)
        out[f"mapping.{i}.bias"] = read(f"{name}.bias") * LEARNING_RATE


def _layer(out: dict[str, Tensor], name: str, *, weight: Tensor, style: tuple[Tensor, Tensor], bias: Tensor) -> None:
    out[f"{name}.weight"] = weight / weight[0].numel() ** 0.5
    out[f"{name}.bias"] = bias
    out[f"{name}.style.weight"] = style[0] / style[0].shape[1] ** 0.5
    out[f"{name}.style.bias"] = style[1]


def _mean_w(out: dict[str, Tensor]) -> Tensor:
    depth = sum(name.startswith("mapping.") for name in out) // 2
    layers = [(out[f"mapping.{i}.weight"], out[f"mapping.{i}.bias"]) for i in range(depth)]
    z = torch.randn(4096, layers[0][0].shape[1], generator=torch.Generator().manual_seed(0))
    return mapping(layers, z).mean(0)
