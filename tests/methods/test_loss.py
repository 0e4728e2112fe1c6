"""Losses and gradients equal naive float64 implementations of the papers' equations."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cosFace.net import CosFace
from sphereFace.net import SphereFace, SphereFaceR, psi


def naive_psi(t, m):
    """Return psi(t) of one angle, a tensor, computed literally from equation 7 of SphereFace."""
    k = min(int(t * m / math.pi), math.ceil(m) - 1)
    return (-1) ** k * torch.cos(m * t) - 2 * k


def naive_loss(x, weight, label, s, target):
    """Return the mean cross entropy of embeddings, float64 (N, 512), face by face from the definition of the cosine.

    The scale is the norm of the embedding if s is None; target() is what takes the place of the target's cosine.
    """
    losses = []
    for row, y in zip(x, label.tolist()):
        cosine = torch.stack([row @ w / (row.norm() * w.norm()) for w in weight])
        logits = (s or row.norm()) * torch.cat((cosine[:y], target(cosine[y])[None], cosine[y + 1:]))
        losses.append(torch.logsumexp(logits, 0) - logits[y])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_psi_equals_equation_7_inside_and_at_the_ends_of_every_interval(m):
    angles = np.union1d(np.linspace(0, math.pi, 1001), np.arange(m + 1) * math.pi / m)
    actual = psi(torch.tensor(np.cos(angles)), m).numpy()
    np.testing.assert_allclose(actual, [naive_psi(t, m) for t in torch.tensor(angles)], atol=1e-12)
    assert np.all(np.diff(actual) < 1e-12)                   # psi must decrease with the angle, up to rounding
    rounded = psi(torch.tensor([1 + 1e-7, -1 - 1e-7], dtype=torch.float32), m)    # slightly out of range
    torch.testing.assert_close(rounded, torch.tensor([1.0, 1.0 - 2 * m]), atol=1e-4, rtol=0)


def sphereface(m, lam):
    return SphereFace(6, m), lam, None, lambda cosine: (lam * cosine + naive_psi(cosine.acos(), m)) / (1 + lam)


def sphereface_r(s, m, lam):    # the margin is a constant for the gradient
    return SphereFaceR(6, s, m), lam, s, lambda cosine: (
        cosine + (naive_psi(cosine.acos(), m) - cosine).detach() / (1 + lam))


def cosface(s, m, ramp):
    return CosFace(6, s, m), ramp, s, lambda cosine: cosine - ramp * m


@pytest.mark.parametrize("head, extra, s, target", [
    *(sphereface(m, lam) for m in (1, 2, 3, 4, 5) for lam in (0.0, 5.0, 1000.0)),
    sphereface_r(30, 1.5, 0), sphereface_r(30, 4, 0), sphereface_r(8, 1, 2), sphereface_r(64, 2.3, 5),
    cosface(64, 0.35, 1), cosface(30, 0, 1), cosface(8, 0.5, 0.3)])
def test_each_loss_equals_its_equation_in_value_and_gradient(head, extra, s, target):
    """Eight embeddings are at angles from 0.1 to 3 from their own class center, which is the first unit vector."""
    angles, x = torch.linspace(0.1, 3, 8, dtype=torch.float64), torch.randn(11, 512, dtype=torch.float64)
    x[:8] = 0
    x[:8, 0], x[:8, 1] = 7 * angles.cos(), 7 * angles.sin()
    label, weight = torch.tensor([0] * 8 + [1, 5, 5]), torch.randn(6, 512, dtype=torch.float64)
    weight[0] = 3 * torch.eye(512)[0]                        # the norm of the centers must not matter
    x64, w64 = x.clone().requires_grad_(), weight.requires_grad_()
    expected = naive_loss(x64, w64, label, s, target)
    expected.backward()

    x32 = x.float().requires_grad_()
    head.weight.data = weight.detach().float()
    loss, predicted = head(x32, label, extra)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    torch.testing.assert_close(x32.grad.double(), x64.grad, atol=2e-6, rtol=2e-4)
    torch.testing.assert_close(head.weight.grad.double(), w64.grad, atol=2e-6, rtol=2e-4)
    assert predicted.tolist() == (x @ F.normalize(weight).T).argmax(1).tolist()    # predictions ignore the margin


HEADS = [(lambda: SphereFace(4), 5.0), (lambda: SphereFace(4), 0.0), (lambda: SphereFaceR(4), 0.0),
         (lambda: CosFace(4), 1.0)]


@pytest.mark.parametrize("make, extra", HEADS)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0], ids=["t=0", "t=pi", "zero embedding"])
def test_heads_are_finite_at_extreme_angles(make, extra, sign):
    head = make()
    x = (sign * 3 * head.weight[:1].detach()).requires_grad_()
    loss, _ = head(x, torch.tensor([0]), extra)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make, extra", HEADS)
def test_heads_compute_in_float32_under_autocast(make, extra, dtype):
    head, x, label = make(), torch.randn(5, 512).to(dtype), torch.tensor([0, 1, 2, 3, 0])
    plain, _ = head(x.float(), label, extra)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = head(x.clone().requires_grad_(), label, extra)
        mixed.backward()
    assert mixed.dtype == torch.float32 and mixed.item() == plain.item()
    assert head.weight.grad.dtype == torch.float32


def test_lambda_schedule_equals_that_of_the_released_code():
    assert SphereFace.annealing(0) == 1000 and SphereFace.annealing(10**6) == 5
    assert SphereFace.annealing(100) == pytest.approx(1000 / 13)
