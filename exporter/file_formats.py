"""The format of a file, told by its first bytes: a download gone wrong keeps the right suffix."""

from __future__ import annotations

import pickletools
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Literal

from ditc.errors import CheckpointError

__all__ = ["download_advice", "weight_format"]

Format = Literal["safetensors", "torch"]

HEAD_BYTES = 1 << 16
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
LONGEST_HEADER = 100_000_000  # safetensors' own bound

# first bytes -> what such a file is, and what to do
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves; fetch them with: git lfs pull"),
    (b"GGUF", "a GGUF file; give the weights that it was made from"),
    (b"\x89HDF", "an HDF5 file (Keras); save the weights with torch or as safetensors"),
    (b"\x93NUMPY", "a NumPy array; save the state dict with torch or as safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)


def weight_format(path: Path) -> Format:
    """Return the format of a file of weights. Raises CheckpointError saying what the file is where it holds none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise CheckpointError(f"{path} is an empty file, not a whole checkpoint; copy the checkpoint again")
    for start, description in FOREIGN:
        if head.startswith(start):
            raise CheckpointError(f"{path} is {description}")
    if head.startswith(b"PK\x03\x04"):
        _check_torch_archive(path)
        return "torch"
    if _begins_as_safetensors(head, size):
        return "safetensors"
    if head.startswith(b"\x80") or _is_text_pickle(head):
        return "torch"
    raise CheckpointError(f"{path} is {_described(head)}; expected a file of safetensors or torch.save")


def _begins_as_safetensors(head: bytes, size: int) -> bool:
    """Look for eight bytes of length and a JSON object. A file cut short counts: its reader says what it lacks."""
    return size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def _check_torch_archive(path: Path) -> None:
    """Raise CheckpointError for a zip archive of something else; one that is cut short is left to torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript archive, code and all; save the model's state_dict() instead")
    if not any(name.endswith("data.pkl") for name in names):
        held = ", ".join(names[:3]) or "nothing"
        raise CheckpointError(f"{path} is a zip archive that holds {held}, no torch checkpoint; unpack it first")


def _is_text_pickle(head: bytes) -> bool:
    """Is this a pickle of the old protocols, which begin with no mark? Nothing of it is run."""
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(BytesIO(head)))
    except Exception:  # whatever the disassembler stumbles over is no pickle
        return False


def _described(head: bytes) -> str:
    """Describe foreign bytes by their looks."""
    text = head[:200].decode("utf-8-sig", errors="replace").strip()
    if text.startswith("<"):
        return "a page in HTML or XML, not weights: the download led to an error or a login"
    if text and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"a text file, beginning {text[:60]!r}"
    return f"no file of weights, it begins with the bytes {head[:8].hex(' ')}"


# a name on the hub, as people type it: with its address or without, with a revision, with a folder or file in it
HUB_ADDRESS = r"(?P<address>hf:/+(?:models/)?|https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
HUB_NAME = re.compile(
    HUB_ADDRESS + r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w.-]+))?"
    r"(?:/(?:tree|blob|resolve)/(?P<branch>[\w.-]+))?(?P<inside>(?:/\w[\w.-]*)*)/?"
)


def download_advice(name: str) -> str:
    """Return the advice after "no such file" for a name that looks like one on the Hugging Face hub, else nothing."""
    match = HUB_NAME.fullmatch(name)
    if match is not None and (match["address"] or not name.endswith(WEIGHT_SUFFIXES)):
        folder = match["name"].split("/")[1]
        revision = match["revision"] or match["branch"] or "main"
        at = f" --revision {revision}" if revision != "main" else ""
        then = f" and give {folder}{match['inside']}" if match["inside"] else ""
        return (
            f"; nothing is downloaded: if that is a name on the hub, run: hf download {match['name']}{at} --local-dir "
            f"{folder}{then}"
        )
    return "; nothing is downloaded: fetch the file first" if re.match(r"\w+:/", name) else ""
