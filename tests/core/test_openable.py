"""An ONNX file and its weights under names that libraries take, whatever the names and the links that lead there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ditc.errors import InputError
from ditc.openable import OPEN_FILES, Links, check_utf8, is_utf8, openable, plain_name

ODD = os.fsdecode(b"caf\xe9")  # no UTF-8
WEIGHT = np.ones((64, 64), np.float32)


def graph_in(folder: Path) -> Path:
    """A graph whose one weight lies in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [numpy_helper.from_array(WEIGHT, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "g.onnx"), save_as_external_data=True, location="g.onnx.data", size_threshold=0)
    return folder / "g.onnx"


def linked(graph: Path, to: dict[str, str]) -> Path:
    """The graph and its weights moved to these places in the folder above, links in their stead."""
    for name, place in to.items():
        file, real = graph.with_name(name), graph.parents[1] / place
        real.parent.mkdir(parents=True, exist_ok=True)
        file.rename(real)
        file.symlink_to(os.path.relpath(real, file.parent))
    return graph


LAYOUTS: dict[str, dict[str, str]] = {
    "files": {},
    "a hub's cache": {"g.onnx": "blobs/a", "g.onnx.data": "blobs/b"},
    "a folder for each": {"g.onnx": "a/blob", "g.onnx.data": "b/blob"},
    "weights alone": {"g.onnx.data": "blobs/b"},
    "the graph alone": {"g.onnx": "blobs/a"},
}
FOLLOWED = {Links.IN_ONE_FOLDER: {"files", "a hub's cache"}, Links.NONE: {"files"}}


@pytest.mark.parametrize("links", Links)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_links_that_a_library_does_not_follow_are_replaced_by_files(tmp_path: Path, layout: str, links: Links) -> None:
    graph = linked(graph_in(tmp_path / "bundle"), LAYOUTS[layout])
    with openable(graph, links) as name:
        assert (name == str(graph)) == (layout in FOLLOWED[links])
        given = Path(name)
        assert given.read_bytes() == graph.read_bytes()
        assert given.with_name("g.onnx.data").read_bytes() == WEIGHT.tobytes()
        assert layout in FOLLOWED[links] or not given.with_name("g.onnx.data").is_symlink()
    assert given == graph or not given.parent.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnx_runtime_opens_every_layout(tmp_path: Path, layout: str) -> None:
    from ditc.engines.onnxrt import OnnxRuntimeBackend

    plain = linked(graph_in(tmp_path / "made" / "bundle"), LAYOUTS[layout])  # by onnx, which takes no odd name
    graph = plain.parents[1].rename(tmp_path / ODD) / "bundle" / plain.name
    session = OnnxRuntimeBackend(threads=1).session(graph)
    assert session.run(None, {"x": np.ones((1, 64), np.float32)})[0].tolist() == [[64.0] * 64]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_behind_links_are_read_for_the_compiler(tmp_path: Path, layout: str) -> None:
    from ditc.exporter.onnx_files import load_graph, save_graph

    model = load_graph(linked(graph_in(tmp_path / "bundle"), LAYOUTS[layout]))
    save_graph(model, tmp_path / "copy" / "g.onnx")
    assert (tmp_path / "copy" / "g.onnx.data").read_bytes() == WEIGHT.tobytes()


def test_a_file_with_two_names_is_read_for_the_compiler(tmp_path: Path) -> None:
    from ditc.exporter.onnx_files import load_graph

    graph = graph_in(tmp_path)
    os.link(tmp_path / "g.onnx.data", tmp_path / "other")
    tensor: Any = load_graph(graph).graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_where_no_hard_link_can_be_made_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    graph = linked(graph_in(tmp_path / "bundle"), LAYOUTS["a folder for each"])
    with openable(graph, Links.NONE) as name:
        assert Path(name).with_name("g.onnx.data").stat().st_nlink == 1
        assert Path(name).with_name("g.onnx.data").read_bytes() == WEIGHT.tobytes()


def test_a_name_in_utf8_stays_and_another_gets_one(tmp_path: Path) -> None:
    for folder in (tmp_path / "café", tmp_path / ODD, tmp_path / "a \"b\" 'c'\n"):
        folder.mkdir()
        with plain_name(folder / "file") as name:
            Path(name).write_text(name.encode().decode())
        assert (folder / "file").read_text() == name
        assert (name == str(folder / "file")) == (folder.name != ODD)
    assert not Path(name.replace(str(tmp_path), str(OPEN_FILES))).exists()


def test_a_name_that_a_library_can_not_be_given_is_refused_in_one_line(tmp_path: Path) -> None:
    check_utf8(tmp_path / "café", "TensorRT's builder")
    with pytest.raises(InputError, match=r"TensorRT's builder can be given names in UTF-8 only, found b'.*caf\\xe9'"):
        check_utf8(tmp_path / ODD, "TensorRT's builder")


def test_a_name_that_the_locale_writes_in_other_bytes_is_none_in_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_utf8(Path("café"))
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    assert not is_utf8(Path("café"))


def test_without_another_name_an_odd_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditc.openable.OPEN_FILES", tmp_path / "none")
    with (
        pytest.raises(InputError, match="libraries can be given names in UTF-8"),
        plain_name(tmp_path / ODD / "f"),
    ):
        pass
