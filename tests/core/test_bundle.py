"""Bundles: law 6, a bundle with any byte changed is refused, naming the file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.bundle import FileEntry, Manifest, open_bundle, read_tables, seal_bundle, write_tables
from ditc.errors import BundleError
from ditc.passes import program_from_schedule
from ditc.policies import schedule_for
from ditc.runtime.samplers import sampler_table
from ditc.spec import ModelSpec

LAW = settings(deadline=None)  # a busy machine stalls now and then

SPEC = ModelSpec(
    name="tiny",
    family="dit",
    in_channels=1,
    height=2,
    width=2,
    num_classes=2,
    null_label=2,
    cfg_channels=1,
    branches=("0.attn", "0.mlp"),
    branch_shape=(4, 2),
    parameters=7,
)
COLUMNS = sampler_table(SPEC.diffusion, SPEC.sampler, 3)
TIMES = COLUMNS["t"].tolist()
TABLES = {f"sampler.{name}": column for name, column in COLUMNS.items()}
TABLES |= {"compensation.k": np.ones((3, 1)), "compensation.mu": np.zeros((3, 1))}
CACHES = {f"cache.{name}": ["batch", 4, 2] for name in SPEC.branches}
X, OUT, MODULATION = {"x": ["batch", 1, 2, 2]}, {"out": ["batch", 2, 2, 2]}, {"modulation": ["batch", 5]}
PORTS = {
    "condition": ({"t": ["steps"], "y": ["batch"]}, {"modulation": ["steps", "batch", 5]}),
    "full": (X | MODULATION, OUT | CACHES),
    "reuse": (X | MODULATION | CACHES, OUT),
}
FILES = (
    "calib/scales.json",
    "manifest.json",
    "manifest.sha256",
    "reference/full.onnx",
    "segments/condition.onnx",
    "segments/full.onnx",
    "segments/full.onnx.data",
    "segments/reuse.onnx",
    "tables.safetensors",
)


def manifest_of(**changes: Any) -> Manifest:
    def program(policy: str) -> Any:
        return program_from_schedule(schedule_for(policy, SPEC, 3), TIMES, SPEC.branches)

    values = {
        "ditc_version": "0.1.0",
        "model": SPEC,
        "program": program("fora:2"),
        "reference_program": program("none"),
        "precision": "w8a8",
        "guidance": 1.5,
        "batch": 1,
    }
    return Manifest(**{**values, **changes})


def bytes_of(name: str) -> bytes:
    """A file's bytes: of a graph one without nodes that has the ports of its segment."""
    if not name.endswith(".onnx"):
        return f"bytes of {name}".encode()
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(port, onnx.TensorProto.FLOAT, shape) for port, shape in ports.items()]
        for ports in PORTS[Path(name).stem]
    )
    return bytes(onnx.helper.make_model(onnx.helper.make_graph([], name, inputs, outputs)).SerializeToString())


def build(folder: Path) -> Path:
    for name in FILES:
        if name.endswith((".onnx", ".data", "scales.json")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes_of(name))
    write_tables(folder / "tables.safetensors", TABLES)
    seal_bundle(folder, manifest_of())
    return folder


@pytest.fixture(scope="module")
def sealed() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield build(Path(folder) / "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build(tmp_path / "bundle")


def reseal(folder: Path, **changes: Any) -> None:
    """Write a manifest as someone who can hash would: it matches its seal, whatever it says."""
    raw = json.loads((folder / "manifest.json").read_bytes()) | changes
    text = json.dumps(raw).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_bytes(sha256(text).hexdigest().encode() + b"\n")


@contextmanager
def changed_byte(path: Path, place: int, flip: int) -> Iterator[None]:
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        original = file.read(1)
        file.seek(place)
        file.write(bytes([original[0] ^ flip]))
        try:
            yield
        finally:
            file.seek(place)
            file.write(original)


def file_entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return FileEntry(sha256=sha256(data).hexdigest(), size_bytes=len(data)).model_dump()


def assert_refused(folder: Path, name: str) -> None:
    with pytest.raises(BundleError) as refused:
        open_bundle(folder)
    assert name in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_sealed_bundle_opens_with_all_that_was_put_in(sealed: Path) -> None:
    opened = open_bundle(sealed)
    assert sorted(opened.manifest.files) == sorted(set(FILES) - {"manifest.json", "manifest.sha256"})
    assert opened.manifest.model_copy(update={"files": {}}) == manifest_of()
    assert opened.segment_path("full").read_bytes() == bytes_of("segments/full.onnx")
    assert opened.reference_path("full").read_bytes() == bytes_of("reference/full.onnx")
    for name, table in opened.tables().items():
        np.testing.assert_array_equal(table, TABLES[name])


def test_a_segment_without_an_fp_form_of_its_own_is_its_own_reference(sealed: Path) -> None:
    opened = open_bundle(sealed)
    assert opened.reference_path("condition") == opened.segment_path("condition")


def test_sizes_count_deployed_and_reference_files_apart(sealed: Path) -> None:
    manifest = open_bundle(sealed).manifest
    reference = len(bytes_of("reference/full.onnx"))
    total = sum((sealed / name).stat().st_size for name in manifest.files)
    assert manifest.size_bytes(reference=True) == reference
    assert manifest.size_bytes(reference=False) == total - reference


@LAW
@given(data=st.data(), name=st.sampled_from(FILES), flip=st.integers(1, 255))
def test_any_changed_byte_is_refused_naming_the_file(sealed: Path, data: st.DataObject, name: str, flip: int) -> None:
    place = data.draw(st.integers(0, (sealed / name).stat().st_size - 1), label="place")
    with changed_byte(sealed / name, place, flip):
        assert_refused(sealed, name)
    open_bundle(sealed)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_every_single_byte_of_the_manifest_and_its_seal_counts(sealed: Path, name: str) -> None:
    for place in range((sealed / name).stat().st_size):
        with changed_byte(sealed / name, place, 1 << place % 8):
            assert_refused(sealed, name)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(bundle: Path, name: str) -> None:
    file = bundle / name
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(bundle, name)


@pytest.mark.parametrize("name", FILES)
def test_an_emptied_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    assert_refused(bundle, name)


@pytest.mark.parametrize("name", FILES)
def test_a_lengthened_file_is_refused(bundle: Path, name: str) -> None:
    with (bundle / name).open("ab") as file:
        file.write(b"\n")
    assert_refused(bundle, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / "reference" / "other.onnx").write_bytes(b"keeps the folder")
    (bundle / name).unlink()
    assert_refused(bundle, name)


def test_the_reference_may_be_left_out_as_a_whole(bundle: Path) -> None:
    assert open_bundle(bundle).has_reference
    shutil.rmtree(bundle / "reference")
    opened = open_bundle(bundle)
    assert not opened.has_reference
    assert opened.reference_path("full") == opened.segment_path("full")


def test_an_emptied_reference_folder_is_refused(bundle: Path) -> None:
    (bundle / "reference" / "full.onnx").unlink()
    assert_refused(bundle, "reference/full.onnx")


def test_a_newer_schema_asks_for_a_newer_ditc(bundle: Path) -> None:
    reseal(bundle, schema_version=2, invented_later={})
    with pytest.raises(BundleError, match=r"schema 2, this ditc reads up to 1; update ditc"):
        open_bundle(bundle)


@pytest.mark.parametrize("version", [None, "1", 1.5, [], {}])
def test_a_schema_version_that_is_no_number_is_refused(bundle: Path, version: Any) -> None:
    reseal(bundle, schema_version=version)
    with pytest.raises(BundleError, match=r"it has no schema version"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"extra": 1}, "extra"),
        ({"guidance": "much"}, "guidance"),
        ({"program": {}}, "program"),
        ({"model": 3}, "model"),
    ],
)
def test_a_manifest_that_says_nonsense_is_refused_naming_the_field(
    bundle: Path, changes: dict[str, Any], where: str
) -> None:
    reseal(bundle, **changes)
    with pytest.raises(BundleError, match=rf"manifest\.json is damaged at {where}"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"bundle"', "{}"])
def test_a_manifest_that_is_json_but_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    assert_refused(bundle, "manifest.json")


def test_a_folder_that_is_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: no manifest\.json in it; .*ditc compile MODEL -o"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"is not a bundle"):
        open_bundle(tmp_path / "absent")


def test_a_file_given_as_a_bundle_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"tables\.safetensors"):
        open_bundle(bundle / "tables.safetensors")


@pytest.mark.parametrize("name", ["../outside.onnx", "segments/../../outside.onnx", "{absolute}"])
def test_a_manifest_that_points_outside_is_refused(bundle: Path, name: str) -> None:
    outside = bundle.parent / "outside.onnx"
    outside.write_bytes(b"not yours")
    name = name.format(absolute=outside)
    reseal(bundle, files={name: file_entry(outside)})
    with pytest.raises(BundleError, match=r"outside\.onnx', which lies outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("place", ["other.data", "../calib/scales.json", "/etc/passwd"])
def test_a_graph_that_keeps_tensors_outside_what_is_listed_is_refused(bundle: Path, place: str) -> None:
    model = onnx.load_model_from_string(bytes_of("segments/full.onnx"))
    tensor = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=place)
    (bundle / "segments" / "full.onnx").write_bytes(model.SerializeToString())
    seal_bundle(bundle, manifest_of())
    with pytest.raises(BundleError, match=r"keeps tensors in .* and `files` doesn't list that beside it"):
        open_bundle(bundle)


def in_blobs(folder: Path) -> Path:
    """The bundle as a model hub's cache has it: every file a link to a blob that is named by its hash."""
    snapshot, blobs = folder.with_name("snapshot"), folder.with_name("blobs")
    blobs.mkdir()
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        blob, link = blobs / sha256(file.read_bytes()).hexdigest(), snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_may_be_all_links(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_blobs(bundle)
    (tmp_path / "named").symlink_to(snapshot)
    assert open_bundle(snapshot).tables().keys() == open_bundle(tmp_path / "named").tables().keys() == TABLES.keys()
    (snapshot / "segments" / "full.onnx").resolve().write_bytes(b"changed")
    assert_refused(snapshot, "segments/full.onnx")


def test_a_link_that_leads_nowhere_is_said_to(bundle: Path) -> None:
    (bundle / "segments" / "full.onnx").unlink()
    (bundle / "segments" / "full.onnx").symlink_to("full.onnx")
    with pytest.raises(BundleError, match=r"segments/full\.onnx is a link that leads nowhere"):
        open_bundle(bundle)


def test_a_folder_in_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "segments" / "full.onnx").unlink()
    (bundle / "segments" / "full.onnx").mkdir()
    assert_refused(bundle, "segments/full.onnx is a folder, expected a file")


@pytest.mark.parametrize("name", ["reference/condition.onnx", "segments/full.onnxrt.onnx"])
def test_a_file_that_the_manifest_does_not_list_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"smuggled in")
    with pytest.raises(BundleError, match="which its manifest doesn't list; remove that file") as caught:
        open_bundle(bundle)
    assert name in str(caught.value)


def test_a_bundle_may_be_moved(bundle: Path) -> None:
    moved = bundle.rename(bundle.with_name("elsewhere"))
    assert open_bundle(moved).tables().keys() == TABLES.keys()


def test_sealing_twice_gives_the_same_bytes(bundle: Path) -> None:
    before = [(bundle / name).read_bytes() for name in ("manifest.json", "manifest.sha256")]
    seal_bundle(bundle, open_bundle(bundle).manifest)
    assert [(bundle / name).read_bytes() for name in ("manifest.json", "manifest.sha256")] == before


def test_tables_keep_names_types_shapes_and_values(tmp_path: Path) -> None:
    tables = {
        "a": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "b": np.array([np.inf, -0.0, 1e-300]),
        "c": np.array([[1, 2]], np.int64),
        "d": np.zeros((0, 4), np.float32),
    }
    write_tables(tmp_path / "t.safetensors", tables)
    read = read_tables(tmp_path / "t.safetensors")
    assert read.keys() == tables.keys()
    for name, table in tables.items():
        assert read[name].dtype == table.dtype
        np.testing.assert_array_equal(read[name], table)


@pytest.mark.parametrize("data", [None, b"", b"not safetensors", b"\xff" * 16])
def test_tables_that_cannot_be_read_are_a_bundle_error(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "t.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BundleError, match=r"can't read the tables .*t\.safetensors"):
        read_tables(path)
