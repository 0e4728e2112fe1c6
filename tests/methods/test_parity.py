"""Three steps of casia_train.py equal a textbook implementation of the papers."""
import math

import pytest
import torch
from conftest import checkpoint, options, perturb
from torch.nn import functional as F

import cosFace.casia_train
import sphereFace.casia_train

BATCH, STEPS, DECAY, MOMENTUM = 8, 3, 0.5, 0.9    # the decay is so large that three steps show it
# Batch normalization over a few faces amplifies rounding, so that larger steps would soon lead elsewhere.
RATE = {"sphere20a": 1e-2, "faceNet": 1e-5}
LATE, LAMBDA = 10**6, 2                           # by this step, lambda has reached its minimum, and the margin matters
STAGES = ((1, 1), (2, 2), (3, 4), (4, 1))         # SphereFace, table 2: stage and number of residual units


def normalize_batch(x, dims, scale, shift):
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    shape = (1, -1, *(1 for _ in dims[1:]))
    return (x - mean) / (variance + 1e-5).sqrt() * scale.view(shape) + shift.view(shape)


def textbook_embedding(p, x):
    """Return the embeddings of faces, given the parameters by name; with batch normalization if it has any."""
    def layer(name, x, stride=1):
        x = F.conv2d(x, p[f"conv{name}.weight"], p.get(f"conv{name}.bias"), stride, padding=1)
        if f"conv{name}bn.weight" in p:
            x = normalize_batch(x, (0, 2, 3), p[f"conv{name}bn.weight"], p[f"conv{name}bn.bias"])
        return torch.where(x > 0, x, p[f"relu{name}.weight"].view(1, -1, 1, 1) * x)
    for stage, units in STAGES:
        x = layer(f"{stage}_1", x, stride=2)
        for unit in range(1, units + 1):
            x = x + layer(f"{stage}_{2 * unit + 1}", layer(f"{stage}_{2 * unit}", x))
    x = x.flatten(1) @ p["fc5.weight"].T + p["fc5.bias"]
    return normalize_batch(x, (0,), p["fc5_bn.weight"], p["fc5_bn.bias"]) if "fc5_bn.weight" in p else x


def textbook_loss(method, x, centers, label):
    """Return the mean loss: SphereFace, equations 6 and 7 with the authors' lambda; CosFace, equation 4."""
    norm = x.norm(dim=1, keepdim=True)
    cosine = (x / norm) @ (centers / centers.norm(dim=1, keepdim=True)).T
    target = cosine.gather(1, label[:, None])
    if method == "cosFace":
        logits = 30 * cosine.scatter(1, label[:, None], target - 0.35)
    else:
        angle = target.acos()
        k = (4 * angle / math.pi).floor().detach()
        psi = (-1) ** k * (4 * angle).cos() - 2 * k
        logits = norm * cosine.scatter(1, label[:, None], (LAMBDA * target + psi) / (1 + LAMBDA))
    return -logits.log_softmax(1).gather(1, label[:, None]).mean()


def textbook_training(method, rate, initial, batches):
    """Return the parameters after training from `initial`, a dict, by torch.optim.SGD's rule. Vectors do not decay."""
    p = {name: value.clone().requires_grad_() for name, value in initial.items()}
    velocity = {name: torch.zeros_like(value) for name, value in p.items()}
    for step, (images, labels) in enumerate(batches):
        learning_rate = rate / 10 ** sum(step / STEPS >= drop / 28_000 for drop in (16_000, 24_000))
        loss = textbook_loss(method, textbook_embedding(p, images), p["centers"], labels)
        gradients = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
        with torch.no_grad():
            for name, value in p.items():
                velocity[name] = MOMENTUM * velocity[name] + gradients[name] + (value.ndim > 1) * DECAY * value
                value -= learning_rate * velocity[name]
    return {name: value.detach() for name, value in p.items()}


@pytest.mark.parametrize("net", RATE)
@pytest.mark.parametrize("method, module, loss", [
    ("sphereFace", sphereFace.casia_train, sphereFace.net.SphereFace),
    ("cosFace", cosFace.casia_train, cosFace.net.CosFace)], ids=["sphereFace", "cosFace"])
def test_three_steps_equal_a_textbook_implementation(method, module, loss, net, main, casia, tmp_path, monkeypatch):
    """The learning rate falls before the third step. Initially, all vectors differ from their usual values, with which
    some parts of the network would have no gradient."""
    initial, batches, make_net, make_loss, iterate = {}, [], module.initial_net, loss.__init__, module.Batches.__iter__

    def remember(made, prefix=""):
        perturb(made)
        initial.update((prefix or name, value.detach().clone()) for name, value in made.named_parameters())
        return made

    def remember_batches(self):
        for images, labels in iterate(self):
            batches.append((images.clone(), labels.clone()))
            yield images, labels
    annealing = sphereFace.net.SphereFace.annealing
    monkeypatch.setattr(sphereFace.net.SphereFace, "annealing", lambda step, minimum: annealing(step + LATE, minimum))
    monkeypatch.setattr(module, "initial_net", lambda *args: remember(make_net(*args)))
    monkeypatch.setattr(loss, "__init__", lambda head, *args, **options: (
        make_loss(head, *args, **options), remember(head, "centers"))[0])
    monkeypatch.setattr(module.Batches, "__iter__", remember_batches)
    recipe = ["--batch-size", BATCH, "--epochs", STEPS / 6, "--lr", RATE[net], "--weight-decay", DECAY]
    recipe += ["--lambda-min", LAMBDA] if method == "sphereFace" else []
    assert main(method, *options(casia, tmp_path), "--net", net, *recipe)[0] == 0 and len(batches) == STEPS
    assert len(initial) >= 46 and all(name in initial for name in ("conv1_1.bias", "relu4_3.weight", "centers"))
    state = checkpoint(tmp_path / "run")
    actual = {**state["weights"], "centers": state["head"]["weight"]}
    for name, expected in textbook_training(method, RATE[net], initial, batches).items():
        # The updates agree up to a few percent, as a root mean square, and rounding.
        rounding = STEPS * torch.finfo(torch.float32).eps * initial[name].norm()
        assert (actual[name] - expected).norm() <= 0.03 * (expected - initial[name]).norm() + rounding, name
