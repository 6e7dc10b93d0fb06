"""One rule for how close two results must be.

Equality is shown in double precision, where two ways to the same formula differ by nothing but rounding. Single precision shows that a
result is close, with a bound that follows from the sizes of the computation, not from what one machine printed:

    |got - want| <= unit(dtype) * depth * condition * scale

With ``CLOSENESS_LOG`` set to a file, each comparison that uses more than a hundredth of its bound appends a line to it;
``python -m tests.closeness FILE ...`` prints the comparisons that come closest to their bounds.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# One layer of the library against the reference in double precision, relative to the largest number: the contract of every kernel.
UNIT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_close(
    got: Tensor | Sequence[Tensor],
    want: Tensor | Sequence[Tensor],
    what: str = "result",
    *,
    depth: int = 1,
    condition: float = 1.0,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless ``got`` is ``want`` up to rounding in the less precise dtype of the two; NaN and infinities stand in the same places.

    Where double precision is the default, both must have it: a result that came back in a lower one would pass at that one's bound.

    Args:
        what: names the result in the message.
        depth: layers that the numbers pass through, one after the other, each of which adds rounding of its own.
        condition: how much the computation amplifies a relative error of its input: level over deviation of a series that is
            normalised, for example. Say at the call where the number comes from.
        scale: the largest number that is added up on the way; that of ``want`` if not given. Needed where ``want`` is a small
            difference of large numbers.
        dtype: the precision that the result was computed in, where it is not the default one.
    """
    __tracebackhide__ = True
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        assert len(got) == len(want), f"{what}: {len(got)} tensors, {len(want)} wanted"
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_close(one, other, f"{what}[{i}]", depth=depth, condition=condition, scale=scale, dtype=dtype)
        return
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, {tuple(want.shape)} wanted"
    got, want = got.detach(), want.detach().to(got.device)
    if not (got.is_floating_point() and want.is_floating_point()):
        assert torch.equal(got, want), f"{what}: {int((got != want).sum())} of {got.numel()} values differ"
        return
    if dtype is None and torch.get_default_dtype() == torch.float64:
        assert got.dtype == torch.float64, f"{what}: computed in {got.dtype}, while the default is double precision"
    dtype = max((dtype or got.dtype, got.dtype, want.dtype), key=UNIT.__getitem__)
    finite = want.isfinite()
    same = torch.equal(got.isfinite(), finite) and torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num())
    assert same, f"{what}: NaN or infinity in other places, or not where it is wanted"
    difference = (got.double() - want.double())[finite].abs()
    if difference.numel() == 0:
        return
    largest = float(want[finite].abs().max()) if scale is None else scale
    bound = UNIT[dtype] * depth * condition * largest
    _record(what, dtype, float(difference.max()), bound)
    assert float(difference.max()) <= bound, (
        f"{what}: largest difference {float(difference.max()):.3g}, at most {bound:.3g} allowed "
        f"({UNIT[dtype]:.0e} of {dtype} x depth {depth} x condition {condition:g} x scale {largest:.3g}); "
        f"{int((difference > bound).sum())} of {difference.numel()} values differ by more"
    )


def largest(*tensors: Tensor | Sequence[Tensor]) -> float:
    """The largest finite number in tensors or lists of them: a scale for gradients, some of which are small sums of large numbers."""
    flat = [tensor.detach() for each in tensors for tensor in ([each] if isinstance(each, Tensor) else each)]
    return max((float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max()) for tensor in flat if tensor.numel()), default=0.0)


class InDefaultPrecision(TorchFunctionMode):
    """Inside, torch code that names single precision gets the default one: for peers that compute some of their numbers in fp32 in a
    model of double precision, such as rotary angles and tables of relative positions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def default(value: Any) -> Any:
            return torch.get_default_dtype() if value is torch.float32 else value

        if func is Tensor.float:
            func, args = Tensor.to, (*args, torch.float32)
        return func(*map(default, args), **{name: default(value) for name, value in (kwargs or {}).items()})


def _record(what: str, dtype: torch.dtype, difference: float, bound: float) -> None:
    path, what = os.environ.get("CLOSENESS_LOG"), " ".join(what.split())
    if path and difference > bound / 100:
        test = os.environ.get("PYTEST_CURRENT_TEST", "?").removesuffix(" (call)")
        with open(path, "a") as log:  # one write of a line, so that processes do not mix theirs
            log.write(
                f"{difference / max(bound, 1e-300):.4g}\t{dtype}\t{difference:.3g}\t{bound:.3g}\t{test}\t{what}\n"
            )


def _closest(paths: Sequence[str], count: int = 20) -> None:
    """Print, for each dtype, the tests that use most of their bound."""
    shares: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    for line in (line for path in paths for line in Path(path).read_text().splitlines()):
        share, dtype, *rest, test, _ = line.split("\t")
        shares[dtype][test] = max(shares[dtype].get(test, (0.0, "")), (float(share), " of ".join(rest)))
    for dtype, tests in shares.items():
        print(f"{dtype}: share of the bound, difference of bound, test")
        for test, (share, numbers) in sorted(tests.items(), key=lambda item: -item[1][0])[:count]:
            print(f"  {share:8.4f}  {numbers:>24}  {test}")


if __name__ == "__main__":
    _closest(sys.argv[1:])
