"""Files: artifacts are whole or absent, and a failed write is one clear line."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.errors import InputError
from ditc.files import CHUNK_BYTES, atomic_folder, atomic_write, digest_of, sha256_of, writing

LAW = settings(deadline=None)  # a busy machine stalls now and then

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fill_and_fail(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as folder:
        (folder / "new").write_bytes(b"new")
        raise error


def refuse_with(code: int) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, "No space left on device")

    return refuse


@LAW
@given(JSON)
def test_a_digest_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    assert digest_of(value) == digest_of(reversed_keys(value))


def test_a_digest_depends_on_every_value_and_on_the_order_of_lists() -> None:
    values = [{"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, [1, 2], [2, 1], [[1], 2], "1", 1, None]
    digests = [digest_of(value) for value in values]
    assert len(set(digests)) == len(values)
    assert all(len(digest) == 16 for digest in digests)


def test_a_digest_stays_what_it_was_in_earlier_releases() -> None:
    assert digest_of([True, False]) == hashlib.sha256(b"[true,false]").hexdigest()[:16]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_file_hash_covers_every_byte(tmp_path: Path, size: int) -> None:
    data = b"\x00" * (size - 1) + b"\x07" * min(size, 1)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    atomic_write(target, b"old")
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert names_in(tmp_path) == ["deep", "deep/file.json"]


def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.json"
    atomic_write(target, b"old")
    monkeypatch.setattr("ditc.files.os.fsync", refuse_with(errno.ENOSPC))
    with pytest.raises(InputError, match=r"can't write .*file\.json: No space left on device; free some space"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file.json"]


def test_a_failed_write_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused, writing(tmp_path / "out.bin"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere")
    assert str(refused.value).splitlines() == [
        f"can't write {tmp_path / 'out.bin'}: Permission denied; free some space or choose a folder you may write to"
    ]


def test_an_error_that_is_no_failed_write_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), writing(Path("out")):
        raise ZeroDivisionError


@pytest.mark.parametrize("write", [lambda path: atomic_write(path, b""), lambda path: atomic_folder(path).__enter__()])
def test_a_path_below_a_regular_file_is_refused_in_one_line(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"can't write .*below: Not a directory") as refused:
        write(tmp_path / "file" / "below")
    assert "\n" not in str(refused.value)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_appears_under_its_name_only_when_the_block_is_done(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "bundle"
    with atomic_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(b"1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names_in(tmp_path) == ["sub", "sub/bundle", "sub/bundle/inner", "sub/bundle/inner/file"]


def test_an_exception_leaves_no_trace_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(tmp_path / "bundle", KeyboardInterrupt())
    assert names_in(tmp_path) == []


def test_an_exception_keeps_the_folder_that_stood_there(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(target, ZeroDivisionError())
    assert names_in(tmp_path) == ["bundle", "bundle/old"]
    assert (target / "old").read_bytes() == b"old"


def test_the_old_folder_is_replaced_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    with atomic_folder(target) as folder:
        (folder / "new").write_bytes(b"new")
        assert (target / "old").read_bytes() == b"old"
    assert names_in(tmp_path) == ["bundle", "bundle/new"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_folder(target) as stale:
        pass
    stale.mkdir()
    (stale / "leftover").write_bytes(b"1")
    with atomic_folder(target) as folder:
        assert folder == stale
        assert names_in(folder) == []
    assert names_in(tmp_path) == ["bundle"]


def test_a_full_disk_while_filling_a_folder_is_one_line(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(InputError, match=r"can't write .*bundle: No space left on device"):
        fill_and_fail(target, OSError(errno.ENOSPC, "No space left on device"))
    assert names_in(tmp_path) == []


def test_a_failed_swap_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    rename = Path.rename

    def fail_for_the_new(self: Path, to: Path) -> Path:
        return refuse_with(errno.EIO)() if self.name.endswith(".partial") else rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(InputError), atomic_folder(target) as folder:
        (folder / "new").write_bytes(b"new")
    assert (target / "old").read_bytes() == b"old"
