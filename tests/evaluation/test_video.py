"""Video files, read back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from calibatt_compiler.evaluation import video


def moving(frames: int = 6, height: int = 33, width: int = 47) -> np.ndarray:
    """A ramp that moves, with odd sizes."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([x * 4 + t * 5, y * 6, 200 - x * 2], -1).clip(0, 255).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """All frames of a video, RGB."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_video_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str):
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    elif codec not in av.codecs_available:
        pytest.skip("this FFmpeg has no H.264 encoder")
    frames = moving()
    path = video.write_video(tmp_path / "new" / "a.mp4", frames, 12)
    got = read(path)
    assert got.shape == (6, 34, 48, 3), "padded to even sizes"
    error = got[:, :33, :47].astype(int) - frames.astype(int)
    assert np.abs(error).mean() < 6
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_interrupted_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_av", lambda: _Interrupting(av, interrupt))
    with pytest.raises(KeyboardInterrupt):
        video.write_video(path, moving(), 12)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


class _Interrupting:
    """PyAV, interrupted at the first frame."""

    def __init__(self, module: object, interrupt: object) -> None:
        self._module = module
        self.VideoFrame = type("VideoFrame", (), {"from_ndarray": staticmethod(interrupt)})

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


def test_side_by_side_keeps_both_videos_unchanged():
    dense = moving(2, 20, 160)
    joined = video.side_by_side([("dense", dense), ("sparse", 255 - dense)])
    scale = 2
    body = joined[:, video.LABEL_HEIGHT :]
    assert body.shape == (2, 20 * scale, 2 * 160 * scale + video.GAP, 3)
    assert (body[:, ::scale, : 160 * scale : scale] == dense).all()
    assert (body[:, ::scale, 160 * scale + video.GAP :: scale] == 255 - dense).all()
    label = joined[0, : video.LABEL_HEIGHT]
    assert len(np.unique(label.reshape(-1, 3), axis=0)) > 2, "there is text"


def test_contact_sheet_shows_the_difference():
    dense = np.full((9, 40, 200, 3), 50, np.uint8)
    sparse = dense.copy()
    sparse[:, :, :, 0] += 10
    sheet = video.contact_sheet(dense, sparse, pictures=3)
    height = (video.LABEL_HEIGHT + 40) * 3
    assert sheet.shape == (height, 3 * 200 + 2 * video.GAP, 3)
    assert tuple(sheet[-1, 0]) == (10 * video.DIFFERENCE_GAIN, 0, 0)
