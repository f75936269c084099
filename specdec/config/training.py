"""The commands that make heads: data and train, with their sources and the heads that can be trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from specdec.config.components import EngineConfig, PolicyConfig, SamplingConfig, TargetConfig, TrackingConfig


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
    """See `specdec.drafters.training.objectives.Eagle3Objective`. `feature_layers` None: a low, a middle and a high one.
    With `keep_vocabulary` a head that begins as `initial` drafts from that one's vocabulary, else from one chosen anew."""

    label: ClassVar[str] = "eagle3"
    num_steps: int = MISSING
    decay: float = MISSING
    draft_vocab_size: int | None = MISSING
    keep_vocabulary: bool = True
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


@dataclass
class LearningCurveConfig:
    """`rows` are the rows.jsonl of trainings of one head, each of which went on from the one before (`head.initial`)."""

    rows: list[str] = MISSING
    output: str = MISSING
