"""Arrow schemas of all tables in the warehouse; ``warehouse/README.md`` describes the columns."""

import pyarrow as pa

MODALITIES = ("image", "text", "video")
"""Modalities of an item; each is a column of the items table."""
FEATURE_MODALITIES = (*MODALITIES, "joint")
"""Modalities of a feature table; joint is image and text together."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


ITEMS_SCHEMA = pa.schema(
    [
        _required("item", pa.int32()),  # dense, 0..n-1
        _required("item_id", pa.string()),
        ("text", pa.string()),
        ("image", pa.string()),  # a reference, see pipeline.media.references
        ("video", pa.string()),
        ("attributes", pa.string()),  # one JSON object
    ]
)

INTERACTIONS_SCHEMA = pa.schema(
    [
        _required("user", pa.int32()),
        _required("user_id", pa.string()),
        _required("item", pa.int32()),
        ("timestamp", pa.int64()),
        _required("position", pa.int32()),  # 0.. within the user, chronological
    ]
)

FAILURES_SCHEMA = pa.schema(
    [
        _required("item", pa.int32()),
        _required("item_id", pa.string()),
        _required("modality", pa.string()),
        _required("backbone", pa.string()),
        _required("stage", pa.string()),  # read | decode | encode
        _required("reason", pa.string()),
        ("source", pa.string()),  # the path or the beginning of the text
    ]
)

METRICS_SCHEMA = pa.schema(
    [
        _required("phase", pa.string()),  # train: written by the loop; eval: by an evaluation
        _required("epoch", pa.int32()),
        _required("split", pa.string()),
        # all | cold: targets of the ranking; text-to-vision | vision-to-text: direction of
        # cross-modal retrieval
        _required("targets", pa.string()),
        _required("ranker", pa.string()),  # the model's name, or that of a reference
        _required("seen", pa.string()),  # filtered | kept; "none" for a loss
        _required("metric", pa.string()),
        _required("value", pa.float64()),
        ("low", pa.float64()),  # 95% bootstrap interval over users
        ("high", pa.float64()),
        ("users", pa.int64()),
    ]
)

PREDICTIONS_SCHEMA = pa.schema(
    [
        _required("split", pa.string()),
        _required("user", pa.int32()),
        _required("user_id", pa.string()),
        _required("item", pa.int32()),  # the target
        _required("item_id", pa.string()),
        _required("history", pa.int32()),  # interactions before the target
        _required("cold", pa.bool_()),  # the target has fewer than 10 training interactions
        _required("rank_kept", pa.int32()),
        ("rank_filtered", pa.int32()),  # NULL: the user already had the target
    ]
)

LATER_PREDICTIONS_SCHEMA = PREDICTIONS_SCHEMA.append(
    _required("new_item", pa.bool_())  # the target is an item that the training did not have
)
"""Schema of the predictions of an evaluation on a later preparation."""


def feature_schema(dim: int, dtype: str, level: str = "pooled") -> pa.Schema:
    """Return the schema of one feature part.

    Lists and elements are not null, because ``flatten`` drops null rows, which would misalign the
    rest.

    Args:
        dim: Width D of the embedding.
        dtype: ``float16`` or ``float32``.
        level: ``pooled`` for one vector per item. Otherwise the list has n_tokens * D elements,
            token after token.
    """
    element = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    pooled = level == "pooled"
    embedding = pa.list_(_required("element", element), dim if pooled else -1)
    return pa.schema(
        [
            _required("item", pa.int32()),
            _required("item_id", pa.string()),
            _required("content_hash", pa.string()),
            ("n_frames", pa.int32()),
            ("n_tokens", pa.int32()),  # of a text; of any input where the level is not pooled
            ("partial", pa.bool_()),  # the video was read up to where its file is damaged
            _required("embedding", embedding),
        ]
    )
