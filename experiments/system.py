"""What an experiment runs: target, drafter, policy and rule, from their configs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.config import (
    ContenderConfig,
    DrafterConfig,
    EngineConfig,
    StandInConfig,
    SystemConfig,
    TargetConfig,
    UnionConfig,
)
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.member import ReadyMade
from specdec.drafters.union import UnionDrafter, check_policy
from specdec.engine import Engine
from specdec.experiments.building import build, describe
from specdec.experiments.calibration import calibrated_costs
from specdec.interfaces import AcceptanceRule, Drafter, Speculation, TreePolicy
from specdec.loading import embedded_model_path
from specdec.model import PagedModel
from specdec.stand_in import ModelShape, load_stand_in
from specdec.verifiers import Coupled, Follow, Verifier

SPECULATIONS = ("fixed", "adaptive", "auto")
# Rules that emit, for the same seed, what plain decoding under them emits.
SAME_TEXT = (Follow.name, Coupled.name)


@dataclass(frozen=True)
class System:
    """A drafter with its policy (None: plain decoding) and the rule, checked against each other.

    `labels` are the fields of a result row that say what this is, `asked` the speculation it wants instead of the engine's.
    """

    drafter: Drafter | None
    policy: TreePolicy | None
    rule: AcceptanceRule
    labels: dict[str, Any]
    allow_lossy: bool = False
    asked: str | None = None

    def engine(self, target: PagedModel, config: EngineConfig) -> Engine:
        """Raises ValueError for an unknown `speculation`; an adaptive one may measure costs first."""
        is_fixed = self.speculation(config) == "fixed"
        verifier, drafter = Verifier(target, self.rule, allow_lossy=self.allow_lossy), self.drafter
        if not is_fixed and isinstance(drafter, ReadyMade) and self.policy and not self.policy.spec.is_sampled:
            # What is there at once is verified as far as it pays; there is nothing to choose before.
            drafter = UnionDrafter([drafter])
        return Engine(
            verifier,
            drafter,
            self.policy,
            max_batch_size=config.max_batch_size,
            prefill_chunk=config.prefill_chunk,
            page_size=config.page_size,
            num_pages=config.num_pages,
            speculation=None if is_fixed else self._speculation(target, config, drafter),
            share_prefixes=config.share_prefixes,
            cuda_graphs=config.cuda_graphs,
        )

    def speculation(self, config: EngineConfig) -> str:
        """What `config` comes to, `fixed` or `adaptive`. Raises ValueError for an unknown one."""
        check_speculation(config)
        speculation = self.asked or config.speculation
        if speculation == "auto":
            # Where the text depends on what is drafted, it must not depend on how long things took.
            return "adaptive" if self.rule.name in SAME_TEXT else "fixed"
        return speculation

    def _speculation(self, target: PagedModel, config: EngineConfig, drafter: Drafter | None) -> Speculation | None:
        if drafter is None or self.policy is None:
            return None
        names = [str(self.labels.get(name)) for name in ("drafter", "policy")]
        costs = calibrated_costs(target, drafter, self.policy, names, config.max_batch_size)
        return AdaptiveSpeculation(self.policy, costs, self.rule.accepts, device=target.device)


def rule_and_policy(config: SystemConfig) -> tuple[AcceptanceRule, TreePolicy | None]:
    """The parts of a system that need no model. Raises ValueError where the rule would not be exact for the policy's trees, is
    lossy and not allowed to be, where the drafter lacks its model, or the speculation is unknown."""
    if isinstance(config, ContenderConfig):
        check_speculation(config)
    rule = build(config.rule)
    policy_config: Any = getattr(config.drafter, "policy", None)
    if policy_config is None and hasattr(config.drafter, "policy"):
        raise ValueError(f"drafter={config.drafter.label} needs a policy: give drafter/policy=top_k, static, ...")
    policy = None if policy_config is None else build(policy_config)
    if policy is not None and (reason := rule.accepts(policy.spec)):
        raise ValueError(f"rule={rule.name} is not exact for drafter/policy={policy_config.label}: {reason}")
    if not rule.lossless and not config.allow_lossy:
        raise ValueError(f"rule={rule.name} is LOSSY: its output does not follow the target's law; allow_lossy=true")
    check_draft(config.drafter)
    if policy is not None and isinstance(config.drafter, UnionConfig):
        check_policy(policy)
    return rule, policy


def load_system(config: SystemConfig) -> System:
    """Builds rule and policy, sees that they fit, then loads the drafter; raises as `rule_and_policy` does before that."""
    rule, policy = rule_and_policy(config)
    labels = {
        "drafter": drafter_label(config.drafter),
        "policy": "none" if policy is None else describe(getattr(config.drafter, "policy", None)),
        "rule": rule.name,
        "num_nodes": 1 if policy is None else policy.max_nodes,
        "lossless": rule.lossless,
    }
    drafter = None if policy is None else build(config.drafter)
    asked = config.speculation if isinstance(config, ContenderConfig) else None
    return System(drafter, policy, rule, labels, config.allow_lossy, asked)


def check_speculation(config: EngineConfig | ContenderConfig) -> None:
    """Raises ValueError unless `speculation` is one there is."""
    if config.speculation is not None and config.speculation not in SPECULATIONS:
        name = "speculation" if isinstance(config, ContenderConfig) else "engine.speculation"
        raise ValueError(f"{name}={config.speculation!r} is unknown: choose {', '.join(SPECULATIONS)}")


def plain_system(rule: AcceptanceRule | None = None) -> System:
    """Plain decoding, beside which speculation under `rule` is put: drawn as that rule draws the target's tokens where its
    drafts change none of them, else as `follow` does."""
    plain = rule if rule is not None and rule.name in SAME_TEXT else Follow()
    labels = {"drafter": "plain", "policy": "none", "rule": plain.name, "num_nodes": 1, "lossless": plain.lossless}
    return System(None, None, plain, labels)


def load_target(config: TargetConfig) -> PagedModel:
    """Raises ValueError or OSError where the model is not found or cannot run over pages."""
    path = config.path if config.path is not None else str(embedded_model_path())
    options: dict[str, Any] = {
        "gguf_file": config.gguf_file,
        "dtype": config.dtype,
        "device": config.device,
        "self_check": config.self_check,
        "packed": config.packed,
        "numerics": config.numerics,
    }
    if isinstance(config, StandInConfig):
        return load_stand_in(path, ModelShape(**asdict(config.shape)), **options)
    return PagedModel.load(path, **options)


def target_labels(config: TargetConfig) -> dict[str, Any]:
    """The fields of a row that say what the target is: its name, and of a stand-in that it is one, and of what shape."""
    labels: dict[str, Any] = {"target": target_name(config)}
    if isinstance(config, StandInConfig):
        labels |= {"stand_in": True, "shape": asdict(config.shape)}
    return labels


def target_name(config: TargetConfig) -> str:
    """What rows call the target: its name, or hub id, or the last part of a local path, never the path itself."""
    if config.name is not None:
        return config.name
    return model_name(config.path if config.path is not None else str(embedded_model_path()))


def model_name(path: str) -> str:
    local = Path(path)
    if not (local.exists() or local.is_absolute()):
        return path
    return local.stem if local.suffix == ".gguf" else local.resolve().name


def check_draft(config: DrafterConfig) -> None:
    """Raises ValueError where the drafter needs a draft model or head and none is named, or lacks a part."""
    if isinstance(config, UnionConfig):
        for name in ("first", "second"):
            part = getattr(config, name)
            if not hasattr(part, "_target_") or isinstance(part, UnionConfig):
                raise ValueError(
                    f"drafter.{name} must be a drafter of one tree: give drafter@drafter.{name}=ngram, ..."
                )
            check_draft(part)
    if getattr(config, "path", "") is None:
        what = "a draft model" if config.label == "small_model" else "a checkpoint of its head"
        raise ValueError(f"drafter={config.label} needs {what}: give draft=HUB_ID_OR_PATH")


def drafter_label(config: DrafterConfig) -> str:
    """What rows call the drafter: its kind, its model's name where it has one, the part of the vocabulary it drafts, and that
    its weights are not rounded to 8 bits; of a union its parts."""
    if isinstance(config, UnionConfig):
        return f"{config.label}({drafter_label(config.first)}, {drafter_label(config.second)})"
    path, size = getattr(config, "path", None), getattr(config, "draft_vocab_size", None)
    part = "" if size is None else f", draft_vocab_size={size}"
    part += "" if getattr(config, "int8", True) else ", int8=false"
    return config.label if path is None else f"{config.label}({model_name(path)}{part})"
