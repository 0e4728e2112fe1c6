"""The heads compared with the papers' equations, recomputed naively in float64: values, gradients, limits."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cosFace.net import CosFace
from sphereFace.net import SphereFace, SphereFaceR, psi


def psi_by_angle(t, m):
    """Equation 7 read literally, one angle at a time."""
    k = min(int(t * m / math.pi), m - 1)
    return (-1) ** k * math.cos(m * t) - 2 * k


def naive_loss(x, weight, label, target_logit, others):
    """Cross entropy written out pair by pair, on cosines from the definition."""
    losses = []
    for row, y in zip(x, label.tolist()):
        cosine = torch.stack([row @ w / (row.norm() * w.norm()) for w in weight])
        logits = others(cosine, row.norm())
        logits = torch.cat((logits[:y], target_logit(cosine[y], row.norm())[None], logits[y + 1:]))
        losses.append(torch.logsumexp(logits, 0) - logits[y])
    return torch.stack(losses).mean()


def faces_at(angles, weight, norm=7.0):
    """Embeddings (N, 512) at given angles from weight[0] (unit), turning towards a direction orthogonal to it."""
    side = torch.zeros(512, dtype=torch.float64)
    side[1] = 1
    return torch.stack([norm * (math.cos(t) * weight[0] + math.sin(t) * side) for t in angles])


def naive_sphereface(m, lam):
    def target(cosine, norm):
        t = torch.acos(cosine)
        k = min(int(t.item() * m / math.pi), m - 1)
        return norm * (lam * cosine + (-1) ** k * torch.cos(m * t) - 2 * k) / (1 + lam)
    return target, lambda cosine, norm: norm * cosine


def naive_sphereface_r(s, m, lam):
    """Its value has the margin; its gradient is that of the cosine, the margin's share being a constant."""
    def target(cosine, _):
        t = torch.acos(cosine).item()
        psi = (-1) ** int(t * m / math.pi) * math.cos(m * t) - 2 * int(t * m / math.pi)
        return s * (cosine + (psi - math.cos(t)) / (1 + lam))
    return target, lambda cosine, _: s * cosine


def naive_cosface(s, m):
    return lambda cosine, norm: s * (cosine - m), lambda cosine, norm: s * cosine


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_psi_equals_equation_7_on_every_interval_and_its_bounds(m):
    angles = np.union1d(np.linspace(0, math.pi, 1001), np.arange(m + 1) * math.pi / m)
    expected = [psi_by_angle(t, m) for t in angles]
    got = psi(torch.tensor(np.cos(angles)), m).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert np.all(np.diff(got) < 1e-12)                      # monotone: larger angle, smaller logit
    assert got[0] == pytest.approx(1) and got[-1] == pytest.approx(1 - 2 * m)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_psi_is_correct_for_cosines_slightly_out_of_range(m):
    got = psi(torch.tensor([1 + 1e-7, -1 - 1e-7], dtype=torch.float32), m)
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0 - 2 * m]), atol=1e-4, rtol=0)


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
    torch.manual_seed(0)
    weight = F.normalize(torch.randn(6, 512, dtype=torch.float64))
    weight[0] = 0
    weight[0, 0] = 1
    x = torch.cat((faces_at(angles, weight), torch.randn(3, 512, dtype=torch.float64)))
    label = torch.tensor([0] * len(angles) + [1, 5, 5])
    x64, w64 = x.clone().requires_grad_(), (3 * weight).requires_grad_()   # the weights' length must not matter
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
    assert predicted.tolist() == cosine.argmax(1).tolist()                 # of the cosine, before the margin


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


@pytest.mark.parametrize("make, extra", HEADS)
def test_a_second_backward_pass_is_refused(make, extra):
    """The first one overwrites what it needs, so it must not be answered wrongly; nor a gradient of the gradient."""
    head, x = make(), torch.randn(3, 512, requires_grad=True)
    loss, _ = head(x, torch.tensor([0, 1, 2]), extra)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)
    loss, _ = head(x, torch.tensor([0, 1, 2]), extra)
    gradient, = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_lambda_schedule_is_that_of_the_release():
    assert SphereFace.annealing(0) == 1000
    assert SphereFace.annealing(100) == pytest.approx(1000 / 13)
    assert SphereFace.annealing(10**6) == 5
    assert SphereFace.annealing(10**6, minimum=1) == pytest.approx(1)
    assert SphereFace.annealing(10**6, minimum=0) < 0.01
