"""The card, its memory and the versions of the libraries."""

import os
import platform
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import torch

from tests.gpu import stand_ins
from tests.gpu.parts import Report, Setup

_WITHOUT_STAND_INS = ("PIL", "faiss", "hypothesis", "pytest", "transformers")
_LIBRARIES = ("pytest", "triton", "transformers", "torchvision", "liger-kernel", "inf-cl")


def run(setup: Setup, report: Report) -> None:
    """Report what the figures of the other parts depend on."""
    report("python", platform.python_version())
    report("torch", torch.__version__)
    report("numpy", np.__version__)
    report("cores", len(os.sched_getaffinity(0)))
    for library in _LIBRARIES:
        try:
            report(library, metadata.version(library))
        except metadata.PackageNotFoundError:
            report(library, "not installed")
    for package in stand_ins.PACKAGES:
        try:
            __import__(package)
        except ImportError:
            continue
    missing = [*stand_ins.missing(), *(name for name in _WITHOUT_STAND_INS if not find_spec(name))]
    report("not installed", ", ".join(missing) or "nothing that the parts need")
    if setup.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        report("card", card.name)
        report("GiB of the card", round(card.total_memory / 2**30, 1))
        report("CUDA", torch.version.cuda)
    else:
        report("card", f"CPU {platform.machine()}")
