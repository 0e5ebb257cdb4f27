from .hf_export import write_hf as write_hf
from .hf_import import read_hf as read_hf
from .layouts import LAYOUTS as LAYOUTS
from .native import read_native as read_native
from .native import write_native as write_native
from .peft import read_peft as read_peft
from .peft import write_peft as write_peft
