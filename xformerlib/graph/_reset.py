"""Weights drawn anew, as PyTorch Geometric's layers and models do when asked."""

from __future__ import annotations

from torch import nn


def reset(module: nn.Module) -> None:
    """Draw the weights of the parts of a module anew, each in its own way.

    Raises:
        TypeError: a part with parameters of its own that does not say how they are drawn.
    """
    for name, part in module.named_children():
        draw = getattr(part, "reset_parameters", None)
        if callable(draw):
            draw()
        elif next(part.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"{name} of {type(module).__name__} cannot be drawn anew: {type(part).__name__} has parameters but no "
                f"reset_parameters(). Build the model again."
            )
        reset(part)  # also where a part has drawn what is its own
