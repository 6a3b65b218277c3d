"""Strategies of command lines and settings files for the fuzzer."""

import json
from dataclasses import dataclass, field
from typing import Any

import tomli_w
import typer
from hypothesis import strategies as st

from cli.app import app
from pipeline.backbones.registry import BACKBONES
from pipeline.datasets.canonical_sql import TIES, UNLISTED
from pipeline.datasets.importers.registry import IMPORTERS
from pipeline.datasets.registry import DATASETS
from retrieval.metrics import METRIC_NAMES
from trainer.models.registry import MODELS
from trainer.runs.describe import describe_model

TRAINING = ("train", "pretrain", "grid", "demo")
"""Commands that train: they may run for any time."""
LONG = 5000
"""Depth of nested values, and digits of a number."""
_COMMANDS: Any = typer.main.get_command(app)


@dataclass(frozen=True, kw_only=True, slots=True)
class FuzzInput:
    """Files that are written into the working folder, and commands that run in turn there."""

    commands: tuple[tuple[str, ...], ...]
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Return whether a command trains."""
        return any(command[:1] and command[0] in TRAINING for command in self.commands)


# -- words ----------------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), max_size=12)
_ODD = (
    "", " ", "-", "--", "---", "-1", "0", "1", "7", "1.5", "1e400", "nan", "inf", "-inf", "NaN",
    "2147483647", "2147483648", "9223372036854775808", "1" * 400, "0x10", "1_000", "²", "٣",
    "true", "null", "None", "[]", "{}", "%s", "{0}", "$HOME", "$$", "*", "?", "[", "..", ".",
    "a\nb",
    "\t", "\x1b[31mred", "\u202eabc", "\u2028", "\ufeff", "é", "e\u0301", "漢字", "😀", "\udcff",
    "x" * 300,
    "x" * 100_000, "'", '"', "';--", "a=b", "=", "=1", "a=", ",", ",,", ":", "a:b:c", "@file", "~",
    "https://example.org/a/b", "file:///etc/hostname", "hf:org/name", "cuda", "cuda:99", "mps",
)  # fmt: skip
_PATHS = (
    "odd/missing", "odd/missing/deeper/file.csv", "odd/folder", "odd/empty", "odd/binary", "odd",
    "odd/pipe", "odd/loop", "odd/text.csv", "odd/damaged.parquet", "odd/config.toml", "raw",
    "odd/grid.toml", "raw/items.csv", "raw/interactions.csv", "warehouse", "new", "new.parquet",
    "new.csv", "new.jsonl", "new.png", "new.html", "odd/text.csv/below", "y" * 300 + ".csv",
    "warehouse/demo", "warehouse/runs", "warehouse/runs/small", "n\nl.csv", "\u202e.csv", "\udcff",
)  # fmt: skip
_STATEMENTS = (
    "SELECT 1", "SELECT * FROM items", "SELECT * FROM interactions LIMIT 3", "SELECT",
    "SELECT * FROM features LIMIT 1", "SELECT * FROM runs", "SELECT * FROM metrics", "DROP TABLE x",
    "SELECT * FROM 'odd/text.csv'", "SELECT chr(27)", "SELECT 1; SELECT 2", "SELECT * FROM nosuch",
    "SELECT 'nan'::DOUBLE, -1::HUGEINT, '\\xFF'::BLOB, INTERVAL 1 DAY, DATE '1-1-1', NULL",
    "SELECT '-infinity'::DATE", "SELECT 'infinity'::TIMESTAMP", "SELECT TIMESTAMP '290000-1-1'",
    "SELECT MAP {[1]: {'a': 2}}, [1, NULL], {'k': NULL}", "SELECT 1 AS a, 2 AS a", "COPY x TO 'y'",
    "SELECT TIME '24:00:00', '12:00+02'::TIMETZ, uuid(), '101'::BIT", "SELECT 1e308 * 10",
    "SELECT 'a'::ENUM('a', 'b')", "SELECT union_value(a := 1)", "SELECT 99999999999999.5::DECIMAL",
    "SELECT range(5000)", "SELECT * FROM range(300)", "SELECT repeat('x', 1000000)",
    "EXPLAIN SELECT 1",
    "SELECT * FROM splits LIMIT 1", "SELECT * FROM predictions LIMIT 1", "PRAGMA version",
    "SELECT ?",
    "SELECT 170141183460469231731687303715884105727", "SELECT 1/0, 0/0, sqrt(-1)", "SELECT $1",
    "SELECT error(chr(27))", "SELECT '9999-12-31 23:59:59.999999+00'::TIMESTAMPTZ", "SHOW TABLES",
    "SELECT TIMESTAMP_NS '2200-01-01 00:00:00.123456789'", "FROM items", "SELECT CAST('x' AS INT)",
)  # fmt: skip
_LEVELS = ("pooled", "tokens", "layer-1", "layer-0", "layer-99", "layer-", "layer-x")
_BACKBONE_NAMES = ("hashed", "hashed", "hashed", *BACKBONES, "hf:odd/folder", "odd/folder")
_RUN_NAMES = ("small", "small", "second", "nosuch")
_TABLES = ("image", "text", "video", "image=hashed", "text=hashed:pooled", "text:tokens", "image=x")
_SETTINGS = sorted(
    {
        setting.name: setting.default
        for name in MODELS
        for part in [describe_model(name)]
        for setting in (*part.settings, *part.training, *part.pretraining)
    }.items(),
    key=lambda pair: pair[0],
)
_VALUES: dict[str, tuple[str, ...]] = {
    "dataset": ("demo", "demo", "demo", "tiny", *DATASETS),
    "raw": ("raw", "raw", *_PATHS),
    "format": (*IMPORTERS,),
    "file": ("items=items.csv", "interactions=interactions.csv", "items=../odd/pipe", "x=y",
             *(f"{role}=../{path}" for role in ("items", "images") for path in _PATHS[:12])),
    "unlisted": (*UNLISTED,), "ties": (*TIES,),
    "image": _BACKBONE_NAMES, "text": _BACKBONE_NAMES, "video": _BACKBONE_NAMES,
    "joint": _BACKBONE_NAMES,
    "level": _LEVELS, "decode": ("exact", "draft"), "dtype": ("float16", "float32"),
    "compute": ("float32", "bfloat16"), "device": ("cpu", "auto"), "engine": ("local",),
    "model": (*MODELS,), "features": _TABLES, "init": _RUN_NAMES,
    "transfer": ("full", "items", "users", "text", "image", "video"),
    "run": _RUN_NAMES, "runs": _RUN_NAMES, "index": ("faiss", "torch"),
    "protocol": ("ranking", "retrieval"), "user": ("u000000", "u1", "u00001"),
    "history": ("i000000", "i00001,i00002"), "similar": ("i000000",), "k": ("1", "10", "100000"),
    "split": ("test", "validation"), "targets": ("all", "new", "repeated", "cold"),
    "metric": METRIC_NAMES[:8], "by": ("run", "model", "settings"), "seen": ("filtered", "kept"),
    "statement": _STATEMENTS, "label": ("a", "b", "$x$"), "config": ("odd/config.toml",),
    "root": ("warehouse", "warehouse", "new", *_PATHS),
    "tune_blocks": ("0", "1", "2", "all"), "k_core": ("0", "1", "5", "100"),
    "name": (*MODELS, "fresh"),
}  # fmt: skip
"""Plausible values by the name of the parameter."""
_BY_TYPE = {
    int: ("0", "1", "2", "8", "-1", "1000000", "99999999999999999999", "x", "1.0"),
    "Path": _PATHS,
}


def _number_texts() -> st.SearchStrategy[str]:
    return st.one_of(st.integers().map(str), st.floats().map(repr))


def _odd_word() -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from(_ODD), TEXT, _number_texts(), st.sampled_from(_PATHS))


@st.composite
def _setting(draw: st.DrawFn) -> str:
    """Return a pair for ``--set``, mostly of a known setting."""
    name, default = draw(st.sampled_from(_SETTINGS))
    near = st.sampled_from((str(default), "1", "2", "4", "8", "0", "-1", "0.5", "true", "false"))
    value = draw(st.one_of(near, near, _odd_word()))
    pair: str = draw(st.sampled_from((f"{name}={value}",) * 6 + (f"{name} = {value}", name, value)))
    return pair


def _word(parameter: Any) -> st.SearchStrategy[str]:
    """Return the values of one parameter: mostly plausible ones, by its name or its type."""
    if parameter.name == "set":
        return _setting()
    kind = parameter.type_descriptor.annotation
    text = str(kind)
    by_type = _BY_TYPE["Path"] if "Path" in text else _BY_TYPE[int] if "int" in text else _ODD
    plausible = st.sampled_from(_VALUES.get(parameter.name, by_type))
    return st.one_of(*[plausible] * 8, st.sampled_from(by_type), _odd_word())


@st.composite
def _option(draw: st.DrawFn, parameter: Any) -> list[str]:
    """Return the words of one option or argument."""
    if not parameter.opts[0].startswith("-"):
        return [draw(_word(parameter))]
    name = draw(st.sampled_from(parameter.opts))
    if parameter.is_flag:
        return [draw(st.sampled_from((name,) * 15 + (name + "=1",)))]
    if draw(st.integers(0, 30)) == 0:
        return [name]  # the value is missing
    value = draw(_word(parameter))
    return draw(st.sampled_from(([name, value], [name, value], [f"{name}={value}"])))


_STRAY = st.one_of(
    st.sampled_from(("--", "--help", "--nosuch", "-x", "--json", "--run", "-")), _odd_word()
)


@st.composite
def command_lines(draw: st.DrawFn) -> FuzzInput:
    """Return one command with options and stray words."""
    name = draw(st.sampled_from(sorted(_COMMANDS.commands)))
    if name in ("demo", "doctor", "report") and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(("sql", "recommend", "extract")))  # the others take long
    parameters = _COMMANDS.commands[name].params
    required = [p for p in parameters if p.required or not p.opts[0].startswith("-")]
    chosen = draw(st.lists(st.sampled_from(parameters), max_size=5))
    if draw(st.integers(0, 9)):
        chosen += [parameter for parameter in required if parameter not in chosen]
    if name in ("train", "pretrain") and draw(st.integers(0, 9)):
        chosen += [p for p in parameters if p.name == "model" and p not in chosen]
    words = [word for parameter in chosen for word in draw(_option(parameter))]
    if draw(st.integers(0, 5)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(_STRAY))
    if name in ("train", "pretrain") and "--resume" not in words:
        words += ["--set", "epochs=1", "--set", "dim=8", "--set", "hidden=8"][: draw(
            st.sampled_from((0, 2, 6, 6, 6)))]  # fmt: skip
    first = draw(st.sampled_from((name,) * 60 + (name[:-1], name.upper())))
    return FuzzInput(commands=((first, *words),))


# -- settings files -------------------------------------------------------------------------


def _toml_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.booleans(), st.integers(-(2**63), 2**63 - 1), st.integers(-2, 9), st.floats(),
        st.sampled_from(_ODD[:-1]).filter(lambda word: "\udcff" not in word), TEXT,
        st.dates(), st.times(), st.datetimes(),
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)
        ),
        max_leaves=4,
    )


@st.composite
def _settings(draw: st.DrawFn) -> dict[str, Any]:
    """Return settings by name: defaults, values near them, or any value of TOML."""
    settings: dict[str, Any] = {}
    for name, default in draw(st.lists(st.sampled_from(_SETTINGS), max_size=4)):
        settings[name] = draw(
            st.one_of(st.just(default), st.sampled_from((1, 2, 0.5, True)), _toml_values())
        )
    if draw(st.integers(0, 4)) == 0:
        settings[draw(TEXT)] = draw(_toml_values())
    return settings


@st.composite
def _broken_toml(draw: st.DrawFn, text: str) -> bytes:
    """Return a document, mostly as it is, else cut, doubled, deep or with other bytes."""
    content = text.encode("utf-8", "surrogatepass")
    kind = draw(st.integers(0, 15))
    if kind == 0:
        return draw(st.binary(max_size=40))
    if kind == 1:
        return content[: draw(st.integers(0, len(content)))]
    if kind == 2:
        return content + content
    if kind == 3:
        return content + draw(
            st.sampled_from((
                b"\xff", b"\0", b"\r", b"\n[", b"x = " + b"[" * LONG, b"x = " + b"9" * LONG,
                b"[" + b"a." * LONG + b"a]", b"x = " + b"{a=" * LONG, b"x = 1e9999", b"x=0x" +
                b"f" * 99, b"\xef\xbb\xbf", b"x = 9999-99-99", b"x = '''",
            ))
        )  # fmt: skip
    if kind == 4:
        return text.encode(draw(st.sampled_from(("utf-16", "utf-8-sig", "cp037"))), "replace")
    return content


@st.composite
def settings_files(draw: st.DrawFn) -> FuzzInput:
    """Return ``mmrec train --config`` or ``mmrec grid`` with a TOML file."""
    name = draw(st.sampled_from(("train", "pretrain", "grid", "grid")))
    settings = draw(_settings())
    models = [entry for entry in sorted(MODELS) if describe_model(entry).pretraining]
    if name != "pretrain" or draw(st.integers(0, 9)) == 0:
        models = sorted(MODELS)
    model = draw(st.sampled_from(models))
    small = ["--set", "epochs=1"] if "epochs" not in settings else []
    if name == "grid":
        settings = {"model": model, "epochs": 1, "dim": 8, "hidden": 8, **settings}
        for axis in draw(st.lists(st.sampled_from(sorted(settings)), max_size=2)):
            other = draw(_toml_values())
            settings[axis] = draw(st.sampled_from(([settings[axis], other], {"a": dict(settings)})))
        document: dict[str, Any] = {"runs": draw(st.sampled_from((settings,) * 15 + ([settings],)))}
        axes = sorted(settings)
        for key in draw(st.lists(st.sampled_from(("rows", "columns", "metrics", "split", "seen")),
                                 max_size=2)):  # fmt: skip
            known = st.sampled_from((axes[:1], [], ["NDCG@10"], "test", "kept"))
            document[key] = draw(st.one_of(known, _toml_values()))
        words = [
            "grid",
            "in/file.toml",
            *draw(st.sampled_from((["--dry-run"],) * 6 + ([], ["--json"]))),
        ]
    else:
        tables = ("train", "model", "task", "deeper")
        document = settings
        if draw(st.booleans()):
            document = {draw(st.sampled_from(tables)): settings}
        words = [name, "--model", model, "--dataset", "demo", "--config", "in/file.toml", *small]
    try:
        text = tomli_w.dumps(document)
    except (TypeError, ValueError):
        text = f"x = {json.dumps(str(document))}"
    return FuzzInput(commands=(tuple(words),), files={"in/file.toml": draw(_broken_toml(text))})
