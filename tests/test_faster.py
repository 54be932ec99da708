"""Layout, compilation and fp16: the same gradients, and checkpoints with the same names."""

import pytest
import torch
from conftest import NoiseFaces
from lightning.pytorch.plugins import MixedPrecision
from test_optimization import TwoPlayers

from lightning_modules.callbacks import Faster
from lightning_modules.callbacks.faster import networks
from lightning_modules.sdn import SDN


class Watched(SDN):
    """Notes the gradients of each optimizer's first step, as they are before clipping."""

    def __init__(self):
        super().__init__(size=64, width=4, key_bits=8, identities=8)
        self.gradients = []

    def on_before_optimizer_step(self, optimizer):
        self.gradients += [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        super().on_before_optimizer_step(optimizer)


def first_step(quick_trainer, **how):
    torch.manual_seed(0)
    method = Watched()
    quick_trainer(1, callbacks=[Faster(**how)]).fit(method, NoiseFaces())
    return method


COMPILED = pytest.param({"compile": True, "backend": "aot_eager"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [{"channels_last": True}, COMPILED])
def test_the_gradients_are_the_same(how, quick_trainer):
    """Of all four optimizers, and of the penalty, which is differentiated twice (in the first step)."""
    plain, fast = first_step(quick_trainer), first_step(quick_trainer, **how)
    assert len(plain.gradients) == len(fast.gradients) > 50
    for one, two in zip(plain.gradients, fast.gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=max(1e-3 * one.abs().max().item(), 1e-6))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    laid = next(p for p in fast.encoder.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert laid.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in how)


def test_what_is_called_as_a_whole_is_compiled():
    method = SDN(size=64, width=4, key_bits=8, identities=8, dual=False)
    found = list(networks(method))
    assert {method.encoder, method.decoder, method.discriminator, *method.opener} <= set(found)
    assert method.opener not in found


def test_half_precision_clips_gradients_as_they_are_and_not_as_they_are_scaled(quick_trainer):
    """Scaled by 4,096, a gradient would be cut to a part."""
    moved = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4096.0))]):
        torch.manual_seed(0)
        method = TwoPlayers(clip=10.0)
        before = method.first.weight.detach().clone()
        quick_trainer(1, plugins=plugins).fit(method, NoiseFaces())
        moved.append(method.first.weight.detach() - before)
    assert moved[0].abs().max() > 1e-5
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-2, atol=1e-5)
