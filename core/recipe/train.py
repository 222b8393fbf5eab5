"""Settings of a training, wherever it is a part of the work: retrain, uptrain, distill."""

from typing import Literal, Self

from pydantic import Field, model_validator

from infopt.core.recipe.base import Settings


class TrainSettings(Settings):
    """How long, how fast and on which text to train."""

    steps: int = Field(ge=1)
    """Updates of the weights."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """At its peak; it rises over the warm-up and falls to nothing along a cosine."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one update, in whole windows."""
    micro_tokens: int = Field(default=1024, ge=1)
    """Tokens of one pass, whose activations are in memory; one window at least."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens of a window of the text."""
    warm_up: float = Field(default=0.05, ge=0, lt=1)
    """The share of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, of matrices only: norms and biases are left alone."""
    clip: float = Field(default=1.0, gt=0)
    """The largest norm of the gradient."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; the weights that learn are float32. auto: bfloat16 on a GPU that has
    it, else float32."""
    gradient_checkpointing: bool = False
    """Compute the activations of a block again in the backward pass: slower, in less memory."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps from one look at the held-out text to the next; a tenth of all where left out."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many looks without a new best, and go back to the best; else never."""
    save_every: int = Field(default=50, ge=1)
    """Steps from one state on the disk to the next."""
    text: str = "default"
    """As for a calibration: its text is trained on, and never the one for evaluation."""
    chat: bool = False
    """Render each text as a user's message through the model's chat template."""

    @property
    def evaluation_interval(self) -> int:
        """`evaluate_every`, or what it is where it was left out."""
        return self.evaluate_every or max(1, self.steps // 10)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.micro_tokens > self.batch_tokens:
            raise ValueError(
                f"micro_tokens {self.micro_tokens} are more than batch_tokens {self.batch_tokens}"
            )
        if self.sequence_length > self.batch_tokens:
            raise ValueError(
                f"a batch of {self.batch_tokens} tokens holds no window of {self.sequence_length}"
            )
        return self
