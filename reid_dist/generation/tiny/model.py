"""The small Qwen2-VL as files: configuration, tokenizer, processor. The library's own classes, so vLLM loads them as they are.

Width 128, four layers, heads of 32 (vLLM's CPU attention needs 32 or more), vision depth 3. A picture of 96 x 48 is 72
patches, 18 tokens after merging; both pixel budgets are 4608, so every picture of this shape becomes 96 x 48. The tokenizer is a
byte-level BPE trained on the questions, in which every answer is one token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.data.synthetic.words import SLOTS
from reid_dist.generation.tiny.questions import (
    BINS,
    MATCH,
    NO,
    PARTS,
    YES,
    attribute_question,
    ground_question,
    words_of,
)
from reid_dist.generation.tiny.samples import SIDE

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")  # fmt: skip
END, IMAGE_START, IMAGE_END, IMAGE = "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
PATCH, MERGE, TEMPORAL = 8, 2, 2
GRID = (SIDE[0] // PATCH, SIDE[1] // PATCH)  # patches
TOKENS = GRID[0] * GRID[1] // MERGE**2
WIDTH, LAYERS, HEADS, FFN = 128, 4, 4, 320
VISION_WIDTH, VISION_DEPTH, VISION_HEADS = 128, 3, 4
MROPE = [4, 6, 6]
CONTEXT = 512
VOCABULARY = 640
# One user turn: the picture, the question; the answer follows. No system turn: the model knows questions only.
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] in ('image', 'image_url') %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)


def answers() -> list[str]:
    """Every word that answers."""
    words = {word for name in ATTRIBUTES for word in words_of(name).values()}
    return sorted(words | {YES, NO}) + [f"{number:02d}" for number in range(BINS + 1)]


def make_tokenizer() -> Any:
    """A fast tokenizer. Raises ValueError when an answer is not one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    questions = [*(attribute_question(name) for name in ATTRIBUTES), *(ground_question(part) for part in PARTS)]
    inner.train_from_iterator([*questions, MATCH, "no " + ", ".join(SLOTS), *answers()] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=SPECIALS[0], additional_special_tokens=list(SPECIALS[1:]),
        model_max_length=CONTEXT, chat_template=TEMPLATE,
    )  # fmt: skip
    long = [word for word in answers() if len(tokenizer.encode(word)) != 1]
    if long:
        raise ValueError(f"answers of several tokens: {', '.join(long[:5])}; raise VOCABULARY ({VOCABULARY})")
    return tokenizer


def make_config(tokenizer: Any) -> Any:
    """The library's configuration of this architecture."""
    from transformers import Qwen2VLConfig

    token = tokenizer.convert_tokens_to_ids
    end, pad = token(END), token(SPECIALS[0])
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE},
            "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad, "tie_word_embeddings": True,
        },
        vision_config={
            "depth": VISION_DEPTH, "embed_dim": VISION_WIDTH, "hidden_size": WIDTH, "num_heads": VISION_HEADS,
            "mlp_ratio": 4, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": TEMPORAL,
        },
        image_token_id=token(IMAGE), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token(IMAGE_START), vision_end_token_id=token(IMAGE_END), tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.dtype = "float32"
    return config


def image_options() -> dict[str, int]:
    """What the library's image processor is told: every picture becomes SIDE, cut into patches as the vision tower's."""
    budget = SIDE[0] * SIDE[1]
    return {"min_pixels": budget, "max_pixels": budget, "patch_size": PATCH, "merge_size": MERGE}


def save_folder(model: Any, tokenizer: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Weights (float32 safetensors), configuration, tokenizer, processor, and `recipe.json` with the digest of all that."""
    from transformers import GenerationConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    from reid_dist.models.mllm_folder import content_digest

    pixels = image_options()
    model.generation_config = GenerationConfig(eos_token_id=model.config.text_config.eos_token_id, do_sample=False)
    model.save_pretrained(folder)
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
    Qwen2VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {**facts, "digest": content_digest(folder)}
    (folder / "recipe.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
