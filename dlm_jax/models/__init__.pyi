from .bundle import Bundle as Bundle
from .config import ModelConfig as ModelConfig
from .diffusion_spec import DiffusionSpec as DiffusionSpec
from .lora import Lora as Lora
from .transformer import forward as forward
from .transformer import unembed as unembed
from .weights import init as init
from .weights import parameter_count as parameter_count
