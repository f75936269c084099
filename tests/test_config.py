"""Every config composes and builds; what a config does not hold is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from head_cases import eagle_config
from hydra.errors import ConfigCompositionException
from omegaconf.errors import MissingMandatoryValue
from torch import Tensor

from specdec import config as configs
from specdec import packing
from specdec.drafters import EagleDrafter, MedusaDrafter, NGramDrafter, SmallModelDrafter, UnionDrafter
from specdec.drafters.heads import EagleHead, MedusaConfig, MedusaHeads
from specdec.drafters.heads.formats import save_head
from specdec.drafters.training.params import TrainingParams
from specdec.engine import Engine
from specdec.experiments.building import build, describe, sampling_params
from specdec.experiments.contenders import system_config
from specdec.experiments.system import load_system, plain_system, target_name
from specdec.kernels.linear import Arena, PackedWeight, can_pack, pack
from specdec.model import PagedModel
from specdec.sampling import SamplingParams
from specdec.tracking import JsonlTracker, WandbTracker
from specdec.verifiers import RULES

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quiet")
# A file that would hide a standard module ends in an underscore.
EXPERIMENTS = [one for one in ENTRIES if any((ROOT / "experiments" / f"{one}{end}.py").exists() for end in ("", "_"))]
OPTIONS = [(group, option) for group, options in configs.groups().items() for option in options]
# Without a run of Hydra there is no run folder for rows to go to.
FOLDERS = {
    "generate": ["output=rows.jsonl"],
    "benchmark": ["output=rows.jsonl", "work_dir=."],
    "acceptance": ["output=rows.jsonl", "work_dir=."],
    "accuracies": ["data=data", "folder=trees"],
    "data": ["folder=data"],
    "train": ["data=data", "folder=heads"],
    "learning_curve": ["rows=[rows.jsonl]", "output=curve.png"],
    "inspect": ["path=somewhere"],
    "export": ["path=somewhere", "format=vllm", "output=there"],
    "certify": ["output=one.json", "work_dir=."],
    "costs": ["output=rows.jsonl"],
    "limits": ["output=rows.jsonl"],
    "load": ["output=rows.jsonl", "work_dir=."],
    "stream_check": ["output=rows.jsonl", "work_dir=."],
}


def compose(experiment: str, *overrides: str):
    return configs.to_typed(configs.compose(experiment, [*FOLDERS.get(experiment, []), *overrides]))


@pytest.fixture(scope="module")
def model_folder(tiny, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_composes_to_its_schema(name: str) -> None:
    assert type(compose(name)) is configs.SCHEMAS[name]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_entry_opens_with_its_run_command(name: str) -> None:
    assert (ROOT / "configs" / f"{name}.yaml").read_text().startswith(f"# specdec {name} ")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    extra = ["target.path=somewhere"] if (group, option) == ("target", "hf") else []
    extra += ["tracking.dir=."] if (group, option) == ("tracking", "wandb") else []
    missing = {"prompts": "prompt_file=a.txt", "dataset": "path=a", "text": "files=*.txt"}
    extra += [f"source.{missing[option]}"] if group == "source" and option in missing else []
    experiment = {"source": "data", "head": "train", "training": "train"}.get(group, "generate")
    compose(experiment, f"{group}={option}", *extra)


@pytest.fixture(scope="module")
def drafts(model_folder, tmp_path_factory) -> dict[str, str]:
    """What `draft` names for each drafter."""
    target, folder = PagedModel.load(model_folder), tmp_path_factory.mktemp("heads")
    medusa = MedusaHeads.initial(MedusaConfig(target.hidden_size, target.vocab_size, 2, has_own_lm_head=False))
    save_head(medusa, folder / "tiny-medusa")
    save_head(EagleHead(eagle_config(target, 3, draft_vocab_size=40)), folder / "tiny-eagle")
    heads = {name: str(folder / f"tiny-{name}") for name in ("medusa", "eagle")}
    defaults = {"for_embedded": heads["eagle"], "for_hf": model_folder, "for_stand_in": model_folder}
    return {"ngram": model_folder, "small_model": model_folder, "union": heads["eagle"], **heads, **defaults}


DRAFTERS = {
    "ngram": NGramDrafter,
    "small_model": SmallModelDrafter,
    "medusa": MedusaDrafter,
    "eagle": EagleDrafter,
    "union": UnionDrafter,
    "for_embedded": UnionDrafter,
    "for_hf": NGramDrafter,
    "for_stand_in": NGramDrafter,
}
LABELS = {name: f"{name}(tiny-{name})" for name in DRAFTERS} | {
    "ngram": "ngram",
    "small_model": "small_model(tiny-llama)",
    "union": "union(ngram, eagle(tiny-eagle))",
    "for_embedded": "union(ngram, eagle(tiny-eagle))",
    "for_hf": "ngram",
    "for_stand_in": "ngram",
}


@pytest.mark.parametrize("policy", configs.options("drafter/policy"))
@pytest.mark.parametrize("drafter", sorted({*configs.options("drafter")} - {"none"}))
def test_every_drafter_and_policy_builds_and_generates(
    drafter: str, policy: str, model_folder: str, drafts: dict[str, str]
) -> None:
    typed = compose("generate", f"drafter={drafter}", f"drafter/policy={policy}", f"draft={drafts[drafter]}")
    if DRAFTERS[drafter] is UnionDrafter and build(typed.drafter.policy).spec.is_sampled:
        with pytest.raises(ValueError, match="joins trees without chance"):
            load_system(typed)
        return
    system = load_system(typed)
    assert isinstance(system.drafter, DRAFTERS[drafter])
    assert system.labels["drafter"] == LABELS[drafter]
    assert system.labels["policy"].startswith(f"{policy}(")
    assert system.labels["num_nodes"] == system.policy.max_nodes
    engine = system.engine(PagedModel.load(model_folder), typed.engine)
    result = engine.generate(["abcabc"], SamplingParams(max_new_tokens=3, ignore_eos=True))[0]
    assert len(result.token_ids) == 3


@pytest.mark.parametrize("drafter", ["ngram", "small_model", "eagle"])
def test_adaptive_speculation_is_calibrated_once(
    drafter: str, model_folder: str, drafts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr("specdec.experiments.calibration._Probe.unrest", lambda probe: 1.0)
    typed = compose("generate", f"drafter={drafter}", f"draft={drafts[drafter]}", "engine.speculation=adaptive")
    target, system = PagedModel.load(model_folder), load_system(typed)
    engine = system.engine(target, typed.engine)
    assert len(list((tmp_path / "costs").glob("*.json"))) == 1
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = plain_system().engine(target, typed.engine).generate(["abcabc"], params)
    assert [one.token_ids for one in engine.generate(["abcabc"], params)] == [one.token_ids for one in plain]
    monkeypatch.setattr("specdec.experiments.calibration.measure_costs", lambda *args: 1 / 0)
    again = system.engine(target, typed.engine)
    assert again.speculation.costs.to_dict() == engine.speculation.costs.to_dict()


def test_what_a_busy_machine_says_of_costs_is_not_kept(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    typed = compose("generate", "drafter=ngram", "engine.speculation=adaptive")
    target, system = PagedModel.load(model_folder), load_system(typed)
    for unrest in (2.0, 1.0):
        monkeypatch.setattr("specdec.experiments.calibration._Probe.unrest", lambda probe, found=unrest: found)
        system.engine(target, typed.engine)
        assert len(list((tmp_path / "costs").glob("*.json"))) == (unrest == 1.0)
        assert ("measured again next time" in capsys.readouterr().err) == (unrest == 2.0)


def test_unrest_is_how_much_longer_the_middle_step_of_a_size_takes_than_the_quickest() -> None:
    from specdec.cost import TargetSize
    from specdec.drafters import chain
    from specdec.experiments.calibration import _Probe

    probe = _Probe(chain(2), 100)
    probe._target |= {TargetSize(1): [1.0, 1.0, 9.0], TargetSize(2): [3.0, 1.0, 2.0], TargetSize(4): [4.0, 4.4, 4.4]}
    assert probe.unrest() == pytest.approx(1.1)


def test_a_union_takes_any_two_drafters(model_folder: str, drafts: dict[str, str]) -> None:
    parts = [
        "drafter@drafter.first=medusa",
        "drafter@drafter.second=small_model",
        f"drafter.second.path={model_folder}",
    ]
    typed = compose("generate", "drafter=union", f"draft={drafts['medusa']}", *parts, "drafter.policy.total=9")
    system = load_system(typed)
    assert system.labels["drafter"] == "union(medusa(tiny-medusa), small_model(tiny-llama))"
    assert isinstance(system.drafter, UnionDrafter) and system.policy.max_nodes == 9
    assert [type(one) for one in system.drafter.drafters] == [MedusaDrafter, SmallModelDrafter]
    with pytest.raises(ValueError, match=r"drafter\.second must be a drafter of one tree"):
        load_system(compose("generate", "drafter=union", "draft=somewhere", "drafter@drafter.second=union"))
    with pytest.raises(ValueError, match="drafter=eagle needs a checkpoint"):
        load_system(compose("generate", "drafter=union", "target=hf", "target.path=somewhere"))
    with pytest.raises(ValueError, match="drafter=ngram needs a policy"):
        load_system(compose("generate", "drafter=ngram", "drafter.policy=null"))


@pytest.mark.parametrize("name", ["small_model", "medusa", "eagle"])
def test_weights_of_drafters_are_rounded_unless_refused(
    name: str, drafts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list[bool]()

    def note(weight_OI: Tensor, bias_O: Tensor | None, arena: Arena, int8: bool = False) -> PackedWeight:
        wanted.append(int8)
        return pack(weight_OI, bias_O, arena, int8)

    if not can_pack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("weights are not packed on this CPU")
    monkeypatch.setattr(packing, "pack", note)
    for options, is_rounded in ([], True), (["drafter.int8=false"], False):
        typed = compose("generate", f"drafter={name}", f"draft={drafts[name]}", "target.dtype=bfloat16", *options)
        system = load_system(typed)
        assert system.labels["drafter"] == LABELS[name].replace(")", "" if is_rounded else ", int8=false") + ")"
        target = PagedModel.load(drafts["ngram"], dtype="bfloat16")
        wanted.clear()
        if name == "small_model":
            build(typed.drafter)
        else:
            system.engine(target, typed.engine)
        assert wanted and set(wanted) == {is_rounded}


def test_each_target_has_its_own_default_drafter() -> None:
    embedded = load_system(compose("generate"))
    assert embedded.labels["drafter"] == "union(ngram, eagle(eagle3))"
    other = load_system(compose("generate", "target=hf", "target.path=somewhere"))
    assert other.labels["drafter"] == "ngram"


def test_speculation_is_adaptive_where_no_text_depends_on_it(model_folder: str) -> None:
    chosen = {}
    for rule in ("follow", "coupled", "rejection"):
        policy = {"follow": "top_k", "coupled": "coupled", "rejection": "chain"}[rule]
        iid = ["drafter.policy.kind=iid"] if rule == "rejection" else []
        typed = compose("generate", f"rule={rule}", "drafter=ngram", f"drafter/policy={policy}", *iid)
        assert typed.engine.speculation == "auto"
        chosen[rule] = load_system(typed).speculation(typed.engine)
    assert chosen == {"follow": "adaptive", "coupled": "adaptive", "rejection": "fixed"}
    assert compose("benchmark").engine.speculation == compose("load").engine.speculation == "fixed"


def test_an_unknown_speculation_is_refused(model_folder: str) -> None:
    typed = compose("generate", "engine.speculation=sometimes")
    with pytest.raises(ValueError, match=r"engine\.speculation='sometimes' is unknown: choose fixed, adaptive, auto"):
        load_system(typed).engine(PagedModel.load(model_folder), typed.engine)


def test_a_head_for_another_drafter_is_refused_with_its_name(model_folder: str, drafts: dict[str, str]) -> None:
    target = PagedModel.load(model_folder)
    for drafter, other, found in (("medusa", "eagle", "EagleHead"), ("eagle", "medusa", "MedusaHeads")):
        typed = compose("generate", f"drafter={drafter}", f"draft={drafts[other]}")
        with pytest.raises(ValueError, match=f"holds {found}, which drafter={drafter} cannot run: use drafter={other}"):
            load_system(typed).engine(target, typed.engine)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_system(compose("generate", "drafter=eagle", "draft=./nowhere"))


def test_a_system_of_a_benchmark_may_choose_its_own_speculation(model_folder: str) -> None:
    typed = compose("benchmark", "prompt_file=x.txt", "target=hf", f"target.path={model_folder}")
    for words, found in (("", "fixed"), (" speculation=adaptive", "adaptive"), (" speculation=auto", "adaptive")):
        system = load_system(system_config(f"drafter=ngram{words}", typed.target, typed.draft))
        assert system.speculation(typed.engine) == found
    with pytest.raises(ValueError, match=r"^speculation='sometimes' is unknown: choose fixed, adaptive, auto"):
        load_system(system_config("drafter=ngram speculation=sometimes", typed.target, typed.draft))


def test_every_system_of_a_certificate_builds(model_folder: str) -> None:
    typed = compose("certify", f"draft={model_folder}")
    for name in [*typed.systems, *typed.draft_systems]:
        system = load_system(system_config(name, typed.target, typed.draft))
        assert system.labels["lossless"] != system.allow_lossy and system.policy is not None


def test_no_drafter_is_plain_decoding(model_folder: str) -> None:
    system = load_system(compose("generate", "drafter=none"))
    assert (system.drafter, system.policy, system.labels["num_nodes"]) == (None, None, 1)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_has_a_config_that_builds_it(name: str) -> None:
    assert type(build(compose("generate", f"rule={name}").rule)) is RULES[name]


def test_every_tracker_builds(tmp_path: Path) -> None:
    for option, kind in {"jsonl": JsonlTracker, "wandb": WandbTracker}.items():
        extra = ["tracking.dir=."] if option == "wandb" else []
        tracker = build(compose("generate", f"tracking={option}", f"output={tmp_path / 'rows.jsonl'}", *extra).tracking)
        assert type(tracker) is kind
        tracker.finish()
    assert not list(tmp_path.iterdir())


def test_schemas_name_what_the_library_takes() -> None:
    assert [f.name for f in fields(configs.SamplingConfig)] == [f.name for f in fields(SamplingParams)]
    assert sampling_params(compose("generate").sampling) == SamplingParams(seed=0)
    training = {f.name: f for f in fields(configs.TrainingConfig) if f.name != "mixed_precision"}
    assert list(training) == [f.name for f in fields(TrainingParams)]
    assert all(
        training[f.name].default == f.default for f in fields(TrainingParams) if f.name not in ("num_steps", "betas")
    )
    keywords = dict(Engine.__init__.__kwdefaults__)
    # A config names its speculation, the library takes one.
    assert keywords.pop("speculation") is None
    assert {f.name: f.default for f in fields(configs.EngineConfig) if f.name != "speculation"} == keywords


def test_sampling_values_arrive() -> None:
    overrides = ["sampling=nucleus", "sampling.logit_bias={5: 1.5}", "sampling.stop=[a, 'b c']", "sampling.seed=null"]
    params = sampling_params(compose("generate", *overrides).sampling)
    assert params == SamplingParams(temperature=0.7, top_p=0.95, logit_bias={5: 1.5}, stop=("a", "b c"), seed=None)


@pytest.mark.parametrize("bias", ["{a: 1}", "[1, 2]", "3"])
def test_logit_bias_of_another_shape_is_refused(bias: str) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        sampling_params(compose("generate", f"sampling.logit_bias={bias}").sampling)


@pytest.mark.parametrize(
    "override",
    [
        "sampling.temprature=1",
        "sampling.temperature=hot",
        "limit=1.5",
        "compare=maybe",
        "sampling.stop=abc",
        "drafter.policy.total=many",
        "drafter.policy.branching=[1]",
        "rule=unknown",
        "drafter/policy=unknown",
        "drafter.path=model",
    ],
)
def test_misspelt_keys_and_wrong_types_are_refused(override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        compose("generate", override)


@pytest.mark.parametrize("override", ["+extra=1", "+sampling.extra=1", "+drafter.policy.extra=1"])
def test_keys_forced_in_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=r"unknown key .*extra"):
        compose("generate", override)


def test_missing_values_are_named() -> None:
    with pytest.raises(MissingMandatoryValue, match=r"target\.path"):
        compose("generate", "target=hf")
    for drafter, what in {"small_model": "draft model", "medusa": "checkpoint", "eagle": "checkpoint"}.items():
        with pytest.raises(ValueError, match=f"drafter={drafter} needs a {what}.*: give draft="):
            load_system(compose("generate", f"drafter={drafter}", "target=hf", "target.path=somewhere"))


def test_rule_and_policy_are_checked_before_anything_is_loaded() -> None:
    typed = compose("generate", "rule=rejection", "drafter=small_model", "draft=nowhere")
    with pytest.raises(ValueError, match=r"rule=rejection is not exact for drafter/policy=top_k"):
        load_system(typed)


def test_rows_name_models_without_local_paths(tmp_path: Path) -> None:
    def name(*overrides: str) -> str:
        return target_name(compose("generate", "target=hf", *overrides).target)

    assert name(f"target.path={tmp_path}") == tmp_path.name
    assert name("target.path=/not/here/model.gguf") == "model"
    assert name("target.path=org/model") == "org/model"
    assert name("target.path=org/model", "target.name=mine") == "mine"


def test_descriptions_say_what_was_chosen() -> None:
    assert describe(compose("generate").drafter.policy) == "top_k(total=16, depth=5, k=4)"
    assert describe(compose("generate", "drafter=none").drafter) == "plain"
