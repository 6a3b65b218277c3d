"""Give the films of two MovieLens datasets the vectors that ML-1M has of the same films.

::

    mmrec extract --dataset ml-1m --text all-minilm-l6-v2 --image efficientnet-lite0
    python -m tests.benchmarks.film_features --out DIR

This prepares two datasets and imports the vectors of plots and posters: ``ml-100k-films``, and
``ml-small-films``, which has the films with a plot and a poster in ML-1M only. ``$MMREC_TEST_DATA``
is the folder of the data. DIR holds the files that are imported. MovieLens-100K has 18 films under
two ids, and the second id gets the vectors.

The pre-training of ``reduced/pmmrec-transfer.toml`` is on a sample of ML-1M::

    mmrec prepare --dataset ml-1m --users 2000 --seed 1 --name ml-1m-2000
    mmrec extract --dataset ml-1m-2000 --text all-minilm-l6-v2 --image efficientnet-lite0
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

TABLES = {"text": "all-minilm-l6-v2", "image": "efficientnet-lite0"}


def mmrec(*words: str | Path) -> None:
    """Run a command of mmrec; an error ends the program."""
    subprocess.run([sys.executable, "-m", "cli.app", *map(str, words)], check=True)


def vectors_of(warehouse: Path, modality: str) -> dict[str, np.ndarray]:
    """Return the vectors that ML-1M has of a modality, by the id of the film."""
    folder = warehouse / "ml-1m" / "features" / TABLES[modality] / modality / "pooled"
    parts = sorted(str(path) for path in folder.glob("*.parquet"))
    table = ds.dataset(parts).to_table(columns=["item_id", "embedding"])
    ids = table["item_id"].cast(pa.string()).to_pylist()
    return dict(zip(ids, np.stack(table["embedding"].to_numpy()), strict=True))


def give(dataset: str, films: dict[str, str], vectors: dict[str, np.ndarray], file: Path) -> None:
    """Import the vectors of films into a dataset.

    Args:
        dataset: The dataset.
        films: Its item ids, and the ids of the same films in ML-1M.
        vectors: Vectors by the ids of ML-1M.
        file: The file of vectors to write, named after its modality.
    """
    known = {item: film for item, film in films.items() if film in vectors}
    np.save(file, np.stack([vectors[film] for film in known.values()]))
    ids = file.with_suffix(".ids")
    ids.write_text("".join(f"{item}\n" for item in known), encoding="utf-8")
    modality = file.stem
    mmrec(
        *("import-features", "--dataset", dataset, f"--{modality}", file, "--ids", ids),
        *("--name", TABLES[modality]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the imported files")
    out = parser.parse_args().out
    data = Path(os.environ["MMREC_TEST_DATA"])
    warehouse = Path(os.environ.get("MMREC_WAREHOUSE", "warehouse"))
    vectors = {modality: vectors_of(warehouse, modality) for modality in TABLES}
    with_both = vectors["text"].keys() & vectors["image"].keys()

    with (data / "ml100k" / "ml100k_to_ml1m_id.csv").open(encoding="utf-8") as lines:
        same = {row["ml1m_movie_id"]: row["ml100k_item_id"] for row in csv.DictReader(lines)}
    mmrec("prepare", "--dataset", "ml-100k", "--raw", data / "ml100k", "--name", "ml-100k-films")

    raw = out / "ml-small"
    raw.mkdir(parents=True, exist_ok=True)
    shutil.copy(data / "ml_latest_small" / "ratings.csv", raw)
    with (
        (data / "ml_latest_small" / "movies.csv").open(encoding="utf-8", newline="") as lines,
        (raw / "movies.csv").open("w", encoding="utf-8", newline="") as kept,
    ):
        rows = csv.reader(lines)
        csv.writer(kept).writerows([next(rows), *(row for row in rows if row[0] in with_both)])
    mmrec(
        *("prepare", "--dataset", "ml-latest-small", "--raw", raw, "--unlisted", "drop"),
        *("--name", "ml-small-films"),
    )

    for dataset, films in (
        ("ml-100k-films", {item: film for film, item in same.items()}),
        ("ml-small-films", {film: film for film in sorted(with_both)}),
    ):
        folder = out / dataset
        folder.mkdir(exist_ok=True)
        for modality in TABLES:
            give(dataset, films, vectors[modality], folder / f"{modality}.npy")


if __name__ == "__main__":
    main()
