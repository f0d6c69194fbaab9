"""What commands read of prompts and of a pipeline's arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibatt_compiler.cli.pipelines import pipeline_arguments, read_cases
from calibatt_compiler.errors import OptionError, PipelineError


def test_prompt_files(tmp_path: Path):
    text, listed = tmp_path / "p.txt", tmp_path / "p.json"
    text.write_text("a fox\n\n  a bird  \n", encoding="utf-8")
    listed.write_text(json.dumps(["a fox", {"prompt": "a bird", "seed": 77}]), encoding="utf-8")
    assert [(c.prompt, c.seed) for c in read_cases(text, ["a cat"], 5)] == [
        ("a fox", 5),
        ("a bird", 6),
        ("a cat", 7),
    ]
    assert [(c.prompt, c.seed) for c in read_cases(listed, None, 5)] == [
        ("a fox", 5),
        ("a bird", 77),
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompt_files_of_any_editor(tmp_path: Path, mark: bytes, end: str):
    odd = "a fox\u2028in\x85the\x0csnow"
    contents = {
        "p.txt": end.join([odd, "", "a bird"]),
        "p.json": json.dumps([odd, "a bird"]),
        "p.jsonl": end.join([json.dumps(odd), "", json.dumps({"prompt": "a bird", "seed": 6})]),
        "p.NDJSON": end.join([json.dumps({"prompt": odd}, ensure_ascii=False), '"a bird"', ""]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(mark + content.encode())
        found = [(case.prompt, case.seed) for case in read_cases(tmp_path / name, None, 5)]
        assert found == [(odd, 5), ("a bird", 6)], name


@pytest.mark.parametrize("seed", ["true", "1.0", '"1"', "null", "18446744073709551616", "1e3"])
def test_seeds_that_are_no_integers(tmp_path: Path, seed: str):
    entry = f'{{"prompt": "a", "seed": {seed}}}'
    for name, content in (("p.json", f"[{entry}]"), ("p.jsonl", entry)):
        (tmp_path / name).write_text(content)
        with pytest.raises(PipelineError, match="no prompt"):
            read_cases(tmp_path / name, None, 0)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[1]", '[{"seed": 1}]', '[{"prompt": "a", "x": 1}]']
)
def test_wrong_prompt_files(tmp_path: Path, content: str):
    for name in ("p.json", "p.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(PipelineError):
            read_cases(tmp_path / name, None, 0)


def test_pipeline_arguments():
    class Pipe:
        def __call__(self, prompt, height=1, width=1, negative_prompt=None, flag=False):
            """Take what a pipeline takes."""

    got = pipeline_arguments(
        Pipe(), {"height": 64, "width": None}, ["flag=true", "negative_prompt=a=b", "width=3"]
    )
    assert got == {"height": 64, "width": 3, "flag": True, "negative_prompt": "a=b"}
    for wrong in (["flag"], ["=1"], ["depth=3"]):
        with pytest.raises(OptionError):
            pipeline_arguments(Pipe(), {}, wrong)
