"""Export a run as ONNX graphs, a table of its items and a FAISS index, for a server without mmrec.

The result of the files is that of ``mmrec recommend``. Before the manifest is written, the graphs
are run by onnxruntime and compared with the recommender.

Legend: K items of a block, N rows of the table, B histories, L sequence length, D width, W width of
the inputs of a sequence encoder.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from features.arrow_columns import embedding_array
from features.atomic_files import atomic_write, write_table, write_text
from features.dataset import EvalSplit
from features.documents import write_json
from features.errors import UserError
from features.warehouse import Warehouse
from trainer.data.batches import ItemFeatures
from trainer.data.control import NONE
from trainer.runs.export_graphs import ItemGraph, SequenceGraph, make_graphs
from trainer.runs.recommend import Predictor
from trainer.runs.run import Run

FORMAT = 1
"""Version of the files; :mod:`trainer.runs.exported` reads this one."""
MANIFEST, ITEMS, INDEX = "manifest.json", "items.parquet", "items.faiss"
ITEM_IDS, INPUTS = "item_ids.json", "inputs.npy"
ITEM_ENCODER, SEQUENCE_ENCODER = "item_encoder.onnx", "sequence_encoder.onnx"
README = "README.md"
INSTALL = "pip install 'mmrec[export]'"
"""Command that installs the packages of the export."""
OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of an element of a vector between onnxruntime and the recommender."""
_ITEMS_PER_BLOCK = 4096
_CHECKED = 64  # items and histories that onnxruntime encodes for the comparison

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """Result of an export, printed as text or with ``--json``."""

    run: str
    dataset: str
    model: str
    out: str
    """The folder."""
    items: int
    """Rows of the table."""
    listed: int
    """Items that can be recommended."""
    dim: int
    """Width of the vectors."""
    opset: int
    difference: float
    """Largest difference of an element between onnxruntime and the recommender."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Items:
    """The encoded items: the rows of the table."""

    table: pa.Table
    vectors_ND: Vectors
    inputs_NW: Vectors
    is_listed_N: npt.NDArray[np.bool_]


def require_packages() -> None:
    """Check that the packages of the extra ``export`` are installed.

    Raises:
        UserError: A package is not installed.
    """
    for module in ("onnxruntime", "onnxscript", "onnx"):
        if find_spec(module) is None:
            raise UserError(f"an export needs the package {module}; run: {INSTALL}")


def export_run(warehouse: Warehouse, run: Run, out: Path) -> ExportReport:
    """Write the files of a run into a folder, the manifest last.

    Args:
        warehouse: Warehouse with the run's dataset.
        run: The run on the CPU, as :func:`trainer.runs.later.open_current` returns it; its weights
            are loaded.
        out: The folder. An export in it is replaced.

    Raises:
        UserError: A package is not installed, the folder has other files of the same names, the
            model or its features cannot be exported, or the graphs differ from the recommender.
    """
    require_packages()
    readme = Path(__file__).with_name("export_readme.md").read_text("utf-8")
    _check_folder(out, readme.partition("\n")[0])
    run.check_recommends()
    _check_features(run)
    item_graph, sequence_graph = make_graphs(run.model, run.spec.model)
    predictor = Predictor(warehouse, run, index="torch")
    items = _encode_items(predictor, item_graph)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    write_text(out / README, readme)  # first: it marks the folder as an export
    features = run.data.features
    examples = item_graph.tensors(features, torch.arange(min(2, features.n_items)))
    width = items.inputs_NW.shape[1]
    name = run.spec.model
    _write_graph(
        (item_graph, out / ITEM_ENCODER, name),
        ([example[[0, -1]] for example in examples],),
        (item_graph.names, ["vectors", "inputs"][: 1 if item_graph.inputs_are_vectors else 2]),
        ([{0: "items"} for _ in examples],),
    )
    _write_graph(
        (sequence_graph, out / SEQUENCE_ENCODER, name),
        (torch.zeros(2, 3, width), torch.tensor([1, min(2, run.model.history)])),
        (["inputs", "lengths"], ["queries"]),
        ({0: "batch", 1: "length"}, {0: "batch"}),
    )
    difference = _compare(predictor, item_graph, items, out)
    write_table(out / ITEMS, items.table, compression="zstd")
    write_json(out / ITEM_IDS, {"item_ids": items.table["item_id"].to_pylist()})
    with atomic_write(out / INPUTS) as temporary, temporary.open("wb") as file:
        np.save(file, items.inputs_NW)
    _write_index(out / INDEX, items)
    write_json(out / MANIFEST, _manifest(run, item_graph, items, difference))
    return ExportReport(
        run=run.name,
        dataset=run.spec.dataset,
        model=name,
        out=str(out),
        items=len(items.table),
        listed=int(items.is_listed_N.sum()),
        dim=items.vectors_ND.shape[1],
        opset=OPSET,
        difference=difference,
    )


def _check_folder(out: Path, title: str) -> None:
    """Check that a folder has no files of the names of an export that another program wrote.

    Args:
        out: The folder.
        title: The first line of the README of an export.

    Raises:
        UserError: The folder has such files, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a new folder")
    names = (README, MANIFEST, ITEMS, ITEM_IDS, INPUTS, INDEX, ITEM_ENCODER, SEQUENCE_ENCODER)
    present = [name for name in names if (out / name).exists()]
    try:
        is_export = (out / README).read_text("utf-8").startswith(title)
    except (FileNotFoundError, UnicodeDecodeError):
        is_export = False
    if present and not is_export:
        raise UserError(f"--out {out} has {present[0]}, which no export wrote; give a new folder")


def _check_features(run: Run) -> None:
    """Raise a UserError if the items of a run are not encoded from pooled vectors."""
    if run.config.control != NONE:
        raise UserError(
            f"run {run.name!r} is a control (control={run.config.control}), whose features are not"
            " those of the items; export the run without control"
        )
    reason = ""
    if run.config.tune_blocks:
        reason = f"has trained {run.config.tune_blocks} blocks of its backbones (tune_blocks)"
    elif run.data.features.tokens:
        reason = "reads tables of tokens"
    if reason:
        raise UserError(
            f"run {run.name!r} {reason}, which an export does not contain; train with"
            " --tune-blocks 0 on pooled tables, or serve the run with mmrec recommend"
        )


def _encode_items(predictor: Predictor, graph: ItemGraph) -> _Items:
    """Encode the items. Items that a model of ids has not learned are left out: they come last."""
    run, joint = predictor.run, predictor.run.joint
    rows = run.data.features.n_items
    if joint is not None and not run.model.encodes_new_items:
        rows = joint.learned
    blocks = torch.arange(rows).split(_ITEMS_PER_BLOCK)
    with torch.no_grad():
        encoded = [graph(graph.tensors(run.data.features, block_K)) for block_K in blocks]
    inputs_NW = torch.cat([tensors[-1] for tensors in encoded]).numpy()
    vectors_ND = predictor.search.items_ND[:rows].numpy()
    is_listed_N = run.is_listed()[:rows]
    columns = {
        "item_id": predictor.item_ids[:rows],
        "vector": embedding_array(vectors_ND),
        "text": predictor.texts[:rows],
        "cold": pa.array(predictor.dataset.cold[:rows]),
        "listed": pa.array(is_listed_N),
    }
    if not graph.inputs_are_vectors:
        columns["input"] = embedding_array(inputs_NW)
    return _Items(
        table=pa.table(columns),
        vectors_ND=vectors_ND,
        inputs_NW=inputs_NW,
        is_listed_N=is_listed_N,
    )


def _write_graph(
    target: tuple[ItemGraph | SequenceGraph, Path, str],
    examples: tuple[Any, ...],
    names: tuple[Sequence[str], Sequence[str]],
    shapes: tuple[Any, ...],
) -> None:
    """Write a graph as one ONNX file.

    Args:
        target: The graph, its file, and the name of the model.
        examples: Arguments of the graph, with at least two elements in each variable dimension.
        names: Names of the inputs and of the outputs.
        shapes: For each argument its variable dimensions and their names.

    Raises:
        UserError: An operator of the model has no form in ONNX, or the file would exceed 2 GB.
    """
    graph, path, model = target
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about its own parts
            program = torch.onnx.export(
                graph.eval(),
                examples,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=names[0],
                output_names=names[1],
                dynamic_shapes=shapes,
            )
            assert program is not None
            with atomic_write(path) as temporary:
                program.save(temporary, external_data=False)
    except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UserError(
            f"{model} cannot be exported with these settings: {reason}; serve the run with mmrec"
            " recommend"
        ) from None


def _write_index(path: Path, items: _Items) -> None:
    """Write the FAISS index of the listed items, whose labels are the rows of the table."""
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(items.vectors_ND.shape[1]))
    rows_S = np.flatnonzero(items.is_listed_N)
    index.add_with_ids(np.ascontiguousarray(items.vectors_ND[rows_S]), rows_S)
    with atomic_write(path) as temporary:
        faiss.write_index(index, str(temporary))


def _compare(predictor: Predictor, graph: ItemGraph, items: _Items, out: Path) -> float:
    """Return the largest difference between onnxruntime and the recommender.

    Some items and some histories are encoded, the longest history among them.

    Raises:
        UserError: The difference exceeds :data:`TOLERANCE`.
    """
    run, data = predictor.run, predictor.run.data
    chosen_K = torch.arange(len(items.table))[-_CHECKED:]
    feed = dict(zip(graph.names, graph.tensors(data.features, chosen_K), strict=True))
    vectors_KD, *inputs = _run_onnx(out / ITEM_ENCODER, feed)
    pairs = [(vectors_KD, items.vectors_ND[-_CHECKED:])]
    pairs += [(inputs_KW, items.inputs_NW[-_CHECKED:]) for inputs_KW in inputs]
    offsets = data.dataset.offsets
    users = np.argsort(-np.diff(offsets), kind="stable")[:_CHECKED]
    users = users[np.diff(offsets)[users] > 0]
    if len(users):
        split = EvalSplit(users=users, starts=offsets[users], targets=offsets[users + 1])
        sequences = data.history_batch(split, slice(None), length=run.model.history)
        with torch.no_grad():
            queries_BD = run.model.encode_sequences(
                predictor.search.items_ND, sequences, data.features
            )
        inputs_BLW = torch.from_numpy(items.inputs_NW)[sequences.items_BL]
        feed = {"inputs": inputs_BLW, "lengths": sequences.lengths_B}
        (exported_BD,) = _run_onnx(out / SEQUENCE_ENCODER, feed)
        pairs.append((exported_BD, queries_BD.numpy()))
    difference = max(float(np.abs(first - second).max()) for first, second in pairs)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the ONNX graphs of run {run.name!r} differ from the run by {difference:.2g}, more"
            f" than {TOLERANCE:g}; serve the run with mmrec recommend"
        )
    return difference


def _run_onnx(path: Path, feed: Mapping[str, Tensor]) -> list[Vectors]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[Vectors] = session.run(None, {name: x.numpy() for name, x in feed.items()})
    return outputs


def _manifest(run: Run, graph: ItemGraph, items: _Items, difference: float) -> dict[str, Any]:
    """Return the description of the files."""
    packages = ("mmrec", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    dim, width = items.vectors_ND.shape[1], items.inputs_NW.shape[1]
    outputs = {"vectors": ["items", dim], "inputs": ["items", width]}
    if graph.inputs_are_vectors:
        outputs.pop("inputs")
    return {
        "format": FORMAT,
        "run": run.name,
        "dataset": run.spec.dataset,
        "model": run.spec.model,
        "settings": asdict(run.spec.settings),
        "versions": {name: version(name) for name in packages} | {"faiss": faiss.__version__},
        "opset": OPSET,
        "difference": difference,
        "score": "inner product of a query and a vector",
        "correction": None,
        "ids": {
            "match": "exact text of item_id",
            "unknown": "left out of the history",
            "seen": "all items of the whole history are left out of the list",
        },
        "history": {
            "order": "oldest item first",
            "length": run.model.history,
            "cut": "the last items are read",
            "padding": "zeros after the last item",
            "column": "vector" if graph.inputs_are_vectors else "input",
        },
        "sequence_encoder": {
            "inputs": {"inputs": ["batch", "length", width], "lengths": ["batch"]},
            "outputs": {"queries": ["batch", dim]},
        },
        "item_encoder": {
            "inputs": _item_inputs(graph, run.data.features),
            "outputs": outputs,
        },
        "preprocessing": [dict(table) for table in run.spec.data.features],
    }


def _item_inputs(graph: ItemGraph, features: ItemFeatures) -> dict[str, Any]:
    """Return the type, shape and content of each input of the item encoder."""
    inputs: dict[str, Any] = {}
    if graph.reads_numbers:
        text = "row of the item in items.parquet"
        if graph.modalities:
            text += "; -1 for an item that is not in it"
        inputs[graph.names[0]] = {"type": "int64", "shape": ["items"], "content": text}
    for name in graph.modalities:
        inputs[name] = {
            "type": "float32",
            "shape": ["items", features.widths[name]],
            "content": f"features of {name}, zeros for an item without",
        }
        inputs[f"{name}_present"] = {
            "type": "bool",
            "shape": ["items"],
            "content": f"whether the item has features of {name}",
        }
    return inputs
