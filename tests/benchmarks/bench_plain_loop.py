"""SASRec's training step against a plain PyTorch loop over the same windows, in one process.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_plain_loop --dataset NAME [--set NAME=VALUE]

mmrec's own loop trains ``sasrec``. After each of its steps, the plain loop takes a step on the
windows of the same batch, so that both meet the same load of the machine. The plain loop is what
one writes with ``torch.nn``: ``Embedding``, ``TransformerEncoder`` with a causal mask, the scores
of every predicted position and every item, ``cross_entropy``, ``clip_grad_norm_`` and ``AdamW``. It
has the sizes, the dropout, the learning rate and the padding of mmrec, but its batches are cut
before the clock starts. mmrec's step includes cutting the batch and reading the losses.

The ratio is the CPU seconds of the plain step over those of mmrec's: above 1, mmrec is faster.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from features.dataset import load_dataset
from features.warehouse import Warehouse
from tests.gpu import world
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures, Shard, TrainingData
from trainer.models.sasrec import SASRecConfig

WARM_STEPS = 10


class PlainSASRec(nn.Module):
    """SASRec of the layers of ``torch.nn``, with the order of layers of mmrec's."""

    def __init__(self, settings: SASRecConfig, n_items: int) -> None:
        super().__init__()
        dim = settings.dim
        self.item = nn.Embedding(n_items, dim)
        self.position = nn.Embedding(settings.length, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(settings.dropout)
        layer = nn.TransformerEncoderLayer(
            dim, settings.heads, settings.hidden, settings.dropout, "gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(dim))
        for block in self.encoder.layers:
            block.self_attn.dropout = 0.0  # mmrec's attention weights have no dropout
        for weight in (self.item.weight, self.position.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the states (B, L, D)."""
        columns_L = torch.arange(items_BL.shape[1])
        places_BL = (lengths_B[:, None] - 1 - columns_L).clamp_min(0)
        x_BLD = self.dropout(self.norm(self.item(items_BL) + self.position(places_BL)))
        causal_LL = nn.Transformer.generate_square_subsequent_mask(items_BL.shape[1])
        states_BLD: Tensor = self.encoder(x_BLD, mask=causal_LL, is_causal=True)
        return states_BLD


class PlainLoop:
    """The plain training loop."""

    def __init__(self, settings: SASRecConfig, config: TrainConfig, n_items: int) -> None:
        self.model = PlainSASRec(settings, n_items)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.clip = config.clip

    def step(self, windows_BL: Tensor, lengths_B: Tensor) -> float:
        """Take a step on windows, padded on the right; return the loss."""
        inputs_BL, targets_BL = windows_BL[:, :-1], windows_BL[:, 1:]
        is_target_BL = torch.arange(inputs_BL.shape[1]) < lengths_B[:, None] - 1
        states_BLD = self.model(inputs_BL, lengths_B - 1)
        logits_MN = states_BLD[is_target_BL] @ self.model.item.weight.T
        loss = functional.cross_entropy(logits_MN, targets_BL[is_target_BL])
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()


def measure(warehouse: Warehouse, name: str, pairs: tuple[str, ...], steps: int) -> None:
    """Print the CPU milliseconds of both steps, and their ratio."""
    dataset = load_dataset(warehouse, name)
    n_items = len(dataset.train_counts)
    features = ItemFeatures(n_items=n_items, vectors={}, present={})
    data = TrainingData(dataset, features, torch.device("cpu"))
    task, config = world.next_item("sasrec", data, pairs)
    assert isinstance(task.model.settings, SASRecConfig)
    plain = PlainLoop(task.model.settings, config, n_items)
    _, batches = task.epoch(config, 0, skip=0, shard=Shard())
    windows = [(batch.sequences.items_BL, batch.sequences.lengths_B) for batch in batches]
    seconds: list[tuple[float, float]] = []
    mark = 0.0

    def on_step(step: int, _: int) -> bool:
        nonlocal mark
        ours = time.process_time() - mark
        start = time.process_time()
        plain.step(*windows[step - 1])
        mark = time.process_time()
        seconds.append((ours, mark - start))
        return len(seconds) < min(WARM_STEPS + steps, len(windows) - 1)

    world.train(task, config, on_step)
    ours_S, plain_S = 1e3 * np.array(seconds[WARM_STEPS:]).T
    low, middle, high = np.percentile(plain_S / ours_S, [25, 50, 75])
    print(
        f"{name} {' '.join(pairs)}: mmrec {np.median(ours_S):.1f} CPU ms, plain loop"
        f" {np.median(plain_S):.1f}; ratio: median {middle:.3f}, quartiles {low:.3f} to"
        f" {high:.3f}, of sums {plain_S.sum() / ours_S.sum():.3f} ({len(ours_S)} steps)",
        flush=True,
    )


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--warehouse", help="default: $MMREC_WAREHOUSE, else ./warehouse")
    parser.add_argument("--dataset", required=True, help="a prepared dataset")
    parser.add_argument("--set", action="append", default=[], dest="pairs", help="a setting")
    parser.add_argument("--steps", type=int, default=150, help="steps that are measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(Warehouse(given.warehouse), given.dataset, tuple(given.pairs), given.steps)


if __name__ == "__main__":
    main()
