"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_picture_of_the_data_flow_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("dataflow", ROOT / "docs" / "dataflow.py")
    assert spec is not None
    assert spec.loader is not None
    dataflow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dataflow)
    made = dataflow.draw()
    assert dataflow.PICTURE.read_text("utf-8") == made, "python docs/dataflow.py"
    for each in dataflow.PASSES:
        assert each.__name__.replace("_", " ") in made
