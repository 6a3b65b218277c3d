"""The rows and the columns of the papers' tables and figures, written from the papers.

Datasets of a paper are ``demo`` here, and so are the sources of a transfer. Rows and columns that
mmrec cannot have are left out, and the recipe says so.
"""

import re
from dataclasses import dataclass, field

HR_NDCG = ("HR@10", "NDCG@10")
SIX = ("HR@10", "HR@20", "HR@50", "NDCG@10", "NDCG@20", "NDCG@50")
FOUR = ("Recall@10", "Recall@50", "NDCG@10", "NDCG@50")
IMPROVED = "Improv."


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table whose metrics are columns of each column, or rows of each row."""

    rows: tuple[tuple[str, ...], ...] = (("demo",),)
    columns: tuple[str, ...] = ()
    """Empty: the metrics are the only columns."""
    metrics: tuple[str, ...] = field(default=HR_NDCG)
    metric_rows: bool = False

    def printed_rows(self) -> list[tuple[str, ...]]:
        """Return the labels of each row."""
        if not self.metric_rows:
            return list(self.rows)
        return [(*row, metric) for row in self.rows for metric in self.metrics]

    def printed_columns(self) -> list[tuple[str, str]]:
        """Return the two labels of each column of values."""
        if self.metric_rows:
            return [(column, "") for column in self.columns]
        return [(column, metric) for column in self.columns or ("",) for metric in self.metrics]


def variants(*names: str) -> tuple[tuple[str, ...], ...]:
    """Return rows with one label each."""
    return tuple((name,) for name in names)


def by_metric(*columns: str, metrics: tuple[str, ...] = HR_NDCG) -> PaperTable:
    """Return a table with a row for each dataset and metric."""
    return PaperTable(columns=columns, metrics=metrics, metric_rows=True)


def by_variant(*rows: str, metrics: tuple[str, ...] = HR_NDCG) -> PaperTable:
    """Return a table with a row for each variant and a column for each dataset and metric."""
    return PaperTable(rows=variants(*rows), columns=("demo",), metrics=metrics)


_ENCODERS = ("Gate", "FiLM", "Summation", "Concatenation")
_TRANSFERS = ("w/o PT", "w. PT-I", "w. PT-U", "w. PT")

PAPER_TABLES = {
    "mmsr/table-2": by_variant(
        "MMSR-T RoBERTa", "MMSR-T ELECTRA", "MMSR-T BERT", "MMSR-V ResNet", "MMSR-V MAE",
        "MMSR-V Swin", "MMSR Ro.+ResNet", "MMSR Ro.+Swin", "MMSR Ro.+MAE", "MMSR ELE.+MAE",
        "MMSR BERT+MAE",
    ),
    "mmsr/table-3": by_variant(
        *(f"Coarse {name}" for name in _ENCODERS), *(f"Coarse+ {name}" for name in _ENCODERS),
        "CoAttn-1", "MergeAttn-1", "MergeAttn-2", "MergeAttn-4",
    ),
    "mmsr/table-4": PaperTable(
        rows=(("demo", "SASRec"), ("demo", "GRURec"), ("demo", "NextItNet")),
        columns=("IDSR", "MMSR-T", "MMSR-V", "MMSR"),
        metrics=("HR@10",),
    ),
    "mmsr/table-5": by_metric(
        "GRURec", "NextItNet", "SASRec", "FDSA", "CARCA++", "VQRec", "MoRec++", "MMSR", IMPROVED,
        metrics=SIX,
    ),
    "mmsr/table-6": by_variant("a CLIP", "a GroupViT", "b ViLT", "b VisualBERT", "c FLAVA"),
    "mmsr/table-7": by_variant(
        "IDSR", "VisualBERT Region", "VisualBERT Grid", "VisualBERT Patch-Emb",
        "VisualBERT Patch-ViT",
    ),
    "mmsr/table-8": by_metric("SASRec", "MMSR-T", "MMSR-V", "MMSR"),
    "mmsr/table-9": PaperTable(
        rows=((),), columns=("IDSR", "Scratch", "demo", IMPROVED), metric_rows=True
    ),
    "mmsr/table-10": by_variant("ID", "Scratch", "Transfer", IMPROVED),
    "mmsr/table-11": by_variant(
        "ID", "MMSR-T RoBERTa", "MMSR-T RoBERTa-Full", "MMSR-V MAE", "MMSR-V MAE-Full",
        "MMSR-V ResNet", "MMSR-V ResNet-Full", "MMSR Ro.+MAE", "MMSR Ro.-F+MAE-F",
    ),
    "mmsr/table-12": PaperTable(
        rows=variants(
            "top 5e-5, downstream 5e-5", "top 8e-5, downstream 8e-5", "top 1e-4, downstream 1e-4",
            "top 8e-5, downstream 1e-4", "top 5e-5, downstream 1e-4",
        )
    ),
    "mmsr/table-13": PaperTable(rows=variants("10", "30", "50"), columns=("MMSR-T", "MMSR")),
    "mmsr/table-14": PaperTable(rows=variants("0%", "50%", "75%"), columns=("Vision", "MMSR")),
    "mmsr/figure-3": by_metric("IDSR", "MMSR-Scratch", "MMSR-Transfer", metrics=("HR@10",)),
    "mmsr/figure-4": PaperTable(rows=variants("IDSR", "MMSR")),
    "mmsr/figure-5": PaperTable(rows=variants("IDSR", "MMSR")),
    "mmsrec/table-1": PaperTable(
        rows=variants("Clip", "Ours"), metrics=("Recall@5", "Recall@10")
    ),
    "mmsrec/table-3": by_metric(
        "Pop", "GRU4Rec", "SASRec", "FDSA", "S3-Rec", "DuoRec", "UniSRec", "Ours", IMPROVED,
        metrics=FOUR,
    ),
    "mmsrec/table-5": PaperTable(
        rows=variants("UniSRec, BERT", "Ours, BERT", "Ours, CLIP"), metrics=FOUR
    ),
    "mmsrec/figure-2": by_metric("SASRec", "Ours", metrics=FOUR),
    "mmsrec/figure-3": by_variant(
        "whole", "w/o V", "w/o T", "w/o P", "w/o P+V", "w/o P+T", metrics=FOUR
    ),
    "pmmrec/table-3": by_metric(
        "GRURec", "NextItNet", "SASRec", "FDSA", "CARCA++", "UniSRec", "VQRec", "MoRec++",
        "PMMRec", IMPROVED, metrics=SIX,
    ),
    "pmmrec/table-4": by_metric(
        "SASRec", "UniSRec w/o PT", "UniSRec w. PT", "VQRec w/o PT", "VQRec w. PT",
        "MoRec++ w/o PT", "MoRec++ w. PT", "PMMRec w/o PT", "PMMRec w. PT", IMPROVED,
    ),
    "pmmrec/table-5": by_metric("T w/o PT", "T w. PT", "V w/o PT", "V w. PT", *_TRANSFERS),
    "pmmrec/table-6": by_metric("ID", "w/o PT", "demo"),
    "pmmrec/table-7": by_metric("SASRec", "PMMRec-T", "PMMRec-V", "PMMRec"),
    "pmmrec/table-8": by_metric(
        "w/o NICL", "only VCL", "only NCL", "w/o NID", "w/o RCL", "PMMRec"
    ),
    "pmmrec/figure-3": by_metric(*_TRANSFERS),
}  # fmt: skip
"""Recipe -> its table."""

STATISTICS = {
    "mmsr/table-1": ("Dataset", "#users", "#items", "#cold", "avg."),
    "mmsrec/table-2": ("Dataset", "#Users", "#Items", "#Actions", "Sparsity"),
    "mmsrec/table-4": ("Dataset", "k-core", "#Users", "#Items", "#Actions", "Sparsity"),
    "pmmrec/table-2": ("Dataset", "#Users", "#Items", "#Actions", "avg. length", "Sparsity"),
}
"""Recipe about datasets -> its columns."""


def check_printed(text: str, expected: PaperTable) -> None:
    """Compare the labels of a printed table with those of the paper, in order.

    Args:
        text: Output of ``mmrec grid`` on a wide terminal.
        expected: The table of the paper.
    """
    lines = text.splitlines()
    rows, columns = expected.printed_rows(), expected.printed_columns()
    first = next(n for n, line in enumerate(lines) if re.search("split, |retrieval of items", line))
    has_two_headings = bool(expected.columns) and not expected.metric_rows
    heading = lines[first + 1 + has_two_headings]
    labels = _cells(heading)[-len(columns) :]
    if has_two_headings:
        names = _cells(lines[first + 1])
        assert names == list(dict.fromkeys(column for column, _ in columns))
        assert labels == [metric for _, metric in columns]
    else:
        assert labels == [column or metric for column, metric in columns]
    body = lines[first + 2 + has_two_headings :][: len(rows)]
    previous: tuple[str, ...] = ()
    for line, row in zip(body, rows, strict=True):
        cells = _cells(line)
        assert len(cells) >= len(columns), line
        printed = tuple(cells[: -len(columns)])
        shown = len(row) - len(printed)  # the labels of the row above are not repeated
        assert (*previous[:shown], *printed) == row
        previous = row
    after = lines[first + 2 + has_two_headings + len(rows) :]
    assert not after or after[0].startswith("  ") or not after[0].strip(), after[:1]


def _cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())
