"""Train on a catalogue of one's own, compare two models, and recommend for a history of item ids.

Run it with an empty folder: python cli/examples/own_catalogue.py FOLDER
Replace :func:`write_catalogue` by your own tables: items with an id and a title, and
interactions with a user, an item and a time.
"""

import csv
import random
import sys
from pathlib import Path

from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from trainer.analysis.compare import compare
from trainer.loop import TrainProgress
from trainer.runs.evaluate import evaluate
from trainer.runs.later import open_current
from trainer.runs.recommend import Predictor
from trainer.runs.run import create_run
from trainer.runs.spec import RunSpec
from trainer.runs.train import train_run
from trainer.setting_sources import SettingSources

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("shoe", "hat", "scarf", "coat", "glove", "belt", "shirt", "sock", "boot", "cap")


def write_catalogue(folder: Path) -> None:
    """Write 50 products, and 300 customers who each buy things of one colour."""
    generator = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.csv").open("w", newline="") as file:
        rows = [(f"{c}-{t}", f"{c} {t}") for c in COLOURS for t in THINGS]
        csv.writer(file).writerows([("item_id", "title"), *rows])
    with (folder / "interactions.csv").open("w", newline="") as file:
        write = csv.writer(file).writerow
        write(("user_id", "item_id", "timestamp"))
        for customer in range(300):
            colour = generator.choice(COLOURS)
            for day, thing in enumerate(generator.sample(THINGS, 6)):
                write((f"customer-{customer}", f"{colour}-{thing}", f"2026-03-{day + 1:02d}"))


def show(progress: TrainProgress) -> None:
    """Print the metrics of each epoch that was validated."""
    if progress.metrics:
        print(f"epoch {progress.epoch}: {progress.metrics}")


def train(warehouse: Warehouse, model: str, name: str, *settings: str) -> Path:
    """Train a model on the shop, evaluate it, and return the folder of the run."""
    sources = SettingSources(pairs=["dim=32", "epochs=8", "device=cpu", *settings])
    spec = RunSpec.resolve(warehouse, model, ["shop"], sources=sources)
    run = create_run(warehouse, spec, name=name)
    train_run(run, on_progress=show)
    evaluate(warehouse, run, index="torch")
    return run.folder


def main(folder: Path) -> None:
    """Prepare, extract, train twice, compare, and recommend."""
    write_catalogue(folder / "raw")
    warehouse = Warehouse(folder / "warehouse")
    prepare_dataset(warehouse, PrepareOptions(dataset="shop", format="table", raw=folder / "raw"))
    extract_features(warehouse, "shop", ExtractOptions(text="hashed"))  # or all-minilm-l6-v2
    train(warehouse, "sasrec", "ids")
    texts = train(warehouse, "mmsrec", "texts", "heads=2", "objective=next")
    for line in compare(warehouse, ["ids", "texts"], metrics=["HR@10"]).lines:
        print(line.system, line.metric, line.seen, line.value, line.test)
    predictor = Predictor(warehouse, open_current(warehouse, texts), index="torch")
    print(predictor.recommend(["red-shoe", "red-hat"], k=5))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
