"""The class of every config and option, by the name under which Hydra knows it."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from specdec.config.components import (
    ChainConfig,
    CoupledConfig,
    DrafterConfig,
    EagleDrafterConfig,
    EngineConfig,
    MedusaDrafterConfig,
    MixedConfig,
    NGramConfig,
    RuleConfig,
    SampledConfig,
    SamplingConfig,
    SmallModelConfig,
    StandInConfig,
    StaticConfig,
    TargetConfig,
    ThresholdConfig,
    TopKConfig,
    TrackingConfig,
    TypicalConfig,
    UnionConfig,
    WandbConfig,
)
from specdec.config.measuring import (
    AcceptanceConfig,
    AccuraciesConfig,
    BenchmarkConfig,
    CertifyConfig,
    ContenderConfig,
    CostsConfig,
    GpuCheckConfig,
    LimitsConfig,
    LoadConfig,
    StreamCheckConfig,
)
from specdec.config.runs import ExportConfig, GenerateConfig, HeadFilesConfig, ServeConfig
from specdec.config.training import (
    DataConfig,
    DatasetSourceConfig,
    Eagle1HeadConfig,
    Eagle3HeadConfig,
    LearningCurveConfig,
    Medusa2HeadConfig,
    MedusaHeadConfig,
    PromptsSourceConfig,
    SelfSourceConfig,
    TextSourceConfig,
    TrainConfig,
    TrainingConfig,
)

SCHEMAS: dict[str, type] = {
    "acceptance": AcceptanceConfig,
    "accuracies": AccuraciesConfig,
    "certify": CertifyConfig,
    "costs": CostsConfig,
    "limits": LimitsConfig,
    "load": LoadConfig,
    "stream_check": StreamCheckConfig,
    "gpu_check": GpuCheckConfig,
    "data": DataConfig,
    "inspect": HeadFilesConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "benchmark": BenchmarkConfig,
    "contender": ContenderConfig,
    "target": TargetConfig,
    "target/stand_in": StandInConfig,
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
    "drafter/union": UnionConfig,
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
    "learning_curve": LearningCurveConfig,
    "training": TrainingConfig,
    "tracking/jsonl": TrackingConfig,
    "tracking/wandb": WandbConfig,
}


def register() -> None:
    """Makes the schemas known to Hydra as `schema/...`, from where the files in configs/ take their types."""
    for name, schema in SCHEMAS.items():
        group, _, option = f"schema/{name}".rpartition("/")
        ConfigStore.instance().store(group=group, name=option, node=schema, provider="specdec")
