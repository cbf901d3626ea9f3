"""Models of three families, small enough to run at once."""

from minigemma.config import VisionConfig
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig

SMALL = {"width": 64, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_width": 96, "vocab": 300}
RECURRENT = RecurrentGemmaConfig(**SMALL, window=8, lru_width=64, gate_blocks=2)
LOCAL_GLOBAL = Gemma2Config(**SMALL, window=8)
EYES = VisionConfig(
    width=48,
    layers=2,
    heads=2,
    ffn_width=80,
    side=56,
    patch=14,
    tokens=4,
    image_token=299,
    start_token=298,
    end_token=297,
)
SEEING = Gemma3Config(**SMALL, window=8, pattern=3, context=600, vision=EYES)

TINY_SIZES = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_width": 64, "vocab": 720}
TINY_GEMMA3 = Gemma3Config(**TINY_SIZES, window=7, context=640)
