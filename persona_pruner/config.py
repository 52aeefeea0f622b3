"""Every setting of a sculpt, checked once; `run.yaml` is this, written down."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_pruner.errors import InputError


class SculptConfig(BaseModel):
    """Settings of `sculpt`. Counts are questions or tokens; `ratio` is the share of FFN channels to remove."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(0.25, ge=0, lt=1)
    scope: Literal["layer", "global"] = "layer"
    format: Literal["slim", "packed"] = Field("slim", description="plain checkpoint, or its linears packed 2:4")
    seed: int = Field(0, ge=0)

    minutes: float | None = Field(None, gt=0, description="sizes below are made smaller until a sculpt takes no longer")
    own_questions: int = Field(192, ge=0, description="questions the base model writes for the persona")
    bank_questions: int = Field(64, ge=0, description="most persona-sensitive questions kept of the bank")
    bank_candidates: int = Field(128, ge=0, description="bank questions whose sensitivity is measured")
    filter: bool = Field(True, description="sensitivity filter; without it bank questions are drawn at random")
    questions: tuple[str, ...] = Field((), description="further question files or datasets, added to the bank")
    eval_questions: str | None = Field(None, description="held-out question file instead of the bundled held-out split")
    held_out_questions: int = Field(24, ge=1)
    held_out_answers: int = Field(1, ge=1, description="answers to each; more of them make a smaller error of the test")
    answers: str = Field("self", description='"self", URL or URL#model of an endpoint, or a model folder or name')
    in_character: bool = Field(True, description="answers under the persona prompt")
    answer_tokens: int = Field(80, ge=1)
    held_out_tokens: int = Field(56, ge=1)

    score_examples: int = Field(192, ge=1, description="examples that scores are taken from, evenly spread over all")
    start: Literal["fisher", "wanda", "taylor", "random"] = "fisher"
    loss: Literal["kl", "ce"] = "kl"
    steps: int = Field(16, ge=0)
    lr: float = Field(0.045, gt=0, description="in standard deviations of the scores")
    budget: int = Field(1536, ge=64, description="tokens of a packed batch")
    repair: bool = True
    ridge: float = Field(0.1, gt=0)
    neutral_examples: int = Field(
        32,
        ge=0,
        le=32,
        description="neutral texts in scores, search, repair and recovery, for what is not the persona's",
    )
    # One published persona at 25%: with 0.4 as much KL as without neutral prose, and neutral text loses a third less;
    # with 1 another 7% less, and the KL is 4% larger (docs/levers.md).
    neutral_weight: float = Field(0.4, ge=0, description="what they count in scores and search beside the persona's 1")
    recovery_steps: int = Field(0, ge=0, description="steps of KL to the dense model after the repair")
    recovery: Literal["weights", "lora"] = Field("weights", description="what they train; lora needs the extra peft")

    neutral_texts: int = Field(16, ge=1, le=16, description="texts without the persona that every model is measured on")
    compare: bool = Field(True, description="measure the baselines and speeds too")

    @classmethod
    def of(cls, **settings) -> "SculptConfig":
        """Like the constructor, but raises InputError with one sentence."""
        try:
            config = cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if not config.ratio and config.format != "packed":
            raise InputError("setting ratio: 0 removes nothing; with format packed two of every four weights go")
        if config.format == "packed" and config.recovery_steps and config.recovery != "weights":
            raise InputError("format packed needs recovery weights: LoRA would fill in the zeros of the pattern")
        if config.format == "packed" and config.scope != "layer":
            raise InputError("format packed needs scope layer: a checkpoint has one width for all layers")
        return config

    def dump(self) -> dict:
        """Plain values, for YAML and JSON."""
        return self.model_dump(mode="json")


def read_run(folder: str | Path) -> dict:
    """The run.yaml of an output folder. Raises InputError when there is none or it holds no settings."""
    import yaml

    path = Path(folder) / "run.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a list of settings by name")
    return found
