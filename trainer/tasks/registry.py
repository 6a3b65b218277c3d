"""Registry of the tasks. A new task is one file, and one line here."""

from typing import Any

from features.registry import Registry
from trainer.tasks.alignment import Alignment
from trainer.tasks.base import Task
from trainer.tasks.next_item import NextItem

NEXT_ITEM = "next-item"
"""Name of the task of ``mmrec train``."""

TASKS: Registry[type[Task[Any]]] = Registry(
    "task",
    {
        NEXT_ITEM: NextItem,
        "alignment": Alignment,
    },
    group="mmrec.tasks",
    base=Task,
)
