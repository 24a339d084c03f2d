"""Muon against torch's own for matrices and torch's AdamW for the rest."""

import pytest
import torch
from comfyui_wanflow.wan_core.training.muon import Muon, matrix_shape, orthogonal


def steps(make, parameters, count=3):
    """The parameters after some steps on gradients that follow from the seed."""
    parameters = [torch.nn.Parameter(p.clone()) for p in parameters]
    optimizer = make(parameters)
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters


def test_matrices_equal_torchs_muon():
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in ((6, 10), (10, 6), (6, 10))]
    own = steps(lambda p: Muon(p, lr=1e-2, weight_decay=0.1), start)
    torchs = steps(
        lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), start
    )  # fmt: skip
    for a, b, c in zip(own, torchs, start, strict=True):
        assert (a - b).norm() < 0.03 * (a - c).norm()  # torch's works in bf16


def test_a_convolution_is_a_matrix_and_a_bias_is_stepped_by_adamw():
    kernel, bias = torch.randn(4, 3, 1, 3, 3), torch.randn(7)
    assert matrix_shape(kernel) == (4, 27)
    assert matrix_shape(bias) is None and matrix_shape(torch.zeros(1, 6, 8)) is None
    flat = steps(lambda p: Muon(p), [kernel.reshape(4, 27)])[0]
    torch.testing.assert_close(steps(lambda p: Muon(p), [kernel])[0], flat.view(kernel.shape))
    adamw = steps(lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01), [bias])
    torch.testing.assert_close(steps(lambda p: Muon(p, weight_decay=0.01), [bias]), adamw)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_singular_values_become_about_one(shape):
    found = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert 0.6 < found.min() and found.max() < 1.3
