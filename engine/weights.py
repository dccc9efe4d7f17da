"""Dicts of weights, or of their gradients, by their published names: model.layers.3.mlp.up_proj.weight."""

from functools import cache

from engine.backend import xp


def nest(weights):
    """Groups names by what stands before their first dot: {"gate.weight": w} is {"gate": {"weight": w}} then."""
    nested = {}
    for name, value in weights.items():
        first, rest = name.split(".", 1)
        nested.setdefault(first, {})[rest] = value
    return nested


def flatten(nested):
    """The opposite of `nest`."""
    return {f"{first}.{rest}": value for first, group in nested.items() for rest, value in group.items()}


@cache  # asked for each weight whenever a token is generated
def place(name):
    """The layer of a block's weight, its module, and its name there; None for one of no block."""
    if name.startswith("model.layers."):
        _, _, layer, module, rest = name.split(".", 4)
        return int(layer), module, rest


def by_layer(params):
    """The weights of the blocks, a nested dict for each: model.layers.3.mlp.up_proj.weight is
    by_layer(params)[3]["mlp"]["up_proj.weight"].
    """
    nested = {}
    for name, value in params.items():
        if where := place(name):
            layer, module, rest = where
            nested.setdefault(layer, {}).setdefault(module, {})[rest] = value
    return nested


def with_layer(i, dweights):
    """The gradients of a block's weights under their full names."""
    return {f"model.layers.{i}.{module}.{name}": g for module, grads in dweights.items() for name, g in grads.items()}


def summed(*parts):
    """The sum of dicts of gradients."""
    grads = {}
    for part in parts:
        for name, g in part.items():
            grads[name] = grads[name] + g if name in grads else g
    return grads


def added(params, *parts):
    """The same with a gradient for every weight, in the order of params."""
    grads = summed(*parts)
    return {name: grads[name] if name in grads else xp.zeros_like(w) for name, w in params.items()}
