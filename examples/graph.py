"""Train a graph Transformer on graphs, or on the nodes of one, and see which edges it looks along.

    python examples/graph.py                                    # handwritten digits as graphs of pixels, about a minute on 2 cores
    python examples/graph.py --model gin                        # a graph neural network on the same
    python examples/graph.py --data graphs.npz --epochs 100 --seeds 0 1 2                        # molecules
    python examples/graph.py --data minesweeper.npz --model exphormer --epochs 300 --splits 0 1 2 3 4 5 6 7 8 9
    python examples/graph.py --pyg MUTAG
    python examples/graph.py --help

The data is the digits that the package scikit-learn ships: a node for each pixel with ink, edges to the eight around it. --data takes

    molecules, .npz                     x, edge_index_local (from 0 within each graph), edge_attr, node_ptr, edge_ptr, y, and indices
                                        train, val, test, or scaffold_train, ...; y of 0 and 1 is scored by ROC-AUC, other numbers by
                                        MAE, or RMSE with scaffolds, integers by accuracy
    a heterophilous graph, .npz         as https://github.com/yandex-research/heterophilous-graphs has them; two classes by ROC-AUC
    a citation network, .npz            x_indptr, x_indices, x_data, x_shape, edge_index, y, train, val, test
    a folder with PROTEINS.txt          as https://github.com/weihua916/powerful-gnns has them, and 10fold_idx

Nothing is downloaded but for --pyg. Where there is no test or validation part, one is held out, the same for every run. The weights
that do best on validation are scored once on test. What is written: metrics.jsonl, model.safetensors, resume.pt (for --resume),
curves.png and, where nodes have a place and the model attends along edges, attention.png.
"""

from __future__ import annotations

import dataclasses
import time
from statistics import mean, stdev

import common
import graph_data as data
import graph_figure as figure
import graph_models as models
import graph_training as training
import torch
import tyro
from graph_options import Options
from graph_training import Task

DRAWN = 8  # graphs of the picture


def main(o: Options) -> None:
    began = time.perf_counter()
    with common.plain_errors():
        o.check()
        device = common.choose_device(o.device)
        found = data.load(o.data, o.pyg, o.downloads)
        tasks = {number: task_of(o, found, number, device) for number in o.splits}
        parameters = common.count_parameters(models.build(o, found))
    torch.set_num_threads(o.threads)
    print(describe(o, tasks[o.splits[0]], parameters))
    results = [run_one(o, task, number, seed) for number, task in tasks.items() for seed in o.seeds]
    if len(results) > 1:
        name = training.NAMES[found.metric]
        print(f"test {name} over {len(results)} runs: {mean(results):.4f} +- {stdev(results):.4f}")
    print(f"{time.perf_counter() - began:.0f} seconds")


def task_of(o: Options, found: data.Data, number: int, device: torch.device) -> Task:
    """One of the data's splits."""
    return training.task_of(found, data.split(found, number, o.validation, o.test), device, models.uses_edges(o))


def run_one(o: Options, task: Task, number: int, seed: int) -> float:
    """Train with one split and seed, score once on test, and draw."""
    folders = [f"split-{number}"] if len(o.splits) > 1 else []
    run, own = common.own_run(dataclasses.replace(o, splits=(number,)), seed, *folders)
    common.seed_everything(seed)
    model = models.build(o, task.data).to(task.device)
    best, spent = training.train(model, task, run, own)

    # The weights that did best on validation, scored once on the whole of test.
    run.load_weights(model)
    course = run.records()
    ours = training.score(model, task, list(training.batches(task, "test", o.eval_batch_size)))
    metric, name = task.data.metric, training.NAMES[task.data.metric]
    run.log(epoch=o.epochs, **{f"test_{metric}": ours.value, "test_loss": ours.loss}, seconds=spent)
    title = f"{task.data.name}, {o.model}: {name} {ours.value:.4f} on test"
    figure.curves(run.directory / "curves.png", title, metric, name, course)
    draw_attention(model, task, run)
    print(f"\ntest {name} {ours.value:.4f}, validation {best:.4f}")
    print(f"{o.model}, split {number}, seed {seed}, {spent:.0f} seconds; in {run.directory}: {run.written()}")
    return ours.value


def draw_attention(model: torch.nn.Module, task: Task, run: common.Run) -> None:
    """The first graphs of test, where nodes have a place and the model attends along edges."""
    graphs, index = task.data.graphs, task.parts["test"][:DRAWN]
    if graphs.places is None:
        return
    batch = data.batch_of(task.data, index).to(task.device)
    weights = figure.edge_weights(model, batch._replace(edge_attr=batch.edge_attr if task.edges else None))
    if weights is None:
        return
    with torch.inference_mode():
        taken = training.predict(model, task, batch).argmax(1).tolist()
    titles = [
        f"{true}" if true == got else f"{true}, taken for {got}" for true, got in zip(batch.y, taken, strict=True)
    ]
    places = dataclasses.replace(graphs, x=graphs.places).batch(index, None, batch.y).x
    figure.attention(run.directory / "attention.png", batch, places, weights, titles)


def describe(o: Options, task: Task, parameters: int) -> str:
    """What is about to be trained, and on what."""
    graphs, found = task.data.graphs, task.data
    of = "nodes of one graph" if found.of_nodes else "graphs"
    counts = ", ".join(f"{name} {len(part):,}" for name, part in task.parts.items())
    features = "no features of edges" if graphs.edge_attr is None else f"{graphs.edge_attr.shape[1]} of an edge"
    if graphs.edge_attr is not None and not task.edges:
        features += f", which {o.model} does not use"
    per = "" if found.of_nodes else f", {len(graphs.x) / len(graphs):.0f} nodes a graph"
    what = (
        f"{found.outputs} classes"
        if found.metric == "accuracy"
        else "yes or no"
        if found.metric == "auc"
        else "a value"
    )
    return (
        f"data     {found.name}: {what} for {of}{per}; {graphs.x.shape[1]} features of a node, {features}\n"
        f"parts    {counts}; scored by {training.NAMES[found.metric]}\n"
        f"model    {o.model}: {parameters:,} parameters; on {task.device}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
