"""Configuration files: what of any value or encoding is read, and that whatever else is there is one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditc.errors import CheckpointError
from ditc.exporter.config_files import Config, Keys, class_named, config_of, read_json

KEYS = Keys(read={"number": 1.0, "whole": 1, "flag": True, "name": "a"}, fixed={"fixed": (None, None)})
# what JSON can hold, in its own words; some of it no float or table can
ODD = [
    *("null", "true", '"a"', '"A\\nB"', "[]", "[1]", "{}", '{"a": 1}', "1", "-1", "1.5", "1e999", "-1e999", "NaN"),
    *("1" + "0" * 308, "1" + "0" * 309, "-1" + "0" * 400, "1" + "0" * 4000),
]


def refusal(path: Path) -> str | None:
    """Return the refusal of a file, all of its values asked for; None where each can be had."""
    try:
        entries = read_json(path, "a test")
        config = config_of(path, entries, KEYS)
        config.number("number"), config.whole("whole"), config.flag("flag"), config.one_of("name", {"a": 1})
    except CheckpointError as e:
        return str(e)
    return None


@pytest.mark.parametrize("value", ODD, ids=lambda text: text[:20])
@pytest.mark.parametrize("key", [*sorted(KEYS.known), "_use_default_values", "_class_name", "unknown"])
def test_whatever_json_holds_is_read_or_is_one_line(key: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"{key}": {value}}}')
    said = refusal(tmp_path / "config.json")
    assert said is None or (said.isprintable() and len(said) < 400 and str(tmp_path) in said)


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1e999", "1" + "0" * 309, "1" + "0" * 4000])
def test_a_number_that_no_float_holds_is_named(value: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"number": {value}}}')
    assert "number is " in str(refusal(tmp_path / "config.json"))


def test_the_largest_float_is_one() -> None:
    assert Config(Path("c"), "kind", {"a": sys.float_info.max}).number("a") == sys.float_info.max
    assert Config(Path("c"), "kind", {"a": int(sys.float_info.max)}).number("a") < math.inf


@pytest.mark.parametrize("value", [1, True, "number", {"number": 1}])
def test_keys_left_to_the_class_are_a_list(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"_use_default_values is .*, expected a list of keys"):
        config_of(tmp_path, {"_use_default_values": value}, KEYS)


@pytest.mark.parametrize("name", ["A\nB", 7, None, ["A"], "A" * 1000])
def test_an_odd_class_name_is_short(name: Any) -> None:
    assert len(class_named({"_class_name": name})) < 100
    assert "\n" not in str(CheckpointError(class_named({"_class_name": name})))


def test_a_file_is_read_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"name": "größer"}, ensure_ascii=False), encoding="utf-8")
    code = (
        "from pathlib import Path; from ditc.exporter.config_files import read_json\n"
        f"print(ascii(read_json(Path({str(path)!r}), 'a test')))"
    )
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    child = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=False)
    assert child.stdout.strip() == ascii({"name": "größer"}), child.stderr


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"name": "a"}')
    assert read_json(tmp_path / "config.json", "a test") == {"name": "a"}
