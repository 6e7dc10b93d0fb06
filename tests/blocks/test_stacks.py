"""Stacks of blocks equal their formulas; what is shared by their layers; saving."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import xformerlib as xf
from tests.blocks.formulas import DIM, HEADS, HIDDEN, NORMS, block_formula, normed, redrawn, tokens
from tests.closeness import assert_close
from xformerlib import masks, positions

# -- stacks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("final", [None, True, False])
def test_an_encoder_is_its_blocks_and_a_norm(norm: Any, final: bool | None) -> None:
    encoder = redrawn(xf.Encoder(DIM, 3, HEADS, norm=norm, final_norm=final, hidden=HIDDEN))
    x = y = tokens(2, 5)
    for block in encoder.blocks:
        y = block_formula(block, norm, y, None, None)
    has_norm = norm != "post" if final is None else final
    assert isinstance(encoder.norm, nn.LayerNorm) is has_norm
    assert_close(encoder(x), normed(y, encoder.norm), depth=4)


@pytest.mark.parametrize("norm", NORMS)
def test_encoder_and_decoder_are_their_formulas(norm: Any, precision: torch.dtype) -> None:
    model = xf.EncoderDecoder(DIM, HEADS, encoder_depth=2, decoder_depth=3, norm=norm, hidden=HIDDEN)
    model = redrawn(model, precision)
    source, target = x, y = tokens(2, 7, dtype=precision), tokens(2, 5, dtype=precision)
    for block in model.encoder.blocks:
        x = block_formula(block, norm, x, None, None)
    x = normed(x, model.encoder.norm)
    for block in model.decoder.blocks:
        y = block_formula(block, norm, y, x, masks.Causal().dense(xf.Sequence(5)))
    wanted = normed(y, model.decoder.norm)
    assert_close(model(source, target), wanted, depth=2 + 3 + 2)
    assert_close(model.decoder(target, context=model.encoder(source)), wanted, depth=2 + 3 + 2)
    assert_close(model(source[0], target[0]), wanted[0], depth=2 + 3 + 2)


def test_the_defaults_of_the_whole_are_the_paper() -> None:
    model = xf.EncoderDecoder()
    assert [len(stack.blocks) for stack in (model.encoder, model.decoder)] == [6, 6]
    assert (
        model.encoder.dim,
        model.encoder.blocks[0].attention.heads,
        model.encoder.blocks[0].feed_forward.hidden,
    ) == (512, 8, 2048)
    assert {block.feed_forward.activation for block in (*model.encoder.blocks, *model.decoder.blocks)} == {"relu"}
    assert {block.attention.mask for block in model.decoder.blocks} == {masks.Causal()}
    assert {block.attention.mask for block in model.encoder.blocks} == {None}
    assert isinstance(model.encoder.norm, nn.Identity)


def test_a_decoder_alone_is_a_causal_encoder() -> None:
    decoder, x = redrawn(xf.Decoder(DIM, 2, HEADS, cross=False)), tokens(2, 5)
    encoder = redrawn(xf.Encoder(DIM, 2, HEADS, mask=masks.Causal()))
    encoder.load_state_dict(decoder.state_dict())
    assert torch.equal(encoder(x), decoder(x))


def test_masks_of_each_layer_and_of_each_call() -> None:
    layers = [masks.Local(1), None, masks.Causal()]
    encoder, x, extra = redrawn(xf.Encoder(DIM, 3, HEADS, mask=layers)), tokens(2, 6), masks.Windows(4)
    for given_mask in (None, extra):
        y = x
        for block, own in zip(encoder.blocks, layers, strict=True):
            mask = masks.Full() if own is None else own
            mask = mask if given_mask is None else mask & given_mask
            y = block_formula(block, "pre", y, None, mask.dense(xf.Sequence(6)))
        assert_close(encoder(x, mask=given_mask), normed(y, encoder.norm), depth=4)


def test_masks_of_source_target_and_context() -> None:
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1))
    source, target = tokens(1, 6), tokens(1, 4)
    base = model(source, target)

    def changed(**given_masks: masks.Mask) -> bool:
        return not torch.equal(model(source, target, **given_masks), base)

    assert changed(source_mask=masks.Local(1))
    assert changed(mask=masks.Local(1))
    assert changed(context_mask=masks.Prefix(2))
    assert torch.equal(
        model(source, target, source_mask=masks.Full(), mask=masks.Causal(), context_mask=masks.Full()), base
    )
    # A source token that no target may see makes no difference, unless other source tokens look at it.
    hidden = {"source_mask": masks.Prefix(2), "context_mask": masks.Prefix(2)}
    moved = torch.cat([source[:, :2], tokens(1, 4)], 1)
    assert torch.equal(model(moved, target, **hidden), model(source, target, **hidden))
    assert not torch.equal(model(moved, target), base)


@pytest.mark.usefixtures("double")
def test_a_position_is_shared_and_a_function_makes_one_for_each_layer() -> None:
    shared = xf.Encoder(DIM, 3, HEADS, position=positions.RelativeBias(HEADS))
    own = xf.Encoder(DIM, 3, HEADS, position=lambda: positions.RelativeBias(HEADS))
    tables = [[name for name, _ in model.named_parameters() if name.endswith("table")] for model in (shared, own)]
    assert tables == [["position.table"], [f"blocks.{i}.attention.position.table" for i in range(3)]]
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        shared.position.table.normal_()
        own.load_state_dict(
            {name: value for name, value in shared.state_dict().items() if "position" not in name}, strict=False
        )
        for block in own.blocks:
            block.attention.position.table.copy_(shared.position.table)
    assert_close(own(x), shared(x), depth=4)
    with torch.no_grad():
        own.blocks[2].attention.position.table.zero_()
    assert not torch.allclose(own(x), shared(x), atol=1e-4)


@pytest.mark.usefixtures("double")
def test_a_list_mixes_positions_that_are_shared_with_those_of_each_layer() -> None:
    def table() -> positions.RelativeBias:
        return positions.RelativeBias(HEADS)

    shared, rotary = table(), positions.Rotary(DIM // HEADS)
    mixed = xf.Encoder(DIM, 2, HEADS, position=[shared, table, rotary, table])
    names = [name for name, _ in mixed.named_parameters() if name.endswith("table")]
    own = [f"blocks.{i}.attention.position.terms.{j}.table" for i in range(2) for j in range(2)]
    assert sorted(names) == sorted(["position.terms.0.table", *own])
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        for parameter in mixed.parameters():
            parameter.normal_()
    summed = xf.Encoder(DIM, 2, HEADS, position=[table])
    summed.load_state_dict({k: v for k, v in mixed.state_dict().items() if "position" not in k}, strict=False)
    summed.position = rotary
    with torch.no_grad():
        for here, there in zip(summed.blocks, mixed.blocks, strict=True):
            here.attention.position.table.copy_(sum(p.table for p in (shared, *there.attention.position)))
    assert_close(mixed(x), summed(x), depth=3)


def test_embeddings_are_added_once_and_rotations_and_biases_in_every_layer() -> None:
    position = positions.Sinusoidal(DIM) + positions.Rotary(DIM // HEADS) + positions.DistanceDecay(HEADS)
    encoder = redrawn(xf.Encoder(DIM, 2, HEADS, position=position))
    x, domain = tokens(2, 5), xf.Sequence(5)
    y = position.terms[0](x, domain)
    for block in encoder.blocks:
        y = block(y, domain, position=position.terms[1] + position.terms[2])
    assert_close(encoder(x, domain), encoder.norm(y), depth=3)
    assert not torch.allclose(encoder(x), redrawn(xf.Encoder(DIM, 2, HEADS))(x))


def test_encoder_and_decoder_learn_positions_of_their_own() -> None:
    model = xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1, position=positions.RelativeBias(HEADS))
    encoder, decoder = model.encoder.position.table, model.decoder.position.table
    assert encoder is not decoder
    assert torch.equal(encoder, decoder)
    each = xf.EncoderDecoder(
        DIM, HEADS, encoder_depth=2, decoder_depth=1, position=lambda: positions.RelativeBias(HEADS)
    )
    assert len({id(p) for name, p in each.named_parameters() if name.endswith("table")}) == 3


def test_an_activation_that_learns_is_each_blocks_own() -> None:
    activation = nn.PReLU()
    encoder = xf.Encoder(DIM, 2, HEADS, activation=activation)
    assert sum(name.endswith("activation.weight") for name, _ in encoder.named_parameters()) == 2
    assert all(block.feed_forward.activation is not activation for block in encoder.blocks)


# -- saving ----------------------------------------------------------------------------------------------------------------


def whole(position: Any) -> xf.EncoderDecoder:
    return xf.EncoderDecoder(
        DIM, HEADS, encoder_depth=2, decoder_depth=2, norm="sandwich", activation=nn.PReLU(), position=position, layer_scale=0.1,
        qk_norm="rms", gate=True, sinks=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "position",
    [
        lambda: positions.RelativeBias(HEADS) + positions.Learned(DIM, 9),
        lambda: lambda: positions.ContinuousBias(HEADS, hidden=4),
    ],
)
def test_saving_and_loading(position: Callable[[], Any], tmp_path: Path) -> None:
    model, other = redrawn(whole(position())), redrawn(whole(position()))
    source, target = tokens(2, 6), tokens(2, 5)
    wanted = model(source, target)
    assert len({value.data_ptr() for value in model.state_dict().values()}) == len(model.state_dict())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(source, target), wanted)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(source, target), wanted)
    redrawn(twin)
    assert torch.equal(model(source, target), wanted)


def test_pickling() -> None:
    model = redrawn(
        xf.Encoder(DIM, 2, HEADS, mask=masks.Local(1) | masks.Global(1), position=positions.RelativeBias(HEADS))
    )
    x = tokens(2, 5)
    wanted = model(x)  # after a call: nothing that was kept for the next one is in the way
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)


def test_domains_that_were_used_copy_and_pickle() -> None:
    model = redrawn(xf.Encoder(DIM, 1, 2, mask=masks.Local(1) | masks.Global(1), position=positions.Rotary(DIM // 2)))
    graph = xf.Graph(torch.tensor([[0, 1, 2, 0], [1, 2, 3, 2]]), 4)
    for domain in (xf.Sequence(4), xf.Sequence.packed([3, 1]), xf.Timeline(torch.rand(4)), xf.Grid(2, 2), graph):
        x = tokens(4)
        wanted = model(x, domain)
        for twin in (copy.copy(domain), copy.deepcopy(domain), pickle.loads(pickle.dumps(domain))):
            assert torch.equal(model(x, twin), wanted)


def test_masks_of_a_call_do_not_pile_up() -> None:
    model, x = xf.Encoder(DIM, 1, HEADS), torch.randn(1, 5, DIM)
    given_masks = [masks.Dense(torch.ones(5, 5, dtype=torch.bool)) for _ in range(12)]
    seen = [weakref.ref(mask.allowed) for mask in given_masks]
    for mask in given_masks:
        model(x, mask=mask)
        model(x, mask=mask & masks.Causal())
    del mask, given_masks
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 4


def test_masks_of_a_call_may_be_listed_for_each_layer() -> None:
    encoder, x = redrawn(xf.Encoder(DIM, 2, HEADS)), tokens(2, 9)
    each = [masks.Local(1), masks.Causal()]
    built = xf.Encoder(DIM, 2, HEADS, mask=each).double()
    built.load_state_dict(encoder.state_dict())
    assert_close(encoder(x, mask=each), built(x), depth=3)
    y = encoder.embed(x)
    for index, mask in enumerate(each):
        y = encoder.layer(index, y, mask=mask)
    assert_close(encoder.norm(y), built(x), depth=3)
    with pytest.raises(ValueError, match="one for each of the 2 layers; got 3"):
        encoder(x, mask=[None] * 3)
