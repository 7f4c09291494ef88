"""Files are what their first bytes say, whatever their names: weights are read, and anything else is named."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from ditc.errors import CheckpointError
from ditc.exporter.weight_files import read_tensors

TENSORS = {"x_embedder.proj.weight": torch.arange(12.0).reshape(3, 4)}
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", "", ".html")


def torch_bytes(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, **options)
    return buffer.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


READABLE: dict[str, Callable[[], bytes]] = {
    "safetensors": lambda: safetensors_bytes(TENSORS),
    "torch's archive": torch_bytes,
    "torch before 1.6": lambda: torch_bytes(_use_new_zipfile_serialization=False),
}

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700611775\n"
OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is an empty file"),
    "a pointer of Git LFS": (lambda: POINTER, "is a Git LFS pointer, not the weights themselves"),
    "a page": (lambda: b"<!DOCTYPE html>\n<html><title>Log in</title></html>", "is a page in HTML or XML"),
    "a page after blanks": (lambda: b"\xef\xbb\xbf\n  <html>", "is a page in HTML or XML"),
    "an error of a store": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML or XML"),
    "an answer of the hub": (lambda: b"Entry not found", "is a text file, beginning 'Entry not found'"),
    "an error in JSON": (lambda: b'{"error": "Access to model is restricted"}', "is a text file, beginning '{"),
    "several lines": (lambda: b"Access to model me/mine\nis restricted.\n", "is a text file, beginning"),
    "an archive of other things": (lambda: zip_bytes(readme=b"hello"), "is a zip archive that holds readme"),
    "NumPy's archive": (npz_bytes, "is a zip archive that holds weight.npy"),
    "NumPy's array": (npy_bytes, "is a NumPy array"),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
    "gzip": (lambda: gzip.compress(torch_bytes()), "is a gzip archive"),
    "zeros": (lambda: bytes(64), "begins with the bytes 00 00 00 00"),
    "all bytes": (lambda: bytes(range(256)), "begins with the bytes 00 01 02 03"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", READABLE)
def test_weights_are_read_under_any_name(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(READABLE[name]())
    assert torch.equal(read_tensors(path)["x_embedder.proj.weight"], TENSORS["x_embedder.proj.weight"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_weights_is_named_under_any_name(name: str, suffix: str, tmp_path: Path) -> None:
    make, said = OTHERS[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(make())
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_file_cut_short_is_called_that(name: str, suffix: str, share: float, tmp_path: Path) -> None:
    content = READABLE[name]()
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        read_tensors(path)


def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(zip_bytes(**{"m/constants.pkl": b".", "m/code/m.py": b"", "m/data.pkl": b"."}))
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_code_in_a_pickle_does_not_run_and_is_named(protocol: int, suffix: str, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            import os

            return os.mkdir, (str(tmp_path / "it-ran"),)

    path = tmp_path / f"payload{suffix}"
    path.write_bytes(pickle.dumps(Touch(), protocol=protocol))
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert "runs no code from a checkpoint" in str(caught.value)
    assert "mkdir" in str(caught.value) or protocol > 3  # torch reads those no further than to their first call
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("facebook/DiT-XL-2-256", "run: hf download facebook/DiT-XL-2-256 --local-dir DiT-XL-2-256"),
        ("https://huggingface.co/facebook/DiT-XL-2-256", "run: hf download facebook/DiT-XL-2-256 "),
        ("https://huggingface.co/facebook/DiT-XL-2-256/tree/main", "run: hf download facebook/DiT-XL-2-256 "),
        (
            "facebook/DiT-XL-2-256/transformer",
            "facebook/DiT-XL-2-256 --local-dir DiT-XL-2-256 and give DiT-XL-2-256/tran",
        ),
        ("facebook/DiT-XL-2-256@v1", "hf download facebook/DiT-XL-2-256 --revision v1 --local-dir DiT-XL-2-256"),
        ("hf://facebook/DiT-XL-2-256", "run: hf download facebook/DiT-XL-2-256 --local-dir DiT-XL-2-256"),
        ("hf://facebook/DiT@main/vae", "run: hf download facebook/DiT --local-dir DiT and give DiT/vae"),
        ("https://hf.co/a/b/blob/v2/c.pt", "run: hf download a/b --revision v2 --local-dir b and give b/c.pt"),
        ("https://example.org/DiT.pt", "nothing is downloaded: fetch the file first"),
        ("here/weights.pt", "no such checkpoint: here/weights.pt"),
    ],
)
def test_a_name_of_a_hub_says_that_nothing_is_downloaded(name: str, said: str) -> None:
    from ditc.exporter.models import load_model

    with pytest.raises(CheckpointError) as caught:
        load_model(name)
    assert said in str(caught.value)
    assert "expected a .pt or .safetensors file or a diffusers folder" in str(caught.value)


@pytest.mark.parametrize("name", ["weights.pt", "./mine/weights.pt", "/nowhere/weights.safetensors", "mine"])
def test_a_path_is_not_taken_for_a_name_of_a_hub(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_tensors(Path(name))
    assert "hf download" not in str(caught.value)
