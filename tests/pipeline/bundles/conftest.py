"""Home directories whose database has its tables, which MLflow takes seconds to make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tracking.runs import connect


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes a home directory with an empty registry."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = tmp_path_factory.mktemp("made")
        connect(made)

    def copy(name: str) -> Path:
        home = tmp_path_factory.mktemp(name)
        shutil.copy(made / "mlflow.db", home)
        return home

    return copy
