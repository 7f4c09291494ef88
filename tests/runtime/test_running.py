"""Running a bundle from the command line's side: the time that it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.bundle import Bundle
from ditc.runtime.options import RunOptions
from ditc.runtime.running import run_bundle


def test_the_time_per_image_is_the_whole_request(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    report = run_bundle(bundles["cached"].path, RunOptions(labels=(0, 1, 2)), tmp_path / "i", watch=lambda _: None)
    steps = sum(times.total_seconds for times in report.segments.values()) / 3
    assert report.seconds_per_image > steps
    assert report.seconds_per_image_outside_steps == pytest.approx(report.seconds_per_image - steps)
