"""Registry of the tasks: a new one is one file and one line."""

from typing import Any

from features.registry import Registry
from trainer.tasks.alignment import Alignment
from trainer.tasks.base import Task
from trainer.tasks.next_item import NextItem

NEXT_ITEM = "next-item"

TASKS: Registry[type[Task[Any]]] = Registry(
    "task",
    {
        NEXT_ITEM: NextItem,
        "alignment": Alignment,
    },
    group="mmrec.tasks",
    base=Task,
)
