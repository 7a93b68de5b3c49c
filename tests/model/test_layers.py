"""Layers in 16 bits against transformers' layers."""

from __future__ import annotations

import pytest
import torch

from blip2edge.model.layers import RMSNorm

modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is the oracle")

WIDTH = 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 2000.0])
def test_rms_norm_equals_that_of_a_llama(dtype: torch.dtype, scale: float) -> None:
    """Trained Llamas have channels of 2000, whose squares are infinite in fp16; the squares of small values are 0."""
    drawn = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    drawn[:, 0] *= scale
    small = drawn * (scale if scale < 1 else 1.0)
    found = []
    for norm in (RMSNorm(WIDTH, 1e-6), modeling_llama.LlamaRMSNorm(WIDTH, 1e-6)):
        x = small.to(dtype).requires_grad_()
        y = norm.to(dtype)(x)
        y.float().sum().backward()
        assert x.grad is not None
        assert y.dtype == dtype
        assert x.grad.isfinite().all()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])
