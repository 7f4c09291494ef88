"""Make the real TensorRT Python bindings importable on a machine without TensorRT.

    python tests/conformance/bindings.py FOLDER 10.3.0 10.16.1.11 11.4.0.106

The bindings come as wheels of their own, without the builder library. Their extension module needs
nine C symbols of three libraries, so three stand-ins that define them and return null make every real class, enum and
signature importable. Nothing can be built or run with them: they hold code to the real interface, no more.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def package_of(version: str) -> str:
    """The wheel that holds the bindings of a version: CUDA 12 for JetPack 6's, CUDA 13 for the later ones."""
    return "tensorrt-cu12-bindings" if version.startswith("10.3.") else "tensorrt-cu13-bindings"


def install(folder: Path, version: str) -> None:
    """Bindings, stand-in libraries and a `tensorrt` package in folder/version; nothing where it is there already."""
    target = folder / version
    if (target / "complete").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), f"{package_of(version)}=={version}"], check=True)
    stand_ins(target / "lib", version.split(".", maxsplit=1)[0])
    (target / "tensorrt").mkdir()
    text = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (target / "tensorrt" / "__init__.py").write_text(text)
    (target / "complete").touch()


def stand_ins(folder: Path, major: str) -> None:
    """Three shared libraries with the right names; the symbols all live in the first."""
    folder.mkdir(parents=True)
    empty, source = folder / "empty.c", folder / "symbols.c"
    empty.write_text("")
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        code = source if library == LIBRARIES[0] else empty
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(code)], check=True
        )


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        install(Path(sys.argv[1]), wanted)
