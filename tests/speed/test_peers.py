"""`ditc bench --against`: peers that are here run the same network in turn, others are skipped with their reason."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from ditc.bundle import Bundle, open_bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.engines import onnxrt
from ditc.engines.integer_form import Exactness
from ditc.errors import CheckError
from ditc.exporter.models import builtin_digits, random_dit
from ditc.runtime.executor import Samples, seeded_noise
from ditc.runtime.pipeline import load
from ditc.speed import side_by_side
from ditc.speed.latency import latency_of, with_spread
from ditc.speed.peer import Peer
from ditc.speed.peer_task import ModelChoice, PeerTask, peer_task_of
from ditc.speed.peers import PEERS, ReadyPeer, ready_peer
from ditc.speed.side_by_side import (
    BundleTimes,
    NoPeer,
    PeerTimes,
    SideBySide,
    bundle_turn,
    check_not_slower,
    peer_turn,
    take_turns,
)

OTHER_MODEL = """
import torch
from ditc.exporter.dit import DiT, DiTConfig

def build(seed):
    torch.manual_seed(seed)
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
    return DiT(config, name="small").eval()

def same(): return build(0)
def other(): return build(1)
"""


@pytest.fixture(scope="module")
def digits(compiled_once: Callable[..., Bundle]) -> Bundle:
    """The built-in model over 4 steps, 2 of them computed."""
    options = CompileOptions(
        steps=4, policy="fora:2", points=16, pool_images=8, vc="none", verify_images=1, batch=2, ranges="max"
    )
    return compiled_once("digits", options)


@pytest.fixture(scope="module")
def task(digits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> PeerTask:
    return peer_task_of(digits, ModelChoice(), tmp_path_factory.mktemp("task"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that builds the small model of the tests, and one with other weights."""
    (tmp_path / "own_models.py").write_text(OTHER_MODEL)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_models", None)


def bench(bundle: Bundle, arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what `ditc bench --json` prints about its peers."""
    assert run(f"bench {bundle.path} --requests 1 --warmup 0 --json {arguments}".split()) == 0
    return json.loads(capsys.readouterr().out)["against"]


def test_peers_that_are_here_run_and_a_missing_one_is_skipped_with_its_reason(
    digits: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("openvino", "nncf", "cache_dit"):
        monkeypatch.setitem(sys.modules, package, None)
    names = sorted(PEERS.keys() - {"torch-compile"})  # which takes minutes
    sides = bench(digits, f"--against {names[0]} --against {','.join(names[1:])}", capsys)
    peers = sides["peers"]
    assert set(peers) == {"torch-f32", "torch-bf16", "onnxruntime-f32", "onnxruntime-quant"}
    assert sides["skipped"] == {
        "cache-dit": "cache_dit is not installed: pip install cache-dit",
        "openvino-f32": "openvino is not installed: pip install openvino",
        "openvino-bf16": "openvino is not installed: pip install openvino",
        "openvino-int8": "nncf is not installed: pip install nncf",
    }
    assert sides["bundle"]["step"]["n"] == 2
    assert sides["bundle"]["reuse"]["n"] == sides["bundle"]["extrapolate"]["n"] == 1
    for peer in peers.values():
        assert peer["step"]["n"] >= 1
        assert peer["ratio_run"] == pytest.approx(peer["run"]["median"] / sides["bundle"]["run"]["median"])
        assert peer["ratio_step"] == pytest.approx(peer["step"]["median"] / sides["bundle"]["step"]["median"])
    errors = {name: side["relative_error"] for name, side in {**peers, "bundle": sides["bundle"]}.items()}
    assert errors["torch-f32"] < 5e-5  # the reference is of the smoothed form, the same function to rounding
    assert errors["onnxruntime-f32"] < 1e-5
    assert 1e-4 < errors["torch-bf16"] < 0.05
    assert 1e-3 < errors["onnxruntime-quant"] < 0.2
    assert 1e-3 < errors["bundle"] < 0.2


@pytest.mark.parametrize("name", ["openvino-f32", "openvino-bf16", "openvino-int8", "cache-dit"])
def test_an_optional_peer_runs_the_same_network_where_it_is_installed(name: str, task: PeerTask) -> None:
    package = {"openvino-int8": "nncf", "cache-dit": "cache_dit"}.get(name, "openvino")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    ready = ready_peer(name, task)
    assert isinstance(ready, ReadyPeer), ready
    assert ready.relative_error < {"openvino-int8": 0.2, "openvino-bf16": 0.05}.get(name, 1e-4)


def test_a_peer_that_would_compute_in_another_type_is_skipped_with_its_reason(
    task: PeerTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = MagicMock(__version__="2026.0")
    openvino.Core().compile_model().get_property().get_type_name.return_value = "f32"
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    reason = ready_peer("openvino-bf16", task)
    assert isinstance(reason, str)
    assert "this CPU has no bfloat16" in reason


def test_a_quantized_peer_is_exact_where_its_products_would_saturate(
    task: PeerTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch does nothing to a CPU that needs none."""
    monkeypatch.setattr(onnxrt, "onnxruntime_exactness", lambda: Exactness(7, 8))
    quantized, plain = (ready_peer(name, task) for name in ("onnxruntime-quant", "onnxruntime-f32"))
    assert isinstance(quantized, ReadyPeer)
    assert isinstance(plain, ReadyPeer)
    assert quantized.peer.what.endswith(", unsigned weights")
    assert "unsigned" not in plain.peer.what
    assert quantized.relative_error < 0.2


@pytest.mark.slow
def test_torch_compile_runs_where_there_is_a_compiler(task: PeerTask) -> None:
    ready = ready_peer("torch-compile", task)
    assert isinstance(ready, ReadyPeer), ready
    assert ready.relative_error < 5e-5


def test_without_a_working_compiler_torch_compile_is_skipped_with_its_reason(
    task: PeerTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_block = random_dit(replace(builtin_digits().config, depth=1), "one block")
    monkeypatch.setitem(vars(task), "model", one_block)  # it fails the same, and sooner
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else what was compiled before is taken from there
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    reason = ready_peer("torch-compile", task)
    assert isinstance(reason, str)
    assert "no-such-compiler" in reason


def test_a_bundle_without_its_reference_has_every_peer_skipped(
    digits: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits.path, tmp_path / "b", ignore=shutil.ignore_patterns("reference"))
    sides = bench(open_bundle(tmp_path / "b"), "--against all", capsys)
    assert sides["peers"] == {}
    assert set(sides["skipped"]) == set(PEERS)
    assert all("no FP reference" in reason for reason in sides["skipped"].values())


def test_a_model_that_the_manifest_does_not_tell_can_be_named(
    bundles: dict[str, Bundle], models: None, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = bench(bundles["cached"], "--against torch-f32", capsys)["skipped"]
    assert "give it with --model" in skipped["torch-f32"]
    sides = bench(bundles["cached"], "--against torch-f32 --model own_models:same", capsys)
    assert sides["peers"]["torch-f32"]["relative_error"] < 1e-3  # the bundle stores its conditioning as FP16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("own_models:other", "own_models:other is another model: its output is"),
        ("digits", "digits is another model: its latent_shape is (1, 8, 8), expected (3, 8, 8)"),
    ],
)
def test_another_model_is_refused(
    model: str, message: str, bundles: dict[str, Bundle], models: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundles["cached"].path
    assert run(f"bench {path} --requests 1 --warmup 0 --against onnxruntime-f32 --model {model}".split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "requests: done" in printed.err
    assert printed.out == ""


def test_fail_if_slower_holds_whole_runs_to_the_ratio(digits: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"bench {digits.path} --requests 1 --warmup 0 --json --against onnxruntime-f32 --fail-if-slower"
    assert run([*command.split(), "0.000001"]) == 0
    capsys.readouterr()
    assert run([*command.split(), "1000000"]) == 1
    printed = capsys.readouterr()
    ratio = json.loads(printed.out)["against"]["peers"]["onnxruntime-f32"]["ratio_run"]
    assert f"{ratio:.2f}x; expected at least 1e+06x (--fail-if-slower)" in printed.err
    assert "of onnxruntime-f32 takes" in printed.err


def test_only_peers_below_the_ratio_are_named() -> None:
    own, theirs = (with_spread(latency_of([seconds])) for seconds in (1.0, 2.0))
    peers = {
        name: PeerTimes(
            what="", relative_error=0, run_measured=True, step=theirs, run=theirs, ratio_step=1, ratio_run=ratio
        )
        for name, ratio in (("slow", 3.0), ("fast", 0.5))
    }
    bundle = BundleTimes(latencies={"step": own, "run": own}, relative_error=0)
    sides = SideBySide(guidance=1, step=0, bundle=bundle, peers=peers, skipped={})
    with pytest.raises(CheckError, match=r"of fast takes 2 s, 0\.50x; expected") as caught:
        check_not_slower(sides, 1)
    assert "slow takes" not in str(caught.value)
    check_not_slower(sides, 0.5)


@pytest.mark.parametrize("measured", [None, NoPeer(skipped={"torch-f32": "torch is not here"})])
def test_without_a_measured_peer_the_gate_stays_shut(measured: NoPeer | None) -> None:
    with pytest.raises(CheckError, match="no peer was measured"):
        check_not_slower(measured, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--against nobody", "unknown peer 'nobody'; choose one of: all, cache-dit,"),
        ("--fail-if-slower 2", "--fail-if-slower is about peers; name some with --against"),
        ("--against all --fail-if-slower 0", "--fail-if-slower must be above 0"),
        ("--model digits", "--model is about peers"),
        ("--against all --heads 4", "--heads is about the checkpoint of --model"),
    ],
)
def test_options_of_peers_that_make_no_sense_are_refused(
    arguments: str, message: str, digits: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"bench {digits.path} {arguments}".split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_ratio_without_any_peer_is_refused(
    digits: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    command = f"bench {digits.path} --requests 1 --warmup 0 --against openvino-f32 --fail-if-slower 1"
    assert run(command.split()) == 2
    assert "found none (openvino-f32: openvino is not installed" in capsys.readouterr().err


def test_a_peer_walks_the_run_that_the_bundle_was_compiled_for(task: PeerTask) -> None:
    """Guidance and sampler around a peer are those around the bundle's FP program."""
    ready = ready_peer("onnxruntime-f32", task)
    assert isinstance(ready, ReadyPeer)
    noise, fresh = seeded_noise(3, 0, 2, task.run.spec.latent_shape)
    with load(task.bundle.path, reference=True) as pipe:
        expected = pipe.latents([0, 1], seed=3)
    assert np.abs(task.run.last(ready.peer.forward, noise, fresh) - expected).max() < 1e-4


def test_peers_are_compared_at_a_step_that_the_bundle_computes(task: PeerTask) -> None:
    program = task.bundle.manifest.program
    assert program.steps[task.index].segment == "full"
    assert [step for step, _ in task.points] == [0, 2]
    assert task.conditions["y"].tolist() == [0, 1, 10, 10]


def test_sides_take_turns_and_warm_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "REST_SECONDS", 0)
    order: list[str] = []

    def side(name: str) -> side_by_side.Turn:
        def turn() -> Iterator[tuple[str, float]]:
            order.append(name)
            yield "step", float(len(order))

        return turn

    times = take_turns([side("a"), side("b")], 2, 1, lambda *_: None)
    assert order == ["a", "b"] * 3
    assert times == [{"step": [3.0, 5.0]}, {"step": [4.0, 6.0]}]


def test_only_quantized_steps_are_held_against_a_peers(bundles: dict[str, Bundle]) -> None:
    with load(bundles["float-ends"].path) as pipe:
        kinds = [kind for kind, _ in bundle_turn(pipe)()]
    assert kinds == ["float", "reuse", "step", "reuse", "float", "reuse", "run"]


def test_a_peer_with_a_cache_is_measured_over_whole_runs(task: PeerTask) -> None:
    calls: list[int | str] = []

    def forward(index: int, rows: Samples) -> Samples:
        calls.append(index)
        return np.concatenate([rows, rows], axis=1)

    peer = Peer(forward, "made up", begin=lambda: calls.append("begin"))
    measured = list(peer_turn(peer, task)())
    assert calls == ["begin", 0, 1, 2, 3]
    assert [kind for kind, _ in measured] == ["step", "step", "run"]
    assert measured[2][1] > measured[0][1] + measured[1][1]
    measured = list(peer_turn(replace(peer, begin=None), task)())
    *steps, (kind, whole) = measured
    assert kind == "run"
    assert whole == pytest.approx(4 * sum(seconds for _, seconds in steps) / len(steps))
    assert set(calls[5:]) == {task.index}
    assert len(calls[5:]) == len(steps) + 1  # the first of a burst is not counted


def test_a_step_longer_than_a_burst_is_measured_once(task: PeerTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "BURST_SECONDS", 0)
    calls: list[int] = []

    def forward(index: int, rows: Samples) -> Samples:
        calls.append(index)
        return np.concatenate([rows, rows], axis=1)

    measured = list(peer_turn(Peer(forward, "made up"), task)())
    assert [kind for kind, _ in measured] == ["step", "run"]
    assert len(calls) == 2
