"""Commands whose files :mod:`tests.corruption` damages, and the files that each of them reads."""

from dataclasses import dataclass
from pathlib import Path

from tests.kills import SETTINGS

DATA = ("demo/dataset.json", "demo/items/*", "demo/interactions/*")
VECTORS = tuple(
    f"demo/features/hashed/{table}{file}"
    for table in ("image/pooled", "text/pooled", "video/pooled")
    for file in (".json", "/part-*")
)
TOKENS = tuple(f"demo/features/hashed/text/tokens{file}" for file in (".json", "/part-*"))
MAPPED = ("demo/features/hashed/text/tokens-*.npy",)


def run_files(run: str, *names: str) -> tuple[str, ...]:
    """Return the patterns of files of a run."""
    return tuple(f"runs/{run}/{name}" for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command that reads files which are damaged."""

    name: str
    command: tuple[str, ...]
    reads: tuple[str, ...]
    """Patterns of the files that are damaged, relative to the warehouse."""


def train_command(model: str, name: str, *more: str) -> tuple[str, ...]:
    """Return the command that trains a tiny model on the demo."""
    heads = "heads" if model in ("sasrec", "mmsrec") else "fusion_heads"
    pairs = [word for pair in (*SETTINGS, f"{heads}=2") for word in ("--set", pair)]
    return ("train", "--dataset", "demo", "--model", model, "--name", name, *pairs, *more)


def pretrain_command(model: str, name: str, *more: str) -> tuple[str, ...]:
    """Return the command that pre-trains a tiny model on the demo."""
    return ("pretrain", *train_command(model, name, *more)[1:])


def all_jobs(work_dir: Path) -> list[Job]:
    """Return the commands and the files that each of them reads."""
    config, weights = "config.toml", "model.safetensors"
    tables = ("metrics.parquet", "predictions.parquet")
    out = work_dir / "out"
    recommend = ("recommend", "--run", "first")
    jobs = {
        "train sasrec": (train_command("sasrec", "new"), DATA),
        "train mmsr": (train_command("mmsr", "new"), (*DATA, *VECTORS)),
        "train mmsr on tokens": (
            train_command("mmsr", "new", "--features", "text=hashed:tokens"),
            (*TOKENS, *MAPPED),
        ),
        "train --init": (
            train_command("sasrec", "new", "--init", "first"),
            run_files("first", config, weights),
        ),
        "train --resume": (
            ("train", "--resume", "--run", "half"),
            (*run_files("half", config, weights, "resume.safetensors", "metrics.parquet"), *DATA),
        ),
        "train --init of a pre-training": (
            train_command("mmsrec", "new", "--init", "aligned"),
            run_files("aligned", config, weights),
        ),
        "pretrain mmsrec": (pretrain_command("mmsrec", "new"), (*DATA, *VECTORS)),
        "pretrain pmmrec": (pretrain_command("pmmrec", "new"), (*DATA, *VECTORS)),
        "pretrain --resume": (
            ("pretrain", "--resume", "--run", "stopped"),
            (
                *run_files("stopped", config, weights, "resume.safetensors", "metrics.parquet"),
                *DATA,
                *VECTORS,
            ),
        ),
        "eval of a pre-training": (
            ("eval", "--protocol", "retrieval", "--run", "aligned"),
            (*run_files("aligned", config, weights), *VECTORS),
        ),
        "eval": (("eval", "--run", "mixed"), (*run_files("mixed", config, weights), *VECTORS)),
        "eval of the last run": (("eval",), run_files("first", config)),
        "recommend --all": (
            (*recommend, "--all", "--out", str(out / "all.csv")),
            (*run_files("first", config, weights), *DATA),
        ),
        "recommend --user": ((*recommend, "--user", "u00003", "--json"), DATA),
        "compare": (
            ("compare", "first", "mixed", "--json"),
            (
                *run_files("first", config, weights, "predictions.parquet"),
                *run_files("mixed", config, "predictions.parquet"),
            ),
        ),
        "report": (
            ("report", "first", "mixed", "--out", str(out / "report.html")),
            (*run_files("first", config, weights, *tables), DATA[0]),
        ),
        "grid, finished": (
            ("grid", str(work_dir / "grid.toml"), "--out", str(out / "grid.csv")),
            run_files("grid-*", "metrics.parquet", "grid.json"),
        ),
        "extract, finished": (
            ("extract", "--dataset", "demo", "--image", "hashed", "--json"),
            (
                "demo/dataset.json",
                "demo/items/*",
                *VECTORS[:2],
                "demo/failures/*image*",
            ),
        ),
        "extract, continued": (
            ("extract", "--dataset", "cut", "--text", "hashed", "--json"),
            ("cut/dataset.json", "cut/items/*", "cut/features/*/*/*/part-*"),
        ),
        "extract of a tar": (
            ("extract", "--dataset", "own", "--image", "hashed", "--json"),
            ("own/dataset.json", "own/items/*", "own/media/images.tar", "own/media/images.tar"),
        ),
        "datasets": (("datasets", "--json"), ("demo/dataset.json",)),
    }
    return [
        *(Job(name=name, command=command, reads=reads) for name, (command, reads) in jobs.items()),
        *sql_jobs(work_dir / "trial"),
    ]


def sql_jobs(warehouse: Path) -> list[Job]:
    """Return statements over each view, and one that reads a file by its path."""
    results = ("*", "config.toml"), ("*", "metrics.parquet"), ("*", "predictions.parquet")
    configs, metrics, predictions = (run_files(*pair) for pair in results)
    path = next((warehouse.parent / "base").glob("demo/items/*")).name
    statements = {
        "items": ("SELECT * FROM items", ("*/items/*", "*/dataset.json")),
        "splits": ("SELECT * FROM splits ORDER BY ALL", ("*/interactions/*", "*/dataset.json")),
        "cold": ("SELECT * FROM cold ORDER BY ALL", ("demo/interactions/*", "demo/items/*")),
        "features": ("SELECT * FROM features ORDER BY ALL", VECTORS),
        "tokens": ("SELECT * FROM tokens ORDER BY ALL", TOKENS),
        "a table": ("SELECT * FROM features_demo_hashed_text ORDER BY item", VECTORS[2:4]),
        "failures": ("SELECT * FROM failures ORDER BY ALL", ("demo/failures/*", "demo/items/*")),
        "runs": ("SELECT * EXCLUDE created FROM runs", configs),
        "metrics": ("SELECT * FROM metrics ORDER BY ALL", (*metrics, *configs)),
        "predictions": ("SELECT * FROM predictions ORDER BY ALL", (*predictions, *configs)),
        "a file": (
            f"SELECT * FROM read_parquet('{warehouse}/demo/items/{path}')",
            ("demo/items/*",),
        ),
        "files": (f"SELECT * FROM '{warehouse}/*/interactions/*.parquet'", ("*/interactions/*",)),
    }
    return [
        Job(name=f"sql: {name}", command=("sql", statement, "--json"), reads=reads)
        for name, (statement, reads) in statements.items()
    ]
