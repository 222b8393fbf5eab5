"""The report of `infopt distill`."""

from infopt.core.reports.schema import ModelSummary, Record, Report


class LossPoint(Record):
    """One step of the training."""

    step: int
    parts: dict[str, float]
    """`loss` is what was minimized; the others are parts of it, as they were computed."""


class HeldOutPoint(Record):
    """The student on windows of the training text that it never learned from."""

    step: int
    nll: float
    """Nats a token."""


class Parameters(Record):
    """How many parameters each has; tied ones count once."""

    teacher: int
    student: int
    share: float


class Quality(Record):
    """On held-out text, the same for all."""

    teacher: float
    before: float
    """The student before training."""
    after: float
    """The student as it was written."""


class Draft(Record):
    """How good a draft of its teacher the student is, both greedy."""

    text: float
    """Share of the positions of held-out text at which both choose the same token."""
    greedy: float
    """Share of the positions of the teacher's own greedy text at which the student chooses its
    token."""
    mean_run: float
    """Of `drafted` tokens, how many the teacher accepts on average."""


class Acceptance(Record):
    """Greedy acceptance, before and after training."""

    drafted: int
    text_tokens: int
    greedy_tokens: int
    before: Draft
    after: Draft


class DistillReport(Report):
    command: str = "distill"
    output: str
    teacher: ModelSummary
    student: ModelSummary
    student_layers: tuple[int, ...] | None = None
    """The teacher's layers that a cut student has, from 0."""
    loss: str
    """In words, such as 'forward-kl at T=2, 10% cross-entropy'."""
    parameters: Parameters
    nll: Quality
    """Nats a token."""
    perplexity: Quality
    acceptance: Acceptance
    steps: int
    tokens: int
    """That the student was trained on."""
    stopped: str | None = None
    """Why the training ended before its last step."""
    resumed_steps: int
    losses: tuple[LossPoint, ...]
    held_out: tuple[HeldOutPoint, ...]
    bytes: int
    """Of the written weight files."""
    original_bytes: int
    """Of the teacher's."""
    seconds: float
    peak_memory_bytes: int
    logits_max_difference: float
    """Between the student read back from disk and the weights as they were trained."""
