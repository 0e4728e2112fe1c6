"""Losses and gradients equal naive float64 implementations of the papers' equations."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cosFace.net import CosFace
from sphereFace.net import SphereFace, SphereFaceR, psi


def naive_psi(t, m):
    """Return psi(t) of one angle, computed literally from equation 7 of SphereFace."""
    k = min(int(t * m / math.pi), m - 1)
    return (-1) ** k * math.cos(m * t) - 2 * k


def naive_loss(x, weight, label, target_logit, other_logits):
    """Return the mean cross entropy, computed face by face from the definition of the cosine.

    Args:
        x: float64 (N, 512), embeddings.
        weight: float64 (C, 512), class centers.
        label: int64 (N,).
        target_logit, other_logits: functions of the cosine and the norm of the embedding.
    """
    losses = []
    for row, y in zip(x, label.tolist()):
        cosine = torch.stack([row @ w / (row.norm() * w.norm()) for w in weight])
        logits = other_logits(cosine, row.norm())
        logits = torch.cat((logits[:y], target_logit(cosine[y], row.norm())[None], logits[y + 1:]))
        losses.append(torch.logsumexp(logits, 0) - logits[y])
    return torch.stack(losses).mean()


def faces_at(angles, weight, norm=7.0):
    """Return embeddings (N, 512) of a given norm at the given angles from weight[0], the first unit vector."""
    orthogonal = torch.zeros(512, dtype=torch.float64)
    orthogonal[1] = 1
    return torch.stack([norm * (math.cos(t) * weight[0] + math.sin(t) * orthogonal) for t in angles])


def naive_sphereface(m, lam):
    """Return the functions target_logit and other_logits of SphereFace for naive_loss()."""
    def target(cosine, norm):
        t = torch.acos(cosine)
        k = min(int(t.item() * m / math.pi), m - 1)
        return norm * (lam * cosine + (-1) ** k * torch.cos(m * t) - 2 * k) / (1 + lam)
    return target, lambda cosine, norm: norm * cosine


def naive_sphereface_r(s, m, lam):
    """Return target_logit and other_logits of SphereFace-R, whose margin is a constant for the gradient."""
    def target(cosine, _):
        t = torch.acos(cosine).item()
        k = int(t * m / math.pi)
        psi_of_t = (-1) ** k * math.cos(m * t) - 2 * k
        return s * (cosine + (psi_of_t - math.cos(t)) / (1 + lam))
    return target, lambda cosine, _: s * cosine


def naive_cosface(s, m):
    """Return the functions target_logit and other_logits of CosFace for naive_loss()."""
    return lambda cosine, norm: s * (cosine - m), lambda cosine, norm: s * cosine


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_psi_equals_equation_7_inside_and_at_the_ends_of_every_interval(m):
    angles = np.union1d(np.linspace(0, math.pi, 1001), np.arange(m + 1) * math.pi / m)
    expected = [naive_psi(t, m) for t in angles]
    actual = psi(torch.tensor(np.cos(angles)), m).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert np.all(np.diff(actual) < 1e-12)                   # psi must decrease with the angle, up to rounding
    assert actual[0] == pytest.approx(1) and actual[-1] == pytest.approx(1 - 2 * m)
    rounded = psi(torch.tensor([1 + 1e-7, -1 - 1e-7], dtype=torch.float32), m)    # slightly out of range
    torch.testing.assert_close(rounded, torch.tensor([1.0, 1.0 - 2 * m]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_sphereface_equals_the_equation_in_value_and_gradient(m, lam):
    check_head(SphereFace(6, m), naive_sphereface(m, lam), [(k + 0.37) * math.pi / m for k in range(m)], lam)


@pytest.mark.parametrize("s, m, lam", [(30, 1.5, 0), (30, 4, 0), (8, 1, 2), (64, 2.3, 5)])
def test_sphereface_r_equals_the_equation_in_value_and_gradient(s, m, lam):
    check_head(SphereFaceR(6, s, m), naive_sphereface_r(s, m, lam), [0.1, 1.0, 2.0, 3.0], lam)


@pytest.mark.parametrize("s, m", [(64, 0.35), (30, 0.0), (8, 0.5)])
def test_cosface_equals_the_equation_in_value_and_gradient(s, m):
    check_head(CosFace(6, s, m), naive_cosface(s, m), [0.1, 1.0, 2.0, 3.0], 1.0)


def check_head(head, naive, angles, extra):
    """Compare a head's loss, gradients and predictions with those of naive_loss() in float64.

    Args:
        head: head with 6 identities.
        naive: (target_logit, other_logits) for naive_loss().
        angles: angles between some embeddings and their own class center.
        extra: third argument of the head, lambda for SphereFace and ramp for CosFace.
    """
    torch.manual_seed(0)
    weight = F.normalize(torch.randn(6, 512, dtype=torch.float64))
    weight[0] = 0
    weight[0, 0] = 1
    x = torch.cat((faces_at(angles, weight), torch.randn(3, 512, dtype=torch.float64)))
    label = torch.tensor([0] * len(angles) + [1, 5, 5])
    x64, w64 = x.clone().requires_grad_(), (3 * weight).requires_grad_()   # the norm of the centers must not matter
    expected = naive_loss(x64, w64, label, *naive)
    expected.backward()

    x32 = x.float().requires_grad_()
    head.weight.data = (3 * weight).float()
    loss, predicted = head(x32, label, extra)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    torch.testing.assert_close(x32.grad.double(), x64.grad, atol=2e-6, rtol=2e-4)
    torch.testing.assert_close(head.weight.grad.double(), w64.grad, atol=2e-6, rtol=2e-4)
    cosine = F.normalize(x) @ F.normalize(weight).T
    assert predicted.tolist() == cosine.argmax(1).tolist()                 # predictions ignore the margin


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
    torch.manual_seed(1)
    head, x, label = make(), torch.randn(5, 512).to(dtype), torch.tensor([0, 1, 2, 3, 0])
    plain, _ = head(x.float(), label, extra)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = head(x.clone().requires_grad_(), label, extra)
        mixed.backward()
    assert mixed.dtype == torch.float32 and mixed.item() == plain.item()
    assert head.weight.grad.dtype == torch.float32


def test_lambda_schedule_equals_that_of_the_released_code():
    assert SphereFace.annealing(0) == 1000
    assert SphereFace.annealing(100) == pytest.approx(1000 / 13)
    assert SphereFace.annealing(10**6) == 5
    assert SphereFace.annealing(10**6, minimum=1) == pytest.approx(1)
    assert SphereFace.annealing(10**6, minimum=0) < 0.01
