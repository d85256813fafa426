"""The `model:` section of a recipe that tunes a multimodal language model. Defaults: ICL's (methods/icl.md section 6)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """The base model, its adapter, and what it is asked."""

    base: str = "Qwen/Qwen2-VL-7B-Instruct"  # `small` (built in), a folder, an s3:// prefix, or a name on the hub
    revision: str = ""  # of a hub name
    base_digest: str = ""  # content that the base must have; jobs.finetune_vlm fills it in
    pairs: str = (
        ""  # file of questions (questions.py); empty: every caption with its own and with somebody else's picture
    )
    question: str = ""  # without `pairs`: what is asked, with {text} for the caption
    answers: tuple[str, str] = ("Yes", "No")  # that it is the person, that it is not
    rank: int = 8
    alpha: int = 16
    pixels: int = 50_176  # picture budget (min = max); 0: the base model's own
    dtype: str = "auto"  # of the frozen base: auto (as stored), float32, bfloat16

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: both must be positive")
        if not self.pairs and "{text}" not in self.question:
            raise ValueError(
                f"question={self.question!r}: without a file of pairs it must say where the caption goes, with {{text}}"
            )
        if len(set(self.answers)) != 2:
            raise ValueError(f"answers={list(self.answers)}: two different words")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: auto, float32 or bfloat16")
        if self.pixels < 0:
            raise ValueError(f"pixels={self.pixels}: 0 (the base model's own) or a number of pixels")
