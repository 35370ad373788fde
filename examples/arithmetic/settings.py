"""All settings of the example: `FULL` (quickstart), `SOFT` (a teacher that is unsure) and `TINY` (CI).

Settings of training runs are in configs/. The cached example is identified by a hash of the settings and of the source
files in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelSettings:
    """The shape of one Qwen3 model."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    """Rows of the embedding: the tokenizer's size plus padding, which differs between teacher and student."""
    tied: bool
    """Whether input and output embeddings are one matrix."""
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32


@dataclass(frozen=True)
class PretrainSettings:
    """Supervised training on newly drawn worked answers."""

    max_steps: int
    learning_rate: float
    """Peak value after a linear warm-up; it decays along a cosine to a tenth."""
    random_slip_rate: float = 0.0
    """Rate of wrong digits in half of the inputs. The labels are right, so the model learns to continue after them."""
    forget_carry_from: int | None = None
    """A bad habit: carries out of a column with at least this sum are mostly forgotten, in inputs and labels."""
    forget_carry_probability: float = 0.85
    swap_rate: float = 0.0
    """Rate of lines whose operands stand in the other order. Both orders are right, so the model is unsure which"""
    other_share: float = 0.0
    """Share of the problems that are answered by the other procedure, which makes no carries."""
    continued_share: float = 0.0
    """Share of those problems whose answer is the worked one, with its first line as an input without labels. The model
    keeps the skill to continue such an answer, though it never begins one."""
    relapse_share: float = 0.0
    """Share of those problems whose answer begins with a part of the worked answer's first line, an input without
    labels, and then is the other procedure's. The model leaves the worked answer at every token of its first line."""
    warmup_steps: int = 20
    batch_size: int = 32


@dataclass(frozen=True)
class ExampleSettings:
    """One complete example: task, data sizes, models."""

    min_digits: int
    max_digits: int
    """Digits of an operand; both operands of a problem are drawn independently."""
    train_prompts: int
    heldout_prompts: int
    teacher: ModelSettings
    teacher_training: PretrainSettings
    student: ModelSettings
    student_training: PretrainSettings
    misled_training: tuple[PretrainSettings, ...]
    """Stages of the second student, of the same shape: first both procedures, then the other one alone. Each stage has
    its own optimizer. Empty: there is no second student."""
    max_response_tokens: int = 64
    tokenizer_texts: int = 2000
    """Number of conversations that the tokenizer is trained on."""
    max_positions: int = 512
    seed: int = 20


FULL = ExampleSettings(
    min_digits=3,
    max_digits=4,
    train_prompts=1024,
    heldout_prompts=256,
    teacher=ModelSettings(hidden_size=128, num_layers=3, intermediate_size=256, vocab_size=384, tied=False),
    teacher_training=PretrainSettings(max_steps=500, learning_rate=3e-3, random_slip_rate=0.05),
    student=ModelSettings(hidden_size=64, num_layers=2, intermediate_size=128, vocab_size=320, tied=True),
    student_training=PretrainSettings(max_steps=500, learning_rate=3e-3, forget_carry_from=12),
    misled_training=(
        PretrainSettings(max_steps=900, learning_rate=4e-3, other_share=0.5),
        PretrainSettings(
            max_steps=400, learning_rate=2e-3, other_share=1.0, continued_share=0.1, relapse_share=0.3, warmup_steps=5
        ),
    ),
)
"""The quickstart: sums of three- and four-digit numbers."""

SOFT = replace(
    FULL,
    teacher_training=replace(FULL.teacher_training, swap_rate=0.5),
    student=replace(FULL.student, hidden_size=48, intermediate_size=96, head_dim=24),
    student_training=replace(FULL.student_training, swap_rate=0.5),
    misled_training=(),
)
"""A teacher with two right procedures for every line, between which it chooses at random, and a narrower student."""

TINY = ExampleSettings(
    min_digits=2,
    max_digits=2,
    train_prompts=256,
    heldout_prompts=64,
    teacher=ModelSettings(hidden_size=64, num_layers=4, intermediate_size=128, vocab_size=384, tied=False),
    teacher_training=PretrainSettings(max_steps=300, learning_rate=5e-3, random_slip_rate=0.05),
    student=ModelSettings(hidden_size=48, num_layers=2, intermediate_size=96, vocab_size=320, tied=True),
    student_training=PretrainSettings(
        max_steps=320, learning_rate=5e-3, forget_carry_from=10, forget_carry_probability=0.9
    ),
    misled_training=(),
)
"""A small version for CI: sums of two-digit numbers."""
