"""Torch models with random weights, and how far two arrays are apart."""

import json

import numpy as np
import torch

# What a small gain leaves alone: norms, and the ends of attention's branches, which would vanish in the residual.
AS_THEY_ARE = ("norm", "to_out", "net.2", "proj_out")


def randomise(model, *, gain=1.0, seed=0):
    """The model with every parameter random, norms and biases too, so that no mistake can hide behind a 0 or a 1.

    A small gain makes activations so small that the norms' epsilons show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 + 0.2 * noise)
            if not any(kept in name for kept in AS_THEY_ARE):
                parameter.mul_(gain if parameter.ndim > 1 else gain**2)  # no bias outweighs what a layer computes
    return model.eval()


def fields_of(config):
    """The config.json that diffusers or transformers would write."""
    return json.loads(config.to_json_string())


def tensors_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def nchw(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative_error(ours, theirs):
    """‖ours - theirs‖ / ‖theirs‖."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
