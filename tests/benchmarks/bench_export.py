"""Latency of an exported run: one history to ten items, on one thread.

    python tests/benchmarks/bench_export.py FOLDER [--histories 500] [--threads 1]

FOLDER is what ``mmrec export`` has written. A measurement does what the program of the folder's
README does after its start: look up the inputs of a history, run ``sequence_encoder.onnx``, search
the index. The histories are random items, as many as the encoder takes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import faiss
import numpy as np
import onnxruntime
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--histories", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    faiss.omp_set_num_threads(options.threads)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.inter_op_num_threads = 1
    encoder = onnxruntime.InferenceSession(
        options.folder / "sequence_encoder.onnx", session_options
    )
    manifest = json.loads((options.folder / "manifest.json").read_text())
    table = pq.read_table(options.folder / "items.parquet")
    column = table[manifest["history"]["column"]].combine_chunks()
    inputs = column.flatten().to_numpy().reshape(len(table), -1)
    index = faiss.read_index(str(options.folder / "items.faiss"))
    length = manifest["history"]["length"]

    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"encode": [], "search": [], "both": []}
    for number in range(options.histories + 10):
        rows = generator.integers(len(table), size=length)
        begin = time.perf_counter()
        feed = {"inputs": inputs[rows][None], "lengths": np.array([length])}
        (query,) = encoder.run(None, feed)
        middle = time.perf_counter()
        index.search(query, 10 + length)
        end = time.perf_counter()
        if number >= 10:  # the first ones warm caches
            for name, value in zip(
                seconds, (middle - begin, end - middle, end - begin), strict=True
            ):
                seconds[name].append(value)
    print(
        f"{len(table):,} items, width {table['vector'].type.list_size}, length {length},"
        f" {options.threads} thread(s), {options.histories} histories"
    )
    for name, values in seconds.items():
        median, high = np.quantile(values, [0.5, 0.95]) * 1000
        print(f"{name:7} median {median:6.2f} ms  95% {high:6.2f} ms")


if __name__ == "__main__":
    main()
