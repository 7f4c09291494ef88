"""Calibration sets and pools: origin and digest survive, damage is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from ditc.calib_data.pool import Pool, Visit, pool_from_visits
from ditc.calibset import CalibSet
from ditc.errors import BundleError, InputError

NAMES = [field.name for field in fields(CalibSet)]


def pool_of(count: int = 6) -> Pool:
    x = np.random.default_rng(0).standard_normal((count, 2, 3, 4)).astype(np.float32)
    index = np.arange(count)
    return Pool(x, index // 3, index % 3, 900.0 - 300 * (index % 3), index // 3 + 5)


def saved_with(path: Path, **changes: object) -> Path:
    points = pool_of().calibration_set()
    arrays = {name: getattr(points, name) for name in NAMES} | changes
    np.savez(path, allow_pickle=True, **{name: array for name, array in arrays.items() if array is not None})
    return path


def visit(step: int, first: int, count: int) -> Visit:
    x = np.full((count, 1, 2, 2), 10 * step, np.float32) + np.arange(first, first + count)[:, None, None, None]
    return Visit(step, 100.0 - step, first, np.arange(first, first + count) % 4, x.astype(np.float32))


def test_a_saved_set_comes_back_the_same(tmp_path: Path) -> None:
    points = pool_of().calibration_set()
    points.save(tmp_path / "calib.npz")
    loaded = CalibSet.load(tmp_path / "calib.npz")
    for name in NAMES:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(points, name))
        assert getattr(loaded, name).dtype == getattr(points, name).dtype
    assert loaded.digest == points.digest
    assert len(loaded) == 6


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        pool_of().calibration_set().save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_covers_every_field(name: str) -> None:
    points = pool_of().calibration_set()
    changed = getattr(points, name).copy()
    changed.flat[-1] += 1
    assert replace(points, **{name: changed}).digest != points.digest


def test_the_digest_covers_shape_and_type() -> None:
    points = pool_of().calibration_set()
    others = [
        points,
        replace(points, x=points.x.reshape(6, 4, 3, 2)),
        replace(points, step=points.step.view(np.uint64)),
        replace(points, label=points.sample, sample=points.label),
    ]
    assert len({other.digest for other in others}) == 4


def test_the_digest_does_not_depend_on_the_layout_in_memory() -> None:
    points = pool_of().calibration_set()
    assert replace(points, x=np.asfortranarray(points.x)).digest == points.digest


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_one_of_the_fields_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"is not a calibration set"):
        CalibSet.load(saved_with(tmp_path / "calib.npz", **{name: None}))


def test_a_pickled_object_is_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a calibration set .*allow_pickle"):
        CalibSet.load(saved_with(tmp_path / "calib.npz", label=np.array([{}], dtype=object)))


def npy_bytes() -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


OTHER_FILES = {
    "missing": None,
    "empty": b"",
    "cut in the magic": b"PK",
    "text": b"not a zip",
    "zip without a directory": b"PK\x03\x04" + b"\0" * 40,
    "one plain array": npy_bytes(),
}


@pytest.mark.parametrize("data", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "calib.npz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BundleError, match=r"calib\.npz is not a calibration set"):
        CalibSet.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = saved_with(tmp_path / "calib.npz")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BundleError, match=r"calib\.npz is not a calibration set"):
        CalibSet.load(path)


def test_a_damaged_value_is_refused(tmp_path: Path) -> None:
    path = saved_with(tmp_path / "calib.npz")
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF  # inside x, the first array
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"calib\.npz is not a calibration set"):
        CalibSet.load(path)


def test_a_pool_is_ordered_by_sample_and_step_whatever_order_its_visits_came_in() -> None:
    visits = [visit(step, first, count) for first, count in ((0, 2), (2, 3)) for step in range(3)]
    pools = [pool_from_visits(order) for order in (visits, visits[::-1])]
    for pool in pools:
        assert pool.sample.tolist() == np.repeat(np.arange(5), 3).tolist()
        assert pool.step.tolist() == [0, 1, 2] * 5
        np.testing.assert_array_equal(pool.x[:, 0, 0, 0], 10 * pool.step + pool.sample)
        np.testing.assert_array_equal(pool.t, 100.0 - pool.step)
        np.testing.assert_array_equal(pool.label, pool.sample % 4)


@pytest.mark.parametrize("visits", [[], [visit(0, 0, 0)]])
def test_an_empty_pool_is_refused(visits: list[Visit]) -> None:
    with pytest.raises(InputError, match=r"pool is empty; record at least one image"):
        pool_from_visits(visits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pool_with_a_point_that_is_no_number_is_refused(bad: float) -> None:
    broken = visit(0, 0, 3)
    broken.x[1, 0, 1, 1] = bad
    with pytest.raises(InputError, match=r"NaN or infinite points"):
        pool_from_visits([broken, visit(1, 0, 3)])
