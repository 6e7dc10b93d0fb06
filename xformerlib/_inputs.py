"""What users give to attention, checked and completed; each refusal names the argument, the rule, what came and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_number, made_by, shown
from .domains import Domain, Sequence
from .masks import Mask
from .positions import Bias, Position
from .positions._base import together

BiasLike = Tensor | Bias
Masks = Mask | SequenceOf[Mask | None] | None
Positions = Position | Callable[[], Position] | SequenceOf[Position | Callable[[], Position]] | None


def place(name: str, x: Tensor, dim: int, domain: Domain | None) -> Domain:
    """The domain of ``x``, ``(B, T, C)`` or ``(T, C)``, checked; ``Sequence(T)`` if none is given."""
    check_values(name, x)
    if x.ndim not in (2, 3) or x.shape[-1] != dim:
        raise ValueError(f"{name} must be (batch, tokens, {dim}) or (tokens, {dim}); got {tuple(x.shape)}")
    if domain is None:
        return Sequence(x.shape[-2])
    check_domain(name, domain, x.shape[-2], x.shape[0] if x.ndim == 3 else 1, x.device)
    return domain


def check_values(name: str, x: object) -> None:
    """Raise unless ``x`` is a tensor of real numbers, not nested."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if x.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor; got one of {x.size(0)} items. Join its items, torch.cat(list({name}.unbind())), and give "
            f"them the domain Sequence.packed(lengths)."
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {name} of {x.layout}. Use {name}.to_dense().")


def check_last(last: int, domain: Domain) -> Domain:
    """Where the last tokens live, or an error where there are not so many (prefix tokens not counted)."""
    tokens = domain.num_tokens - domain.prefix
    if isinstance(last, bool) or not isinstance(last, (int, torch.SymInt)) or not 1 <= last <= tokens:
        raise ValueError(f"last must be a whole number from 1 to the {tokens} tokens of {domain!r}; got last={last!r}")
    return domain.last(last)


def domain_of(name: str) -> str:
    """The name of the argument that says where ``name`` lives."""
    return "domain" if name in ("x", "query") else f"{name}_domain"


def check_domain(name: str, domain: Any, tokens: int, batch: int, device: torch.device) -> None:
    """Raise unless a tensor of so many tokens and rows, on this device, lives on the domain."""
    if not isinstance(domain, Domain):
        argument = domain_of(name)
        raise TypeError(
            f"the domain of {name} must be a domain such as Sequence(length); got {type(domain).__name__}. Give {argument} one."
        )
    if tokens != domain.num_tokens:
        raise ValueError(
            f"{name} must have as many tokens as its domain; got {tokens} and {domain!r} of {domain.num_tokens} ({domain_of(name)})"
            + (f" (prefix={domain.prefix} in front of each item included)" if domain.prefix else "")
        )
    if domain.batch_size is not None and batch != domain.batch_size:
        raise ValueError(
            f"{name} must have one row for each of the {domain.batch_size} rows of {domain!r}; got {batch}"
        )
    if domain.device is not None and domain.device != device and device.type != "meta":
        raise ValueError(
            f"{name} is on {device}, but its domain is on {domain.device}; use domain.to({str(device)!r}) once, beforehand"
        )


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    dropout_p: float,
    softcap: float | None,
    scale: float | Tensor | None = None,
) -> None:
    """Raise unless query, key and value fit each other, and the options are in range."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_values(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, dim); got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}; got {tensor.dtype} on {tensor.device}"
            )
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have the same batch size; {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same dim; {shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key and value must have the same heads and tokens; {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"the heads of query must be a multiple of the heads of key; {shapes}")
    if query.shape[-1] == 0:
        raise ValueError(f"query and key must have dim >= 1; {shapes}")
    if sinks is not None and not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a tensor of one logit per query head; got {type(sinks).__name__}")
    if sinks is not None and not sinks.is_floating_point():
        raise TypeError(f"sinks must be floating-point logits; got {sinks.dtype}")
    if sinks is not None and (sinks.shape != query.shape[1:2] or sinks.device != query.device):
        raise ValueError(
            f"sinks must be one logit per query head, ({query.shape[1]},) on {query.device}; got {tuple(sinks.shape)} on {sinks.device}"
        )
    check_options_of_call(dropout_p, softcap, scale)


def check_options_of_call(dropout_p: object, softcap: object, scale: object = None) -> None:
    """Raise unless the numbers of an attention call are in range. Tensors, whose values are not read, pass as ``scale``."""
    if type(dropout_p) is not float or not 0 <= dropout_p < 1:
        if isinstance(dropout_p, (bool, str)) or not isinstance(dropout_p, (int, float)):
            raise TypeError(f"dropout_p must be a number in [0, 1); got dropout_p={shown(dropout_p)}")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1); got dropout_p={dropout_p}")
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise TypeError(f"softcap must be a number > 0; got softcap={shown(softcap)}. Leave it out for no cap.")
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap must be > 0 and finite; got softcap={softcap}. Leave it out for no cap.")
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be one floating-point number; got {scale.dtype} of shape {tuple(scale.shape)}"
            )
    elif scale is not None:
        check_number("scale", scale)


def resolve_domains(
    query: Tensor,
    key: Tensor,
    mask: Mask,
    terms: tuple[BiasLike, ...],
    domain: Domain | None,
    key_domain: Domain | None,
) -> tuple[Domain, Domain]:
    """Where queries and keys live: as given, and otherwise on sequences from 0, if that is no guess."""
    queries, keys = query.shape[2], key.shape[2]
    if domain is None and key_domain is not None:
        raise ValueError("key_domain says where keys live, but queries live nowhere; give domain too")
    if domain is None:
        related = [mask] if mask.relates_places else [term for term in terms if isinstance(term, Bias)]
        if queries != keys and related:
            raise ValueError(
                f"{related[0]!r} relates places of queries and keys, and {queries} queries beside {keys} keys do not say which places "
                "those are. Give domain and key_domain, for example Sequence(1, start=41) and Sequence(42)."
            )
        domain = Sequence(queries)
        key_domain = domain if queries == keys else Sequence(keys)
    key_domain = domain if key_domain is None else key_domain
    check_domain("query", domain, queries, query.shape[0], query.device)
    check_domain("key", key_domain, keys, key.shape[0], key.device)
    return domain, key_domain


def check_mask(mask: Mask, name: str = "mask") -> Mask:
    """The mask, or an error where something else came."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{name} must be a mask such as masks.Causal(); got {type(mask).__name__}. Wrap a bool tensor (True: may attend) in Dense."
        )
    return mask


def bias_terms(bias: BiasLike | SequenceOf[BiasLike] | None) -> tuple[BiasLike, ...]:
    """The biases one by one, sums taken apart."""
    if bias is not None and not isinstance(bias, (Tensor, Position, list, tuple)):
        raise TypeError(
            f"bias must be a positions.Bias, a tensor that broadcasts to (B, H, Tq, Tk), or a list of these; got {type(bias).__name__}"
        )
    given = () if bias is None else (bias,) if isinstance(bias, (Tensor, Position)) else tuple(bias)
    flat: list[BiasLike] = []
    for term in (part for each in given for part in (each.parts if isinstance(each, Position) else (each,))):
        if not isinstance(term, (Tensor, Bias)):
            raise TypeError(
                f"bias must be a positions.Bias or a tensor that broadcasts to (B, H, Tq, Tk); got {type(term).__name__}"
            )
        flat.append(term)
    return tuple(flat)


def bias_kind(terms: tuple[BiasLike, ...], *domains: Domain) -> str | None:
    """What a plan must know of the biases: None, "fixed", "trained" or "dense" (see ``Problem``)."""
    if not terms:
        return None
    if any(isinstance(term, Tensor) for term in terms):
        return "dense"
    tensors = [t for term in terms for t in term.parameters()]  # type: ignore[union-attr]
    tensors += [where.whole.learned for where in domains if where.whole.learned is not None]
    return "trained" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else "fixed"


def are_pointwise(terms: tuple[BiasLike, ...], domain: Domain) -> bool:
    """Whether every score of the biases is an entry of a table or a formula (see ``Bias.is_pointwise``)."""
    return all(isinstance(term, Tensor) or term.is_pointwise(domain) for term in terms)


def check_heads(dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    """Raise unless the sizes of a layer are whole numbers that divide as they must."""
    for name, value in (
        ("dim", dim),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("head_dim", 1 if head_dim is None else head_dim),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1; got {name}={value!r}")
    if head_dim is None and dim % heads:
        raise ValueError(
            f"dim must be divisible by heads; got dim={dim} and heads={heads}. Change one, or give head_dim."
        )
    if heads % kv_heads:
        raise ValueError(f"heads must be divisible by kv_heads; got heads={heads} and kv_heads={kv_heads}")


def check_position(position: Position | None, heads: int, head_dim: int) -> None:
    """Raise unless the position can act within a layer of so many heads, of so many channels each."""
    if position is None:
        return
    check_is_position(position)
    for embedding in position.embeddings:
        raise ValueError(
            f"{type(embedding).__name__} is added to the tokens once, by the model: give it to an Encoder, or call it on x"
        )
    check_widths(position, heads, head_dim)


def check_is_position(position: object) -> None:
    """Raise unless this is a position or None."""
    if position is not None and not isinstance(position, Position):
        raise TypeError(
            f"position must be a position such as positions.Rotary(head_dim); got {type(position).__name__}"
        )


def check_widths(position: Position, heads: int, head_dim: int, dim: int | None = None) -> None:
    """Raise unless a position fits layers of so many heads and channels: biases, rotations, and embeddings where there is a ``dim``."""
    for rotation in position.rotations:
        turned = getattr(rotation, "head_dim", head_dim)  # not of rotations of one's own
        if turned != head_dim:
            raise ValueError(
                f"position must turn the channels of a head, head_dim={head_dim}; got {rotation!r}, which turns {turned}"
            )
    for embedding in position.embeddings if dim is not None else ():
        if getattr(embedding, "dim", dim) != dim:
            raise ValueError(f"position must be added to tokens of dim={dim}; got {embedding!r} of {embedding.dim}")
    for bias in position.biases:
        if bias.heads not in (1, heads):
            raise ValueError(
                f"position must score as many heads as the layer has, {heads}; got {bias!r} of {bias.heads}"
            )


def positions_of_layers(
    given: Positions, depth: int, heads: int, head_dim: int, dim: int
) -> tuple[Position | None, list[Position | None]]:
    """The position that all layers share, and that of each alone."""
    several = isinstance(given, (list, tuple))
    every: list[Any] = list(given) if several else [] if given is None else [given]  # type: ignore[arg-type]
    for each in every:
        if not isinstance(each, Position) and not callable(each):
            raise TypeError(
                "position must be a position, a function that makes one for each layer, or a list of these; got "
                f"{type(each).__name__}"
            )
    shared = together(*(each for each in every if isinstance(each, Position)))
    if shared is not None:
        check_widths(shared, heads, head_dim, dim)
    makers = [each for each in every if not isinstance(each, Position)]
    own = [[made_by("position", make, kind=Position) for make in makers] for _ in range(depth)]
    for each in (position for positions in own for position in positions):
        check_position(each, heads, head_dim)
    return shared, [together(*positions) for positions in own]


def masks_of_layers(mask: object, depth: int) -> SequenceOf[Mask | None]:
    """The mask of each layer, of one for all or a list."""
    if mask is None or isinstance(mask, Mask):
        return [mask] * depth
    if not isinstance(mask, (list, tuple)):
        raise TypeError(
            f"mask must be a mask such as masks.Causal(), or a list of one for each layer; got {type(mask).__name__}"
            + (". A dict is read as a mask if it is what mask.to_config() gives." if isinstance(mask, dict) else "")
        )
    if len(mask) != depth:
        raise ValueError(f"mask must be one mask, or one for each of the {depth} layers; got {len(mask)}")
    return [None if each is None else check_mask(each) for each in mask]


def rates_of_layers(drop_path: float | SequenceOf[float], depth: int) -> SequenceOf[float]:
    """The rate of each block."""
    if isinstance(drop_path, (list, tuple)):
        if len(drop_path) != depth:
            raise ValueError(f"drop_path must be one rate, or one for each of the {depth} blocks; got {len(drop_path)}")
        return drop_path
    assert isinstance(drop_path, (int, float))
    return [drop_path * layer / (depth - 1) for layer in range(depth)] if depth > 1 else [drop_path]
