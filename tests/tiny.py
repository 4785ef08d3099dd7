"""A tiny chat student made on the spot: byte-level BPE tokenizer, ChatML template, two Llama layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = ["Say 1 2 3 4 5 6 7 8 9 0", "user assistant system", "one two three four five six seven eight", "yes no"]


def make_tiny(folder: Path, *, template: str = TEMPLATE, seed: int = 0, vocab_size: int = 320) -> Path:
    """Save the model and its tokenizer into a folder that `student.model` can name; 258 tokens are the bytes alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    torch.manual_seed(seed)
    # wide at the start, so that an adapter on frozen weights can learn something
    model = llama(fast, max_position_embeddings=256, initializer_range=0.2, bos_token_id=fast.bos_token_id)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def llama(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaForCausalLM:
    """Two layers, 32 wide, with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )
