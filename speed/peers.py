"""The peers of `ditc bench --against`: a table, from which one is made ready or skipped with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO

from ditc.errors import DitcError
from ditc.speed import onnx_peers, torch_peers
from ditc.speed.peer import Peer
from ditc.speed.peer_task import PeerTask

__all__ = ["PEERS", "ReadyPeer", "ready_peer"]

# what is measured -> how it is made; it raises where this machine or this bundle has no such peer
PEERS: dict[str, Callable[[PeerTask], Peer]] = {
    "torch-f32": torch_peers.torch_f32,
    "torch-bf16": torch_peers.torch_bf16,
    "torch-compile": torch_peers.torch_compile,
    "cache-dit": torch_peers.cached_by_cache_dit,
    "onnxruntime-f32": onnx_peers.onnxruntime_f32,
    "onnxruntime-quant": onnx_peers.onnxruntime_quant,
    "openvino-f32": onnx_peers.openvino_f32,
    "openvino-bf16": onnx_peers.openvino_bf16,
    "openvino-int8": onnx_peers.openvino_int8,
}


@dataclass(frozen=True)
class ReadyPeer:
    """A peer that has run once, and the relative error of its output against the FP one."""

    peer: Peer
    relative_error: float


def ready_peer(name: str, task: PeerTask) -> ReadyPeer | str:
    """Return the peer after its first forward pass, or the reason why there is none here."""
    try:
        with _quiet():
            peer = PEERS[name](task)
            if peer.begin is not None:
                peer.begin()
        return ReadyPeer(peer, task.error(peer.forward(task.index, task.run.guidance.rows(task.x))))
    except DitcError as e:
        return str(e)
    except ModuleNotFoundError as e:
        return f"{e.name} is not installed: pip install {str(e.name).replace('_', '-')}"
    except Exception as e:  # what is no part of ditc may fail in any way, and the others can still be measured
        return f"it failed: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what quantizers and caches tell the log, and stdout, where our JSON goes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
