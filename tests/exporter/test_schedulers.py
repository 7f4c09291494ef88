"""Schedulers of diffusers: every class that there is, and every key of those that are taken."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from scheduler_files import FORMS, OWN, Settings, read, refusal, written

from ditc.exporter.scheduler_classes import DYNAMIC
from ditc.exporter.schedulers import ABSENT, FLOWS, REFUSED, SCHEDULERS
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SOURCES = Path(diffusers.__file__).parent / "schedulers"


def signatures() -> dict[str, Settings]:
    """class -> the defaults of its __init__, of all schedulers in diffusers' sources; none is imported.

    Some classes can't be imported without packages of their own.
    """
    defaults: dict[str, Settings] = {}
    for path in sorted(SOURCES.rglob("scheduling_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any("ConfigMixin" in ast.unparse(base) for base in node.bases):
                defaults[node.name] = _defaults(node)
    return defaults


def _defaults(node: ast.ClassDef) -> Settings:
    (init,) = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    names = [argument.arg for argument in init.args.args][1:]
    values = [None] * (len(names) - len(init.args.defaults)) + list(init.args.defaults)
    return {name: None if value is None else ast.unparse(value) for name, value in zip(names, values, strict=True)}


SIGNATURES = signatures()


def test_every_class_of_diffusers_is_in_one_of_the_tables() -> None:
    assert len(SIGNATURES) > 45
    exported = {name for name in dir(diffusers) if name.endswith("Scheduler") and name[0].isupper()}
    unknown = (SIGNATURES.keys() | exported) - SCHEDULERS.keys() - FLOWS.keys() - REFUSED.keys()
    assert unknown == set()
    assert not (SCHEDULERS.keys() | FLOWS.keys()) & REFUSED.keys()


@pytest.mark.parametrize("form", FORMS)
def test_the_keys_of_a_class_and_their_defaults_are_its_own(form: str) -> None:
    kind, _, row = FORMS[form]
    keys, signature = row.keys, SIGNATURES[kind]
    assert keys.known == signature.keys()
    defaults = {**keys.read, **{key: default for key, (default, _) in keys.fixed.items()}}
    infinite = {"lambda_min_clipped": -float("inf")} if "lambda_min_clipped" in signature else {}
    assert defaults == infinite | {key: ast.literal_eval(signature[key]) for key in defaults if key not in infinite}


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"DPMSolverSDEScheduler"}))
def test_the_sources_say_what_the_classes_have(form: str) -> None:
    kind, _, row = FORMS[form]
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    for key, value in row.keys.read.items():
        assert parameters[key].default == value


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_class_of_another_kind_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "scheduler_config.json", kind))
    assert kind in message
    assert REFUSED[kind] in message


@pytest.mark.parametrize("kind", ["MyScheduler", "", "ddim", None, 7, ["module", "MyScheduler"]])
def test_an_unknown_class_is_refused(kind: Any, tmp_path: Path) -> None:
    assert "no scheduler that ditc knows" in refusal(written(tmp_path / "scheduler_config.json", kind))


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_keys_of_former_releases_are_harmless_at_one_value_and_else_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    expected = read(written(path, kind))
    assert read(written(path, kind, predict_epsilon=True, timestep_values=None)) == expected
    for value in (False, 1, None, "true"):
        assert 'write "prediction_type": "sample" instead' in refusal(written(path, kind, predict_epsilon=value))
    assert "timestep_values is [1]" in refusal(written(path, kind, timestep_values=[1]))


def test_a_config_without_clip_sample_clips_as_diffusers_does(tmp_path: Path) -> None:
    _, sampler, _ = read(written(tmp_path / "s.json", "DDIMScheduler", beta_schedule="linear"))
    assert sampler.clip == 1.0
    assert DDIMScheduler.from_config({}).config.clip_sample


@pytest.mark.parametrize("kind", OWN)
def test_what_concerns_thresholds_and_flows_that_are_off_changes_nothing(kind: str, tmp_path: Path) -> None:
    plain = read(written(tmp_path / "s.json", kind))
    for key in SCHEDULERS[kind].keys.harmless:
        assert read(written(tmp_path / "s.json", kind, **{key: True})) == plain


@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_has_to_have_one_value_is_refused_with_another(form: str, tmp_path: Path) -> None:
    kind, needed, row = FORMS[form]
    for key, (_, wanted) in row.keys.fixed.items():
        for value in (not wanted, [0.1, 0.2], "other", 1):
            if (key, value) == ("use_flow_sigmas", True):
                continue  # that is the other form
            assert f"{key} is " in refusal(written(tmp_path / "s.json", kind, **{**needed, key: value}))


def test_the_betas_of_a_long_list_are_not_all_in_the_message(tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "s.json", "DDIMScheduler", trained_betas=[0.001] * 1000))
    assert "trained_betas is [0.001, 0.001" in message


WRONG: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (0, 1, -5, 1000.0, "1000", True, None, [1000], 10**9),
    "beta_start": (0, -0.1, 1, "0.1", True, None, float("nan"), float("inf"), 0.5),
    "beta_end": (0, 1, 2, "0.02", False, None, float("nan"), -float("inf"), 1e-9),
    "beta_schedule": ("sigmoid", "laplace", "exp", "", None, 3, ["linear"], {}),
    "prediction_type": ("original_sample", "x0", None, 1),
    "timestep_spacing": ("karras", "", None, 2),
    "steps_offset": (-1, 0.5, "1", True, None),
    "clip_sample": ("true", 1, None, 0),
    "clip_sample_range": (0, -1, "1", None, float("nan"), True),
    "set_alpha_to_one": (1, "yes", None),
    "variance_type": ("learned", "fixed_large_log", "", None, 1),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (1, "yes", None)),
    **dict.fromkeys(("use_lu_lambdas", "euler_at_final", "lower_order_final", "predict_x0"), (0, "no", None)),
    "skip_prk_steps": (1, "yes", None),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), (0, -1, 2.0, True, "2", None)),
    **dict.fromkeys(("algorithm_type", "solver_type", "final_sigmas_type", "interpolation_type"), (1, None, ["heun"])),
    **dict.fromkeys(("sigma_min", "sigma_max", "noise_sampler_seed"), ("1", True, float("nan"), float("inf"))),
    "lambda_min_clipped": ("1", True, None, float("nan"), float("inf")),
    "disable_corrector": (None, 1, [0.5], ["0"], [True]),
    **dict.fromkeys(("shift", "flow_shift"), (0, -1.0, "3", None, True, float("nan"), float("inf"))),
    **dict.fromkeys(("use_dynamic_shifting", "stochastic_sampling"), (1, "yes", None)),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), (0, 256.0, "256", None)),
    **dict.fromkeys(("base_shift", "max_shift"), ("1", None, True, float("nan"))),
    "time_shift_type": ("cosine", "", None, 1),
    "shift_terminal": (0, 1, 0.0, "0.1", True, float("nan")),
}


FALLING = {"beta_start": (0.5,), "beta_end": (1e-9,)}


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_can_not_be_is_refused_by_its_key(form: str, tmp_path: Path) -> None:
    kind, needed, row = FORMS[form]
    dynamic = {"use_dynamic_shifting": True} if DYNAMIC.keys() <= row.keys.read.keys() else {}
    for key in row.keys.read:
        for value in WRONG[key]:
            if value in FALLING.get(key, ()) and needed:
                continue  # of a flow's betas only ends are taken
            said = {**needed, **dynamic, "clip_sample": True, key: value}
            assert key in refusal(written(tmp_path / "s.json", kind, **said), tokens=64), value


@pytest.mark.parametrize("kind", sorted(set(SCHEDULERS) - set(FLOWS)))
def test_a_class_that_has_no_form_for_a_flow_is_refused_for_one(kind: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "s.json", kind, prediction_type="flow_prediction"))
    assert "prediction_type is 'flow_prediction', expected one of: epsilon, sample, v_prediction" in message


def test_betas_that_fall_are_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "s.json", "DDPMScheduler", beta_start=0.02, beta_end=0.0001))
    assert "beta_start 0.02 lies above beta_end 0.0001" in message


@pytest.mark.parametrize(
    ("kind", "foreign"),
    [
        ("DDIMScheduler", {"skip_prk_steps": True, "solver_order": 2, "use_karras_sigmas": True}),
        ("PNDMScheduler", {"clip_sample": True}),
        ("DPMSolverMultistepScheduler", {"clip_sample": True, "set_alpha_to_one": False}),
        ("DPMSolverSinglestepScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
    ],
)
def test_keys_of_other_classes_are_left_out_as_diffusers_leaves_them_out(
    kind: str, foreign: Settings, tmp_path: Path
) -> None:
    """Files that were saved after a change of the class hold them."""
    assert read(written(tmp_path / "s.json", kind, **foreign)) == read(written(tmp_path / "t.json", kind))
    own = getattr(diffusers, kind)
    given = own.from_config({"_class_name": kind, **foreign})
    assert inspect.signature(own.__init__).parameters.keys() & foreign.keys() == set()
    assert torch.equal(given.alphas_cumprod, own().alphas_cumprod)


@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_nobody_knows_is_refused_by_name(form: str, tmp_path: Path) -> None:
    kind, needed, _ = FORMS[form]
    message = refusal(written(tmp_path / "s.json", kind, **needed, snr_gamma=5.0, _private=1))
    assert f"snr_gamma (5.0) is no key of a {kind}" in message


def test_keys_that_diffusers_takes_from_the_class_are_taken_from_it(tmp_path: Path) -> None:
    settings: Settings = {"clip_sample": False, "beta_end": 0.5, "_use_default_values": ["clip_sample", "beta_end"]}
    diffusion, sampler, _ = read(written(tmp_path / "s.json", "DDIMScheduler", **settings))
    own = DDIMScheduler.from_config(settings)
    assert (own.config.clip_sample, own.config.beta_end) == (True, 0.02)
    assert (sampler.clip, diffusion.beta_end) == (1.0, 0.02)


def test_what_a_class_has_no_key_for_is_what_it_does() -> None:
    assert ABSENT["timestep_spacing"] == "linspace"
    singlestep = diffusers.DPMSolverSinglestepScheduler()
    singlestep.set_timesteps(5)
    multistep = DPMSolverMultistepScheduler(timestep_spacing="linspace")
    multistep.set_timesteps(5)
    assert singlestep.timesteps.tolist() == multistep.timesteps.tolist()
    for scheduler in (EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), PNDMScheduler()):
        assert not hasattr(scheduler.config, "clip_sample")
    assert not HeunDiscreteScheduler().config.clip_sample


def saved(scheduler: Any, folder: Path) -> Path:
    scheduler.save_pretrained(folder)
    return folder / "scheduler_config.json"


DDIM = SamplerSpec(name="ddim", spacing="leading", clip=1.0)


def scheduler(kind: str, config: Settings, **settings: Any) -> SamplerSpec:
    return SamplerSpec(name="scheduler", scheduler=SchedulerSpec(kind=kind, config=config), **settings)


SAVED: dict[str, tuple[str, Settings, Settings, SamplerSpec]] = {
    "ddim": ("DDIMScheduler", {}, {}, DDIM),
    "released DiT": ("DDIMScheduler", {"clip_sample": False}, {}, DDIM.model_copy(update={"clip": None})),
    "clip range": ("DDIMScheduler", {"clip_sample_range": 2.5}, {}, DDIM.model_copy(update={"clip": 2.5})),
    "trailing": (
        "DDIMScheduler",
        {"timestep_spacing": "trailing"},
        {},
        DDIM.model_copy(update={"spacing": "trailing"}),
    ),
    "linspace": (
        "DDIMScheduler",
        {"timestep_spacing": "linspace"},
        {},
        DDIM.model_copy(update={"spacing": "linspace"}),
    ),
    "offset": ("DDIMScheduler", {"steps_offset": 1}, {}, DDIM.model_copy(update={"offset": 1})),
    "first alpha": (
        "DDIMScheduler",
        {"set_alpha_to_one": False},
        {},
        DDIM.model_copy(update={"final_alpha_one": False}),
    ),
    "v": ("DDIMScheduler", {"prediction_type": "v_prediction"}, {"prediction": "v"}, DDIM),
    "sample": ("DDIMScheduler", {"prediction_type": "sample"}, {"prediction": "sample"}, DDIM),
    "scaled": (
        "DDIMScheduler",
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.012},
        {"beta_schedule": "scaled-linear", "beta_start": 0.001, "beta_end": 0.012},
        DDIM,
    ),
    "cosine": ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "squared-cosine"}, DDIM),
    "train steps": ("DDIMScheduler", {"num_train_timesteps": 400}, {"train_steps": 400}, DDIM),
    "ddpm": ("DDPMScheduler", {}, {}, DDIM.model_copy(update={"name": "ddpm"})),
    "learned variance": (
        "DDPMScheduler",
        {"variance_type": "learned_range", "clip_sample": False},
        {},
        SamplerSpec(name="ddpm", spacing="leading", variance="learned"),
    ),
    "large variance": (
        "DDPMScheduler",
        {"variance_type": "fixed_large"},
        {},
        DDIM.model_copy(update={"name": "ddpm", "variance": "fixed-large"}),
    ),
    "pndm": ("PNDMScheduler", {}, {}, scheduler("PNDMScheduler", {}, spacing="leading", final_alpha_one=False)),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 1},
        {},
        scheduler("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, spacing="trailing"),
    ),
    "heun": (
        "HeunDiscreteScheduler",
        {},
        {"beta_start": 0.00085, "beta_end": 0.012},
        scheduler("HeunDiscreteScheduler", {}),
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_diffusers_saves_is_read(name: str, tmp_path: Path) -> None:
    kind, settings, changes, expected = SAVED[name]
    diffusion, sampler, _ = read(saved(getattr(diffusers, kind)(**settings), tmp_path), learned_sigma=True)
    assert diffusion == DiffusionSpec(learned_sigma=True).model_copy(update=changes)
    assert sampler == expected


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"DPMSolverSDEScheduler"}))
def test_what_diffusers_saves_of_any_class_that_is_taken_has_no_strange_key(form: str, tmp_path: Path) -> None:
    kind, needed, _ = FORMS[form]
    whole = saved(getattr(diffusers, kind)(**needed), tmp_path)
    assert read(whole) == read(written(tmp_path / "bare.json", kind, **needed))
