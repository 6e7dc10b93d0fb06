"""Small sets of graphs, as files hold them, for the tests of ``graph.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_data as data
import numpy as np
from graph_options import Options

TINY = Options(dim=8, depth=1, heads=2, epochs=2, batch_size=16, test=0.9)


def rings(y: Any, *, scaffold: bool, graphs: int = 40) -> dict[str, Any]:
    """Rings of 4 to 7 nodes with categories, of which ``y`` makes what is to be said."""
    sizes = np.arange(graphs) % 4 + 4
    first = [np.arange(size) for size in sizes]
    edges = np.concatenate([np.stack([np.r_[i, (i + 1) % len(i)], np.r_[(i + 1) % len(i), i]]) for i in first], 1)
    prefix = "scaffold_" if scaffold else ""
    ends = {"train": slice(0, 24), "val": slice(24, 32), "test": slice(32, 40)}
    return {
        "x": np.concatenate([i % 3 for i in first]).astype(np.uint8),
        "edge_index_local": edges.astype(np.uint8),
        "edge_attr": (np.arange(edges.shape[1]) % 3).astype(np.uint8),
        "node_ptr": np.r_[0, sizes.cumsum()].astype(np.int32),
        "edge_ptr": np.r_[0, 2 * sizes.cumsum()].astype(np.int32),
        "y": y(sizes),
        **{prefix + name: np.arange(graphs)[own].astype(np.int32) for name, own in ends.items()},
    }


def one_graph(classes: int) -> dict[str, Any]:
    noise, labels = np.random.default_rng(0), np.arange(60) % classes
    masks = np.arange(60) // 2 % 4 == np.arange(4)[:, None]
    masks = np.stack([masks, masks[::-1]])
    return {
        "node_features": np.eye(classes, dtype=np.float32)[labels] + 0.1 * noise.normal(size=(60, classes)),
        "node_labels": labels,
        "edges": np.stack([np.arange(59), np.arange(1, 60)], 1),
        "train_masks": masks[:, 0] | masks[:, 1],
        "val_masks": masks[:, 2],
        "test_masks": masks[:, 3],
    }


def saved(folder: Path, held: dict[str, Any]) -> data.Data:
    np.savez(folder / "tiny.npz", **held)
    return data.load(folder / "tiny.npz")
