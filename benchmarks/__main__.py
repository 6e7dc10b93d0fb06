"""Each line runs ours and a peer on the same work, in turns, warm, forward and backward, and prints both and their ratio.

    python -m benchmarks                              # every line, on the CPU
    python -m benchmarks --only swin molecules        # those whose names begin so
    python -m benchmarks --device cuda --dtype bfloat16 --json h100.json
    python -m benchmarks --only neighbourhood --profile
    python -m benchmarks --ablate                     # the library's tricks for CPUs, with and without

Times are the least of several rounds. Memory is the most that the allocator gave out during a step beside the inputs, output and
gradients included, and what is kept from call to call (a dense mask; plans). Roofline is the least time in which the machine could
compute the work (its operations at the speed of a large product of matrices, or its tensors at that of a copy) over the time taken.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from . import classification, decoding, dense, graph_encodings, graph_layers, graphs, images, ragged, vision, windows
from ._measure import Line, Setting, hot_spots, measure, roofline
from .ablation import ablate

LINES: tuple[Line, ...] = (
    *windows.LINES,
    *images.LINES,
    *vision.LINES,
    *graphs.LINES,
    *graph_layers.LINES,
    *graph_encodings.LINES,
    *ragged.LINES,
    *classification.LINES,
    *decoding.LINES,
    *dense.LINES,
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="lines whose names begin with one of these:\n" + ", ".join(line.name for line in LINES),
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each side at most (default: 10)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for the rounds of a line, two of which always run (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: whether the lines run, not how fast")
    parser.add_argument("--profile", action="store_true", help="also print where the time of our side goes")
    parser.add_argument("--ablate", action="store_true", help="measure the tricks for CPUs in place of the lines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save what was measured")
    return parser.parse_args(argv)


def chosen(only: list[str] | None) -> list[Line]:
    lines = [line for line in LINES if only is None or line.name.startswith(tuple(only))]
    if not lines:
        raise SystemExit(f"--only must name lines; got {only}. There are {', '.join(line.name for line in LINES)}.")
    return lines


def machine(setting: Setting, roof: dict[str, float]) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if setting.device != "cpu" else platform.machine()
    return {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "dtype": str(setting.dtype).removeprefix("torch."), "quick": setting.quick,
        "matmul_gflops": roof["flops"] / 1e9, "copy_gbytes": roof["bytes"] / 1e9,
    }  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    """A row as text."""
    if "error" in row:
        return f"{row['name']:<24} failed: {row['error']}"

    def duration(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"

    def size(count: float | None) -> str:
        return "-" if count is None else f"{count / 2**20:.4g} MiB"

    def ratio(times: float | None) -> str:
        return "-" if times is None else f"{times:.3g} x"

    reached = {True: "reached", False: "NOT reached", None: ""}[row["reached"]]
    roof = "" if row["roofline"] is None else f"{row['roofline']:.0%} of roofline"
    columns = [
        f"{row['name']:<24}", f"{row['kernel']:<9}", f"{duration(row['seconds']):>9} : {duration(row['peer_seconds']):<9}",
        f"{ratio(row['faster']):>7} faster", f"{size(row['bytes']):>11} : {size(row['peer_bytes']):<11}",
        f"{ratio(row['smaller']):>7} smaller", f"{roof:>16}", f"{row['rounds']:>3} rounds", f"target {row['target']}: {reached}",
    ]  # fmt: skip
    return "  ".join(columns) + (f"\n    peer missing: {row['missing']}" if row["missing"] else "")


def main(argv: list[str] | None = None) -> int:
    """Measure, print and save; 1 if a line failed."""
    asked = arguments(argv)
    lines = chosen(asked.only)
    torch.set_num_threads(asked.threads)
    setting = Setting(asked.device, getattr(torch, asked.dtype), asked.quick, asked.rounds, asked.seconds)
    if asked.ablate:
        ablate(setting)
        return 0
    roof = roofline(setting)
    about = machine(setting, roof)
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in about.items()
        )
    )
    print("name, kernel, ours : peer (time), ours : peer (peak extra memory)\n")
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = measure(line, setting, roof)
        except Exception as error:  # the other lines are still worth measuring; the exit status tells
            row = {"name": line.name, "error": f"{type(error).__name__}: {error}"}
        rows.append(row)
        print(shown(row), flush=True)
        if asked.profile and "error" not in row:
            print(hot_spots(line, setting))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"machine": about, "lines": rows}, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
