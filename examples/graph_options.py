"""The options of ``graph.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common

Model = Literal["gps", "graph-transformer", "graphormer", "exphormer", "sgformer", "agnn", "gcn", "gin", "gine", "gat"]
Optimizer = Literal["adamw", "adam"]
BASELINES = ("gcn", "gin", "gine", "gat")


@dataclass(frozen=True)
class Options:
    """Train a graph Transformer, or a graph neural network beside it, on graphs or on nodes of one."""

    data: Path | None = None
    """An .npz file of molecules (ESOL, HIV, ZINC), of one graph (Cora, minesweeper), or the folder of a set of graphs with its folds
    (PROTEINS). Without it: digits as graphs of pixels."""
    pyg: str | None = None
    """A data set of PyTorch Geometric's in place of --data, which is downloaded: ZINC, Cora, CiteSeer, PubMed, or one of the TU collection
    by its name, such as MUTAG."""
    downloads: Path = Path("downloads")
    """Where --pyg keeps it."""
    splits: tuple[int, ...] = (0,)
    """Which of the splits that the data comes with, counted from 0; one run for each. For data with 10: 0 1 2 3 4 5 6 7 8 9."""
    test: float = 0.2
    """Share of the graphs that is held out to test, where the data comes without a test part. The same graphs for every run."""
    validation: float = 0.1
    """Share of the training graphs that is held out to choose the weights by, where the data does not say which."""
    model: Model = "gps"
    """Transformers of xformerlib (gps, graph-transformer, graphormer, exphormer, sgformer, agnn), or graph neural networks of PyTorch
    Geometric (gcn, gin, gat; and gine, which is gin told of the features of edges)."""
    position: Literal["none", "walk", "laplacian"] | None = None
    """What nodes are told of the structure around them: nothing, random walks, or Laplacian eigenvectors. Without it: walk for graphs, none
    for digits, whose nodes know their place, and for nodes of one large graph."""
    dim: int = 64
    """Width of the model."""
    depth: int = 2
    """Layers, one after the other."""
    heads: int = 4
    """Attention heads of a layer."""
    messages: Literal["attention", "gine", "gcn", "appnp"] | None = None
    """How gps and sgformer pass messages along edges beside attention: by attention too (gps alone), by sums (gine), means (gcn), or ten
    means in a row (appnp). Without it: attention for gps, gcn for sgformer."""
    norm: Literal["batch", "layer", "none"] = "batch"
    """What follows the layers of gps and exphormer, and of the graph neural networks: a norm over nodes, or over channels, or none."""
    graph_weight: float = 0.5
    """The share that messages have in sgformer; attention has the rest."""
    teleport: float = 0.1
    """The share that each layer of agnn leads back to what a node itself has."""
    attend: Literal["all", "edges"] = "all"
    """Whom nodes of gps attend to: all nodes of their graph, which costs much on a large one, or those from which edges lead to them."""
    residual: bool = False
    """Add the input of each layer of gcn, gin, gine or gat to what comes out. The Transformers do so as a matter of course."""
    head: Literal["linear", "mlp"] = "linear"
    """What says the answer at the end: a linear map, or a network with one hidden layer."""
    pool: Literal["mean", "sum", "max"] = "mean"
    """How a graph is read from its nodes. graphormer reads it from a virtual node."""
    dropout: float = 0.1
    """Share of the values dropped in training."""
    input_dropout: float = 0.0
    """Share of the features of nodes dropped in training, where they are numbers."""
    epochs: int = 25
    """Times that training goes through all graphs, and is scored on validation."""
    epoch_steps: int = 1
    """With one graph: the steps of an epoch."""
    batch_size: int = 32
    """Graphs in a training step."""
    eval_batch_size: int = 256
    """Graphs scored at a time in validation and test. A matter of memory."""
    lr: float = 2e-3
    """Highest learning rate."""
    warmup: float = 0.1
    """Share of training over which the learning rate rises. After it it falls to 0 along half a cosine."""
    optimizer: Optimizer = "adamw"
    """AdamW, or Adam, which takes weight decay for a part of the gradient: it leads weights that nothing else moves to 0 in few
    steps, such as those of words that no labelled node has."""
    weight_decay: float = 1e-2
    """Weight decay."""
    clip: float = 1.0
    """Greatest norm of the gradient."""
    seeds: tuple[int, ...] = (0,)
    """Where random numbers start, one run for each. The same seed, options and machine give the same result."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU threads. One is enough for a model as small as the default."""
    run: Path = Path("runs/graph")
    """Directory for all that is written, for several runs one within it for each. A run that is there already is replaced, or
    continued with --resume."""
    resume: bool = False
    """Continue the run in --run from where it was last saved. The result is that of a run which was never cut off."""

    def check(self) -> None:
        """Raise ValueError for what cannot work."""
        if self.data is not None and self.pyg is not None:
            raise ValueError("--data and --pyg both say what to train on: give one of them")
        common.check_least(
            self, 1, "dim", "depth", "heads", "epochs", "epoch_steps", "batch_size", "eval_batch_size", "threads"
        )
        common.check_least(self, 0, "weight_decay")
        common.check_shares(self, "validation", "test", "dropout", "input_dropout", "warmup")
        common.check_positive(self, "validation", "test", "lr", "clip")
        common.check_different(self, "seeds", "splits")
        common.check_heads(self)
        if not 0 <= self.graph_weight <= 1:
            raise ValueError(f"--graph-weight must be from 0 to 1; got {self.graph_weight}")
        if not 0 <= self.teleport < 1:
            raise ValueError(f"--teleport must be from 0 to less than 1; got {self.teleport}")
        for option, given, takers in (
            ("messages", self.messages is not None, ("gps",) if self.messages == "attention" else ("gps", "sgformer")),
            ("graph-weight", self.graph_weight != 0.5, ("sgformer",)),
            ("teleport", self.teleport != 0.1, ("agnn",)),
            ("attend", self.attend != "all", ("gps",)),
            ("residual", self.residual, BASELINES),
            ("norm", self.norm != "batch", ("gps", "exphormer", *BASELINES)),
        ):
            if given and self.model not in takers:
                raise ValueError(
                    f"--{option} {getattr(self, option.replace('-', '_'))} is for {', '.join(takers)}; got --model {self.model}"
                )
