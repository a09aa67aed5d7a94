"""The modern CNN of notebook 1 and its optimizer in plain PyTorch, for `tools/benchmark.py` to compare speed with."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class BiasedNorm(nn.BatchNorm2d):
    """BatchNorm that learns an offset but no scale, as in the notebook."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-5, momentum=0.4)
        self.weight.requires_grad_(False)


def conv_norm(channels, filters, pool=False):
    """3 x 3 convolution, pooling if asked, BatchNorm and GELU."""
    convolution = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2)] if pool else []
    return [convolution, *pooling, BiasedNorm(filters), nn.GELU(approximate="tanh")]


def modern_cnn(mean, std, widths=(64, 256, 256)):
    """The network from float images (batch, 3, 32, 32), 0 to 255, to logits (batch, 10)."""
    scale = nn.Conv2d(3, 3, 1, groups=3)
    whiten = nn.Conv2d(3, 24, 2, bias=False)
    with torch.no_grad():
        scale.weight.copy_(torch.tensor(1 / 255 / std).reshape(3, 1, 1, 1))
        scale.bias.copy_(torch.tensor(-mean / std))
    for layer in (scale, whiten):
        layer.requires_grad_(False)
    parts, channels = [scale, whiten, nn.GELU(approximate="tanh")], 24
    for filters in widths:
        parts += conv_norm(channels, filters, pool=True) + conv_norm(filters, filters)
        channels = filters
    parts += [nn.MaxPool2d(3), nn.Flatten(), nn.Linear(channels, 10, bias=False)]
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def copy_weights(model, network):
    """Give the PyTorch network the weights of the Keras model; raises ValueError if they do not fit."""
    kernels = [w for w in model.get_weights() if w.ndim == 4]
    own = [layer for layer in network if isinstance(layer, nn.Conv2d)][1:]  # the first one is the scaling
    head = [w for w in model.get_weights() if w.ndim == 2]
    own_head = [layer for layer in network if isinstance(layer, nn.Linear)]
    if (len(kernels), len(head)) != (len(own), len(own_head)):
        raise ValueError(f"{len(kernels)} convolutions in Keras, {len(own)} in PyTorch")
    with torch.no_grad():
        for kernel, layer in zip(kernels, own):
            layer.weight.copy_(torch.tensor(np.transpose(kernel, (3, 2, 0, 1))))
        for kernel, layer in zip(head, own_head):
            layer.weight.copy_(torch.tensor(kernel.T))


def orthogonalised(matrix, steps=3):
    """Roughly the orthogonal matrix nearest to `matrix` (rows, columns), by Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """Muon for filters, SGD with Nesterov momentum for the rest, with the notebook's rates and weight decay."""

    def __init__(self, network, weight_decay=0.013):
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.momentums = [torch.zeros_like(p) for p in self.parameters]
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, rate):
        """Move all parameters; `rate` is the share (0 to 1) of the peak rates."""
        for parameter, momentum in zip(self.parameters, self.momentums):
            parameter.mul_(1 - self.weight_decay * rate)
            gradient = parameter.grad
            if parameter.ndim == 4:
                momentum.mul_(0.6).add_(gradient)
                update = orthogonalised((gradient + 0.6 * momentum).flatten(1)).view_as(parameter)
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm()).sub_(update, alpha=0.2 * rate)
            else:
                peak = 53.0 if parameter.ndim == 1 else 0.01
                momentum.mul_(0.85).sub_(gradient, alpha=peak * rate)
                parameter.add_(momentum, alpha=0.85).sub_(gradient, alpha=peak * rate)


def train(network, images, labels, batch, steps):
    """Train for `steps` steps on images, uint8 (n, 32, 32, 3), and labels (n,); returns the last loss, nats."""
    optimizer, loss = Muon(network), torch.tensor(0.0)
    network.train()
    for step in range(steps):
        rows = slice(step * batch % len(images), step * batch % len(images) + batch)
        x = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float()
        loss = functional.cross_entropy(network(x), torch.from_numpy(labels[rows]), label_smoothing=0.2)
        for parameter in optimizer.parameters:
            parameter.grad = None
        loss.backward()
        optimizer.step(1 - step / steps)
    return float(loss.detach())
