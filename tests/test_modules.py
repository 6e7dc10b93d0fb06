"""Modules are torch's: whatever users do to the layers of any model works on ours. Every public module is tried."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import xformerlib
from tests.closeness import assert_close
from tests.modules import CASES, layers_of, tensors_of, total
from xformerlib import graph, positions, time_series, vision
from xformerlib._projection import is_plain

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ALL = pytest.mark.parametrize("name", CASES)
LINEAR = [name for name, case in CASES.items() if any(type(part) is nn.Linear for part in case.make().modules())]
WITH_LINEAR = pytest.mark.parametrize("name", LINEAR)
# Bases, parts that have no parameters of their own and are met within others, and modules whose call is not of tensors.
NOT_BY_THEMSELVES = {
    "Position", "Embedding", "Rotation", "Bias", "Tokenizer", "GraphModel", "ForecastModel", "StepwiseModel", "SeasonalNaive",
    "Time2Vec", "TokenBatchNorm", "AttentionPooling", "CausalConvolution", "BondEncoder", "PathBias", "ExpanderAttention",
    "RandomWalkBias", "Classifier",
}  # fmt: skip


def _made(name: str) -> nn.Module:
    """The module, its parameters drawn anew: at initialisation some have no share in the output."""
    torch.manual_seed(0)
    module = CASES[name].make()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if type(part) is nn.Linear}


def _output(name: str, module: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return total(CASES[name].call(module))


def _two_steps(name: str, module: nn.Module) -> None:
    """Two steps of training, which change the output."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = _output(name, module)
        loss.backward()
        optimizer.step()
    assert float(_output(name, module)) != float(loss)


def test_every_public_module_is_here() -> None:
    public = {
        name
        for package in (xformerlib, vision, graph, time_series, positions)
        for name, thing in vars(package).items()
        if isinstance(thing, type) and issubclass(thing, nn.Module)
    }
    assert {name.partition(",")[0] for name in CASES} >= public - NOT_BY_THEMSELVES


def nothing(*_: Any) -> None:
    return None


WATCHED: dict[str, Callable[[nn.Linear], Any]] = {
    "forward": lambda layer: layer.register_forward_hook(nothing),
    "forward pre": lambda layer: layer.register_forward_pre_hook(nothing),
    "backward": lambda layer: layer.register_full_backward_hook(nothing),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(nothing),
    "forward replaced": lambda layer: setattr(layer, "forward", layer.forward),
    "compiled": lambda layer: layer.compile(),
    "parametrised": parametrizations.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "on meta": lambda layer: layer.to("meta"),
}


@pytest.mark.parametrize("how", WATCHED)
def test_a_layer_that_is_watched_is_not_plain(how: str) -> None:
    layer = nn.Linear(3, 4)
    assert is_plain(layer)
    WATCHED[how](layer)
    assert not is_plain(layer)


@ALL
def test_every_layer_is_called(name: str) -> None:
    module, seen = _made(name), set()
    layers = layers_of(module)

    def mark(kind: str, key: str) -> Callable[..., None]:
        return lambda *_: seen.add((kind, key))

    for key, part in layers.items():
        part.register_forward_pre_hook(mark("before", key))
        part.register_forward_hook(mark("after", key))
        part.register_full_backward_pre_hook(mark("before backward", key))
        part.register_full_backward_hook(mark("backward", key))
    _output(name, module).backward() if layers else _output(name, module)
    unused = {"encoder.head", "model.project"}  # of the model that is pre-trained, for later
    kinds = ("before", "after", "before backward", "backward")
    assert {(kind, key) for kind in kinds for key in layers if key not in unused} <= seen


@WITH_LINEAR
def test_global_hooks_see_every_linear_layer(name: str) -> None:
    module, seen = _made(name), set()
    handle = nn.modules.module.register_module_forward_hook(lambda part, *_: seen.add(part))
    try:
        _output(name, module)
    finally:
        handle.remove()
    unused = {"encoder.head", "model.project"}
    assert {part for key, part in _linears(module).items() if key not in unused} <= seen


class Lora(nn.Module):
    """A low-rank adapter in place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@WITH_LINEAR
def test_a_replaced_layer_is_used(name: str) -> None:
    for key in _linears(_made(name)):
        if key in ("encoder.head", "model.project"):
            continue
        module = _made(name)
        before = _output(name, module)
        adapter = Lora(module.get_submodule(key))  # type: ignore[arg-type]
        module.set_submodule(key, adapter)
        after = _output(name, module)
        after.backward()
        assert float(before) != float(after), f"an adapter on {key} changed nothing"
        assert adapter.up.weight.grad is not None, key


@WITH_LINEAR
@pytest.mark.usefixtures("double")
def test_a_replaced_forward_is_used(name: str) -> None:
    module, seen = _made(name), set()
    linears = {key: part for key, part in _linears(module).items() if key not in ("encoder.head", "model.project")}
    before = _output(name, module)
    for key, part in linears.items():
        own = part.forward

        def forward(x: Tensor, own: Any = own, key: str = key) -> Tensor:
            seen.add(key)
            return own(x)

        part.forward = forward  # type: ignore[method-assign]
    assert_close(_output(name, module), before, "output", depth=20, scale=100.0)
    assert seen == set(linears)


# peft replaces layers within a model, so a module must be more than its layer.
@pytest.mark.parametrize("name", [name for name in LINEAR if "" not in _linears(CASES[name].make())])
@pytest.mark.usefixtures("double")
def test_lora_of_peft_trains_and_merges(name: str) -> None:
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]

    module = _made(name).eval()
    names = [key for key in _linears(module) if key not in ("encoder.head", "model.project")]
    adapted = get_peft_model(module, LoraConfig(r=2, target_modules="|".join(map(re.escape, names))))
    adapted.eval()
    _two_steps(name, adapted.base_model.model)
    trained = [key for key, p in adapted.named_parameters() if "lora_B" in key and not bool(p.any())]
    assert not trained, f"no gradient reached {trained}"
    output = _output(name, adapted.base_model.model)
    assert_close(_output(name, adapted.merge_and_unload()), output, "adapted and merged", depth=20, scale=100.0)


@WITH_LINEAR
@pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrisation", "spectral_norm"])
def test_layers_with_other_weights_train(name: str, how: str) -> None:
    module = _made(name)
    for part in _linears(module).values():
        if how == "prune":
            prune.l1_unstructured(part, "weight", 0.5)
        elif how == "weight_norm":
            nn.utils.weight_norm(part)
        elif how == "parametrisation":
            parametrizations.weight_norm(part)
        else:
            parametrizations.spectral_norm(part)
    _two_steps(name, module)


def _tensors(name: str, module: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    return tensors_of(CASES[name].call(module))


def _assert_same_but_for_int8(name: str, module: nn.Module, want: list[Tensor]) -> None:
    """Weights lose all but 8 bits, and what a layer is given may: some per cent, where parameters are as large as here."""
    for got, one in zip(_tensors(name, module), want, strict=True):
        assert float((got - one).abs().mean()) <= 0.1 * float(one.abs().mean())


@WITH_LINEAR
def test_dynamic_quantisation_runs(name: str) -> None:
    module = _made(name).eval()
    with torch.no_grad():
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
        _assert_same_but_for_int8(name, quantised, _tensors(name, module))


@WITH_LINEAR
def test_int8_of_torchao_runs(name: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    module = _made(name).eval()
    with torch.no_grad():
        want = _tensors(name, module)
        quantize_(module, Int8WeightOnlyConfig())
        _assert_same_but_for_int8(name, module, want)


# accelerate brings weights to a module when it is called; a MaskedAutoencoder uses its encoder in two parts, of which neither is a call.
@pytest.mark.parametrize("name", [name for name in LINEAR if name != "MaskedAutoencoder"])
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_brought_back(name: str, where: str) -> None:
    from accelerate import cpu_offload, disk_offload  # type: ignore[import-not-found]

    module = _made(name).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = _output(name, module)
        if where == "cpu":
            cpu_offload(module, execution_device=torch.device("cpu"))
        else:
            disk_offload(module, folder, execution_device=torch.device("cpu"))
        assert_close(_output(name, module), want, "offloaded", depth=20, scale=100.0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if list(case.make().parameters())])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """``DistributedDataParallel`` waits for one from each."""
    module = _made(name)
    _output(name, module).backward()
    assert [key for key, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
