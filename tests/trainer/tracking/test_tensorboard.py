"""The event file of TensorBoard, read back."""

import pytest

from features.warehouse import Warehouse
from tests.trainer.tracking.tracked import stored, train

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_event_file_holds_losses_rates_metrics_settings_and_the_final_table(
    warehouse: Warehouse,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, report, lines = train(warehouse, ["tensorboard"])
    assert len(lines) == 1
    assert f"tensorboard --logdir {warehouse.runs_dir}" in lines[0]
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for name, values in {
        "train/loss": stored(run, "train", "loss", "none"),
        "validation/filtered/HR@10": stored(run, "validation", "HR@10", "filtered"),
        "validation/kept/NDCG@10": stored(run, "validation", "NDCG@10", "kept"),
        "rate/lr": [1e-3 * steps / 100 for steps in (3, 6, 9)],
    }.items():
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2, 3], name
        assert [event.value for event in scalars] == pytest.approx(values), name
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| dim | 8 |" in settings.tensor_proto.string_val[0]
    (final,) = events.Tensors("final/text_summary")
    assert f"| best/epoch | {report.best_epoch} |".encode() in final.tensor_proto.string_val[0]
    (best,) = events.Scalars("best/filtered/HR@10")
    assert best.value == pytest.approx(report.best)
