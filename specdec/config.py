"""Typed configuration: the schemas that Hydra checks, and what a config may hold."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

CONFIGS = "specdec.configs"


@dataclass
class TargetConfig:
    """A model to load; `path` None is the embedded one. `name` is what result rows call it (None: from the path)."""

    path: str | None = MISSING
    gguf_file: str | None = None
    name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    self_check: bool = True
    packed: bool = True
    numerics: str = "auto"


@dataclass
class PolicyConfig:
    """Base of the tree policies."""

    label: ClassVar[str] = "none"
    _target_: str = MISSING


@dataclass
class ChainConfig(PolicyConfig):
    label: ClassVar[str] = "chain"
    depth: int = MISSING
    kind: str = MISSING


@dataclass
class StaticConfig(PolicyConfig):
    label: ClassVar[str] = "static"
    # Rank paths, or the path of a file that holds them.
    choices: Any = MISSING


@dataclass
class TopKConfig(PolicyConfig):
    label: ClassVar[str] = "top_k"
    total: int = MISSING
    depth: int = MISSING
    k: int = MISSING


@dataclass
class CoupledConfig(TopKConfig):
    label: ClassVar[str] = "coupled"


@dataclass
class SampledConfig(PolicyConfig):
    label: ClassVar[str] = "sampled"
    branching: list[int] = MISSING
    kind: str = MISSING


@dataclass
class MixedConfig(PolicyConfig):
    label: ClassVar[str] = "mixed"
    branching: list[int] = MISSING


@dataclass
class DrafterConfig:
    """Base of the drafters; by itself it is no drafter: plain decoding."""

    label: ClassVar[str] = "plain"


@dataclass
class NGramConfig(DrafterConfig):
    label: ClassVar[str] = "ngram"
    _target_: str = MISSING
    min_ngram: int = MISSING
    max_ngram: int = MISSING
    max_matches: int = MISSING
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class SmallModelConfig(DrafterConfig):
    label: ClassVar[str] = "small_model"
    _target_: str = MISSING
    path: str | None = None
    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class MedusaDrafterConfig(DrafterConfig):
    """`path` is a checkpoint of heads in any known format. `draft_vocab_size` and `token_frequencies`: see
    `specdec.drafters.heads.frequencies.frequent_tokens`."""

    label: ClassVar[str] = "medusa"
    _target_: str = MISSING
    path: str | None = None
    draft_vocab_size: int | None = None
    token_frequencies: str | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class EagleDrafterConfig(MedusaDrafterConfig):
    """See `specdec.drafters.heads.formats.load_head` for what overrules the checkpoint."""

    label: ClassVar[str] = "eagle"
    layer_ids: str | None = None
    norm_before_residual: bool | None = None


@dataclass
class RuleConfig:
    _target_: str = MISSING


@dataclass
class TypicalConfig(RuleConfig):
    epsilon: float = MISSING
    delta: float = MISSING


@dataclass
class ThresholdConfig(RuleConfig):
    threshold: float = MISSING


@dataclass
class SamplingConfig:
    """See `specdec.sampling.SamplingParams`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # {token id: bias}; untyped because Hydra lets an override add nothing to a typed dict.
    logit_bias: Any = None
    seed: int | None = 0
    max_new_tokens: int = 128
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass
class EngineConfig:
    """See `specdec.engine.Engine`. `speculation` is fixed (every step grows the policy's trees) or adaptive (as much of them as
    is worth its time)."""

    max_batch_size: int = 8
    prefill_chunk: int = 512
    page_size: int = 16
    num_pages: int | None = None
    speculation: str = "fixed"
    share_prefixes: bool = True


@dataclass
class TrackingConfig:
    """Where rows go; every tracker writes them to `path`."""

    _target_: str = MISSING
    path: str = MISSING


@dataclass
class WandbConfig(TrackingConfig):
    mode: str = MISSING
    project: str = MISSING
    name: str | None = None
    dir: str = MISSING


@dataclass
class SystemConfig:
    """What decodes: drafter (with its policy) and rule. `draft` is the hub id or path of the draft model or head, for whichever
    drafter needs one: a sweep over drafters names it once."""

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    allow_lossy: bool = False
    draft: str | None = None


@dataclass
class PromptsConfig:
    """What is decoded: one text, or a .jsonl or .txt file; see `specdec.experiments.prompts`."""

    prompt_file: str | None = None
    prompt_field: str | None = None
    limit: int | None = None
    template: str = "none"
    chat: str = "auto"


@dataclass
class RunConfig(PromptsConfig):
    """What every experiment that decodes has in common."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output: str = MISSING


@dataclass
class GenerateConfig(SystemConfig, RunConfig):
    prompt: str | None = None
    compare: bool = False


@dataclass
class ServeConfig(SystemConfig):
    """A server at `host`:`port` (0: any free port). `sampling` is what requests leave open. Beyond the batch `max_waiting`
    requests may wait; at a shutdown those under way have `drain_s` seconds to end."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = MISSING
    port: int = MISSING
    max_waiting: int = MISSING
    drain_s: float = MISSING
    access_log: bool = MISSING


@dataclass
class ContenderConfig(SystemConfig):
    """One of the benchmark's systems; its drafter takes dtype and device from the target."""

    target: TargetConfig = field(default_factory=TargetConfig)


@dataclass
class PeerModeConfig:
    """A way in which a peer decodes: `drafter` as rows name it, with chains of `depth` drafted tokens (0: plain decoding).
    `options` are the peer's own; `needs_draft` modes take part where `draft` names a draft model."""

    drafter: str = MISSING
    depth: int = 0
    needs_draft: bool = False
    options: Any = field(default_factory=dict)


@dataclass
class PeerConfig:
    """Another system. `python` is the interpreter of an environment that has it (None: it takes no part), `worker` the script
    that runs there, in experiments/peers/ or by absolute path. It reads the model as `model_format`: folder or gguf."""

    python: str | None = None
    worker: str = MISSING
    model_format: str = "folder"
    max_batch_size: int | None = None
    env: Any = field(default_factory=dict)
    modes: dict[str, PeerModeConfig] = field(default_factory=dict)


@dataclass
class PromptSetConfig(PromptsConfig):
    """One prompt set of a mixture, drawn from with `weight`; `name` is what rows call it (None: the file's name)."""

    name: str | None = None
    weight: float = 1.0


@dataclass
class BenchmarkConfig(RunConfig):
    """`prompts` names the prompt set in rows (None: the file's name); a `mixture` holds several sets, whose prompts are all
    taken. An item of `systems` holds the overrides that one would give to `generate`; `draft` is also the draft model of
    transformers and the peers. `transformers` false leaves out its contenders; where there are no peers either, any sampling
    goes.

    The prompts are decoded `num_repeats` times at each of `batch_sizes`. `memory` has each contender's peak memory
    measured in a process of its own.
    """

    prompts: str | None = None
    mixture: list[PromptSetConfig] = field(default_factory=list)
    systems: list[str] = MISSING
    draft: str | None = None
    transformers: bool = True
    # {name: PeerConfig}; untyped because Hydra lets an override add nothing to a typed dict. See `peer_configs`.
    peers: Any = field(default_factory=dict)
    batch_sizes: list[int] = MISSING
    num_repeats: int = MISSING
    memory: bool = MISSING
    work_dir: str = MISSING


@dataclass
class CertifyConfig(PromptsConfig):
    """`level` quick, full, real or all; `rules` names the rules (none: all of them). All else is for the levels real and all.

    An item of `systems` holds the overrides that one would give to `generate`; those of `draft_systems` join them where
    `draft` names a draft model. Laws are tested in `dtype` and at `temperatures`, on `num_tokens` tokens per system and
    temperature; rounding is counted in the target's own dtype on the first `num_judged` prompts, one at a time.
    """

    level: str = MISSING
    rules: list[str] = MISSING
    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    prompts: str | None = None
    draft: str | None = None
    systems: list[str] = MISSING
    draft_systems: list[str] = MISSING
    temperatures: list[float] = MISSING
    dtype: str = MISSING
    num_tokens: int = MISSING
    alpha: float = MISSING
    num_judged: int = MISSING
    output: str = MISSING
    work_dir: str = MISSING


@dataclass
class HeadFilesConfig:
    """A checkpoint of a learned head: `path` is a hub id, folder or file, `model` its target, of which only the config is
    read. `layer_ids` input or output and `norm_before_residual` overrule what the checkpoint's format implies."""

    # The key whose value may stand on the command line without it.
    positional: ClassVar[str] = "path"
    path: str = MISSING
    model: str | None = None
    layer_ids: str | None = None
    norm_before_residual: bool | None = None


@dataclass
class ExportConfig(HeadFilesConfig):
    """`base_model` names the target in what is written (None: as the checkpoint does). `dtype` is auto (as stored), bfloat16,
    float16 or float32."""

    format: str = MISSING
    output: str = MISSING
    base_model: str | None = None
    dtype: str = "auto"


@dataclass
class AcceptanceConfig(RunConfig):
    """`policies` holds the overrides of `drafter/policy` that one would give to `generate`, `rules` names (none: all). Of each
    text every `stride`-th token is a root; a tree is judged with `num_repeats` seeds at once, so memory grows with
    `num_repeats` x nodes x vocabulary. `prompts` names the prompt set in rows (None: the file's name)."""

    prompts: str | None = None
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    draft: str | None = None
    policies: list[str] = MISSING
    rules: list[str] = MISSING
    temperatures: list[float] = MISSING
    stride: int = MISSING
    num_repeats: int = MISSING
    allow_lossy: bool = False
    work_dir: str = MISSING


@dataclass
class AccuraciesConfig:
    """How often the drafter's guesses are right on `limit` held-out records (None: all) of `data`, one folder or a list, and
    the best static trees of `totals` nodes, roots included; see `specdec.drafters.accuracies.measure_accuracies`."""

    target: TargetConfig = field(default_factory=TargetConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    draft: str | None = None
    data: Any = MISSING
    limit: int | None = MISSING
    depth: int = MISSING
    num_ranks: int = MISSING
    stride: int = MISSING
    batch_size: int = MISSING
    totals: list[int] = MISSING
    folder: str = MISSING


@dataclass
class LengthConfig:
    """Numbers of tokens, `low` to `high`, each as likely as the others; both None: as they come."""

    low: int | None = None
    high: int | None = None


@dataclass
class LoadConfig(SystemConfig, RunConfig):
    """Requests from `prompt_file` or a `mixture` of sets: `num_requests` of them, sent before `duration_s` (None: whenever),
    `prefix_share` of them behind the same `prefix_tokens` tokens; see `specdec.experiments.workload`.

    Each of `concurrencies` is a closed loop of so many users, each of `rates` an open one of so many requests per second.
    Each of `contenders` serves every point `num_repeats` times, with pages shared or not as `share_prefixes` lists
    (none: as the engine does).
    """

    prompts: str | None = None
    mixture: list[PromptSetConfig] = field(default_factory=list)
    prompt_length: LengthConfig = field(default_factory=LengthConfig)
    output_length: LengthConfig = field(default_factory=LengthConfig)
    prefix_tokens: int = MISSING
    prefix_share: float = MISSING
    concurrencies: list[int] = MISSING
    rates: list[float] = MISSING
    num_requests: int = MISSING
    duration_s: float | None = None
    contenders: list[str] = MISSING
    share_prefixes: list[bool] = MISSING
    num_repeats: int = MISSING
    seed: int = MISSING
    work_dir: str = MISSING


@dataclass
class StreamCheckConfig(PromptsConfig):
    """`num_requests` requests in streams of `stream_length`, each through an engine of sizes drawn from `seed` with the next
    of `systems` (those of `draft_systems` join them where `draft` names a draft model), at one of `temperatures`; a share
    `cancel_share` is cancelled, `prefix_share` starts with the same `prefix_tokens` tokens."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    prompts: str | None = None
    draft: str | None = None
    systems: list[str] = MISSING
    draft_systems: list[str] = MISSING
    temperatures: list[float] = MISSING
    prompt_length: LengthConfig = field(default_factory=LengthConfig)
    output_length: LengthConfig = field(default_factory=LengthConfig)
    prefix_tokens: int = MISSING
    prefix_share: float = MISSING
    cancel_share: float = MISSING
    num_requests: int = MISSING
    stream_length: int = MISSING
    seed: int = MISSING
    output: str = MISSING
    work_dir: str = MISSING


@dataclass
class SourceConfig:
    """Base of where training texts come from."""

    label: ClassVar[str] = "none"


@dataclass
class SelfSourceConfig(SourceConfig):
    """See `specdec.drafters.training.sources.SelfPrompts`."""

    label: ClassVar[str] = "self"
    temperature: float = MISSING
    top_p: float = MISSING
    max_prompt_tokens: int = MISSING


@dataclass
class PromptsSourceConfig(SourceConfig):
    """See `specdec.experiments.prompts`."""

    label: ClassVar[str] = "prompts"
    prompt_file: str = MISSING
    prompt_field: str | None = None
    template: str = "none"


@dataclass
class DatasetSourceConfig(SourceConfig):
    """What `datasets.load_dataset` takes. `field` holds the prompt: a text, or messages of which the first user's is taken."""

    label: ClassVar[str] = "dataset"
    path: str = MISSING
    name: str | None = None
    data_files: str | None = None
    split: str = MISSING
    field: str = "prompt"


@dataclass
class TextSourceConfig(SourceConfig):
    """Documents, no prompts: nothing is generated. `files` is a glob pattern; `field` the key of a .jsonl's text."""

    label: ClassVar[str] = "text"
    files: str = MISSING
    field: str = "text"
    min_length: int = 16


@dataclass
class DataConfig:
    """Training data in `folder`: at least `num_records` (None: all that the source has), `held_out` of them (a share) kept
    from training. `exclude` names prompt files whose prompts, and texts that share `exclude_ngram` words in a row with
    them, are left out; `sampling` is how the target answers."""

    target: TargetConfig = field(default_factory=TargetConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    num_records: int | None = MISSING
    exclude: list[str] = MISSING
    exclude_ngram: int = MISSING
    held_out: float = MISSING
    max_length: int = MISSING
    shard_size: int = MISSING
    seed: int = MISSING
    folder: str = MISSING


@dataclass
class HeadConfig:
    """Base of the heads that can be trained. `initial` is a checkpoint whose weights training starts from (None: new ones)."""

    label: ClassVar[str] = "none"
    learning_rate: float = MISSING
    initial: str | None = None


@dataclass
class MedusaHeadConfig(HeadConfig):
    """See `specdec.drafters.training.objectives.MedusaObjective`."""

    label: ClassVar[str] = "medusa"
    num_heads: int = MISSING
    num_layers: int = MISSING
    own_lm_head: bool = MISSING
    decay: float = MISSING


@dataclass
class Medusa2HeadConfig(MedusaHeadConfig):
    """See `specdec.drafters.training.joint.MedusaJointObjective`."""

    label: ClassVar[str] = "medusa2"
    heads_weight: float = MISSING
    heads_rate: float = MISSING
    heads_warmup_steps: int = MISSING


@dataclass
class Eagle1HeadConfig(HeadConfig):
    """See `specdec.drafters.training.objectives.Eagle1Objective`."""

    label: ClassVar[str] = "eagle1"
    token_weight: float = MISSING
    noise: float = MISSING
    intermediate_size: int | None = None


@dataclass
class Eagle3HeadConfig(HeadConfig):
    """See `specdec.drafters.training.objectives.Eagle3Objective`. `feature_layers` None: a low, a middle and a high one."""

    label: ClassVar[str] = "eagle3"
    num_steps: int = MISSING
    decay: float = MISSING
    draft_vocab_size: int | None = MISSING
    feature_layers: list[int] | None = None
    intermediate_size: int | None = None


@dataclass
class TrainingConfig:
    """See `specdec.drafters.training.params.TrainingParams`. `mixed_precision` is no, bf16 or fp16."""

    num_steps: int = MISSING
    row_tokens: int = 2048
    rows_per_step: int = 1
    learning_rate: float = 1e-3
    matrix_rate: float | None = None
    final_rate: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 0.5
    eval_every: int = 0
    save_every: int = 0
    patience: int = 0
    log_every: int = 10
    seed: int = 0
    mixed_precision: str = MISSING


@dataclass
class TrainConfig:
    """Trains a head on the records in `data`, one folder or a list of them; checkpoints and the best head go to `folder`.

    `cache` is a folder for the target's features (None: they are computed as training goes). Tau is measured with `policy`
    under `sampling` and `engine` on `eval_prompts` held-out prompts (0: the held-out loss decides).
    """

    target: TargetConfig = field(default_factory=TargetConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    data: Any = MISSING
    folder: str = MISSING
    cache: str | None = MISSING
    eval_prompts: int = MISSING
    output: str = MISSING


SCHEMAS: dict[str, type] = {
    "acceptance": AcceptanceConfig,
    "accuracies": AccuraciesConfig,
    "certify": CertifyConfig,
    "load": LoadConfig,
    "stream_check": StreamCheckConfig,
    "data": DataConfig,
    "inspect": HeadFilesConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "benchmark": BenchmarkConfig,
    "contender": ContenderConfig,
    "target": TargetConfig,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "rule": RuleConfig,
    "rule/typical": TypicalConfig,
    "rule/threshold": ThresholdConfig,
    "drafter/none": DrafterConfig,
    "drafter/ngram": NGramConfig,
    "drafter/small_model": SmallModelConfig,
    "drafter/medusa": MedusaDrafterConfig,
    "drafter/eagle": EagleDrafterConfig,
    "policy/chain": ChainConfig,
    "policy/static": StaticConfig,
    "policy/top_k": TopKConfig,
    "policy/coupled": CoupledConfig,
    "policy/sampled": SampledConfig,
    "policy/mixed": MixedConfig,
    "source/self": SelfSourceConfig,
    "source/prompts": PromptsSourceConfig,
    "source/dataset": DatasetSourceConfig,
    "source/text": TextSourceConfig,
    "head/medusa": MedusaHeadConfig,
    "head/medusa2": Medusa2HeadConfig,
    "head/eagle1": Eagle1HeadConfig,
    "head/eagle3": Eagle3HeadConfig,
    "train": TrainConfig,
    "training": TrainingConfig,
    "tracking/jsonl": TrackingConfig,
    "tracking/wandb": WandbConfig,
}


def register() -> None:
    """Makes the schemas known to Hydra as `schema/...`, from where the files in configs/ take their types."""
    for name, schema in SCHEMAS.items():
        group, _, option = f"schema/{name}".rpartition("/")
        ConfigStore.instance().store(group=group, name=option, node=schema, provider="specdec")


def to_typed(config: DictConfig) -> Any:
    """The instance of its schema that a composed config describes.

    Raises ValueError for a key that was forced in with `+`, OmegaConf's MissingMandatoryValue for a value not given.
    """
    _refuse_unknown(config, "")
    return OmegaConf.to_object(config)


def peer_configs(peers: Any) -> dict[str, PeerConfig]:
    """The benchmark's peers by name. Raises OmegaConf's errors for what a `PeerConfig` does not hold."""
    found: dict[str, Any] = {}
    for name, peer in dict(peers).items():
        found[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PeerConfig), peer))
    return found


def _refuse_unknown(config: DictConfig, prefix: str) -> None:
    schema = OmegaConf.get_type(config)
    known = {one.name for one in fields(schema)} if is_dataclass(schema) else set(config)
    for key in config:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key!s}: + adds nothing here; known are {', '.join(sorted(known))}")
        child = config._get_node(key)
        # A value that is an interpolation or None has no keys of its own.
        if isinstance(child, DictConfig) and isinstance(child._value(), dict):
            _refuse_unknown(child, f"{prefix}{key!s}.")


def options(group: str) -> list[str]:
    """The options of a config group; none where there is no such group."""
    folder = Path(str(files(CONFIGS) / group))
    return sorted(path.stem for path in folder.glob("*.yaml"))


def groups() -> dict[str, list[str]]:
    """Every config group and its options."""
    root = Path(str(files(CONFIGS)))
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("**/") if path != root)
    return {name: found for name in names if (found := options(name))}


def compose(experiment: str, overrides: list[str]) -> DictConfig:
    """The config of an experiment, inside or outside a run of Hydra's. Raises Hydra's errors."""
    register()
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(experiment, overrides)
    with hydra.initialize_config_module(CONFIGS, version_base="1.3"):
        return hydra.compose(experiment, overrides)


def keys(config: DictConfig, prefix: str = "") -> list[str]:
    """The dotted name of every value."""
    found = []
    for key, value in config.items_ex(resolve=False):
        if isinstance(value, DictConfig) and isinstance(value._value(), dict):
            found += keys(value, f"{prefix}{key!s}.")
        elif key != "_target_":
            found.append(f"{prefix}{key!s}")
    return found
