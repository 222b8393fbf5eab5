"""Settings of `infopt convert --kv-heads`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from infopt.core.recipe.base import Seed, Settings
from infopt.core.recipe.text import Device, DType
from infopt.core.recipe.train import TrainSettings

_TRAINING = ("learning_rate", "batch_tokens", "micro_tokens", "sequence_length", "text", "chat")
_MORE = ("precision", "gradient_checkpointing")


class KvHeadsSettings(Settings):
    """How many key/value heads a model is to have, and how long it then learns to do with them."""

    kv_heads: int = Field(ge=1)
    """They must divide the model's; 1 is multi-query attention."""
    uptrain: int = Field(default=0, ge=0)
    """Steps of training towards the predictions of the model as it was; 0 is none."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """At its peak (uptrain only, as all up to `gradient_checkpointing`)."""
    batch_tokens: int = Field(default=4096, ge=1)
    micro_tokens: int = Field(default=1024, ge=1)
    sequence_length: int = Field(default=256, ge=8)
    text: str = "default"
    chat: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    device: Device = "auto"
    dtype: DType = "auto"
    """Of the measurements, and of the teacher's passes."""
    seed: Seed = 0

    @property
    def train(self) -> TrainSettings:
        """The training that follows; there is none where `uptrain` is 0."""
        keys = (*_TRAINING, *_MORE)
        return TrainSettings(steps=self.uptrain, **{key: getattr(self, key) for key in keys})

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        """Refuse what would not be read, and sizes that do not fit each other."""
        if self.uptrain:
            _ = self.train
            return self
        fields = type(self).model_fields
        for key in (*_TRAINING, *_MORE):
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} is read by uptrain only, and that is 0")
        return self
