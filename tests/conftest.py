import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client looks once, when it is imported

import hypothesis
import pytest

from features.warehouse import Warehouse
from tests.object_store import LocalStorage, local_storage


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    """An empty warehouse in a folder of its own."""
    warehouse = Warehouse(tmp_path / "warehouse")
    warehouse.create()
    return warehouse


@pytest.fixture(autouse=True)
def no_outer_warehouse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test never touches the warehouse of the person who runs it."""
    monkeypatch.delenv("MMREC_WAREHOUSE", raising=False)


@pytest.fixture(autouse=True, scope="module")
def frozen_modules() -> None:
    """Exclude from garbage collection what is alive before a file of tests, mostly modules.

    A full collection otherwise visits a million objects of torch and transformers, and there are
    thousands of full collections: a sixth of the time of all tests.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter free everything at its exit; DuckDB's binding reports what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, where there is one."""
    given = os.environ.get("MMREC_TEST_DATA")
    path = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data in {path}; set MMREC_TEST_DATA")
    return path


@pytest.fixture(scope="module")
def storage() -> Iterator[LocalStorage]:
    """A local S3 server with an empty bucket, for all tests of a file."""
    with local_storage() as server:
        yield server


# On a machine that others use too, how long one example takes says nothing.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

# A shell starts background jobs with SIGINT ignored, and `make test &` is one; `nohup` ignores
# SIGHUP. Tests that send the signals need handlers; child processes then start with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
