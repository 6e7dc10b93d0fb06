"""The weights of a timm model, each to be taken over once, and what is made of its simplest modules."""

from __future__ import annotations

import copy
from typing import NoReturn

import timm
import torch
from timm.layers.activations import GELU
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from torch import Tensor, nn

from .._dropout import Dropout
from .._sublayers import Activation

# Earlier versions compute other things under the same names, such as the norms of queries and keys in parallel blocks.
LEAST = (1, 0, 31)
if tuple(int(part) for part in timm.__version__.split(".")[:3] if part.isdigit()) < LEAST:
    raise ImportError(f"timm must be at least {'.'.join(map(str, LEAST))}; got {timm.__version__}. Upgrade it.")

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
RMS_NORMS = (nn.RMSNorm, RmsNorm, RmsNormFp32)


class Weights:
    """The parameters of a model of timm. What nobody takes is something that we do not know, and ``finish`` says so.

    Tensors that are taken are the source's own memory, and stay what they are: ``parameter`` copies. Operations between the two carry
    ``requires_grad`` along.
    """

    def __init__(self, model: nn.Module) -> None:
        self.left = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = {id(module): name for name, module in model.named_modules()}
        for module in model.modules():
            self._check_plain(module)

    def _check_plain(self, module: nn.Module) -> None:
        """Raise if a module does more than its class: what was put on it, ours would do without."""
        own = [name for name, value in vars(module).items() if callable(value) and hasattr(type(module), name)]
        if own:
            self.refuse(module, f"has a {own[0]} of its own, so nobody knows what it computes")
        hooked = [name for name in HOOKS if getattr(module, name, None)]
        for name, parameter in module.named_parameters(recurse=False):
            hooked += [f"{name}.{kind}" for kind in TENSOR_HOOKS if getattr(parameter, kind, None)]
        if hooked:
            self.refuse(module, f"has hooks ({', '.join(hooked)}), which ours would not run; remove them first")

    def refuse(self, module: nn.Module, why: str) -> NoReturn:
        """Raise, with the name that a module has in the model."""
        raise ValueError(
            f"{self.names.get(id(module)) or 'the model'} cannot be taken over: {type(module).__name__} {why}"
        )

    def finish(self) -> None:
        """Raise unless every parameter was taken."""
        if self.left:
            names = ", ".join(sorted(self.left.values()))
            raise ValueError(
                f"the model has parameters that ours has no place for: {names}. Remove what was added to it."
            )

    def take(self, parameter: Tensor) -> Tensor:
        """The values of a parameter."""
        if type(parameter) is not nn.Parameter:
            raise TypeError(
                f"weights must be plain parameters to be taken over; got {type(parameter).__name__}. Remove parametrizations first."
            )
        self.left.pop(id(parameter), None)
        return parameter.detach().requires_grad_(parameter.requires_grad)

    def affine(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear map or a convolution."""
        if type(module) not in (nn.Linear, nn.Conv2d):
            self.refuse(module, "is no nn.Linear")
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        return self.take(module.weight), None if module.bias is None else self.take(module.bias)

    def linear(self, module: nn.Module) -> nn.Linear:
        """A linear map as ours."""
        return linear(*self.affine(module))

    def norm(self, module: nn.Module, order: Tensor | None = None) -> nn.Module:
        """A norm of channels as one of torch, the channels in another order if asked for."""
        if isinstance(module, nn.Identity):
            return nn.Identity()
        if type(module) not in LAYER_NORMS + RMS_NORMS:
            self.refuse(module, "is no norm that torch has")
        shape, eps, affine = tuple(module.normalized_shape), module.eps, module.weight is not None  # type: ignore[arg-type]
        ours: nn.Module
        if type(module) in RMS_NORMS:
            ours = nn.RMSNorm(shape, eps, affine, device="meta")  # type: ignore[arg-type]
        else:
            ours = nn.LayerNorm(shape, eps, affine, module.bias is not None, device="meta")  # type: ignore[arg-type]
        for name, values in module.named_parameters():
            taken = self.take(values)
            setattr(ours, name, parameter(taken if order is None else taken[order]))
        return ours

    def activation(self, module: nn.Module) -> Activation:
        """A nonlinearity."""
        if type(module) is GELU or (type(module) is nn.GELU and module.approximate == "none"):
            return "gelu"
        if type(module) is nn.ReLU:
            return "relu"
        for values in module.parameters():
            self.take(values)
        return copy.deepcopy(module)

    def rate(self, module: nn.Module | None) -> float:
        """The probability of dropout or stochastic depth."""
        if module is None or isinstance(module, nn.Identity):
            return 0.0
        if isinstance(module, nn.Dropout):
            return float(module.p)
        if type(module) is DropPath and module.scale_by_keep:
            return float(module.drop_prob or 0.0)
        self.refuse(module, "is no dropout that we have")

    def dropout(self, module: nn.Module | None) -> Dropout:
        """Dropout as ours."""
        return Dropout(self.rate(module))


def parameter(values: Tensor) -> nn.Parameter:
    """A copy, trained if what it was made of is."""
    return nn.Parameter(values.detach().clone(), requires_grad=values.requires_grad)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with these weights."""
    ours = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    ours.weight = parameter(weight)
    if bias is not None:
        ours.bias = parameter(bias)
    return ours


def joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The rows of several linear maps of one input; those without a bias have one of 0 if others have one."""
    weight = torch.cat([rows for rows, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([rows.new_zeros(len(rows)) if bias is None else bias for rows, bias in parts])
