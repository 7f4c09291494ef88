"""The runtime without torch on other processors, emulated by QEMU: `make test-portable`.

Compiles the reference model, and runs the bundles on this machine, as on x86-64 without VNNI, and as on aarch64, each
with a runtime of its own: ditc as a wheel, `ditc[cpu]` and nothing else. FP images have to be this machine's within
FP_TOLERANCE, the PSNR of INT8 images against FP within PSNR_TOLERANCE_DB of this machine's, and every segment has to
give what the bundle's fingerprint says. Needs qemu-user, the apt-get of a Debian or Ubuntu for the aarch64
interpreter, and the network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from ditc.runtime.closeness import psnr_db

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("images.py")
PRECISIONS = ("w8a8", "w7a8")
FP_IMAGES, IMAGES = 4, 32
FP_TOLERANCE = 1e-5  # largest difference of a pixel, of images in [-1, 1]
# of the mean over IMAGES. What rounds otherwise in float32 by 1e-6 moves the PSNR of single images by up to 6 dB, since
# activations fall on the other side of a rounding step; means of 32 then lie within 0.2 of each other (1 sigma)
PSNR_TOLERANCE_DB = 0.5
# newer ones than 1.23 crash at import under QEMU 7.2 on aarch64
AARCH64_ONNXRUNTIME = "onnxruntime==1.23.2"
MANYLINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
DEBIAN = ("python3", "libstdc++6", "libgomp1")


@dataclass(frozen=True)
class Machine:
    """A processor: what runs its Python, made ready in a folder of its own from the wheel of ditc."""

    name: str
    make: Callable[[Path, Path], Runtime]


@dataclass(frozen=True)
class Runtime:
    """The command of a Python, and the folder where its packages lie."""

    python: tuple[str, ...]
    packages: Path


def called(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def pip_install(packages: Path, wheel: Path, *more: object) -> None:
    shutil.rmtree(packages, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "install", "-qqq", "--disable-pip-version-check", "--target", packages)
    called(*pip, f"{wheel}[cpu]", *more)


def here(folder: Path, wheel: Path) -> Runtime:
    pip_install(folder / "packages", wheel, "--constraint", ROOT / "constraints.txt")
    return Runtime((sys.executable,), folder / "packages")


def without_vnni(folder: Path, wheel: Path) -> Runtime:
    """Return this interpreter and the same packages, on a Haswell: AVX2 and no integer dot products."""
    same = here(folder, wheel)
    return Runtime((emulator("qemu-x86_64"), "-cpu", "Haswell", *same.python), same.packages)


def aarch64(folder: Path, wheel: Path) -> Runtime:
    """Return Debian's interpreter for arm64, unpacked into a folder, and the wheels for it."""
    root = unpacked_debian(folder / "root", folder / "apt")
    python = next(path for path in sorted((root / "usr/bin").glob("python3.*")) if path.suffix[1:].isdigit())
    tags = [option for tag in MANYLINUX for option in ("--platform", f"{tag}_aarch64")]
    options = ("--only-binary=:all:", "--implementation", "cp", "--python-version", python.name.removeprefix("python"))
    pip_install(folder / "packages", wheel, AARCH64_ONNXRUNTIME, *options, *tags)
    return Runtime(
        (emulator("qemu-aarch64"), "-cpu", "max,pauth=off", "-L", str(root), str(python)), folder / "packages"
    )


def unpacked_debian(root: Path, apt: Path) -> Path:
    """Unpack an interpreter of arm64 with its needs, from this system's archive; the system itself stays as it is."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # nothing is installed, so that everything is fetched
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": "1",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    called("apt-get", *options, "-qq", "update")
    called("apt-get", *options, "-qq", "-y", "--no-install-recommends", "--download-only", "install", *DEBIAN)
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        called("dpkg", "-x", package, root)
    return root


def emulator(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise click.ClickException(f"{name} is not here; install it with: apt-get install qemu-user")
    return path


# this machine first: the others are held to it
MACHINES = (Machine("this machine", here), Machine("x86-64 without VNNI", without_vnni), Machine("aarch64", aarch64))


def wheel_of_ditc(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    called(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("ditc-*.whl")
    return wheel


def compiled(folder: Path) -> dict[str, Path]:
    """Compile the reference model in every precision that has integers of its own on some CPU."""
    bundles = {precision: folder / precision for precision in PRECISIONS}
    for precision, bundle in bundles.items():
        options = ("--precision", precision, "--exports", folder / "exports", "--force")
        called(sys.executable, "-m", "ditc.cli", "compile", "digits", "-o", bundle, *options)
    return bundles


def measured(runtime: Runtime, bundle: Path, out: Path, fp_images: int) -> dict[str, Any]:
    """Return images of a bundle on one machine, the first `fp_images` also of its FP program."""
    environment = {"PYTHONPATH": str(runtime.packages), "PATH": os.environ["PATH"]}
    command = (*runtime.python, "-S", "-W", "ignore", CHILD, bundle, out, fp_images, IMAGES)  # -S: no site-packages
    subprocess.run([str(part) for part in command], check=True, env=environment, stderr=subprocess.DEVNULL)
    with np.load(out, allow_pickle=False) as arrays:
        return {"exact": arrays["exact"], "found": arrays["found"], **json.loads(str(arrays["facts"]))}


def compared(there: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Hold a machine against this one. INT8 images are all held to the FP images of this machine."""
    difference = float(np.abs(there["exact"] - own["exact"][: len(there["exact"])]).max())
    psnr, own_psnr = (float(psnr_db(side["found"], own["exact"]).mean()) for side in (there, own))
    change = psnr - own_psnr
    passed = difference <= FP_TOLERANCE and abs(change) <= PSNR_TOLERANCE_DB and there["fingerprint"] <= 1
    facts = {name: value for name, value in there.items() if name not in ("exact", "found")}
    return {**facts, "fp_difference": difference, "psnr_db": psnr, "psnr_change_db": change, "passed": passed}


def shown(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        click.echo(
            f"{'ok ' if row['passed'] else 'NOT'}  {row['name']}, {row['precision']}: FP images differ by "
            f"{row['fp_difference']:.1e}, INT8 {row['psnr_db']:.2f} dB against FP ({row['psnr_change_db']:+.2f}), "
            f"{row['fingerprint']:.1e} of what its fingerprint allows; "
            f"onnxruntime {row['onnxruntime']}, Python {row['python']}; INT8 {row['integers']}"
        )


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("out/portable"), show_default=True)
def main(out: Path) -> None:
    """Compile, run everywhere, compare; results go to OUT/portable.json too. Exits with 1 where one differs."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wheel, bundles = wheel_of_ditc(out / "wheel"), compiled(out)
    rows, own = [], {}
    for machine in MACHINES:
        folder = out / machine.name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        runtime = machine.make(folder, wheel)
        for precision, bundle in bundles.items():
            first = precision not in own
            images = measured(runtime, bundle, folder / f"{precision}.npz", IMAGES if first else FP_IMAGES)
            own.setdefault(precision, images)
            rows.append({"name": machine.name, "precision": precision, **compared(images, own[precision])})
            shown(rows[-1:])
    results = {"fp_images": FP_IMAGES, "images": IMAGES, "rows": rows}
    (out / "portable.json").write_text(json.dumps(results, indent=1) + "\n")
    if not all(row["passed"] for row in rows):
        raise click.ClickException(f"a machine gives other images, see {out / 'portable.json'}")


if __name__ == "__main__":
    main()
