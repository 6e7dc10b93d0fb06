"""PatchTST and ITransformer beyond the contract: what is theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import xformerlib as xf
from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, positions, time_series as ts

pytestmark = pytest.mark.usefixtures("double")


def small(model: type[ts.ForecastModel], **options: object) -> ts.ForecastModel:
    sizes = {"dim": 8, "depth": 2, "heads": 2, "hidden": 16}
    if model is ts.PatchTST:
        sizes |= {"patch": 6, "stride": 3}
    built = model(3, 24, 6, **{**sizes, **options})
    redraw(built)
    return built.eval()


@pytest.mark.parametrize("model", [ts.PatchTST, ts.ITransformer])
def test_forecasts_move_with_level_and_scale(model: type[ts.ForecastModel]) -> None:
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    model, x = small(model), 1e6 * torch.randn(2, 24, 3)
    assert_close(model(100 * x + 7e6), 100 * model(x) + 7e6)


def test_channels_of_patchtst_do_not_see_each_other() -> None:
    model, x = small(ts.PatchTST), torch.randn(2, 24, 3)
    other = x.clone()
    other[..., 1:] = torch.randn(2, 24, 2)
    assert_close(model(other)[..., 0], model(x)[..., 0])
    assert_close(model(x[..., [2, 0, 1]]), model(x)[..., [2, 0, 1]])


def test_patchtst_is_its_formula(precision: torch.dtype) -> None:
    model, x = small(ts.PatchTST, dropout=0.0), torch.randn(2, 24, 3)
    level, scale = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = ((x - level) / scale).transpose(1, 2)
    z = torch.cat([z, z[..., -1:].repeat(1, 1, 3)], -1)
    forecast = torch.empty(2, 6, 3)
    for b in range(2):
        for c in range(3):
            cut = torch.stack([z[b, c, start : start + 6] for start in range(0, 22, 3)])
            tokens = model.encoder(model.embed(cut) + model.position.table)
            forecast[b, :, c] = model.project(tokens.flatten()) * scale[b, 0, c] + level[b, 0, c]
    assert_close(model(x), forecast)


def test_the_size_of_the_papers_models() -> None:
    assert len(ts.PatchTST(1, 336, 96, dim=16, heads=4, hidden=128).position.table) == 42
    encoder = ts.PatchTST(1, 336, 96).encoder
    assert len(encoder.blocks) == 3 and encoder.dim == 128
    assert all(
        isinstance(m, ts.TokenBatchNorm) for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    )
    assert ts.PatchTST(1, 512, 96).project.in_features == 64 * 128
    with pytest.raises(ValueError, match="patch must be <= lookback; got patch=16 and lookback=12"):
        ts.PatchTST(1, 12, 6)


def test_a_patch_that_does_not_exist_is_not_in_the_statistics_of_batch_norm() -> None:
    """What is trained on a series with a hole is what is trained on the patches that are there, however many holes stand beside."""
    model = small(ts.PatchTST, dropout=0.0).train()
    again = copy.deepcopy(model)
    x = torch.randn(2, 24, 3)
    x[:, 6:18, 1] = torch.nan
    model(x)
    nothing = torch.full((5, 24, 3), torch.nan)
    again(torch.cat([x, nothing]))
    for (name, a), b in zip(model.named_buffers(), again.buffers(), strict=True):
        assert_close(a, b, name)
    assert not torch.equal(model.encoder.blocks[0].attention_residual.norm.running_mean, torch.zeros(8))


def test_a_hidden_patch_is_attended_to_by_nobody() -> None:
    model, x = small(ts.PatchTST), torch.randn(1, 24, 3)
    x[:, :6, 0] = torch.nan  # just the first patch of the first channel, and half of the second
    before = model(x)
    with torch.no_grad():
        model.position.table[0] += 100.0
    after = model(x)
    assert_close(after[..., 0], before[..., 0])
    assert not torch.allclose(after[..., 1], before[..., 1])


def test_token_batch_norm_is_that_of_torch() -> None:
    norm, plain, x = ts.TokenBatchNorm(4), nn.BatchNorm1d(4), torch.randn(3, 5, 4)
    assert_close(norm(x), plain(x.transpose(1, 2)).transpose(1, 2))
    assert_close(norm.running_var, plain.running_var)
    assert norm(x[0]).shape == (5, 4)


def test_variables_of_itransformer_have_no_order(precision: torch.dtype) -> None:
    model, x = small(ts.ITransformer), torch.randn(2, 24, 3)
    assert_close(model(x[..., [2, 0, 1]]), model(x)[..., [2, 0, 1]])
    other = x.clone()
    other[..., 1] = torch.randn(2, 24)
    assert not torch.allclose(model(other)[..., 0], model(x)[..., 0])


def test_a_variable_without_values_is_attended_to_by_nobody_and_is_forecast_from_the_others() -> None:
    model, x = small(ts.ITransformer), torch.randn(2, 24, 3)
    x[0, :, 1] = torch.nan
    forecast = model(x)
    alone = small(ts.ITransformer)
    alone.load_state_dict(model.state_dict())
    alone.channels = 2
    assert_close(forecast[:1, :, [0, 2]], alone(x[:1, :, [0, 2]]))
    x[0, :, 0] += torch.randn(24)
    assert not torch.allclose(model(x)[0, :, 1], forecast[0, :, 1])


@torch.no_grad()  # under autograd Dynamo warns of itself at graph breaks
def test_compiled_itransformer_agrees() -> None:
    torch.compiler.reset()
    model, x = small(ts.ITransformer), torch.randn(2, 24, 3)
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(x), model(x))
    x[0, :12] = torch.nan
    x[1, :, 0] = torch.nan
    assert_close(compiled(x), model(x))


@pytest.mark.parametrize("train", [False, True])
def test_patchtst_compiles_to_one_graph_whatever_is_missing(train: bool) -> None:
    """The graph weighs tokens by whether they exist, where eager code picks those that do: outputs, gradients and statistics agree."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model = small(ts.PatchTST, dropout=0.0).train(train)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    whole = torch.randn(2, 24, 3)
    holes = whole.clone()
    holes[0, :12] = torch.nan
    holes[1, :, 0] = torch.nan
    for x in (whole, holes, torch.full_like(whole, torch.nan)):
        if train and x.isnan().all():
            continue  # eager batch norm refuses to learn from nothing
        got, want = compiled(x), plain(x)
        assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
    wanted = [parameter.grad for parameter in plain.parameters()]
    # The gradient of a number that softmax or a norm takes away again is rounding of the others.
    scale = max(float(grad.abs().max()) for grad in wanted)
    assert_close([parameter.grad for parameter in model.parameters()], wanted, "gradient", depth=4, scale=scale)
    for (name, c), d in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_close(c, d, name)
    assert counter.frame_count == 1


def test_positions_of_blocks_are_those_of_the_patches_that_are_left() -> None:
    """Rotations tell how far patches are apart, holes between them included."""
    block = {"position": positions.Rotary(4), "norm_layer": "layer"}
    model, x = small(ts.PatchTST, block=block, dropout=0.0), torch.randn(1, 24, 3)
    x[:, 6:18] = torch.nan
    z, observed = ts.instance_norm(x)[0], ~x.isnan()
    got = model.encode(z, observed)
    exists = ts.patches(observed.transpose(1, 2)[0], 6, 3, pad_end=True).any(-1)
    tokens = model.position(model.embed(ts.patches(z.transpose(1, 2)[0], 6, 3, pad_end=True)), xf.Sequence(8))
    want = model.encoder(tokens, mask=masks.Keys(exists)) * exists[..., None]
    assert not exists.all()
    assert_close(got, want)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("train", [True, False])
def test_token_batch_norm_leaves_out_what_does_not_exist(
    options: dict[str, Any], train: bool, precision: torch.dtype
) -> None:
    lengths, norm = [5, 0, 2], ts.TokenBatchNorm(4, **options).train(train)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    packed, domain = copy.deepcopy(norm), xf.Sequence.padded(lengths)
    assert domain.valid is not None
    for scale in (1.0, 3.0):
        x = (scale * torch.randn(3, 5, 4)).masked_fill(~domain.valid[..., None], torch.nan)
        got, want = norm(x, domain)[domain.valid], packed(x[domain.valid], xf.Sequence.packed(lengths))
        assert_close(got, want)
    for a, b in zip(norm.buffers(), packed.buffers(), strict=True):
        assert_close(a, b)


def test_padding_is_not_in_the_statistics_of_an_encoder() -> None:
    encoder = xf.Encoder(8, 2, 2, norm="post", norm_layer=ts.TokenBatchNorm, final_norm=True)
    other, x = copy.deepcopy(encoder), torch.randn(3, 5, 8)
    short, long = xf.Sequence.padded([5, 1, 2]), xf.Sequence.padded([5, 1, 2], length=9)
    longer = torch.cat([x, torch.full((3, 4, 8), 1e3)], 1)
    assert_close(encoder(x, short), other(longer, long)[:, :5])
