"""The whole matrix: every mask, on every domain, with every position and option, through every kernel, against the oracle.

Cases are generated; there is no list of what works. Inputs hold NaN wherever nobody may look.
"""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from hypothesis import given, settings

import xformerlib as xf
from tests.closeness import assert_close, largest
from tests.strategies import DOMAINS, HEADS, POSITIONS, ROWS, position, randoms, tree
from xformerlib import kernels, masks, positions

KV_HEADS, DIM, VALUE_DIM = 2, 4, 3


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, what: str, condition: float = 1, depth: int = 1):
    """Inputs are about 1, and so are the numbers that results are sums of, however small these are."""
    assert got.isfinite().all(), what
    assert_close(got, want, what, depth=depth, condition=condition, scale=max(1.0, largest(want)), dtype=dtype)


def inputs(
    rng: Random, where: xf.Domain, keys: xf.Domain, mask: masks.Mask, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Queries, keys and values, NaN where a query sees nothing and where a key is seen by nobody."""
    shapes = {"query": (HEADS, where, DIM), "key": (KV_HEADS, keys, DIM), "value": (KV_HEADS, keys, VALUE_DIM)}
    result = {
        name: torch.randn(ROWS, heads, at.num_tokens, dim, dtype=dtype) for name, (heads, at, dim) in shapes.items()
    }
    allowed = mask.dense(where, keys, batch_size=ROWS, heads=HEADS).expand(
        ROWS, HEADS, where.num_tokens, keys.num_tokens
    )
    hidden = ~allowed.any(-2).unflatten(1, (KV_HEADS, -1)).any(2)
    result["query"].masked_fill_(~allowed.any(-1)[..., None], float("nan"))
    result["key"].masked_fill_(hidden[..., None], float("nan"))
    result["value"].masked_fill_(hidden[..., None], float("nan"))
    return {name: tensor.requires_grad_() for name, tensor in result.items()}


def run(tensors: dict[str, torch.Tensor], modules: list, seed: int, **options) -> dict[str, torch.Tensor]:
    """Output and gradients of a random projection of it, by name."""
    leaves = {
        **tensors,
        **{f"{n}.{name}": p for n, module in enumerate(modules) for name, p in module.named_parameters()},
    }
    extra = {"sinks": options["sinks"]} if options.get("sinks") is not None else {}
    out = xf.attention(tensors["query"], tensors["key"], tensors["value"], **options)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    wanted = {name: leaf for name, leaf in {**leaves, **extra}.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), up, allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("kind", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(rng=randoms)
@settings(max_examples=20)
def test_every_kernel_agrees_with_the_oracle(kind, dtype, rng):
    where = DOMAINS[kind](rng)
    mask = tree(rng, where)
    bias = position(rng, HEADS, HEADS * DIM, where)
    terms = [] if bias is None else [*bias.biases]
    if rng.random() < 0.3:
        terms.append(
            torch.randn(rng.choice([1, ROWS]), rng.choice([1, HEADS]), where.num_tokens, where.num_tokens).to(dtype)
        )
    modules = [
        copy.deepcopy(term).to(torch.float64 if dtype == torch.float64 else torch.float32)
        for term in terms
        if isinstance(term, torch.nn.Module)
    ]
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    tensors = inputs(rng, where, where, mask, dtype)
    options = {
        "mask": mask, "domain": where, "bias": [*modules, *(t for t in terms if isinstance(t, torch.Tensor))],
        "softcap": rng.choice([None, 2.0]), "scale": rng.choice([None, 0.3]),
        "sinks": rng.choice([None, torch.randn(HEADS, dtype=dtype, requires_grad=True)]),
    }  # fmt: skip
    want = run(tensors, modules, 0, kernel="reference", **options)
    # The rounding error of a score is a relative one of its weight. In bf16, scores are of single precision, and both sides round.
    largest_score = 16 if any(isinstance(module, positions.ContinuousBias) for module in modules) else 4
    for kernel in ("auto", *kernels.KERNELS):
        try:
            got = run(tensors, modules, 0, kernel=kernel, **options)
        except ValueError as refusal:
            assert kernel != "auto" and "cannot compute" in str(refusal)
            continue
        for name, value in got.items():
            # The gradient of a bias's parameter is a sum over pairs that all but cancel, and up to 16 times steeper than a score.
            condition = 16 if name[0].isdigit() else 2 if dtype == torch.bfloat16 else largest_score
            close(
                value, want[name], dtype, f"{name} by {kernel}: {mask!r} on {where!r} with {options['bias']}", condition
            )


@pytest.mark.parametrize("kind", DOMAINS)
@given(rng=randoms)
@settings(max_examples=15)
def test_layers_of_every_mask_position_and_option(kind, rng):
    """A layer trains through whatever kernel fits, and equals itself on the oracle; rotations and embeddings included."""
    where = DOMAINS[kind](rng)
    options = {
        "mask": tree(rng, where, 1), "position": position(rng, HEADS, 24, where), "kv_heads": rng.choice([1, 2]),
        "qk_norm": rng.choice([None, "rms", "layer"]), "gate": rng.random() < 0.5, "sinks": rng.random() < 0.5,
        "softcap": rng.choice([None, 3.0]), "qkv_bias": rng.random() < 0.5, "norm": rng.choice(["pre", "post", "sandwich", "parallel"]),
        "activation": rng.choice(["relu", "gelu", "swiglu", "geglu"]), "layer_scale": rng.choice([None, 0.5]),
    }  # fmt: skip
    encoder = xf.Encoder(24, 2, HEADS, **options).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    encoder.eval()
    oracle = copy.deepcopy(encoder)
    for layer in oracle.modules():
        if isinstance(layer, xf.Attention):
            layer.kernel = "reference"
    x = torch.randn(ROWS, where.num_tokens, 24, dtype=torch.float64)
    if where.valid is not None:
        x[~where.valid] = float("nan")
    got, want = encoder(x, where), oracle(x, where)
    close(got, want, torch.float64, f"output of {encoder}", depth=3)
    up = torch.randn_like(got)
    got.backward(up)
    want.backward(up)
    for (name, a), b in zip(encoder.named_parameters(), oracle.parameters(), strict=True):
        if a.grad is not None:
            close(a.grad, b.grad, torch.float64, f"gradient of {name} of {encoder} on {where!r}", depth=2 * 3)
    if where.valid is not None:
        assert not got[~where.valid].any()


@given(rng=randoms)
def test_queries_and_keys_of_different_lengths(rng):
    ends = sorted(rng.randint(0, 9) for _ in range(3))
    where, keys = xf.Sequence(ends[2] - ends[1], start=ends[1]), xf.Sequence(ends[2] - ends[0], start=ends[0])
    choices = [masks.Causal(), masks.Local(2), masks.Windows(3), masks.Global(2), masks.Prefix(4), masks.Dilated(1, 2)]
    mask = (
        rng.choice(choices) | rng.choice(choices) if rng.random() < 0.5 else rng.choice(choices) & ~rng.choice(choices)
    )
    tensors = inputs(rng, where, keys, mask, torch.float64)
    bias = xf.positions.DistanceDecay(HEADS).double()
    options = {"mask": mask, "domain": where, "key_domain": keys, "bias": bias}
    want = run(tensors, [], 0, kernel="reference", **options)
    got = run(tensors, [], 0, **options)
    for name, value in got.items():
        close(value, want[name], torch.float64, f"{name} of {mask!r}")


def test_every_position_is_generated():
    def below(cls):
        for sub in cls.__subclasses__():
            yield from below(sub)
            if sub.__module__.startswith("xformerlib.positions") and not sub.__name__.startswith("_"):
                yield sub

    from xformerlib.positions import Bias, Embedding, Position, Rotation, Sum

    assert set(below(Position)) - {Bias, Embedding, Rotation, Sum} == set(POSITIONS)
