"""Training routers: what is blended, that the loss falls, that it goes on where it was, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditc.compiler import train_routers
from ditc.compiler.train_routers import Recipe, RouterTraining, blended, train
from ditc.errors import InputError
from ditc.exporter.dit import DiT
from ditc.exporter.protocol import composed, example_inputs, step_tables
from ditc.exporter.router_files import read_routers
from ditc.exporter.shipped_prompts import shipped_prompts
from ditc.policies import schedule_for
from tests.models import pixart
from tests.models.captioned import captioned
from tests.models.two_streams import dual

QUICK = Recipe(steps=4, batch=2, rate=0.2, penalty=0.0)


def no_word(_: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("two_streams", [False, True])
def test_a_score_of_1_is_the_model_and_one_of_0_what_was_cached(
    two_streams: bool, make_small_model: Callable[[], DiT]
) -> None:
    model: Any = dual().eval() if two_streams else make_small_model()
    x, t, y = example_inputs(model.spec, 1)
    inputs = {"x": x, **step_tables(model, t, [y])}
    shapes = {name: model.spec.shape_of(name) for name in model.spec.wiring.values}
    one, other = (
        {
            f"cache.{name}": torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
            for name, shape in shapes.items()
        }
        for seed in (1, 2)
    )
    high, low = (torch.full((len(model.spec.branches),), value) for value in (200.0, -200.0))
    with torch.no_grad():
        exact = composed(model, x, t, y)
        torch.testing.assert_close(blended(model, inputs, one, high), exact)
        assert not torch.allclose(blended(model, inputs, one, low), exact)
        assert not torch.allclose(blended(model, inputs, one, low), blended(model, inputs, other, low))
        half, whole = (blended(model, inputs, one, torch.cat([low[:1], rest])) for rest in (high[1:], low[1:]))
        assert not torch.allclose(half, whole)


@pytest.mark.parametrize("kind", ["two streams", "prompts", "PixArt"])
def test_every_kind_of_model_is_blended_from_its_own_trajectory(kind: str) -> None:
    model: Any = {"two streams": dual, "prompts": captioned, "PixArt": lambda: pixart.model("pixels")}[kind]().eval()
    training = RouterTraining(model, Recipe(steps=4, batch=2, penalty=0.0))
    for value, small in ((200.0, True), (-200.0, False)):
        with torch.no_grad():
            for row in training.logits.values():
                row.fill_(value)
        assert (training.advance()["error"] < 1e-9) == small


def test_a_model_of_prompts_is_asked_for_what_a_compile_asks(tmp_path: Path) -> None:
    training = RouterTraining(captioned(), Recipe(steps=3, batch=1))
    assert training.plan.examples.prompts == shipped_prompts()
    lines: list[str] = []
    train(RouterTraining(pixart.model("pixels"), Recipe(steps=3, batch=1)), 1, tmp_path / "r.pt", lines.append)
    assert lines[0].startswith("assumed: what text, null_text")


def test_the_loss_falls_and_the_weights_stay(make_small_model: Callable[[], DiT], tmp_path: Path) -> None:
    model = make_small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = RouterTraining(model, QUICK)
    train(training, 12, tmp_path / "r.pt", no_word)
    errors = [entry["error"] for entry in training.log]
    assert sum(errors[-3:]) < 0.5 * sum(errors[:3])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_penalty_moves_scores_towards_reuse(make_small_model: Callable[[], DiT], tmp_path: Path) -> None:
    scores = []
    for penalty in (0.0, 10.0):
        training = RouterTraining(make_small_model(), Recipe(steps=4, batch=2, rate=0.2, penalty=penalty))
        routers = train(training, 6, tmp_path / f"{penalty}.pt", no_word)
        assert read_routers(tmp_path / f"{penalty}.pt") == routers
        scores.append(training.log[-1]["score"])
        policy = f"l2c:{tmp_path / f'{penalty}.pt'}:0.5:9"
        assert schedule_for(policy, training.plan.spec, 4, None, read_routers).compute[0] == (True,) * 4
    assert scores[1] < scores[0] - 0.1


def test_it_goes_on_with_the_numbers_that_it_would_have_had(
    make_small_model: Callable[[], DiT], tmp_path: Path
) -> None:
    whole = train(RouterTraining(make_small_model(), QUICK), 4, tmp_path / "whole.pt", no_word)
    train(RouterTraining(make_small_model(), QUICK), 2, tmp_path / "r.pt", no_word)
    assert read_routers(tmp_path / "r.pt") != whole
    lines: list[str] = []
    assert train(RouterTraining(make_small_model(), QUICK), 4, tmp_path / "r.pt", lines.append) == whole
    assert lines[0].startswith("     3 of 4")
    assert "s left" in lines[0]
    assert lines[-1].startswith("theta 0.9: ")


def test_the_progress_of_another_training_is_refused(make_small_model: Callable[[], DiT], tmp_path: Path) -> None:
    train(RouterTraining(make_small_model(), QUICK), 1, tmp_path / "r.pt", no_word)
    other = RouterTraining(make_small_model(), Recipe(steps=4, batch=2, rate=0.1))
    with pytest.raises(InputError, match=r"r\.pt\.progress is of another model or recipe"):
        train(other, 1, tmp_path / "r.pt", no_word)
    (tmp_path / "r.pt.progress").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"r\.pt\.progress is a text file"):
        train(other, 1, tmp_path / "r.pt", no_word)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere.pt"], "no such checkpoint: nowhere.pt"),
        (["digits", "--iterations", "0"], "--iterations takes 1 or more, found 0"),
        (["digits", "--batch", "0"], "--batch takes a number of 1 or more, found 0"),
        (["digits", "--penalty", "nan"], "--penalty takes a number of 0 or more, found nan"),
        (["digits", "--steps", "1"], "--steps must be at least 2, found 1"),
        (["digits", "--sampler", "dim"], "dim"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_routers", *options, "--out", str(tmp_path / "r.pt")])
    with pytest.raises(SystemExit, match="2"):
        train_routers.main()
    refused = capsys.readouterr().err
    assert said in refused
    assert refused.count("\n") == 1
    assert not list(tmp_path.iterdir())
