from .generation import generate as generate
from .requests import Request as Request
from .sample import BatchCost as BatchCost
from .sample import Sample as Sample
from .settings import Settings as Settings
from .unmasking import parse_unmasking as parse_unmasking
