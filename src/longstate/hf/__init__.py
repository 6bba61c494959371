"""Our models as Hugging Face ``transformers`` knows models; importing this registers them with its Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import LongstateCache as LongstateCache
from .chat import render_chat as render_chat
from .configuration import LongstateConfig as LongstateConfig
from .lora import LORA_TARGETS as LORA_TARGETS
from .lora import lora_targets as lora_targets
from .lora import register_with_peft
from .model import LongstateForCausalLM as LongstateForCausalLM
from .published import load_pretrained as load_pretrained

AutoConfig.register(LongstateConfig.model_type, LongstateConfig, exist_ok=True)
AutoModelForCausalLM.register(LongstateConfig, LongstateForCausalLM, exist_ok=True)
register_with_peft()
