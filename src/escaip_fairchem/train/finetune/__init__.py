"""From a checkpoint and own data to a fine-tuned model: the command ``escaip finetune``."""

from __future__ import annotations
