"""Values go to JSON and back: masks, positions, domains, and models with their arguments; a config is data and runs nothing."""

from __future__ import annotations

import copy
import enum
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import xformerlib as xf
from tests.positions import cases
from tests.strategies import DOMAINS, HEADS, LEAVES, POSITIONS, ROWS, domain as any_domain, position, randoms, tree
from xformerlib import graph, masks, positions, time_series, vision
from xformerlib._names import name_of
from xformerlib.masks._algebra import Leaf, Predicate


def again(value: Any) -> Any:
    """The value after a way through JSON, as strict as JSON is."""
    return xf.from_config(json.loads(json.dumps(xf.to_config(value), allow_nan=False)))


def leaves(mask: masks.Mask) -> list[masks.Mask]:
    parts = (
        mask.parts if isinstance(mask, (masks.And, masks.Or)) else (mask.part,) if isinstance(mask, masks.Not) else ()
    )
    return [leaf for part in parts for leaf in leaves(part)] if parts else [mask]


def register_functions(mask: masks.Mask) -> None:
    for leaf in leaves(mask):
        if isinstance(leaf, masks.Where):
            masks.register(leaf.fn, name=f"function {id(leaf.fn)}")


def even(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q + k) % 2 == 0


@dataclass(frozen=True)
class Every(Leaf):
    """A leaf of a user: keys at multiples, with a tuple and a mask among its fields."""

    steps: tuple[int, ...]
    other: masks.Mask

    def allows(self, domain: xf.Domain, keys: xf.Domain) -> Predicate:
        other = self.other.allows(domain, keys)
        return lambda b, h, q, k: other(b, h, q, k) & sum(k % step == 0 for step in self.steps).bool()


class Shifted(positions.DistanceDecay):
    """A position of a user."""

    def __init__(self, heads: int, *, shift: float, scaling: positions.Scaling | None = None) -> None:
        super().__init__(heads, scale=shift)
        self.shift, self.scaling = shift, scaling


class Ring(xf.Sequence):
    """A domain of a user."""

    kind = "Sequence"

    def __init__(self, length: int) -> None:
        super().__init__(length)

    def _given(self) -> dict[str, Any]:
        return {"length": self.length}


def relative() -> positions.RelativeBias:
    return positions.RelativeBias(4, size=(3, 3))


# -- masks -----------------------------------------------------------------------------------------------------------------


@given(randoms)
def test_masks_mean_the_same_on_their_domains(rng: Random) -> None:
    where = any_domain(rng)
    mask = tree(rng, where.whole)
    register_functions(mask)
    read = again(mask)
    assert type(read) is type(mask)
    assert repr(read) == repr(mask)
    assert read.to_config() == mask.to_config()
    sizes = {"batch_size": ROWS, "heads": HEADS}
    if where.batch_size is None and mask.extent() == masks.Full().extent():
        sizes = {}
    if where.batch_size in (None, ROWS):
        assert torch.equal(read.dense(where, **sizes), mask.dense(where, **sizes))


@pytest.mark.parametrize("kind", sorted(LEAVES, key=lambda kind: kind.__name__))
def test_values_without_tensors_are_equal_again(kind: type[Leaf]) -> None:
    where = xf.Graph(torch.tensor([[0], [1]]), 2) if kind is masks.Edges else xf.Grid(3, 3)
    mask = LEAVES[kind](Random(3), where)
    register_functions(mask)
    read = again(mask)
    assert type(read) is type(mask)
    assert (read == mask) == (getattr(mask, "device", None) is None)
    assert masks.from_config(mask.to_config()).to_config() == mask.to_config()
    assert (again(~mask | masks.Full()) == (~mask | masks.Full())) == (getattr(mask, "device", None) is None)


def test_tensors_keep_dtype_and_shape() -> None:
    ids = torch.tensor([[0, 0, 2**40]])
    assert again(masks.Segments(ids, torch.zeros(1, 0, dtype=torch.int32))).key_ids.shape == (1, 0)
    assert torch.equal(again(masks.Segments(ids)).ids, ids)
    odd = {"x": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-300], dtype=torch.float64)}
    assert torch.equal(again(odd)["x"].isnan(), odd["x"].isnan())
    assert torch.equal(again(odd)["x"][1:], odd["x"][1:])
    for dtype in (torch.float16, torch.bfloat16, torch.uint8, torch.bool):
        x = torch.randn(2, 0, 3).to(dtype)
        assert again(x).shape == x.shape and again(x).dtype == dtype
    x = torch.randn(3).bfloat16()
    assert torch.equal(again(x), x)
    assert again(float("inf")) == float("inf")


def test_tensors_come_back_where_they_are_asked_for() -> None:
    config = masks.Keys(torch.tensor([True, False])).to_config()
    with torch.device("meta"):
        assert masks.from_config(config).valid.is_meta


def test_functions_are_refused_until_they_have_a_name() -> None:
    def odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + k) % 2 == 1

    mask = masks.Causal() & masks.Where(odd)
    with pytest.raises(TypeError, match=r"registered by name.*odd.*register"):
        mask.to_config()
    masks.register(odd, name="odd, of a test")
    assert again(mask) == mask


def test_a_registered_leaf_is_read_again() -> None:
    mask = Every((2, 3), masks.Local(2)) | masks.Global(1)
    with pytest.raises(TypeError, match="Every must be registered by name"):
        mask.to_config()
    masks.register(Every, name="mine.Every")
    assert again(mask) == mask
    assert mask.to_config()["parts"][0]["class"] == "mine.Every"


# -- domains ---------------------------------------------------------------------------------------------------------------


@given(randoms)
def test_domains_say_the_same_of_their_tokens(rng: Random) -> None:
    where = any_domain(rng)
    read = again(where)
    assert type(read) is type(where)
    assert repr(read) == repr(where)
    assert read.to_config() == where.to_config()
    for fact in ("num_tokens", "prefix", "batch_size", "num_items", "kind", "ndim"):
        assert getattr(read, fact) == getattr(where, fact)
    for fact in ("valid", "offsets", "coordinates"):
        ours, theirs = getattr(read, fact), getattr(where, fact)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert torch.equal(masks.Global(1).dense(read), masks.Global(1).dense(where))


@pytest.mark.parametrize("name", cases.DOMAINS)
def test_every_kind_of_domain(name: str) -> None:
    where = cases.domain(name)
    read = xf.Domain.from_config(where.to_config())
    assert torch.equal(read.coordinates, where.coordinates)
    piece = where._ranked_from(3)
    assert again(piece)._rank_offset == 3


def test_graphs_keep_the_features_of_edges() -> None:
    edges = torch.tensor([[0, 1], [1, 2]])
    where = xf.Graph(
        edges, 4, edge_attr=torch.randn(2, 3), virtual_nodes=1, num_graphs=3, batch=torch.tensor([0, 0, 0, 1])
    )
    read = again(where)
    assert torch.equal(read.edge_attr, where.edge_attr)
    assert read.num_graphs == 3 and read.prefix == 1
    assert torch.equal(again(xf.Graph(torch.zeros(2, 0).long(), 0)).sizes, torch.tensor([0]))


def test_a_registered_domain_is_read_again() -> None:
    xf.register(Ring)
    assert again(Ring(5)) == Ring(5) and type(again(Ring(5))) is Ring


# -- positions -------------------------------------------------------------------------------------------------------------


def same_position(read: Any, given: Any) -> None:
    assert type(read) is type(given)
    assert repr(read) == repr(given)
    assert xf.to_config(read) == xf.to_config(given)
    read.load_state_dict(given.state_dict())


@pytest.mark.parametrize("name", cases.DOMAINS)
def test_positions_are_made_with_the_same_arguments(name: str) -> None:
    where = cases.domain(name)
    for given_ in (*cases.embeddings(where), *cases.rotations(where), *cases.biases(where)):
        same_position(again(given_), given_)


@given(randoms)
def test_sums_of_positions(rng: Random) -> None:
    where = any_domain(rng).whole
    one, two = (position(rng, 4, 24, where) for _ in range(2))
    if one is not None and two is not None:
        same_position(again(one + two), one + two)
    for read, given_ in zip(again([one, two]), [one, two], strict=True):
        assert xf.to_config(read) == xf.to_config(given_)


def test_arguments_of_positions() -> None:
    yarn = positions.YaRN(8.0, original_length=4096, beta_fast=16.0)
    rotary = positions.Rotary(8, scaling=yarn, fraction=0.5)
    assert again(rotary).scaling == yarn and again(yarn) == yarn
    assert again(positions.Learned(8, (3, 4), prefix=1)).size == (3, 4)
    assert again(positions.Learned(8, 12)).size == 12
    positions.register(Shifted, name="mine.Shifted")
    mine = Shifted(4, shift=2.0, scaling=positions.NTK(2.0))
    read = positions.from_config(json.loads(json.dumps(mine.to_config())))
    assert read.shift == 2.0 and read.scaling == positions.NTK(2.0) and read.scale == 2.0


def test_no_position_is_forgotten() -> None:
    assert set(POSITIONS) and all(name_of(kind) == f"positions.{kind.__name__}" for kind in POSITIONS)
    assert set(DOMAINS)


# -- models ----------------------------------------------------------------------------------------------------------------

MASK = masks.Local(3) | masks.Global(1)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "Encoder": lambda: xf.Encoder(16, 2, heads=4, mask=[MASK, None], position=positions.Rotary(4), norm="post"),
    "Decoder": lambda: xf.Decoder(16, 2, 4, cross=False, position=positions.Sinusoidal(16) + positions.DistanceDecay(4)),
    "EncoderDecoder": lambda: xf.EncoderDecoder(16, 4, encoder_depth=2, decoder_depth=1),
    "Block": lambda: xf.Block(16, 4, mask=MASK, activation="swiglu"),
    "Pooling": lambda: xf.Pooling(16, "attention", heads=2),
    "ViT": lambda: vision.ViT(
        10, size=16, patch=4, dim=16, depth=2, heads=4, mask=MASK, position=["learned", positions.Rotary(4)],
        embed=vision.ConvStem(16, layers=2), pool=xf.Pooling(16, "mean"), norm_layer=partial(nn.LayerNorm, eps=1e-3),
    ),
    "Swin": lambda: vision.Swin(5, window=(4, 2), dim=8, depths=(2, 2), heads=(2, 4)),
    "Swin of windows": lambda: vision.Swin(5, window=[(4, 2), 3], dim=8, depths=(2, 2), heads=(2, 4), version=2),
    "MaskedAutoencoder": lambda: vision.MaskedAutoencoder(
        vision.ViT(None, size=16, patch=4, dim=16, depth=1, heads=4), decoder_dim=8, decoder_depth=1, decoder_heads=2
    ),
    "PatchTST": lambda: time_series.PatchTST(3, 32, 8, dim=16, depth=1, heads=2, head=time_series.Quantile((0.1, 0.5, 0.9))),
    "ITransformer": lambda: time_series.ITransformer(3, 32, 8, dim=16, depth=1, heads=2),
    "GraphTransformer": lambda: graph.GraphTransformer(
        7, 16, 3, 2, 4, mask=masks.Edges() | masks.Global(1), pool="mean", virtual_nodes=1, position=graph.RandomWalkBias(4, 3)
    ),
    "GPS": lambda: graph.GPS(7, 16, 3, num_layers=2, heads=4),
    "Graphormer": lambda: graph.Graphormer(7, 16, 3, num_layers=2, heads=4),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_are_made_with_the_same_arguments(name: str) -> None:
    model = MODELS[name]()
    read = again(model)
    assert repr(read) == repr(model)
    read.load_state_dict(model.state_dict())
    assert xf.to_config(read) == xf.to_config(model)


def test_a_config_may_be_given_in_place_of_a_value() -> None:
    config = json.loads(
        json.dumps(xf.to_config({"mask": MASK, "position": [positions.Rotary(4), positions.DistanceDecay(4)]}))
    )
    ours, x = xf.Encoder(16, 2, 4, **config), torch.randn(2, 9, 16)
    theirs = xf.Encoder(16, 2, 4, mask=MASK, position=[positions.Rotary(4), positions.DistanceDecay(4)])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert ours.to_config() == theirs.to_config()


def test_a_model_of_ones_own_keeps_its_own_arguments() -> None:
    class Small(vision.ViT):
        def __init__(self, classes: int, mask: masks.Mask) -> None:
            super().__init__(classes, size=16, patch=4, dim=16, depth=1, heads=4, mask=mask)

    model = Small(3, mask=MASK)
    with pytest.raises(TypeError, match="Small must be registered"):
        model.to_config()
    xf.register(Small, name="mine.Small")
    assert model.to_config() == {"xformerlib": 1, "class": "mine.Small", "classes": 3, "mask": masks_alone(MASK)}
    assert again(model).head.out_features == 3


def masks_alone(mask: masks.Mask) -> dict[str, Any]:
    return {name: value for name, value in mask.to_config().items() if name != "xformerlib"}


def test_functions_and_modules_among_the_arguments() -> None:
    model = xf.Encoder(16, 2, 4, position=lambda: positions.RelativeBias(4, size=3))
    with pytest.raises(TypeError, match="registered by name"):
        model.to_config()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in copies:
        with pytest.raises(TypeError, match="registered by name"):
            one.to_config()
    with pytest.raises(TypeError, match="SiLU"):
        xf.FeedForward(8, activation=nn.SiLU()).to_config()
    xf.register(relative, name="relative, of a test")
    model = vision.ViT(3, size=12, patch=4, dim=16, depth=1, heads=4, position=relative)
    assert again(pickle.loads(pickle.dumps(model))).to_config() == model.to_config()
    made = xf.Encoder(16, 2, 4, position=partial(positions.RelativeBias, 4, size=5), norm_layer=nn.RMSNorm)
    assert repr(again(made)) == repr(made)


def _adapted(model: nn.Module) -> None:
    model.encoder.blocks[0].attention.qkv = nn.Sequential(model.encoder.blocks[0].attention.qkv)


def test_a_list_that_changes_later_is_not_in_the_config() -> None:
    depths = [1, 1]
    model = vision.Swin(3, window=4, dim=8, depths=depths, heads=(2, 2))
    depths.append(5)
    assert model.to_config()["depths"] == [1, 1]


REPLACED: dict[str, Callable[[Any], Any]] = {
    "head": lambda model: setattr(model, "head", nn.Linear(16, 7)),
    "adapter": _adapted,
    "removed": lambda model: setattr(model.encoder.blocks[1], "feed_forward", nn.Identity()),
    "mask": lambda model: setattr(model.encoder.blocks[0].attention, "mask", masks.Causal()),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.head),
}


@pytest.mark.parametrize("how", REPLACED)
def test_replaced_parts_are_refused(how: str) -> None:
    model = vision.ViT(3, size=16, patch=8, dim=16, depth=2, heads=2)
    state = torch.get_rng_state()
    model.to_config()
    assert torch.equal(torch.get_rng_state(), state)
    REPLACED[how](model)
    with pytest.raises(TypeError, match="parts were replaced since"):
        model.to_config()


def test_layers_that_wait_for_their_first_call_are_no_replacement() -> None:
    model = graph.GraphTransformer(-1, 8, 3, 1, 2)
    before = model.to_config()
    model(torch.randn(4, 5), torch.tensor([[0, 1], [1, 2]]))
    assert model.to_config() == before


def test_copies_describe_themselves() -> None:
    model = MODELS["ViT"]()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert one.to_config() == model.to_config()


@given(randoms)
def test_checkpoints_of_arguments_are_only_data(rng: Random) -> None:
    where = any_domain(rng).whole
    mask = tree(rng, where)
    if any(isinstance(leaf, masks.Where) for leaf in leaves(mask)):
        mask = masks.Full()
    given_ = {"mask": mask, "position": position(rng, 4, 24, where), "domain": where, "size": (1, [2, None])}
    file = io.BytesIO()
    torch.save(given_, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert xf.to_config(read) == xf.to_config(given_)
    file = io.BytesIO()
    torch.save(xf.to_config(given_), file)
    file.seek(0)
    assert xf.from_config(torch.load(file, weights_only=True))["mask"].to_config() == mask.to_config()


# -- what is refused -------------------------------------------------------------------------------------------------------

LOCAL = masks.Local(3).to_config()


class Size(enum.IntEnum):
    SMALL = 3


def test_members_of_enumerations_are_written_as_their_numbers() -> None:
    written = xf.to_config({"size": Size.SMALL})
    assert written == {"size": 3} and type(written["size"]) is int


def test_tensors_of_eight_bits_keep_infinities() -> None:
    x = torch.tensor([1.0, float("inf"), -2.0]).to(torch.float8_e5m2)
    again = xf.from_config(json.loads(json.dumps(xf.to_config(x))))
    assert again.dtype == x.dtype and torch.equal(again.float(), x.float())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**LOCAL, "class": "masks.Lokal"}, "masks.Lokal"),
        ({**LOCAL, "class": "os.system"}, "os.system"),
        ({**LOCAL, "class": "torch.load"}, "torch.load"),
        ({**LOCAL, "class": "masks._algebra.And"}, "masks._algebra.And"),
        ({**LOCAL, "class": "masks.Mask"}, "masks.Mask"),
        ({**LOCAL, "class": "positions.Position"}, "args|radius"),
        ({**LOCAL, "class": "vision.torch"}, "vision.torch"),
        ({**LOCAL, "class": "__import__('os')"}, "__import__"),
        ({**LOCAL, "class": "torch.nn.Linear"}, "torch.nn.Linear"),
        ({**LOCAL, "class": "graph.NeighborSampler"}, "NeighborSampler"),
        ({**LOCAL, "class": ["masks.Local"]}, "masks.Local"),
        ({**LOCAL, "class": None}, "None"),
        ({**LOCAL, "xformerlib": 2}, "2"),
        ({**LOCAL, "xformerlib": "1"}, "'1'"),
        ({**LOCAL, "xformerlib": True}, "True"),
        (masks_alone(masks.Local(3)), "None"),
        ({**LOCAL, "colour": "red"}, "colour"),
        ({"xformerlib": 1, "class": "masks.Local"}, "radius"),
        ({**LOCAL, "radius": -1}, "radius"),
        ({"xformerlib": 1, "class": "masks.Where", "fn": {"function": "os.system"}}, "os.system"),
        ({"xformerlib": 1, "class": "masks.Where", "fn": {"function": "builtins.eval"}}, "eval"),
        ({"xformerlib": 1, "class": "masks.Where", "fn": "lambda b, h, q, k: q > k"}, "fn"),
        ({"xformerlib": 1, "class": "masks.Where", "fn": {"partial": "os.system", "arguments": [], "keywords": {}}}, "os"),
        ({"xformerlib": 1, "class": "masks.Or", "parts": [1, 2]}, "int"),
        ({"xformerlib": 1, "class": "masks.And", "parts": []}, "parts"),
        ({"xformerlib": 1, "class": "masks.Not", "part": 3}, "int"),
        ({"xformerlib": 1, "class": "masks.Keys", "valid": {"tensor": [True], "dtype": "load", "shape": [1]}}, "load"),
        ({"xformerlib": 1, "class": "masks.Keys", "valid": {"tensor": [True]}}, "tensor"),
        ({"xformerlib": 1, "class": "domains.Subset", "whole": 3, "index": [1]}, "whole"),
        ({"xformerlib": 1, "class": "domains.Sequence", "length": "3"}, "length"),
        ("masks.Local(3)", "Mask; got a str"),
        (None, "NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_config_is_refused(config: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?s).*" + says.replace("(", r"\(")):
        masks.Mask.from_config(config)


def test_kinds_are_not_confused() -> None:
    with pytest.raises(TypeError, match="Domain; got a Local"):
        xf.Domain.from_config(LOCAL)


def test_names_are_not_taken_twice() -> None:
    with pytest.raises(ValueError, match=r"which .* has"):
        xf.register(even, name="masks.Local")
    xf.register(even, name="even, of a test")
    assert xf.register(even, name="even, of a test") is even
    with pytest.raises(ValueError, match="must be new"):
        xf.register(relative, name="even, of a test")
    with pytest.raises(ValueError, match="name must be"):
        xf.register(lambda b, h, q, k: q > k)
    with pytest.raises(TypeError, match="function or a class"):
        xf.register(3)  # type: ignore[type-var]
