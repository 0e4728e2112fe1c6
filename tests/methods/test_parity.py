"""Three steps of casia_train.py equal a textbook implementation of the papers, and its differences from the authors'
recipes are those that docs/training.md lists.

The authors' recipes: sphereface_model.prototxt and sphereface_solver.prototxt in train/code of wy1iu/sphereface, with
the update rule of sgd_solver.cpp in BVLC/caffe; train.py of clcarwin/sphereface_pytorch; main.py of
MuggleWang/CosFace_pytorch.
"""
import importlib
import math

import pytest
import torch
from conftest import options
from torch import nn
from torch.nn import functional as F

from cosFace.net import sphere20a
from sphereFace.net import SphereFace

BATCH, STEPS, DECAY, MOMENTUM = 8, 3, 0.5, 0.9    # the decay is so large that three steps show it
# Batch normalization over a few faces amplifies rounding, so that larger steps would soon lead elsewhere.
RATE = {"sphere20a": 1e-2, "faceNet": 1e-5}
LATE = 1000                                       # lambda of this step: by then, the margin matters
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


def textbook_loss(method, x, centers, label, step):
    """Return the mean loss: SphereFace, equations 6 and 7 with the authors' lambda; CosFace, equation 4."""
    norm = x.norm(dim=1, keepdim=True)
    cosine = (x / norm) @ (centers / centers.norm(dim=1, keepdim=True)).T
    target = cosine.gather(1, label[:, None])
    if method == "cosFace":
        logits = 64 * cosine.scatter(1, label[:, None], target - 0.35)
    else:
        angle, lam = target.acos(), max(5, 1000 / (1 + 0.12 * (step + LATE)))
        k = (4 * angle / math.pi).floor().detach()
        psi = (-1) ** k * (4 * angle).cos() - 2 * k
        logits = norm * cosine.scatter(1, label[:, None], (lam * target + psi) / (1 + lam))
    return -logits.log_softmax(1).gather(1, label[:, None]).mean()


def textbook_training(method, rate, initial, batches, decays):
    """Return the parameters after training from `initial`, a dict, by torch.optim.SGD's rule.

    Args:
        rate: initial learning rate.
        decays: function that returns whether a parameter has weight decay.
    """
    p = {name: value.clone().requires_grad_() for name, value in initial.items()}
    velocity = {name: torch.zeros_like(value) for name, value in p.items()}
    for step, (images, labels) in enumerate(batches):
        learning_rate = rate / 10 ** sum(step / STEPS >= drop / 28_000 for drop in (16_000, 24_000))
        loss = textbook_loss(method, textbook_embedding(p, images), p["centers"], labels, step)
        gradients = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
        with torch.no_grad():
            for name, value in p.items():
                velocity[name] = MOMENTUM * velocity[name] + gradients[name] + decays(value) * DECAY * value
                value -= learning_rate * velocity[name]
    return {name: value.detach() for name, value in p.items()}


@pytest.fixture(params=[(method, net) for method in ("sphereFace", "cosFace") for net in ("sphere20a", "faceNet")],
                ids="-".join)
def trained(request, main, casia, tmp_path, monkeypatch):
    """Train three steps with casia_train.py; return (method, rate, initial parameters, batches, final parameters).

    Initially, all vectors differ from their usual values, with which some parts of the network would have no gradient.
    """
    method, net = request.param
    module, seen, batches = importlib.import_module(f"{method}.casia_train"), {}, []

    def remember(made, prefix=""):
        for value in made.parameters():
            if value.ndim == 1:
                value.data += 0.1 * torch.randn_like(value)
        seen.update((prefix or name, value.detach().clone()) for name, value in made.named_parameters())
        return made

    class RememberedBatches(module.Batches):
        def __iter__(self):
            for images, labels in super().__iter__():
                batches.append((images.clone(), labels.clone()))
                yield images, labels
    annealing = SphereFace.annealing
    monkeypatch.setattr(SphereFace, "annealing", lambda step, minimum: annealing(step + LATE, minimum))
    initial_net, loss = module.initial_net, {"cosFace": "CosFace", "sphereFace": "SphereFace"}[method]
    made = type(loss, (getattr(module, loss),), {})
    monkeypatch.setattr(module, "initial_net", lambda *args: remember(initial_net(*args)))
    monkeypatch.setattr(module, loss, made)
    monkeypatch.setattr(made, "__init__", lambda self, *args, **options: remember_head(self, args, options))

    def remember_head(head, args, options):
        super(made, head).__init__(*args, **options)
        remember(head, "centers")
    monkeypatch.setattr(module, "Batches", RememberedBatches)
    recipe = ["--batch-size", BATCH, "--epochs", STEPS / 6, "--lr", RATE[net], "--weight-decay", DECAY]
    status, output = main(method, *options(casia, tmp_path), "--net", net, *recipe)
    assert status == 0 and len(batches) == STEPS, output
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    final = {**state["weights"], "centers": state["head"]["weight"]}
    return method, RATE[net], seen, batches, {name: final[name] for name in seen}


def agree(actual, expected, initial):
    """Return whether the updates of a parameter agree up to a few percent, as a root mean square, and rounding."""
    rounding = STEPS * torch.finfo(torch.float32).eps * initial.norm()
    return bool((actual - expected).norm() <= 0.03 * (expected - initial).norm() + rounding)


def test_three_steps_equal_a_textbook_implementation(trained):
    """The learning rate falls before the third step."""
    method, rate, initial, batches, actual = trained
    expected = textbook_training(method, rate, initial, batches, decays=lambda value: value.ndim > 1)
    assert len(initial) >= 46 and all(name in initial for name in ("conv1_1.bias", "relu4_3.weight", "centers"))
    assert [name for name in initial if not agree(actual[name], expected[name], initial[name])] == []


# The rules by which the authors' Caffe solver updates a parameter: factors of the learning rate and of the decay. PReLU
# layers have no entry in the prototxt, so both factors are Caffe's default, 1. Biases exist in strided layers and fc5.
CAFFE = {"matrix": (1, 1), "bias": (2, 0), "slope": (1, 1)}
OURS = {"matrix": (1, 1), "bias": (1, 0), "slope": (1, 0)}
PORTS = {"matrix": (1, 1), "bias": (1, 1), "slope": (1, 1)}    # both PyTorch ports
RATES = (0.1, 0.1, 0.01, 0.01, 0.01)


def tiny_parts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Linear(6, 5))
    return net.double(), nn.Linear(5, 7, bias=False).double()


def kind(name):
    return "bias" if name.endswith("bias") else "slope" if name == "0.1.weight" else "matrix"


def train(optimizer, parts, gradients, before_step=lambda step: None):
    """Do a step per learning rate with given gradients; return the parameters after each, as a list of dicts."""
    named, history = dict(nn.ModuleList(parts).named_parameters()), []
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in named.items():
            parameter.grad = gradients[step][name].clone()
        before_step(step)
        optimizer.step()
        history.append({name: parameter.detach().clone() for name, parameter in named.items()})
    return history


def train_with_caffe(factors, gradients):
    """Train by sgd_solver.cpp: v = momentum v + rate (gradient + decay w), w -= v; return what train() does."""
    named, history = dict(nn.ModuleList(tiny_parts()).named_parameters()), []
    w = {name: parameter.detach().clone() for name, parameter in named.items()}
    v = {name: torch.zeros_like(parameter) for name, parameter in w.items()}
    for step, rate in enumerate(RATES):
        for name in w:
            rate_factor, decay_factor = factors[kind(name)]
            v[name] = MOMENTUM * v[name] + rate * rate_factor * (gradients[step][name] + DECAY * decay_factor * w[name])
            w[name] = w[name] - v[name]
        history.append(dict(w))
    return history


def different(one, two):
    """Return the kinds of the parameters that differ between two dicts."""
    return {kind(name) for name in one if not torch.allclose(one[name], two[name], rtol=1e-12, atol=1e-14)}


@pytest.fixture
def gradients():
    named = dict(nn.ModuleList(tiny_parts()).named_parameters())
    torch.manual_seed(1)
    return [{name: torch.randn_like(parameter) for name, parameter in named.items()} for _ in RATES]


def our_optimizer(parts):
    parameters = [p for part in parts for p in part.parameters()]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    return torch.optim.SGD([{"params": vectors}, {"params": matrices, "weight_decay": DECAY}], momentum=MOMENTUM)


def test_the_optimizer_differs_from_caffe_in_vectors_and_where_the_learning_rate_falls(gradients):
    parts = tiny_parts()
    ours, caffe = train(our_optimizer(parts), parts, gradients), train_with_caffe(CAFFE, gradients)
    assert different(ours[1], caffe[1]) == {"bias", "slope"}
    alike = train_with_caffe(OURS, gradients)
    assert not different(ours[1], alike[1])
    assert different(ours[2], alike[2]) == {"bias", "slope", "matrix"}    # Caffe's momentum keeps the former rate

    parts = tiny_parts()
    optimizer = our_optimizer(parts)

    def keep_former_rate(step):
        for state in optimizer.state.values():
            state["momentum_buffer"] *= RATES[max(0, step - 1)] / RATES[step]
    ours = train(optimizer, parts, gradients, keep_former_rate)
    assert not any(different(one, two) for one, two in zip(ours, alike))    # otherwise, the rules are the same


def test_the_optimizer_differs_from_the_pytorch_ports_in_the_decay_of_vectors(gradients):
    parts = tiny_parts()
    ours = train(our_optimizer(parts), parts, gradients)
    parts = tiny_parts()
    port = torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=0, momentum=MOMENTUM,
                           weight_decay=DECAY)
    ports = train(port, parts, gradients)
    assert [different(one, two) for one, two in zip(ours, ports)] == [{"bias", "slope"}] * len(RATES)
    assert {name for name in OURS if OURS[name] != PORTS[name]} == {"bias", "slope"}


def test_lambda_lags_a_step_behind_the_caffe_layer():
    """margin_inner_product_layer.cu counts its first iteration as 1; the equation with 0 starts at 1000."""
    for iteration in (1, 2, 100, 1658, 1659, 28_000):
        assert SphereFace.annealing(iteration) == pytest.approx(max(5, 1000 * (1 + 0.12 * iteration) ** -1))
    assert SphereFace.annealing(0) == 1000


def test_initial_weights_are_those_of_the_cosface_port():
    """It follows the prototxt, except that Caffe's Xavier filler draws up to sqrt(3 / fan_in)."""
    net = sphere20a()
    for name, module in net.named_modules():
        if isinstance(module, nn.PReLU):
            assert (module.weight == 0.25).all()
        elif isinstance(module, nn.Conv2d) and module.bias is None:
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.02), name
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in, fan_out = module.weight[0].numel(), module.weight[:, 0].numel()
            assert module.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (fan_in + fan_out)), rel=0.02), name
            assert not module.bias.any()
